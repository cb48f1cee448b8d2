//! What comes of a step: tokens and embeddings to their sequences, or a failure to its requests.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Instant,
};

use super::{Core, InFlight};
use crate::{
    engine::{
        clients::Prompt,
        handle::Command,
        request::{FinishReason, GeneratedToken, SeqId},
        scheduler::{ScheduledItem, SchedulerOutput},
        sequence::Sequence,
        stream::Finish,
    },
    model_runner::{RunnerError, StepOutput},
};

impl Core {
    pub(super) fn deal_out(&mut self, step: &InFlight, output: StepOutput) {
        let now = Instant::now();
        let samples = step.plan.items.iter().filter(|item| item.samples);
        assert_eq!(
            samples.clone().count(),
            output.rows.len(),
            "the runner answers every sampled row: this is a bug"
        );
        if !output.logits.is_empty() {
            let vocab_size = self.shared.limits.vocab_size as usize;
            self.prompt_logprobs
                .collect(&step.plan, &output.logits, vocab_size, &self.scheduler);
        }
        let pools = step.plan.items.iter().filter(|item| item.pools);
        assert_eq!(
            pools.clone().count(),
            output.pooled.len(),
            "the runner answers everything to be pooled: this is a bug"
        );
        for (item, pooled) in pools.zip(output.pooled) {
            assert!(
                item.seq == pooled.seq && item.epoch == pooled.epoch,
                "the runner pooled another sequence: this is a bug"
            );
            self.deal_out_pooled(item, pooled.sum);
        }
        for (item, row) in samples.zip(output.rows) {
            assert!(
                item.seq == row.seq && item.epoch == row.epoch,
                "the runner answered for another sequence: this is a bug"
            );
            self.deal_out_row(item, row.tokens, now);
        }
        self.clients.report_step(&step.plan, now - step.submitted);
    }

    fn deal_out_row(&mut self, item: &ScheduledItem, mut drawn: Vec<GeneratedToken>, now: Instant) {
        let is_current = |seq: &&Sequence| seq.epoch == item.epoch;
        let Some(seq) = self.scheduler.sequence(item.seq).filter(is_current) else {
            return;
        };
        if drawn.is_empty() {
            let message = "the model gave logits that are not finite for this request";
            self.shared.stats.corrupted_requests.fetch_add(1, Relaxed);
            self.end(item.seq, Finish::failed(message.to_owned()));
            return;
        }
        let prompt = Prompt {
            num_tokens: seq.num_prompt(),
            num_cached: seq.num_cached.unwrap_or(0),
        };
        let ids: Vec<_> = drawn.iter().map(|token| token.id).collect();
        let Some((accepted, ended)) = self.scheduler.update(item, &ids) else {
            return;
        };
        drawn.truncate(accepted.num_tokens as usize);
        if let Some(logprobs) = self.prompt_logprobs.take(item.seq) {
            self.clients.send_prompt_logprobs(item.seq, logprobs);
        }
        self.clients
            .count(item.seq, prompt, accepted.num_tokens, now);
        match (accepted.finish, ended) {
            (Some((reason, stop_token)), Some(sequence)) => {
                let finish = Finish {
                    stop_token,
                    ..Finish::because(reason)
                };
                let kept = sequence.num_generated();
                self.clients.end(&sequence, drawn, kept, finish);
            }
            _ => {
                self.advance_grammar(item.seq, &drawn);
                self.clients.send(item.seq, drawn, prompt.num_cached);
            }
        }
    }

    /// Adds to an embedding; ends its sequence when the prompt is through.
    fn deal_out_pooled(&mut self, item: &ScheduledItem, sum: Vec<f64>) {
        let is_current = |seq: &&Sequence| seq.epoch == item.epoch;
        let Some(seq) = self.scheduler.sequence(item.seq).filter(is_current) else {
            return;
        };
        let Some(pooling) = seq.pooling else {
            return;
        };
        self.pooled.add(item.seq, item.start, sum);
        let prompt = Prompt {
            num_tokens: seq.num_prompt(),
            num_cached: seq.num_cached.unwrap_or(0),
        };
        if item.start + item.num_tokens < prompt.num_tokens {
            return;
        }
        match self.pooled.finish(item.seq, pooling, prompt.num_tokens) {
            Some(embedding) => {
                self.clients.count_prompt(prompt);
                self.clients.send_embedding(item.seq, embedding);
                self.end(item.seq, Finish::because(FinishReason::Stop));
            }
            None => {
                let message = "the model gave hidden states that are not finite for this request";
                self.shared.stats.corrupted_requests.fetch_add(1, Relaxed);
                self.end(item.seq, Finish::failed(message.to_owned()));
            }
        }
    }

    fn advance_grammar(&self, seq: SeqId, drawn: &[GeneratedToken]) {
        let sequence = self.scheduler.sequence(seq);
        let Some(grammar) = sequence.and_then(|sequence| sequence.constraint.grammar()) else {
            return;
        };
        for token in drawn {
            let shared = Arc::clone(&self.shared);
            grammar.advance(token.id, Box::new(move || shared.send(Command::Mask(seq))));
        }
    }

    /// A step failed: its requests end with the error; the engine goes on unless the device is lost.
    pub(super) fn fail_step(
        &mut self,
        plan: &SchedulerOutput,
        error: &RunnerError,
    ) -> Result<(), RunnerError> {
        if error.fatal {
            return Err(error.clone());
        }
        self.shared.stats.failed_steps.fetch_add(1, Relaxed);
        tracing::warn!(
            %error,
            requests = plan.items.len(),
            "a step failed; its requests end, the engine goes on"
        );
        let later = self
            .in_flight
            .iter()
            .map(|step| &step.plan)
            .filter(|later| later.step > plan.step);
        for sequence in self.scheduler.withdraw(plan, later) {
            let kept = sequence.num_generated();
            let finish = Finish::failed(error.to_string());
            self.clients.end(&sequence, Vec::new(), kept, finish);
        }
        Ok(())
    }
}
