//! Renders a conversation with the model's own Jinja template.
//!
//! Invariants:
//! - templates come with the model or from the operator of the server, never from a request;
//! - a rendering ends: instructions ([`MAX_FUEL`]) and output ([`MAX_OUTPUT_BYTES`]) are bounded.

use std::io;

use minijinja::{
    Environment, Error, ErrorKind, UndefinedBehavior, Value,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde},
};
use serde::Serialize;

use crate::tokenizer::Tokenizer;

/// Instructions of one rendering (and 64-byte pieces of data that they make).
pub const MAX_FUEL: u64 = 20_000_000;
/// Bytes that one rendering may write.
pub const MAX_OUTPUT_BYTES: usize = 32 << 20;

const NAME: &str = "chat";

/// Why a conversation could not be rendered.
#[derive(Debug, thiserror::Error)]
pub enum ChatTemplateError {
    /// The template itself is broken: the server's problem.
    #[error("the model's chat template is not valid: {0}")]
    Invalid(#[source] Error),
    /// The template refused the conversation (`raise_exception`), in its own words.
    #[error("the model's chat template refused the messages: {0}")]
    Refused(String),
    /// The template needs something that the messages do not have.
    #[error("the model's chat template could not be rendered with these messages: {0}")]
    Render(String),
    /// It would not end, or wrote too much.
    #[error(
        "rendering the messages took too long or became too large: send fewer or shorter messages"
    )]
    TooLarge,
}

/// A compiled template.
pub struct ChatTemplate {
    env: Environment<'static>,
    source: String,
    tokens: Vec<(&'static str, Option<String>)>,
}

/// What a template sees, beside the model's special tokens.
#[derive(Debug, Serialize)]
pub struct ChatInput<'a> {
    /// The messages, as the client sent them.
    pub messages: &'a [serde_json::Value],
    /// Ask for the beginning of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Tools, in OpenAI's form.
    pub tools: Option<&'a serde_json::Value>,
    /// Further variables, as the client sent them. They cannot replace the others.
    pub kwargs: Option<&'a serde_json::Map<String, serde_json::Value>>,
}

/// Marks errors that a template raised itself.
const REFUSED: &str = "raise_exception: ";

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// [`ChatTemplateError::Invalid`].
    pub fn new(source: String, tokenizer: &Tokenizer) -> Result<Self, ChatTemplateError> {
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(ChatTemplateError::Invalid)?;
        env.set_syntax(syntax);
        env.set_undefined_behavior(UndefinedBehavior::Lenient);
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.set_fuel(Some(MAX_FUEL));
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_filter("tojson", to_json);
        env.add_function(
            "raise_exception",
            |message: String| -> Result<Value, Error> {
                Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("{REFUSED}{message}"),
                ))
            },
        );
        env.add_function("strftime_now", strftime_now);
        env.add_template_owned(NAME, source.clone())
            .map_err(ChatTemplateError::Invalid)?;
        let tokens = tokenizer.named_tokens();
        Ok(Self {
            env,
            source,
            tokens: tokens
                .into_iter()
                .map(|(name, text)| (name, text.map(str::to_owned)))
                .collect(),
        })
    }

    /// Whether a text appears in the template.
    #[must_use]
    pub fn mentions(&self, text: &str) -> bool {
        self.source.contains(text)
    }

    /// The prompt of a conversation.
    ///
    /// # Errors
    /// [`ChatTemplateError`] when the template refuses the messages or needs what they do not have.
    pub fn render(&self, input: &ChatInput<'_>) -> Result<String, ChatTemplateError> {
        let messages: Vec<serde_json::Value> = input.messages.iter().map(flatten_content).collect();
        let mut context = input.kwargs.cloned().unwrap_or_default();
        context.insert("messages".to_owned(), messages.into());
        context.insert(
            "add_generation_prompt".to_owned(),
            input.add_generation_prompt.into(),
        );
        context.insert("tools".to_owned(), input.tools.cloned().unwrap_or_default());
        for (name, text) in &self.tokens {
            let text = text.as_deref().unwrap_or_default();
            context.insert((*name).to_owned(), text.into());
        }
        let template = self
            .env
            .get_template(NAME)
            .map_err(ChatTemplateError::Invalid)?;
        let mut output = Bounded(Vec::new());
        template
            .render_captured_to(Value::from(Serde(&context)), &mut output)
            .map_err(classify)?;
        String::from_utf8(output.0).map_err(|error| ChatTemplateError::Render(error.to_string()))
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").finish_non_exhaustive()
    }
}

fn classify(error: Error) -> ChatTemplateError {
    if matches!(error.kind(), ErrorKind::OutOfFuel | ErrorKind::WriteFailure) {
        return ChatTemplateError::TooLarge;
    }
    let detail = error.detail().unwrap_or_default();
    match detail.strip_prefix(REFUSED) {
        Some(message) => ChatTemplateError::Refused(message.to_owned()),
        None => ChatTemplateError::Render(error.to_string()),
    }
}

/// Messages whose content is a list of text parts get the parts' text, one per line, as templates expect a string.
fn flatten_content(message: &serde_json::Value) -> serde_json::Value {
    let Some(parts) = message["content"].as_array() else {
        return message.clone();
    };
    let texts: Vec<&str> = parts
        .iter()
        .filter_map(|part| part["text"].as_str())
        .collect();
    let mut message = message.clone();
    message["content"] = texts.join("\n").into();
    message
}

/// Python's `json.dumps(value, ensure_ascii=False)`, which templates are written for.
fn to_json(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    // Accepted for compatibility: the output is neither escaped nor sorted in any case.
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
    let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
    kwargs.assert_all_used()?;
    let fail =
        |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let mut tree = serde_json::to_value(value).map_err(fail)?;
    if sort_keys == Some(true) {
        tree.sort_all_objects();
    }
    let mut bytes = Vec::new();
    match indent {
        Some(width) => {
            let indent = " ".repeat(width.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
            tree.serialize(&mut serializer).map_err(fail)?;
        }
        None => {
            let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, PythonStyle);
            tree.serialize(&mut serializer).map_err(fail)?;
        }
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned().into())
}

/// `{"a": 1, "b": [2, 3]}`: a space after each comma and colon.
struct PythonStyle;

impl serde_json::ser::Formatter for PythonStyle {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// The current date and time (UTC) by a `strftime` pattern.
fn strftime_now(format: &str) -> Result<String, Error> {
    let now = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
    jiff::fmt::strtime::format(format, &now)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
}

/// Refuses to grow above [`MAX_OUTPUT_BYTES`].
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(io::Error::other("the output is too large"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
