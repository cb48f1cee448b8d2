//! OpenAI's answer objects: whole ones and the chunks of a stream, for chat and text completions.

use std::{borrow::Cow, sync::Arc};

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{
    choices::Usage,
    message::{Call, Message, MessageFormat},
};
use crate::{
    engine::request::{TokenId, TokenLogprobs},
    generation::{StopCause, TextFinish, TextToken, TextUpdate},
    output::MessageEvent,
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

/// One object of a stream. Written as it stands: a stream has one for every token.
#[derive(Debug, Serialize)]
pub(crate) struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [ChunkChoice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Value>,
}

#[derive(Debug, Serialize)]
pub(crate) struct ChunkChoice<'a> {
    index: usize,
    /// Of a chat.
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<Map<String, Value>>,
    /// Of a text completion.
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<Cow<'a, str>>,
    logprobs: Value,
    finish_reason: Option<&'static str>,
    stop_reason: Value,
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

    /// vLLM's `prompt_logprobs`: one object per token, `null` for the first.
    fn prompt_entries(&self, prompt: &[TokenId], of: &[TokenLogprobs]) -> Value {
        let entry = |id: TokenId, logprob: f32, rank: Option<usize>| {
            let value = json!({"logprob": finite(logprob), "rank": rank, "decoded_token": self.token_text(id)});
            (id.to_string(), value)
        };
        let rest = prompt.iter().skip(1).zip(of).map(|(&id, logprobs)| {
            let top = logprobs.top.iter().enumerate();
            let mut object: Map<String, Value> = top
                .map(|(rank, &(id, logprob))| entry(id, logprob, Some(rank + 1)))
                .collect();
            if !object.contains_key(&id.to_string()) {
                let (id, value) = entry(id, logprobs.sampled, None);
                object.insert(id, value);
            }
            Value::Object(object)
        });
        std::iter::once(Value::Null).chain(rest).collect()
    }

    /// OpenAI's log-probabilities of an echoed prompt with those of the output behind them.
    fn echoed_logprobs(&self, prompt: &[TokenId], of: &[TokenLogprobs], output: &Value) -> Value {
        let mut offset = 0;
        let (mut offsets, mut texts) = (Vec::new(), Vec::new());
        for &id in prompt {
            let text = self.token_text(id);
            offsets.push(Value::from(offset));
            offset += text.len();
            texts.push(Value::from(text));
        }
        let mut sampled = vec![Value::Null];
        let mut top = vec![Value::Null];
        for logprobs in of {
            sampled.push(finite(logprobs.sampled).into());
            let entries = logprobs.top.iter();
            let object: Map<String, Value> = entries
                .map(|&(id, logprob)| (self.token_text(id), finite(logprob).into()))
                .collect();
            top.push(Value::Object(object));
        }
        let with = |mut list: Vec<Value>, name: &str| {
            list.extend(output[name].as_array().into_iter().flatten().cloned());
            list
        };
        json!({
            "text_offset": with(offsets, "text_offset"), "token_logprobs": with(sampled, "token_logprobs"),
            "tokens": with(texts, "tokens"), "top_logprobs": with(top, "top_logprobs"),
        })
    }

    /// The chunks that news of a choice makes: one per token, the last one with the end.
    pub(crate) fn chunks(
        &self,
        index: usize,
        state: &mut ChoiceState,
        update: &TextUpdate,
        usage: Option<Usage>,
        mut send: impl FnMut(&Chunk<'_>),
    ) {
        let last = update.tokens.len().checked_sub(1);
        for (at, token) in update.tokens.iter().enumerate() {
            let finish = update.finish.as_ref().filter(|_| Some(at) == last);
            let text = match Some(at) == last && !update.tail.is_empty() {
                true => &format!("{}{}", token.text, update.tail),
                false => &token.text,
            };
            let tokens = std::slice::from_ref(token);
            if let Some(choice) = self.chunk(index, state, text, tokens, finish) {
                send(&self.envelope(&[choice], usage));
            }
        }
        if last.is_none() && (update.finish.is_some() || !update.tail.is_empty()) {
            let finish = update.finish.as_ref();
            if let Some(choice) = self.chunk(index, state, &update.tail, &[], finish) {
                send(&self.envelope(&[choice], usage));
            }
        }
    }

    /// `None` for a token that only became part of something to be told later.
    fn chunk<'a>(
        &self,
        index: usize,
        state: &mut ChoiceState,
        text: &'a str,
        tokens: &[TextToken],
        finish: Option<&TextFinish>,
    ) -> Option<ChunkChoice<'a>> {
        let (mut said, mut added) = (None, None);
        let is_first = !std::mem::replace(&mut state.begun, true);
        match self.kind {
            Kind::Chat => {
                let delta = self.delta(&mut state.message, text, finish, is_first);
                let says_nothing = delta.is_empty() && finish.is_none() && !self.logprobs;
                if says_nothing && !self.format.is_plain() {
                    return None;
                }
                added = Some(delta);
            }
            Kind::Completion => {
                said = Some(if is_first && !state.text.is_empty() {
                    Cow::Owned(format!("{}{text}", state.text))
                } else {
                    Cow::Borrowed(text)
                });
            }
        }
        let logprobs = self.logprobs_of(tokens, &mut state.offset);
        let (finish_reason, stop_reason) = finish_fields(finish, state.message.calls_tools());
        Some(ChunkChoice {
            index,
            delta: added,
            text: said,
            logprobs,
            finish_reason,
            stop_reason,
        })
    }

    /// What a chat's text and its end add to the message.
    fn delta(
        &self,
        message: &mut Message,
        text: &str,
        finish: Option<&TextFinish>,
        is_first: bool,
    ) -> Map<String, Value> {
        let mut events = message.push(text);
        if let Some(finish) = finish {
            events.extend(message.end(finish));
        }
        let mut delta = Map::new();
        if is_first {
            delta.insert("role".to_owned(), "assistant".into());
        }
        if self.format.is_plain() {
            delta.insert("content".to_owned(), text.into());
            return delta;
        }
        let mut append = |key: &str, text: &str| {
            let before = delta.get(key).and_then(Value::as_str).unwrap_or_default();
            delta.insert(key.to_owned(), format!("{before}{text}").into());
        };
        // Calls that began before this text; the last of them may go on.
        let begun = events
            .iter()
            .filter(|event| matches!(event, MessageEvent::ToolCall { .. }));
        let mut next = message.calls.len() - begun.count();
        let mut calls: Vec<Value> = Vec::new();
        let mut open = false;
        for event in &events {
            match event {
                MessageEvent::Reasoning(text) => {
                    append("reasoning", text);
                    append("reasoning_content", text);
                }
                MessageEvent::Content(text) => append("content", text),
                MessageEvent::ToolCall { .. } => {
                    let call = &message.calls[next];
                    calls.push(json!({
                        "index": next, "id": call.id, "type": "function",
                        "function": {"name": call.name, "arguments": ""},
                    }));
                    next += 1;
                    open = true;
                }
                MessageEvent::Arguments(text) => {
                    if !open {
                        calls.push(
                            json!({"index": next.saturating_sub(1), "function": {"arguments": ""}}),
                        );
                        open = true;
                    }
                    if let Some(call) = calls.last_mut() {
                        let before = call["function"]["arguments"].as_str().unwrap_or_default();
                        call["function"]["arguments"] = format!("{before}{text}").into();
                    }
                }
            }
        }
        if !calls.is_empty() {
            delta.insert("tool_calls".to_owned(), calls.into());
        }
        delta
    }

    /// The last chunk of a stream that asked for `usage`.
    pub(crate) fn usage_chunk(&self, usage: Usage) -> Chunk<'_> {
        self.envelope(&[], Some(usage))
    }

    fn envelope<'a>(&'a self, choices: &'a [ChunkChoice<'a>], usage: Option<Usage>) -> Chunk<'a> {
        let object = match self.kind {
            Kind::Chat => "chat.completion.chunk",
            Kind::Completion => "text_completion",
        };
        Chunk {
            id: &self.id,
            object,
            created: self.created,
            model: &self.model,
            choices,
            usage: usage.map(Usage::to_json),
        }
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
