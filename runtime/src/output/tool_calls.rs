//! Finds tool calls in a model's text, in the notations that models are trained on.

use super::{
    MessageEvent, held_back,
    json::{CallNews, CallObject, Step, ValueScan},
    push_content,
};

/// How a model writes tool calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name": …, "arguments": …}</tool_call>`: Hermes, Qwen.
    Hermes,
    /// `{"name": …, "parameters": …}`, alone or after `<|python_tag|>`, several with `;` between: Llama 3.
    Llama3Json,
    /// `[TOOL_CALLS][{"name": …, "arguments": …}]`, or `[TOOL_CALLS]name{…}`: Mistral.
    Mistral,
    /// `[{"name": …, "arguments": …}]` and nothing else: what a grammar forces.
    Array,
    /// The arguments of this function and nothing else: what a grammar forces.
    Named(String),
}

impl ToolFormat {
    /// What begins a call in the middle of text.
    fn marker(&self) -> Option<&'static str> {
        match self {
            Self::Hermes => Some("<tool_call>"),
            Self::Llama3Json => Some("<|python_tag|>"),
            Self::Mistral => Some("[TOOL_CALLS]"),
            Self::Array | Self::Named(_) => None,
        }
    }
}

#[derive(Debug)]
enum State {
    /// Text that may hold a marker.
    Text,
    /// After a marker, before what it announces.
    Marked,
    /// In a list of calls, between two of them.
    List,
    Object {
        object: CallObject,
        in_list: bool,
    },
    /// Mistral's short form: the name before the arguments.
    Name(String),
    /// The arguments of a call whose name is known.
    Arguments(ValueScan),
    /// After a call, where another may follow at once.
    Between,
}

const HERMES_END: &str = "</tool_call>";
const MISTRAL_ARGUMENTS: &str = "[ARGS]";
/// Longest name of Mistral's short form.
const MAX_NAME_BYTES: usize = 256;

/// See the [module](self).
#[derive(Debug)]
pub struct ToolCalls {
    format: ToolFormat,
    state: State,
    /// Text that may be a marker, or part of something that turns out to be no call.
    held: String,
    /// White space that is content only if content follows.
    space: String,
    /// Something other than white space was said.
    begun: bool,
    count: usize,
}

impl ToolCalls {
    /// For one message.
    #[must_use]
    pub fn new(format: ToolFormat) -> Self {
        let state = match format {
            ToolFormat::Array => State::Marked,
            ToolFormat::Named(_) => State::Arguments(ValueScan::default()),
            _ => State::Text,
        };
        Self {
            format,
            state,
            held: String::new(),
            space: String::new(),
            begun: false,
            count: 0,
        }
    }

    /// Calls so far.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, text: &str, events: &mut Vec<MessageEvent>) {
        for c in text.chars() {
            self.step(c, events);
        }
        if matches!(self.state, State::Text) {
            self.release(false, events);
        }
    }

    /// The text has ended.
    pub fn finish(&mut self, events: &mut Vec<MessageEvent>) {
        match &self.state {
            State::Object { object, .. } if object.is_named() => {}
            State::Between | State::Arguments(_) => {}
            _ => self.release(true, events),
        }
        self.held.clear();
        self.state = State::Text;
    }

    fn step(&mut self, c: char, events: &mut Vec<MessageEvent>) {
        self.state = match std::mem::replace(&mut self.state, State::Text) {
            State::Text => self.text(c, events),
            State::Marked => self.marked(c, events),
            State::List => self.list(c),
            State::Object { object, in_list } => self.object(object, in_list, c, events),
            State::Name(name) => self.name(name, c, events),
            State::Arguments(scan) => self.arguments(scan, c, events),
            State::Between => self.between(c, events),
        };
    }

    fn text(&mut self, c: char, events: &mut Vec<MessageEvent>) -> State {
        if !self.begun && c == '{' && self.format == ToolFormat::Llama3Json {
            self.begun = true;
            self.release(false, events);
            return self.begin_object(false, c, events);
        }
        self.begun |= !c.is_whitespace();
        self.held.push(c);
        match self.format.marker() {
            Some(marker) if self.held.ends_with(marker) => {
                let before = self.held.len() - marker.len();
                let text: String = self.held.drain(..before).collect();
                self.say(&text, events);
                State::Marked
            }
            _ => State::Text,
        }
    }

    fn marked(&mut self, c: char, events: &mut Vec<MessageEvent>) -> State {
        match c {
            _ if c.is_whitespace() => {
                self.held.push(c);
                State::Marked
            }
            '{' => self.begin_object(false, c, events),
            '[' if matches!(self.format, ToolFormat::Mistral | ToolFormat::Array) => {
                self.held.push(c);
                State::List
            }
            _ if self.format == ToolFormat::Mistral => {
                self.held.push(c);
                State::Name(c.to_string())
            }
            _ => self.give_up(c, events),
        }
    }

    /// What was held is no call: it is text, and so is `c`.
    fn give_up(&mut self, c: char, events: &mut Vec<MessageEvent>) -> State {
        let held = std::mem::take(&mut self.held);
        self.say(&held, events);
        self.text(c, events)
    }

    fn list(&mut self, c: char) -> State {
        match c {
            '{' => {
                let mut object = CallObject::new();
                object.step(c, &mut Vec::new());
                self.held.push(c);
                State::Object {
                    object,
                    in_list: true,
                }
            }
            ']' => {
                self.held.clear();
                State::Between
            }
            _ => {
                self.held.push(c);
                State::List
            }
        }
    }

    fn begin_object(&mut self, in_list: bool, c: char, events: &mut Vec<MessageEvent>) -> State {
        self.object(CallObject::new(), in_list, c, events)
    }

    fn object(
        &mut self,
        mut object: CallObject,
        in_list: bool,
        c: char,
        events: &mut Vec<MessageEvent>,
    ) -> State {
        let mut news = Vec::new();
        object.step(c, &mut news);
        if !object.is_named() {
            self.held.push(c);
        }
        for piece in news {
            match piece {
                CallNews::Name(name) => self.begin_call(name, events),
                CallNews::Arguments(text) => push_arguments(&text, events),
            }
        }
        if object.is_broken() && !object.is_named() {
            let held = std::mem::take(&mut self.held);
            self.say(&held, events);
            return State::Text;
        }
        if object.is_broken() || object.is_done() {
            return if in_list { State::List } else { State::Between };
        }
        State::Object { object, in_list }
    }

    fn begin_call(&mut self, name: String, events: &mut Vec<MessageEvent>) {
        self.held.clear();
        self.space.clear();
        self.begun = true;
        events.push(MessageEvent::ToolCall {
            index: self.count,
            name,
        });
        self.count += 1;
    }

    fn name(&mut self, mut name: String, c: char, events: &mut Vec<MessageEvent>) -> State {
        if c == '{' {
            let name = name
                .trim_end()
                .trim_end_matches(MISTRAL_ARGUMENTS)
                .trim()
                .to_owned();
            self.begin_call(name, events);
            return self.arguments(ValueScan::default(), c, events);
        }
        name.push(c);
        self.held.push(c);
        if name.len() > MAX_NAME_BYTES || c == '\n' {
            let held = std::mem::take(&mut self.held);
            self.say(&held, events);
            return State::Text;
        }
        State::Name(name)
    }

    fn arguments(&mut self, mut scan: ValueScan, c: char, events: &mut Vec<MessageEvent>) -> State {
        if scan.first().is_none() && c.is_whitespace() {
            return State::Arguments(scan);
        }
        if self.count == 0
            && let ToolFormat::Named(name) = &self.format
        {
            let name = name.clone();
            self.begin_call(name, events);
        }
        match scan.step(c) {
            Step::Inside => {
                push_arguments(c.encode_utf8(&mut [0; 4]), events);
                State::Arguments(scan)
            }
            Step::Last => {
                push_arguments(c.encode_utf8(&mut [0; 4]), events);
                State::Between
            }
            Step::After => State::Between,
        }
    }

    fn between(&mut self, c: char, events: &mut Vec<MessageEvent>) -> State {
        match self.format {
            ToolFormat::Hermes => {
                // Whatever stands before the end mark is no part of the call.
                self.held.push(c);
                if self.held.ends_with(HERMES_END) {
                    self.held.clear();
                    return State::Text;
                }
                let keep = held_back(&self.held, HERMES_END);
                let skip = self.held.len() - keep;
                self.held.drain(..skip);
                State::Between
            }
            ToolFormat::Llama3Json => match c {
                '{' => self.begin_object(false, c, events),
                ';' | ',' => State::Between,
                _ if c.is_whitespace() => State::Between,
                _ => self.text(c, events),
            },
            ToolFormat::Mistral => match c {
                ',' => State::Between,
                _ if c.is_whitespace() => State::Between,
                _ => self.text(c, events),
            },
            ToolFormat::Array | ToolFormat::Named(_) => State::Between,
        }
    }

    /// Hands on what is certainly text; everything at the end.
    fn release(&mut self, all: bool, events: &mut Vec<MessageEvent>) {
        let keep = match self.format.marker() {
            Some(marker) if !all => held_back(&self.held, marker),
            _ => 0,
        };
        let sure = self.held.len() - keep;
        let text: String = self.held.drain(..sure).collect();
        self.say(&text, events);
        if all && self.count == 0 {
            push_content(&std::mem::take(&mut self.space), events);
        }
    }

    /// Content; white space at its end waits for more.
    fn say(&mut self, text: &str, events: &mut Vec<MessageEvent>) {
        let kept = text.trim_end();
        if kept.is_empty() {
            self.space.push_str(text);
            return;
        }
        let mut out = std::mem::take(&mut self.space);
        out.push_str(kept);
        self.space.push_str(&text[kept.len()..]);
        push_content(&out, events);
    }
}

fn push_arguments(text: &str, events: &mut Vec<MessageEvent>) {
    match events.last_mut() {
        Some(MessageEvent::Arguments(last)) => last.push_str(text),
        _ => events.push(MessageEvent::Arguments(text.to_owned())),
    }
}
