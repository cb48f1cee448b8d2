//! Log-probabilities of prompts, gathered piece by piece as their rows are computed.

use std::collections::HashMap;

use super::{
    request::{SeqId, TokenId, TokenLogprobs},
    scheduler::{Scheduler, SchedulerOutput},
};

/// What has been gathered for sequences whose prompt is not through.
#[derive(Default)]
pub(super) struct PromptLogprobs {
    of: HashMap<SeqId, Vec<TokenLogprobs>>,
}

impl PromptLogprobs {
    /// Takes a step's logits `[logit_rows, vocab_size]`. The row at position `p` speaks of the prompt's token `p + 1`.
    pub(super) fn collect(
        &mut self,
        plan: &SchedulerOutput,
        logits: &[f32],
        vocab_size: usize,
        scheduler: &Scheduler,
    ) {
        let mut rows = logits.chunks_exact(vocab_size.max(1));
        for item in &plan.items {
            let count = match (item.prompt_logits, item.samples) {
                (true, _) => item.num_tokens,
                (false, true) => 1,
                (false, false) => 0,
            };
            let mine: Vec<&[f32]> = rows.by_ref().take(count as usize).collect();
            let sequence = scheduler.sequence(item.seq);
            let Some(seq) = sequence.filter(|seq| item.prompt_logits && seq.epoch == item.epoch)
            else {
                continue;
            };
            let gathered = self.of.entry(item.seq).or_default();
            // After a preemption it begins again.
            gathered.truncate(item.start as usize);
            let top = seq.prompt_logprobs.unwrap_or(0) as usize;
            for (row, position) in mine.into_iter().zip(item.start..) {
                if let Some(&next) = seq.prompt.get(position as usize + 1) {
                    gathered.push(log_softmax(row, next, top));
                }
            }
        }
    }

    /// A sequence's, once its prompt is through or it has left.
    pub(super) fn take(&mut self, seq: SeqId) -> Option<Vec<TokenLogprobs>> {
        if self.of.is_empty() {
            return None;
        }
        self.of.remove(&seq)
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "log-probabilities are f32 outside"
)]
fn log_softmax(logits: &[f32], token: TokenId, top: usize) -> TokenLogprobs {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from((x - max).exp())).sum();
    let lse = f64::from(max) + sum.ln();
    let of = |logit: f32| ((f64::from(logit) - lse) as f32).min(0.0);
    let mut ids: Vec<TokenId> = Vec::new();
    if top > 0 {
        ids = (0..logits.len())
            .filter_map(|id| id.try_into().ok())
            .collect();
        let by_logit = |a: &TokenId, b: &TokenId| {
            let (x, y) = (logits[*a as usize], logits[*b as usize]);
            y.total_cmp(&x).then(a.cmp(b))
        };
        if top < ids.len() {
            ids.select_nth_unstable_by(top, by_logit);
            ids.truncate(top);
        }
        ids.sort_unstable_by(by_logit);
    }
    TokenLogprobs {
        sampled: logits.get(token as usize).map_or(f32::MIN, |&x| of(x)),
        top: ids
            .into_iter()
            .map(|id| (id, of(logits[id as usize])))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::log_softmax;

    #[test]
    fn probabilities_of_a_row() {
        let row = [1.0f32, 3.0, 2.0];
        let logprobs = log_softmax(&row, 2, 2);
        let sum = 1f32.exp() + 2f32.exp() + 3f32.exp();
        assert!((logprobs.sampled - (2f32.exp() / sum).ln()).abs() < 1e-6);
        assert_eq!(logprobs.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2]);
    }
}
