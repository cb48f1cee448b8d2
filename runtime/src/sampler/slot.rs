//! How one slot draws: its parameters, the counts its penalties need, and the draw itself.

use std::{cell::RefCell, collections::HashMap, sync::Arc};

use super::{
    SampleError,
    math::{
        BLOCK, argmax_finite, block_maxima, exp, log_sum_exp, lower_bound_of_top, sum_of_weights,
        weight,
    },
    philox::uniform,
};
use crate::{
    engine::request::{GeneratedToken, SamplingParams, TokenId, TokenLogprobs},
    model_runner::{SampleRow, SlotInit},
};

/// Temperatures below this are greedy: a division by them leaves nothing to draw.
const MIN_TEMPERATURE: f32 = 1e-5;

/// A candidate token.
type Candidate = (f32, TokenId);

thread_local! {
    /// Candidates of the row at hand; kept to save an allocation per row.
    static CANDIDATES: RefCell<Vec<Candidate>> = const { RefCell::new(Vec::new()) };
}

/// State of one slot between draws.
pub(super) struct SlotState {
    params: Arc<SamplingParams>,
    seed: u64,
    choice_index: u32,
    /// Tokens forbidden until `min_tokens` are generated.
    ends: Vec<TokenId>,
    /// Distinct prompt tokens, kept for a repetition penalty only.
    prompt: Vec<TokenId>,
    /// Output tokens and how often each came, kept for penalties only.
    output: HashMap<TokenId, u32>,
}

impl SlotState {
    pub(super) fn new(init: &SlotInit, eos_ids: &[TokenId]) -> Self {
        let params = Arc::clone(&init.params);
        let mut ends = params.stop_token_ids.clone();
        if !params.ignore_eos {
            ends.extend_from_slice(eos_ids);
        }
        let mut state = Self {
            seed: params.seed.unwrap_or(0),
            choice_index: init.choice_index,
            ends,
            prompt: Vec::new(),
            output: HashMap::new(),
            params,
        };
        if state.params.repetition_penalty != 1.0 {
            state.prompt = init.prompt.to_vec();
            state.prompt.sort_unstable();
            state.prompt.dedup();
        }
        if state.has_penalties() {
            for &token in &init.output {
                *state.output.entry(token).or_default() += 1;
            }
        }
        state
    }

    fn has_penalties(&self) -> bool {
        let p = &self.params;
        p.repetition_penalty != 1.0 || p.presence_penalty != 0.0 || p.frequency_penalty != 0.0
    }

    fn is_greedy(&self) -> bool {
        self.params.temperature < MIN_TEMPERATURE
    }

    /// Draws the token of a row. `logits` is left changed by penalties, bias and mask.
    pub(super) fn sample(
        &mut self,
        row: &SampleRow,
        logits: &mut [f32],
    ) -> Result<GeneratedToken, SampleError> {
        let (mut best, _) = argmax_finite(logits).ok_or(SampleError::NonFinite)?;
        let mut touched = false;
        if self.has_penalties() || !self.params.logit_bias.is_empty() {
            self.apply_penalties_and_bias(logits);
            best = argmax_finite(logits).ok_or(SampleError::NonFinite)?.0;
            touched = true;
        }
        // Log-probabilities are those before the mask: an answer in JSON has no −∞.
        let logprobs = self.params.logprobs.map(|count| {
            let lse = log_sum_exp(logits, logits[best]);
            (lse, top_logprobs(logits, count as usize, lse))
        });
        touched |= self.apply_mask(row, logits);
        let id = if self.is_greedy() {
            if touched {
                greedy(logits).ok_or(SampleError::NoCandidate)?
            } else {
                to_id(best)
            }
        } else {
            self.draw(row, logits)?
        };
        let logprobs = logprobs.map(|(lse, top)| TokenLogprobs {
            sampled: to_logprob(logits[id as usize], lse),
            top,
        });
        if self.has_penalties() {
            *self.output.entry(id).or_default() += 1;
        }
        Ok(GeneratedToken { id, logprobs })
    }

    fn apply_penalties_and_bias(&self, logits: &mut [f32]) {
        let p = &self.params;
        let repetition = |logit: &mut f32| {
            if *logit > 0.0 {
                *logit /= p.repetition_penalty;
            } else {
                *logit *= p.repetition_penalty;
            }
        };
        for &token in &self.prompt {
            if !self.output.contains_key(&token)
                && let Some(logit) = logits.get_mut(token as usize)
            {
                repetition(logit);
            }
        }
        for (&token, &count) in &self.output {
            if let Some(logit) = logits.get_mut(token as usize) {
                if p.repetition_penalty != 1.0 {
                    repetition(logit);
                }
                #[expect(clippy::cast_precision_loss, reason = "counts stay below 2^24")]
                let count = count as f32;
                *logit -= p.frequency_penalty * count + p.presence_penalty;
            }
        }
        for &(token, bias) in &p.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
    }

    /// Forbids what the mask and `min_tokens` forbid. True when anything may have changed.
    fn apply_mask(&self, row: &SampleRow, logits: &mut [f32]) -> bool {
        let mut touched = false;
        if let Some(mask) = &row.mask {
            touched = true;
            for (index, logits) in logits.chunks_mut(32).enumerate() {
                let word = mask.get(index).copied().unwrap_or(0);
                if word != u32::MAX {
                    for (bit, logit) in logits.iter_mut().enumerate() {
                        if word >> bit & 1 == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
        if row.num_generated < self.params.min_tokens {
            touched = true;
            for &token in &self.ends {
                if let Some(logit) = logits.get_mut(token as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        touched
    }

    /// temperature → min-p → top-k → renormalise → top-p → one draw.
    fn draw(&self, row: &SampleRow, logits: &[f32]) -> Result<TokenId, SampleError> {
        let p = &self.params;
        let maxima = block_maxima(logits);
        let max = maxima.into_iter().fold(f32::NEG_INFINITY, f32::max);
        if max == f32::NEG_INFINITY {
            return Err(SampleError::NoCandidate);
        }
        let scale = 1.0 / p.temperature;
        let uniform = uniform(self.seed, self.choice_index, row.position);
        // p ≥ min_p·p_max, said in logits. Nothing masked is ever above the cutoff.
        let cutoff = if p.min_p > 0.0 {
            max + p.temperature * p.min_p.ln()
        } else {
            f32::MIN
        };
        let top_k = match p.top_k as usize {
            0 => None,
            k => (k < logits.len()).then_some(k),
        };
        if top_k.is_none() && p.min_p <= 0.0 && p.top_p >= 1.0 {
            return Ok(draw_from_all(logits, max, scale, uniform));
        }
        // With top-k the candidates are everything that top-p shares out; without, it is the whole row.
        let (cutoff, total) = match top_k {
            Some(k) => (cutoff.max(lower_bound_of_top(logits, k)), None),
            None if p.top_p < 1.0 => {
                let (bound, total) = top_p_bound(logits, max, p, cutoff);
                (cutoff.max(bound), Some(total))
            }
            None => (cutoff, None),
        };
        CANDIDATES.with_borrow_mut(|candidates| {
            collect(logits, cutoff, candidates);
            if let Some(k) = top_k {
                keep_top(candidates, k);
            }
            candidates.sort_unstable_by(most_likely_first);
            Ok(draw_from_sorted(
                candidates,
                scale,
                (p.top_p, total),
                uniform,
            ))
        })
    }
}

/// Most likely first, the lowest id first among equals.
fn most_likely_first(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

fn to_id(index: usize) -> TokenId {
    TokenId::try_from(index).expect("the vocabulary fits a u32: this is a bug")
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "log-probabilities are f32 outside"
)]
fn to_logprob(logit: f32, log_sum_exp: f64) -> f32 {
    ((f64::from(logit) - log_sum_exp) as f32).min(0.0)
}

fn greedy(logits: &[f32]) -> Option<TokenId> {
    let maxima = block_maxima(logits);
    let max = maxima.into_iter().fold(f32::NEG_INFINITY, f32::max);
    if max == f32::NEG_INFINITY {
        return None;
    }
    logits.iter().position(|&x| x == max).map(to_id)
}

fn collect(logits: &[f32], cutoff: f32, candidates: &mut Vec<Candidate>) {
    candidates.clear();
    let cutoff = cutoff.max(f32::MIN);
    for (index, &logit) in logits.iter().enumerate() {
        if logit >= cutoff {
            candidates.push((logit, to_id(index)));
        }
    }
}

fn keep_top(candidates: &mut Vec<Candidate>, k: usize) {
    if candidates.len() > k {
        candidates.select_nth_unstable_by(k - 1, most_likely_first);
        candidates.truncate(k);
    }
}

fn top_logprobs(logits: &[f32], count: usize, lse: f64) -> Vec<(TokenId, f32)> {
    if count == 0 {
        return Vec::new();
    }
    CANDIDATES.with_borrow_mut(|candidates| {
        collect(logits, lower_bound_of_top(logits, count), candidates);
        keep_top(candidates, count);
        candidates.sort_unstable_by(most_likely_first);
        candidates
            .iter()
            .map(|&(logit, id)| (id, to_logprob(logit, lse)))
            .collect()
    })
}

/// A logit below which no token can belong to the top-p set (all of them together weigh less than what top-p leaves
/// out), and the weight of all tokens from `cutoff` up.
fn top_p_bound(logits: &[f32], max: f32, params: &SamplingParams, cutoff: f32) -> (f32, f64) {
    let scale = 1.0 / params.temperature;
    let total: f64 = logits
        .chunks(BLOCK)
        .map(|block| f64::from(sum_of_weights(block, max, scale, cutoff)))
        .sum();
    #[expect(clippy::cast_precision_loss, reason = "a vocabulary is far below 2^52")]
    let least = (1.0 - f64::from(params.top_p.max(0.0))) * total / logits.len() as f64;
    // Half of it leaves room for rounding.
    #[expect(clippy::cast_possible_truncation, reason = "a bound, not a value")]
    let bound = (f64::from(max) + f64::from(params.temperature) * (least * 0.5).ln()) as f32;
    (bound, total)
}

/// Inverse of the cumulative distribution over the whole vocabulary, in order of ids.
fn draw_from_all(logits: &[f32], max: f32, scale: f32, uniform: f64) -> TokenId {
    let sums: Vec<f32> = logits
        .chunks(BLOCK)
        .map(|block| sum_of_weights(block, max, scale, f32::MIN))
        .collect();
    let total: f64 = sums.iter().copied().map(f64::from).sum();
    let mut left = uniform * total;
    let mut chosen = sums.len() - 1;
    for (index, &sum) in sums.iter().enumerate() {
        if left < f64::from(sum) {
            chosen = index;
            break;
        }
        left -= f64::from(sum);
    }
    // Rounding may leave a rest behind the last block: then the last block that weighs anything has it.
    while chosen > 0 && sums[chosen] == 0.0 {
        chosen -= 1;
    }
    let start = chosen * BLOCK;
    let block = &logits[start..(start + BLOCK).min(logits.len())];
    let mut last = 0;
    for (index, &logit) in block.iter().enumerate() {
        let w = f64::from(weight(logit, max, scale, f32::MIN));
        if w > 0.0 {
            last = index;
            if left < w {
                break;
            }
            left -= w;
        }
    }
    to_id(start + last)
}

/// Top-p over candidates in order, then the draw. Top-p is a share of the given weight, or of the candidates' own.
fn draw_from_sorted(
    candidates: &[Candidate],
    scale: f32,
    (top_p, total): (f32, Option<f64>),
    uniform: f64,
) -> TokenId {
    let max = candidates[0].0;
    let weight = |&(logit, _): &Candidate| f64::from(exp((logit - max) * scale));
    let total: f64 = total.unwrap_or_else(|| candidates.iter().map(weight).sum());
    let wanted = total * f64::from(top_p);
    let mut kept = candidates.len();
    let mut mass = 0.0;
    for (index, candidate) in candidates.iter().enumerate() {
        mass += weight(candidate);
        if mass >= wanted && top_p < 1.0 {
            kept = index + 1;
            break;
        }
    }
    let kept = &candidates[..kept];
    let mut left = uniform * mass;
    for candidate in kept {
        let w = weight(candidate);
        if left < w {
            return candidate.1;
        }
        left -= w;
    }
    kept[kept.len() - 1].1
}
