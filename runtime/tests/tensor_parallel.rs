//! A model cut across ranks computes what the whole one computes: every family, whatever the heads divide by, quantised
//! or not. The ranks are threads that meet in memory; sums in another order are all that may differ.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)] // Tests fail by panicking.

mod common;

use std::{fs, path::Path};

use ashlar::{
    engine::request::TokenId,
    model_runner::{CpuRunner, CpuRunnerConfig, Dtype, KvCacheSize, RankedRunner},
    tokenizer::Tokenizer,
};
use common::{
    Driver, Item, cosine_distance,
    families::{VOCAB, checkpoint, cpu_config, families, logits, prompt, quantize},
    model_path,
};

/// In 32 bits, sums in another order.
const MAX_EXACT_DISTANCE: f64 = 1e-9;
/// With activations quantised in blocks: an order of summation may turn the rounding of a few of them.
const MAX_FAST_DISTANCE: f64 = 1e-5;
/// Logits closer than this may change places.
const TIE: f32 = 0.02;

fn on_ranks(config: &CpuRunnerConfig, ranks: usize) -> Driver<RankedRunner<CpuRunner>> {
    Driver::new(CpuRunner::on_ranks(config, ranks).unwrap())
}

/// Worst `1 − cosine` of rows of `vocab` logits; asserts that the largest is the same one, ties apart.
fn compare(whole: &[f32], ranks: &[f32], vocab: usize, case: &str) -> f64 {
    assert_eq!(whole.len(), ranks.len());
    let mut worst = 0f64;
    for (whole, ranks) in whole.chunks_exact(vocab).zip(ranks.chunks_exact(vocab)) {
        worst = worst.max(cosine_distance(whole, ranks));
        let best = |logits: &[f32]| {
            let best = (0..vocab).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
            best.unwrap()
        };
        let gap = whole[best(whole)] - whole[best(ranks)];
        assert!(gap < TIE, "{case}: another token, {gap} below the best");
    }
    println!("{case}: 1 − cosine {worst:.1e} at most");
    worst
}

/// Runs `tokens` on one rank, then on each of `ranks`, and asserts that logits differ by less than `most`.
fn cut_computes_the_same(
    config: &CpuRunnerConfig,
    (tokens, pieces): (&[TokenId], &[usize]),
    ranks: &[usize],
    most: f64,
    name: &str,
) {
    let mut one = Driver::new(CpuRunner::new(config).unwrap());
    let whole = logits(&mut one, tokens, pieces);
    for ranks in ranks {
        let cut = logits(&mut on_ranks(config, *ranks), tokens, pieces);
        let case = format!("{name} on {ranks} ranks");
        assert!(compare(&whole, &cut, VOCAB, &case) < most, "{case}");
    }
}

#[test]
fn every_family_on_two_to_eight_ranks_computes_what_one_computes() {
    for family in families() {
        let folder = checkpoint(&family);
        for (dtype, most) in [
            (Dtype::Float32, MAX_EXACT_DISTANCE),
            (Dtype::Auto, MAX_FAST_DISTANCE),
        ] {
            let config = cpu_config(&folder, dtype);
            // No more than there are heads.
            let ranks = [2, 3, 4, 8].into_iter().filter(|n| *n <= family.heads);
            let ranks: Vec<usize> = ranks.collect();
            let name = format!("{} {dtype:?}", family.name);
            cut_computes_the_same(&config, (&prompt(1, 80), &[33, 1]), &ranks, most, &name);
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}

#[test]
fn four_bit_weights_are_cut_by_heads_and_groups() {
    for (family, group) in families().into_iter().zip([32, 64, 32, 64, 32]) {
        let folder = checkpoint(&family);
        quantize(&folder, group);
        let config = cpu_config(&folder, Dtype::Auto);
        let name = format!("{} in groups of {group}", family.name);
        let input = prompt(2, 60);
        cut_computes_the_same(&config, (&input, &[20]), &[2, 4], MAX_FAST_DISTANCE, &name);
        fs::remove_dir_all(&folder).unwrap();
    }
}

/// Weights are rounded before they are cut, so that every rank has the bits that one alone would have.
#[test]
fn eight_bit_floats_are_cut_as_they_are() {
    for family in families() {
        let folder = checkpoint(&family);
        let config = CpuRunnerConfig {
            quantize_fp8: true,
            ..cpu_config(&folder, Dtype::Float32)
        };
        let name = format!("{} fp8", family.name);
        let input = prompt(3, 60);
        cut_computes_the_same(&config, (&input, &[20]), &[2, 4], MAX_EXACT_DISTANCE, &name);
        fs::remove_dir_all(&folder).unwrap();
    }
}

fn default_model(dtype: Dtype) -> CpuRunnerConfig {
    CpuRunnerConfig {
        path: model_path(),
        dtype,
        kv_cache: KvCacheSize::Blocks(128),
        max_num_seqs: 4,
        max_num_batched_tokens: 256,
        max_model_len: Some(512),
        ..CpuRunnerConfig::default()
    }
}

/// Nine heads in three groups, four-bit weights with minima, a head that is the embedding.
#[test]
fn the_default_model_answers_alike_on_one_two_and_four_ranks() {
    let tokenizer = Tokenizer::from_model_path(Path::new(&model_path())).unwrap();
    let tokens: Vec<TokenId> = tokenizer
        .encode(
            "The mill stood at the bend of the river, where the water ran fast enough to turn two stones. In the \
             spring the farmers came with their carts before sunrise and waited in a long line down the hill.",
            false,
        )
        .unwrap();
    let vocab = tokenizer.vocab_size();
    for (dtype, most) in [
        (Dtype::Auto, MAX_FAST_DISTANCE),
        (Dtype::Float32, MAX_EXACT_DISTANCE),
    ] {
        let config = default_model(dtype);
        let all = |driver: &mut dyn FnMut(&[Item<'_>]) -> Vec<f32>| {
            let (prompt, rest) = tokens.split_at(24);
            let pieces = std::iter::once(prompt).chain(rest.chunks(1));
            let steps = pieces.map(|tokens| Item {
                slot: 0,
                tokens,
                logits: tokens.len(),
            });
            steps.flat_map(|item| driver(&[item])).collect::<Vec<f32>>()
        };
        let mut one = Driver::new(CpuRunner::new(&config).unwrap());
        let whole = all(&mut |items| one.step(items).remove(0).0);
        assert_eq!(whole.len(), tokens.len() * vocab);
        for ranks in [2, 4] {
            let mut driver = on_ranks(&config, ranks);
            let cut = all(&mut |items| driver.step(items).remove(0).0);
            let case = format!("the default model, {dtype:?}, on {ranks} ranks");
            assert!(compare(&whole, &cut, vocab, &case) < most, "{case}");
        }
    }
}

#[test]
fn more_ranks_than_heads_are_refused_with_the_number_of_heads() {
    let error = CpuRunner::on_ranks(&default_model(Dtype::Auto), 10)
        .err()
        .unwrap();
    let message = error.to_string();
    assert!(
        message.contains("--tensor-parallel-size is 10, and the model has 9 attention heads"),
        "{message}"
    );
}
