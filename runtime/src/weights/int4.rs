//! Four-bit weights: one representation for every checkpoint that stores them, and the readers that lead to it.
//!
//! ```text
//! AWQ ──────────────────┐
//! GPTQ ─────────────────┼─► Int4Matrix: w = (q − zero) · scale ─► Backend::pack
//! compressed-tensors ───┘
//! ```
//!
//! Invariants:
//! - reading is exact: the matrix holds the stored integers, and the stored scales wherever they are 16-bit floats;
//! - nothing but shapes and types is trusted once they were checked: any bytes give a matrix or an error.

use half::f16;
use safetensors::Dtype;

use super::StoredBytes;

mod decode;
mod scheme;

pub use decode::Int4Error;
pub use scheme::{Int4Scheme, Int4Source};

/// Values in a word.
const PER_WORD: usize = 8;
/// What a group must be a multiple of: the CPU's blocks and the GPU's tiles.
pub const GROUP_MULTIPLE: usize = 32;

/// A matrix `[rows, columns]` of `w = (q − zero) · scale`, `q` and `zero` in 0..=15, a scale and a zero for each `group`
/// adjacent columns of a row. `columns` is a multiple of `group`, `group` of [`GROUP_MULTIPLE`].
#[derive(Debug, Clone, PartialEq)]
pub struct Int4Matrix {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub columns: usize,
    /// Columns that share a scale and a zero.
    pub group: usize,
    /// `[rows, columns / 8]`; nibble `j` (lowest first) of word `i` is column `8i + j`.
    pub qweight: Vec<u32>,
    /// `[columns / group, rows]`
    pub scales: Vec<f16>,
    /// `[columns / group, rows]`
    pub zeros: Vec<u8>,
}

impl Int4Matrix {
    /// Reads the matrix `name` (without `.qweight` and the like) of this shape; `find` looks tensors up by name.
    ///
    /// # Errors
    /// [`Int4Error`] naming the tensor, what it is, and what was expected.
    pub fn read<'a>(
        scheme: &Int4Scheme,
        name: &str,
        (rows, columns): (usize, usize),
        find: impl Fn(&str) -> Option<StoredTensor<'a>>,
    ) -> Result<Self, Int4Error> {
        decode::read(scheme, name, (rows, columns), &find)
    }

    /// Matrices of one width and group, one above the other.
    ///
    /// # Panics
    /// When there are none, or their widths or groups differ.
    #[must_use]
    pub fn stack(parts: &[&Self]) -> Self {
        let (columns, group) = (parts[0].columns, parts[0].group);
        assert!(
            parts
                .iter()
                .all(|part| (part.columns, part.group) == (columns, group)),
            "matrices of different widths or groups"
        );
        let rows = parts.iter().map(|part| part.rows).sum();
        let groups = columns / group;
        let mut scales = Vec::with_capacity(groups * rows);
        let mut zeros = Vec::with_capacity(groups * rows);
        for at in 0..groups {
            for part in parts {
                scales.extend_from_slice(&part.scales[at * part.rows..][..part.rows]);
                zeros.extend_from_slice(&part.zeros[at * part.rows..][..part.rows]);
            }
        }
        let mut qweight = Vec::with_capacity(rows * columns / PER_WORD);
        parts
            .iter()
            .for_each(|part| qweight.extend_from_slice(&part.qweight));
        Self {
            rows,
            columns,
            group,
            qweight,
            scales,
            zeros,
        }
    }

    /// All values, `[rows, columns]`, exactly: a difference of integers times a 16-bit scale fits an f32.
    #[must_use]
    pub fn dequantize(&self) -> Vec<f32> {
        let mut values = Vec::with_capacity(self.rows * self.columns);
        let words = self.columns / PER_WORD;
        for row in 0..self.rows {
            for (index, word) in self.qweight[row * words..][..words].iter().enumerate() {
                let at = index * PER_WORD / self.group * self.rows + row;
                let (scale, zero) = (self.scales[at].to_f32(), i32::from(self.zeros[at]));
                values.extend(
                    (0..PER_WORD)
                        .map(|j| ((word >> (4 * j) & 15).cast_signed() - zero) as f32 * scale),
                );
            }
        }
        values
    }

    /// The scale of random weights: uniform integers in −8..=7 spread by 4.6.
    #[must_use]
    pub fn random_scale(columns: usize) -> f16 {
        f16::from_f32(1.0 / (4.6 * (columns as f32).sqrt()))
    }

    /// Values that look random and depend on the seed alone, of about the size that initialised weights have.
    #[must_use]
    pub fn random((rows, columns): (usize, usize), group: usize, seed: u64) -> Self {
        let mut state = seed;
        let mut next = || {
            // SplitMix64.
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut word = state;
            word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            word ^ (word >> 31)
        };
        let mut qweight = Vec::with_capacity(rows * columns / PER_WORD + 1);
        while qweight.len() < rows * columns / PER_WORD {
            let word = next();
            qweight.extend([word as u32, (word >> 32) as u32]);
        }
        qweight.truncate(rows * columns / PER_WORD);
        let cells = rows * (columns / group);
        let scale = Self::random_scale(columns);
        Self {
            rows,
            columns,
            group,
            qweight,
            // −8..=7 is not 0 in the mean; of both signs it is.
            scales: (0..cells)
                .map(|cell| if cell % 2 == 0 { scale } else { -scale })
                .collect(),
            zeros: vec![8; cells],
        }
    }
}

/// A tensor as a file holds it.
#[derive(Debug, Clone, Copy)]
pub struct StoredTensor<'a> {
    /// Type of its values.
    pub dtype: Dtype,
    /// Its dimensions.
    pub shape: &'a [usize],
    /// Its values, little-endian, the last dimension fastest.
    pub data: StoredBytes<'a>,
}

#[cfg(test)]
mod tests;
