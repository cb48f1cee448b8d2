//! Follows JSON texts character by character, without building them.

/// Finds where one JSON value ends.
#[derive(Debug, Default)]
pub(super) struct ValueScan {
    depth: u32,
    in_string: bool,
    escaped: bool,
    first: Option<char>,
}

/// Where a character stands to the value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Part of it; more follows.
    Inside,
    /// Its last character.
    Last,
    /// No part of it: the value (a number or a word) ended just before.
    After,
}

impl ValueScan {
    /// The value's first character.
    pub(super) fn first(&self) -> Option<char> {
        self.first
    }

    /// Takes the next character; the first one must not be white space.
    pub(super) fn step(&mut self, c: char) -> Step {
        let is_first = self.first.is_none();
        self.first.get_or_insert(c);
        if self.in_string {
            match c {
                _ if self.escaped => self.escaped = false,
                '\\' => self.escaped = true,
                '"' => self.in_string = false,
                _ => {}
            }
            return if self.in_string || self.depth > 0 {
                Step::Inside
            } else {
                Step::Last
            };
        }
        match c {
            '"' if self.depth > 0 || is_first => self.in_string = true,
            '{' | '[' if self.depth > 0 || is_first => self.depth += 1,
            '}' | ']' if self.depth > 0 => {
                self.depth -= 1;
                if self.depth == 0 {
                    return Step::Last;
                }
            }
            _ if self.depth == 0 && (c.is_whitespace() || matches!(c, ',' | '}' | ']')) => {
                return Step::After;
            }
            _ => {}
        }
        Step::Inside
    }
}

/// What a call object turned out to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum CallNews {
    /// The function's name.
    Name(String),
    /// A piece of the arguments.
    Arguments(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Start,
    BeforeKey,
    InKey,
    Colon,
    BeforeValue,
    InValue,
    AfterValue,
    Done,
    Broken,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Name,
    Arguments,
    Other,
}

/// Follows `{"name": …, "arguments": {…}}` (or `parameters`), in any order of keys.
#[derive(Debug)]
pub(super) struct CallObject {
    at: At,
    role: Role,
    /// The key, or a value that cannot be handed on yet.
    text: String,
    value: ValueScan,
    named: bool,
    /// Arguments that came before the name.
    early: String,
    has_arguments: bool,
}

impl CallObject {
    pub(super) fn new() -> Self {
        Self {
            at: At::Start,
            role: Role::Other,
            text: String::new(),
            value: ValueScan::default(),
            named: false,
            early: String::new(),
            has_arguments: false,
        }
    }

    /// The object is complete.
    pub(super) fn is_done(&self) -> bool {
        self.at == At::Done
    }

    /// It is no call.
    pub(super) fn is_broken(&self) -> bool {
        self.at == At::Broken
    }

    /// Its name was told.
    pub(super) fn is_named(&self) -> bool {
        self.named
    }

    /// Takes the next character. Nothing may be pushed once it is done or broken.
    pub(super) fn step(&mut self, c: char, news: &mut Vec<CallNews>) {
        let space = c.is_whitespace();
        self.at = match (self.at, c) {
            (At::Start | At::BeforeKey | At::Colon | At::BeforeValue | At::AfterValue, _)
                if space =>
            {
                self.at
            }
            (At::Start, '{') => At::BeforeKey,
            (At::BeforeKey, '"') => {
                self.text.clear();
                self.text.push(c);
                self.value = ValueScan::default();
                self.value.step(c);
                At::InKey
            }
            (At::BeforeKey | At::AfterValue, '}') => self.complete(news),
            (At::InKey, _) => {
                self.text.push(c);
                match self.value.step(c) {
                    Step::Last => self.read_key(),
                    Step::Inside | Step::After => At::InKey,
                }
            }
            (At::Colon, ':') => At::BeforeValue,
            (At::BeforeValue, _) => {
                self.value = ValueScan::default();
                self.text.clear();
                self.take_value(c, news)
            }
            (At::InValue, _) => self.take_value(c, news),
            (At::AfterValue, ',') => At::BeforeKey,
            _ => At::Broken,
        };
    }

    fn read_key(&mut self) -> At {
        let Ok(key) = serde_json::from_str::<String>(&self.text) else {
            return At::Broken;
        };
        self.role = match key.as_str() {
            "name" => Role::Name,
            "arguments" | "parameters" => Role::Arguments,
            _ => Role::Other,
        };
        At::Colon
    }

    fn take_value(&mut self, c: char, news: &mut Vec<CallNews>) -> At {
        let step = self.value.step(c);
        if step != Step::After {
            let streams =
                self.role == Role::Arguments && matches!(self.value.first(), Some('{' | '['));
            if streams {
                self.arguments(c.encode_utf8(&mut [0; 4]), news);
            } else if self.role != Role::Other {
                self.text.push(c);
            }
        }
        match step {
            Step::Inside => At::InValue,
            Step::Last => self.end_value(news),
            Step::After => {
                self.at = self.end_value(news);
                if self.at == At::AfterValue {
                    self.step(c, news);
                }
                self.at
            }
        }
    }

    fn end_value(&mut self, news: &mut Vec<CallNews>) -> At {
        match self.role {
            Role::Other => {}
            Role::Name => {
                let Ok(name) = serde_json::from_str::<String>(&self.text) else {
                    return At::Broken;
                };
                if !self.named {
                    self.named = true;
                    news.push(CallNews::Name(name));
                    let early = std::mem::take(&mut self.early);
                    if !early.is_empty() {
                        news.push(CallNews::Arguments(early));
                    }
                }
            }
            Role::Arguments => {
                if !matches!(self.value.first(), Some('{' | '[')) {
                    // Some models write the arguments as a string that holds JSON.
                    let text = serde_json::from_str::<String>(&self.text);
                    let text = text.unwrap_or_else(|_| "{}".to_owned());
                    self.arguments(&text, news);
                }
                self.has_arguments = true;
            }
        }
        At::AfterValue
    }

    fn arguments(&mut self, text: &str, news: &mut Vec<CallNews>) {
        if self.has_arguments {
            return;
        }
        if !self.named {
            self.early.push_str(text);
            return;
        }
        match news.last_mut() {
            Some(CallNews::Arguments(last)) => last.push_str(text),
            _ => news.push(CallNews::Arguments(text.to_owned())),
        }
    }

    fn complete(&mut self, news: &mut Vec<CallNews>) -> At {
        if !self.named {
            return At::Broken;
        }
        if !self.has_arguments {
            news.push(CallNews::Arguments("{}".to_owned()));
        }
        At::Done
    }
}
