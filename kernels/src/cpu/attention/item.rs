//! One item of attention on one instruction set: scores of its rows, their softmax, their sums over V.

#![allow(
    clippy::needless_range_loop,
    reason = "one index runs over several register arrays"
)]

use super::{AttentionArgs, BLOCK_SIZE, Item};
use crate::cpu::{kv_cache::KvLayout, pool::SharedMut, simd::Simd};

/// Most rows (query heads of one kv head × tokens) whose scores are kept in registers at once.
const MAX_ROWS: usize = 8;

/// # Safety
/// As [`attend`].
#[inline(always)]
pub(super) unsafe fn attend_f32<S: Simd>(
    data: &[f32],
    layout: KvLayout,
    args: &AttentionArgs<'_>,
    item: &Item,
    scores: &mut Vec<f32>,
    out: SharedMut<f32>,
) {
    // SAFETY: passed on; `at` is only called with 16 values left in `data`.
    unsafe {
        attend::<S>(
            |at| S::load(data.as_ptr().add(at)),
            layout,
            args,
            item,
            scores,
            out,
        )
    }
}

/// # Safety
/// As [`attend`].
#[inline(always)]
pub(super) unsafe fn attend_f16<S: Simd>(
    data: &[u16],
    layout: KvLayout,
    args: &AttentionArgs<'_>,
    item: &Item,
    scores: &mut Vec<f32>,
    out: SharedMut<f32>,
) {
    // SAFETY: passed on; `at` is only called with 16 values left in `data`.
    unsafe {
        attend::<S>(
            |at| S::load_f16(data.as_ptr().add(at)),
            layout,
            args,
            item,
            scores,
            out,
        )
    }
}

/// # Safety
/// As [`attend`].
#[inline(always)]
pub(super) unsafe fn attend_f8<S: Simd>(
    data: &[u8],
    layout: KvLayout,
    args: &AttentionArgs<'_>,
    item: &Item,
    scores: &mut Vec<f32>,
    out: SharedMut<f32>,
) {
    // SAFETY: passed on; `at` is only called with 16 values left in `data`, and so many halves are loaded.
    unsafe {
        attend::<S>(
            |at| {
                // Moved to where a half has its exponent they lack the difference of the two biases, 8.
                let mut halves = [0u16; 16];
                for (i, half) in halves.iter_mut().enumerate() {
                    let byte = u16::from(*data.get_unchecked(at + i));
                    *half = (byte & 0x80) << 8 | (byte & 0x7f) << 7;
                }
                S::mul(S::load_f16(halves.as_ptr()), S::splat(256.0))
            },
            layout,
            args,
            item,
            scores,
            out,
        )
    }
}

/// One item: scores of all its rows, their softmax, their sums over V.
///
/// # Safety
/// The processor has `S`; `load(at)` reads 16 values at `at`, in bounds for `at + 16 ≤ num_blocks · block_values`;
/// the item's rows and blocks were checked by `paged_attention_with`; no one else writes the item's outputs.
#[inline(always)]
unsafe fn attend<S: Simd>(
    load: impl Fn(usize) -> S::F + Copy,
    layout: KvLayout,
    args: &AttentionArgs<'_>,
    item: &Item,
    scores: &mut Vec<f32>,
    out: SharedMut<f32>,
) {
    let seq = &args.seqs[item.seq];
    let (dim, group) = (layout.head_dim, args.heads / layout.kv_heads);
    let rows = group * item.count;
    let before = seq.context_len - seq.query_len;
    // Row r is query token `first + r / group`, head `kv_head · group + r % group`.
    let limit = |row: usize| before + item.first + row / group + 1;
    let start = |row: usize| {
        args.window
            .map_or(0, |window| limit(row).saturating_sub(window))
    };
    let q_of = |row: usize| {
        (seq.query_start + item.first + row / group) * args.q_stride
            + (item.kv_head * group + row % group) * dim
    };
    let blocks = limit(rows - 1).div_ceil(BLOCK_SIZE);
    let first_block = start(0) / BLOCK_SIZE;
    let width = blocks * BLOCK_SIZE;
    if scores.len() < rows * width {
        scores.resize(rows * width, 0.0);
    }
    let key_base = |block: usize| {
        seq.block_table[block] as usize * layout.block_values()
            + item.kv_head * layout.head_values()
    };
    // SAFETY: `scores` holds `rows · width` values; queries and blocks are in bounds by the caller's promise.
    unsafe {
        for block in first_block..blocks {
            let base = key_base(block);
            let mut row = 0;
            while row < rows {
                let at = scores.as_mut_ptr().add(row * width + block * BLOCK_SIZE);
                let q = |i: usize| args.q.as_ptr().add(q_of(row + i));
                row += match rows - row {
                    MAX_ROWS.. => {
                        score_block::<S, MAX_ROWS>(load, base, dim, q, at, width, args.scale)
                    }
                    6.. => score_block::<S, 6>(load, base, dim, q, at, width, args.scale),
                    4.. => score_block::<S, 4>(load, base, dim, q, at, width, args.scale),
                    3 => score_block::<S, 3>(load, base, dim, q, at, width, args.scale),
                    2 => score_block::<S, 2>(load, base, dim, q, at, width, args.scale),
                    _ => score_block::<S, 1>(load, base, dim, q, at, width, args.scale),
                };
            }
        }
        for token in 0..item.count {
            let (limit, start) = (limit(token * group), start(token * group));
            for head in 0..group {
                let row = token * group + head;
                softmax::<S>(
                    &mut scores[row * width..][..limit.div_ceil(BLOCK_SIZE) * BLOCK_SIZE],
                    start,
                    limit,
                );
            }
            let value_base =
                |block: usize| key_base(block) + layout.kv_heads * layout.head_values();
            let to = (seq.query_start + item.first + token) * args.heads * dim
                + item.kv_head * group * dim;
            let out = out.slice(to, group * dim);
            let weights = &scores[token * group * width..][..group * width];
            let mut head = 0;
            while head < group {
                let weights = &weights[head * width..];
                let out = &mut out[head * dim..];
                head += match group - head {
                    4.. => {
                        sum_values::<S, 4>(load, value_base, dim, weights, width, start, limit, out)
                    }
                    3 => {
                        sum_values::<S, 3>(load, value_base, dim, weights, width, start, limit, out)
                    }
                    2 => {
                        sum_values::<S, 2>(load, value_base, dim, weights, width, start, limit, out)
                    }
                    _ => {
                        sum_values::<S, 1>(load, value_base, dim, weights, width, start, limit, out)
                    }
                };
            }
        }
    }
}

/// Scores of `R` rows against the 16 keys of a block; returns `R`.
///
/// # Safety
/// The processor has `S`; `load` takes `base + 16·d` for `d < dim`; `q(i)` points at `dim` values for `i < R`;
/// `at + i·width` at 16 writable ones.
#[inline(always)]
unsafe fn score_block<S: Simd, const R: usize>(
    load: impl Fn(usize) -> S::F,
    base: usize,
    dim: usize,
    q: impl Fn(usize) -> *const f32,
    at: *mut f32,
    width: usize,
    scale: f32,
) -> usize {
    // SAFETY: the caller's promise.
    unsafe {
        let q: [*const f32; R] = std::array::from_fn(q);
        let mut acc = [S::splat(0.0); R];
        for d in 0..dim {
            let k = load(base + d * BLOCK_SIZE);
            for r in 0..R {
                acc[r] = S::fma(k, S::splat(*q[r].add(d)), acc[r]);
            }
        }
        for r in 0..R {
            S::store(at.add(r * width), S::mul(acc[r], S::splat(scale)));
        }
    }
    R
}

/// Softmax over positions `start..limit` of a row of scores, whole blocks long; the others become 0.
///
/// # Safety
/// The processor has `S`.
#[inline(always)]
unsafe fn softmax<S: Simd>(scores: &mut [f32], start: usize, limit: usize) {
    let first = start / BLOCK_SIZE * BLOCK_SIZE;
    scores[first..start].fill(f32::NEG_INFINITY);
    scores[limit..].fill(f32::NEG_INFINITY);
    // SAFETY: steps of 16 within `scores`, whose length is a multiple of 16.
    unsafe {
        let mut largest = S::splat(f32::NEG_INFINITY);
        for i in (first..scores.len()).step_by(16) {
            largest = S::max(S::load(scores.as_ptr().add(i)), largest);
        }
        let largest = S::splat(S::reduce_max(largest));
        let mut sum = S::splat(0.0);
        for i in (first..scores.len()).step_by(16) {
            let e = S::exp(S::sub(S::load(scores.as_ptr().add(i)), largest));
            S::store(scores.as_mut_ptr().add(i), e);
            sum = S::add(sum, e);
        }
        // exp of −∞ is e⁻⁸⁷ here: below half an ulp of any sum, which is at least 1, and cleared for the products.
        let inverse = S::splat(1.0 / S::reduce_add(sum));
        for i in (first..scores.len()).step_by(16) {
            S::store(
                scores.as_mut_ptr().add(i),
                S::mul(S::load(scores.as_ptr().add(i)), inverse),
            );
        }
    }
    scores[first..start].fill(0.0);
    scores[limit..].fill(0.0);
}

/// `out[r] = Σ weights[r][t] · v[t]` over positions `start..limit` in order; returns `R`.
///
/// # Safety
/// The processor has `S`; `load` takes `value_base(block) + token·dim + d` for the blocks of `start..limit`;
/// `weights` holds `R` rows `width` apart and `out` `R` rows of `dim`.
#[inline(always)]
#[allow(
    clippy::too_many_arguments,
    reason = "inner loop: everything stays in registers"
)]
unsafe fn sum_values<S: Simd, const R: usize>(
    load: impl Fn(usize) -> S::F,
    value_base: impl Fn(usize) -> usize,
    dim: usize,
    weights: &[f32],
    width: usize,
    start: usize,
    limit: usize,
    out: &mut [f32],
) -> usize {
    let mut d = 0;
    // SAFETY: the caller's promise; `dim` is a multiple of 16, and the wide step is taken only with 64 values left.
    unsafe {
        while d < dim {
            d += if dim - d >= 64 {
                sum_lanes::<S, R, 4>(
                    &load,
                    &value_base,
                    dim,
                    d,
                    weights,
                    width,
                    start,
                    limit,
                    out,
                )
            } else {
                sum_lanes::<S, R, 1>(
                    &load,
                    &value_base,
                    dim,
                    d,
                    weights,
                    width,
                    start,
                    limit,
                    out,
                )
            };
        }
    }
    R
}

/// Lanes `d..d + 16·N` of [`sum_values`]; returns `16·N`.
///
/// # Safety
/// As [`sum_values`], with `d + 16·N ≤ dim`.
#[inline(always)]
#[allow(
    clippy::too_many_arguments,
    reason = "inner loop: everything stays in registers"
)]
unsafe fn sum_lanes<S: Simd, const R: usize, const N: usize>(
    load: &impl Fn(usize) -> S::F,
    value_base: &impl Fn(usize) -> usize,
    dim: usize,
    d: usize,
    weights: &[f32],
    width: usize,
    start: usize,
    limit: usize,
    out: &mut [f32],
) -> usize {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[S::splat(0.0); N]; R];
        for block in start / BLOCK_SIZE..limit.div_ceil(BLOCK_SIZE) {
            let base = value_base(block) + d;
            let from = start.max(block * BLOCK_SIZE);
            let to = limit.min((block + 1) * BLOCK_SIZE);
            for position in from..to {
                let at = base + (position % BLOCK_SIZE) * dim;
                let v: [S::F; N] = std::array::from_fn(|n| load(at + 16 * n));
                for r in 0..R {
                    let weight = S::splat(*weights.get_unchecked(r * width + position));
                    for n in 0..N {
                        acc[r][n] = S::fma(weight, v[n], acc[r][n]);
                    }
                }
            }
        }
        for r in 0..R {
            for n in 0..N {
                S::store(out[r * dim + d + 16 * n..][..16].as_mut_ptr(), acc[r][n]);
            }
        }
    }
    16 * N
}
