//! Products with many rows: cuBLASLt with a plan per shape. Row counts are rounded up to buckets, so that a plan is found
//! (and, where asked, timed) once and a row's result does not depend on how many rows were really there.

mod call;
mod cublas;

use call::Call;
pub(super) use cublas::CublasLt;

use super::{CudaError, Device, Float, View};

/// Rows that a product of `m` rows really computes: a few shapes instead of thousands.
#[must_use]
pub fn bucket(m: usize) -> usize {
    match m {
        0..=16 => m.next_multiple_of(8),
        17..=256 => m.next_multiple_of(16),
        257..=2048 => m.next_multiple_of(64),
        _ => m.next_multiple_of(128),
    }
}

/// `y = x · weightᵀ + bias`; all row-major. `x` and `y` have room for [`bucket`]`(m)` rows, of which those behind `m` are
/// computed from whatever `x` holds.
#[derive(Clone, Copy)]
pub struct Gemm<'a> {
    /// Type of x, weight and bias.
    pub float: Float,
    /// `[bucket(m), k]`
    pub x: View<'a>,
    /// `[n, k]`
    pub weight: View<'a>,
    /// `[n]`
    pub bias: Option<View<'a>>,
    /// `[bucket(m), n]`
    pub y: View<'a>,
    /// `y` is f32.
    pub f32_out: bool,
    /// The product is added to what is in `y`, and the sum rounded once.
    pub adds: bool,
    /// Rows.
    pub m: usize,
    /// Width of the output, a multiple of 8.
    pub n: usize,
    /// Width of the input, a multiple of 8.
    pub k: usize,
}

impl Gemm<'_> {
    /// Queues it.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or cuBLASLt refuses.
    pub fn launch(&self, device: &Device) -> Result<(), CudaError> {
        self.call().launch(device)
    }

    /// Times the likeliest algorithms for this shape on this GPU and keeps the fastest for all later launches.
    /// `weights` are others of this shape, taken in turns, so that they come from memory as in a model and not from the L2.
    /// Overwrites `y`; a plan that was timed is not timed again.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or cuBLASLt refuses.
    pub fn tune(
        &self,
        device: &Device,
        rounds: usize,
        weights: &[View<'_>],
    ) -> Result<(), CudaError> {
        self.call().tune(device, rounds, weights)
    }

    fn call(&self) -> Call<'_> {
        Call {
            gemm: *self,
            scales: None,
        }
    }
}

/// `y = (x · weightᵀ) · x_scales · weight_scales + bias` with x and weight in e4m3: as [`Gemm`], but for widths in multiples
/// of 16, and on GPUs where [`Self::is_available`].
#[derive(Clone, Copy)]
pub struct Fp8Gemm<'a> {
    /// Its `float` is the type of y and bias; x and weight have one byte a value.
    pub gemm: Gemm<'a>,
    /// `[bucket(m)]` f32, one for each row of x; those behind `m` may be anything.
    pub x_scales: View<'a>,
    /// `[n]` f32.
    pub weight_scales: View<'a>,
}

impl Fp8Gemm<'_> {
    /// Whether this GPU and its cuBLASLt multiply e4m3 with a scale for each row on both sides (Hopper does).
    #[must_use]
    pub fn is_available(device: &Device) -> bool {
        const SIZE: usize = 64;
        let probe = || {
            let (values, y) = (device.alloc(SIZE * SIZE)?, device.alloc(SIZE * SIZE * 2)?);
            let scales = device.alloc(SIZE * 4)?;
            device.fill(values.view(), 0)?;
            device.fill(scales.view(), 0)?;
            let gemm = Gemm {
                float: Float::Bf16,
                x: values.view(),
                weight: values.view(),
                bias: None,
                y: y.view(),
                f32_out: false,
                adds: false,
                m: SIZE,
                n: SIZE,
                k: SIZE,
            };
            let (x_scales, weight_scales) = (scales.view(), scales.view());
            Fp8Gemm {
                gemm,
                x_scales,
                weight_scales,
            }
            .launch(device)?;
            device.synchronize()
        };
        device.capability() >= 89 && probe().is_ok()
    }

    /// As [`Gemm::launch`].
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or cuBLASLt refuses.
    pub fn launch(&self, device: &Device) -> Result<(), CudaError> {
        self.call().launch(device)
    }

    /// As [`Gemm::tune`].
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or cuBLASLt refuses.
    pub fn tune(
        &self,
        device: &Device,
        rounds: usize,
        weights: &[View<'_>],
    ) -> Result<(), CudaError> {
        self.call().tune(device, rounds, weights)
    }

    fn call(&self) -> Call<'_> {
        Call {
            gemm: self.gemm,
            scales: Some((self.x_scales, self.weight_scales)),
        }
    }
}
