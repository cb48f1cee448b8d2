//! A chat model's text as a message: reasoning, content and tool calls, piece by piece as it is generated.
//!
//! ```text
//! text ──► Reasoning (<think> … </think>) ──► ToolCalls (one of the models' notations) ──► MessageEvent
//! ```
//!
//! Invariants:
//! - the events do not depend on how the text was cut into pieces;
//! - text that turns out not to be a tool call is content, unchanged;
//! - each byte is looked at once: time is linear in the text.

mod json;
mod reasoning;
#[cfg(test)]
mod tests;
mod tool_calls;

pub use reasoning::{Reasoning, ReasoningFormat};
pub use tool_calls::{ToolCalls, ToolFormat};

/// A piece of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MessageEvent {
    /// Text of the model's reasoning.
    Reasoning(String),
    /// Text of the answer.
    Content(String),
    /// A tool call begins; calls are numbered from 0.
    ToolCall {
        /// Its number.
        index: usize,
        /// The function's name.
        name: String,
    },
    /// More of the last call's arguments: together they are a JSON text.
    Arguments(String),
}

/// Text to events, for one message.
#[derive(Debug)]
pub struct MessageParser {
    reasoning: Option<Reasoning>,
    tools: Option<ToolCalls>,
}

impl MessageParser {
    /// With these stages; without any, all text is content.
    #[must_use]
    pub fn new(reasoning: Option<Reasoning>, tools: Option<ToolCalls>) -> Self {
        Self { reasoning, tools }
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, text: &str, events: &mut Vec<MessageEvent>) {
        if text.is_empty() {
            return;
        }
        match &mut self.reasoning {
            None => content(&mut self.tools, text, events),
            Some(reasoning) => {
                let mut answer = String::new();
                reasoning.push(text, &mut answer, events);
                if !answer.is_empty() {
                    content(&mut self.tools, &answer, events);
                }
            }
        }
    }

    /// The text has ended: what was held back comes out.
    pub fn finish(&mut self, events: &mut Vec<MessageEvent>) {
        if let Some(reasoning) = &mut self.reasoning {
            let mut answer = String::new();
            reasoning.finish(&mut answer, events);
            if !answer.is_empty() {
                content(&mut self.tools, &answer, events);
            }
        }
        if let Some(tools) = &mut self.tools {
            tools.finish(events);
        }
    }

    /// Tool calls so far.
    #[must_use]
    pub fn num_tool_calls(&self) -> usize {
        self.tools.as_ref().map_or(0, ToolCalls::count)
    }
}

fn content(tools: &mut Option<ToolCalls>, text: &str, events: &mut Vec<MessageEvent>) {
    match tools {
        Some(tools) => tools.push(text, events),
        None => push_content(text, events),
    }
}

/// Appends content, joined to what came just before.
fn push_content(text: &str, events: &mut Vec<MessageEvent>) {
    if text.is_empty() {
        return;
    }
    match events.last_mut() {
        Some(MessageEvent::Content(last)) => last.push_str(text),
        _ => events.push(MessageEvent::Content(text.to_owned())),
    }
}

/// Bytes at the end of `text` that may be the beginning of `marker`.
fn held_back(text: &str, marker: &str) -> usize {
    let longest = text.len().min(marker.len().saturating_sub(1));
    (1..=longest)
        .rev()
        .find(|&len| text.as_bytes().ends_with(&marker.as_bytes()[..len]))
        .unwrap_or(0)
}
