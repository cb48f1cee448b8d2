//! The engine: requests in, tokens out, one step at a time.
//!
//! ```text
//! EngineHandle::submit ──► inbox ──► engine thread (core)  ──► StreamCell ──► SequenceStream::next
//!                                      │  schedule → prepare → submit, sample → poll → update
//!                                      ├─► scheduler ──► kv_cache
//!                                      └─► model_runner
//! ```
//!
//! Invariants:
//! - the engine thread never waits for a client, a lock held over work, or an async runtime;
//! - a sequence's tokens do not depend on what else runs, on chunking, preemption or the prefix cache;
//! - a failed step fails its own requests only; a fatal error or a panic ends every stream with an error;
//! - dropping a [`SequenceStream`] frees its blocks at the next step.

mod clients;
mod config;
pub mod constraint;
mod core;
mod handle;
mod input;
mod observer;
mod pooling;
mod prompt_logprobs;
pub mod request;
pub mod scheduler;
mod sequence;
mod stats;
mod stop;
mod stream;
#[cfg(test)]
mod tests;
pub mod waiting;

use std::sync::Arc;

pub use config::{EngineConfig, KvReservation};
pub use core::IDLE_BEAT;
pub use handle::{EngineHandle, SubmitError};
pub use observer::{EngineObserver, FinishedRequest, NoObserver, StepReport};
pub use sequence::Sequence;
pub use stats::EngineStats;
pub use stream::{Finish, SequenceStream, StreamUpdate, Timings};

use crate::model_runner::ModelRunner;

/// Why an engine could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A size is zero.
    #[error("{name} is 0: it must be at least 1")]
    Zero {
        /// Which size.
        name: &'static str,
    },
    /// The operating system refused a thread.
    #[error("could not start the engine thread")]
    Thread(#[source] std::io::Error),
}

/// Starts engines.
pub struct Engine;

impl Engine {
    /// Starts an engine on its own thread.
    ///
    /// # Errors
    /// [`StartError`] when a size is zero or the thread cannot be started.
    pub fn start(
        runner: Box<dyn ModelRunner>,
        config: EngineConfig,
    ) -> Result<EngineHandle, StartError> {
        Self::start_observed(runner, config, Arc::new(NoObserver))
    }

    /// Starts an engine on its own thread, which tells `observer` about every step and every finished request.
    ///
    /// # Errors
    /// [`StartError`] when a size is zero or the thread cannot be started.
    pub fn start_observed(
        runner: Box<dyn ModelRunner>,
        mut config: EngineConfig,
        observer: Arc<dyn EngineObserver>,
    ) -> Result<EngineHandle, StartError> {
        let limits = runner.limits().clone();
        let abilities = handle::Abilities {
            hidden_size: runner.hidden_size(),
            costs: runner.costs(),
        };
        config.max_num_batched_tokens = config
            .max_num_batched_tokens
            .min(limits.max_num_batched_tokens);
        // Every running sequence may want one row of a step.
        config.max_num_seqs = config
            .max_num_seqs
            .min(limits.max_num_seqs)
            .min(config.max_num_batched_tokens);
        for (name, value) in [
            ("max_num_seqs", config.max_num_seqs),
            ("max_num_batched_tokens", config.max_num_batched_tokens),
            ("max_num_queued_reqs", config.max_num_queued_reqs),
            ("block_size", limits.block_size),
            (
                "the number of KV-cache blocks",
                limits.num_blocks.saturating_sub(1),
            ),
        ] {
            if value == 0 {
                return Err(StartError::Zero { name });
            }
        }
        let shared = Arc::new(handle::Shared::new(limits, abilities, config));
        let core = core::Core::new(runner, Arc::clone(&shared), observer);
        std::thread::Builder::new()
            .name("ashlar-engine".to_owned())
            .spawn(move || core.run())
            .map_err(StartError::Thread)?;
        Ok(EngineHandle { shared })
    }
}
