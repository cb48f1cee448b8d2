//! The controller's steps, each with what it needs and no cluster.
#![allow(
    clippy::unwrap_used,
    unreachable_pub,
    missing_docs,
    reason = "a test fails by panicking"
)]

mod apply;
mod build;
mod leader;
mod status;
mod support;
