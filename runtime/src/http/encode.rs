//! Tokenisation away from the async threads: short texts at once, long ones on a bounded pool.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use tokio::sync::Semaphore;

use super::error::ApiError;
use crate::{
    engine::request::TokenId,
    tokenizer::{Tokenizer, TokenizerError},
};

/// Texts up to this many bytes are tokenised where they are: about a millisecond.
const INLINE_BYTES: usize = 2048;
/// Texts that are tokenised at once.
const WORKERS: usize = 2;
/// Texts that may wait for a worker; one more is answered 429.
const MAX_WAITING: usize = 512;

/// See the [module](self).
pub(crate) struct EncodePool {
    tokenizer: Arc<Tokenizer>,
    workers: Arc<Semaphore>,
    waiting: AtomicUsize,
}

/// Counts a waiting text for as long as it lives.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl EncodePool {
    pub(crate) fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self {
            tokenizer,
            workers: Arc::new(Semaphore::new(WORKERS)),
            waiting: AtomicUsize::new(0),
        }
    }

    /// The tokens of `text`. A text that must have more than `limit` tokens is refused without being tokenised.
    pub(crate) async fn encode(
        &self,
        text: String,
        add_special_tokens: bool,
        limit: u32,
    ) -> Result<Vec<TokenId>, ApiError> {
        let at_least = text.len() / self.tokenizer.max_token_bytes();
        if at_least > limit as usize {
            return Err(ApiError::invalid(
                "prompt",
                format!(
                    "the prompt has at least {at_least} tokens and the model's length is {limit}, prompt and output \
                     together: shorten the prompt"
                ),
            ));
        }
        if text.len() <= INLINE_BYTES {
            return Ok(self.tokenizer.encode(&text, add_special_tokens)?);
        }
        if self.waiting.fetch_add(1, Relaxed) >= MAX_WAITING {
            self.waiting.fetch_sub(1, Relaxed);
            return Err(ApiError::overloaded(
                "too many long prompts are waiting: retry later",
                1,
            ));
        }
        let waiting = Waiting(&self.waiting);
        let permit = Arc::clone(&self.workers)
            .acquire_owned()
            .await
            .map_err(|_| ApiError::draining())?;
        drop(waiting);
        let tokenizer = Arc::clone(&self.tokenizer);
        let encoded =
            tokio::task::spawn_blocking(move || -> Result<Vec<TokenId>, TokenizerError> {
                let tokens = tokenizer.encode(&text, add_special_tokens);
                drop(permit);
                tokens
            });
        match encoded.await {
            Ok(tokens) => Ok(tokens?),
            Err(error) => Err(ApiError::internal(format!("tokenisation failed: {error}"))),
        }
    }
}
