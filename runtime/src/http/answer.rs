//! OpenAI's answer objects: whole ones and the chunks of a stream, for chat and text completions.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::choices::Usage;
use crate::{
    engine::request::{TokenId, TokenLogprobs},
    generation::{StopCause, TextFinish, TextToken, TextUpdate},
    tokenizer::Tokenizer,
};

/// JSON has no infinity: stands for the log-probability of the impossible.
const LOWEST_LOGPROB: f32 = -9999.0;

/// Which API is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Chat,
    Completion,
}

/// What the objects of one request have in common.
pub(crate) struct Answer {
    pub(crate) kind: Kind,
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// The request asked for log-probabilities.
    pub(crate) logprobs: bool,
    /// Per choice: text that goes before the output (`echo`).
    pub(crate) echo: Vec<String>,
}

/// What a choice has said so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct ChoiceState {
    /// A chunk was sent.
    begun: bool,
    text: String,
    tokens: Vec<TextToken>,
    finish: Option<TextFinish>,
    /// Bytes of text before the next token: `text_offset` of log-probabilities.
    offset: usize,
}

impl Answer {
    /// One state per choice, at the beginning.
    pub(crate) fn states(&self, choices: usize) -> Vec<ChoiceState> {
        (0..choices)
            .map(|index| {
                let text = self.echo.get(index).cloned().unwrap_or_default();
                ChoiceState {
                    offset: text.len(),
                    text,
                    ..ChoiceState::default()
                }
            })
            .collect()
    }

    /// Takes news of a choice for a whole answer.
    pub(crate) fn collect(&self, state: &mut ChoiceState, update: TextUpdate) {
        for token in update.tokens {
            state.text.push_str(&token.text);
            if self.logprobs {
                state.tokens.push(token);
            }
        }
        state.text.push_str(&update.tail);
        state.finish = update.finish.or(state.finish.take());
    }

    /// The whole answer.
    pub(crate) fn full(&self, states: &[ChoiceState], usage: Usage) -> Value {
        let choices: Vec<Value> = states
            .iter()
            .enumerate()
            .map(|(index, state)| {
                let mut choice = Map::new();
                choice.insert("index".to_owned(), index.into());
                match self.kind {
                    Kind::Chat => {
                        let message = json!({
                            "role": "assistant", "content": state.text, "refusal": null, "tool_calls": [],
                        });
                        choice.insert("message".to_owned(), message);
                    }
                    Kind::Completion => {
                        choice.insert("text".to_owned(), state.text.as_str().into());
                    }
                }
                let mut offset = state.offset;
                choice.insert("logprobs".to_owned(), self.logprobs_of(&state.tokens, &mut offset));
                insert_finish(&mut choice, state.finish.as_ref());
                Value::Object(choice)
            })
            .collect();
        let object = match self.kind {
            Kind::Chat => "chat.completion",
            Kind::Completion => "text_completion",
        };
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices,
            "service_tier": null, "system_fingerprint": null, "usage": usage.to_json(),
        })
    }

    /// The chunks that news of a choice makes: one per token, the last one with the end.
    pub(crate) fn chunks(
        &self,
        index: usize,
        state: &mut ChoiceState,
        update: &TextUpdate,
        usage: Option<Usage>,
        mut send: impl FnMut(&Value),
    ) {
        let last = update.tokens.len().checked_sub(1);
        for (at, token) in update.tokens.iter().enumerate() {
            let finish = update.finish.as_ref().filter(|_| Some(at) == last);
            let text = match Some(at) == last && !update.tail.is_empty() {
                true => &format!("{}{}", token.text, update.tail),
                false => &token.text,
            };
            let tokens = std::slice::from_ref(token);
            send(&self.chunk(index, state, text, tokens, finish, usage));
        }
        if last.is_none() && (update.finish.is_some() || !update.tail.is_empty()) {
            send(&self.chunk(
                index,
                state,
                &update.tail,
                &[],
                update.finish.as_ref(),
                usage,
            ));
        }
    }

    fn chunk(
        &self,
        index: usize,
        state: &mut ChoiceState,
        text: &str,
        tokens: &[TextToken],
        finish: Option<&TextFinish>,
        usage: Option<Usage>,
    ) -> Value {
        let mut choice = Map::new();
        choice.insert("index".to_owned(), index.into());
        let is_first = !std::mem::replace(&mut state.begun, true);
        match self.kind {
            Kind::Chat => {
                let delta = if is_first {
                    json!({"role": "assistant", "content": text})
                } else {
                    json!({"content": text})
                };
                choice.insert("delta".to_owned(), delta);
            }
            Kind::Completion => {
                let echoed = if is_first { state.text.as_str() } else { "" };
                choice.insert("text".to_owned(), format!("{echoed}{text}").into());
            }
        }
        let logprobs = self.logprobs_of(tokens, &mut state.offset);
        choice.insert("logprobs".to_owned(), logprobs);
        insert_finish(&mut choice, finish);
        self.envelope(vec![Value::Object(choice)], usage)
    }

    /// The last chunk of a stream that asked for `usage`.
    pub(crate) fn usage_chunk(&self, usage: Usage) -> Value {
        self.envelope(Vec::new(), Some(usage))
    }

    fn envelope(&self, choices: Vec<Value>, usage: Option<Usage>) -> Value {
        let object = match self.kind {
            Kind::Chat => "chat.completion.chunk",
            Kind::Completion => "text_completion",
        };
        let mut chunk = json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices,
        });
        if let Some(usage) = usage {
            chunk["usage"] = usage.to_json();
        }
        chunk
    }

    fn logprobs_of(&self, tokens: &[TextToken], offset: &mut usize) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let with: Vec<(&TextToken, &TokenLogprobs)> = tokens
            .iter()
            .filter_map(|token| token.logprobs.as_ref().map(|logprobs| (token, logprobs)))
            .collect();
        match self.kind {
            Kind::Chat => {
                let content: Vec<Value> = with
                    .iter()
                    .map(|(token, logprobs)| {
                        let mut entry = self.chat_entry(token.id, logprobs.sampled);
                        let top: Vec<Value> = logprobs
                            .top
                            .iter()
                            .map(|&(id, logprob)| self.chat_entry(id, logprob))
                            .collect();
                        entry["top_logprobs"] = top.into();
                        entry
                    })
                    .collect();
                json!({"content": content})
            }
            Kind::Completion => {
                let mut offsets = Vec::new();
                let mut texts = Vec::new();
                let mut top = Vec::new();
                for (token, logprobs) in &with {
                    offsets.push(*offset);
                    *offset += token.text.len();
                    texts.push(self.token_text(token.id));
                    let entry: Map<String, Value> = logprobs
                        .top
                        .iter()
                        .map(|&(id, logprob)| (self.token_text(id), finite(logprob).into()))
                        .collect();
                    top.push(Value::Object(entry));
                }
                let sampled: Vec<f32> = with
                    .iter()
                    .map(|(_, logprobs)| finite(logprobs.sampled))
                    .collect();
                json!({
                    "text_offset": offsets, "token_logprobs": sampled, "tokens": texts, "top_logprobs": top,
                })
            }
        }
    }

    fn chat_entry(&self, id: TokenId, logprob: f32) -> Value {
        json!({
            "token": self.token_text(id), "logprob": finite(logprob), "bytes": self.tokenizer.token_bytes(id),
        })
    }

    fn token_text(&self, id: TokenId) -> String {
        String::from_utf8_lossy(self.tokenizer.token_bytes(id)).into_owned()
    }
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() {
        logprob
    } else {
        LOWEST_LOGPROB
    }
}

fn insert_finish(choice: &mut Map<String, Value>, finish: Option<&TextFinish>) {
    let reason = finish.map(|finish| finish.reason.as_str());
    let cause = finish.and_then(|finish| finish.stop_cause.as_ref());
    choice.insert("finish_reason".to_owned(), reason.into());
    let cause = match cause {
        None => Value::Null,
        Some(StopCause::Text(text)) => text.as_str().into(),
        Some(StopCause::Token(id)) => (*id).into(),
    };
    choice.insert("stop_reason".to_owned(), cause);
}
