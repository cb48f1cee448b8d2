//! Perplexity of a text under a model: what quantisation, or any other way of computing, costs in quality.
//!
//! The text is cut into windows that know nothing of each other, each begun as the model wants a text begun, and every
//! token is predicted from those before it in its window. The figure is exp of the mean negative log-likelihood.

use std::{sync::Arc, time::Duration};

use serde::Serialize;

use crate::{
    engine::request::{SamplingParams, SeqId, TokenId},
    kv_cache::BlockId,
    model_runner::{ModelInput, ModelRunner, RunnerError, SampleInput, SeqInput, Slot, SlotInit},
};

/// Rows of logits in one step: within what every runner takes, and small beside the weights.
const MAX_PIECE: usize = 256;
/// Longest wait for one step.
const STEP_LIMIT: Duration = Duration::from_secs(600);

/// Why a perplexity could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum PerplexityError {
    /// There is nothing to predict.
    #[error("the text has {tokens} tokens, and at least 2 are needed")]
    TooShort {
        /// Tokens.
        tokens: usize,
    },
    /// The windows do not suit the model.
    #[error(
        "windows of {window} tokens do not fit this model: between {least} and {most} are possible"
    )]
    Window {
        /// What was asked.
        window: usize,
        /// Shortest.
        least: usize,
        /// Longest.
        most: usize,
    },
    /// The model failed.
    #[error(transparent)]
    Runner(#[from] RunnerError),
    /// The model answered nothing in time.
    #[error("a step took longer than {} s", STEP_LIMIT.as_secs())]
    Timeout,
    /// The model gave no number.
    #[error("the logits for token {position} of the text are not finite")]
    NotFinite {
        /// Which one.
        position: usize,
    },
}

/// How well a text is predicted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Perplexity {
    /// Tokens that were predicted.
    pub tokens: usize,
    /// Tokens of a window.
    pub window: usize,
    /// Mean negative log-likelihood, nats a token.
    pub mean_nll: f64,
    /// Its exponential.
    pub perplexity: f64,
}

impl Perplexity {
    /// By how much it is above another, in percent of that one.
    #[must_use]
    pub fn percent_above(&self, other: &Self) -> f64 {
        ((self.mean_nll - other.mean_nll).exp() - 1.0) * 100.0
    }
}

/// Measures `text` in windows of `window` tokens, `beginning` (usually a begin-of-sequence token, or nothing) included.
///
/// # Errors
/// [`PerplexityError`] when the text or the windows do not suit the model, or it fails.
pub fn perplexity(
    runner: &mut dyn ModelRunner,
    beginning: &[TokenId],
    text: &[TokenId],
    window: usize,
) -> Result<Perplexity, PerplexityError> {
    let limits = runner.limits();
    let pool = limits.num_blocks.saturating_sub(1) as usize * limits.block_size as usize;
    let (least, most) = (beginning.len() + 2, pool.min(limits.max_model_len as usize));
    if !(least..=most).contains(&window) {
        return Err(PerplexityError::Window {
            window,
            least,
            most,
        });
    }
    if text.len() < 2 {
        return Err(PerplexityError::TooShort { tokens: text.len() });
    }
    let (mut tokens, mut total, mut before) = (0, 0f64, 0);
    for (index, part) in text.chunks(window - beginning.len()).enumerate() {
        let sequence = [beginning, part].concat();
        // Without a beginning the first token has nothing to be predicted from.
        let first = beginning.len().max(1);
        let sum = window_nll(runner, index as u64, &sequence, first);
        total += sum?.map_err(|position| PerplexityError::NotFinite {
            position: before + position - beginning.len(),
        })?;
        tokens += sequence.len() - first;
        before += part.len();
    }
    let mean_nll = total / tokens as f64;
    Ok(Perplexity {
        tokens,
        window,
        mean_nll,
        perplexity: mean_nll.exp(),
    })
}

/// Sum over the tokens from `first` on; the inner error is the position that has no finite logits.
fn window_nll(
    runner: &mut dyn ModelRunner,
    number: u64,
    sequence: &[TokenId],
    first: usize,
) -> Result<Result<f64, usize>, PerplexityError> {
    let limits = runner.limits();
    let most = limits.max_num_batched_tokens.min(limits.max_logit_rows);
    let (vocab, piece) = (limits.vocab_size as usize, MAX_PIECE.min(most as usize));
    let mut total = 0f64;
    // Nothing is predicted from the last token.
    let inputs = &sequence[..sequence.len() - 1];
    for start in (0..inputs.len()).step_by(piece) {
        let rows = start..(start + piece).min(inputs.len());
        let logits = run_piece(runner, number, inputs, rows.clone())?;
        for (row, logits) in rows.zip(logits.chunks_exact(vocab)) {
            if row + 1 < first {
                continue;
            }
            let nll = negative_log_likelihood(logits, sequence[row + 1]);
            if !nll.is_finite() {
                return Ok(Err(row + 1));
            }
            total += nll;
        }
    }
    Ok(Ok(total))
}

/// The logits of these rows of the one sequence that runs.
fn run_piece(
    runner: &mut dyn ModelRunner,
    number: u64,
    tokens: &[TokenId],
    rows: std::ops::Range<usize>,
) -> Result<Vec<f32>, PerplexityError> {
    let block_size = runner.limits().block_size;
    let positions: Vec<u32> = (rows.start as u32..rows.end as u32).collect();
    let init = SlotInit {
        slot: Slot(0),
        seq: SeqId(number),
        params: Arc::new(SamplingParams {
            seed: Some(0),
            ..SamplingParams::default()
        }),
        choice_index: 0,
        prompt: Arc::from(tokens),
        output: Vec::new(),
    };
    let input = ModelInput {
        token_ids: tokens[rows.clone()].to_vec(),
        // The pool is this sequence's alone: its blocks are those behind the null block, in order.
        slot_mapping: positions
            .iter()
            .map(|position| i64::from(block_size + position))
            .collect(),
        positions,
        seqs: vec![SeqInput {
            slot: Slot(0),
            query_start: 0,
            query_len: rows.len() as u32,
            context_len: rows.end as u32,
            block_table: (1..=(rows.end as u32).div_ceil(block_size))
                .map(BlockId)
                .collect(),
        }],
        logit_rows: (0..rows.len() as u32).collect(),
        init_slots: if rows.start == 0 { vec![init] } else { vec![] },
        ..ModelInput::default()
    };
    let step = runner.submit(&input)?;
    let sample = SampleInput {
        return_logits: true,
        ..SampleInput::default()
    };
    runner.sample(step, &sample)?;
    let output = runner.poll(step, STEP_LIMIT)?;
    Ok(output.ok_or(PerplexityError::Timeout)?.logits)
}

/// `−ln softmax(logits)[target]`; not finite where a logit is not.
fn negative_log_likelihood(logits: &[f32], target: TokenId) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits
        .iter()
        .map(|logit| f64::from(logit - largest).exp())
        .sum();
    sum.ln() - f64::from(logits[target as usize] - largest)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, missing_docs)] // Tests fail by panicking.
mod tests {
    use super::*;
    use crate::model_runner::{RunnerLimits, StepId, StepOutput};

    /// Predicts each token's successor `token + 1` with logit 1, all others with 0; checks what it is asked.
    struct Successor {
        limits: RunnerLimits,
        /// Tokens of the running sequence so far.
        context: Vec<TokenId>,
        windows: Vec<Vec<TokenId>>,
        logits: Vec<f32>,
        nan_after: Option<TokenId>,
    }

    impl Successor {
        fn new(max_num_batched_tokens: u32) -> Self {
            let limits = RunnerLimits {
                block_size: 16,
                num_blocks: 5,
                max_num_seqs: 1,
                max_num_batched_tokens,
                max_logit_rows: max_num_batched_tokens,
                max_model_len: 50,
                vocab_size: 8,
                kv_bytes_per_token: 1,
            };
            Self {
                limits,
                context: Vec::new(),
                windows: Vec::new(),
                logits: Vec::new(),
                nan_after: None,
            }
        }
    }

    impl ModelRunner for Successor {
        fn limits(&self) -> &RunnerLimits {
            &self.limits
        }

        fn submit(&mut self, input: &ModelInput) -> Result<StepId, RunnerError> {
            crate::model_runner::check(input, &self.limits)?;
            if !input.init_slots.is_empty() {
                self.windows.push(std::mem::take(&mut self.context));
            }
            assert_eq!(input.positions[0] as usize, self.context.len());
            self.context.extend(&input.token_ids);
            self.logits.clear();
            for row in &input.logit_rows {
                let token = input.token_ids[*row as usize];
                let mut logits = [0f32; 8];
                logits[(token as usize + 1) % 8] = 1.0;
                if self.nan_after == Some(token) {
                    logits[0] = f32::NAN;
                }
                self.logits.extend(logits);
            }
            Ok(StepId(0))
        }

        fn sample(&mut self, _: StepId, input: &SampleInput) -> Result<(), RunnerError> {
            assert!(input.return_logits);
            Ok(())
        }

        fn poll(&mut self, _: StepId, _: Duration) -> Result<Option<StepOutput>, RunnerError> {
            Ok(Some(StepOutput {
                logits: self.logits.clone(),
                ..StepOutput::default()
            }))
        }

        fn depth(&self) -> usize {
            1
        }
    }

    /// Of a token that follows, and of one that does not.
    fn expected() -> (f64, f64) {
        let sum = (1f64.exp() + 7.0).ln();
        (sum - 1.0, sum)
    }

    #[test]
    fn every_token_of_every_window_is_predicted_once() {
        let (right, wrong) = expected();
        // Windows of 7: six tokens each behind the beginning, in steps of 4 rows.
        let text: Vec<TokenId> = [1, 2, 3, 4, 5, 6, 2, 3, 3, 4, 5, 6, 7].to_vec();
        let mut runner = Successor::new(4);
        let result = perplexity(&mut runner, &[0], &text, 7).unwrap();
        assert_eq!((result.tokens, result.window), (13, 7));
        // 1..=6 all follow; of 2 3 3 4 5 6 the first and the second 3 do not; 7 does not follow 0.
        let total = 10.0 * right + 3.0 * wrong;
        assert!((result.mean_nll - total / 13.0).abs() < 1e-9, "{result:?}");
        assert!((result.perplexity - result.mean_nll.exp()).abs() < 1e-9);
        let windows = &runner.windows[1..];
        assert_eq!(windows, [vec![0, 1, 2, 3, 4, 5], vec![0, 2, 3, 3, 4, 5]]);
    }

    #[test]
    fn without_a_beginning_the_first_token_is_not_predicted() {
        let (right, _) = expected();
        let mut runner = Successor::new(16);
        let result = perplexity(&mut runner, &[], &[1, 2, 3, 4], 4).unwrap();
        assert_eq!(result.tokens, 3);
        assert!((result.mean_nll - right).abs() < 1e-9);
        let worse = perplexity(&mut runner, &[], &[1, 2, 3, 3], 4).unwrap();
        assert!(worse.percent_above(&result) > 30.0 && result.percent_above(&worse) < -20.0);
    }

    #[test]
    fn what_cannot_be_measured_is_an_error() {
        let mut runner = Successor::new(16);
        let mut failed = |text: &[TokenId], window| {
            perplexity(&mut runner, &[0], text, window)
                .unwrap_err()
                .to_string()
        };
        assert!(failed(&[1], 8).contains("1 tokens"));
        assert!(failed(&[1, 2, 3], 2).contains("between 3 and 50"));
        assert!(failed(&[1, 2, 3], 51).contains("between 3 and 50"));
        runner.nan_after = Some(5);
        let error = perplexity(&mut runner, &[0], &[1, 2, 3, 4, 5, 6, 7], 5).unwrap_err();
        assert!(error.to_string().contains("token 5 of"), "{error}");
    }
}
