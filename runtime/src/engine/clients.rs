//! The engine's side of its clients: where each sequence's tokens go, its times, and what observers are told.
//!
//! News is held back until counters and gauges tell of it too: who has seen a token also sees it counted.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use super::{
    handle::{NewSequence, Shared},
    observer::{EngineObserver, FinishedRequest, StepReport},
    request::{FinishReason, GeneratedToken, SeqId, TokenLogprobs},
    scheduler::SchedulerOutput,
    sequence::Sequence,
    stats::Speed,
    stream::{Finish, StreamCell, StreamSender, Timings},
};

struct Client {
    stream: StreamSender,
    arrival: Instant,
    queued: Instant,
    scheduled: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

impl Client {
    fn timings(&self) -> Timings {
        Timings {
            queued: self.queued,
            scheduled: self.scheduled,
            first_token: self.first_token,
            last_token: self.last_token,
        }
    }
}

/// News for one client.
struct Delivery {
    cell: Arc<StreamCell>,
    tokens: Vec<GeneratedToken>,
    cached_prompt_tokens: u32,
    timings: Timings,
    /// The end, with the sender that it sets free.
    end: Option<(Finish, StreamSender)>,
}

/// What the step at hand did, for the observer; buffers are reused.
#[derive(Default)]
struct Tally {
    prompt_tokens: u32,
    cached_prompt_tokens: u32,
    generation_tokens: u32,
    time_to_first_token: Vec<Duration>,
    inter_token_latency: Vec<Duration>,
}

/// The clients of all sequences that have not ended.
pub(super) struct Clients {
    clients: HashMap<SeqId, Client>,
    deliveries: Vec<Delivery>,
    tally: Tally,
    prefill: Speed,
    decode: Speed,
    /// Tokens counted and then found to lie behind a stop string: taken off what is counted next, as counters only grow.
    overcounted: u32,
    shared: Arc<Shared>,
    observer: Arc<dyn EngineObserver>,
}

impl Clients {
    pub(super) fn new(shared: Arc<Shared>, observer: Arc<dyn EngineObserver>) -> Self {
        Self {
            clients: HashMap::new(),
            deliveries: Vec::new(),
            tally: Tally::default(),
            prefill: Speed::default(),
            decode: Speed::default(),
            overcounted: 0,
            shared,
            observer,
        }
    }

    /// Takes in a new sequence's client and gives back the sequence.
    pub(super) fn add(&mut self, new: NewSequence) -> Sequence {
        let client = Client {
            stream: new.stream,
            arrival: new.arrival,
            queued: new.queued,
            scheduled: None,
            first_token: None,
            last_token: None,
        };
        self.clients.insert(new.sequence.id, client);
        new.sequence
    }

    pub(super) fn ids(&self) -> Vec<SeqId> {
        self.clients.keys().copied().collect()
    }

    /// A sequence was given a place.
    pub(super) fn scheduled(&mut self, seq: SeqId, now: Instant) {
        if let Some(client) = self.clients.get_mut(&seq) {
            client.scheduled = Some(now);
        }
    }

    /// Counts and times a sequence's new tokens.
    pub(super) fn count(&mut self, seq: SeqId, prompt: Prompt, num_tokens: u32, now: Instant) {
        let Some(client) = self.clients.get_mut(&seq) else {
            return;
        };
        self.tally.generation_tokens += num_tokens;
        let last = client.last_token.replace(now);
        if client.first_token.is_none() {
            client.first_token = Some(now);
            let waited = now.saturating_duration_since(client.arrival);
            self.tally.time_to_first_token.push(waited);
            self.count_prompt(prompt);
        } else if let Some(last) = last {
            self.tally.inter_token_latency.push(now - last);
        }
    }

    /// Counts a prompt that is through.
    pub(super) fn count_prompt(&mut self, prompt: Prompt) {
        self.tally.prompt_tokens += prompt.num_tokens;
        self.tally.cached_prompt_tokens += prompt.num_cached;
    }

    /// Tokens on their way to a sequence that goes on.
    pub(super) fn send(&mut self, seq: SeqId, tokens: Vec<GeneratedToken>, cached: u32) {
        if let Some(client) = self.clients.get(&seq) {
            self.deliveries.push(Delivery {
                cell: Arc::clone(client.stream.cell()),
                tokens,
                cached_prompt_tokens: cached,
                timings: client.timings(),
                end: None,
            });
        }
    }

    /// The prompt's log-probabilities on their way to a sequence, before its first token.
    pub(super) fn send_prompt_logprobs(&self, seq: SeqId, logprobs: Vec<TokenLogprobs>) {
        if let Some(client) = self.clients.get(&seq) {
            client.stream.cell().set_prompt_logprobs(logprobs);
        }
    }

    /// A prompt's embedding on its way, before its end.
    pub(super) fn send_embedding(&self, seq: SeqId, embedding: Vec<f32>) {
        if let Some(client) = self.clients.get(&seq) {
            client.stream.cell().set_embedding(embedding);
        }
    }

    /// A sequence ended: its last tokens, if any, and why. `kept` of its tokens count.
    pub(super) fn end(
        &mut self,
        sequence: &Sequence,
        tokens: Vec<GeneratedToken>,
        kept: u32,
        finish: Finish,
    ) {
        let Some(client) = self.clients.remove(&sequence.id) else {
            return;
        };
        self.overcounted += sequence.num_generated().saturating_sub(kept);
        self.observer.on_finished(&FinishedRequest {
            seq: sequence.id,
            reason: finish.reason,
            num_prompt_tokens: sequence.num_prompt(),
            num_cached_tokens: sequence.num_cached.unwrap_or(0),
            num_generation_tokens: kept,
            max_tokens: match sequence.pooling {
                None => Some(sequence.params.max_tokens),
                Some(_) => None,
            },
            num_preemptions: sequence.num_preemptions,
            arrival: client.arrival,
            queued: client.queued,
            scheduled: client.scheduled,
            first_token: client.first_token,
            last_token: client.last_token,
            finished: Instant::now(),
        });
        self.deliveries.push(Delivery {
            cell: Arc::clone(client.stream.cell()),
            tokens,
            cached_prompt_tokens: sequence.num_cached.unwrap_or(0),
            timings: client.timings(),
            end: Some((finish, client.stream)),
        });
    }

    /// A step succeeded: adds it to the counters and tells the observer.
    pub(super) fn report_step(&mut self, plan: &SchedulerOutput, duration: Duration) {
        let stats = &self.shared.stats;
        let tally = &mut self.tally;
        let taken_off = self.overcounted.min(tally.generation_tokens);
        self.overcounted -= taken_off;
        tally.generation_tokens -= taken_off;
        stats.steps.fetch_add(1, Relaxed);
        let prefill = plan
            .items
            .iter()
            .filter(|item| item.num_tokens > 1 || item.num_generated == 0);
        let prefill: u32 = prefill.map(|item| item.num_tokens).sum();
        if prefill > 0 {
            let rate = self.prefill.add(prefill, duration);
            stats.prefill_rate.store(rate.to_bits(), Relaxed);
        }
        if tally.generation_tokens > 0 {
            let rate = self.decode.add(tally.generation_tokens, duration);
            stats.decode_rate.store(rate.to_bits(), Relaxed);
        }
        let (mut context, mut attended) = (0u64, 0u64);
        for item in &plan.items {
            let (before, rows) = (u64::from(item.start), u64::from(item.num_tokens));
            context += before + rows;
            // Each row sees what was there before, the rows ahead of it, and itself.
            attended += rows * before + rows * (rows + 1) / 2;
        }
        for (counter, count) in [
            (&stats.prompt_tokens, tally.prompt_tokens.into()),
            (
                &stats.prompt_tokens_cached,
                tally.cached_prompt_tokens.into(),
            ),
            (&stats.generation_tokens, tally.generation_tokens.into()),
            (&stats.computed_tokens, plan.num_tokens.into()),
            (&stats.context_tokens, context),
            (&stats.attended_tokens, attended),
        ] {
            counter.fetch_add(count, Relaxed);
        }
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        self.observer.on_step(&StepReport {
            num_tokens: plan.num_tokens,
            num_seqs: count(plan.items.len()),
            prompt_tokens: tally.prompt_tokens,
            cached_prompt_tokens: tally.cached_prompt_tokens,
            generation_tokens: tally.generation_tokens,
            duration,
            time_to_first_token: &tally.time_to_first_token,
            inter_token_latency: &tally.inter_token_latency,
            num_preemptions: count(plan.preempted.len()),
        });
        tally.prompt_tokens = 0;
        tally.cached_prompt_tokens = 0;
        tally.generation_tokens = 0;
        tally.time_to_first_token.clear();
        tally.inter_token_latency.clear();
    }

    /// Hands out what was held back and wakes the clients.
    pub(super) fn deliver(&mut self) {
        for delivery in self.deliveries.drain(..) {
            let (finish, sender) = delivery.end.unzip();
            if sender.is_some() {
                self.shared.stats.in_system.fetch_sub(1, Relaxed);
            }
            let cached = delivery.cached_prompt_tokens;
            let timings = Some(delivery.timings);
            delivery.cell.push(delivery.tokens, cached, timings, finish);
        }
    }

    /// The engine ends: so does every stream, also those of `queued` sequences that never came in.
    pub(super) fn close(
        &mut self,
        queued: impl Iterator<Item = StreamSender>,
        error: Option<&str>,
    ) {
        self.deliver();
        let running = self.clients.drain().map(|(_, client)| client.stream);
        for stream in queued.chain(running) {
            let finish = match error {
                Some(error) => Finish::failed(error.to_owned()),
                None => Finish::because(FinishReason::Abort),
            };
            stream.cell().push(Vec::new(), 0, None, Some(finish));
        }
    }
}

/// A prompt as the metrics count it.
#[derive(Clone, Copy)]
pub(super) struct Prompt {
    pub(super) num_tokens: u32,
    pub(super) num_cached: u32,
}
