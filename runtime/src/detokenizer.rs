//! Token ids to text, one token at a time, in constant time per token.
//!
//! Invariants:
//! - a chunk is valid UTF-8: bytes of an unfinished character wait for the next token;
//! - the chunks of a sequence, the last one from [`Detokenizer::finish`], are together what decoding the whole gives.

use std::sync::Arc;

use crate::{engine::request::TokenId, tokenizer::Tokenizer};

/// Turns one sequence's tokens into text.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special_tokens: bool,
    utf8: Utf8Chunks,
}

impl Detokenizer {
    /// For one sequence. Special tokens have no text if `skip_special_tokens`.
    #[must_use]
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special_tokens: bool) -> Self {
        Self {
            tokenizer,
            skip_special_tokens,
            utf8: Utf8Chunks::default(),
        }
    }

    /// Appends to `text` what is complete after this token: nothing while a character is unfinished.
    pub fn push(&mut self, token: TokenId, text: &mut String) {
        if !(self.skip_special_tokens && self.tokenizer.is_special(token)) {
            self.utf8.push(self.tokenizer.token_bytes(token), text);
        }
    }

    /// Appends to `text` what was left: U+FFFD for a character that never became complete.
    pub fn finish(&mut self, text: &mut String) {
        self.utf8.finish(text);
    }
}

/// Cuts a stream of bytes into valid UTF-8, with U+FFFD for what can never be.
#[derive(Debug, Default)]
struct Utf8Chunks {
    /// The beginning of a character: 3 bytes at most between calls.
    pending: Vec<u8>,
}

impl Utf8Chunks {
    fn push(&mut self, bytes: &[u8], text: &mut String) {
        self.pending.extend_from_slice(bytes);
        let mut rest = self.pending.as_slice();
        let kept = loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    break 0;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(std::str::from_utf8(valid).unwrap_or_default());
                    match error.error_len() {
                        Some(len) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            rest = &after[len..];
                        }
                        None => break after.len(),
                    }
                }
            }
        };
        self.pending.drain(..self.pending.len() - kept);
    }

    fn finish(&mut self, text: &mut String) {
        if !self.pending.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
    }
}

#[cfg(test)]
mod tests;
