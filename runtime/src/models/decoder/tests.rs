#![allow(clippy::unwrap_used, missing_docs)] // Tests fail by panicking.

use super::{AttentionSeq, attention_seqs, wanted_rows, wanted_seqs};
use crate::{
    kv_cache::BlockId,
    model_runner::{ModelInput, SeqInput, Slot},
};

/// Three sequences: rows 0–4 (context 20), row 5 (context 9), rows 6–8 (context 3).
fn input(logit_rows: &[u32]) -> ModelInput {
    let seq = |slot, query_start, query_len, context_len| SeqInput {
        slot: Slot(slot),
        query_start,
        query_len,
        context_len,
        block_table: vec![BlockId(slot + 1); 2],
    };
    ModelInput {
        token_ids: vec![1; 9],
        seqs: vec![seq(0, 0, 5, 20), seq(1, 5, 1, 9), seq(2, 6, 3, 3)],
        logit_rows: logit_rows.to_vec(),
        ..ModelInput::default()
    }
}

fn blocks(input: &ModelInput) -> Vec<u32> {
    input
        .seqs
        .iter()
        .flat_map(|seq| seq.block_table.iter().map(|block| block.0))
        .collect()
}

fn shape(input: &ModelInput) -> Vec<(usize, usize, usize, u32)> {
    let blocks = blocks(input);
    let seqs = wanted_seqs(&wanted_rows(input), &attention_seqs(input, &blocks));
    seqs.iter()
        .map(|seq| {
            (
                seq.query_start,
                seq.query_len,
                seq.context_len,
                seq.block_table[0],
            )
        })
        .collect()
}

#[test]
fn wanted_rows_keep_their_context() {
    assert_eq!(
        shape(&input(&[4, 5, 8])),
        [(0, 1, 20, 1), (1, 1, 9, 2), (2, 1, 3, 3)]
    );
    assert_eq!(shape(&input(&[0])), [(0, 1, 16, 1)]);
    assert_eq!(shape(&input(&[])), []);
}

#[test]
fn adjacent_wanted_rows_attend_together_and_gaps_split_them() {
    assert_eq!(
        shape(&input(&[1, 2, 4, 6, 7])),
        [(0, 2, 18, 1), (2, 1, 20, 1), (3, 2, 2, 3)]
    );
    // Adjacent rows of different sequences stay apart.
    assert_eq!(
        shape(&input(&[4, 5, 6])),
        [(0, 1, 20, 1), (1, 1, 9, 2), (2, 1, 1, 3)]
    );
}

#[test]
fn wanting_every_row_is_the_whole_step() {
    let input = input(&[0, 1, 2, 3, 4, 5, 6, 7, 8]);
    let blocks = blocks(&input);
    let all = attention_seqs(&input, &blocks);
    let spans = |seqs: &[AttentionSeq<'_>]| -> Vec<_> {
        seqs.iter()
            .map(|seq| {
                (
                    seq.query_start,
                    seq.query_len,
                    seq.context_len,
                    seq.block_table.to_vec(),
                )
            })
            .collect()
    };
    assert_eq!(spans(&all), spans(&wanted_seqs(&wanted_rows(&input), &all)));
}
