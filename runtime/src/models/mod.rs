//! Models: a configuration and a weight map each; one decoder for all of them.
//!
//! ```text
//! weights::Checkpoint ──► config (ModelConfig) ──► registry (which tensors, how they are fused and sharded)
//!                                   │                          │
//!                                   │        shard (a rank's part of each) ──► loader
//!                                   └────────► decoder ◄──────────────────────────┘   generic over backend::Backend
//! ```
//!
//! Adding a model of the Llama family is a row in [`registry`], not a new file.

pub mod backend;
pub mod config;
pub mod decoder;
pub mod loader;
pub mod registry;
pub mod shard;
