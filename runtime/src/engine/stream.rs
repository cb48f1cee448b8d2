//! The way of tokens from the engine to one client: a coalescing buffer, bounded by the request's `max_tokens`.
//!
//! The engine only appends and wakes; it never waits for a reader.

use std::{
    future::poll_fn,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Instant,
};

use super::{
    handle::{Command, Shared},
    request::{FinishReason, GeneratedToken, SeqId, TokenId, TokenLogprobs},
};

/// How a sequence ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// The EOS or stop id that ended it: the last token of the stream, counted but without text.
    pub stop_token: Option<TokenId>,
    /// What went wrong, when `reason` is [`FinishReason::Error`], or [`FinishReason::Abort`] at the request's deadline.
    pub error: Option<String>,
    /// The request itself is at fault: it asked for what cannot be done.
    pub refused: bool,
}

impl Finish {
    /// An end without a stop token or an error.
    #[must_use]
    pub fn because(reason: FinishReason) -> Self {
        Self {
            reason,
            stop_token: None,
            error: None,
            refused: false,
        }
    }

    /// The request's deadline has passed.
    #[must_use]
    pub fn late() -> Self {
        Self {
            error: Some("the request's time was up before it was finished".to_owned()),
            ..Self::because(FinishReason::Abort)
        }
    }

    /// The request asked for what cannot be done.
    #[must_use]
    pub fn refused(error: String) -> Self {
        Self {
            refused: true,
            ..Self::failed(error)
        }
    }

    /// The request failed.
    #[must_use]
    pub fn failed(error: String) -> Self {
        Self {
            error: Some(error),
            ..Self::because(FinishReason::Error)
        }
    }
}

/// When a sequence went through its phases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timings {
    /// The engine took it in.
    pub queued: Instant,
    /// It was last given a place.
    pub scheduled: Option<Instant>,
    /// Its first token was known.
    pub first_token: Option<Instant>,
    /// Its last token was known.
    pub last_token: Option<Instant>,
}

/// What has happened since the last update.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StreamUpdate {
    /// New tokens, in order; empty only together with `finish`.
    pub tokens: Vec<GeneratedToken>,
    /// Set once, in the last update.
    pub finish: Option<Finish>,
    /// Prompt tokens whose KV came from the prefix cache.
    pub cached_prompt_tokens: u32,
    /// Set once, with the first token, when the request asked for them: one per prompt token after the first.
    pub prompt_logprobs: Option<Vec<TokenLogprobs>>,
    /// Set once, with the end of a request for an embedding: `[hidden_size]`, as pooled.
    pub embedding: Option<Vec<f32>>,
}

#[derive(Default)]
struct Buffer {
    tokens: Vec<GeneratedToken>,
    finish: Option<Finish>,
    /// `finish` was set once; it may have been taken since.
    finished: bool,
    cached_prompt_tokens: u32,
    prompt_logprobs: Option<Vec<TokenLogprobs>>,
    embedding: Option<Vec<f32>>,
    /// So far.
    timings: Option<Timings>,
    /// The task that waits for the next update.
    waker: Option<Waker>,
}

/// The buffer that engine and client share.
#[derive(Default)]
pub(super) struct StreamCell {
    buffer: Mutex<Buffer>,
    /// Wakes a thread in [`SequenceStream::next_blocking`].
    ready: Condvar,
}

impl StreamCell {
    fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Buffer)) {
        let waker = {
            let mut buffer = self.lock();
            change(&mut buffer);
            buffer.waker.take()
        };
        match waker {
            Some(waker) => waker.wake(),
            None => self.ready.notify_one(),
        }
    }

    /// Appends tokens, and the end if there is one, and wakes the reader. After an end nothing is taken.
    pub(super) fn push(
        &self,
        tokens: Vec<GeneratedToken>,
        cached_prompt_tokens: u32,
        timings: Option<Timings>,
        finish: Option<Finish>,
    ) {
        self.change(|buffer| {
            if buffer.finished {
                return;
            }
            buffer.timings = timings.or(buffer.timings);
            buffer.cached_prompt_tokens = buffer.cached_prompt_tokens.max(cached_prompt_tokens);
            if buffer.tokens.is_empty() {
                buffer.tokens = tokens;
            } else {
                buffer.tokens.extend(tokens);
            }
            buffer.finished = finish.is_some();
            buffer.finish = finish;
        });
    }

    /// The prompt's log-probabilities; the reader takes them with the tokens that follow.
    pub(super) fn set_prompt_logprobs(&self, logprobs: Vec<TokenLogprobs>) {
        self.lock().prompt_logprobs = Some(logprobs);
    }

    /// The prompt's embedding; the reader takes it with the end that follows.
    pub(super) fn set_embedding(&self, embedding: Vec<f32>) {
        self.lock().embedding = Some(embedding);
    }

    fn take(buffer: &mut Buffer) -> Option<StreamUpdate> {
        if buffer.tokens.is_empty() && buffer.finish.is_none() {
            return None;
        }
        Some(StreamUpdate {
            tokens: std::mem::take(&mut buffer.tokens),
            cached_prompt_tokens: buffer.cached_prompt_tokens,
            prompt_logprobs: buffer.prompt_logprobs.take(),
            embedding: buffer.embedding.take(),
            finish: buffer.finish.take(),
        })
    }
}

/// The engine's end of a stream. However it is lost, the reader gets an end.
pub(super) struct StreamSender(Arc<StreamCell>);

impl StreamSender {
    pub(super) fn new(cell: Arc<StreamCell>) -> Self {
        Self(cell)
    }

    pub(super) fn cell(&self) -> &Arc<StreamCell> {
        &self.0
    }
}

impl Drop for StreamSender {
    fn drop(&mut self) {
        let finish = Finish::failed("the engine lost the request".to_owned());
        self.0.push(Vec::new(), 0, None, Some(finish));
    }
}

/// The tokens of one sequence. Dropping it before its end aborts the sequence at the next step.
pub struct SequenceStream {
    id: SeqId,
    cell: Arc<StreamCell>,
    shared: Arc<Shared>,
    /// The last update was taken, or the reader ended the stream itself.
    ended: bool,
}

impl SequenceStream {
    pub(super) fn new(id: SeqId, cell: Arc<StreamCell>, shared: Arc<Shared>) -> Self {
        Self {
            id,
            cell,
            shared,
            ended: false,
        }
    }

    /// When it went through its phases, as far as it is; `None` before its first token.
    #[must_use]
    pub fn timings(&self) -> Option<Timings> {
        self.cell.lock().timings
    }

    /// The sequence's id.
    #[must_use]
    pub fn id(&self) -> SeqId {
        self.id
    }

    /// Everything new since the last call, waiting for something; `None` after the update that has `finish`.
    /// Safe to cancel: nothing is lost.
    pub async fn next(&mut self) -> Option<StreamUpdate> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// [`next`](Self::next) for poll-based callers.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<StreamUpdate>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let mut buffer = self.cell.lock();
        match StreamCell::take(&mut buffer) {
            Some(update) => {
                self.ended = update.finish.is_some();
                Poll::Ready(Some(update))
            }
            None => {
                buffer.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    /// [`next`](Self::next) for a thread outside any async runtime.
    pub fn next_blocking(&mut self) -> Option<StreamUpdate> {
        if self.ended {
            return None;
        }
        let mut buffer = self.cell.lock();
        loop {
            if let Some(update) = StreamCell::take(&mut buffer) {
                self.ended = update.finish.is_some();
                return Some(update);
            }
            // A task that polled before has left the stream to this thread.
            buffer.waker = None;
            buffer = self
                .cell
                .ready
                .wait(buffer)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends the sequence as [`FinishReason::Stop`] after its first `num_tokens` tokens (a stop string was found in
    /// them). Later tokens are dropped and not counted; this stream yields nothing more.
    pub fn finish_at(&mut self, num_tokens: u32) {
        if !self.ended {
            self.ended = true;
            self.shared.send(Command::Finish {
                seq: self.id,
                num_tokens,
            });
        }
    }
}

impl Drop for SequenceStream {
    fn drop(&mut self) {
        if !self.ended && !self.cell.lock().finished {
            self.shared.send(Command::Abort(self.id));
        }
    }
}

impl std::fmt::Debug for SequenceStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SequenceStream")
            .field("id", &self.id)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}
