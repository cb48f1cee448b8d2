//! Every host kernel against the reference, on every instruction set of this machine, over shapes that hurt.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod attention;
mod elementwise;
mod int4;
mod packed;
mod products;
mod support;
