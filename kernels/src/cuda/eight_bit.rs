//! Eight-bit weights on the GPU: floats (e4m3) with a scale for each row, and integers with a scale and an offset for each
//! group. How they become 16 bits, and how rows of activations become eight-bit floats. Products with few rows read them as
//! they are ([`SkinnyGemm`](super::skinny::SkinnyGemm)); those with many are [`Fp8Gemm`](super::gemm::Fp8Gemm)'s.

use half::f16;

use super::{
    CudaError, Device, Float, View,
    modules::{Shape, arguments},
    need,
};

/// Values that a thread reads at once: rows hold a multiple, and so does a group of integers.
pub const CHUNK: usize = 16;

/// A matrix `[n, k]` of e4m3, `w = q · scale`.
#[derive(Clone, Copy)]
pub struct Fp8View<'a> {
    /// `[n, k]`
    pub data: View<'a>,
    /// `[n]` f32.
    pub scales: View<'a>,
}

/// A matrix `[n, k]` of signed bytes, `w = q · scale + offset`, beside IEEE halves.
#[derive(Clone, Copy)]
pub struct Int8View<'a> {
    /// `[n, k]`
    pub data: View<'a>,
    /// `[k / group, n]` u32, from [`cells`].
    pub cells: View<'a>,
    /// Columns that share a cell: 16 times a power of two.
    pub group: usize,
}

/// Whether rows of `k` values can be kept in eight bits here.
#[must_use]
pub fn takes(k: usize) -> bool {
    k > 0 && k.is_multiple_of(2 * CHUNK) && k <= 1 << 24
}

/// Chunks of a group, as a power of two.
pub(super) fn group_shift(k: usize, group: usize) -> Option<i32> {
    let chunks = group / CHUNK;
    let fits = chunks.is_power_of_two() && group.is_multiple_of(CHUNK) && k.is_multiple_of(group);
    (takes(k) && fits).then(|| chunks.trailing_zeros() as i32)
}

/// Scales and offsets as the kernels read them: the scale in the low half, the offset in the high one.
///
/// # Panics
/// When there are not as many of both.
#[must_use]
pub fn cells(scales: &[f16], offsets: &[f16]) -> Vec<u8> {
    assert_eq!(scales.len(), offsets.len(), "scales and offsets");
    let pairs = scales.iter().zip(offsets);
    pairs
        .flat_map(|(scale, offset)| {
            let ([a, b], [c, d]) = (scale.to_le_bytes(), offset.to_le_bytes());
            [a, b, c, d]
        })
        .collect()
}

impl Fp8View<'_> {
    pub(super) fn fits(&self, n: usize, k: usize) -> bool {
        takes(k) && self.data.bytes >= n * k && self.scales.bytes >= n * 4
    }
}

impl Int8View<'_> {
    pub(super) fn fits(&self, n: usize, k: usize) -> bool {
        group_shift(k, self.group).is_some()
            && self.data.bytes >= n * k
            && self.cells.bytes >= k / self.group * n * 4
    }
}

/// Eight-bit weights of either kind.
#[derive(Clone, Copy)]
pub enum EightBit<'a> {
    /// Floats.
    Fp8(Fp8View<'a>),
    /// Integers.
    Int8(Int8View<'a>),
}

/// `out = w`, rounded once to 16 bits.
#[derive(Clone, Copy)]
pub struct DequantizeEightBit<'a> {
    /// Type of the result; integers become halves only.
    pub float: Float,
    /// `[n, k]`
    pub weight: EightBit<'a>,
    /// `[n, k]`
    pub out: View<'a>,
    /// Rows.
    pub n: usize,
    /// Columns.
    pub k: usize,
}

impl DequantizeEightBit<'_> {
    /// Queues it.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or the driver refuses.
    pub fn launch(&self, device: &Device) -> Result<(), CudaError> {
        let (op, n, k) = ("dequantize_eight_bit", self.n, self.k);
        let (fits, kind, data, scales, cells, group_shift) = match self.weight {
            EightBit::Fp8(view) => {
                let (data, scales) = (view.data.address(), view.scales.address());
                (view.fits(n, k), "fp8", data, scales, 0u64, 0)
            }
            EightBit::Int8(view) => {
                let (data, cells) = (view.data.address(), view.cells.address());
                let shift = group_shift(k, view.group).unwrap_or(0);
                let fits = view.fits(n, k) && self.float == Float::F16;
                (fits, "int8", data, 0u64, cells, shift)
            }
        };
        need(
            n > 0 && n < 1 << 31 && fits && self.out.bytes >= n * k * Float::BYTES,
            op,
            || {
                format!(
                    "{n} × {k}: a view is too short, a row is no multiple of {}, or integers are asked as brain floats",
                    2 * CHUNK
                )
            },
        )?;
        let (out, n_i32, chunks) = (self.out.address(), n as i32, k / CHUNK);
        let threads = chunks.next_multiple_of(32).min(256);
        let chunks_i32 = chunks as i32;
        let shape = Shape {
            grid: (n, chunks.div_ceil(threads)),
            threads,
            shared: 0,
        };
        let name = format!("{kind}_dequantize_{}", self.float.suffix());
        // SAFETY: parameters as in `eight_bit.cu`; every view holds what the shape needs, and grid and widths fit 32 bits
        // (checked above); a thread reads and writes its own chunk's place alone.
        unsafe {
            device.launch(
                &name,
                shape,
                arguments![data, scales, cells, out, n_i32, chunks_i32, group_shift],
            )
        }
    }
}

/// Rows as e4m3 with a scale each, so that a row's largest value becomes 448.
#[derive(Clone, Copy)]
pub struct QuantizeRows<'a> {
    /// Type of x.
    pub float: Float,
    /// `[m, k]`
    pub x: View<'a>,
    /// `[m, k]` e4m3.
    pub out: View<'a>,
    /// `[m]` f32.
    pub scales: View<'a>,
    /// Rows.
    pub m: usize,
    /// Columns.
    pub k: usize,
}

impl QuantizeRows<'_> {
    /// Queues it.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or the driver refuses.
    pub fn launch(&self, device: &Device) -> Result<(), CudaError> {
        let (m, k) = (self.m, self.k);
        need(
            m > 0
                && m < 1 << 31
                && takes(k)
                && self.x.bytes >= m * k * Float::BYTES
                && self.out.bytes >= m * k
                && self.scales.bytes >= m * 4,
            "quantize_rows",
            || {
                format!(
                    "{m} × {k}: a view is too short, or a row no multiple of {}",
                    2 * CHUNK
                )
            },
        )?;
        let (x, out, scales) = (self.x.address(), self.out.address(), self.scales.address());
        let width = k as i32;
        let shape = Shape {
            grid: (m, 1),
            threads: 256,
            shared: 0,
        };
        let name = format!("fp8_quantize_rows_{}", self.float.suffix());
        // SAFETY: parameters as in `eight_bit.cu`; all rows lie in the views.
        unsafe { device.launch(&name, shape, arguments![x, out, scales, width]) }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, missing_docs)] // Tests fail by panicking.
mod tests {
    use super::*;

    #[test]
    fn groups_are_powers_of_two_chunks() {
        let shifts: Vec<_> = [16, 32, 64, 48, 0, 8]
            .map(|group| group_shift(192, group))
            .into();
        assert_eq!(shifts, [Some(0), Some(1), Some(2), None, None, None]);
        assert_eq!(group_shift(144, 16), None);
        let bytes = cells(&[f16::from_f32(0.5)], &[f16::from_f32(-3.0)]);
        assert_eq!(bytes, [0x00, 0x38, 0x00, 0xc2]);
    }
}
