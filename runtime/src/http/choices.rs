//! The sequences of one request: submitted together, read together, aborted together.

use std::{
    future::poll_fn,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::Poll,
};

use super::{App, access::AccessInfo, error::ApiError, sampling::Sampling};
use crate::{
    engine::request::{FinishReason, Request, TokenId},
    generation::{TextStream, TextUpdate},
};

/// Most sequences of one request: prompts × n.
pub(crate) const MAX_CHOICES: usize = 256;

/// One prompt: its tokens, and its text where that was sent.
pub(crate) struct Prompt {
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) text: Option<String>,
}

/// What keeps prefix-cache hits among a tenant's requests of one salt.
pub(super) fn tenant_salt(info: &AccessInfo, own: Option<&str>) -> Option<String> {
    let tenant = info.tenant.get().and_then(|tenant| tenant.salt.clone());
    let salts = [tenant, own.map(str::to_owned)];
    salts
        .into_iter()
        .flatten()
        .reduce(|tenant, own| format!("{tenant}/{own}"))
}

/// Tokens of a request, all choices together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u32,
    pub(crate) completion_tokens: u32,
    pub(crate) cached_tokens: u32,
}

impl Usage {
    pub(crate) fn to_json(self) -> serde_json::Value {
        serde_json::json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        })
    }
}

/// Running sequences, in the order of their choice indexes. Dropping it aborts them.
pub(crate) struct Choices {
    streams: Vec<Option<TextStream>>,
    /// `[prompts]` tokens.
    prompts: Vec<Arc<[TokenId]>>,
    /// `[prompts]` tokens taken from the prefix cache by a prompt's first choice.
    cached: Vec<u32>,
    n: usize,
    /// Where the next look begins, so that no choice is served last for ever.
    next: usize,
    usage: Usage,
    info: Arc<AccessInfo>,
}

impl Choices {
    /// Submits `n` sequences for each prompt; all or none.
    pub(crate) async fn submit(
        app: &App,
        prompts: &[Prompt],
        sampling: &Sampling,
        info: &Arc<AccessInfo>,
    ) -> Result<Self, ApiError> {
        let total = prompts.len() * sampling.n as usize;
        if total > MAX_CHOICES {
            return Err(ApiError::invalid(
                "n",
                format!("the request asks for {total} outputs: at most {MAX_CHOICES} are allowed"),
            ));
        }
        let limits = sampling.output_limits(app).await?;
        let tenant = info.tenant.get();
        let cache_salt = tenant_salt(info, sampling.cache_salt.as_deref());
        let mut streams = Vec::with_capacity(total);
        let mut usage = Usage::default();
        let mut submitted = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let tokens: Arc<[TokenId]> = sampling.kept(&prompt.tokens).into();
            let mut params = sampling.params.clone();
            params.max_tokens = sampling.max_tokens(tokens.len(), app.limits)?;
            params.min_tokens = params.min_tokens.min(params.max_tokens);
            submitted.push(Arc::clone(&tokens));
            usage.prompt_tokens += u32::try_from(tokens.len()).unwrap_or(u32::MAX);
            for choice_index in 0..sampling.n {
                let request = Request {
                    choice_index,
                    cache_salt: cache_salt.clone(),
                    constraint: limits.constraint(),
                    priority: if app.config.honour_priority {
                        sampling.priority
                    } else {
                        0
                    },
                    tenant: tenant.map_or(0, |tenant| tenant.id),
                    deadline: info.deadline.get().copied(),
                    // The choices of a prompt share it.
                    prompt_logprobs: sampling.prompt_logprobs.filter(|_| choice_index == 0),
                    ..Request::new(Arc::clone(&tokens), params.clone())
                };
                // On an error the streams so far are dropped: their sequences end at the next step.
                let stream = app
                    .model
                    .engine
                    .submit_arrived(request, info.arrival())
                    .map_err(|error| ApiError::from_submit(&error, app.metrics.retry_after()))?;
                let tokenizer = Arc::clone(&app.model.tokenizer);
                streams.push(Some(TextStream::new(
                    stream,
                    tokenizer,
                    &params,
                    &sampling.text,
                )));
            }
        }
        app.metrics.observe_n(sampling.n);
        // Only the first is kept.
        let _ = info.asked.set(sampling.asked());
        info.prompt_tokens.store(usage.prompt_tokens, Relaxed);
        Ok(Self {
            streams,
            prompts: submitted,
            cached: vec![0; prompts.len()],
            n: sampling.n as usize,
            next: 0,
            usage,
            info: Arc::clone(info),
        })
    }

    /// The prompts' tokens.
    pub(crate) fn prompts(&self) -> Vec<Vec<TokenId>> {
        self.prompts.iter().map(|prompt| prompt.to_vec()).collect()
    }

    /// Number of choices.
    pub(crate) fn len(&self) -> usize {
        self.streams.len()
    }

    /// Tokens so far.
    pub(crate) fn usage(&self) -> Usage {
        Usage {
            cached_tokens: self.cached.iter().sum(),
            ..self.usage
        }
    }

    /// The next news of any choice, with its index; `None` when all have ended. Safe to cancel.
    pub(crate) async fn next(&mut self) -> Option<(usize, TextUpdate)> {
        let found = poll_fn(|cx| {
            let mut running = false;
            for offset in 0..self.streams.len() {
                let index = (self.next + offset) % self.streams.len();
                let Some(stream) = &mut self.streams[index] else {
                    continue;
                };
                match stream.poll_next(cx) {
                    Poll::Ready(Some(update)) => return Poll::Ready(Some((index, update))),
                    Poll::Ready(None) => self.streams[index] = None,
                    Poll::Pending => running = true,
                }
            }
            if running {
                Poll::Pending
            } else {
                Poll::Ready(None)
            }
        })
        .await;
        if let Some((index, update)) = &found {
            self.next = index + 1;
            self.count(*index, update);
        }
        found
    }

    /// Tells the request's log line and span of the first choice's times.
    fn note_timings(&self) {
        let first = self.streams.first().and_then(Option::as_ref);
        if let Some(timings) = first.and_then(TextStream::timings) {
            // Only the first is kept.
            let _ = self.info.timings.set(timings);
        }
    }

    fn count(&mut self, index: usize, update: &TextUpdate) {
        let tokens = u32::try_from(update.tokens.len()).unwrap_or(u32::MAX);
        self.usage.completion_tokens = self.usage.completion_tokens.saturating_add(tokens);
        if index.is_multiple_of(self.n) {
            self.cached[index / self.n] = update.cached_prompt_tokens;
        }
        self.info
            .completion_tokens
            .store(self.usage.completion_tokens, Relaxed);
        self.info
            .cached_tokens
            .store(self.cached.iter().sum(), Relaxed);
        if let Some(finish) = &update.finish {
            if index == 0 {
                self.note_timings();
            }
            self.streams[index] = None;
            let is_last = self.streams.iter().all(Option::is_none);
            if is_last || finish.reason == FinishReason::Error {
                // Only the first is kept.
                let _ = self.info.finish.set(finish.reason.as_str());
            }
        }
    }
}

impl Drop for Choices {
    fn drop(&mut self) {
        // A client that went away leaves before the end.
        self.note_timings();
    }
}
