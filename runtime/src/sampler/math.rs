//! Passes over one row of logits, in blocks that the compiler turns into vector code. No libm: the same result on every
//! machine.

/// Logits in a block.
pub(super) const BLOCK: usize = 256;
const LANES: usize = 16;

/// The most likely token, the lowest id among equals, and its logit; `None` if any logit is NaN or infinite.
pub(super) fn argmax_finite(logits: &[f32]) -> Option<(usize, f32)> {
    let mut best = (0, f32::NEG_INFINITY);
    let mut poison = [0f32; LANES];
    for (index, block) in logits.chunks(BLOCK).enumerate() {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let mut chunks = block.chunks_exact(LANES);
        for chunk in &mut chunks {
            for lane in 0..LANES {
                let x = chunk[lane];
                lanes[lane] = if x > lanes[lane] { x } else { lanes[lane] };
                // 0·x is 0 for a finite x and NaN for any other.
                poison[lane] += x * 0.0;
            }
        }
        for (lane, &x) in chunks.remainder().iter().enumerate() {
            lanes[lane] = lanes[lane].max(x);
            poison[lane] += x * 0.0;
        }
        let max = lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if max > best.1 {
            best = (index, max);
        }
    }
    if logits.is_empty() || poison.iter().any(|p| p.is_nan()) {
        return None;
    }
    let (block, max) = best;
    let start = block * BLOCK;
    let offset = logits[start..].iter().position(|&x| x == max)?;
    Some((start + offset, max))
}

/// Largest logit of each block.
pub(super) fn block_maxima(logits: &[f32]) -> Vec<f32> {
    let max_of = |block: &[f32]| {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let mut chunks = block.chunks_exact(LANES);
        for chunk in &mut chunks {
            for lane in 0..LANES {
                lanes[lane] = if chunk[lane] > lanes[lane] {
                    chunk[lane]
                } else {
                    lanes[lane]
                };
            }
        }
        let rest = chunks.remainder().iter().copied();
        lanes
            .iter()
            .copied()
            .chain(rest)
            .fold(f32::NEG_INFINITY, f32::max)
    };
    logits.chunks(BLOCK / 4).map(max_of).collect()
}

/// A logit that at least `k` tokens reach, as high as a cheap look finds one: the k-th largest of the block maxima.
pub(super) fn lower_bound_of_top(logits: &[f32], k: usize) -> f32 {
    let mut maxima = block_maxima(logits);
    if k == 0 || k > maxima.len() {
        return f32::NEG_INFINITY;
    }
    let (_, bound, _) = maxima.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    *bound
}

/// e^x for x ≤ 0, relative error below 3·10⁻⁷; 0 below −87. Branch-free, so that loops over it vectorise.
#[inline]
pub(super) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5·2^23: adding it rounds to an integer in the low bits
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let p = 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3F80_0000));
    if x < -87.0 { 0.0 } else { p * scale }
}

/// Weight of a logit: e^((logit − max)·inv_temperature), and 0 below `cutoff`.
#[inline]
pub(super) fn weight(logit: f32, max: f32, inv_temperature: f32, cutoff: f32) -> f32 {
    let w = exp((logit - max) * inv_temperature);
    if logit < cutoff { 0.0 } else { w }
}

/// Sum of the weights of a block.
pub(super) fn sum_of_weights(block: &[f32], max: f32, inv_temperature: f32, cutoff: f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let mut chunks = block.chunks_exact(LANES);
    for chunk in &mut chunks {
        for lane in 0..LANES {
            lanes[lane] += weight(chunk[lane], max, inv_temperature, cutoff);
        }
    }
    for (lane, &x) in chunks.remainder().iter().enumerate() {
        lanes[lane] += weight(x, max, inv_temperature, cutoff);
    }
    lanes.iter().sum()
}

/// ln Σ e^logit.
pub(super) fn log_sum_exp(logits: &[f32], max: f32) -> f64 {
    let sum: f64 = logits
        .chunks(BLOCK)
        .map(|block| f64::from(sum_of_weights(block, max, 1.0, f32::NEG_INFINITY)))
        .sum();
    f64::from(max) + sum.ln()
}
