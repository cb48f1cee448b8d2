//! How sequences lose their place: at their end, by a failed step, by preemption.
//!
//! Blocks and slots of a sequence that leaves are released only when no submitted step names them.

use std::collections::HashSet;

use super::{Scheduler, SchedulerOutput};
use crate::{
    engine::{request::SeqId, sequence::Sequence},
    kv_cache::{BlockId, BlockTable},
    model_runner::Slot,
};

/// Blocks and slot of a sequence that has left, until the steps that name them are done.
pub(super) struct Retired {
    pub(super) table: BlockTable,
    pub(super) slot: Slot,
    pub(super) last_step: u64,
}

impl Scheduler {
    /// A step is done, whether it succeeded or not: what only it held up is released.
    pub fn complete(&mut self, step: u64) {
        self.completed = self.completed.max(step);
        let (free, held) = std::mem::take(&mut self.retired)
            .into_iter()
            .partition(|retired| retired.last_step <= self.completed);
        self.retired = held;
        for retired in free {
            self.release(retired.table, retired.slot);
        }
    }

    /// A sequence leaves, wherever it is. `None` when it has left already.
    pub fn remove(&mut self, id: SeqId) -> Option<Sequence> {
        let mut seq = self.sequences.remove(&id)?;
        if let Some(slot) = seq.slot.take() {
            self.running.retain(|&other| other != id);
            self.retire(std::mem::take(&mut seq.table), slot, seq.last_step);
        } else {
            self.waiting.remove(id, seq.priority, seq.tenant);
            self.waiting_tokens -= u64::from(seq.num_tokens());
        }
        self.waiting.leave(seq.tenant);
        Some(seq)
    }

    /// A step failed: its sequences leave and are handed back; nothing it published stays, nor what `later` steps in
    /// flight published on top; sequences that already use such blocks start over.
    pub fn withdraw<'a>(
        &mut self,
        failed: &SchedulerOutput,
        later: impl Iterator<Item = &'a SchedulerOutput>,
    ) -> Vec<Sequence> {
        let mut withdrawn: HashSet<BlockId> = failed.published.iter().copied().collect();
        withdrawn.extend(later.flat_map(|plan| plan.published.iter().copied()));
        for &block in &withdrawn {
            self.blocks.withdraw(block);
        }
        let mut gone = Vec::new();
        for item in &failed.items {
            let current = self.sequences.get(&item.seq).map(|seq| seq.epoch);
            if current == Some(item.epoch) {
                gone.extend(self.remove(item.seq));
            }
        }
        let tainted = |id: &SeqId| {
            let table = self.sequences[id].table.blocks();
            table.iter().any(|block| withdrawn.contains(block))
        };
        let start_over: Vec<SeqId> = self.running.iter().copied().filter(tainted).collect();
        // The last one first, so that the queue keeps their order.
        start_over.into_iter().rev().for_each(|id| self.preempt(id));
        gone
    }

    /// Takes a running sequence's place away; it waits at the head of the queue and recomputes everything.
    pub(super) fn preempt(&mut self, id: SeqId) {
        let seq = self.sequence_mut(id);
        let slot = seq
            .slot
            .take()
            .expect("a running sequence has a slot: this is a bug");
        let table = std::mem::take(&mut seq.table);
        let last_step = seq.last_step;
        seq.num_computed = 0;
        seq.num_placeholders = 0;
        seq.num_published = 0;
        seq.epoch += 1;
        seq.num_preemptions += 1;
        let (priority, tenant, tokens) = (seq.priority, seq.tenant, seq.num_tokens());
        self.running.retain(|&other| other != id);
        self.waiting.push_front(id, priority, tenant);
        self.waiting_tokens += u64::from(tokens);
        self.counters.preemptions += 1;
        self.retire(table, slot, last_step);
    }

    fn retire(&mut self, table: BlockTable, slot: Slot, last_step: u64) {
        if last_step <= self.completed {
            self.release(table, slot);
        } else {
            self.retired.push(Retired {
                table,
                slot,
                last_step,
            });
        }
    }

    fn release(&mut self, mut table: BlockTable, slot: Slot) {
        self.blocks.free(&mut table);
        self.free_slots.push(slot);
    }
}
