//! A request body that streams to a replica and can be sent again to another.
//!
//! Chunks go on as they arrive; up to [`BodyLimits::replay`] bytes of them are also kept (a chunk is reference
//! counted, so keeping one copies nothing). While nothing was dropped the body can be replayed from its beginning.
//!
//! Invariants: only the newest attempt reads from the client, older ones end in an error; no more than
//! [`BodyLimits::total`] bytes are ever passed on; a body that stands still for [`BodyLimits::idle`] ends in an error.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use hyper::body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep};

use super::error::GatewayError;
use super::model_field::{ModelScanner, Scan};

/// The error type of bodies.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Bounds of one request body.
#[derive(Debug, Clone, Copy)]
pub struct BodyLimits {
    /// Most bytes in all.
    pub total: u64,
    /// Most bytes kept for another attempt, and read to find `model`.
    pub replay: usize,
    /// Longest pause between two chunks.
    pub idle: Duration,
}

struct Inner<B> {
    source: B,
    limits: BodyLimits,
    kept: Vec<Bytes>,
    kept_bytes: usize,
    /// Something was passed on that is not in `kept`.
    overflowed: bool,
    total: u64,
    ended: bool,
    trailers: Option<HeaderMap>,
    failure: Option<GatewayError>,
    attempt: u64,
    idle: Pin<Box<Sleep>>,
    idle_armed: bool,
}

/// The handle that stays with the gateway.
pub struct ReplayBody<B>(Arc<Mutex<Inner<B>>>);

/// What one attempt sends.
pub struct AttemptBody<B> {
    shared: Arc<Mutex<Inner<B>>>,
    attempt: u64,
    next: usize,
    done: bool,
    length: Option<u64>,
}

impl<B> ReplayBody<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    /// Wraps a body that nobody has read from.
    pub fn new(source: B, limits: BodyLimits) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            ended: source.is_end_stream(),
            source,
            limits,
            kept: Vec::new(),
            kept_bytes: 0,
            overflowed: false,
            total: 0,
            trailers: None,
            failure: None,
            attempt: 0,
            idle: Box::pin(tokio::time::sleep(limits.idle)),
            idle_armed: false,
        })))
    }

    /// Why the client's body failed, if it did.
    #[must_use]
    pub fn failure(&self) -> Option<GatewayError> {
        lock(&self.0).failure.clone()
    }

    /// Whether an attempt from the beginning is possible.
    #[must_use]
    pub fn can_replay(&self) -> bool {
        let inner = lock(&self.0);
        !inner.overflowed && inner.failure.is_none()
    }

    /// The body for the next attempt, whose `Content-Length` is `length`; earlier attempts end.
    #[must_use]
    pub fn attempt(&self, length: Option<u64>) -> AttemptBody<B> {
        let mut inner = lock(&self.0);
        inner.attempt += 1;
        AttemptBody {
            attempt: inner.attempt,
            next: 0,
            done: false,
            length,
            shared: Arc::clone(&self.0),
        }
    }

    /// Reads until `model` is known, at most [`BodyLimits::replay`] bytes.
    ///
    /// # Errors
    /// The body failed, or it has no usable `model` within the bound.
    pub async fn model(&self) -> Result<(String, std::ops::Range<usize>), GatewayError> {
        let mut scanner = ModelScanner::default();
        let mut seen = BytesMut::new();
        loop {
            let chunk = self.keep_chunk().await?;
            let complete = chunk.is_none();
            seen.extend_from_slice(&chunk.unwrap_or_default());
            match scanner.scan(&seen, complete) {
                Scan::Found { model, literal } => return Ok((model, literal)),
                Scan::Missing(reason) => return Err(GatewayError::ModelMissing { reason }),
                Scan::NeedMore if seen.len() >= lock(&self.0).limits.replay => {
                    return Err(GatewayError::ModelMissing {
                        reason: "`model` does not come early enough in the body",
                    });
                }
                Scan::NeedMore => {}
            }
        }
    }

    /// The client's next chunk, kept for the attempts.
    async fn keep_chunk(&self) -> Result<Option<Bytes>, GatewayError> {
        std::future::poll_fn(|cx| {
            let mut inner = lock(&self.0);
            let chunk = inner.poll_chunk(cx);
            if let Poll::Ready(Some(Ok(chunk))) = &chunk {
                inner.kept_bytes += chunk.len();
                inner.kept.push(chunk.clone());
            }
            chunk
        })
        .await
        .transpose()
    }

    /// The beginning of the body, of `bytes` or a chunk more, less if it ends before or may not be kept.
    ///
    /// # Errors
    /// The body failed.
    pub async fn beginning(&self, bytes: usize) -> Result<Bytes, GatewayError> {
        loop {
            let (kept, most) = {
                let inner = lock(&self.0);
                (inner.kept_bytes, inner.limits.replay)
            };
            if kept >= bytes.min(most) || self.keep_chunk().await?.is_none() {
                return Ok(Bytes::from(lock(&self.0).kept.concat()));
            }
        }
    }

    /// Bytes kept for other attempts.
    #[must_use]
    pub fn kept_bytes(&self) -> usize {
        lock(&self.0).kept_bytes
    }

    /// Puts another JSON string in place of the literal that [`Self::model`] found; returns by how many bytes the
    /// body grew.
    pub fn replace(&self, literal: &std::ops::Range<usize>, value: &str) -> i64 {
        let mut inner = lock(&self.0);
        let old = inner.kept.concat();
        let new_literal = serde_json::Value::from(value).to_string();
        let mut new = BytesMut::with_capacity(old.len() + new_literal.len());
        new.extend_from_slice(&old[..literal.start]);
        new.extend_from_slice(new_literal.as_bytes());
        new.extend_from_slice(&old[literal.end..]);
        inner.kept_bytes = new.len();
        inner.kept = vec![new.freeze()];
        signed(new_literal.len()) - signed(literal.len())
    }
}

fn signed(length: usize) -> i64 {
    i64::try_from(length).expect("a body prefix fits: this is a bug")
}

impl<B> Inner<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    /// The client's next chunk. A failure is remembered and given to everyone who asks again.
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, GatewayError>>> {
        if let Some(failure) = &self.failure {
            return Poll::Ready(Some(Err(failure.clone())));
        }
        while !self.ended {
            let frame = match Pin::new(&mut self.source).poll_frame(cx) {
                Poll::Ready(frame) => frame,
                Poll::Pending => {
                    ready!(self.poll_idle(cx));
                    return self.fail(GatewayError::BodyTimeout);
                }
            };
            self.idle_armed = false;
            match frame {
                None => self.ended = true,
                Some(Err(error)) => {
                    let reason = error.into().to_string();
                    return self.fail(GatewayError::BodyBroken { reason });
                }
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(chunk) if chunk.is_empty() => {}
                    Ok(chunk) => {
                        self.total = self.total.saturating_add(chunk.len() as u64);
                        let limit = self.limits.total;
                        if self.total > limit {
                            return self.fail(GatewayError::BodyTooLarge { limit });
                        }
                        return Poll::Ready(Some(Ok(chunk)));
                    }
                    Err(frame) => self.trailers = frame.into_trailers().ok(),
                },
            }
        }
        Poll::Ready(None)
    }

    /// Ready when the client has stood still for too long.
    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.idle_armed {
            self.idle_armed = true;
            let deadline = Instant::now() + self.limits.idle;
            self.idle.as_mut().reset(deadline);
        }
        self.idle.as_mut().poll(cx)
    }

    fn fail(&mut self, failure: GatewayError) -> Poll<Option<Result<Bytes, GatewayError>>> {
        self.failure = Some(failure.clone());
        Poll::Ready(Some(Err(failure)))
    }
}

/// A later attempt has taken over.
#[derive(Debug, thiserror::Error)]
#[error("the request is being sent to another replica")]
struct Superseded;

impl<B> Body for AttemptBody<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        if this.done {
            return Poll::Ready(None);
        }
        let mut inner = lock(&this.shared);
        if inner.attempt != this.attempt {
            return Poll::Ready(Some(Err(Box::new(Superseded))));
        }
        if let Some(chunk) = inner.kept.get(this.next) {
            this.next += 1;
            return Poll::Ready(Some(Ok(Frame::data(chunk.clone()))));
        }
        match ready!(inner.poll_chunk(cx)) {
            Some(Ok(chunk)) => {
                let fits = inner.kept_bytes + chunk.len() <= inner.limits.replay;
                if fits && !inner.overflowed {
                    inner.kept_bytes += chunk.len();
                    inner.kept.push(chunk.clone());
                    this.next += 1;
                } else {
                    inner.overflowed = true;
                    inner.kept = Vec::new();
                    inner.kept_bytes = 0;
                    this.next = 0;
                }
                Poll::Ready(Some(Ok(Frame::data(chunk))))
            }
            Some(Err(failure)) => Poll::Ready(Some(Err(Box::new(failure)))),
            None => {
                this.done = true;
                let trailers = inner.trailers.clone().map(|t| Ok(Frame::trailers(t)));
                Poll::Ready(trailers)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        if self.done {
            return true;
        }
        let inner = lock(&self.shared);
        inner.ended && self.next >= inner.kept.len() && inner.trailers.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        self.length
            .map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

/// A poisoned lock only means that another attempt panicked; the state is checked before each use.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "tests/request_body.rs"]
mod tests;
