//! Rows of activations in int8, a scale for each 32 values: the left operand of products with quantised weights.
//!
//! Linear layers that share an input share one quantisation.

use super::{
    Isa, ThreadPool,
    pool::SharedMut,
    simd::{Simd, dispatch},
};

/// Values that share a scale.
pub const BLOCK: usize = 32;

/// Values that make a task worth handing out.
const TASK_VALUES: usize = 8192;

/// Magnitudes below this are zero: their scale's inverse would overflow.
const SMALLEST: f32 = 1e-35;

/// `x ≈ scale · q` per block of [`BLOCK`] values, `q` in −127..=127. Buffers are kept from call to call.
#[derive(Debug, Default)]
pub struct QuantizedRows {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// `[rows, columns]`
    pub(crate) q: Vec<i8>,
    /// `[rows, columns / 32]`
    pub(crate) scale: Vec<f32>,
    /// `scale · Σq`: what a weight's minimum is multiplied by.
    pub(crate) scaled_sum: Vec<f32>,
    /// `−128 · Σq`: takes the offset of 8-bit weights (stored as `q + 128`) off again.
    pub(crate) offset: Vec<i32>,
}

impl QuantizedRows {
    /// Quantises `x`, `[x.len() / columns, columns]`. A block that is not finite gets the scale NaN, so its row's
    /// products are NaN and no other row is touched.
    ///
    /// # Panics
    /// When `columns` is not a positive multiple of 32 that divides `x.len()`.
    pub fn quantize(&mut self, pool: &ThreadPool, x: &[f32], columns: usize) {
        self.quantize_with(Isa::detect(), pool, x, columns);
    }

    /// [`Self::quantize`] on a given instruction set, for tests.
    ///
    /// # Panics
    /// As [`Self::quantize`], and when this machine lacks `isa`.
    pub fn quantize_with(&mut self, isa: Isa, pool: &ThreadPool, x: &[f32], columns: usize) {
        assert!(isa.is_available(), "this machine has no {isa:?}");
        assert!(
            columns > 0 && columns.is_multiple_of(BLOCK) && x.len().is_multiple_of(columns),
            "rows of {columns} values"
        );
        let blocks = x.len() / BLOCK;
        (self.rows, self.columns) = (x.len() / columns, columns);
        self.q.resize(x.len(), 0);
        self.scale.resize(blocks, 0.0);
        self.scaled_sum.resize(blocks, 0.0);
        self.offset.resize(blocks, 0);
        let (q, scale) = (SharedMut::new(&mut self.q), SharedMut::new(&mut self.scale));
        let (scaled_sum, offset) = (
            SharedMut::new(&mut self.scaled_sum),
            SharedMut::new(&mut self.offset),
        );
        let per_task = TASK_VALUES / BLOCK;
        pool.run(blocks.div_ceil(per_task), &|task, _| {
            let first = task * per_task;
            let count = per_task.min(blocks - first);
            // SAFETY: tasks cover disjoint blocks, and the four buffers outlive `run`.
            let out = unsafe {
                Blocks {
                    q: q.slice(first * BLOCK, count * BLOCK),
                    scale: scale.slice(first, count),
                    scaled_sum: scaled_sum.slice(first, count),
                    offset: offset.slice(first, count),
                }
            };
            let x = &x[first * BLOCK..][..count * BLOCK];
            // SAFETY: `isa` is available: asserted above.
            dispatch!(isa, quantize_in::<>(x: &[f32], out: Blocks<'_>));
        });
    }

    /// Rows of the last input.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the last input.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }
}

/// Where some adjacent blocks go.
struct Blocks<'a> {
    q: &'a mut [i8],
    scale: &'a mut [f32],
    scaled_sum: &'a mut [f32],
    offset: &'a mut [i32],
}

/// Plain loops that the compiler turns into `S`'s instructions.
///
/// # Safety
/// The processor has `S`.
#[inline(always)]
unsafe fn quantize_in<S: Simd>(x: &[f32], out: Blocks<'_>) {
    let (x, _) = x.as_chunks::<BLOCK>();
    let (q, _) = out.q.as_chunks_mut::<BLOCK>();
    for (block, (x, q)) in x.iter().zip(q).enumerate() {
        let (scale, sum) = quantize_block(x, q);
        out.scale[block] = scale;
        out.scaled_sum[block] = scale * sum as f32;
        out.offset[block] = -128 * sum;
    }
}

#[inline(always)]
fn quantize_block(x: &[f32; BLOCK], q: &mut [i8; BLOCK]) -> (f32, i32) {
    // Magnitudes order as integers do, infinities and NaN above all finite ones.
    let mut bits = 0u32;
    for x in x {
        bits = bits.max(x.to_bits() & 0x7fff_ffff);
    }
    let largest = f32::from_bits(bits);
    if !largest.is_finite() {
        *q = [0; BLOCK];
        return (f32::NAN, 0);
    }
    if largest < SMALLEST {
        *q = [0; BLOCK];
        return (0.0, 0);
    }
    let inverse = 127.0 / largest;
    let mut rounded = [0i32; BLOCK];
    for (rounded, x) in rounded.iter_mut().zip(x) {
        // Adding 1.5·2²³ rounds to the nearest integer, ties to even, and leaves it in the low bits.
        *rounded = i32::from((x * inverse + 12_582_912.0).to_bits() as i8);
    }
    let mut sum = 0;
    for (q, rounded) in q.iter_mut().zip(&rounded) {
        *q = *rounded as i8;
        sum += rounded;
    }
    (largest / 127.0, sum)
}
