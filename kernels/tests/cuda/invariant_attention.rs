//! The prefill kernel for every architecture: a row's result depends on the row and its tokens alone, bit for bit.

use ashlar_kernels::cuda::attention::HeadShape;

use crate::{
    attention::kv_dtypes_and,
    attention_case::{Case, shape},
    support::*,
};

/// All rows of a sequence at once, and in pieces that put them at other places of a tile and in other company, beside a sequence
/// without rows.
#[test]
fn a_portable_row_depends_on_itself_alone() {
    for float in FLOATS {
        for (heads, kv_heads, dim) in [(9, 3, 64), (8, 2, 128), (6, 2, 96), (4, 1, 256)] {
            for ((kv_dtype, kv_scales), window) in kv_dtypes_and([0, 40, 150]) {
                let (rows, len) = (333, 400);
                let case = Case {
                    shape: HeadShape {
                        kv_dtype,
                        ..shape(float, heads, kv_heads, dim, window)
                    },
                    kv_scales,
                    seqs: vec![(rows, len)],
                };
                let data = case.data(dim as u64 + 3);
                let whole = case.prefill_by(&data, true);
                for piece in [1, 7, 33, 64, 130] {
                    let (mut seqs, mut first_rows) = (Vec::new(), Vec::new());
                    for first in (0..rows).step_by(piece) {
                        let last = rows.min(first + piece);
                        seqs.push((last - first, len - rows + last));
                        first_rows.push(first as i32);
                    }
                    seqs.push((0, 0));
                    first_rows.push(0);
                    let table_starts = vec![data.table_starts[0]; seqs.len()];
                    let starts = (first_rows.as_slice(), table_starts.as_slice());
                    let found = case.prefill_of(&data, &seqs, starts, true).unwrap();
                    let row = heads * dim;
                    for (i, (found, whole)) in found.chunks(row).zip(whole.chunks(row)).enumerate()
                    {
                        // NaN is equal to nothing: every row was written.
                        assert!(
                            found == whole,
                            "{float:?} {kv_dtype:?} {heads}/{kv_heads}×{dim} window {window}: row {i} in pieces of {piece}"
                        );
                    }
                }
            }
        }
    }
}
