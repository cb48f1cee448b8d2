//! Decides what each step computes. Pure: numbers in, a plan out.
//!
//! There is no prefill phase and no decode phase: every sequence catches its computed count up to its known tokens,
//! under one budget of tokens per step. Sequences that decode come first, then prefills under way, then new ones; so a
//! long prompt never holds up a decode by more than one step's budget.
//!
//! Why it cannot deadlock: a request that the pool could not hold alone is refused at submit; admission takes the
//! blocks of all known tokens at once, so a prefill never stops half-way; a decode without a free block preempts the
//! sequence admitted last, and the first one admitted is never preempted while there is another. So the first always
//! finishes.

mod leave;
mod plan;

use std::collections::HashMap;

use self::leave::Retired;
pub use self::plan::{Accepted, Admitted, ScheduledItem, SchedulerCounters, SchedulerOutput};
use super::{
    config::{
        EngineConfig, KvReservation, MAX_TOKENS_WITH_DECODE, TOKENS_PER_SEQUENCE_WITH_DECODE,
    },
    request::{Pooling, Request, SeqId, TokenId},
    sequence::Sequence,
    stop,
    waiting::WaitingQueue,
};
use crate::{
    kv_cache::{BlockId, BlockManager, IntegrityError},
    model_runner::{RunnerLimits, Slot},
};

/// Most rows in a step of a prompt whose log-probabilities are wanted: each needs a whole row of logits.
const PROMPT_LOGPROBS_ROWS: u32 = 32;

/// Sequences, queues and blocks.
pub struct Scheduler {
    max_tokens: u32,
    max_logit_rows: u32,
    long_prefill_token_threshold: u32,
    /// Blocks taken at admission whatever the sequence needs; 0 with pages.
    reserved_blocks: u32,
    eos_token_ids: Vec<TokenId>,
    blocks: BlockManager,
    sequences: HashMap<SeqId, Sequence>,
    /// In order of admission.
    running: Vec<SeqId>,
    waiting: WaitingQueue,
    /// Tokens of the sequences that wait: what is to be computed before they answer, cached prefixes included.
    waiting_tokens: u64,
    free_slots: Vec<Slot>,
    retired: Vec<Retired>,
    /// Last step handed out, and last step completed.
    step: u64,
    completed: u64,
    counters: SchedulerCounters,
}

/// Blocks that a request takes at its longest: its last token is never computed.
#[must_use]
pub fn blocks_for_request(
    request: &Request,
    limits: &RunnerLimits,
    reservation: KvReservation,
) -> u32 {
    let prompt = u32::try_from(request.prompt.len()).unwrap_or(u32::MAX);
    let tokens = prompt.saturating_add(request.params.max_tokens.saturating_sub(1));
    match reservation {
        KvReservation::Paged => tokens.div_ceil(limits.block_size),
        KvReservation::Contiguous => limits.max_model_len.div_ceil(limits.block_size),
    }
}

impl Scheduler {
    /// For a runner of these sizes. `config`'s sizes are within the limits.
    #[must_use]
    pub fn new(config: &EngineConfig, limits: &RunnerLimits) -> Self {
        let paged = config.reservation == KvReservation::Paged;
        let caching = config.enable_prefix_caching && paged;
        let reserved_blocks = limits.max_model_len.div_ceil(limits.block_size);
        Self {
            max_tokens: config.max_num_batched_tokens,
            max_logit_rows: limits.max_logit_rows,
            long_prefill_token_threshold: config.long_prefill_token_threshold,
            reserved_blocks: if paged { 0 } else { reserved_blocks },
            eos_token_ids: config.eos_token_ids.clone(),
            blocks: BlockManager::new(limits.num_blocks, limits.block_size, caching),
            sequences: HashMap::new(),
            running: Vec::new(),
            waiting: WaitingQueue::default(),
            waiting_tokens: 0,
            free_slots: (0..config.max_num_seqs).rev().map(Slot).collect(),
            retired: Vec::new(),
            step: 0,
            completed: 0,
            counters: SchedulerCounters::default(),
        }
    }

    /// Takes in a sequence; it waits for a place.
    pub fn add(&mut self, sequence: Sequence) {
        self.waiting_tokens += u64::from(sequence.num_tokens());
        self.waiting.enter(sequence.tenant);
        self.waiting
            .push_back(sequence.id, sequence.priority, sequence.tenant);
        self.sequences.insert(sequence.id, sequence);
    }

    /// A sequence that has not left.
    #[must_use]
    pub fn sequence(&self, seq: SeqId) -> Option<&Sequence> {
        self.sequences.get(&seq)
    }

    /// Sequences with a place.
    #[must_use]
    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Sequences without one.
    #[must_use]
    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Their tokens.
    #[must_use]
    pub fn waiting_tokens(&self) -> u64 {
        self.waiting_tokens
    }

    /// The sequence to be admitted next.
    #[must_use]
    pub fn first_waiting(&self) -> Option<SeqId> {
        self.waiting.first()
    }

    /// Some sequence only waits for its mask.
    #[must_use]
    pub fn awaits_masks(&self) -> bool {
        self.sequences.values().any(Sequence::mask_pending)
    }

    /// No sequence is left, and no block or slot waits for a step.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty() && self.retired.is_empty()
    }

    /// The block pool.
    #[must_use]
    pub fn blocks(&self) -> &BlockManager {
        &self.blocks
    }

    /// The counts.
    #[must_use]
    pub fn counters(&self) -> SchedulerCounters {
        self.counters
    }

    /// Proves the pool's invariants with the tables of all sequences.
    ///
    /// # Errors
    /// [`IntegrityError`] names the first contradiction.
    pub fn check_integrity(&self) -> Result<(), IntegrityError> {
        let retired = self.retired.iter().map(|r| &r.table);
        let tables = self.sequences.values().map(|s| &s.table);
        self.blocks.check_integrity(tables.chain(retired))
    }

    /// Running sequences whose next row draws a token after their first.
    #[cfg(test)]
    pub(super) fn decoding_for_test(&self) -> Vec<SeqId> {
        let decodes = |id: &&SeqId| {
            let seq = &self.sequences[id];
            seq.remaining() == 1 && seq.num_generated() > 0
        };
        self.running.iter().filter(decodes).copied().collect()
    }

    /// Plans the next step. With no item in the plan there is no step: its number is given to the next plan.
    pub fn schedule(&mut self) -> SchedulerOutput {
        let mut plan = SchedulerOutput {
            step: self.step + 1,
            ..SchedulerOutput::default()
        };
        let mut budget = self.budget();
        self.schedule_decodes(&mut plan, &mut budget);
        self.schedule_prefills(&mut plan, &mut budget);
        if plan.preempted.is_empty() {
            self.admit_waiting(&mut plan, &mut budget);
        }
        if !plan.items.is_empty() {
            self.step = plan.step;
        }
        plan
    }

    fn budget(&self) -> u32 {
        let decodes = |id: &SeqId| {
            let seq = &self.sequences[id];
            seq.is_decoding() && seq.num_generated() + seq.num_placeholders > 0
        };
        if self.running.iter().any(decodes) {
            u32::try_from(self.running.len())
                .unwrap_or(u32::MAX)
                .saturating_mul(TOKENS_PER_SEQUENCE_WITH_DECODE)
                .max(MAX_TOKENS_WITH_DECODE)
                .min(self.max_tokens)
        } else {
            self.max_tokens
        }
    }

    fn schedule_decodes(&mut self, plan: &mut SchedulerOutput, budget: &mut u32) {
        let mut index = 0;
        while index < self.running.len() && *budget > 0 {
            let id = self.running[index];
            let seq = &self.sequences[&id];
            let wanted = seq.remaining();
            if wanted == 1 && seq.may_sample() && self.make_room(index, seq.num_computed + 1, plan)
            {
                self.take(id, 1, plan, budget);
            }
            // A sequence that preempted itself was the last: the loop ends by itself.
            index += 1;
        }
    }

    fn schedule_prefills(&mut self, plan: &mut SchedulerOutput, budget: &mut u32) {
        for index in 0..self.running.len() {
            let id = self.running[index];
            let seq = &self.sequences[&id];
            if seq.remaining() > 1 && *budget > 0 {
                let num_tokens = self.chunk(seq, *budget, plan);
                self.take(id, num_tokens, plan, budget);
            }
        }
    }

    /// Rows of a prefill in this step; 0 when its only row has to wait for a mask.
    fn chunk(&self, seq: &Sequence, budget: u32, plan: &SchedulerOutput) -> u32 {
        let wanted = seq.remaining();
        let mut rows = wanted.min(budget);
        if self.long_prefill_token_threshold > 0 {
            rows = rows.min(self.long_prefill_token_threshold);
        }
        if wants_prompt_logits(seq) {
            // Every other sequence with a place may want a row yet.
            let others = self.running.len().saturating_sub(plan.items.len() + 1);
            let others = u32::try_from(others).unwrap_or(u32::MAX);
            let left = self.max_logit_rows.saturating_sub(plan.num_logit_rows);
            let left = left.saturating_sub(others).max(1);
            rows = rows.min(PROMPT_LOGPROBS_ROWS).min(left);
        }
        if rows == wanted && !seq.may_sample() {
            rows -= 1;
        }
        rows
    }

    /// Grows the table of `running[index]`, preempting from the end of the running list as long as that helps. False
    /// when the sequence sits this step out: it preempted itself, or blocks are on their way back.
    fn make_room(&mut self, index: usize, num_tokens: u32, plan: &mut SchedulerOutput) -> bool {
        let id = self.running[index];
        loop {
            let seq = self
                .sequences
                .get_mut(&id)
                .expect("a running sequence exists: this is a bug");
            if self.blocks.grow(&mut seq.table, num_tokens) {
                return true;
            }
            let missing = self.blocks.missing(&seq.table, num_tokens);
            let coming: usize = self.retired.iter().map(|r| r.table.len()).sum();
            if self.blocks.num_free() as usize + coming >= missing as usize {
                return false;
            }
            let victim = *self
                .running
                .last()
                .expect("the sequence itself is running: this is a bug");
            self.preempt(victim);
            plan.preempted.push(victim);
            if victim == id {
                return false;
            }
        }
    }

    fn admit_waiting(&mut self, plan: &mut SchedulerOutput, budget: &mut u32) {
        while *budget > 0
            && !self.free_slots.is_empty()
            && plan.num_logit_rows < self.max_logit_rows
        {
            let Some(id) = self.waiting.first() else {
                return;
            };
            if !self.sequences[&id].may_sample() {
                // It came back from a preemption and its mask is on its way.
                return;
            }
            // Decodes need a block now and then: without a reserve the newcomer would be preempted at once.
            let keep_free = match self.running.len() {
                0 => 0,
                _ if self.reserved_blocks > 0 => 0,
                _ => (self.blocks.num_total() / 100).max(1),
            };
            let seq = self
                .sequences
                .get_mut(&id)
                .expect("a waiting sequence exists: this is a bug");
            let num_tokens = seq.num_tokens();
            let use_cache = self.blocks.prefix_caching()
                && seq.prompt_logprobs.is_none()
                && seq.pooling != Some(Pooling::Mean);
            let hits = if use_cache {
                self.blocks.lookup(seq.block_hashes(), num_tokens)
            } else {
                Vec::new()
            };
            let wanted_blocks = self.blocks.blocks_for(num_tokens).max(self.reserved_blocks);
            if !self
                .blocks
                .admit(&mut seq.table, &hits, wanted_blocks, keep_free)
            {
                return;
            }
            seq.num_published =
                u32::try_from(hits.len()).expect("hits fit the pool: this is a bug");
            seq.num_computed = seq.num_published * self.blocks.block_size();
            seq.slot = self.free_slots.pop();
            let first = seq.num_cached.is_none();
            if first {
                seq.num_cached = Some(seq.num_computed);
                if use_cache {
                    self.counters.prefix_queries += u64::from(num_tokens);
                    self.counters.prefix_hits += u64::from(seq.num_computed);
                }
            }
            let (priority, tenant) = (seq.priority, seq.tenant);
            let computed = seq.num_computed;
            self.waiting.remove(id, priority, tenant);
            self.waiting_tokens -= u64::from(num_tokens);
            self.waiting.charge(tenant, num_tokens - computed, 0);
            self.running.push(id);
            plan.admitted.push(Admitted { seq: id, first });
            let num_tokens = self.chunk(&self.sequences[&id], *budget, plan);
            self.take(id, num_tokens, plan, budget);
        }
    }

    /// Puts `num_tokens` rows of a running sequence into the plan; computed counts advance now.
    fn take(&mut self, id: SeqId, num_tokens: u32, plan: &mut SchedulerOutput, budget: &mut u32) {
        let seq = self
            .sequences
            .get_mut(&id)
            .expect("a running sequence exists: this is a bug");
        let is_last = num_tokens == seq.remaining();
        let samples = is_last && seq.pooling.is_none();
        let pools = match seq.pooling {
            None => false,
            Some(Pooling::Last) => is_last,
            Some(Pooling::Mean) => true,
        };
        let prompt_logits = wants_prompt_logits(seq);
        plan.items.push(ScheduledItem {
            seq: id,
            slot: seq
                .slot
                .expect("a running sequence has a slot: this is a bug"),
            epoch: seq.epoch,
            start: seq.num_computed,
            num_tokens,
            num_draft: 0,
            samples,
            num_generated: seq.num_generated() + seq.num_placeholders,
            prompt_logits,
            pools,
        });
        plan.num_tokens += num_tokens;
        plan.num_logit_rows += if prompt_logits {
            num_tokens
        } else {
            samples.into()
        };
        *budget -= num_tokens;
        seq.num_computed += num_tokens;
        seq.num_placeholders += u32::from(samples);
        seq.last_step = plan.step;
        if self.blocks.prefix_caching() {
            publish(&mut self.blocks, seq, &mut plan.published);
        }
    }

    /// The result of `item`'s step: the tokens it drew. `None` when the result is stale; with the sequence if it ended.
    pub fn update(
        &mut self,
        item: &ScheduledItem,
        drawn: &[TokenId],
    ) -> Option<(Accepted, Option<Sequence>)> {
        let seq = self.sequences.get_mut(&item.seq)?;
        if seq.epoch != item.epoch {
            return None;
        }
        seq.num_placeholders -= 1;
        // Of 1 + num_draft computed tokens as many stand as were drawn.
        let drawn = &drawn[..drawn.len().min(item.num_draft as usize + 1)];
        seq.num_computed -= item.num_draft + 1 - u32::try_from(drawn.len()).unwrap_or(0);
        let mut accepted = Accepted {
            num_tokens: 0,
            finish: None,
        };
        let served = u32::try_from(drawn.len()).unwrap_or(0);
        self.waiting.charge(seq.tenant, 0, served);
        for &token in drawn {
            seq.tokens.push(token);
            accepted.num_tokens += 1;
            let generated = seq.num_generated();
            accepted.finish = stop::judge(&seq.params, &self.eos_token_ids, generated, token);
            if accepted.finish.is_some() {
                return Some((accepted, self.remove(item.seq)));
            }
        }
        Some((accepted, None))
    }

    fn sequence_mut(&mut self, id: SeqId) -> &mut Sequence {
        self.sequences
            .get_mut(&id)
            .expect("a queued sequence exists: this is a bug")
    }
}

/// Rows of its prompt are still to come whose logits are wanted.
fn wants_prompt_logits(seq: &Sequence) -> bool {
    seq.prompt_logprobs.is_some() && seq.num_generated() == 0 && seq.num_computed < seq.num_prompt()
}

/// Publishes the blocks of `seq` that are full, computed by now and of tokens known on the host.
fn publish(blocks: &mut BlockManager, seq: &mut Sequence, published: &mut Vec<BlockId>) {
    let known = seq.num_computed.min(seq.num_tokens());
    let full = known / blocks.block_size();
    if full <= seq.num_published {
        return;
    }
    let range = seq.num_published as usize..full as usize;
    seq.num_published = full;
    seq.block_hashes();
    for index in range {
        let (block, hash) = (seq.table.blocks()[index], seq.known_hashes()[index]);
        if blocks.publish(block, hash) {
            published.push(block);
        }
    }
}
