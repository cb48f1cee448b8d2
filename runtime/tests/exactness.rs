//! The runtime computes the model that the file describes: compared with an independent implementation
//! (`reference/llama_numpy.py`, whose results are committed beside it).
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)] // Tests fail by panicking.

mod common;

use std::{fs, path::PathBuf};

use ashlar::{
    bench::perplexity::perplexity,
    engine::request::TokenId,
    model_runner::Dtype,
    weights::{GgmlType, Gguf},
};
use common::{Driver, Item, MAX_BATCHED_TOKENS, cosine_distance, model_path, runner};
use safetensors::SafeTensors;
use serde::Deserialize;

/// A step whose two largest logits are closer than this may go either way.
const TIE: f64 = 0.01;
const MAX_EXACT_DISTANCE: f64 = 1e-5;
/// Sixteen bits an activation: close at every position, not only in the mean.
const MAX_FAST_DISTANCE: f64 = 1e-3;
const MAX_PERPLEXITY_CHANGE: f64 = 0.005;

#[derive(Deserialize)]
struct Case {
    text: String,
    prompt: Vec<TokenId>,
    greedy: Vec<TokenId>,
    gaps: Vec<f64>,
}

#[derive(Deserialize)]
struct Passage {
    tokens: Vec<TokenId>,
    mean_nll: f64,
}

fn reference(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/reference")
        .join(name);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn cases() -> Vec<Case> {
    let cases: Vec<Case> = serde_json::from_slice(&reference("golden.json")).unwrap();
    assert!(
        cases.len() >= 20
            && cases
                .iter()
                .all(|case| case.greedy.len() == 48 && case.gaps.len() == 48)
    );
    cases
}

/// The truth's logits at every prompt position: its hidden states times the file's output matrix.
struct Truth {
    hidden: Vec<f32>,
    head: Vec<f32>,
    width: usize,
}

impl Truth {
    fn load() -> Self {
        let file = reference("golden-hidden.safetensors");
        let tensors = SafeTensors::deserialize(&file).unwrap();
        let hidden = tensors.tensor("hidden").unwrap();
        let width = hidden.shape()[1];
        let hidden = hidden
            .data()
            .as_chunks::<4>()
            .0
            .iter()
            .map(|word| f32::from_le_bytes(*word))
            .collect();
        let gguf = Gguf::open(&model_path()).unwrap();
        let head = gguf.tensor("token_embd.weight").unwrap();
        assert_eq!((head.kind, head.columns()), (GgmlType::Q8_0, width));
        let blocks = head.data.chunks_exact(34).flat_map(|block| {
            let scale = half::f16::from_le_bytes([block[0], block[1]]).to_f32();
            block[2..]
                .iter()
                .map(move |value| f32::from(value.cast_signed()) * scale)
        });
        Self {
            hidden,
            head: blocks.collect(),
            width,
        }
    }

    fn logits(&self, position: usize) -> Vec<f32> {
        let hidden = &self.hidden[position * self.width..][..self.width];
        let dot = |row: &[f32]| {
            let mut sums = [0f32; 16];
            for (row, hidden) in row.chunks_exact(16).zip(hidden.chunks_exact(16)) {
                (0..16).for_each(|i| sums[i] += row[i] * hidden[i]);
            }
            sums.iter().sum()
        };
        self.head.chunks_exact(self.width).map(dot).collect()
    }
}

/// Mean and largest `1 − cosine` over all prompt positions of all cases.
fn prefill_distance(driver: &mut Driver, cases: &[Case], truth: &Truth) -> (f64, f64) {
    let vocab = truth.head.len() / truth.width;
    let (mut position, mut total, mut worst) = (0, 0f64, 0f64);
    for case in cases {
        let result = driver.step(&[Item {
            slot: 0,
            tokens: &case.prompt,
            logits: case.prompt.len(),
        }]);
        driver.finish(0);
        for logits in result[0].0.chunks_exact(vocab) {
            let distance = cosine_distance(logits, &truth.logits(position));
            assert!(
                distance.is_finite(),
                "position {position} of the references is not finite"
            );
            total += distance;
            worst = worst.max(distance);
            position += 1;
        }
    }
    assert_eq!(position * truth.width, truth.hidden.len());
    (total / position as f64, worst)
}

/// Greedy tokens of every case, all cases decoding in one batch.
fn greedy(driver: &mut Driver, cases: &[Case]) -> Vec<Vec<TokenId>> {
    let prompts: Vec<_> = cases
        .iter()
        .zip(0..)
        .map(|(case, slot)| Item {
            slot,
            tokens: &case.prompt,
            logits: 1,
        })
        .collect();
    let mut last: Vec<TokenId> = driver
        .step(&prompts)
        .iter()
        .map(|(_, token)| token.unwrap())
        .collect();
    let mut outputs: Vec<Vec<TokenId>> = last.iter().map(|token| vec![*token]).collect();
    while outputs[0].len() < cases[0].greedy.len() {
        let items: Vec<_> = last
            .iter()
            .zip(0..)
            .map(|(token, slot)| Item {
                slot,
                tokens: std::slice::from_ref(token),
                logits: 1,
            })
            .collect();
        last = driver
            .step(&items)
            .iter()
            .map(|(_, token)| token.unwrap())
            .collect();
        outputs
            .iter_mut()
            .zip(&last)
            .for_each(|(output, token)| output.push(*token));
    }
    outputs
}

/// Mean negative log-likelihood of the passage, in nats a token.
fn mean_nll(dtype: Dtype, tokens: &[TokenId]) -> f64 {
    let mut runner = runner(dtype);
    let result = perplexity(&mut runner, &[], tokens, tokens.len()).unwrap();
    assert_eq!(result.tokens, tokens.len() - 1);
    result.mean_nll
}

#[test]
fn exact_mode_equals_the_reference() {
    let (cases, truth) = (cases(), Truth::load());
    let mut driver = Driver::new(runner(Dtype::Float32));
    let (_, worst) = prefill_distance(&mut driver, &cases, &truth);
    println!(
        "exact mode: largest 1 − cosine over {} positions: {worst:.2e}",
        truth.hidden.len() / truth.width
    );
    assert!(worst <= MAX_EXACT_DISTANCE, "1 − cosine reaches {worst:e}");

    let mut whole = 0;
    for (case, output) in cases.iter().zip(greedy(&mut driver, &cases)) {
        let Some(step) = (0..output.len()).find(|step| output[*step] != case.greedy[*step]) else {
            whole += 1;
            continue;
        };
        println!(
            "{:?} leaves the reference at token {step}, where the gap is {}",
            case.text, case.gaps[step]
        );
        assert!(
            case.gaps[step] <= TIE,
            "{:?}: token {step} is {}, the reference has {} by a margin of {}",
            case.text,
            output[step],
            case.greedy[step],
            case.gaps[step]
        );
    }
    println!(
        "exact mode: {whole} of {} outputs equal the reference in all 48 tokens",
        cases.len()
    );
}

#[test]
fn default_mode_stays_close_to_exact_mode() {
    let (cases, truth) = (cases(), Truth::load());
    let passage: Passage = serde_json::from_slice(&reference("passage.json")).unwrap();
    assert!(passage.tokens.len() > 1500 && passage.tokens.len() <= MAX_BATCHED_TOKENS as usize);
    let exact = mean_nll(Dtype::Float32, &passage.tokens);
    let fast = mean_nll(Dtype::Auto, &passage.tokens);
    let change = (fast - exact).exp() - 1.0;
    println!(
        "perplexity of {} tokens: reference {:.4}, exact {:.4}, default {:.4} ({:+.3} %)",
        passage.tokens.len(),
        passage.mean_nll.exp(),
        exact.exp(),
        fast.exp(),
        change * 100.0
    );
    assert!(
        (exact - passage.mean_nll).abs() < 1e-4,
        "exact mode {exact}, reference {}",
        passage.mean_nll
    );
    assert!(
        change.abs() <= MAX_PERPLEXITY_CHANGE,
        "perplexity changes by {change:+.4}"
    );

    let mut driver = Driver::new(runner(Dtype::Auto));
    let (mean, worst) = prefill_distance(&mut driver, &cases, &truth);
    println!("default mode: 1 − cosine: mean {mean:.2e}, largest {worst:.2e}");
    assert!(worst <= MAX_FAST_DISTANCE, "1 − cosine reaches {worst:e}");
}
