//! What the engine tells whoever measures it. Called on the engine thread: implementations only count, never wait.

use std::time::{Duration, Instant};

use super::request::{FinishReason, SeqId};

/// One finished sequence with its times.
///
/// Intervals as vLLM's: queue = `queued → scheduled`, prefill = `scheduled → first_token`,
/// decode = `first_token → last_token`, inference = `scheduled → last_token`; end to end and time to first token
/// start at `arrival`.
#[derive(Debug, Clone)]
pub struct FinishedRequest {
    /// The sequence.
    pub seq: SeqId,
    /// Why it ended.
    pub reason: FinishReason,
    /// Prompt tokens.
    pub num_prompt_tokens: u32,
    /// Of these, taken from the prefix cache at first admission.
    pub num_cached_tokens: u32,
    /// Tokens generated and kept.
    pub num_generation_tokens: u32,
    /// The request's `max_tokens`; `None` for an embedding.
    pub max_tokens: Option<u32>,
    /// Times it was preempted.
    pub num_preemptions: u32,
    /// When the request reached the server.
    pub arrival: Instant,
    /// When the engine took it in.
    pub queued: Instant,
    /// When it was last given a place, if ever.
    pub scheduled: Option<Instant>,
    /// When its first token was known.
    pub first_token: Option<Instant>,
    /// When its last token was known.
    pub last_token: Option<Instant>,
    /// When it ended.
    pub finished: Instant,
}

/// One finished step.
#[derive(Debug, Clone, Copy)]
pub struct StepReport<'a> {
    /// Rows computed: prompt and decode tokens.
    pub num_tokens: u32,
    /// Sequences in the step.
    pub num_seqs: u32,
    /// Prompt tokens of the sequences whose first token came in this step.
    pub prompt_tokens: u32,
    /// Of these, taken from the prefix cache.
    pub cached_prompt_tokens: u32,
    /// Tokens generated.
    pub generation_tokens: u32,
    /// From submitting to the result.
    pub duration: Duration,
    /// `arrival → first token`, one per sequence whose first token came in this step.
    pub time_to_first_token: &'a [Duration],
    /// Time since the sequence's previous token, one per token after the first.
    pub inter_token_latency: &'a [Duration],
    /// Sequences preempted while the step was scheduled.
    pub num_preemptions: u32,
}

/// Receives what the engine measures.
pub trait EngineObserver: Send + Sync {
    /// A step has finished.
    fn on_step(&self, _report: &StepReport<'_>) {}

    /// A sequence has ended, for whatever reason.
    fn on_finished(&self, _request: &FinishedRequest) {}
}

/// Observes nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoObserver;

impl EngineObserver for NoObserver {}
