//! GGUF's quantised blocks as the integers that the kernels multiply: four bits where all parts of a matrix have no more,
//! eight bits otherwise, a scale and an offset for each group.

use ashlar_kernels::cpu::{BlockFormat, Cell};
use half::f16;

use super::backend::block_format;
use crate::weights::{RawTensor, Weight};

/// A matrix `[rows, columns]` of `w = q · scale + offset`.
pub(super) struct Integers {
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Columns that share a scale and an offset.
    pub(super) group: usize,
    /// All of `q` are in 0..=15.
    pub(super) four_bits: bool,
    /// `[rows, columns]`
    q: Vec<i8>,
    /// `[columns / group, rows]`
    pub(super) scales: Vec<f16>,
    /// `[columns / group, rows]`
    pub(super) offsets: Vec<f16>,
}

/// The parts one above the other, if all are quantised blocks whose scales are halves.
pub(super) fn of_blocks(stacked: &[Weight<'_>]) -> Option<Integers> {
    let parts: Vec<(&RawTensor<'_>, BlockFormat, usize)> = stacked
        .iter()
        .map(|part| match part {
            Weight::Rows(raw) => {
                let format = block_format(raw.kind)?;
                Some((raw, format, format.group_len()?))
            }
            Weight::Int4(_) | Weight::Fp8(_) => None,
        })
        .collect::<Option<_>>()?;
    let columns = stacked[0].columns();
    let rows = stacked.iter().map(Weight::rows).sum();
    let group = parts.iter().map(|(_, _, group)| *group).min()?;
    let four_bits = parts.iter().all(|(_, format, _)| {
        matches!(
            format,
            BlockFormat::Q4_0 | BlockFormat::Q4_1 | BlockFormat::Q4K
        )
    });
    let cells = columns / group * rows;
    let mut whole = Integers {
        rows,
        columns,
        group,
        four_bits,
        q: Vec::with_capacity(rows * columns),
        scales: vec![f16::ZERO; cells],
        offsets: vec![f16::ZERO; cells],
    };
    for (raw, format, part_group) in parts {
        whole.add(raw, format, part_group)?;
    }
    let finite = |values: &[f16]| values.iter().all(|value| value.is_finite());
    (finite(&whole.scales) && finite(&whole.offsets)).then_some(whole)
}

impl Integers {
    fn add(&mut self, raw: &RawTensor<'_>, format: BlockFormat, part_group: usize) -> Option<()> {
        let columns = self.columns;
        // Q4_0 counts from −8.
        let shift = if self.four_bits && format == BlockFormat::Q4_0 {
            8
        } else {
            0
        };
        let mut q = vec![0i8; columns];
        let mut cells = vec![Cell::default(); columns / part_group];
        for row in raw.data.chunks_exact(raw.row_bytes()) {
            format.integers(row, &mut q, &mut cells).ok()?;
            let at = self.q.len() / columns;
            self.q.extend(q.iter().map(|q| q + shift));
            for index in 0..columns / self.group {
                let cell = cells[index * self.group / part_group];
                let place = index * self.rows + at;
                self.scales[place] = f16::from_f32(cell.scale);
                let offset = cell.offset - f32::from(shift) * cell.scale;
                self.offsets[place] = f16::from_f32(offset);
            }
        }
        Some(())
    }

    /// Of four bits: words of eight neighbouring columns, the first in the lowest nibble.
    pub(super) fn words(&self) -> Vec<u32> {
        let (words, _) = self.q.as_chunks::<8>();
        words
            .iter()
            .map(|word| {
                let nibbles = word.iter().rev();
                nibbles.fold(0, |word, q| word << 4 | u32::from(q.cast_unsigned()))
            })
            .collect()
    }

    /// One byte a value.
    pub(super) fn bytes(&self) -> Vec<u8> {
        self.q.iter().map(|q| q.cast_unsigned()).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, missing_docs)] // Tests fail by panicking.
mod tests {
    use super::*;
    use crate::weights::GgmlType;

    /// Blocks of any bits, with scales that are small normal halves.
    fn tensor(kind: GgmlType, rows: usize, columns: usize, seed: u32) -> RawTensor<'static> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        let blocks = rows * columns / kind.block_len();
        let mut data = Vec::new();
        for _ in 0..blocks {
            let start = data.len();
            data.extend((0..kind.block_bytes()).map(|_| next()));
            let half = [next(), 0x20 | next() & 3];
            let places: &[usize] = match kind {
                GgmlType::Q6K => &[208],
                GgmlType::Q4_0 | GgmlType::Q5_0 | GgmlType::Q8_0 => &[0],
                _ => &[0, 2],
            };
            for place in places {
                data[start + place..start + place + 2].copy_from_slice(&half);
            }
        }
        RawTensor {
            kind,
            rows,
            columns,
            data: data.into(),
        }
    }

    #[test]
    fn blocks_keep_their_values_to_the_scales_halves() {
        use GgmlType::{Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
        for (kinds, group, four_bits) in [
            (&[Q4_0, Q4_1][..], 32, true),
            (&[Q4K], 32, true),
            (&[Q4_0, Q8_0, Q5_0, Q5_1], 32, false),
            (&[Q4K, Q6K, Q5K], 16, false),
        ] {
            let parts: Vec<RawTensor<'static>> = kinds
                .iter()
                .enumerate()
                .map(|(i, kind)| tensor(*kind, i + 1, 512, i as u32))
                .collect();
            let stacked: Vec<Weight<'_>> = parts.iter().cloned().map(Weight::Rows).collect();
            let whole = of_blocks(&stacked).unwrap();
            assert_eq!((whole.group, whole.four_bits), (group, four_bits));
            let bytes = whole.bytes();
            let words = four_bits.then(|| whole.words());
            let mut row = 0;
            for raw in &parts {
                let mut exact = vec![0.0; raw.rows * 512];
                let format = block_format(raw.kind).unwrap();
                format.dequantize(&raw.data, &mut exact).unwrap();
                for (i, exact) in exact.iter().enumerate() {
                    let (at, column) = (row + i / 512, i % 512);
                    let q = bytes[at * 512 + column].cast_signed();
                    if let Some(words) = &words {
                        let word = words[(at * 512 + column) / 8];
                        assert_eq!(word >> (column % 8 * 4) & 15, q as u32);
                    }
                    let cell = column / group * whole.rows + at;
                    let (scale, offset) =
                        (whole.scales[cell].to_f32(), whole.offsets[cell].to_f32());
                    let value = f32::from(q) * scale + offset;
                    let most = (f32::from(q) * scale).abs().max(offset.abs()) / 1024.0;
                    assert!(
                        (value - exact).abs() <= most,
                        "{kinds:?}: {exact} became {value}"
                    );
                }
                row += raw.rows;
            }
        }
    }

    #[test]
    fn floats_and_scales_beyond_halves_stay_what_they_are() {
        let floats = RawTensor {
            kind: GgmlType::F16,
            rows: 1,
            columns: 32,
            data: vec![0; 64].into(),
        };
        assert!(of_blocks(&[Weight::Rows(floats)]).is_none());
        let mut large = tensor(GgmlType::Q4K, 1, 256, 0);
        // 60,000 times a six-bit number.
        large.data.to_mut()[..2].copy_from_slice(&f16::from_f32(60_000.0).to_le_bytes());
        large.data.to_mut()[4..16].fill(0xff);
        assert!(of_blocks(&[Weight::Rows(large)]).is_none());
    }
}
