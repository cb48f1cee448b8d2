#![allow(clippy::unwrap_used, missing_docs)] // Tests fail by panicking.

use ashlar_kernels::cpu::BlockFormat;
use proptest::prelude::*;

use super::*;
use crate::weights::StoredBytes;

fn values(weight: &Weight<'_>) -> Vec<f32> {
    match weight {
        Weight::Int4(matrix) => matrix.dequantize(),
        Weight::Fp8(matrix) => matrix.dequantize(),
        Weight::Rows(raw) => raw.to_f32().unwrap_or_else(|| {
            let format = match raw.kind {
                GgmlType::Q4_1 => BlockFormat::Q4_1,
                GgmlType::Q8_0 => BlockFormat::Q8_0,
                GgmlType::Q6K => BlockFormat::Q6K,
                other => panic!("{other:?}"),
            };
            let mut values = vec![0.0; raw.rows * raw.columns];
            format.dequantize(&raw.data, &mut values).unwrap();
            values
        }),
    }
}

/// The same cut of plain values.
fn expected(values: &[f32], columns: usize, cut: Cut) -> Vec<f32> {
    let rows = values.chunks_exact(columns);
    match cut {
        Cut::Columns(span) => rows.flat_map(|row| span.take(row)).collect(),
        Cut::Rows(span) => span.times(columns).take(values),
    }
}

/// A matrix of a type, its bytes made from `seed`; scales are kept finite.
fn raw(kind: GgmlType, (rows, columns): (usize, usize), seed: u64) -> Weight<'static> {
    let int4 = Int4Matrix::random((rows, columns), columns, seed);
    let bytes = rows * columns / kind.block_len() * kind.block_bytes();
    let mut data: Vec<u8> = int4.qweight.iter().flat_map(|w| w.to_le_bytes()).collect();
    data = data.iter().copied().cycle().take(bytes).collect();
    // The high byte of every 16-bit word below 0x40: no infinite or huge number, whatever the word is part of.
    data.iter_mut().skip(1).step_by(2).for_each(|b| *b &= 0x3f);
    Weight::Rows(RawTensor {
        kind,
        rows,
        columns,
        data: data.into(),
    })
}

fn int4(rows: usize, columns: usize, group: usize, seed: u64) -> Weight<'static> {
    let mut matrix = Int4Matrix::random((rows, columns), group, seed);
    for (at, (scale, zero)) in matrix.scales.iter_mut().zip(&mut matrix.zeros).enumerate() {
        *scale = f16::from_f32(0.01 * (1 + at % 97) as f32);
        *zero = (at % 16) as u8;
    }
    Weight::Int4(matrix)
}

fn fp8(rows: usize, columns: usize, block: Option<[usize; 2]>, seed: u64) -> Weight<'static> {
    let mut matrix = Fp8Matrix::random((rows, columns), seed);
    let scale = |at: usize| 0.5 + (at % 97) as f32;
    matrix.scales = match block {
        None => Fp8Scales::Rows((0..rows).map(scale).collect()),
        Some(size) => Fp8Scales::Blocks {
            size,
            scales: (0..rows.div_ceil(size[0]) * columns.div_ceil(size[1]))
                .map(scale)
                .collect(),
        },
    };
    Weight::Fp8(matrix)
}

const KINDS: [GgmlType; 6] = [
    GgmlType::F32,
    GgmlType::F16,
    GgmlType::BF16,
    GgmlType::Q4_1,
    GgmlType::Q8_0,
    GgmlType::Q6K,
];

proptest! {
    #[test]
    fn a_cut_of_stored_rows_is_the_cut_of_their_values(
        kind in 0..KINDS.len(), rows in 1usize..40, ranks in 1usize..6, multiple in 1usize..9, seed: u64,
    ) {
        let kind = KINDS[kind];
        let columns = 512;
        let whole = values(&raw(kind, (rows, columns), seed));
        for rank in 0..ranks {
            let span = Span::of_rank(rows, (rank, ranks), multiple);
            let cut = raw(kind, (rows, columns), seed).cut(Cut::Rows(span)).unwrap();
            prop_assert_eq!((cut.rows(), cut.columns()), (span.padded, columns));
            prop_assert_eq!(values(&cut), expected(&whole, columns, Cut::Rows(span)));
        }
    }

    #[test]
    fn a_cut_of_stored_columns_is_the_cut_of_their_values(
        kind in 0..KINDS.len(), blocks in 1usize..7, ranks in 1usize..6, seed: u64,
    ) {
        let kind = KINDS[kind];
        let (rows, columns) = (3, 256 * blocks);
        let whole = values(&raw(kind, (rows, columns), seed));
        for rank in 0..ranks {
            let span = Span::of_rank(columns, (rank, ranks), kind.block_len());
            let cut = raw(kind, (rows, columns), seed).cut(Cut::Columns(span)).unwrap();
            prop_assert_eq!((cut.rows(), cut.columns()), (rows, span.padded));
            prop_assert_eq!(values(&cut), expected(&whole, columns, Cut::Columns(span)));
        }
    }

    #[test]
    fn four_bit_weights_are_cut_exactly_also_within_their_groups(
        rows in 1usize..20, groups in 1usize..6, ranks in 1usize..6, by_rows: bool, seed: u64,
    ) {
        let columns = groups * 128;
        let whole = values(&int4(rows, columns, 128, seed));
        for rank in 0..ranks {
            let cut = if by_rows {
                Cut::Rows(Span::of_rank(rows, (rank, ranks), 1))
            } else {
                Cut::Columns(Span::of_rank(columns, (rank, ranks), 32))
            };
            let part = int4(rows, columns, 128, seed).cut(cut).unwrap();
            prop_assert_eq!(values(&part), expected(&whole, columns, cut));
        }
    }

    #[test]
    fn eight_bit_floats_are_cut_exactly_also_within_their_blocks(
        rows in 1usize..70, columns in 1usize..100, block: Option<()>, ranks in 1usize..6, by_rows: bool, seed: u64,
    ) {
        let block = block.map(|()| [16, 32]);
        let whole = values(&fp8(rows, columns, block, seed));
        for rank in 0..ranks {
            let cut = if by_rows {
                Cut::Rows(Span::of_rank(rows, (rank, ranks), 8))
            } else {
                Cut::Columns(Span::of_rank(columns, (rank, ranks), 8))
            };
            let part = fp8(rows, columns, block, seed).cut(cut).unwrap();
            prop_assert_eq!(values(&part), expected(&whole, columns, cut));
        }
    }

    #[test]
    fn spans_cover_an_axis_once_and_in_order(total in 1usize..5000, ranks in 1usize..17, multiple in 1usize..300) {
        let mut next = 0;
        for rank in 0..ranks {
            let span = Span::of_rank(total, (rank, ranks), multiple);
            prop_assert_eq!(span.start, next);
            prop_assert!(span.len <= span.padded && span.padded.is_multiple_of(multiple));
            prop_assert_eq!(span.padded, Span::of_rank(total, (0, ranks), multiple).padded);
            next += span.len;
        }
        prop_assert_eq!(next, total);
    }
}

#[test]
fn quantised_blocks_are_not_divided() {
    let span = Span {
        start: 16,
        len: 16,
        padded: 16,
    };
    let message = raw(GgmlType::Q4_1, (2, 64), 1).cut(Cut::Columns(span));
    let message = message.unwrap_err();
    assert!(
        message.contains("multiples of 32; use another --tensor-parallel-size"),
        "{message}"
    );
    assert!(int4(2, 64, 32, 1).cut(Cut::Columns(span)).is_err());
}

#[test]
fn rows_that_lie_together_are_not_copied() {
    let stored = [7u8; 4 * 8 * 2];
    let whole = Weight::Rows(RawTensor {
        kind: GgmlType::F16,
        rows: 8,
        columns: 4,
        data: StoredBytes::from(&stored[..]).into(),
    });
    let Weight::Rows(cut) = whole.cut(Cut::Rows(Span::of_rank(8, (1, 2), 1))).unwrap() else {
        unreachable!()
    };
    assert!(std::ptr::eq(&*cut.data, &stored[32..]));
}
