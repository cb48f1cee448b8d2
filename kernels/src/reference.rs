//! The truth, for tests: one plain loop per operation, in f64.

/// `y[m][n] = Σₖ x[m][k] · w[n][k]`; `x` is `[rows, columns]`, `w` `[outputs, columns]`.
#[must_use]
pub fn matmul(x: &[f32], w: &[f32], columns: usize) -> Vec<f64> {
    let dot = |a: &[f32], b: &[f32]| {
        a.iter()
            .zip(b)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum()
    };
    x.chunks_exact(columns)
        .flat_map(|x| w.chunks_exact(columns).map(move |w| dot(x, w)))
        .collect()
}

/// `x / √(mean(x²) + eps) · weight` for each row.
#[must_use]
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f64> {
    x.chunks_exact(weight.len())
        .flat_map(|row| {
            let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / row.len() as f64;
            let scale = 1.0 / (mean + f64::from(eps)).sqrt();
            row.iter()
                .zip(weight)
                .map(move |(v, w)| f64::from(*v) * scale * f64::from(*w))
        })
        .collect()
}

/// `gate / (1 + e^−gate) · up` for each row of `[gate | up]`.
#[must_use]
pub fn silu_mul(gate_up: &[f32], width: usize) -> Vec<f64> {
    gate_up
        .chunks_exact(2 * width)
        .flat_map(|row| {
            (0..width).map(move |i| {
                let gate = f64::from(row[i]);
                gate / (1.0 + (-gate).exp()) * f64::from(row[width + i])
            })
        })
        .collect()
}

/// Softmax attention of one query head over contiguous `keys` and `values`, `[tokens, dim]`.
#[must_use]
pub fn attention(q: &[f32], keys: &[f32], values: &[f32], scale: f32) -> Vec<f64> {
    let dim = q.len();
    let scores: Vec<f64> = matmul(q, keys, dim)
        .into_iter()
        .map(|s| s * f64::from(scale))
        .collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut out = vec![0.0; dim];
    for (weight, value) in weights.iter().zip(values.chunks_exact(dim)) {
        out.iter_mut()
            .zip(value)
            .for_each(|(out, v)| *out += weight / sum * f64::from(*v));
    }
    out
}

/// How far `got` is from `want`: largest absolute difference, and cosine similarity.
#[must_use]
pub fn difference(got: &[f32], want: &[f64]) -> (f64, f64) {
    let mut largest = 0f64;
    let (mut dot, mut a, mut b) = (0f64, 0f64, 0f64);
    for (got, want) in got.iter().zip(want) {
        let got = f64::from(*got);
        largest = largest.max((got - want).abs());
        dot += got * want;
        a += got * got;
        b += want * want;
    }
    (
        largest,
        if a == 0.0 && b == 0.0 {
            1.0
        } else {
            dot / (a.sqrt() * b.sqrt())
        },
    )
}
