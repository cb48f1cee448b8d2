//! Products of quantised weights and 16-bit activations, made of two of 8 bits.

use ashlar_kernels::cpu::{self as kernels, PackedMatrix, quantize::BLOCK};

use super::{CpuBackend, CpuBuf};
#[cfg(doc)]
use crate::models::backend::Backend;
use crate::models::backend::Linear;

impl CpuBackend {
    /// [`Backend::linear`] with 16-bit activations: each row goes as what 8 bits hold of it and as what they leave over,
    /// two rows of one product, whose results are added. With 8 bits alone the default model's logits stray by up to
    /// 1.6e-2 (1 − cosine), enough to turn a greedy answer; with 16 by 1.4e-5.
    pub(super) fn linear_in_two(
        &mut self,
        x: &CpuBuf,
        weight: &Linear<PackedMatrix, Vec<f32>>,
        y: &mut [f32],
    ) {
        let (columns, width) = (x.width, weight.out_features);
        let mut split = std::mem::take(&mut self.split);
        split.resize(2 * x.rows * columns, 0.0);
        self.for_rows(&mut split, 2 * columns, |first, pairs| {
            let rows = x.values()[first * columns..].chunks_exact(columns);
            for (pair, row) in pairs.chunks_exact_mut(2 * columns).zip(rows) {
                let (high, low) = pair.split_at_mut(columns);
                split_row(row, high, low);
            }
        });
        let mut products = std::mem::take(&mut self.products);
        products.resize(2 * x.rows * width, 0.0);
        kernels::linear(
            &self.pool,
            &weight.parts,
            None,
            &split,
            &mut self.quantized,
            &mut products,
        );
        self.for_rows(y, width, |first, rows| {
            let pairs = products[2 * first * width..].chunks_exact(2 * width);
            for (y, pair) in rows.chunks_exact_mut(width).zip(pairs) {
                for (i, y) in y.iter_mut().enumerate() {
                    *y = pair[i]
                        + pair[width + i]
                        + weight.bias.as_ref().map_or(0.0, |bias| bias[i]);
                }
            }
        });
        (self.split, self.products) = (split, products);
    }
}

/// `row = high + low`, where `high` is what 8 bits with a scale for each block hold of it.
fn split_row(row: &[f32], high: &mut [f32], low: &mut [f32]) {
    // Adding and taking off 1.5·2²³ rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    let blocks = row
        .chunks(BLOCK)
        .zip(high.chunks_mut(BLOCK))
        .zip(low.chunks_mut(BLOCK));
    for ((row, high), low) in blocks {
        let largest = row.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let (scale, inverse) = if largest > 1e-30 {
            (largest / 127.0, 127.0 / largest)
        } else {
            (0.0, 0.0)
        };
        for ((x, high), low) in row.iter().zip(high).zip(low) {
            *high = ((x * inverse + ROUND) - ROUND) * scale;
            *low = x - *high;
        }
    }
}
