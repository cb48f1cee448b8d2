//! A runner without a model, for tests of everything above the seam.
//!
//! [`FakeModel::Attention`] is a small model in spirit: every row writes what it computed into a simulated KV pool
//! through the slot mapping, and reads *all* of its context back through the block table, two layers deep, before its
//! logits follow. A wrong table, a block reused too early, a wrong prefix hit or a missing row changes the output.
//! [`FakeModel::Script`] says the same tokens to everybody, at no cost.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use super::{
    ModelCosts, ModelInput, ModelRunner, PADDING, Pooled, RunnerError, RunnerLimits, SampleInput,
    SampledRow, SeqInput, Slot, StepId, StepOutput, TOKEN_FROM_SLOT,
};
use crate::{
    engine::request::{GeneratedToken, TokenId},
    kv_cache::BlockId,
    sampler::Sampler,
};

/// Width of the attention model's hidden states.
pub const HIDDEN_SIZE: u32 = 4;

/// What the fake computes.
#[derive(Debug, Clone)]
pub enum FakeModel {
    /// Logits that depend on every token of the context, read through the block table, then the real sampler.
    Attention,
    /// Every sequence says these tokens, over and over. At least one.
    Script(Vec<TokenId>),
}

/// Tokens that make trouble when they appear in a prompt.
#[derive(Debug, Clone, Default)]
pub struct FakeFaults {
    /// The step fails; its requests end, the engine goes on.
    pub error_token: Option<TokenId>,
    /// The step cannot even be submitted.
    pub submit_error_token: Option<TokenId>,
    /// The device is lost.
    pub fatal_token: Option<TokenId>,
    /// The runner panics.
    pub panic_token: Option<TokenId>,
    /// Logits of this row are NaN.
    pub nan_token: Option<TokenId>,
}

/// Settings of a [`FakeRunner`].
#[derive(Debug, Clone)]
pub struct FakeConfig {
    /// Sizes.
    pub limits: RunnerLimits,
    /// Steps in flight.
    pub depth: usize,
    /// Time a step takes.
    pub step_latency: Duration,
    /// What it computes.
    pub model: FakeModel,
    /// End-of-sequence ids.
    pub eos_token_ids: Vec<TokenId>,
    /// Scripted failures.
    pub faults: FakeFaults,
}

impl Default for FakeConfig {
    fn default() -> Self {
        Self {
            limits: RunnerLimits {
                block_size: 16,
                num_blocks: 1024,
                max_num_seqs: 64,
                max_num_batched_tokens: 8192,
                max_logit_rows: 64,
                max_model_len: 4096,
                vocab_size: 128,
                kv_bytes_per_token: 1024,
            },
            depth: 1,
            step_latency: Duration::ZERO,
            model: FakeModel::Attention,
            eos_token_ids: Vec::new(),
            faults: FakeFaults::default(),
        }
    }
}

/// A step in flight.
struct Pending {
    id: StepId,
    input: ModelInput,
    sample: Option<SampleInput>,
    ready_at: Instant,
}

/// See the [module](self).
pub struct FakeRunner {
    config: FakeConfig,
    sampler: Sampler,
    /// Two layers of one word per token position of the pool.
    kv: [Vec<u64>; 2],
    /// The token each slot sampled last.
    last_token: HashMap<Slot, TokenId>,
    pending: VecDeque<Pending>,
    next_step: u64,
}

impl FakeRunner {
    /// A runner with these settings.
    ///
    /// # Panics
    /// When a script is empty: the settings come from a test.
    #[must_use]
    pub fn new(mut config: FakeConfig) -> Self {
        let limits = &mut config.limits;
        // As of any runner: a row for each sequence at least.
        limits.max_logit_rows = limits.max_logit_rows.max(limits.max_num_seqs);
        if let FakeModel::Script(script) = &config.model {
            assert!(!script.is_empty(), "a script has at least one token");
        }
        let words = match config.model {
            FakeModel::Attention => limits.num_blocks as usize * limits.block_size as usize,
            FakeModel::Script(_) => 0,
        };
        let eos = config.eos_token_ids.clone();
        Self {
            sampler: Sampler::new(limits.vocab_size, limits.max_num_seqs, eos),
            kv: [vec![0; words], vec![0; words]],
            last_token: HashMap::new(),
            pending: VecDeque::new(),
            next_step: 0,
            config,
        }
    }

    fn run(&mut self, step: &Pending) -> Result<StepOutput, RunnerError> {
        let mut input = step.input.clone();
        let sample = step.sample.as_ref();
        let sample = sample.ok_or_else(|| error("polled before it was sampled", false))?;
        for init in &input.init_slots {
            self.sampler.init_slot(init);
            self.last_token.remove(&init.slot);
        }
        for seq in &input.seqs {
            for row in rows(seq) {
                if input.token_ids[row] == TOKEN_FROM_SLOT {
                    // After a failed step the row is void anyhow: its result is stale.
                    let last = self.last_token.get(&seq.slot).copied();
                    input.token_ids[row] = last.unwrap_or(0);
                }
            }
        }
        let faults = self.config.faults.clone();
        let has = |token: Option<TokenId>| token.is_some_and(|t| input.token_ids.contains(&t));
        assert!(
            !has(faults.panic_token),
            "the fake runner was told to panic"
        );
        if has(faults.fatal_token) {
            return Err(error("the device is lost: restart the process", true));
        }
        if has(faults.error_token) {
            // What a half-run step leaves behind must never be read.
            for slot in input.slot_mapping.iter().filter(|&&slot| slot != PADDING) {
                if let Some(at) = usize::try_from(*slot)
                    .ok()
                    .filter(|&at| at < self.kv[0].len())
                {
                    self.kv[0][at] = 0xDEAD;
                    self.kv[1][at] = 0xDEAD;
                }
            }
            return Err(error("the step failed", false));
        }
        let nan_rows: Vec<usize> = (0..input.token_ids.len())
            .filter(|&row| Some(input.token_ids[row]) == faults.nan_token)
            .collect();
        match self.config.model.clone() {
            FakeModel::Script(script) => Ok(self.recite(&script, &input, sample, &nan_rows)),
            FakeModel::Attention => Ok(self.attend(&input, sample, &nan_rows)),
        }
    }

    fn recite(
        &mut self,
        script: &[TokenId],
        input: &ModelInput,
        sample: &SampleInput,
        nan_rows: &[usize],
    ) -> StepOutput {
        let rows = sample.rows.iter().map(|row| {
            let id = script[row.num_generated as usize % script.len()];
            let is_nan = nan_rows.contains(&(input.logit_rows[row.logit_index as usize] as usize));
            self.last_token.insert(row.slot, id);
            SampledRow {
                slot: row.slot,
                seq: row.seq,
                epoch: row.epoch,
                tokens: if is_nan {
                    Vec::new()
                } else {
                    vec![GeneratedToken { id, logprobs: None }]
                },
            }
        });
        StepOutput {
            rows: rows.collect(),
            ..StepOutput::default()
        }
    }

    /// Two layers: each writes the whole batch, then each row reads its whole context.
    fn attend(
        &mut self,
        input: &ModelInput,
        sample: &SampleInput,
        nan_rows: &[usize],
    ) -> StepOutput {
        let mut hidden: Vec<u64> = input
            .token_ids
            .iter()
            .zip(&input.positions)
            .map(|(&token, &position)| mix(u64::from(token) << 32 | u64::from(position)))
            .collect();
        for layer in 0..self.kv.len() {
            for (row, &slot) in input.slot_mapping.iter().enumerate() {
                if slot != PADDING {
                    let at = usize::try_from(slot).expect("a slot is PADDING or an index");
                    self.kv[layer][at] = hidden[row];
                }
            }
            for seq in &input.seqs {
                self.read_context(layer, seq, &mut hidden);
            }
        }
        let vocab = self.config.limits.vocab_size as usize;
        let mut all_logits = Vec::new();
        if sample.return_logits {
            for &row in &input.logit_rows {
                all_logits.extend(logits_of(hidden[row as usize], vocab));
            }
        }
        let mut output = StepOutput::default();
        for row in &sample.rows {
            let input_row = input.logit_rows[row.logit_index as usize] as usize;
            let mut logits = logits_of(hidden[input_row], vocab);
            if nan_rows.contains(&input_row) {
                logits[0] = f32::NAN;
            }
            let token = self.sampler.sample(row, &mut logits).ok();
            if let Some(token) = &token {
                self.last_token.insert(row.slot, token.id);
            }
            output.rows.push(SampledRow {
                slot: row.slot,
                seq: row.seq,
                epoch: row.epoch,
                tokens: token.into_iter().collect(),
            });
        }
        output.logits = all_logits;
        output.pooled = sample
            .pool
            .iter()
            .map(|pool| {
                let rows = &input.hidden_rows[pool.rows.start as usize..pool.rows.end as usize];
                let mut sum = vec![0.0; HIDDEN_SIZE as usize];
                for &row in rows {
                    for (index, sum) in sum.iter_mut().enumerate() {
                        // Whole numbers: their sums do not depend on the order.
                        *sum += f64::from((hidden[row as usize] >> (16 * index)) as u16);
                    }
                }
                Pooled {
                    seq: pool.seq,
                    epoch: pool.epoch,
                    sum,
                }
            })
            .collect();
        output
    }

    /// Folds the context of each row of a sequence into its hidden word.
    fn read_context(&self, layer: usize, seq: &SeqInput, hidden: &mut [u64]) {
        let block_size = self.config.limits.block_size;
        let first_row_at = seq.context_len - seq.query_len;
        let mut folded = 0u64;
        let mut rows = rows(seq);
        for position in 0..seq.context_len {
            let block = seq.block_table[(position / block_size) as usize];
            assert!(block != BlockId::NULL, "the null block is never read");
            let at = block.0 as usize * block_size as usize + (position % block_size) as usize;
            folded = mix(folded ^ self.kv[layer][at]);
            if position >= first_row_at {
                let row = rows.next().expect("as many rows as positions");
                hidden[row] = folded;
            }
        }
    }
}

impl ModelRunner for FakeRunner {
    fn limits(&self) -> &RunnerLimits {
        &self.config.limits
    }

    fn submit(&mut self, input: &ModelInput) -> Result<StepId, RunnerError> {
        let trouble = self.config.faults.submit_error_token;
        if trouble.is_some_and(|token| input.token_ids.contains(&token)) {
            return Err(error("the step cannot be submitted", false));
        }
        assert!(
            self.pending.len() < self.config.depth,
            "more steps in flight than the depth allows"
        );
        self.next_step += 1;
        let id = StepId(self.next_step);
        let free_at = self.pending.back().map(|step| step.ready_at);
        let start = free_at.map_or_else(Instant::now, |at| at.max(Instant::now()));
        self.pending.push_back(Pending {
            id,
            input: input.clone(),
            sample: None,
            ready_at: start + self.config.step_latency,
        });
        Ok(id)
    }

    fn sample(&mut self, step: StepId, input: &SampleInput) -> Result<(), RunnerError> {
        let pending = self.pending.iter_mut().find(|pending| pending.id == step);
        let pending = pending.ok_or_else(|| error("an unknown step was sampled", false))?;
        pending.sample = Some(input.clone());
        Ok(())
    }

    fn poll(&mut self, step: StepId, wait: Duration) -> Result<Option<StepOutput>, RunnerError> {
        let front = self
            .pending
            .front()
            .map(|pending| (pending.id, pending.ready_at));
        let Some((id, ready_at)) = front.filter(|&(id, _)| id == step) else {
            return Err(error(
                "steps are polled in the order of their submission",
                false,
            ));
        };
        debug_assert_eq!(id, step, "the front is the step asked for");
        let left = ready_at.saturating_duration_since(Instant::now());
        std::thread::sleep(left.min(wait));
        if left > wait {
            return Ok(None);
        }
        let pending = self.pending.pop_front();
        let pending = pending.ok_or_else(|| error("the step has gone", false))?;
        self.run(&pending).map(Some)
    }

    fn depth(&self) -> usize {
        self.config.depth
    }

    fn costs(&self) -> Option<ModelCosts> {
        match self.config.model {
            FakeModel::Attention => Some(ModelCosts {
                weight_bytes: 1 << 20,
                flops_per_token: 1e6,
                flops_per_output: 1e3,
                flops_per_attended: 1e2,
            }),
            FakeModel::Script(_) => None,
        }
    }

    fn hidden_size(&self) -> Option<u32> {
        match self.config.model {
            FakeModel::Attention => Some(HIDDEN_SIZE),
            FakeModel::Script(_) => None,
        }
    }
}

fn rows(seq: &SeqInput) -> std::ops::Range<usize> {
    seq.query_start as usize..(seq.query_start + seq.query_len) as usize
}

fn error(message: &str, fatal: bool) -> RunnerError {
    RunnerError {
        message: message.to_owned(),
        fatal,
    }
}

/// A good 64-bit hash of a word.
fn mix(word: u64) -> u64 {
    let z = word.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Logits in [0, 8) that a hidden word decides.
fn logits_of(hidden: u64, vocab: usize) -> Vec<f32> {
    (0..vocab as u64)
        .map(|token| f32::from((mix(hidden ^ token) >> 48) as u16) / 8192.0)
        .collect()
}
