//! Storage formats of weights and their exact dequantisation (GGUF's block layouts, little-endian).

use half::{bf16, f16};

use super::KernelError;

/// How a row of weights is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are the formats' own")]
pub enum BlockFormat {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

impl BlockFormat {
    /// Values in one block.
    #[must_use]
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block.
    #[must_use]
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Bytes of a row of `len` values; none when blocks do not divide it.
    #[must_use]
    pub const fn row_bytes(self, len: usize) -> Option<usize> {
        if len.is_multiple_of(self.block_len()) {
            Some(len / self.block_len() * self.block_bytes())
        } else {
            None
        }
    }

    /// Dequantises whole blocks, exactly: products and sums of the stored values in f32, as the format defines them.
    ///
    /// # Errors
    /// [`KernelError::Shape`] when `data` does not hold exactly `out.len()` values.
    pub fn dequantize(self, data: &[u8], out: &mut [f32]) -> Result<(), KernelError> {
        if self.row_bytes(out.len()) != Some(data.len()) {
            return Err(KernelError::Shape {
                op: "dequantize",
                message: format!(
                    "{} bytes of {self:?} are not {} values",
                    data.len(),
                    out.len()
                ),
            });
        }
        let blocks = data
            .chunks_exact(self.block_bytes())
            .zip(out.chunks_exact_mut(self.block_len()));
        for (block, out) in blocks {
            match self {
                Self::F32 => out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
                Self::F16 => out[0] = half_at(block, 0),
                Self::BF16 => out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
                Self::Q4_0 => legacy(out, half_at(block, 0), 0.0, &block[2..], None, 8),
                Self::Q4_1 => legacy(
                    out,
                    half_at(block, 0),
                    half_at(block, 2),
                    &block[4..],
                    None,
                    0,
                ),
                Self::Q5_0 => legacy(
                    out,
                    half_at(block, 0),
                    0.0,
                    &block[6..],
                    Some(&block[2..6]),
                    16,
                ),
                Self::Q5_1 => legacy(
                    out,
                    half_at(block, 0),
                    half_at(block, 2),
                    &block[8..],
                    Some(&block[4..8]),
                    0,
                ),
                Self::Q8_0 => {
                    let d = half_at(block, 0);
                    out.iter_mut()
                        .zip(&block[2..])
                        .for_each(|(out, q)| *out = f32::from(q.cast_signed()) * d);
                }
                Self::Q4K => k_quant(out, block, None, &block[16..]),
                Self::Q5K => k_quant(out, block, Some(&block[16..48]), &block[48..]),
                Self::Q6K => q6_k(out, block),
            }
        }
        Ok(())
    }
}

pub(crate) fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Q4_0, Q4_1, Q5_0, Q5_1: 16 bytes of nibbles (low half first), a fifth bit each where `high` holds them.
fn legacy(out: &mut [f32], d: f32, m: f32, nibbles: &[u8], high: Option<&[u8]>, offset: i32) {
    let high = high.map_or(0, |h| u32::from_le_bytes([h[0], h[1], h[2], h[3]]));
    for (i, out) in out.iter_mut().enumerate() {
        let nibble = if i < 16 {
            nibbles[i] & 15
        } else {
            nibbles[i - 16] >> 4
        };
        let q = i32::from(nibble) | (((high >> i) & 1) << 4).cast_signed();
        *out = (q - offset) as f32 * d + m;
    }
}

/// Scale and minimum number `j` of the eight 6-bit pairs in 12 bytes.
fn scale_min(j: usize, s: &[u8]) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        (
            (s[j + 4] & 15) | ((s[j - 4] >> 6) << 4),
            (s[j + 4] >> 4) | ((s[j] >> 6) << 4),
        )
    };
    (f32::from(scale), f32::from(min))
}

/// Q4_K and Q5_K: eight groups of 32, each with a scale and a minimum.
fn k_quant(out: &mut [f32], block: &[u8], high: Option<&[u8]>, nibbles: &[u8]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(group, &block[4..16]);
        for (i, out) in out.iter_mut().enumerate() {
            let byte = nibbles[group / 2 * 32 + i];
            let low = if group % 2 == 0 { byte & 15 } else { byte >> 4 };
            let fifth = high.map_or(0, |high| (high[i] >> group) & 1);
            *out = d * scale * f32::from(low | (fifth << 4)) - dmin * min;
        }
    }
}

/// Q6_K: sixteen groups of 16 with a signed 8-bit scale each; four low bits and two high bits apart.
fn q6_k(out: &mut [f32], block: &[u8]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (i, out) in out.iter_mut().enumerate() {
        let (half, within) = (i / 128, i % 128);
        let (quarter, l) = (within / 32, within % 32);
        let byte = low[half * 64 + (quarter % 2) * 32 + l];
        let four = if quarter < 2 { byte & 15 } else { byte >> 4 };
        let two = (high[half * 32 + l] >> (2 * quarter)) & 3;
        let q = i32::from(four | (two << 4)) - 32;
        let scale = f32::from(scales[half * 8 + within / 16].cast_signed());
        *out = d * scale * q as f32;
    }
}
