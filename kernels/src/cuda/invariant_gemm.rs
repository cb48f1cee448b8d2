//! Products whose rows have the same bits alone and among any others: one kernel for every number of rows.

use super::{
    CudaError, Device, Float, View,
    modules::{Shape, arguments},
    need,
};

/// Rows, outputs and columns of a block's step, and steps in flight; as in `invariant_gemm.cu`.
const TILE: (usize, usize) = (64, 128);
const STEP: usize = 64;
const STAGES: usize = 4;

/// `y = x · weightᵀ + bias`; all row-major. Each sum takes the columns in ascending order, in one block.
#[derive(Clone, Copy)]
pub struct InvariantGemm<'a> {
    /// Type of x, weight and bias.
    pub float: Float,
    /// `[m, k]`
    pub x: View<'a>,
    /// `[n, k]`
    pub weight: View<'a>,
    /// `[n]`
    pub bias: Option<View<'a>>,
    /// `[m, n]`
    pub y: View<'a>,
    /// `y` is f32.
    pub f32_out: bool,
    /// Rows.
    pub m: usize,
    /// Width of the output, a multiple of 2.
    pub n: usize,
    /// Width of the input, a multiple of 8.
    pub k: usize,
}

/// The kernels' parameter, as in `invariant_gemm.cu`.
#[repr(C)]
struct Parameters {
    x: u64,
    weight: u64,
    bias: u64,
    y: u64,
    m: i32,
    n: i32,
    k: i32,
}

impl InvariantGemm<'_> {
    fn validate(&self) -> Result<(), CudaError> {
        let (op, m, n, k) = ("invariant_gemm", self.m, self.n, self.k);
        let fits = m > 0 && m < 1 << 24 && n > 0 && n < 1 << 28 && k > 0 && k < 1 << 28;
        need(
            fits && n.is_multiple_of(2) && k.is_multiple_of(8),
            op,
            || {
                format!(
                    "{m} × {n} × {k}: an even width of the output and a multiple of 8 of the input are needed"
                )
            },
        )?;
        let out = if self.f32_out { 4 } else { Float::BYTES };
        need(
            self.x.bytes >= m * k * Float::BYTES
                && self.weight.bytes >= n * k * Float::BYTES
                && self.y.bytes >= m * n * out
                && self.bias.is_none_or(|bias| bias.bytes >= n * Float::BYTES),
            op,
            || format!("a view is too short for {m} × {n} × {k}"),
        )
    }

    /// Queues it.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or the driver refuses.
    pub fn launch(&self, device: &Device) -> Result<(), CudaError> {
        self.validate()?;
        let parameters = Parameters {
            x: self.x.address(),
            weight: self.weight.address(),
            bias: self.bias.map_or(0, View::address),
            y: self.y.address(),
            m: self.m as i32,
            n: self.n as i32,
            k: self.k as i32,
        };
        let (tile_m, tile_n) = TILE;
        let shape = Shape {
            grid: (self.m.div_ceil(tile_m) * self.n.div_ceil(tile_n), 1),
            threads: 128,
            shared: STAGES * (tile_m + tile_n) * STEP * Float::BYTES,
        };
        let out = if self.f32_out { "f32_" } else { "" };
        let name = format!("invariant_gemm_{out}{}", self.float.suffix());
        // SAFETY: the parameter is the kernel's own struct, and all views hold what the shape needs (`validate`).
        unsafe { device.launch(&name, shape, arguments![parameters]) }
    }
}
