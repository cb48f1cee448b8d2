//! Activations as signed bytes: one scale for each 32 values of a row.

use super::pool::{SharedMut, ThreadPool};

/// Values that share a scale.
pub const BLOCK: usize = 32;

/// `[rows, columns]` activations in int8: `x ≈ scale · q`, `scale = max|x| / 127` of its block.
///
/// A row's bytes depend on that row alone. Buffers grow to the largest input and stay.
#[derive(Debug, Default)]
pub struct QuantizedRows {
    pub(crate) q: Vec<i8>,
    /// Per block: scale, and scale · Σq.
    pub(crate) scale: Vec<f32>,
    pub(crate) scaled_sum: Vec<f32>,
    /// Per block: Σq.
    pub(crate) sum: Vec<i32>,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
}

impl QuantizedRows {
    /// Replaces the contents by `x`, `[x.len() / columns, columns]`.
    ///
    /// # Panics
    /// When `columns` is not a positive multiple of 32 that divides `x.len()`.
    pub fn quantize(&mut self, pool: &ThreadPool, x: &[f32], columns: usize) {
        assert!(
            columns > 0 && columns.is_multiple_of(BLOCK) && x.len().is_multiple_of(columns),
            "rows of {columns} values"
        );
        let (rows, blocks) = (x.len() / columns, columns / BLOCK);
        (self.rows, self.columns) = (rows, columns);
        self.q.resize(rows * columns, 0);
        self.scale.resize(rows * blocks, 0.0);
        self.scaled_sum.resize(rows * blocks, 0.0);
        self.sum.resize(rows * blocks, 0);
        let (q, scale) = (SharedMut::new(&mut self.q), SharedMut::new(&mut self.scale));
        let (scaled_sum, sum) = (
            SharedMut::new(&mut self.scaled_sum),
            SharedMut::new(&mut self.sum),
        );
        let rows_per_task = (8192 / columns).max(1);
        pool.run(rows.div_ceil(rows_per_task), &|task, _| {
            let first = task * rows_per_task;
            let count = rows_per_task.min(rows - first);
            // SAFETY: tasks cover disjoint rows, and the four buffers outlive `run`.
            let (q, scale, scaled_sum, sum) = unsafe {
                (
                    q.slice(first * columns, count * columns),
                    scale.slice(first * blocks, count * blocks),
                    scaled_sum.slice(first * blocks, count * blocks),
                    sum.slice(first * blocks, count * blocks),
                )
            };
            let x = &x[first * columns..][..count * columns];
            for (block, (x, q)) in x
                .chunks_exact(BLOCK)
                .zip(q.chunks_exact_mut(BLOCK))
                .enumerate()
            {
                (scale[block], sum[block]) = quantize_block(x, q);
                scaled_sum[block] = scale[block] * sum[block] as f32;
            }
        });
    }
}

#[inline]
fn quantize_block(x: &[f32], q: &mut [i8]) -> (f32, i32) {
    let largest = x.iter().fold(0f32, |max, x| max.max(x.abs()));
    if !largest.is_finite() || x.iter().any(|x| x.is_nan()) {
        // A row that is not finite stays so: its scale says it, and its logits fail that request alone.
        q.fill(1);
        return (f32::NAN, 32);
    }
    let scale = largest / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    let mut sum = 0;
    for (x, q) in x.iter().zip(q) {
        // Adding 1.5·2²³ rounds to the nearest integer, ties to even, and leaves it in the low bits.
        let rounded = (x * inverse + 12_582_912.0).to_bits() as i8;
        *q = rounded;
        sum += i32::from(rounded);
    }
    (scale, sum)
}
