//! GPU kernels against plain loops in f64 on the host, over shapes that hurt. Runs on a machine with a GPU (`make gpu-test`).
#![allow(clippy::unwrap_used, missing_docs)] // Tests fail by panicking.

mod attention;
mod attention_case;
mod eight_bit;
mod elementwise;
mod int4;
mod int4_gemm;
mod invariant_attention;
mod invariant_gemm;
mod peers;
mod products;
mod rope;
mod sampling;
mod support;
mod upload;
