//! Turns a plan into what the runner takes. Buffers are kept from step to step, so that a steady decode allocates nothing.

use super::{
    request::Pooling,
    scheduler::{Scheduler, SchedulerOutput},
    sequence::Sequence,
};
use crate::{
    kv_cache::BlockId,
    model_runner::{ModelInput, PoolRows, SampleInput, SampleRow, SeqInput, TOKEN_FROM_SLOT},
};

/// Builds the inputs of one step after another.
#[derive(Default)]
pub(super) struct InputBuilder {
    pub(super) model: ModelInput,
    pub(super) sample: SampleInput,
    /// Block-table buffers not in use.
    spare_tables: Vec<Vec<BlockId>>,
}

impl InputBuilder {
    /// Fills `model` and `sample` for a plan.
    pub(super) fn prepare(
        &mut self,
        plan: &SchedulerOutput,
        scheduler: &Scheduler,
        vocab_size: u32,
    ) {
        self.clear();
        let block_size = scheduler.blocks().block_size();
        for admitted in &plan.admitted {
            // One admitted and preempted in the same plan has no place any more.
            if let Some(seq) = scheduler.sequence(admitted.seq)
                && let Some(slot) = seq.slot
            {
                self.model.init_slots.push(seq.slot_init(slot));
            }
        }
        for item in &plan.items {
            let seq = scheduler
                .sequence(item.seq)
                .expect("a scheduled sequence exists: this is a bug");
            let query_start = u32::try_from(self.model.token_ids.len())
                .expect("a step is bounded by its budget: this is a bug");
            for position in item.start..item.start + item.num_tokens {
                self.push_row(seq, position, block_size);
            }
            let context_len = item.start + item.num_tokens;
            let mut block_table = self.spare_tables.pop().unwrap_or_default();
            let used = context_len.div_ceil(block_size) as usize;
            block_table.extend_from_slice(&seq.table.blocks()[..used]);
            self.model.seqs.push(SeqInput {
                slot: item.slot,
                query_start,
                query_len: item.num_tokens,
                context_len,
                block_table,
            });
            let last = query_start + item.num_tokens - 1;
            if item.prompt_logits {
                self.model.logit_rows.extend(query_start..last);
                self.sample.return_logits = true;
            }
            if item.samples || item.prompt_logits {
                self.model.logit_rows.push(last);
            }
            if item.pools {
                self.pool(seq, query_start, last);
            }
            if item.samples {
                let logit_index = u32::try_from(self.model.logit_rows.len() - 1)
                    .expect("a step is bounded by its budget: this is a bug");
                self.sample.rows.push(SampleRow {
                    slot: item.slot,
                    seq: item.seq,
                    epoch: item.epoch,
                    logit_index,
                    position: context_len,
                    num_generated: item.num_generated,
                    mask: seq.constraint.mask(seq.output(), vocab_size),
                });
            }
        }
    }

    /// Asks for the hidden states that a sequence's embedding is made of.
    fn pool(&mut self, seq: &Sequence, first: u32, last: u32) {
        let count = |rows: &Vec<u32>| {
            u32::try_from(rows.len()).expect("a step is bounded by its budget: this is a bug")
        };
        let start = count(&self.model.hidden_rows);
        match seq.pooling {
            Some(Pooling::Mean) => self.model.hidden_rows.extend(first..=last),
            Some(Pooling::Last) | None => self.model.hidden_rows.push(last),
        }
        self.sample.pool.push(PoolRows {
            seq: seq.id,
            epoch: seq.epoch,
            rows: start..count(&self.model.hidden_rows),
        });
    }

    fn push_row(&mut self, seq: &Sequence, position: u32, block_size: u32) {
        let token = seq.token_at(position).unwrap_or(TOKEN_FROM_SLOT);
        self.model.token_ids.push(token);
        self.model.positions.push(position);
        self.model
            .slot_mapping
            .push(seq.table.slot_of(position, block_size));
    }

    fn clear(&mut self) {
        let model = &mut self.model;
        model.token_ids.clear();
        model.positions.clear();
        model.slot_mapping.clear();
        model.logit_rows.clear();
        model.hidden_rows.clear();
        model.init_slots.clear();
        for mut seq in model.seqs.drain(..) {
            seq.block_table.clear();
            self.spare_tables.push(seq.block_table);
        }
        self.sample.rows.clear();
        self.sample.pool.clear();
        self.sample.return_logits = false;
    }
}
