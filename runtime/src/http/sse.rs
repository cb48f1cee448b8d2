//! Server-sent events: `data: …` frames, `[DONE]` at the end.

use std::{convert::Infallible, fmt::Write};

use axum::{
    body::{Body, Bytes},
    response::{IntoResponse, Response},
};
use futures::stream;
use http::{HeaderName, HeaderValue, header};
use serde::Serialize;
use serde_json::Value;

use super::{
    answer::{Answer, ChoiceState},
    choices::Choices,
    message::failure,
};

/// Appends a frame.
pub(super) fn frame(out: &mut String, value: &impl Serialize) {
    out.push_str("data: ");
    match serde_json::to_string(value) {
        Ok(text) => out.push_str(&text),
        // Only maps with keys that are no strings fail: the project's own have none.
        Err(error) => tracing::error!(%error, "a frame could not be written: this is a bug"),
    }
    out.push_str("\n\n");
}

/// Appends a frame with an event's name.
pub(super) fn named_frame(out: &mut String, name: &str, value: &Value) {
    // Writing to a string cannot fail.
    let _ = write!(out, "event: {name}\ndata: {value}\n\n");
}

/// Appends the last frame.
pub(super) fn done(out: &mut String) {
    out.push_str("data: [DONE]\n\n");
}

/// An answer whose frames come from `next`, until it says `None`. All frames of one call are sent together.
pub(super) fn response<S, F>(state: S, next: fn(S) -> F) -> Response
where
    S: Send + 'static,
    F: Future<Output = Option<(String, S)>> + Send + 'static,
{
    let frames = stream::unfold(Some(state), move |state| async move {
        let (frames, state) = next(state?).await?;
        Some((Ok::<_, Infallible>(Bytes::from(frames)), Some(state)))
    });
    let mut response = Body::from_stream(frames).into_response();
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream; charset=utf-8"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies that buffer would turn a stream into one late answer.
    headers.insert(
        HeaderName::from_static("x-accel-buffering"),
        HeaderValue::from_static("no"),
    );
    response
}

/// A stream of OpenAI chunks.
pub(super) struct ChunkStream {
    pub(super) answer: Answer,
    pub(super) choices: Choices,
    pub(super) states: Vec<ChoiceState>,
    pub(super) include_usage: bool,
    pub(super) continuous_usage: bool,
    /// `[DONE]` was sent.
    pub(super) ended: bool,
}

impl ChunkStream {
    /// The next frames. An error after the first frame is a frame with the error envelope, then `[DONE]`.
    pub(super) async fn next(mut self) -> Option<(String, Self)> {
        if self.ended {
            return None;
        }
        let mut out = String::new();
        match self.choices.next().await {
            Some((index, update)) => {
                if let Some(error) = failure(&update) {
                    frame(&mut out, &error.body());
                    done(&mut out);
                    self.ended = true;
                } else {
                    let usage = self.continuous_usage.then(|| self.choices.usage());
                    let state = &mut self.states[index];
                    self.answer
                        .chunks(index, state, &update, usage, |chunk| frame(&mut out, chunk));
                }
            }
            None => {
                if self.include_usage {
                    let usage = self.choices.usage();
                    frame(&mut out, &self.answer.usage_chunk(usage));
                }
                done(&mut out);
                self.ended = true;
            }
        }
        Some((out, self))
    }
}
