//! # Ashlar's compute kernels
//!
//! ```text
//! cpu         fast paths on the host: thread pool, packed matrices, int8 products, paged attention
//! e4m3        eight-bit floats
//! cuda        NVIDIA GPUs (feature `cuda`)
//! reference   the truth in f32/f64, one plain loop each: for tests only
//! ```
//!
//! Invariants:
//! - a row's result depends on that row's inputs alone: bit for bit the same whatever else is in the batch, however
//!   many threads run, and on every instruction set (AVX-512, AVX2, scalar share one order of operations);
//! - nothing sums across threads;
//! - every `unsafe` block names the check that makes it sound.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod e4m3;
pub mod reference;
