//! The engine thread: takes commands, launches steps, waits for them.

mod results;

use std::{
    any::Any,
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use super::{
    clients::Clients,
    constraint::GrammarState,
    handle::{Command, Phase, Shared},
    input::InputBuilder,
    observer::EngineObserver,
    pooling::PooledPrompts,
    prompt_logprobs::PromptLogprobs,
    request::{FinishReason, SeqId},
    scheduler::{Scheduler, SchedulerOutput},
    sequence::Sequence,
    stream::Finish,
};
use crate::model_runner::{ModelRunner, RunnerError, StepId, StepOutput};

/// How long one poll of the runner waits; the loop polls until the step is done.
const POLL_WAIT: Duration = Duration::from_millis(200);

/// How often an engine without work says that it waits for some, so that one that hangs is told from it.
pub const IDLE_BEAT: Duration = Duration::from_millis(250);

/// How long an engine is without work before it proves the block pool: that takes milliseconds where the pool is large, which
/// the next of requests that come one after another would wait.
const PROOF_AFTER: Duration = Duration::from_secs(1);

/// A step that was handed to the runner, or that the runner refused (`runner_step` is `None`) while others run.
struct InFlight {
    plan: SchedulerOutput,
    runner_step: Option<StepId>,
    submitted: Instant,
}

/// Everything the engine thread owns.
pub(super) struct Core {
    runner: Box<dyn ModelRunner>,
    scheduler: Scheduler,
    clients: Clients,
    in_flight: VecDeque<InFlight>,
    input: InputBuilder,
    shared: Arc<Shared>,
    /// Requests with a deadline, the earliest first; those that ended before it are passed over.
    deadlines: BinaryHeap<Reverse<(Instant, SeqId)>>,
    prompt_logprobs: PromptLogprobs,
    pooled: PooledPrompts,
    /// Set while there is work.
    busy: bool,
    /// When the pool is proved, unless there is work before; means nothing while there is.
    proof_due: Option<Instant>,
    /// Set when every sequence waits for its mask.
    blocked: bool,
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
            clients: Clients::new(Arc::clone(&shared), observer),
            in_flight: VecDeque::new(),
            input: InputBuilder::default(),
            deadlines: BinaryHeap::new(),
            prompt_logprobs: PromptLogprobs::default(),
            pooled: PooledPrompts::default(),
            shared,
            busy: false,
            proof_due: None,
            blocked: false,
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
        // Close first, so that nothing can be enqueued behind our back.
        let commands = self.shared.close(error.clone());
        let queued = commands.into_iter().filter_map(|command| match command {
            Command::Add(new) => Some(new.stream),
            Command::Finish { .. } | Command::Abort(_) | Command::Mask(_) => None,
        });
        self.clients.close(queued, error.as_deref());
        let stats = &self.shared.stats;
        for gauge in [
            &stats.in_system,
            &stats.queued,
            &stats.running,
            &stats.waiting,
        ] {
            gauge.store(0, Relaxed);
        }
        stats.waiting_tokens.store(0, Relaxed);
        let shared = Arc::clone(&self.shared);
        if error.is_none() {
            // Whoever waits for the end may end the process: give the device back before. A lost one might not take it.
            drop(self);
        }
        shared.exit();
    }

    fn run_steps(&mut self) -> Result<(), RunnerError> {
        let depth = self.runner.depth().max(1);
        while self.take_commands()? {
            while self.in_flight.len() < depth && self.launch_step()? {}
            if !self.in_flight.is_empty() {
                self.finish_step()?;
            } else if self.scheduler.awaits_masks() {
                self.blocked = true;
            } else if let Some(stuck) = self.scheduler.first_waiting() {
                // Cannot happen (see `scheduler`); if it does, one request pays for it, not the engine.
                tracing::error!(
                    seq = stuck.0,
                    "a request cannot be scheduled in an idle engine: this is a bug"
                );
                let message = "the request could not be scheduled: this is a bug in the server";
                self.end(stuck, Finish::failed(message.to_owned()));
            }
            self.deliver();
        }
        if cfg!(debug_assertions) {
            self.prove_pool();
        }
        Ok(())
    }

    /// Carries out what was enqueued; waits for something when there is no work. False when the engine is to end.
    fn take_commands(&mut self) -> Result<bool, RunnerError> {
        let shared = Arc::clone(&self.shared);
        let mut inbox = shared.lock();
        let mut rested = false;
        while inbox.commands.is_empty() && (self.is_idle() || self.blocked) {
            if !rested {
                drop(inbox);
                if self.is_idle() {
                    self.be_idle();
                }
                self.runner.rest()?;
                rested = true;
                inbox = shared.lock();
                continue;
            }
            let until = match inbox.phase {
                Phase::Draining { .. } if self.is_idle() => break,
                Phase::Draining { deadline } => Some(deadline),
                Phase::Open | Phase::Closed { .. } => None,
            };
            let first = self.deadlines.peek().map(|Reverse((at, _))| *at);
            let now = Instant::now();
            let left = until
                .into_iter()
                .chain(first)
                .min()
                .map(|until| until.saturating_duration_since(now));
            if left == Some(Duration::ZERO) {
                break;
            }
            if self.is_idle() {
                // Not when all sequences wait for their masks: that is work, and may hang too.
                shared.stats.show_life();
            }
            inbox = shared.wait(inbox, left.map_or(IDLE_BEAT, |left| left.min(IDLE_BEAT)));
            rested = false;
        }
        self.blocked = false;
        let commands = std::mem::take(&mut inbox.commands);
        let phase = inbox.phase.clone();
        drop(inbox);
        for command in commands {
            self.carry_out(command);
        }
        self.end_late();
        match phase {
            Phase::Draining { deadline } => {
                if Instant::now() >= deadline {
                    for seq in self.clients.ids() {
                        self.end(seq, Finish::because(FinishReason::Abort));
                    }
                }
                if self.is_idle() {
                    self.deliver();
                    return Ok(false);
                }
                Ok(true)
            }
            Phase::Open | Phase::Closed { .. } => Ok(true),
        }
    }

    /// Ends the requests whose deadline has passed.
    fn end_late(&mut self) {
        while let Some(&Reverse((deadline, seq))) = self.deadlines.peek() {
            if deadline > Instant::now() {
                return;
            }
            self.deadlines.pop();
            self.end(seq, Finish::late());
        }
    }

    fn is_idle(&self) -> bool {
        self.scheduler.is_idle() && self.in_flight.is_empty()
    }

    fn be_idle(&mut self) {
        if self.busy {
            self.busy = false;
            self.deadlines.clear();
            self.deliver();
            self.proof_due = Some(Instant::now() + PROOF_AFTER);
            // What is seen at a glance is not put off.
            if !self.scheduler.blocks().all_free() {
                self.prove_pool();
            }
        } else if self.proof_due.is_some_and(|due| due <= Instant::now()) {
            self.prove_pool();
        }
    }

    fn prove_pool(&mut self) {
        self.proof_due = None;
        if let Err(error) = self.scheduler.check_integrity() {
            // No sequence exists, so nothing is lost but the prefix cache.
            tracing::error!(%error, "the KV-cache pool is rebuilt: this is a bug");
            debug_assert!(false, "{error}");
            self.scheduler = Scheduler::new(&self.shared.config, &self.shared.limits);
        }
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::Add(new) => {
                self.busy = true;
                if let Some(deadline) = new.deadline {
                    self.deadlines.push(Reverse((deadline, new.sequence.id)));
                }
                let sequence = self.clients.add(*new);
                self.scheduler.add(sequence);
            }
            Command::Finish { seq, num_tokens } => {
                if let Some(sequence) = self.remove(seq) {
                    let kept = sequence.num_generated().min(num_tokens);
                    let finish = Finish::because(FinishReason::Stop);
                    self.clients.end(&sequence, Vec::new(), kept, finish);
                }
            }
            Command::Abort(seq) => self.end(seq, Finish::because(FinishReason::Abort)),
            Command::Mask(seq) => self.judge_grammar(seq),
        }
    }

    /// A sequence's mask is ready, or there is none: the grammar ends, or gave up.
    fn judge_grammar(&mut self, seq: SeqId) {
        let Some(sequence) = self.scheduler.sequence(seq) else {
            return;
        };
        match sequence.constraint.grammar().map(|grammar| grammar.state()) {
            Some(GrammarState::Ended) => self.end(seq, Finish::because(FinishReason::Stop)),
            Some(GrammarState::Failed(message)) => self.end(seq, Finish::refused(message)),
            None | Some(GrammarState::Pending | GrammarState::Ready(_)) => {}
        }
    }

    /// Plans a step and hands it to the runner. False when there is nothing to compute now.
    fn launch_step(&mut self) -> Result<bool, RunnerError> {
        let plan = self.scheduler.schedule();
        let now = Instant::now();
        for admitted in &plan.admitted {
            if admitted.first {
                self.shared.stats.queued.fetch_sub(1, Relaxed);
            }
            self.clients.scheduled(admitted.seq, now);
        }
        if plan.items.is_empty() {
            return Ok(false);
        }
        self.publish_gauges();
        let vocab_size = self.shared.limits.vocab_size;
        self.input.prepare(&plan, &self.scheduler, vocab_size);
        let submitted = self.runner.submit(&self.input.model).and_then(|step| {
            self.runner.sample(step, &self.input.sample)?;
            Ok(step)
        });
        let runner_step = match submitted {
            Ok(step) => Some(step),
            Err(error) => {
                self.fail_step(&plan, &error)?;
                // Its turn comes after the steps before it: only then may its blocks be used again.
                None
            }
        };
        self.in_flight.push_back(InFlight {
            plan,
            runner_step,
            submitted: now,
        });
        Ok(true)
    }

    /// Waits for the oldest step and deals out its tokens.
    fn finish_step(&mut self) -> Result<(), RunnerError> {
        let Some(step) = self.in_flight.pop_front() else {
            return Ok(());
        };
        if let Some(id) = step.runner_step {
            match self.wait_for(id) {
                Ok(output) => self.deal_out(&step, output),
                Err(error) => self.fail_step(&step.plan, &error)?,
            }
        }
        self.scheduler.complete(step.plan.step);
        self.shared.stats.show_life();
        Ok(())
    }

    fn wait_for(&mut self, step: StepId) -> Result<StepOutput, RunnerError> {
        loop {
            if let Some(output) = self.runner.poll(step, POLL_WAIT)? {
                return Ok(output);
            }
        }
    }

    /// Ends a sequence for a reason outside its tokens; no effect when it has ended.
    fn end(&mut self, seq: SeqId, finish: Finish) {
        if let Some(sequence) = self.remove(seq) {
            let kept = sequence.num_generated();
            self.clients.end(&sequence, Vec::new(), kept, finish);
        }
    }

    fn remove(&mut self, seq: SeqId) -> Option<Sequence> {
        let sequence = self.scheduler.remove(seq)?;
        self.prompt_logprobs.take(seq);
        self.pooled.forget(seq);
        if sequence.num_cached.is_none() {
            // It never had a place: it leaves the queue here.
            self.shared.stats.queued.fetch_sub(1, Relaxed);
        }
        Some(sequence)
    }

    /// Brings gauges up to date, then hands out the news.
    fn deliver(&mut self) {
        self.publish_gauges();
        self.clients.deliver();
    }

    fn publish_gauges(&self) {
        let stats = &self.shared.stats;
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let counters = self.scheduler.counters();
        for (gauge, value) in [
            (&stats.running, count(self.scheduler.num_running())),
            (&stats.waiting, count(self.scheduler.num_waiting())),
            (&stats.blocks_free, self.scheduler.blocks().num_free()),
        ] {
            gauge.store(value, Relaxed);
        }
        stats
            .waiting_tokens
            .store(self.scheduler.waiting_tokens(), Relaxed);
        for (counter, value) in [
            (&stats.prefix_cache_queries, counters.prefix_queries),
            (&stats.prefix_cache_hits, counters.prefix_hits),
            (&stats.preemptions, counters.preemptions),
        ] {
            counter.store(value, Relaxed);
        }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
