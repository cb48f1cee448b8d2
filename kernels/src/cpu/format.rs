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
                _ => {
                    let (mut q, mut cells) = ([0; MAX_BLOCK], [Cell::default(); MAX_BLOCK / 16]);
                    let q = &mut q[..out.len()];
                    let group = self.split(block, q, &mut cells);
                    let groups = out.chunks_exact_mut(group).zip(q.chunks_exact(group));
                    for ((out, q), cell) in groups.zip(&cells) {
                        out.iter_mut()
                            .zip(q)
                            .for_each(|(out, q)| *out = f32::from(*q) * cell.scale + cell.offset);
                    }
                }
            }
        }
        Ok(())
    }

    /// Values that share a [`Cell`]; none in formats of floats.
    #[must_use]
    pub const fn group_len(self) -> Option<usize> {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => None,
            Self::Q6K => Some(16),
            _ => Some(32),
        }
    }

    /// The integers of whole blocks and their cells: `value = q · scale + offset`, exactly.
    ///
    /// # Errors
    /// [`KernelError::Shape`] when `data` does not hold exactly `q.len()` values, `cells` are not one for each
    /// [`Self::group_len`] of them, or the format has no integers.
    pub fn integers(
        self,
        data: &[u8],
        q: &mut [i8],
        cells: &mut [Cell],
    ) -> Result<(), KernelError> {
        let group = self.group_len().filter(|group| {
            self.row_bytes(q.len()) == Some(data.len()) && cells.len() == q.len() / group
        });
        let Some(group) = group else {
            return Err(KernelError::Shape {
                op: "integers",
                message: format!(
                    "{} bytes of {self:?} are not {} integers in {} groups",
                    data.len(),
                    q.len(),
                    cells.len()
                ),
            });
        };
        let len = self.block_len();
        let blocks = data
            .chunks_exact(self.block_bytes())
            .zip(q.chunks_exact_mut(len));
        for ((block, q), cells) in blocks.zip(cells.chunks_exact_mut(len / group)) {
            self.split(block, q, cells);
        }
        Ok(())
    }

    /// [`Self::integers`] of one block; returns the length of a group.
    fn split(self, block: &[u8], q: &mut [i8], cells: &mut [Cell]) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => return 1,
            Self::Q4_0 => {
                cells[0] = Cell::scaled(half_at(block, 0));
                legacy(q, &block[2..], None, 8);
            }
            Self::Q4_1 => {
                cells[0] = Cell::pair_at(block);
                legacy(q, &block[4..], None, 0);
            }
            Self::Q5_0 => {
                cells[0] = Cell::scaled(half_at(block, 0));
                legacy(q, &block[6..], Some(&block[2..6]), 16);
            }
            Self::Q5_1 => {
                cells[0] = Cell::pair_at(block);
                legacy(q, &block[8..], Some(&block[4..8]), 0);
            }
            Self::Q8_0 => {
                cells[0] = Cell::scaled(half_at(block, 0));
                q.iter_mut()
                    .zip(&block[2..])
                    .for_each(|(q, stored)| *q = stored.cast_signed());
            }
            Self::Q4K => k_quant(q, cells, block, None, &block[16..]),
            Self::Q5K => k_quant(q, cells, block, Some(&block[16..48]), &block[48..]),
            Self::Q6K => q6_k(q, cells, block),
        }
        self.group_len().unwrap_or(1)
    }
}

/// Values in the longest block.
const MAX_BLOCK: usize = 256;

/// What the integers of a group stand for.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Cell {
    /// Multiplies the integer.
    pub scale: f32,
    /// Is added then.
    pub offset: f32,
}

impl Cell {
    fn scaled(scale: f32) -> Self {
        Self { scale, offset: 0.0 }
    }

    /// Two halves at the start of a block.
    fn pair_at(block: &[u8]) -> Self {
        Self {
            scale: half_at(block, 0),
            offset: half_at(block, 2),
        }
    }
}

pub(crate) fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Q4_0, Q4_1, Q5_0, Q5_1: 16 bytes of nibbles (low half first), a fifth bit each where `high` holds them.
fn legacy(q: &mut [i8], nibbles: &[u8], high: Option<&[u8]>, offset: i8) {
    let high = high.map_or(0, |h| u32::from_le_bytes([h[0], h[1], h[2], h[3]]));
    for (i, q) in q.iter_mut().enumerate() {
        let nibble = if i < 16 {
            nibbles[i] & 15
        } else {
            nibbles[i - 16] >> 4
        };
        *q = (nibble | (((high >> i) & 1) << 4) as u8).cast_signed() - offset;
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
fn k_quant(q: &mut [i8], cells: &mut [Cell], block: &[u8], high: Option<&[u8]>, nibbles: &[u8]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (group, (q, cell)) in q.chunks_exact_mut(32).zip(cells).enumerate() {
        let (scale, min) = scale_min(group, &block[4..16]);
        *cell = Cell {
            scale: d * scale,
            offset: -(dmin * min),
        };
        for (i, q) in q.iter_mut().enumerate() {
            let byte = nibbles[group / 2 * 32 + i];
            let low = if group % 2 == 0 { byte & 15 } else { byte >> 4 };
            let fifth = high.map_or(0, |high| (high[i] >> group) & 1);
            *q = (low | (fifth << 4)).cast_signed();
        }
    }
}

/// Q6_K: sixteen groups of 16 with a signed 8-bit scale each; four low bits and two high bits apart.
fn q6_k(q: &mut [i8], cells: &mut [Cell], block: &[u8]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (cell, scale) in cells.iter_mut().zip(scales) {
        *cell = Cell::scaled(d * f32::from(scale.cast_signed()));
    }
    for (i, q) in q.iter_mut().enumerate() {
        let (half, within) = (i / 128, i % 128);
        let (quarter, l) = (within / 32, within % 32);
        let byte = low[half * 64 + (quarter % 2) * 32 + l];
        let four = if quarter < 2 { byte & 15 } else { byte >> 4 };
        let two = (high[half * 32 + l] >> (2 * quarter)) & 3;
        *q = (four | (two << 4)).cast_signed() - 32;
    }
}
