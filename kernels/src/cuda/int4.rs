//! Four-bit weights on the GPU, `w = (q − zero) · scale` or `q · scale + offset`, with IEEE halves beside them: how they are
//! stored, and how they become halves for large products. Small ones read them as they are ([`SkinnyGemm`](super::skinny::SkinnyGemm)).

use half::f16;

use super::{
    CudaError, Device, View,
    modules::{Shape, arguments},
    need,
};

/// Columns that a thread of the dequantising kernel makes of a row.
const EIGHT: usize = 8;
/// Rows that a thread of the dequantising kernel takes: as in `int4.cu`.
const DEQUANTIZE_ROWS: usize = 4;
/// Values that a thread reads at once: a group is a power of two of these, or a whole row.
const CHUNK: usize = 32;

/// A matrix `[n, k]` of four-bit weights.
#[derive(Clone, Copy)]
pub struct Int4View<'a> {
    /// `[n, k / 8]` u32, from [`words`].
    pub words: View<'a>,
    /// `[k / group, n]` u32, from [`cells`].
    pub cells: View<'a>,
    /// Columns that share a cell; see [`takes`].
    pub group: usize,
    /// Cells hold a scale and an offset, `w = q · scale + offset`, from [`eight_bit::cells`](super::eight_bit::cells).
    pub affine: bool,
}

/// Whether rows of `k` values in groups of `group` can be kept in four bits here.
#[must_use]
pub fn takes(k: usize, group: usize) -> bool {
    group_shift(k, group).is_some() && k <= 1 << 24
}

/// Chunks of a group, as a power of two; 31 where one group is a whole row.
pub(super) fn group_shift(k: usize, group: usize) -> Option<i32> {
    if group == 0 || !group.is_multiple_of(CHUNK) || k == 0 || !k.is_multiple_of(group) {
        return None;
    }
    let chunks = group / CHUNK;
    if k == group {
        Some(31)
    } else if chunks.is_power_of_two() {
        i32::try_from(chunks.trailing_zeros()).ok()
    } else {
        None
    }
}

/// Words with columns in order (lowest nibble first) in the order of the kernels: of each four words, word `q` has the columns
/// `8b + 2q` in its nibbles `b` and the columns behind them in its nibbles `b + 4`.
///
/// # Panics
/// When they are not fours of words.
#[must_use]
pub fn words(in_order: &[u32]) -> Vec<u8> {
    // The four low nibbles of the bytes, side by side.
    let gather = |word: u32| {
        let pairs = word & 0x0f0f_0f0f;
        let pairs = (pairs | pairs >> 4) & 0x00ff_00ff;
        (pairs | pairs >> 8) & 0xffff
    };
    let (fours, rest) = in_order.as_chunks::<4>();
    assert!(rest.is_empty(), "rows of fours of words");
    let mut bytes = vec![0; 4 * in_order.len()];
    let places = bytes.as_chunks_mut::<16>().0.iter_mut();
    places.zip(fours).for_each(|(place, four)| {
        for (q, bytes) in place.as_chunks_mut().0.iter_mut().enumerate() {
            let pairs = u32::from_le_bytes(four.map(|word| word.to_le_bytes()[q]));
            *bytes = (gather(pairs) | gather(pairs >> 4) << 16).to_le_bytes();
        }
    });
    bytes
}

/// A scale and its zero (0..=15) as the kernels read them: the scale in the low half, 1024 + zero in the high one.
///
/// # Panics
/// When there are not as many zeros as scales.
#[must_use]
pub fn cells(scales: &[f16], zeros: &[u8]) -> Vec<u8> {
    assert_eq!(scales.len(), zeros.len(), "scales and zeros");
    let pairs = scales.iter().zip(zeros);
    pairs
        .flat_map(|(scale, zero)| {
            let [a, b] = scale.to_le_bytes();
            let [c, d] = f16::from_f32(1024.0 + f32::from(*zero)).to_le_bytes();
            [a, b, c, d]
        })
        .collect()
}

impl Int4View<'_> {
    pub(super) fn kernel(&self) -> &'static str {
        if self.affine { "int4_affine" } else { "int4" }
    }

    pub(super) fn fits(&self, n: usize, k: usize) -> bool {
        takes(k, self.group)
            && self.words.bytes >= n * k / 2
            && self.cells.bytes >= k / self.group * n * 4
    }
}

/// Fills words with random bits that depend on the seed alone, and every cell with this zero and scale, of either sign.
///
/// # Errors
/// [`CudaError::Driver`].
pub fn fill_random(
    device: &Device,
    (words, word_cells): (View<'_>, View<'_>),
    (scale, zero): (f16, u8),
    seed: u64,
) -> Result<(), CudaError> {
    let cell = cells(&[scale], &[zero]);
    let cell = u32::from_le_bytes([cell[0], cell[1], cell[2], cell[3]]);
    let (word_count, cell_count) = ((words.bytes / 4) as i64, (word_cells.bytes / 4) as i64);
    let (to_words, to_cells) = (words.address(), word_cells.address());
    let shape = Shape {
        grid: (device.multiprocessors() as usize * 8, 1),
        threads: 256,
        shared: 0,
    };
    // SAFETY: parameters as in `int4.cu`; as many words lie in each view.
    unsafe {
        device.launch(
            "int4_random",
            shape,
            arguments![to_words, word_count, to_cells, cell_count, cell, seed],
        )
    }
}

/// `out = w`, rounded once to halves.
#[derive(Clone, Copy)]
pub struct DequantizeInt4<'a> {
    /// `[n, k]`
    pub weight: Int4View<'a>,
    /// `[n, k]` halves.
    pub out: View<'a>,
    /// Rows.
    pub n: usize,
    /// Columns.
    pub k: usize,
}

impl DequantizeInt4<'_> {
    fn validate(&self) -> Result<(), CudaError> {
        let (op, n, k, group) = ("dequantize_int4", self.n, self.k, self.weight.group);
        need(n > 0 && n < 1 << 31 && takes(k, group), op, || {
            format!(
                "{n} × {k} in groups of {group}: groups of 32, 64, 128, … or of a whole row are needed"
            )
        })?;
        need(
            self.weight.fits(n, k) && self.out.bytes >= n * k * 2,
            op,
            || format!("a view is too short for {n} × {k}"),
        )
    }

    /// Queues it.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or the driver refuses.
    pub fn launch(&self, device: &Device) -> Result<(), CudaError> {
        self.validate()?;
        let (weight, cells) = (self.weight.words.address(), self.weight.cells.address());
        let (out, n) = (self.out.address(), self.n as i32);
        let eights = self.k / EIGHT;
        let threads = eights.next_multiple_of(32).min(256);
        let (eights_i32, per_group) = (eights as i32, (self.weight.group / EIGHT) as i32);
        let shape = Shape {
            grid: (self.n.div_ceil(DEQUANTIZE_ROWS), eights.div_ceil(threads)),
            threads,
            shared: 0,
        };
        // SAFETY: parameters as in `int4.cu`; every view holds what the shape needs, and grid and widths fit 32 bits
        // (`validate`); a thread reads whole fours of words and writes its own eight columns' place alone.
        unsafe {
            device.launch(
                &format!("{}_dequantize", self.weight.kernel()),
                shape,
                arguments![weight, cells, out, n, eights_i32, per_group],
            )
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, missing_docs)] // Tests fail by panicking.
mod tests {
    use super::*;

    #[test]
    fn words_and_cells_are_in_the_kernels_order() {
        // Only columns 8, 9 (word 1) and 30, 31 (word 3) are not 0.
        let in_order = [0, 0x0000_0021, 0, 0x4300_0000];
        let kernels = [0x0020_0010u32, 0, 0, 0x4000_3000];
        assert_eq!(words(&in_order), kernels.map(u32::to_le_bytes).concat());
        let thirds = [0, 0xffffu32, 0, 0].map(u32::to_le_bytes).concat();
        assert_eq!(words(&[0x0f00; 4]), thirds);
        let bytes = cells(&[f16::from_f32(0.5)], &[9]);
        let half = |at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32();
        assert_eq!((half(0), half(2)), (0.5, 1033.0));
    }

    #[test]
    fn groups_are_powers_of_two_or_whole_rows() {
        let shifts: Vec<_> = [32, 64, 128, 96, 384, 0, 48]
            .map(|group| group_shift(384, group))
            .into();
        assert_eq!(
            shifts,
            [Some(0), Some(1), Some(2), None, Some(31), None, None]
        );
        assert_eq!(group_shift(100, 32), None);
    }
}
