//! Tensor parallelism in one process: a runner per rank, each on its own thread, in lock step on one schedule.
//!
//! ```text
//!                 ┌─► leader (the engine's thread)      sums and logits
//! engine ─ step ──┼─► follower 1 (a thread)        ◄──► meet in `group` (CPU)
//!                 └─► follower 2 …                      or in peer memory (CUDA)
//! ```
//!
//! Every rank gets the same inputs, computes the same logits and draws the same tokens; only the leader's are handed out.
//!
//! Invariants:
//! - a step is checked before any rank sees it; behind that, whatever fails on one rank is fatal for all;
//! - followers compare their tokens with the leader's, so ranks that drift apart end the process instead of its answers;
//! - nobody waits for a rank longer than [`STEP_PATIENCE`], in a step, between steps, or at rest, where ranks go on meeting;
//!   where the leader itself hangs, a follower ends the process [`GRACE`] later.

mod group;

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use group::Group;
pub use group::{LOAD_PATIENCE, Member, RankError, STEP_PATIENCE};

use super::{
    ModelCosts, ModelInput, ModelRunner, RunnerError, RunnerLimits, SampleInput, StepId,
    StepOutput, check::check,
};
use crate::engine::request::TokenId;

/// How long followers leave the leader to report a failure before they end the process.
pub const GRACE: Duration = Duration::from_secs(2);
/// Commands that a follower may be behind: those of the steps in flight, and some.
const MAX_COMMANDS: usize = 16;
/// How long the leader waits for its own result before it looks for failures elsewhere.
const LOOK_AROUND: Duration = Duration::from_millis(50);

/// Tokens that the leader drew, row by row.
type Drawn = Arc<[Option<TokenId>]>;

enum Command {
    Submit(Arc<ModelInput>),
    Sample(StepId, Arc<SampleInput>),
    /// The leader has the step's result: these tokens.
    Poll(StepId, Drawn),
    /// There is no step to make.
    Rest,
}

struct Follower {
    commands: Option<SyncSender<Command>>,
    thread: Option<JoinHandle<()>>,
}

/// Runs a model on several ranks.
pub struct RankedRunner<R> {
    leader: R,
    /// The leader's place among the others.
    place: Member,
    group: Arc<Group>,
    followers: Vec<Follower>,
    /// The leader has been called and has not returned.
    is_leading: bool,
}

impl<R: ModelRunner + 'static> RankedRunner<R> {
    /// Builds a runner for each rank, at the same time; `build` is given the rank's place.
    ///
    /// # Errors
    /// The leader's error; a follower's reaches it where ranks meet.
    pub fn start<E>(
        ranks: usize,
        build: impl Fn(Member) -> Result<R, E> + Send + Sync + 'static,
    ) -> Result<Self, E>
    where
        E: From<RankError> + std::error::Error + 'static,
    {
        Self::start_with(ranks, STEP_PATIENCE, build)
    }

    /// [`Self::start`] with another patience.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with<E>(
        ranks: usize,
        step_patience: Duration,
        build: impl Fn(Member) -> Result<R, E> + Send + Sync + 'static,
    ) -> Result<Self, E>
    where
        E: From<RankError> + std::error::Error + 'static,
    {
        let group = Group::new(ranks, step_patience);
        let build = Arc::new(build);
        let mut followers = Vec::new();
        for rank in 1..ranks {
            let (commands, inbox) = sync_channel(MAX_COMMANDS);
            let (member, ready) = (Member::new(&group, rank), Member::new(&group, rank));
            let build = Arc::clone(&build);
            let body = move || {
                let runner = build(member).and_then(|runner| {
                    ready.exchange(())?;
                    Ok(runner)
                });
                match runner {
                    Ok(runner) => follow(runner, &ready, &inbox),
                    Err(error) => {
                        ready
                            .group
                            .fail(format!("tensor-parallel rank {rank} cannot start: {error}"));
                    }
                }
            };
            let thread = thread::Builder::new()
                .name(format!("rank-{rank}"))
                .spawn(body);
            let thread = thread.map_err(|error| {
                group.fail(format!(
                    "the system refused a thread for rank {rank}: {error}"
                ))
            })?;
            followers.push(Follower {
                commands: Some(commands),
                thread: Some(thread),
            });
        }
        let ready = Member::new(&group, 0);
        let leader = build(Member::new(&group, 0)).and_then(|runner| {
            ready.exchange(())?;
            Ok(runner)
        });
        match leader {
            Ok(leader) => Ok(Self {
                leader,
                place: ready,
                group,
                followers,
                is_leading: false,
            }),
            Err(error) => {
                group.fail(format!("tensor-parallel rank 0 cannot start: {error}"));
                group.report();
                Err(error)
            }
        }
    }

    /// The rank whose results are handed out.
    #[must_use]
    pub fn leader(&self) -> &R {
        &self.leader
    }

    fn broadcast(&self, command: impl Fn() -> Command) -> Result<(), RunnerError> {
        for (at, follower) in self.followers.iter().enumerate() {
            let sent = follower
                .commands
                .as_ref()
                .is_some_and(|commands| commands.try_send(command()).is_ok());
            if !sent {
                let rank = at + 1;
                let message = format!("tensor-parallel rank {rank} takes no more steps");
                return Err(self.failed(message));
            }
        }
        Ok(())
    }

    /// The failure that came first, to be told.
    fn failed(&self, message: String) -> RunnerError {
        let error = self.group.fail(message);
        self.group.report();
        error.into()
    }

    /// Calls the leader. The others have got their part, so an error of its is everyone's.
    fn lead<T>(
        &mut self,
        call: impl FnOnce(&mut R) -> Result<T, RunnerError>,
    ) -> Result<T, RunnerError> {
        self.is_leading = true;
        let result = call(&mut self.leader);
        self.is_leading = false;
        result.map_err(|error| self.failed(format!("tensor-parallel rank 0: {}", error.message)))
    }

    fn look_around(&self) -> Result<(), RunnerError> {
        match self.group.failure() {
            Some(failure) => Err(self.failed(failure.message)),
            None => Ok(()),
        }
    }
}

/// A follower's thread: does what it is told until there is nothing more, or something failed.
fn follow<R: ModelRunner>(mut runner: R, member: &Member, inbox: &Receiver<Command>) {
    // Whoever lets ranks rest does so whenever there is no step: then silence means that the leader hangs.
    let (mut leader_rests, mut leader_waits) = (false, member.group.leader_waits());
    loop {
        let received = if leader_rests {
            inbox.recv_timeout(member.step_patience())
        } else {
            inbox.recv().map_err(|_| RecvTimeoutError::Disconnected)
        };
        let waits_before = std::mem::replace(&mut leader_waits, member.group.leader_waits());
        let done = match received {
            Ok(Command::Submit(input)) => runner.submit(&input).map(|_| ()),
            Ok(Command::Sample(step, input)) => runner.sample(step, &input),
            Ok(Command::Poll(step, drawn)) => finish(&mut runner, step, &drawn),
            Ok(Command::Rest) => {
                leader_rests = true;
                runner
                    .rest()
                    .and_then(|()| member.rest().map_err(RunnerError::from))
            }
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) if leader_waits != waits_before => Ok(()),
            Err(RecvTimeoutError::Timeout) => {
                let seconds = member.step_patience().as_secs_f64();
                return give_up(
                    member,
                    format!("tensor-parallel rank 0 has not answered for {seconds} s: it hangs"),
                );
            }
        };
        if let Err(error) = done {
            let rank = member.rank();
            return give_up(
                member,
                format!("tensor-parallel rank {rank}: {}", error.message),
            );
        }
    }
}

/// A follower's end: the leader tells of it, or the process ends.
fn give_up(member: &Member, message: String) {
    let failure = member.group.fail(message);
    if !member.group.is_reported_within(GRACE) {
        tracing::error!(%failure, "the engine does not take notice: the process ends");
        std::process::abort();
    }
}

/// Takes the step's result and compares it with the leader's.
fn finish<R: ModelRunner>(
    runner: &mut R,
    step: StepId,
    drawn: &[Option<TokenId>],
) -> Result<(), RunnerError> {
    let fatal = |message: String| RunnerError {
        message,
        fatal: true,
    };
    let output = runner.poll(step, STEP_PATIENCE)?.ok_or_else(|| {
        let seconds = STEP_PATIENCE.as_secs();
        fatal(format!("step {} is not done after {seconds} s", step.0))
    })?;
    if tokens(&output)[..] != *drawn {
        let message = format!(
            "step {}: it drew other tokens than rank 0: this is a bug",
            step.0
        );
        return Err(fatal(message));
    }
    Ok(())
}

fn tokens(output: &StepOutput) -> Vec<Option<TokenId>> {
    let rows = output.rows.iter();
    rows.map(|row| row.tokens.last().map(|token| token.id))
        .collect()
}

impl<R: ModelRunner + 'static> ModelRunner for RankedRunner<R> {
    fn limits(&self) -> &RunnerLimits {
        self.leader.limits()
    }

    fn submit(&mut self, input: &ModelInput) -> Result<StepId, RunnerError> {
        check(input, self.leader.limits())?;
        self.look_around()?;
        let shared = Arc::new(input.clone());
        self.broadcast(|| Command::Submit(Arc::clone(&shared)))?;
        self.lead(|leader| leader.submit(input))
    }

    fn sample(&mut self, step: StepId, input: &SampleInput) -> Result<(), RunnerError> {
        self.look_around()?;
        let shared = Arc::new(input.clone());
        self.broadcast(|| Command::Sample(step, Arc::clone(&shared)))?;
        self.lead(|leader| leader.sample(step, input))
    }

    fn poll(&mut self, step: StepId, wait: Duration) -> Result<Option<StepOutput>, RunnerError> {
        let started = Instant::now();
        loop {
            self.look_around()?;
            let left = wait.saturating_sub(started.elapsed());
            let polled = self.lead(|leader| leader.poll(step, left.min(LOOK_AROUND)))?;
            if let Some(output) = polled {
                let drawn: Drawn = tokens(&output).into();
                self.broadcast(|| Command::Poll(step, Arc::clone(&drawn)))?;
                return Ok(Some(output));
            }
            self.group.wait_on();
            if left <= LOOK_AROUND {
                return Ok(None);
            }
        }
    }

    fn rest(&mut self) -> Result<(), RunnerError> {
        self.look_around()?;
        self.broadcast(|| Command::Rest)?;
        self.lead(ModelRunner::rest)?;
        self.place
            .rest()
            .map_err(|failure| self.failed(failure.message))
    }

    fn depth(&self) -> usize {
        self.leader.depth()
    }

    fn hidden_size(&self) -> Option<u32> {
        self.leader.hidden_size()
    }

    fn costs(&self) -> Option<ModelCosts> {
        self.leader.costs()
    }
}

impl<R> Drop for RankedRunner<R> {
    fn drop(&mut self) {
        if self.is_leading {
            self.group
                .fail("tensor-parallel rank 0 panicked".to_owned());
        }
        self.group.report();
        for follower in &mut self.followers {
            follower.commands = None;
        }
        // A follower of a failed group may hang for good.
        if self.group.failure().is_none() {
            for follower in &mut self.followers {
                let _ = follower.thread.take().map(JoinHandle::join);
            }
        }
    }
}

#[cfg(test)]
mod tests;
