//! The runtime computes the model that the file describes: compared with an independent implementation
//! (`reference/llama_numpy.py`, whose results are committed beside it).
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)] // Tests fail by panicking.

mod common;

use ashlar::{bench::perplexity::perplexity, engine::request::TokenId, model_runner::Dtype};
use common::{
    Driver,
    golden::{Truth, cases, check_greedy, difference, passage},
    runner,
};

/// A step whose two largest logits are closer than this may go either way.
const TIE: f64 = 0.01;
const MAX_EXACT_DISTANCE: f64 = 1e-5;
/// Sixteen bits an activation: close at every position, not only in the mean.
const MAX_FAST_DISTANCE: f64 = 1e-3;
const MAX_PERPLEXITY_CHANGE: f64 = 0.005;

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
    let found = difference(&mut driver, &cases, &truth);
    println!(
        "exact mode: largest 1 − cosine over {} positions: {:.2e}",
        found.positions, found.worst
    );
    assert!(
        found.worst <= MAX_EXACT_DISTANCE,
        "1 − cosine reaches {:e}",
        found.worst
    );
    assert!(
        found.margin <= TIE,
        "a token is another by a margin of {}",
        found.margin
    );
    let whole = check_greedy(&mut driver, &cases, TIE);
    println!(
        "exact mode: {whole} of {} outputs equal the reference in all 48 tokens",
        cases.len()
    );
}

#[test]
fn default_mode_stays_close_to_exact_mode() {
    let (cases, truth, passage) = (cases(), Truth::load(), passage());
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
    let found = difference(&mut driver, &cases, &truth);
    println!(
        "default mode: 1 − cosine: mean {:.2e}, largest {:.2e}",
        found.mean, found.worst
    );
    assert!(
        found.worst <= MAX_FAST_DISTANCE,
        "1 − cosine reaches {:e}",
        found.worst
    );
}
