//! Measuring: the same traces over HTTP and in process, pages against contiguous reservation, and quality on a text.
//!
//! ```text
//! trace (jobs from a seed) ──► closed_loop ──► http | engine ──► report (percentiles, JSON)
//!                          └─► concurrency (contiguous, then paged, on the same cache bytes)
//! text ──► perplexity (a model runner, without an engine)
//! ```
//!
//! Invariants:
//! - the same seed gives every server and every mode the same token ids and lengths;
//! - nothing is timed before its output was checked ([`CheckError`] ends a run);
//! - counts are fixed before a run starts: a closed loop with a bound, never "for a while".

pub mod closed_loop;
pub mod concurrency;
pub mod engine;
pub mod http;
pub mod perplexity;
pub mod report;
pub mod roofline;
pub mod trace;

/// The output that was to be timed is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("refusing to time wrong output: {0}")]
pub struct CheckError(pub String);
