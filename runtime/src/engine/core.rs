//! The engine thread: takes commands, launches steps, hands out tokens.

use std::{
    any::Any,
    collections::{HashMap, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use super::{
    handle::{Command, NewSequence, Phase, Shared},
    input::InputBuilder,
    observer::{EngineObserver, FinishedRequest, StepReport},
    request::{FinishReason, GeneratedToken, SeqId},
    scheduler::{ScheduledItem, Scheduler, SchedulerOutput},
    sequence::Sequence,
    stream::{Finish, StreamCell, StreamSender},
};
use crate::model_runner::{ModelRunner, RunnerError, StepId, StepOutput};

/// How long one poll of the runner waits; the loop polls until the step is done.
const POLL_WAIT: Duration = Duration::from_millis(200);

/// What the engine keeps of a sequence beside the scheduler: where its tokens go, and its times.
struct Client {
    stream: StreamSender,
    arrival: Instant,
    queued: Instant,
    scheduled: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

/// A step that was handed to the runner, or that the runner refused (`runner_step` is `None`) while others run.
struct InFlight {
    plan: SchedulerOutput,
    runner_step: Option<StepId>,
    submitted: Instant,
}

/// What a step did, for the observer; buffers are reused.
#[derive(Default)]
struct Tally {
    prompt_tokens: u32,
    cached_prompt_tokens: u32,
    generation_tokens: u32,
    time_to_first_token: Vec<Duration>,
    inter_token_latency: Vec<Duration>,
}

/// News for a client, held back until counters and gauges tell of it too.
struct Delivery {
    stream: Arc<StreamCell>,
    /// Held until the end is delivered.
    sender: Option<StreamSender>,
    tokens: Vec<GeneratedToken>,
    cached_prompt_tokens: u32,
    finish: Option<Finish>,
}

/// Everything the engine thread owns.
pub(super) struct Core {
    runner: Box<dyn ModelRunner>,
    scheduler: Scheduler,
    clients: HashMap<SeqId, Client>,
    in_flight: VecDeque<InFlight>,
    input: InputBuilder,
    tally: Tally,
    deliveries: Vec<Delivery>,
    shared: Arc<Shared>,
    observer: Arc<dyn EngineObserver>,
    /// Set while there is work; the pool is checked when it ends.
    busy: bool,
}

impl Core {
    pub(super) fn new(
        runner: Box<dyn ModelRunner>,
        shared: Arc<Shared>,
        observer: Arc<dyn EngineObserver>,
    ) -> Self {
        Self {
            scheduler: Scheduler::new(&shared.config, &shared.limits),
            runner,
            clients: HashMap::new(),
            in_flight: VecDeque::new(),
            input: InputBuilder::default(),
            tally: Tally::default(),
            deliveries: Vec::new(),
            shared,
            observer,
            busy: false,
        }
    }

    /// The body of the engine thread: runs until shut down; a fatal runner error or a panic ends every stream.
    pub(super) fn run(mut self) {
        let outcome = catch_unwind(AssertUnwindSafe(|| self.run_steps()));
        let error = match outcome {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(panic) => Some(format!(
                "the engine thread panicked: {}",
                panic_message(&*panic)
            )),
        };
        if let Some(message) = &error {
            tracing::error!(%message, "the engine has stopped");
        }
        let reason = if error.is_some() {
            FinishReason::Error
        } else {
            FinishReason::Abort
        };
        self.deliver();
        // Close first, so that nothing can be enqueued behind our back.
        let commands = self.shared.close(error.clone());
        let left = commands.into_iter().filter_map(|command| match command {
            Command::Add(new) => Some(new.stream),
            Command::Finish { .. } | Command::Abort(_) => None,
        });
        let running = self.clients.drain().map(|(_, client)| client.stream);
        for stream in left.chain(running) {
            let finish = Finish {
                reason,
                stop_token: None,
                error: error.clone(),
            };
            stream.cell().push(Vec::new(), 0, Some(finish));
        }
        let stats = &self.shared.stats;
        for gauge in [
            &stats.in_system,
            &stats.queued,
            &stats.running,
            &stats.waiting,
        ] {
            gauge.store(0, Relaxed);
        }
        self.shared.exit();
    }

    fn run_steps(&mut self) -> Result<(), RunnerError> {
        let depth = self.runner.depth().max(1);
        while self.take_commands() {
            while self.in_flight.len() < depth && self.launch_step()? {}
            self.publish_gauges();
            if !self.in_flight.is_empty() {
                self.finish_step()?;
            } else if let Some(stuck) = self.scheduler.first_waiting() {
                // Cannot happen (see `scheduler`); if it does, one request pays for it, not the engine.
                tracing::error!(
                    seq = stuck.0,
                    "a request cannot be scheduled in an idle engine: this is a bug"
                );
                let message = "the request could not be scheduled: this is a bug in the server";
                self.end(stuck, FinishReason::Error, Some(message.to_owned()));
            }
            self.deliver();
        }
        Ok(())
    }

    /// Carries out what was enqueued; waits for something when there is no work. False when the engine is to end.
    fn take_commands(&mut self) -> bool {
        let shared = Arc::clone(&self.shared);
        let mut inbox = shared.lock();
        while inbox.commands.is_empty() && matches!(inbox.phase, Phase::Open) && self.is_idle() {
            if self.busy {
                drop(inbox);
                self.become_idle();
                inbox = shared.lock();
            } else {
                inbox = shared.wait(inbox);
            }
        }
        let commands = std::mem::take(&mut inbox.commands);
        let phase = inbox.phase.clone();
        drop(inbox);
        for command in commands {
            self.carry_out(command);
        }
        match phase {
            Phase::Draining { deadline } if Instant::now() >= deadline => {
                let ids: Vec<SeqId> = self.clients.keys().copied().collect();
                for seq in ids {
                    self.end(seq, FinishReason::Abort, None);
                }
                !self.is_idle()
            }
            Phase::Draining { .. } => !self.is_idle(),
            Phase::Open | Phase::Closed { .. } => true,
        }
    }

    fn is_idle(&self) -> bool {
        self.scheduler.is_idle() && self.in_flight.is_empty()
    }

    fn become_idle(&mut self) {
        self.busy = false;
        self.deliver();
        if let Err(error) = self.scheduler.check_integrity() {
            // No sequence exists, so nothing is lost but the prefix cache.
            tracing::error!(%error, "the KV-cache pool is rebuilt: this is a bug");
            debug_assert!(false, "{error}");
            self.scheduler = Scheduler::new(&self.shared.config, &self.shared.limits);
        }
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::Add(new) => self.add(*new),
            Command::Finish { seq, num_tokens } => {
                if let Some(sequence) = self.remove(seq) {
                    let kept = sequence.num_generated().min(num_tokens);
                    self.report_end(&sequence, FinishReason::Stop, kept, None);
                }
            }
            Command::Abort(seq) => self.end(seq, FinishReason::Abort, None),
        }
    }

    fn add(&mut self, new: NewSequence) {
        self.busy = true;
        self.clients.insert(
            new.sequence.id,
            Client {
                stream: new.stream,
                arrival: new.arrival,
                queued: new.queued,
                scheduled: None,
                first_token: None,
                last_token: None,
            },
        );
        self.scheduler.add(new.sequence);
    }

    /// Plans a step and hands it to the runner. False when there is nothing to compute now.
    fn launch_step(&mut self) -> Result<bool, RunnerError> {
        let plan = self.scheduler.schedule();
        let now = Instant::now();
        for admitted in &plan.admitted {
            if admitted.first {
                self.shared.stats.queued.fetch_sub(1, Relaxed);
            }
            if let Some(client) = self.clients.get_mut(&admitted.seq) {
                client.scheduled = Some(now);
            }
        }
        if plan.items.is_empty() {
            return Ok(false);
        }
        self.input.prepare(&plan, &self.scheduler);
        let submitted = self.runner.submit(&self.input.model).and_then(|step| {
            self.runner.sample(step, &self.input.sample)?;
            Ok(step)
        });
        match submitted {
            Ok(step) => self.in_flight.push_back(InFlight {
                plan,
                runner_step: Some(step),
                submitted: now,
            }),
            Err(error) => {
                self.fail_step(&plan, &error)?;
                // Its turn comes after the steps before it: only then may its blocks be used again.
                self.in_flight.push_back(InFlight {
                    plan,
                    runner_step: None,
                    submitted: now,
                });
            }
        }
        Ok(true)
    }

    /// Waits for the oldest step and deals out its tokens.
    fn finish_step(&mut self) -> Result<(), RunnerError> {
        let Some(step) = self.in_flight.pop_front() else {
            return Ok(());
        };
        let result = match step.runner_step {
            Some(id) => self.wait_for(id),
            None => {
                self.scheduler.complete(step.plan.step);
                return Ok(());
            }
        };
        match result {
            Ok(output) => self.deal_out(&step, output),
            Err(error) => self.fail_step(&step.plan, &error)?,
        }
        self.scheduler.complete(step.plan.step);
        self.shared.stats.mark_progress();
        Ok(())
    }

    fn wait_for(&mut self, step: StepId) -> Result<StepOutput, RunnerError> {
        loop {
            if let Some(output) = self.runner.poll(step, POLL_WAIT)? {
                return Ok(output);
            }
        }
    }

    fn deal_out(&mut self, step: &InFlight, output: StepOutput) {
        let now = Instant::now();
        let samples = step.plan.items.iter().filter(|item| item.samples);
        assert_eq!(
            samples.clone().count(),
            output.rows.len(),
            "the runner answers every sampled row: this is a bug"
        );
        for (item, row) in samples.zip(output.rows) {
            assert!(
                item.seq == row.seq && item.epoch == row.epoch,
                "the runner answered for another sequence: this is a bug"
            );
            self.deal_out_row(item, row.tokens, now);
        }
        let stats = &self.shared.stats;
        let tally = &mut self.tally;
        stats.steps.fetch_add(1, Relaxed);
        stats
            .prompt_tokens
            .fetch_add(tally.prompt_tokens.into(), Relaxed);
        stats
            .prompt_tokens_cached
            .fetch_add(tally.cached_prompt_tokens.into(), Relaxed);
        stats
            .generation_tokens
            .fetch_add(tally.generation_tokens.into(), Relaxed);
        self.observer.on_step(&StepReport {
            num_tokens: step.plan.num_tokens,
            num_seqs: u32::try_from(step.plan.items.len()).unwrap_or(u32::MAX),
            prompt_tokens: tally.prompt_tokens,
            cached_prompt_tokens: tally.cached_prompt_tokens,
            generation_tokens: tally.generation_tokens,
            duration: now - step.submitted,
            time_to_first_token: &tally.time_to_first_token,
            inter_token_latency: &tally.inter_token_latency,
            num_preemptions: u32::try_from(step.plan.preempted.len()).unwrap_or(u32::MAX),
        });
        tally.prompt_tokens = 0;
        tally.cached_prompt_tokens = 0;
        tally.generation_tokens = 0;
        tally.time_to_first_token.clear();
        tally.inter_token_latency.clear();
    }

    fn deal_out_row(&mut self, item: &ScheduledItem, mut drawn: Vec<GeneratedToken>, now: Instant) {
        let is_current = |seq: &&Sequence| seq.epoch == item.epoch;
        let Some(seq) = self.scheduler.sequence(item.seq).filter(is_current) else {
            return;
        };
        if drawn.is_empty() {
            let message = "the model gave logits that are not finite for this request";
            self.end(item.seq, FinishReason::Error, Some(message.to_owned()));
            return;
        }
        let (num_prompt, cached) = (seq.num_prompt(), seq.num_cached.unwrap_or(0));
        let ids: Vec<_> = drawn.iter().map(|token| token.id).collect();
        let before = seq.num_generated();
        let ended = self.scheduler.update(item, &ids);
        let Some((accepted, sequence)) = ended else {
            return;
        };
        drawn.truncate(accepted.num_tokens as usize);
        let client = self
            .clients
            .get_mut(&item.seq)
            .expect("every sequence has a client: this is a bug");
        if client.first_token.is_none() {
            client.first_token = Some(now);
            self.tally.prompt_tokens += num_prompt;
            self.tally.cached_prompt_tokens += cached;
            self.tally
                .time_to_first_token
                .push(now.saturating_duration_since(client.arrival));
        } else if let Some(last) = client.last_token {
            self.tally.inter_token_latency.push(now - last);
        }
        client.last_token = Some(now);
        self.tally.generation_tokens += accepted.num_tokens;
        let finish = accepted.finish.map(|(reason, stop_token)| Finish {
            reason,
            stop_token,
            error: None,
        });
        self.deliveries.push(Delivery {
            stream: Arc::clone(client.stream.cell()),
            sender: None,
            tokens: drawn,
            cached_prompt_tokens: cached,
            finish,
        });
        if let (Some((reason, _)), Some(sequence)) = (accepted.finish, sequence) {
            self.report_end(&sequence, reason, before + accepted.num_tokens, None);
        }
    }

    /// A step failed: its requests end with the error; the engine goes on unless the device is lost.
    fn fail_step(
        &mut self,
        plan: &SchedulerOutput,
        error: &RunnerError,
    ) -> Result<(), RunnerError> {
        if error.fatal {
            return Err(error.clone());
        }
        self.shared.stats.failed_steps.fetch_add(1, Relaxed);
        tracing::warn!(%error, requests = plan.items.len(), "a step failed; its requests end, the engine goes on");
        let later = self
            .in_flight
            .iter()
            .map(|step| &step.plan)
            .filter(|later| later.step > plan.step);
        let gone = self.scheduler.withdraw(plan, later);
        for sequence in gone {
            let kept = sequence.num_generated();
            self.leave(&sequence);
            self.report_end(
                &sequence,
                FinishReason::Error,
                kept,
                Some(error.to_string()),
            );
        }
        Ok(())
    }

    /// Ends a sequence for a reason outside its tokens; no effect when it has ended.
    fn end(&mut self, seq: SeqId, reason: FinishReason, error: Option<String>) {
        if let Some(sequence) = self.remove(seq) {
            let kept = sequence.num_generated();
            self.report_end(&sequence, reason, kept, error);
        }
    }

    fn remove(&mut self, seq: SeqId) -> Option<Sequence> {
        let sequence = self.scheduler.remove(seq)?;
        self.leave(&sequence);
        Some(sequence)
    }

    /// Keeps the count of requests that never had a place.
    fn leave(&self, sequence: &Sequence) {
        if sequence.num_cached.is_none() {
            self.shared.stats.queued.fetch_sub(1, Relaxed);
        }
    }

    fn report_end(
        &mut self,
        sequence: &Sequence,
        reason: FinishReason,
        kept: u32,
        error: Option<String>,
    ) {
        let Some(client) = self.clients.remove(&sequence.id) else {
            return;
        };
        self.shared.stats.in_system.fetch_sub(1, Relaxed);
        self.deliveries.push(Delivery {
            stream: Arc::clone(client.stream.cell()),
            sender: Some(client.stream),
            tokens: Vec::new(),
            cached_prompt_tokens: sequence.num_cached.unwrap_or(0),
            // No effect on a stream that its last token has ended.
            finish: Some(Finish {
                reason,
                stop_token: None,
                error,
            }),
        });
        self.observer.on_finished(&FinishedRequest {
            seq: sequence.id,
            reason,
            num_prompt_tokens: sequence.num_prompt(),
            num_cached_tokens: sequence.num_cached.unwrap_or(0),
            num_generation_tokens: kept,
            max_tokens: sequence.params.max_tokens,
            num_preemptions: sequence.num_preemptions,
            arrival: client.arrival,
            queued: client.queued,
            scheduled: client.scheduled,
            first_token: client.first_token,
            last_token: client.last_token,
            finished: Instant::now(),
        });
    }

    /// Brings gauges up to date, then wakes the clients: who has seen a token also sees it counted.
    fn deliver(&mut self) {
        self.publish_gauges();
        for delivery in self.deliveries.drain(..) {
            delivery.stream.push(
                delivery.tokens,
                delivery.cached_prompt_tokens,
                delivery.finish,
            );
            drop(delivery.sender);
        }
    }

    fn publish_gauges(&self) {
        let stats = &self.shared.stats;
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        stats
            .running
            .store(count(self.scheduler.num_running()), Relaxed);
        stats
            .waiting
            .store(count(self.scheduler.num_waiting()), Relaxed);
        stats
            .blocks_free
            .store(self.scheduler.blocks().num_free(), Relaxed);
        let counters = self.scheduler.counters();
        stats
            .prefix_cache_queries
            .store(counters.prefix_queries, Relaxed);
        stats.prefix_cache_hits.store(counters.prefix_hits, Relaxed);
        stats.preemptions.store(counters.preemptions, Relaxed);
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
