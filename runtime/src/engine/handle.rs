//! The engine as seen from outside its thread: submit, stats, drain, shutdown. Everything here only enqueues.

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Poll, Waker},
    time::{Duration, Instant},
};

use super::{
    config::EngineConfig,
    request::{Request, SeqId},
    scheduler::blocks_for_request,
    sequence::Sequence,
    stats::{EngineStats, StatsCells},
    stream::{SequenceStream, StreamCell, StreamSender},
};
use crate::model_runner::{ModelCosts, RunnerLimits};

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Too many requests wait already.
    #[error("{queued} requests are waiting and the limit is {limit}: retry later")]
    QueueFull {
        /// Requests that wait.
        queued: u32,
        /// `max_num_queued_reqs`.
        limit: u32,
    },
    /// The prompt has no token.
    #[error("the prompt is empty: send at least one token")]
    EmptyPrompt,
    /// `max_tokens` is 0.
    #[error("max_tokens is 0: ask for at least one token")]
    NoTokensWanted,
    /// Prompt and output exceed the model's length.
    #[error(
        "{prompt_tokens} prompt tokens and {max_tokens} output tokens exceed the model's length of {limit}: shorten the prompt or lower max_tokens"
    )]
    TooLong {
        /// Prompt tokens.
        prompt_tokens: usize,
        /// `max_tokens`.
        max_tokens: u32,
        /// `max_model_len`.
        limit: u32,
    },
    /// The request could not run even alone.
    #[error(
        "the request needs {needed} KV-cache blocks and there are {available}: shorten the prompt, lower max_tokens or give the KV cache more memory"
    )]
    NeverFits {
        /// Blocks of its longest form.
        needed: u32,
        /// Blocks of the pool.
        available: u32,
    },
    /// A token id is outside the vocabulary.
    #[error("token id {token} is outside the vocabulary of {vocab_size}")]
    TokenOutOfRange {
        /// The id.
        token: u32,
        /// The vocabulary.
        vocab_size: u32,
    },
    /// The model's device cannot pool hidden states.
    #[error(
        "embeddings are computed on the CPU only so far: start the server with --device cpu to embed"
    )]
    NoEmbeddings,
    /// The server is draining.
    #[error("the server is shutting down: send the request to another replica")]
    ShuttingDown,
    /// The engine has failed.
    #[error("the engine has stopped: {message}")]
    EngineDead {
        /// Why.
        message: String,
    },
}

/// A sequence on its way to the engine thread.
pub(super) struct NewSequence {
    pub(super) sequence: Sequence,
    pub(super) stream: StreamSender,
    pub(super) arrival: Instant,
    pub(super) queued: Instant,
    pub(super) deadline: Option<Instant>,
}

/// What the engine thread is asked to do before its next step.
pub(super) enum Command {
    Add(Box<NewSequence>),
    Finish {
        seq: SeqId,
        num_tokens: u32,
    },
    Abort(SeqId),
    /// The mask of a sequence's next token is ready.
    Mask(SeqId),
}

/// Where the engine is in its life.
#[derive(Clone)]
pub(super) enum Phase {
    Open,
    /// Takes nothing new, finishes what it has until the deadline, aborts the rest and ends.
    Draining {
        deadline: Instant,
    },
    /// The thread has ended; with a message if it failed.
    Closed {
        error: Option<String>,
    },
}

/// Bounded: an `Add` for each queued request, one `Finish` or `Abort` and at most one `Mask` for each stream.
pub(super) struct Inbox {
    pub(super) commands: Vec<Command>,
    pub(super) phase: Phase,
    /// The thread is done: every stream has its end.
    exited: bool,
    /// Tasks that wait for the end of the thread.
    exit_wakers: Vec<Waker>,
}

/// What a runner can do beside generating.
#[derive(Debug, Clone, Copy)]
pub(super) struct Abilities {
    pub(super) hidden_size: Option<u32>,
    pub(super) costs: Option<ModelCosts>,
}

/// What engine thread, handles and streams share.
pub(super) struct Shared {
    inbox: Mutex<Inbox>,
    /// Signalled when the inbox changes: wakes an idle engine.
    work: Condvar,
    /// Signalled when the engine thread has ended.
    exited: Condvar,
    next_seq: AtomicU64,
    pub(super) stats: StatsCells,
    pub(super) limits: RunnerLimits,
    pub(super) abilities: Abilities,
    pub(super) config: EngineConfig,
}

impl Shared {
    pub(super) fn new(limits: RunnerLimits, abilities: Abilities, config: EngineConfig) -> Self {
        Self {
            inbox: Mutex::new(Inbox {
                commands: Vec::new(),
                phase: Phase::Open,
                exited: false,
                exit_wakers: Vec::new(),
            }),
            work: Condvar::new(),
            exited: Condvar::new(),
            next_seq: AtomicU64::new(1),
            stats: StatsCells::new(limits.num_blocks.saturating_sub(1)),
            limits,
            abilities,
            config,
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enqueues a command for a sequence that was submitted; no effect once the engine has ended.
    pub(super) fn send(&self, command: Command) {
        let mut inbox = self.lock();
        if !matches!(inbox.phase, Phase::Closed { .. }) {
            inbox.commands.push(command);
            self.work.notify_one();
        }
    }

    /// Waits for a change of the inbox, for `limit` at most.
    pub(super) fn wait<'a>(
        &'a self,
        inbox: MutexGuard<'a, Inbox>,
        limit: Duration,
    ) -> MutexGuard<'a, Inbox> {
        let waited = self.work.wait_timeout(inbox, limit);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// The engine thread ends: from here on nothing is taken. Gives back what was still enqueued.
    pub(super) fn close(&self, error: Option<String>) -> Vec<Command> {
        let mut inbox = self.lock();
        inbox.phase = Phase::Closed { error };
        self.stats.alive.store(false, Relaxed);
        std::mem::take(&mut inbox.commands)
    }

    /// The engine thread has told every stream: tells who waits for its end.
    pub(super) fn exit(&self) {
        let wakers = {
            let mut inbox = self.lock();
            inbox.exited = true;
            self.exited.notify_all();
            std::mem::take(&mut inbox.exit_wakers)
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Requests that may be queued now: the configured queue, and the free places if nothing waits for KV cache.
    fn queue_limit(&self) -> u32 {
        let stats = &self.stats;
        let free_places = if stats.waiting.load(Relaxed) == 0 {
            self.config
                .max_num_seqs
                .saturating_sub(stats.running.load(Relaxed))
        } else {
            0
        };
        self.config.max_num_queued_reqs.saturating_add(free_places)
    }
}

/// A running engine. Clones are the same engine; it goes on when all are dropped, until [`shutdown`](Self::shutdown).
#[derive(Clone)]
pub struct EngineHandle {
    pub(super) shared: Arc<Shared>,
}

impl EngineHandle {
    /// Hands a request to the engine; its arrival is now.
    ///
    /// # Errors
    /// [`SubmitError`] when it cannot be taken; nothing was started.
    pub fn submit(&self, request: Request) -> Result<SequenceStream, SubmitError> {
        self.submit_arrived(request, Instant::now())
    }

    /// Hands a request to the engine that reached the server at `arrival` (latencies count from there).
    ///
    /// # Errors
    /// [`SubmitError`] when it cannot be taken; nothing was started.
    pub fn submit_arrived(
        &self,
        request: Request,
        arrival: Instant,
    ) -> Result<SequenceStream, SubmitError> {
        let shared = &self.shared;
        self.check(&request)?;
        self.check_open()?;
        let seq = SeqId(shared.next_seq.fetch_add(1, Relaxed));
        let deadline = request.deadline;
        // Hashing the prompt happens here, on the caller's thread.
        let sequence = Sequence::new(seq, request, &shared.config, shared.limits.block_size);
        let stream = Arc::new(StreamCell::default());
        let new = Box::new(NewSequence {
            sequence,
            stream: StreamSender::new(Arc::clone(&stream)),
            arrival,
            queued: Instant::now(),
            deadline,
        });
        let mut inbox = shared.lock();
        Self::check_phase(&inbox.phase)?;
        let queued = shared.stats.queued.load(Relaxed);
        if queued >= shared.queue_limit() {
            drop(inbox);
            return Err(SubmitError::QueueFull {
                queued,
                limit: shared.config.max_num_queued_reqs,
            });
        }
        shared.stats.enter();
        inbox.commands.push(Command::Add(new));
        shared.work.notify_one();
        drop(inbox);
        Ok(SequenceStream::new(seq, stream, Arc::clone(shared)))
    }

    fn check_phase(phase: &Phase) -> Result<(), SubmitError> {
        match phase {
            Phase::Open => Ok(()),
            Phase::Draining { .. } | Phase::Closed { error: None } => {
                Err(SubmitError::ShuttingDown)
            }
            Phase::Closed {
                error: Some(message),
            } => Err(SubmitError::EngineDead {
                message: message.clone(),
            }),
        }
    }

    /// Whether a request would be considered at all.
    ///
    /// # Errors
    /// [`SubmitError::ShuttingDown`] or [`SubmitError::EngineDead`].
    pub fn check_open(&self) -> Result<(), SubmitError> {
        Self::check_phase(&self.shared.lock().phase)
    }

    /// Whether the request can run on this engine at all, whatever else runs.
    ///
    /// # Errors
    /// The [`SubmitError`] that [`submit`](Self::submit) would give for its size or its token ids.
    pub fn check(&self, request: &Request) -> Result<(), SubmitError> {
        let limits = &self.shared.limits;
        let params = &request.params;
        if request.prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        if params.max_tokens == 0 {
            return Err(SubmitError::NoTokensWanted);
        }
        let outputs = match request.pooling {
            None => params.max_tokens,
            Some(_) if self.shared.abilities.hidden_size.is_none() => {
                return Err(SubmitError::NoEmbeddings);
            }
            Some(_) => 0,
        };
        let length = request.prompt.len() as u64 + u64::from(outputs);
        if length > u64::from(limits.max_model_len) {
            return Err(SubmitError::TooLong {
                prompt_tokens: request.prompt.len(),
                max_tokens: outputs,
                limit: limits.max_model_len,
            });
        }
        let needed = blocks_for_request(request, limits, self.shared.config.reservation);
        let available = limits.num_blocks.saturating_sub(1);
        if needed > available {
            return Err(SubmitError::NeverFits { needed, available });
        }
        let ids = request.prompt.iter().chain(&params.stop_token_ids).copied();
        let biased = params.logit_bias.iter().map(|&(token, _)| token);
        match ids.chain(biased).find(|&token| token >= limits.vocab_size) {
            Some(token) => Err(SubmitError::TokenOutOfRange {
                token,
                vocab_size: limits.vocab_size,
            }),
            None => Ok(()),
        }
    }

    /// The engine now. Never waits for the engine.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        self.shared.stats.snapshot()
    }

    /// The runner's sizes.
    #[must_use]
    pub fn limits(&self) -> &RunnerLimits {
        &self.shared.limits
    }

    /// Width of embeddings; `None` when the model's device cannot compute them.
    #[must_use]
    pub fn hidden_size(&self) -> Option<u32> {
        self.shared.abilities.hidden_size
    }

    /// What the model costs, where there is one.
    #[must_use]
    pub fn costs(&self) -> Option<ModelCosts> {
        self.shared.abilities.costs
    }

    /// The settings in force (sizes lowered to the runner's).
    #[must_use]
    pub fn config(&self) -> &EngineConfig {
        &self.shared.config
    }

    /// Stops taking requests, lets the accepted ones finish until `deadline`, aborts the rest, and ends the thread.
    /// Returns at once; [`join`](Self::join) waits. Calling it again can only bring the deadline forward.
    pub fn drain(&self, deadline: Instant) {
        let mut inbox = self.shared.lock();
        let deadline = match inbox.phase {
            Phase::Open => deadline,
            Phase::Draining { deadline: before } => before.min(deadline),
            Phase::Closed { .. } => return,
        };
        inbox.phase = Phase::Draining { deadline };
        self.shared.stats.draining.store(true, Relaxed);
        self.shared.work.notify_one();
    }

    /// Aborts everything and ends the engine thread. Returns at once; [`join`](Self::join) waits.
    pub fn shutdown(&self) {
        self.drain(Instant::now());
    }

    /// Waits until the engine thread has ended; the error is why it failed, if it did.
    ///
    /// # Errors
    /// [`SubmitError::EngineDead`] when the engine failed instead of being shut down.
    pub async fn join(&self) -> Result<(), SubmitError> {
        std::future::poll_fn(|cx| {
            let mut inbox = self.shared.lock();
            if inbox.exited {
                return Poll::Ready(Self::exit_result(&inbox.phase));
            }
            if !inbox.exit_wakers.iter().any(|w| w.will_wake(cx.waker())) {
                inbox.exit_wakers.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await
    }

    /// [`join`](Self::join) for a thread outside any async runtime.
    ///
    /// # Errors
    /// [`SubmitError::EngineDead`] when the engine failed instead of being shut down.
    pub fn join_blocking(&self) -> Result<(), SubmitError> {
        let mut inbox = self.shared.lock();
        loop {
            if inbox.exited {
                return Self::exit_result(&inbox.phase);
            }
            inbox = self
                .shared
                .exited
                .wait(inbox)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn exit_result(phase: &Phase) -> Result<(), SubmitError> {
        match Self::check_phase(phase) {
            Err(dead @ SubmitError::EngineDead { .. }) => Err(dead),
            _ => Ok(()),
        }
    }
}

impl std::fmt::Debug for EngineHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineHandle")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}
