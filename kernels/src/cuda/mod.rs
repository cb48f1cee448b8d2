//! Kernels for NVIDIA GPUs.
//!
//! ```text
//! device      one GPU: context, stream, copies, events, graphs
//! memory      buffers on it and on the host, and views of them
//! upload      how weights get there, through page-locked memory
//! modules     the compiled kernels (`kernels/cuda/*.cu`) and their launch
//! elementwise embedding, RMS norms, SiLU·up, gathering rows, random weights
//! rope        rotary embedding and the write of K and V into their pages
//! gemm        products with many rows: cuBLASLt, plans timed once per shape
//! skinny      products with few rows (decode), with what stands before and after them fused in
//! int4        four-bit weights: how they are stored, and turned into 16 bits
//! int4_gemm   products of many rows with them, on Hopper
//! int4_few    products of one or two rows with them, on Hopper
//! int4_skinny products of few rows with them, on Hopper
//! eight_bit   eight-bit weights, floats and integers, likewise
//! invariant_gemm products whose rows have the same bits whatever stands beside them
//! attention   paged attention: single rows (decode) and many rows (prefill)
//! prefill     its many rows
//! decode_plan what decode attention works on, and who reads together
//! tensor_map  boxes of tensors for Hopper's copy engine
//! peers       what tensor-parallel ranks reduce and gather over each other's memory
//! sampling    penalties, masks, top-k, top-p, min-p, draws, log-probabilities
//! ```
//!
//! Invariants:
//! - an operation is a struct of views and sizes; `launch` checks them against each other before anything is queued, so
//!   no kernel reads or writes outside the views it was given, as long as indices in device memory are in range: those
//!   (tokens, pages, rows) are checked on the host by whoever uploads them;
//! - everything runs on the device's one stream, in order; host memory is only read by the device from pinned buffers;
//! - libraries are loaded at run time: without a driver, [`Device::open`] is an error, not a crash.

pub mod attention;
pub mod decode_plan;
pub mod device;
pub mod eight_bit;
pub mod elementwise;
pub mod gemm;
pub mod int4;
mod int4_few;
pub mod int4_gemm;
mod int4_skinny;
pub mod invariant_gemm;
pub mod memory;
mod modules;
pub mod peers;
mod prefill;
pub mod rope;
pub mod sampling;
pub mod skinny;
mod tensor_map;
pub mod upload;

pub use device::{Device, Event, Graph};
pub use memory::{DeviceBuffer, PinnedBuffer, View};
pub use upload::Uploader;

/// 16-bit type of weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Float {
    /// Brain floats.
    Bf16,
    /// IEEE halves.
    F16,
}

impl Float {
    /// Bytes of a value.
    pub const BYTES: usize = 2;

    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}

/// What the pages of the KV cache hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum KvDtype {
    /// The activations' 16-bit type.
    #[default]
    Float,
    /// Eight-bit floats (e4m3), K and V of a layer divided by a scale each.
    Fp8,
}

impl KvDtype {
    /// Bytes of a value.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Float => Float::BYTES,
            Self::Fp8 => 1,
        }
    }

    /// Behind the activations' in a kernel's name.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Self::Float => "",
            Self::Fp8 => "_fp8",
        }
    }

    /// Whether K and V may have these scales.
    pub(crate) fn check_scales(self, op: &'static str, scales: [f32; 2]) -> Result<(), CudaError> {
        let usable = |scale: f32| match self {
            Self::Float => scale == 1.0,
            Self::Fp8 => scale.is_finite() && scale > 0.0,
        };
        need(scales.into_iter().all(usable), op, || {
            format!(
                "K and V are scaled by {scales:?}; eight-bit ones need positive numbers, others 1"
            )
        })
    }
}

/// Why the GPU cannot do something.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CudaError {
    /// No driver, or no such GPU.
    #[error("there is no usable NVIDIA GPU: {message}")]
    NoDevice {
        /// What is missing.
        message: String,
    },
    /// A call of the driver failed.
    #[error("{call} failed: {message}")]
    Driver {
        /// What was tried.
        call: &'static str,
        /// The driver's words.
        message: String,
    },
    /// The GPU has not so much memory left.
    #[error(
        "{bytes} bytes cannot be allocated on the GPU; {free} are free: lower --gpu-memory-utilization or --max-num-batched-tokens, or free the GPU"
    )]
    OutOfMemory {
        /// What was asked.
        bytes: usize,
        /// What is there.
        free: usize,
    },
    /// Another rank's GPU or thread hangs.
    #[error("tensor-parallel rank {rank} has not answered for {} s: it hangs", peers::TIME_LIMIT.as_secs())]
    Lost {
        /// The rank.
        rank: usize,
    },
    /// What was to be copied to the GPU could not be read.
    #[error("what is to be copied to the GPU cannot be read: {message}")]
    Source {
        /// What the system said.
        message: String,
    },
    /// Sizes that an operation cannot work with.
    #[error("{op}: {message}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// What does not fit.
        message: String,
    },
}

impl CudaError {
    /// The GPU is lost or in an unknown state: the process has to start anew.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        matches!(
            self,
            Self::Driver { .. } | Self::NoDevice { .. } | Self::Lost { .. }
        )
    }
}

pub(crate) fn shape<T>(op: &'static str, message: impl Into<String>) -> Result<T, CudaError> {
    Err(CudaError::Shape {
        op,
        message: message.into(),
    })
}

pub(crate) fn need(
    holds: bool,
    op: &'static str,
    message: impl FnOnce() -> String,
) -> Result<(), CudaError> {
    if holds { Ok(()) } else { shape(op, message()) }
}
