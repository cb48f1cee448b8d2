//! OpenAI's answer objects: whole ones and the chunks of a stream, for chat and text completions.

mod chunks;
mod logprobs;

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::{
    choices::Usage,
    message::{Call, Message, MessageFormat},
};
use crate::{
    engine::request::{TokenId, TokenLogprobs},
    generation::{StopCause, TextFinish, TextToken, TextUpdate},
    tokenizer::Tokenizer,
};

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
    /// How a chat's text is read.
    pub(crate) format: MessageFormat,
    /// The prompts' log-probabilities, where they are wanted.
    pub(crate) prompt_logprobs: Option<PromptLogprobs>,
}

/// What is done with a prompt's log-probabilities.
pub(crate) struct PromptLogprobs {
    /// `[prompts]` tokens.
    pub(crate) prompts: Vec<Vec<TokenId>>,
    /// Choices of each prompt.
    pub(crate) n: usize,
    /// They go before the output's own, as OpenAI does for `echo`; otherwise into `prompt_logprobs`.
    pub(crate) in_echo: bool,
}

/// What a choice has said so far.
#[derive(Debug)]
pub(crate) struct ChoiceState {
    /// A chunk was sent.
    begun: bool,
    text: String,
    tokens: Vec<TextToken>,
    message: Message,
    prompt_logprobs: Vec<TokenLogprobs>,
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
                    begun: false,
                    tokens: Vec::new(),
                    message: Message::new(&self.format),
                    prompt_logprobs: Vec::new(),
                    finish: None,
                }
            })
            .collect()
    }

    /// Takes news of a choice for a whole answer.
    pub(crate) fn collect(&self, state: &mut ChoiceState, update: TextUpdate) {
        match self.kind {
            Kind::Chat => {
                state.message.update(&update);
            }
            Kind::Completion => state.text.push_str(&update.text()),
        }
        if self.logprobs {
            state.tokens.extend(update.tokens);
        }
        state
            .prompt_logprobs
            .extend(update.prompt_logprobs.unwrap_or_default());
        state.finish = update.finish.or(state.finish.take());
    }

    /// The whole answer.
    pub(crate) fn full(&self, states: &[ChoiceState], usage: Usage) -> Value {
        let choices: Vec<Value> = (0..states.len())
            .map(|index| self.full_choice(states, index))
            .collect();
        let object = match self.kind {
            Kind::Chat => "chat.completion",
            Kind::Completion => "text_completion",
        };
        let mut answer = json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices,
            "service_tier": null, "system_fingerprint": null, "usage": usage.to_json(),
        });
        if self.kind == Kind::Chat
            && let (Some(wanted), Some(first)) = (&self.prompt_logprobs, states.first())
        {
            answer["prompt_logprobs"] =
                self.prompt_entries(&wanted.prompts[0], &first.prompt_logprobs);
        }
        answer
    }

    fn full_choice(&self, states: &[ChoiceState], index: usize) -> Value {
        let state = &states[index];
        let mut choice = Map::new();
        choice.insert("index".to_owned(), index.into());
        match self.kind {
            Kind::Chat => {
                choice.insert("message".to_owned(), message_object(&state.message));
            }
            Kind::Completion => {
                choice.insert("text".to_owned(), state.text.as_str().into());
            }
        }
        let mut offset = state.offset;
        let mut logprobs = self.logprobs_of(&state.tokens, &mut offset);
        if let (Kind::Completion, Some(wanted)) = (self.kind, &self.prompt_logprobs) {
            let first = index - index % wanted.n;
            let (prompt, of) = (
                &wanted.prompts[index / wanted.n],
                &states[first].prompt_logprobs,
            );
            if wanted.in_echo {
                logprobs = self.echoed_logprobs(prompt, of, &logprobs);
            } else {
                choice.insert(
                    "prompt_logprobs".to_owned(),
                    self.prompt_entries(prompt, of),
                );
            }
        }
        choice.insert("logprobs".to_owned(), logprobs);
        let (reason, cause) = finish_fields(state.finish.as_ref(), state.message.calls_tools());
        choice.insert("finish_reason".to_owned(), reason.into());
        choice.insert("stop_reason".to_owned(), cause);
        Value::Object(choice)
    }
}

fn message_object(message: &Message) -> Value {
    let calls: Vec<Value> = message.calls.iter().map(call_object).collect();
    let content = match message.content.as_str() {
        "" if !calls.is_empty() => Value::Null,
        text => text.into(),
    };
    let reasoning = match message.reasoning.as_str() {
        "" => Value::Null,
        text => text.into(),
    };
    json!({
        "role": "assistant", "content": content, "refusal": null, "tool_calls": calls, "reasoning": reasoning,
        "reasoning_content": reasoning,
    })
}

fn call_object(call: &Call) -> Value {
    json!({
        "id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments},
    })
}

/// `finish_reason` and `stop_reason`.
fn finish_fields(finish: Option<&TextFinish>, calls_tools: bool) -> (Option<&'static str>, Value) {
    let reason = finish.map(|finish| match calls_tools {
        true => "tool_calls",
        false => finish.reason.as_str(),
    });
    let cause = finish.and_then(|finish| finish.stop_cause.as_ref());
    let cause = match cause {
        None => Value::Null,
        Some(StopCause::Text(text)) => text.as_str().into(),
        Some(StopCause::Token(id)) => (*id).into(),
    };
    (reason, cause)
}
