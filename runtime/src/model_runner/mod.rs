//! The seam between the engine and whatever computes a step: CPU, CUDA, or a fake for tests.
//!
//! A step is `submit` (embedding to logits), then `sample` (bias, penalties, mask, draw), then `poll`.
//! A runner of depth 1 finishes a step before the next is submitted; a runner of depth 2 lets step N+1 be
//! submitted before the tokens of step N reach the host: its decode rows name [`TOKEN_FROM_SLOT`] as their token.

pub mod fake;

mod check;
pub mod cpu;
mod cpu_backend;
#[cfg(feature = "cuda")]
pub mod cuda;
mod memory;
pub mod ranks;

use std::{ops::Range, sync::Arc, time::Duration};

use crate::{
    engine::request::{GeneratedToken, SamplingParams, SeqId, TokenId},
    kv_cache::BlockId,
};

#[cfg(test)]
pub(crate) use check::check;
pub use cpu::{CpuRunner, CpuRunnerConfig, CpuRunnerError, Dtype, KvCacheSize, KvDtype};
pub use ranks::RankedRunner;

/// Stable index `< max_num_seqs` of a running sequence: per-request state of the runner lives in arrays indexed by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);

/// Number of a submitted step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StepId(pub u64);

/// In [`ModelInput::token_ids`]: take the token that this row's slot sampled last (not yet known on the host).
pub const TOKEN_FROM_SLOT: TokenId = TokenId::MAX;

/// Slot-mapping value of a padded row: nothing is written.
pub const PADDING: i64 = -1;

/// What the runner holds and can do, fixed once it is built.
#[derive(Debug, Clone)]
pub struct RunnerLimits {
    /// Tokens in one block.
    pub block_size: u32,
    /// Blocks in the pool, null block 0 included.
    pub num_blocks: u32,
    /// Slots.
    pub max_num_seqs: u32,
    /// Most rows in one step.
    pub max_num_batched_tokens: u32,
    /// Most of them whose logits are wanted; `max_num_seqs` at least, so that each sequence can draw.
    pub max_logit_rows: u32,
    /// Longest sequence, prompt and output.
    pub max_model_len: u32,
    /// Width of the logits: every token id in a request is below this.
    pub vocab_size: u32,
    /// Bytes of KV cache that one token takes, all layers.
    pub kv_bytes_per_token: u64,
}

/// Rows of logits that a runner holds: one for each sequence, and enough for prompts whose log-probabilities are wanted.
fn max_logit_rows(max_num_seqs: u32) -> u32 {
    max_num_seqs.max(256)
}

/// (Re)binds a slot to a sequence. Sent with the first step in which the sequence runs, and again after a preemption.
#[derive(Debug, Clone)]
pub struct SlotInit {
    /// The slot.
    pub slot: Slot,
    /// Its sequence.
    pub seq: SeqId,
    /// How it samples; `seed` is always set here.
    pub params: Arc<SamplingParams>,
    /// Second half of the random stream's key.
    pub choice_index: u32,
    /// Prompt tokens (repetition penalty counts them).
    pub prompt: Arc<[TokenId]>,
    /// Tokens generated before a preemption (penalties count them).
    pub output: Vec<TokenId>,
}

/// One sequence's part of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeqInput {
    /// Its slot.
    pub slot: Slot,
    /// First of its rows in `token_ids`.
    pub query_start: u32,
    /// Number of its rows.
    pub query_len: u32,
    /// Tokens whose K and V exist after this step writes its own: `context_len − query_len` were there before.
    pub context_len: u32,
    /// Logical → physical blocks, `⌈context_len / block_size⌉` entries at least.
    pub block_table: Vec<BlockId>,
}

/// Everything the forward pass of one step needs. Rows of one sequence are adjacent.
#[derive(Debug, Clone, Default)]
pub struct ModelInput {
    /// `[num_rows]` tokens, or [`TOKEN_FROM_SLOT`].
    pub token_ids: Vec<TokenId>,
    /// `[num_rows]` absolute positions.
    pub positions: Vec<u32>,
    /// `[num_rows]` `block·block_size + offset` where the row's K and V go, or [`PADDING`].
    pub slot_mapping: Vec<i64>,
    /// The sequences, in row order.
    pub seqs: Vec<SeqInput>,
    /// Rows that need logits, ascending (0..n per sequence).
    pub logit_rows: Vec<u32>,
    /// Rows whose final hidden states are pooled, ascending, none of them in `logit_rows`. Only of runners with a
    /// [`hidden_size`](ModelRunner::hidden_size).
    pub hidden_rows: Vec<u32>,
    /// Slots bound before this step runs.
    pub init_slots: Vec<SlotInit>,
}

/// One row to draw a token from.
#[derive(Debug, Clone)]
pub struct SampleRow {
    /// Which slot draws.
    pub slot: Slot,
    /// Its sequence, handed back in the result.
    pub seq: SeqId,
    /// Raised at each preemption; results of an older epoch are dropped.
    pub epoch: u32,
    /// Index into [`ModelInput::logit_rows`].
    pub logit_index: u32,
    /// Position of the token to be drawn: the counter of the random stream.
    pub position: u32,
    /// Tokens generated so far; EOS and stop ids are forbidden while it is below `min_tokens`.
    pub num_generated: u32,
    /// Bitmap of allowed tokens, `⌈vocab/32⌉` words, or none.
    pub mask: Option<Arc<[u32]>>,
}

/// Rows of one sequence whose hidden states are added up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolRows {
    /// Its sequence, handed back in the result.
    pub seq: SeqId,
    /// Raised at each preemption; results of an older epoch are dropped.
    pub epoch: u32,
    /// Indexes into [`ModelInput::hidden_rows`], at least one.
    pub rows: Range<u32>,
}

/// What to draw in a step.
#[derive(Debug, Clone, Default)]
pub struct SampleInput {
    /// At most one row per slot.
    pub rows: Vec<SampleRow>,
    /// What to pool.
    pub pool: Vec<PoolRows>,
    /// Hand back the raw logits of every row in `logit_rows` (perplexity, tests).
    pub return_logits: bool,
}

/// One row's result.
#[derive(Debug, Clone)]
pub struct SampledRow {
    /// Its slot.
    pub slot: Slot,
    /// Its sequence.
    pub seq: SeqId,
    /// The epoch of the [`SampleRow`].
    pub epoch: u32,
    /// 1 token, or more with accepted drafts; none when the logits were not finite: that request fails, alone.
    pub tokens: Vec<GeneratedToken>,
}

/// Hidden states of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Pooled {
    /// Its sequence.
    pub seq: SeqId,
    /// The epoch of the [`PoolRows`].
    pub epoch: u32,
    /// Sum over the rows, `[hidden_size]`.
    pub sum: Vec<f64>,
}

/// Result of a step.
#[derive(Debug, Clone, Default)]
pub struct StepOutput {
    /// One per [`SampleRow`], same order.
    pub rows: Vec<SampledRow>,
    /// One per [`PoolRows`], same order.
    pub pooled: Vec<Pooled>,
    /// `[logit_rows, vocab_size]` when asked for, else empty.
    pub logits: Vec<f32>,
}

/// Why a step could not run. The engine withdraws the step, fails its requests, and goes on or stops by `fatal`.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the model runner failed: {message}")]
pub struct RunnerError {
    /// What happened and what to do.
    pub message: String,
    /// True when the device is lost: the process must restart.
    pub fatal: bool,
}

/// What a model costs, for estimates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ModelCosts {
    /// Bytes of weights, as they are stored.
    pub weight_bytes: u64,
    /// Floating-point operations of a row outside attention and head.
    pub flops_per_token: f64,
    /// Those of the head for one row.
    pub flops_per_output: f64,
    /// Those of attention for a row and one token that it sees.
    pub flops_per_attended: f64,
}

/// Computes steps. Owned and called by the engine thread alone.
pub trait ModelRunner: Send {
    /// Sizes, fixed.
    fn limits(&self) -> &RunnerLimits;

    /// Queues the forward pass of a step.
    ///
    /// # Errors
    /// [`RunnerError`] when the step cannot be queued; nothing of it has run.
    fn submit(&mut self, input: &ModelInput) -> Result<StepId, RunnerError>;

    /// Queues the draw for a submitted step.
    ///
    /// # Errors
    /// [`RunnerError`] when the draw cannot be queued.
    fn sample(&mut self, step: StepId, input: &SampleInput) -> Result<(), RunnerError>;

    /// The step's result, waiting for at most `wait`; `None` while it is still running.
    ///
    /// # Errors
    /// [`RunnerError`] when the step failed.
    fn poll(&mut self, step: StepId, wait: Duration) -> Result<Option<StepOutput>, RunnerError>;

    /// There is no step to make: called again and again while that is so, every [`IDLE_BEAT`](crate::engine::IDLE_BEAT)
    /// or sooner, so that a device that hangs is found before a request is.
    ///
    /// # Errors
    /// [`RunnerError`] when the next step would fail too: the engine stops.
    fn rest(&mut self) -> Result<(), RunnerError> {
        Ok(())
    }

    /// Steps that may be in flight at once: 1 on CPU and fake, 2 on CUDA.
    fn depth(&self) -> usize;

    /// Width of the hidden states that it pools for embeddings; `None` when it cannot.
    fn hidden_size(&self) -> Option<u32> {
        None
    }

    /// What its model costs, where it has one.
    fn costs(&self) -> Option<ModelCosts> {
        None
    }
}
