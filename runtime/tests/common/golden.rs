//! What an independent implementation (`reference/llama_numpy.py`) computed for the default model, and how runners are
//! compared with it.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::print_stdout,
    clippy::unwrap_used,
    missing_docs
)] // Each test file uses its own part.

use ashlar::{
    engine::request::TokenId,
    model_runner::ModelRunner,
    weights::{GgmlType, Gguf},
};
use safetensors::SafeTensors;
use serde::Deserialize;

use super::{Driver, Item, MAX_BATCHED_TOKENS, cosine_distance, model_path};

#[derive(Deserialize)]
pub struct Case {
    pub text: String,
    pub prompt: Vec<TokenId>,
    pub greedy: Vec<TokenId>,
    pub gaps: Vec<f64>,
}

pub fn cases() -> Vec<Case> {
    let cases: Vec<Case> = serde_json::from_str(include_str!("../reference/golden.json")).unwrap();
    assert!(
        cases.len() >= 20
            && cases
                .iter()
                .all(|case| case.greedy.len() == 48 && case.gaps.len() == 48)
    );
    cases
}

#[derive(Deserialize)]
pub struct Passage {
    pub tokens: Vec<TokenId>,
    /// Mean negative log-likelihood, nats a token.
    pub mean_nll: f64,
}

pub fn passage() -> Passage {
    let passage: Passage = serde_json::from_str(include_str!("../reference/passage.json")).unwrap();
    assert!(passage.tokens.len() > 1500 && passage.tokens.len() <= MAX_BATCHED_TOKENS as usize);
    passage
}

/// The truth's logits at every prompt position: its hidden states times the file's output matrix.
pub struct Truth {
    hidden: Vec<f32>,
    head: Vec<f32>,
    width: usize,
}

impl Truth {
    pub fn load() -> Self {
        let file = include_bytes!("../reference/golden-hidden.safetensors");
        let tensors = SafeTensors::deserialize(file).unwrap();
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

fn largest(logits: &[f32]) -> usize {
    let all = logits.iter().enumerate();
    all.max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0
}

/// How a runner's logits differ from the truth's, over all prompt positions of all cases.
pub struct Difference {
    pub positions: usize,
    /// `1 − cosine`.
    pub mean: f64,
    /// `1 − cosine`.
    pub worst: f64,
    /// Positions where the likeliest token is another.
    pub others: usize,
    /// By how much the truth has its own token ahead of such another, at most.
    pub margin: f64,
}

pub fn difference<R: ModelRunner>(
    driver: &mut Driver<R>,
    cases: &[Case],
    truth: &Truth,
) -> Difference {
    let vocab = truth.head.len() / truth.width;
    let (mut position, mut total, mut worst) = (0, 0f64, 0f64);
    let (mut others, mut margin) = (0, 0f64);
    for case in cases {
        let result = driver.step(&[Item {
            slot: 0,
            tokens: &case.prompt,
            logits: case.prompt.len(),
        }]);
        driver.finish(0);
        for logits in result[0].0.chunks_exact(vocab) {
            let want = truth.logits(position);
            let distance = cosine_distance(logits, &want);
            assert!(
                distance.is_finite(),
                "position {position} of the references is not finite"
            );
            total += distance;
            worst = worst.max(distance);
            let (ours, theirs) = (largest(logits), largest(&want));
            others += usize::from(ours != theirs);
            margin = margin.max(f64::from(want[theirs] - want[ours]));
            position += 1;
        }
    }
    assert_eq!(position * truth.width, truth.hidden.len());
    Difference {
        positions: position,
        mean: total / position as f64,
        worst,
        others,
        margin,
    }
}

/// Greedy tokens of every case, all cases decoding in one batch.
fn greedy<R: ModelRunner>(driver: &mut Driver<R>, cases: &[Case]) -> Vec<Vec<TokenId>> {
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
    (0..).zip(cases).for_each(|(slot, _)| driver.finish(slot));
    outputs
}

/// Decodes all cases; none may leave the reference where its two largest logits are further apart than `tie`. Returns how many
/// do not leave it at all.
pub fn check_greedy<R: ModelRunner>(driver: &mut Driver<R>, cases: &[Case], tie: f64) -> usize {
    let mut whole = 0;
    for (case, output) in cases.iter().zip(greedy(driver, cases)) {
        let Some(step) = (0..output.len()).find(|step| output[*step] != case.greedy[*step]) else {
            whole += 1;
            continue;
        };
        println!(
            "{:?} leaves the reference at token {step}, where the gap is {}",
            case.text, case.gaps[step]
        );
        assert!(
            case.gaps[step] <= tie,
            "{:?}: token {step} is {}, the reference has {} by a margin of {}",
            case.text,
            output[step],
            case.greedy[step],
            case.gaps[step]
        );
    }
    whole
}
