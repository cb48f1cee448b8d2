//! Splits what a model thinks from what it answers.

use super::{MessageEvent, held_back};

/// How a model marks its reasoning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReasoningFormat {
    /// `<think> … </think>`: DeepSeek R1, Qwen 3, SmolLM 3.
    Think,
    /// `[THINK] … [/THINK]`: Magistral.
    Magistral,
}

impl ReasoningFormat {
    /// The marks around reasoning.
    #[must_use]
    pub fn marks(self) -> (&'static str, &'static str) {
        match self {
            Self::Think => ("<think>", "</think>"),
            Self::Magistral => ("[THINK]", "[/THINK]"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// Only white space so far.
    Beginning,
    Inside,
    /// White space after the reasoning is not part of the answer.
    JustAfter,
    Answer,
}

/// See the [module](self).
#[derive(Debug)]
pub struct Reasoning {
    begin: &'static str,
    end: &'static str,
    at: At,
    held: String,
    /// White space inside that is kept back until more follows.
    space: String,
    /// Some reasoning was sent.
    begun: bool,
}

impl Reasoning {
    /// For one message; `inside` when the prompt already ends with the begin mark.
    #[must_use]
    pub fn new(format: ReasoningFormat, inside: bool) -> Self {
        let (begin, end) = format.marks();
        Self {
            begin,
            end,
            at: if inside { At::Inside } else { At::Beginning },
            held: String::new(),
            space: String::new(),
            begun: false,
        }
    }

    /// Takes text; reasoning goes to `events`, the rest to `answer`.
    pub(super) fn push(&mut self, text: &str, answer: &mut String, events: &mut Vec<MessageEvent>) {
        if self.at == At::Answer {
            answer.push_str(text);
            return;
        }
        self.held.push_str(text);
        if self.at == At::Beginning {
            let begun = self.held.trim_start();
            if let Some(inside) = begun.strip_prefix(self.begin) {
                self.held = inside.to_owned();
                self.at = At::Inside;
            } else if self.begin.starts_with(begun) {
                return;
            } else {
                self.at = At::Answer;
                answer.push_str(&std::mem::take(&mut self.held));
                return;
            }
        }
        if self.at == At::Inside {
            let Some(at) = self.held.find(self.end) else {
                let sure = self.held.len() - held_back(&self.held, self.end);
                let text: String = self.held.drain(..sure).collect();
                self.think(&text, events);
                return;
            };
            let text: String = self.held.drain(..at).collect();
            self.held.drain(..self.end.len());
            self.think(&text, events);
            self.space.clear();
            self.at = At::JustAfter;
        }
        let rest = self.held.trim_start();
        if !rest.is_empty() {
            answer.push_str(rest);
            self.held.clear();
            self.at = At::Answer;
        }
    }

    fn think(&mut self, text: &str, events: &mut Vec<MessageEvent>) {
        let text = if self.begun { text } else { text.trim_start() };
        let kept = text.trim_end();
        if kept.is_empty() {
            self.space.push_str(text);
            return;
        }
        self.begun = true;
        let mut out = std::mem::take(&mut self.space);
        out.push_str(kept);
        self.space.push_str(&text[kept.len()..]);
        match events.last_mut() {
            Some(MessageEvent::Reasoning(last)) => last.push_str(&out),
            _ => events.push(MessageEvent::Reasoning(out)),
        }
    }

    /// The text has ended.
    pub(super) fn finish(&mut self, answer: &mut String, events: &mut Vec<MessageEvent>) {
        let held = std::mem::take(&mut self.held);
        match self.at {
            At::Inside => self.think(&held, events),
            At::Beginning => answer.push_str(&held),
            At::JustAfter | At::Answer => {}
        }
    }
}
