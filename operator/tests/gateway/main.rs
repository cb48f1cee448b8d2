//! The gateway as a client and a replica meet it: real sockets on the loopback, stub replicas, no cluster.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a panic is a test's way to fail"
)]

mod access;
mod harness;
mod lifecycle;
mod limits;
mod retry;
mod streaming;
mod tls;
