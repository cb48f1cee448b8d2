use ashlar_kernels::cuda::{Float, KvDtype, attention::HeadShape};

use super::{super::layout::Layout, StepBuilder};
use crate::{
    kv_cache::BlockId,
    model_runner::{ModelInput, SeqInput, Slot},
};

const SHAPE: HeadShape = HeadShape {
    float: Float::Bf16,
    kv_dtype: KvDtype::Float,
    num_heads: 8,
    num_kv_heads: 2,
    head_dim: 64,
    window: 0,
};

/// Rows 0–4 of a prompt at context 20, one decode at 40, rows 6–8 of another prompt.
fn mixed() -> ModelInput {
    let seq = |slot, query_start, query_len, context_len: u32| SeqInput {
        slot: Slot(slot),
        query_start,
        query_len,
        context_len,
        block_table: (0..context_len.div_ceil(16))
            .map(|i| BlockId(10 * slot + i))
            .collect(),
    };
    ModelInput {
        token_ids: (100..109).collect(),
        positions: vec![15, 16, 17, 18, 19, 39, 0, 1, 2],
        slot_mapping: (0..9).collect(),
        seqs: vec![seq(3, 0, 5, 20), seq(1, 5, 1, 40), seq(2, 6, 3, 3)],
        logit_rows: vec![4, 5, 8],
        ..ModelInput::default()
    }
}

fn read(bytes: &[u8], offset: usize, count: usize) -> Vec<i32> {
    let words = bytes[offset..].as_chunks::<4>().0.iter().take(count);
    words.map(|word| i32::from_le_bytes(*word)).collect()
}

fn build(input: &ModelInput, padded: Option<usize>) -> (Layout, Vec<u8>) {
    build_by(false, input, padded)
}

fn build_by(tiles_only: bool, input: &ModelInput, padded: Option<usize>) -> (Layout, Vec<u8>) {
    build_for(4, tiles_only, input, padded)
}

fn build_for(
    multiprocessors: u32,
    tiles_only: bool,
    input: &ModelInput,
    padded: Option<usize>,
) -> (Layout, Vec<u8>) {
    let mut builder = StepBuilder::new(true, tiles_only);
    let layout = builder.plan(input, padded, &SHAPE, multiprocessors);
    let mut bytes = vec![0; layout.bytes];
    builder.write(input, &layout, &mut bytes);
    (layout, bytes)
}

#[test]
fn a_mixed_step_is_taken_apart() {
    let (layout, bytes) = build(&mixed(), None);
    assert_eq!(
        read(&bytes, layout.row_slots, 9),
        [3, 3, 3, 3, 3, 1, 2, 2, 2]
    );
    assert_eq!(read(&bytes, layout.decode.rows, 1), [5]);
    assert_eq!(read(&bytes, layout.decode.context_lens, 1), [40]);
    assert_eq!(read(&bytes, layout.decode.table_starts, 1), [2]);
    assert_eq!(read(&bytes, layout.prefill.rows, 2), [0, 6]);
    assert_eq!(read(&bytes, layout.prefill.table_starts, 2), [0, 5]);
    assert_eq!(read(&bytes, layout.prefill.items, 4), [0, 0, 1, 0]);
    assert_eq!(read(&bytes, layout.gather, 3), [4, 5, 8]);
    assert_eq!(read(&bytes, layout.kept.context_lens, 3), [20, 40, 3]);
    assert_eq!(read(&bytes, layout.kept.table_starts, 3), [0, 2, 5]);
    assert_eq!(read(&bytes, layout.blocks, 6), [30, 31, 10, 11, 12, 20]);
}

#[test]
fn padding_writes_nothing_and_has_no_item() {
    let mut input = mixed();
    input.seqs = vec![input.seqs[1].clone()];
    input.seqs[0].query_start = 0;
    input.token_ids = vec![7];
    input.positions = vec![39];
    input.slot_mapping = vec![200];
    input.logit_rows = vec![0];
    let (layout, bytes) = build(&input, Some(4));
    let slots = bytes[layout.slot_mapping..].as_chunks::<8>().0;
    let slots: Vec<i64> = slots[..4].iter().map(|s| i64::from_le_bytes(*s)).collect();
    assert_eq!(slots, [200, -1, -1, -1]);
    assert_eq!(read(&bytes, layout.decode.num_items, 1), [1]);
    let (other, _) = build(&input, Some(4));
    assert_eq!(layout.blocks, other.blocks);
}

#[test]
fn with_tiles_only_every_row_is_in_one() {
    let (layout, bytes) = build_by(true, &mixed(), None);
    let counts = layout.counts;
    assert_eq!((counts.decodes, counts.prefills, counts.kept), (0, 3, 3));
    assert!(!counts.rotates);
    assert_eq!(read(&bytes, layout.decode.num_items, 1), [0]);
    assert_eq!(read(&bytes, layout.prefill.rows, 3), [0, 5, 6]);
    assert_eq!(read(&bytes, layout.prefill.query_lens, 3), [5, 1, 3]);
    assert_eq!(read(&bytes, layout.prefill.context_lens, 3), [20, 40, 3]);
    // The longest first.
    assert_eq!(read(&bytes, layout.prefill.items, 6), [1, 0, 0, 0, 2, 0]);
    assert_eq!(read(&bytes, layout.kept_tiles.rows, 3), [0, 1, 2]);
    assert_eq!(read(&bytes, layout.kept_tiles.query_lens, 3), [1, 1, 1]);
    assert_eq!(read(&bytes, layout.kept_tiles.context_lens, 3), [20, 40, 3]);
    assert_eq!(read(&bytes, layout.kept_tiles.table_starts, 3), [0, 2, 5]);
    assert_eq!(read(&bytes, layout.kept_tiles.items, 6), [1, 0, 0, 0, 2, 0]);
    assert_eq!(read(&bytes, layout.gather, 3), [4, 5, 8]);
    assert_eq!(read(&bytes, layout.blocks, 6), [30, 31, 10, 11, 12, 20]);
}

/// A graph runs as many items as it was captured with: those of padding have no rows.
#[test]
fn with_tiles_only_padding_has_no_rows() {
    let mut input = mixed();
    input.seqs = vec![input.seqs[1].clone()];
    input.seqs[0].query_start = 0;
    input.token_ids = vec![7];
    input.positions = vec![39];
    input.slot_mapping = vec![200];
    input.logit_rows = vec![0];
    let mut builder = StepBuilder::new(true, true);
    let layout = builder.plan(&input, Some(4), &SHAPE, 4);
    assert_eq!((layout.counts.rows, layout.counts.prefill_items), (4, 4));
    // Whatever lay there before.
    let mut bytes = vec![0x55; layout.bytes];
    builder.write(&input, &layout, &mut bytes);
    assert_eq!(read(&bytes, layout.prefill.query_lens, 4), [1, 0, 0, 0]);
    assert_eq!(read(&bytes, layout.prefill.context_lens, 4), [40, 0, 0, 0]);
    assert_eq!(read(&bytes, layout.prefill.table_starts, 4), [0; 4]);
    let items = read(&bytes, layout.prefill.items, 8);
    assert_eq!(items, [0, 0, 1, 0, 2, 0, 3, 0]);
}

#[test]
fn long_contexts_are_cut_to_fill_the_gpu_and_neighbours_stay_together() {
    let mut input = mixed();
    input.seqs = vec![input.seqs[1].clone(), input.seqs[1].clone()];
    for (row, seq) in input.seqs.iter_mut().enumerate() {
        seq.query_start = row as u32;
        seq.context_len = 1000;
        seq.block_table = (0..63).map(BlockId).collect();
    }
    input.token_ids = vec![7, 8];
    input.positions = vec![999; 2];
    input.slot_mapping = vec![1, 2];
    input.logit_rows = vec![0, 1];
    // With many multiprocessors blocks are wide.
    for (multiprocessors, wide) in [(40, true), (12, false)] {
        let (layout, bytes) = build_for(multiprocessors, false, &input, None);
        assert_eq!(layout.counts.decode_cut.wide, wide);
        check_cut(&layout, &bytes);
    }
}

/// Two rows of 63 pages.
fn check_cut(layout: &Layout, bytes: &[u8]) {
    let items = read(bytes, layout.decode.num_items, 1)[0];
    assert!(items as usize <= layout.counts.decode_cut.max_items);
    let list = read(bytes, layout.decode.items, 8 * items as usize);
    let pages: Vec<[i32; 3]> = list
        .chunks(8)
        .map(|item| [item[0], item[2], item[3]])
        .collect();
    assert!(pages.is_sorted() && pages.len() > 2);
    let read_pages: i32 = pages.iter().map(|[_, begin, end]| end - begin).sum();
    assert_eq!(read_pages, 2 * 63);
}

/// Rows of one prompt's cached beginning read it together, and take the way on which nothing is written before attention.
#[test]
fn a_common_beginning_is_shared() {
    let mut input = mixed();
    let rows = 6u32;
    let shared = 500;
    input.seqs = (0..rows)
        .map(|row| {
            let own = (0..2).map(|i| BlockId(10_000 * (row + 1) + i));
            SeqInput {
                slot: Slot(row),
                query_start: row,
                query_len: 1,
                context_len: 16 * (shared + 2) - row,
                block_table: (0..shared).map(BlockId).chain(own).collect(),
            }
        })
        .collect();
    input.token_ids = vec![7; rows as usize];
    input.positions = vec![0; rows as usize];
    input.slot_mapping = vec![0; rows as usize];
    input.logit_rows = (0..rows).collect();
    // With so many multiprocessors rows that share nothing would have wide blocks.
    let (layout, bytes) = build_for(132, false, &input, Some(8));
    assert!(layout.counts.shares && layout.counts.rotates && !layout.counts.decode_cut.wide);
    let list = read(&bytes, layout.decode.items, 8);
    // Four rows of four heads fill the columns: 6 rows are two groups of three.
    assert_eq!(list[1], 3);
    assert_eq!(
        read(&bytes, layout.decode.members, 12)[6..],
        [0, 1, 2, 3, 4, 5]
    );
    // Row 0 ends a block; row 1 has just hit on it.
    input.seqs[1].block_table = input.seqs[0].block_table.clone();
    let (layout, _) = build(&input, Some(8));
    assert!(!layout.counts.rotates);
}
