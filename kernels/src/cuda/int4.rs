//! Four-bit weights on the GPU: kept as they are, turned into 16 bits for the product that reads them.

use super::{
    CudaError, Device, View,
    modules::{Shape, arguments},
    need,
};

/// Values in a word.
const PER_WORD: usize = 8;

/// `out = (q − zero) · scale`, rounded once to IEEE halves.
#[derive(Clone, Copy)]
pub struct DequantizeInt4<'a> {
    /// `[n, k / 8]` u32; nibble `j` (lowest first) of word `i` is column `8i + j`.
    pub qweight: View<'a>,
    /// `[k / group, n]` IEEE halves.
    pub scales: View<'a>,
    /// `[k / group, n]` u8, 0..=15.
    pub zeros: View<'a>,
    /// `[n, k]` IEEE halves.
    pub out: View<'a>,
    /// Rows.
    pub n: usize,
    /// Columns, a multiple of `group`.
    pub k: usize,
    /// Columns that share a scale, a multiple of 8.
    pub group: usize,
}

impl DequantizeInt4<'_> {
    fn validate(&self) -> Result<(), CudaError> {
        let op = "dequantize_int4";
        let (n, k, group) = (self.n, self.k, self.group);
        need(
            n > 0
                && n < 1 << 31
                && group > 0
                && group.is_multiple_of(PER_WORD)
                && k > 0
                && k.is_multiple_of(group)
                && k <= 1 << 24,
            op,
            || {
                format!(
                    "{n} × {k} in groups of {group}: k must be groups, and groups multiples of {PER_WORD}"
                )
            },
        )?;
        let cells = k / group * n;
        need(
            self.qweight.bytes >= n * k / 2
                && self.scales.bytes >= cells * 2
                && self.zeros.bytes >= cells
                && self.out.bytes >= n * k * 2,
            op,
            || format!("a view is too short for {n} × {k}"),
        )
    }

    /// Queues it.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or the driver refuses.
    pub fn launch(&self, device: &Device) -> Result<(), CudaError> {
        self.validate()?;
        let (qweight, scales) = (self.qweight.address(), self.scales.address());
        let (zeros, out) = (self.zeros.address(), self.out.address());
        let words = self.k / PER_WORD;
        let threads = words.next_multiple_of(32).min(256);
        let (n, words_i32) = (self.n as i32, words as i32);
        let per_group = (self.group / PER_WORD) as i32;
        let shape = Shape {
            grid: (self.n, words.div_ceil(threads)),
            threads,
            shared: 0,
        };
        // SAFETY: parameters as in `int4.cu`; every view holds what the shape needs, and grid and widths fit 32 bits
        // (`validate`); a thread reads and writes its own word's place alone.
        unsafe {
            device.launch(
                "int4_dequantize",
                shape,
                arguments![qweight, scales, zeros, out, n, words_i32, per_group],
            )
        }
    }
}
