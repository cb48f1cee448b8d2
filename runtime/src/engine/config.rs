//! What an engine is started with.

use super::request::TokenId;

/// Most batched tokens of a step in which some sequence decodes, as long as few run: bounds the wait between two tokens.
pub(super) const MAX_TOKENS_WITH_DECODE: u32 = 4096;

/// Batched tokens of such a step for each running sequence, where that is more, up to
/// [`max_num_batched_tokens`](EngineConfig::max_num_batched_tokens). In a flood most of a step's rows are outputs of those who
/// came first, and who came last wait for what is left: with 1,000 requests at once the last first token comes 8 % sooner,
/// and no fewer tokens a second (Llama-3.1-8B and Mistral-7B AWQ on one H200). Up to 256 running sequences nothing changes.
pub(super) const TOKENS_PER_SEQUENCE_WITH_DECODE: u32 = 16;

/// How a sequence's KV cache is taken from the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvReservation {
    /// Block by block, as tokens come.
    #[default]
    Paged,
    /// The model's whole length at admission, as systems before paged attention did. Only for comparisons
    /// (`ashlar bench`); there is no prefix cache.
    Contiguous,
}

/// Settings of an engine. Sizes above the runner's limits are lowered to them.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Most sequences running at once.
    pub max_num_seqs: u32,
    /// Most tokens in one step, prefill and decode together.
    pub max_num_batched_tokens: u32,
    /// Most prompt tokens of one sequence in one step; 0 turns it off.
    pub long_prefill_token_threshold: u32,
    /// Reuse the KV cache of equal prompt beginnings.
    pub enable_prefix_caching: bool,
    /// Requests that may wait for a place; one more is refused with [`SubmitError::QueueFull`](super::SubmitError).
    pub max_num_queued_reqs: u32,
    /// Seeds the requests that bring no seed.
    pub seed: u64,
    /// The model's end-of-sequence ids.
    pub eos_token_ids: Vec<TokenId>,
    /// How KV cache is taken.
    pub reservation: KvReservation,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_num_seqs: 256,
            max_num_batched_tokens: 8192,
            long_prefill_token_threshold: 0,
            enable_prefix_caching: true,
            max_num_queued_reqs: 1024,
            seed: 0,
            eos_token_ids: Vec::new(),
            reservation: KvReservation::Paged,
        }
    }
}
