//! The chunks of a stream.

use std::borrow::Cow;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{Answer, ChoiceState, Kind, finish_fields};
use crate::{
    generation::{TextFinish, TextToken, TextUpdate},
    http::{choices::Usage, message::Message},
    output::MessageEvent,
};

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
}
