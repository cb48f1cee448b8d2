//! # Ashlar's inference runtime
//!
//! ```text
//! http ──► generation ──► engine ──► scheduler ──► kv_cache        (blocks, tables, prefix hashes: pure)
//!   │          │             └─────► model_runner ──► models ──► kernels
//!   │          └► tokenizer, chat_template                └► weights (safetensors, 4 bits, GGUF)
//!   └► metrics, traces
//! ```
//!
//! Invariants:
//! - `kv_cache` and `engine::scheduler` never see a tensor, tokio or HTTP;
//! - only the crate `ashlar-kernels` has `unsafe`, and one memory map in `weights`;
//! - the engine runs at its own pace on its own thread: everything outside only enqueues;
//! - every queue, loop and body has a bound, and the bound has a name;
//! - a request can fail, the engine cannot because of a request.
#![deny(unsafe_code)]

pub mod batch;
pub mod bench;
pub mod chat_template;
pub mod config;
pub mod detokenizer;
pub mod engine;
pub mod generation;
pub mod grammar;
pub mod http;
pub mod hub;
pub mod kv_cache;
pub mod llm;
pub mod metrics;
pub mod model_runner;
pub mod models;
pub mod output;
pub mod pooler;
pub mod sampler;
pub mod shutdown;
pub mod stop_strings;
pub mod telemetry;
pub mod tokenizer;
pub mod traces;
pub mod weights;
