//! Host kernels.
//!
//! Each kernel is written once against [`simd::Simd`] (sixteen f32 lanes) and compiled for three instruction sets;
//! [`Isa::detect`] picks one when the process starts.

pub mod attention;
pub mod elementwise;
pub mod format;
pub mod kv_cache;
pub mod matmul;
pub mod packed;
pub mod pool;
pub mod quantize;
mod simd;

pub use attention::{AttentionArgs, AttentionSeq};
pub use format::{BlockFormat, Cell};
pub use kv_cache::{KvDtype, KvLayout, LayerCache};
pub use matmul::{MatmulInput, linear, matmul};
pub use packed::{Int4Args, PackedMatrix};
pub use pool::ThreadPool;
pub use quantize::QuantizedRows;
pub use simd::Isa;

/// Why a kernel refuses its arguments.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// A shape that the kernel does not take.
    #[error("{op}: {message}")]
    Shape {
        /// Which operation.
        op: &'static str,
        /// What was given, and what is taken.
        message: String,
    },
    /// A storage format that the kernel does not take.
    #[error("{format:?} cannot be packed: {message}")]
    Format {
        /// The format.
        format: BlockFormat,
        /// What to use instead.
        message: String,
    },
}
