//! Where each array of a step lies in what it uploads.
//!
//! That depends on the counts alone, so a graph that was captured for some counts finds everything of a later step with the same
//! counts at the same addresses.

use ashlar_kernels::cuda::decode_plan::{Cut, DecodePlan, ITEM_WORDS, PARTS_PER_ITEM};

/// Numbers of things in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Counts {
    /// Rows, padding included.
    pub(super) rows: usize,
    /// Sequences with one row, padding included.
    pub(super) decodes: usize,
    /// What their attention is cut for.
    pub(super) decode_cut: Cut,
    /// Whether items work for several rows.
    pub(super) shares: bool,
    /// Whether attention may rotate q and k on the way: every row is a sequence's last, wants logits, and reads no block that
    /// another row ends in this step.
    pub(super) rotates: bool,
    /// Whether every row attends in a tile, as prompts' rows do: its result then does not depend on how many others there are.
    pub(super) tiles_only: bool,
    /// Sequences that attend in tiles, padding included: those with more rows, or all.
    pub(super) prefills: usize,
    /// Items of their attention.
    pub(super) prefill_items: usize,
    /// Rows that go through the last layer, when these are not all.
    pub(super) kept: usize,
    /// What their attention is cut for, unless they attend in tiles.
    pub(super) kept_cut: Cut,
    /// Entries of all block tables.
    pub(super) blocks: usize,
}

/// Offsets in bytes of one group of sequences that attend row by row.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct DecodeSection {
    pub(super) rows: usize,
    pub(super) context_lens: usize,
    pub(super) table_starts: usize,
    pub(super) num_items: usize,
    pub(super) items: usize,
    pub(super) members: usize,
    pub(super) row_parts: usize,
    pub(super) slots: usize,
}

/// Offsets in bytes of one group of sequences that attend in tiles of rows.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct TileSection {
    pub(super) rows: usize,
    pub(super) query_lens: usize,
    pub(super) context_lens: usize,
    pub(super) table_starts: usize,
    pub(super) items: usize,
}

/// Offsets in bytes of every array.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Layout {
    pub(super) counts: Counts,
    pub(super) slot_mapping: usize,
    pub(super) tokens: usize,
    pub(super) positions: usize,
    pub(super) row_slots: usize,
    pub(super) decode: DecodeSection,
    pub(super) kept: DecodeSection,
    pub(super) prefill: TileSection,
    pub(super) kept_tiles: TileSection,
    pub(super) gather: usize,
    pub(super) blocks: usize,
    pub(super) bytes: usize,
}

impl Layout {
    pub(super) fn new(counts: Counts) -> Self {
        let mut end = 0;
        let mut take = |count: usize, bytes: usize| {
            let start = end;
            // Every array starts at a multiple of 16.
            end += (count * bytes).next_multiple_of(16);
            start
        };
        let slot_mapping = take(counts.rows, 8);
        let tokens = take(counts.rows, 4);
        let positions = take(counts.rows, 4);
        let row_slots = take(counts.rows, 4);
        let mut section = |sequences: usize, items: usize| DecodeSection {
            rows: take(sequences, 4),
            context_lens: take(sequences, 4),
            table_starts: take(sequences, 4),
            num_items: take(1, 4),
            items: take(items, ITEM_WORDS * 4),
            members: take(DecodePlan::max_members(sequences), 4),
            row_parts: take(sequences, 8),
            slots: take(items * PARTS_PER_ITEM, 4),
        };
        let decode = section(counts.decodes, counts.decode_cut.max_items);
        let (kept, kept_tiles) = if counts.tiles_only {
            (0, counts.kept)
        } else {
            (counts.kept, 0)
        };
        let kept = section(kept, counts.kept_cut.max_items);
        let mut tiles = |sequences: usize, items: usize| TileSection {
            rows: take(sequences, 4),
            query_lens: take(sequences, 4),
            context_lens: take(sequences, 4),
            table_starts: take(sequences, 4),
            items: take(items, 8),
        };
        let prefill = tiles(counts.prefills, counts.prefill_items);
        // Of one row each.
        let kept_tiles = tiles(kept_tiles, kept_tiles);
        let layout = Self {
            counts,
            slot_mapping,
            tokens,
            positions,
            row_slots,
            decode,
            kept,
            prefill,
            kept_tiles,
            gather: take(counts.kept, 4),
            blocks: take(counts.blocks, 4),
            bytes: 0,
        };
        Self {
            bytes: end,
            ..layout
        }
    }
}
