//! The same logits, bit for bit, whatever else is in the batch and however a prompt is cut: on the default model, in
//! both modes.
#![allow(clippy::unwrap_used, missing_docs)] // Tests fail by panicking.

mod common;

use ashlar::{engine::request::TokenId, model_runner::Dtype};
use common::{Driver, Item, runner};

/// Tokens after the prompt.
const DECODED: usize = 6;

/// A prompt of any length, different for each seed.
fn prompt(seed: u32, len: usize) -> Vec<TokenId> {
    let mut state = seed.wrapping_mul(0x9E37_79B9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state % 40_000 + 20
    };
    (0..len).map(|_| next()).collect()
}

/// What a run is compared by: the bits of all logits after the prompt and after each decoded token, and the tokens.
#[derive(PartialEq)]
struct Trace {
    bits: Vec<u32>,
    tokens: Vec<TokenId>,
}

impl Trace {
    fn new() -> Self {
        Self {
            bits: Vec::new(),
            tokens: Vec::new(),
        }
    }

    fn push(&mut self, (logits, token): (Vec<f32>, Option<TokenId>)) {
        self.bits.extend(logits.iter().map(|logit| logit.to_bits()));
        self.tokens.extend(token);
    }
}

/// The prompt in pieces of these sizes (the last piece takes the rest), then decoding, alone.
fn alone(driver: &mut Driver, prompt: &[TokenId], pieces: &[usize]) -> Trace {
    let mut trace = Trace::new();
    let mut rest = prompt;
    for size in pieces {
        let (piece, after) = rest.split_at((*size).min(rest.len() - 1));
        if !piece.is_empty() {
            driver.step(&[Item {
                slot: 7,
                tokens: piece,
                logits: 0,
            }]);
        }
        rest = after;
    }
    trace.push(
        driver
            .step(&[Item {
                slot: 7,
                tokens: rest,
                logits: 1,
            }])
            .remove(0),
    );
    for _ in 0..DECODED {
        let last = [*trace.tokens.last().unwrap()];
        trace.push(
            driver
                .step(&[Item {
                    slot: 7,
                    tokens: &last,
                    logits: 1,
                }])
                .remove(0),
        );
    }
    driver.finish(7);
    trace
}

/// Sixteen sequences of mixed lengths; a new one starts at each step while the earlier ones decode, then all decode.
fn together(driver: &mut Driver, prompts: &[Vec<TokenId>]) -> Vec<Trace> {
    let mut traces: Vec<Trace> = prompts.iter().map(|_| Trace::new()).collect();
    let mut started = 0;
    while traces.iter().any(|trace| trace.tokens.len() <= DECODED) {
        // Four start at once, then one by one.
        started = if started == 0 {
            4
        } else {
            (started + 1).min(prompts.len())
        };
        let running: Vec<usize> = (0..started)
            .filter(|i| traces[*i].tokens.len() <= DECODED)
            .collect();
        let last: Vec<Vec<TokenId>> = running
            .iter()
            .map(|i| {
                traces[*i]
                    .tokens
                    .last()
                    .map_or_else(|| prompts[*i].clone(), |token| vec![*token])
            })
            .collect();
        let items: Vec<Item<'_>> = running
            .iter()
            .zip(&last)
            .map(|(i, tokens)| Item {
                slot: u32::try_from(*i).unwrap(),
                tokens,
                logits: 1,
            })
            .collect();
        for (i, result) in running.iter().zip(driver.step(&items)) {
            traces[*i].push(result);
        }
    }
    (0..16).for_each(|slot| driver.finish(slot));
    traces
}

fn rows_do_not_influence_each_other(dtype: Dtype) {
    let lengths = [1, 2, 15, 16, 17, 33, 100, 7, 64, 130, 3, 48, 31, 257, 5, 20];
    let prompts: Vec<_> = lengths
        .iter()
        .zip(0..)
        .map(|(len, seed)| prompt(seed, *len))
        .collect();
    let mut driver = Driver::new(runner(dtype));
    let single: Vec<_> = prompts
        .iter()
        .map(|prompt| alone(&mut driver, prompt, &[]))
        .collect();
    for (index, (batched, single)) in together(&mut driver, &prompts)
        .iter()
        .zip(&single)
        .enumerate()
    {
        assert!(
            batched == single,
            "prompt {index} of {} tokens changes in a batch",
            lengths[index]
        );
    }
    for (index, pieces) in [
        (6, vec![1, 7, 16, 3]),
        (9, vec![64, 64]),
        (13, vec![100, 1, 1, 90]),
        (13, vec![1; 40]),
    ] {
        let cut = alone(&mut driver, &prompts[index], &pieces);
        assert!(
            cut == single[index],
            "prompt {index} changes when cut into {pieces:?}"
        );
    }
    // A preempted sequence is computed again from its prompt and what it had generated.
    let mut resumed = prompts[8].clone();
    resumed.extend(&single[8].tokens[..3]);
    let again = alone(&mut driver, &resumed, &[]);
    let vocab = driver.runner.model_config().vocab_size;
    assert!(
        again.tokens[..DECODED - 2] == single[8].tokens[3..],
        "a resumed sequence goes on differently"
    );
    assert!(
        again.bits[..vocab] == single[8].bits[3 * vocab..4 * vocab],
        "a resumed sequence has other logits"
    );
}

#[test]
fn rows_do_not_influence_each_other_in_exact_mode() {
    rows_do_not_influence_each_other(Dtype::Float32);
}

#[test]
fn rows_do_not_influence_each_other_in_default_mode() {
    rows_do_not_influence_each_other(Dtype::Auto);
}
