//! What the scheduler says: what a step computes, and what its tokens did.

use crate::{
    engine::request::{FinishReason, SeqId, TokenId},
    kv_cache::BlockId,
    model_runner::Slot,
};

/// One sequence's part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScheduledItem {
    /// The sequence.
    pub seq: SeqId,
    /// Its place.
    pub slot: Slot,
    /// Its epoch when scheduled.
    pub epoch: u32,
    /// Position of its first row.
    pub start: u32,
    /// Its rows, drafts included.
    pub num_tokens: u32,
    /// Of these, drafted tokens to verify (none yet: there is no drafter).
    pub num_draft: u32,
    /// Whether its last row draws a token.
    pub samples: bool,
    /// Output tokens before the one it draws.
    pub num_generated: u32,
    /// Whether the logits of all its rows are wanted.
    pub prompt_logits: bool,
    /// Whether hidden states are pooled: the last row's or all rows', as its sequence says.
    pub pools: bool,
}

/// A sequence that was given a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    /// The sequence.
    pub seq: SeqId,
    /// False when it comes back from a preemption.
    pub first: bool,
}

/// What one step computes.
#[derive(Debug, Default)]
pub struct SchedulerOutput {
    /// Number of the step, from 1, without gaps.
    pub step: u64,
    /// The sequences, in row order.
    pub items: Vec<ScheduledItem>,
    /// Rows of all items.
    pub num_tokens: u32,
    /// Of these, rows whose logits are wanted.
    pub num_logit_rows: u32,
    /// Sequences whose slot has to be bound first.
    pub admitted: Vec<Admitted>,
    /// Sequences that lost their place while this step was scheduled.
    pub preempted: Vec<SeqId>,
    /// Blocks that this step published: withdrawn if it fails.
    pub published: Vec<BlockId>,
}

/// What a token did to its sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accepted {
    /// Tokens kept of those drawn.
    pub num_tokens: u32,
    /// Set when the last of them ended the sequence.
    pub finish: Option<(FinishReason, Option<TokenId>)>,
}

/// Counts of the prefix cache and of preemptions, from the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SchedulerCounters {
    /// Prompt tokens looked up.
    pub prefix_queries: u64,
    /// Of these, found.
    pub prefix_hits: u64,
    /// Preemptions.
    pub preemptions: u64,
}
