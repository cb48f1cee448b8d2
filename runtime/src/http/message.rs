//! An assistant's message as it comes about: the part that all chat APIs share.

use super::error::ApiError;
use crate::{
    engine::request::FinishReason,
    generation::{StopCause, TextFinish, TextUpdate},
    output::{MessageEvent, MessageParser, Reasoning, ReasoningFormat, ToolCalls, ToolFormat},
};

/// How to read a model's text.
#[derive(Debug, Clone, Default)]
pub(super) struct MessageFormat {
    /// With whether the prompt ends inside the reasoning.
    pub(super) reasoning: Option<(ReasoningFormat, bool)>,
    pub(super) tools: Option<ToolFormat>,
}

impl MessageFormat {
    /// All text is content.
    pub(super) fn is_plain(&self) -> bool {
        self.reasoning.is_none() && self.tools.is_none()
    }

    fn parser(&self) -> MessageParser {
        MessageParser::new(
            self.reasoning
                .map(|(format, inside)| Reasoning::new(format, inside)),
            self.tools.clone().map(ToolCalls::new),
        )
    }
}

/// A tool call.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) arguments: String,
}

/// One choice's message so far.
#[derive(Debug)]
pub(super) struct Message {
    parser: MessageParser,
    /// Mistral's templates take ids of nine letters and digits only.
    short_ids: bool,
    pub(super) reasoning: String,
    pub(super) content: String,
    pub(super) calls: Vec<Call>,
    pub(super) finish: Option<TextFinish>,
}

impl Message {
    pub(super) fn new(format: &MessageFormat) -> Self {
        Self {
            parser: format.parser(),
            short_ids: format.tools == Some(ToolFormat::Mistral),
            reasoning: String::new(),
            content: String::new(),
            calls: Vec::new(),
            finish: None,
        }
    }

    /// Takes text; the events that it made have been taken into the message.
    pub(super) fn push(&mut self, text: &str) -> Vec<MessageEvent> {
        let mut events = Vec::new();
        self.parser.push(text, &mut events);
        self.take(&events);
        events
    }

    /// The text has ended.
    pub(super) fn end(&mut self, finish: &TextFinish) -> Vec<MessageEvent> {
        let mut events = Vec::new();
        self.parser.finish(&mut events);
        self.take(&events);
        self.finish = Some(finish.clone());
        events
    }

    /// Takes an update whole.
    pub(super) fn update(&mut self, update: &TextUpdate) -> Vec<MessageEvent> {
        let mut events = self.push(&update.text());
        if let Some(finish) = &update.finish {
            events.extend(self.end(finish));
        }
        events
    }

    fn take(&mut self, events: &[MessageEvent]) {
        for event in events {
            match event {
                MessageEvent::Reasoning(text) => self.reasoning.push_str(text),
                MessageEvent::Content(text) => self.content.push_str(text),
                MessageEvent::ToolCall { name, .. } => self.calls.push(Call {
                    id: self.new_id(),
                    name: name.clone(),
                    arguments: String::new(),
                }),
                MessageEvent::Arguments(text) => {
                    if let Some(call) = self.calls.last_mut() {
                        call.arguments.push_str(text);
                    }
                }
            }
        }
    }

    fn new_id(&self) -> String {
        let id = uuid::Uuid::new_v4().simple().to_string();
        if self.short_ids {
            id[..9].to_owned()
        } else {
            format!("call_{}", &id[..24])
        }
    }

    /// It ended by calling tools.
    pub(super) fn calls_tools(&self) -> bool {
        let stopped = self
            .finish
            .as_ref()
            .is_some_and(|f| f.reason == FinishReason::Stop);
        stopped && !self.calls.is_empty()
    }

    /// The stop string that ended it.
    pub(super) fn stop_string(&self) -> Option<&str> {
        match &self.finish.as_ref()?.stop_cause {
            Some(StopCause::Text(text)) => Some(text),
            _ => None,
        }
    }
}

/// What went wrong with a choice, if its answer cannot be given.
pub(super) fn failure(update: &TextUpdate) -> Option<ApiError> {
    let finish = update.finish.as_ref()?;
    finish.error.as_ref().map(|_| ApiError::from_finish(finish))
}
