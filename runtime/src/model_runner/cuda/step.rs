//! What a step uploads: every index array and work list in one block of memory, copied at once.

use ashlar_kernels::cuda::{
    attention::{HeadShape, prefill_items},
    decode_plan::{Cut, DecodePlan},
};

use super::{
    BLOCK_SIZE,
    layout::{Counts, DecodeSection, Layout, TileSection},
    shared_prefix::shared_prefixes,
};
use crate::{
    kv_cache::BlockId,
    model_runner::{ModelInput, PADDING, SeqInput},
};

/// Builds steps; keeps its buffers.
#[derive(Default)]
pub(super) struct StepBuilder {
    /// Whether rows may read together what their tables begin with.
    may_share: bool,
    /// See [`Counts::tiles_only`].
    tiles_only: bool,
    lengths: Vec<u32>,
    plan: DecodePlan,
    kept_lengths: Vec<u32>,
    kept_starts: Vec<i32>,
    kept_plan: DecodePlan,
    prefill: Vec<[i32; 2]>,
    kept_tiles: Vec<[i32; 2]>,
    starts: Vec<i32>,
}

/// A sequence of a step.
#[derive(Clone, Copy, Default)]
struct Member {
    row: i32,
    query: i32,
    context: i32,
    start: i32,
}

impl StepBuilder {
    pub(super) fn new(may_share: bool, tiles_only: bool) -> Self {
        Self {
            may_share,
            tiles_only,
            ..Self::default()
        }
    }

    /// Whether each sequence attends by its row alone, and what the kernels are told of it.
    fn members<'a>(
        &'a self,
        seqs: &'a [SeqInput],
    ) -> impl Iterator<Item = (bool, Member)> + Clone + 'a {
        seqs.iter().zip(&self.starts).map(|(seq, start)| {
            let member = Member {
                row: seq.query_start as i32,
                query: seq.query_len as i32,
                context: seq.context_len as i32,
                start: *start,
            };
            (decodes(seq, self.tiles_only), member)
        })
    }

    /// The layout of a step, padded to `padded_rows` decode rows if it is given (all sequences have one row then).
    pub(super) fn plan(
        &mut self,
        input: &ModelInput,
        padded_rows: Option<usize>,
        shape: &HeadShape,
        multiprocessors: u32,
    ) -> Layout {
        self.starts.clear();
        let mut blocks = 0;
        for seq in &input.seqs {
            self.starts.push(blocks as i32);
            blocks += seq.block_table.len();
        }
        let tiles_only = self.tiles_only;
        let is_decode = |seq: &&SeqInput| decodes(seq, tiles_only);
        let decodes: Vec<&SeqInput> = input.seqs.iter().filter(is_decode).collect();
        let sequences = padded_rows.unwrap_or(input.seqs.len());
        let (num_decodes, prefills) = if tiles_only {
            (0, sequences)
        } else {
            let prefills = input.seqs.len() - decodes.len();
            (sequences - prefills, prefills)
        };
        let mut counts = Counts {
            rows: padded_rows.unwrap_or(input.token_ids.len()),
            decodes: num_decodes,
            tiles_only,
            prefills,
            blocks,
            ..Counts::default()
        };
        if num_decodes > 0 {
            (counts.decode_cut, counts.shares) =
                self.plan_decodes(&decodes, shape, (num_decodes, multiprocessors));
        }
        counts.rotates = input.seqs.len() == decodes.len()
            && input.logit_rows.len() == input.token_ids.len()
            && !reads_what_is_written(input);
        let sizes = input
            .seqs
            .iter()
            .filter(|seq| !is_decode(seq))
            .map(|seq| (seq.query_len, seq.context_len));
        prefill_items(sizes, &mut self.prefill);
        if tiles_only {
            // Padding has no rows, and an item each that does nothing.
            let padding = input.seqs.len()..prefills;
            self.prefill.extend(padding.map(|seq| [seq as i32, 0]));
        }
        counts.prefill_items = self.prefill.len();
        if input.logit_rows.len() < input.token_ids.len() && !input.logit_rows.is_empty() {
            self.keep(input);
            counts.kept = self.kept_lengths.len();
            if tiles_only {
                let sizes = self.kept_lengths.iter().map(|length| (1, *length));
                prefill_items(sizes, &mut self.kept_tiles);
            } else {
                counts.kept_cut = Cut::alone(shape, counts.kept, multiprocessors);
                self.kept_plan
                    .make(shape, &self.kept_lengths, &[], &counts.kept_cut);
            }
        }
        Layout::new(counts)
    }

    /// Plans the attention of sequences that decode, of `rows` with padding; returns what it is cut for, and whether items work
    /// for several rows.
    fn plan_decodes(
        &mut self,
        decodes: &[&SeqInput],
        shape: &HeadShape,
        (rows, multiprocessors): (usize, u32),
    ) -> (Cut, bool) {
        self.lengths.clear();
        self.lengths
            .extend(decodes.iter().map(|seq| seq.context_len));
        let tables: Vec<(u32, &[BlockId])> = decodes
            .iter()
            .map(|seq| (seq.context_len, seq.block_table.as_slice()))
            .collect();
        let shared = if self.may_share {
            shared_prefixes(&tables)
        } else {
            Vec::new()
        };
        if !shared.is_empty() {
            let cut = Cut::shared(shape, rows, multiprocessors);
            self.plan.make(shape, &self.lengths, &shared, &cut);
            // There may be no room for what is shared.
            if self.plan.items.iter().any(|item| item[1] > 1) {
                return (cut, true);
            }
        }
        let cut = Cut::alone(shape, rows, multiprocessors);
        self.plan.make(shape, &self.lengths, &[], &cut);
        (cut, false)
    }

    /// Rows that go through the last layer attend one by one.
    fn keep(&mut self, input: &ModelInput) {
        self.kept_lengths.clear();
        self.kept_starts.clear();
        let mut index = 0;
        for row in &input.logit_rows {
            while input.seqs[index].query_start + input.seqs[index].query_len <= *row {
                index += 1;
            }
            let seq = &input.seqs[index];
            let behind = seq.query_start + seq.query_len - 1 - row;
            self.kept_lengths.push(seq.context_len - behind);
            self.kept_starts.push(self.starts[index]);
        }
    }

    /// Writes a planned step's arrays into `bytes`.
    pub(super) fn write(&self, input: &ModelInput, layout: &Layout, bytes: &mut [u8]) {
        let rows = layout.counts.rows;
        let padding = rows - input.token_ids.len();
        put64(
            bytes,
            layout.slot_mapping,
            input
                .slot_mapping
                .iter()
                .copied()
                .chain(std::iter::repeat_n(PADDING, padding)),
        );
        let pad = std::iter::repeat_n(0u32, padding);
        let tokens = input.token_ids.iter().copied().chain(pad.clone());
        put32(bytes, layout.tokens, tokens);
        let positions = input.positions.iter().copied().chain(pad.clone());
        put32(bytes, layout.positions, positions);
        let slots = input
            .seqs
            .iter()
            .flat_map(|seq| std::iter::repeat_n(seq.slot.0, seq.query_len as usize));
        put32(bytes, layout.row_slots, slots.chain(pad));
        let those = |decodes: bool| {
            let members = self.members(&input.seqs);
            members.filter_map(move |(is, member)| (is == decodes).then_some(member))
        };
        put_section(bytes, &layout.decode, || those(true), &self.plan);
        let prefills = || {
            let members = those(false).chain(std::iter::repeat(Member::default()));
            members.take(layout.counts.prefills)
        };
        put_tiles(bytes, &layout.prefill, prefills, &self.prefill);
        if layout.counts.kept > 0 {
            let kept = || {
                let lengths = self.kept_lengths.iter().zip(&self.kept_starts);
                lengths.enumerate().map(|(row, (length, start))| Member {
                    row: row as i32,
                    query: 1,
                    context: *length as i32,
                    start: *start,
                })
            };
            if self.tiles_only {
                put_tiles(bytes, &layout.kept_tiles, kept, &self.kept_tiles);
            } else {
                put_section(bytes, &layout.kept, kept, &self.kept_plan);
            }
            let gather = input.logit_rows.iter().map(|row| *row as i32);
            put_i32(bytes, layout.gather, gather);
        }
        let blocks = input
            .seqs
            .iter()
            .flat_map(|seq| seq.block_table.iter().map(|block| block.0));
        put32(bytes, layout.blocks, blocks);
    }
}

/// Whether a sequence attends by its row alone.
fn decodes(seq: &SeqInput, tiles_only: bool) -> bool {
    seq.query_len == 1 && !tiles_only
}

/// Whether a row ends a block that another one has in its table: a hit on a block of the same step.
fn reads_what_is_written(input: &ModelInput) -> bool {
    input.seqs.iter().enumerate().any(|(index, seq)| {
        let ended = (seq.context_len / BLOCK_SIZE) as usize;
        seq.context_len.is_multiple_of(BLOCK_SIZE)
            && input.seqs.iter().enumerate().any(|(other, theirs)| {
                other != index
                    && theirs.block_table.get(ended - 1) == seq.block_table.get(ended - 1)
            })
    })
}

fn put_section<I: Iterator<Item = Member>>(
    bytes: &mut [u8],
    section: &DecodeSection,
    members: impl Fn() -> I,
    plan: &DecodePlan,
) {
    put_i32(bytes, section.rows, members().map(|member| member.row));
    let contexts = members().map(|member| member.context);
    put_i32(bytes, section.context_lens, contexts);
    let starts = members().map(|member| member.start);
    put_i32(bytes, section.table_starts, starts);
    let num_items = plan.items.len() as i32;
    put_i32(bytes, section.num_items, std::iter::once(num_items));
    put_i32(bytes, section.items, plan.items.iter().flatten().copied());
    put_i32(bytes, section.members, plan.members.iter().copied());
    let parts = plan.row_parts.iter().flatten().copied();
    put_i32(bytes, section.row_parts, parts);
    put_i32(bytes, section.slots, plan.slots.iter().copied());
}

fn put_tiles<I: Iterator<Item = Member>>(
    bytes: &mut [u8],
    section: &TileSection,
    members: impl Fn() -> I,
    items: &[[i32; 2]],
) {
    put_i32(bytes, section.rows, members().map(|member| member.row));
    let queries = members().map(|member| member.query);
    put_i32(bytes, section.query_lens, queries);
    let contexts = members().map(|member| member.context);
    put_i32(bytes, section.context_lens, contexts);
    let starts = members().map(|member| member.start);
    put_i32(bytes, section.table_starts, starts);
    put_i32(bytes, section.items, items.iter().flatten().copied());
}

fn put_i32(bytes: &mut [u8], offset: usize, values: impl Iterator<Item = i32>) {
    put32(bytes, offset, values.map(i32::cast_unsigned));
}

pub(super) fn put32(bytes: &mut [u8], offset: usize, values: impl Iterator<Item = u32>) {
    for (place, value) in bytes[offset..]
        .as_chunks_mut::<4>()
        .0
        .iter_mut()
        .zip(values)
    {
        *place = value.to_le_bytes();
    }
}

fn put64(bytes: &mut [u8], offset: usize, values: impl Iterator<Item = i64>) {
    for (place, value) in bytes[offset..]
        .as_chunks_mut::<8>()
        .0
        .iter_mut()
        .zip(values)
    {
        *place = value.to_le_bytes();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, missing_docs)] // Tests fail by panicking.
mod tests;
