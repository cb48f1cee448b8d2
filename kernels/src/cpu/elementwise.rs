//! Row-wise operations: norms, rotary embedding, SiLU gate. A row's result depends on that row alone.

use super::{
    Isa, ThreadPool,
    pool::SharedMut,
    simd::{Simd, dispatch},
};

/// Values that make a task worth handing out.
const TASK_VALUES: usize = 16 * 1024;

fn rows_per_task(width: usize) -> usize {
    (TASK_VALUES / width).max(1)
}

/// `out = x / √(mean(x²) + eps) · weight` for each row; `x` and `out` are `[rows, weight.len()]`.
///
/// # Panics
/// When the shapes do not fit.
pub fn rms_norm(pool: &ThreadPool, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    assert!(
        width > 0 && x.len() == out.len() && x.len().is_multiple_of(width),
        "rms_norm of rows of {width}"
    );
    let (rows, step, isa) = (x.len() / width, rows_per_task(width), Isa::detect());
    let out = SharedMut::new(out);
    pool.run(rows.div_ceil(step), &|task, _| {
        for row in task * step..((task + 1) * step).min(rows) {
            // SAFETY: each row is written by one task.
            let out = unsafe { out.slice(row * width, width) };
            norm_row(isa, &x[row * width..][..width], weight, eps, out);
        }
    });
}

/// `residual += delta`, `out = norm(residual)`; all `[rows, weight.len()]`.
///
/// # Panics
/// When the shapes do not fit.
pub fn add_rms_norm(
    pool: &ThreadPool,
    delta: &[f32],
    weight: &[f32],
    eps: f32,
    residual: &mut [f32],
    out: &mut [f32],
) {
    let width = weight.len();
    assert!(
        width > 0
            && delta.len() == residual.len()
            && delta.len() == out.len()
            && delta.len().is_multiple_of(width),
        "add_rms_norm of rows of {width}"
    );
    let (rows, step, isa) = (delta.len() / width, rows_per_task(width), Isa::detect());
    let (residual, out) = (SharedMut::new(residual), SharedMut::new(out));
    pool.run(rows.div_ceil(step), &|task, _| {
        for row in task * step..((task + 1) * step).min(rows) {
            // SAFETY: each row of either buffer is touched by one task.
            let (residual, out) = unsafe {
                (
                    residual.slice(row * width, width),
                    out.slice(row * width, width),
                )
            };
            residual
                .iter_mut()
                .zip(&delta[row * width..][..width])
                .for_each(|(r, d)| *r += d);
            norm_row(isa, residual, weight, eps, out);
        }
    });
}

fn norm_row(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    // SAFETY: `isa` was detected; the three slices have one length.
    dispatch!(isa, norm_row_in::<>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]))
}

/// # Safety
/// The processor has `S`; the slices have one length.
#[inline(always)]
unsafe fn norm_row_in<S: Simd>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let whole = x.len() / 16 * 16;
    // SAFETY: every pointer stays below `whole` ≤ the common length.
    unsafe {
        let mut squares = S::splat(0.0);
        for i in (0..whole).step_by(16) {
            let v = S::load(x.as_ptr().add(i));
            squares = S::fma(v, v, squares);
        }
        let rest: f32 = x[whole..].iter().map(|v| v * v).sum();
        let scale = 1.0 / ((S::reduce_add(squares) + rest) / x.len() as f32 + eps).sqrt();
        for i in (0..whole).step_by(16) {
            let v = S::mul(S::load(x.as_ptr().add(i)), S::splat(scale));
            S::store(
                out.as_mut_ptr().add(i),
                S::mul(v, S::load(weight.as_ptr().add(i))),
            );
        }
        for i in whole..x.len() {
            out[i] = x[i] * scale * weight[i];
        }
    }
}

/// `out = silu(gate) · up`; `gate_up` is `[rows, 2·width]`, gate first; `out` is `[rows, width]`.
///
/// # Panics
/// When the shapes do not fit.
pub fn silu_mul(pool: &ThreadPool, gate_up: &[f32], width: usize, out: &mut [f32]) {
    assert!(
        width > 0 && gate_up.len() == 2 * out.len() && out.len().is_multiple_of(width),
        "silu_mul of rows of {width}"
    );
    let (rows, step, isa) = (out.len() / width, rows_per_task(width), Isa::detect());
    let out = SharedMut::new(out);
    pool.run(rows.div_ceil(step), &|task, _| {
        for row in task * step..((task + 1) * step).min(rows) {
            // SAFETY: each row is written by one task.
            let out = unsafe { out.slice(row * width, width) };
            let (gate, up) = gate_up[row * 2 * width..][..2 * width].split_at(width);
            // SAFETY: `isa` was detected; the three slices have one length.
            dispatch!(isa, silu_row_in::<>(gate: &[f32], up: &[f32], out: &mut [f32]));
        }
    });
}

/// # Safety
/// The processor has `S`; the slices have one length.
#[inline(always)]
unsafe fn silu_row_in<S: Simd>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    let whole = gate.len() / 16 * 16;
    // SAFETY: every pointer stays below `whole` ≤ the common length, or points at 16 local values.
    unsafe {
        let one = |gate, up| {
            let e = S::exp(S::sub(S::splat(0.0), gate));
            S::mul(S::div(gate, S::add(S::splat(1.0), e)), up)
        };
        for i in (0..whole).step_by(16) {
            S::store(
                out.as_mut_ptr().add(i),
                one(S::load(gate.as_ptr().add(i)), S::load(up.as_ptr().add(i))),
            );
        }
        let rest = gate.len() - whole;
        if rest > 0 {
            let (mut g, mut u, mut y) = ([0f32; 16], [0f32; 16], [0f32; 16]);
            g[..rest].copy_from_slice(&gate[whole..]);
            u[..rest].copy_from_slice(&up[whole..]);
            S::store(
                y.as_mut_ptr(),
                one(S::load(g.as_ptr()), S::load(u.as_ptr())),
            );
            out[whole..].copy_from_slice(&y[..rest]);
        }
    }
}

/// Rotates pairs `(i, i + dim/2)` of one head by the angles whose cosines and sines are given.
///
/// # Panics
/// When `cos`, `sin` are not half as long as `head`.
pub fn rope(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = head.len() / 2;
    assert!(
        head.len().is_multiple_of(2) && cos.len() == half && sin.len() == half,
        "rope of a head of {}",
        head.len()
    );
    let isa = Isa::detect();
    // SAFETY: `isa` was detected.
    dispatch!(isa, rope_in::<>(head: &mut [f32], cos: &[f32], sin: &[f32]));
}

/// A plain loop that the compiler turns into `S`'s instructions; products and sums round one by one on all of them.
///
/// # Safety
/// The processor has `S`.
#[inline(always)]
unsafe fn rope_in<S: Simd>(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = head.split_at_mut(cos.len());
    for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        let (a, b) = (*low, *high);
        *low = a * cos - b * sin;
        *high = b * cos + a * sin;
    }
}

/// RMS norm of one head in place: what models with q and k norms do before they rotate.
///
/// # Panics
/// When `weight` has another length.
pub fn head_norm(head: &mut [f32], weight: &[f32], eps: f32) {
    assert_eq!(head.len(), weight.len(), "head_norm");
    let mean = head.iter().map(|v| v * v).sum::<f32>() / head.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    head.iter_mut()
        .zip(weight)
        .for_each(|(v, w)| *v = *v * scale * w);
}
