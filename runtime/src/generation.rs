//! One sequence as text: the engine's tokens through detokeniser and stop strings.
//!
//! Invariants:
//! - every token yields one [`TextToken`], with empty text while a character is incomplete or a stop string is possible;
//! - the texts of a sequence, in order, are its output;
//! - dropping a [`TextStream`] aborts the sequence.

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use crate::{
    detokenizer::Detokenizer,
    engine::{
        Finish, SequenceStream, StreamUpdate, Timings,
        request::{FinishReason, SamplingParams, TokenId, TokenLogprobs},
    },
    stop_strings::StopStrings,
    tokenizer::Tokenizer,
};

/// How tokens become text: the part of a request that the engine does not see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextOptions {
    /// Texts that end the output.
    pub stop: Vec<String>,
    /// Keep the stop string, or the stop token's text, in the output.
    pub include_stop_str_in_output: bool,
    /// Control tokens have no text.
    pub skip_special_tokens: bool,
}

impl Default for TextOptions {
    fn default() -> Self {
        Self {
            stop: Vec::new(),
            include_stop_str_in_output: false,
            skip_special_tokens: true,
        }
    }
}

/// One token and the text that became certain with it.
#[derive(Debug, Clone, PartialEq)]
pub struct TextToken {
    /// Its id.
    pub id: TokenId,
    /// Text to append to the output; often not exactly this token's own.
    pub text: String,
    /// Present when the request asked for log-probabilities.
    pub logprobs: Option<TokenLogprobs>,
}

/// What ended a sequence as `stop`, beside the model's end-of-sequence token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopCause {
    /// A stop string.
    Text(String),
    /// One of the request's `stop_token_ids`.
    Token(TokenId),
}

/// How a sequence's text ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextFinish {
    /// Why.
    pub reason: FinishReason,
    /// Which stop string or stop id; `None` for end-of-sequence and every other reason.
    pub stop_cause: Option<StopCause>,
    /// What went wrong, when `reason` is [`FinishReason::Error`].
    pub error: Option<String>,
    /// The request itself is at fault.
    pub refused: bool,
}

/// What has happened since the last call.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TextUpdate {
    /// New tokens with their texts.
    pub tokens: Vec<TextToken>,
    /// Text that was held back until the end; belongs after the last token's.
    pub tail: String,
    /// Set once, in the last update.
    pub finish: Option<TextFinish>,
    /// Prompt tokens whose KV came from the prefix cache.
    pub cached_prompt_tokens: u32,
    /// Set once when the request asked for them: one per prompt token after the first.
    pub prompt_logprobs: Option<Vec<TokenLogprobs>>,
}

impl TextUpdate {
    /// All new text.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text: String = self
            .tokens
            .iter()
            .map(|token| token.text.as_str())
            .collect();
        text.push_str(&self.tail);
        text
    }
}

/// A sequence's output as text.
#[derive(Debug)]
pub struct TextStream {
    stream: SequenceStream,
    decoder: TextDecoder,
}

impl TextStream {
    /// Wraps a sequence that was submitted with `params`.
    #[must_use]
    pub fn new(
        stream: SequenceStream,
        tokenizer: Arc<Tokenizer>,
        params: &SamplingParams,
        options: &TextOptions,
    ) -> Self {
        Self {
            stream,
            decoder: TextDecoder::new(tokenizer, params, options),
        }
    }

    /// Everything new since the last call, waiting for something; `None` after the update that has `finish`.
    /// Safe to cancel.
    pub async fn next(&mut self) -> Option<TextUpdate> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// [`next`](Self::next) for poll-based callers.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<TextUpdate>> {
        if self.decoder.finished {
            return Poll::Ready(None);
        }
        self.stream
            .poll_next(cx)
            .map(|update| update.map(|update| self.take(update)))
    }

    /// [`next`](Self::next) for a thread outside any async runtime.
    pub fn next_blocking(&mut self) -> Option<TextUpdate> {
        if self.decoder.finished {
            return None;
        }
        let update = self.stream.next_blocking()?;
        Some(self.take(update))
    }

    fn take(&mut self, update: StreamUpdate) -> TextUpdate {
        let (update, stopped_at) = self.decoder.decode(update);
        if let Some(num_tokens) = stopped_at {
            self.stream.finish_at(num_tokens);
        }
        update
    }

    /// When it went through its phases, as far as it is.
    #[must_use]
    pub fn timings(&self) -> Option<Timings> {
        self.stream.timings()
    }

    /// Tokens so far.
    #[must_use]
    pub fn num_tokens(&self) -> u32 {
        self.decoder.num_tokens
    }
}

/// The state of one sequence's text, apart from where its tokens come from.
struct TextDecoder {
    detokenizer: Detokenizer,
    stop: StopStrings,
    include_stop: bool,
    stop_token_ids: Vec<TokenId>,
    min_tokens: u32,
    num_tokens: u32,
    finished: bool,
}

impl TextDecoder {
    fn new(tokenizer: Arc<Tokenizer>, params: &SamplingParams, options: &TextOptions) -> Self {
        Self {
            detokenizer: Detokenizer::new(tokenizer, options.skip_special_tokens),
            stop: StopStrings::new(&options.stop, options.include_stop_str_in_output),
            include_stop: options.include_stop_str_in_output,
            stop_token_ids: params.stop_token_ids.clone(),
            min_tokens: params.min_tokens,
            num_tokens: 0,
            finished: false,
        }
    }

    /// Decodes an update. The second value is the number of tokens after which a stop string ended the text, when the
    /// engine has not ended the sequence itself.
    fn decode(&mut self, update: StreamUpdate) -> (TextUpdate, Option<u32>) {
        let stop_token = update.finish.as_ref().and_then(|finish| finish.stop_token);
        let last = update.tokens.len().checked_sub(1);
        let mut out = TextUpdate {
            cached_prompt_tokens: update.cached_prompt_tokens,
            prompt_logprobs: update.prompt_logprobs,
            ..TextUpdate::default()
        };
        for (index, token) in update.tokens.into_iter().enumerate() {
            self.num_tokens += 1;
            let mut raw = String::new();
            let ends_here = Some(index) == last && stop_token == Some(token.id);
            if !ends_here || self.include_stop {
                self.detokenizer.push(token.id, &mut raw);
            }
            let (text, stop) = self.match_stop(&raw);
            out.tokens.push(TextToken {
                id: token.id,
                text,
                logprobs: token.logprobs,
            });
            if let Some(stop) = stop {
                return (self.stopped(out, stop), Some(self.num_tokens));
            }
        }
        if let Some(finish) = update.finish {
            let mut raw = String::new();
            self.detokenizer.finish(&mut raw);
            let (tail, stop) = self.match_stop(&raw);
            out.tail = tail;
            if let Some(stop) = stop {
                return (self.stopped(out, stop), None);
            }
            self.stop.finish(&mut out.tail);
            self.finished = true;
            out.finish = Some(self.finish(finish));
        }
        (out, None)
    }

    /// Text that is certain now, and the stop string that is complete now.
    fn match_stop(&mut self, raw: &str) -> (String, Option<String>) {
        if self.num_tokens <= self.min_tokens {
            return (raw.to_owned(), None);
        }
        let mut text = String::new();
        let stop = self.stop.push(raw, &mut text);
        (text, stop)
    }

    fn stopped(&mut self, mut update: TextUpdate, stop: String) -> TextUpdate {
        self.finished = true;
        update.finish = Some(TextFinish {
            reason: FinishReason::Stop,
            stop_cause: Some(StopCause::Text(stop)),
            error: None,
            refused: false,
        });
        update
    }

    fn finish(&self, finish: Finish) -> TextFinish {
        let cause = finish
            .stop_token
            .filter(|id| finish.reason == FinishReason::Stop && self.stop_token_ids.contains(id));
        TextFinish {
            reason: finish.reason,
            stop_cause: cause.map(StopCause::Token),
            error: finish.error,
            refused: finish.refused,
        }
    }
}

impl std::fmt::Debug for TextDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TextDecoder")
            .field("num_tokens", &self.num_tokens)
            .field("finished", &self.finished)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
