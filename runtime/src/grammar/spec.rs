//! What a request may ask for, and its bounds.

use llguidance::api::TopLevelGrammar;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{GrammarError, cache::Key};

/// Largest grammar, in bytes of its text.
pub const MAX_GRAMMAR_BYTES: usize = 128 << 10;
/// Deepest nesting of a schema, or of brackets in an expression.
pub const MAX_GRAMMAR_DEPTH: usize = 64;
/// Most choices.
pub const MAX_CHOICES: usize = 1024;

/// What an output must be.
#[derive(Debug, Clone, PartialEq)]
pub enum GrammarSpec {
    /// Any JSON object.
    JsonObject,
    /// A JSON value that this schema accepts.
    JsonSchema(Value),
    /// A text that the whole expression matches.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A text of this grammar, in Lark's notation.
    Lark(String),
}

impl GrammarSpec {
    /// Refuses what is too large to be tried.
    pub(super) fn check(&self) -> Result<(), GrammarError> {
        let (bytes, depth) = match self {
            Self::JsonObject => (0, 0),
            Self::JsonSchema(schema) => (schema.to_string().len(), depth_of(schema)),
            Self::Regex(text) | Self::Lark(text) => (text.len(), bracket_depth(text)),
            Self::Choice(choices) => {
                if choices.len() > MAX_CHOICES {
                    return Err(GrammarError::TooLarge {
                        what: "the number of choices",
                        limit: MAX_CHOICES,
                    });
                }
                if choices.is_empty() || choices.iter().any(String::is_empty) {
                    return Err(GrammarError::Invalid(
                        "a choice needs at least one text, and none that is empty".to_owned(),
                    ));
                }
                (choices.iter().map(String::len).sum(), 0)
            }
        };
        let bounds = [
            ("its text in bytes", bytes, MAX_GRAMMAR_BYTES),
            ("its nesting", depth, MAX_GRAMMAR_DEPTH),
        ];
        for (what, value, limit) in bounds {
            if value > limit {
                return Err(GrammarError::TooLarge { what, limit });
            }
        }
        if let Self::Lark(text) = self
            && text.contains("::=")
        {
            return Err(GrammarError::Invalid(
                "the grammar is not in Lark's notation: write rules as `start: …` instead of `root ::= …`"
                    .to_owned(),
            ));
        }
        Ok(())
    }

    /// Its place in the cache.
    pub(super) fn key(&self) -> Key {
        let (kind, text) = match self {
            Self::JsonObject => (0u8, String::new()),
            Self::JsonSchema(schema) => (1, schema.to_string()),
            Self::Regex(text) => (2, text.clone()),
            Self::Choice(choices) => (3, json!(choices).to_string()),
            Self::Lark(text) => (4, text.clone()),
        };
        let mut hasher = Sha256::new();
        hasher.update([kind]);
        hasher.update(text.as_bytes());
        hasher.finalize().into()
    }

    /// As the library takes it.
    pub(super) fn top_level(&self) -> anyhow::Result<TopLevelGrammar> {
        Ok(match self {
            Self::JsonObject => TopLevelGrammar::from_json_schema(compact(json!({
                "type": "object"
            }))),
            Self::JsonSchema(schema) => TopLevelGrammar::from_json_schema(compact(schema.clone())),
            Self::Regex(text) => TopLevelGrammar::from_regex(text),
            Self::Choice(choices) => {
                let choices: Vec<String> = choices
                    .iter()
                    .map(|choice| json!(choice).to_string())
                    .collect();
                TopLevelGrammar::from_lark(format!("start: {}", choices.join(" | ")))
            }
            Self::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        })
    }
}

/// One line, with the spaces that models are used to: freedom in white space is freedom to write nothing else.
fn compact(mut schema: Value) -> Value {
    if let Some(object) = schema.as_object_mut() {
        let style =
            json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "});
        object.insert("x-guidance".to_owned(), style);
    }
    schema
}

/// Nesting of a JSON value. The parser of requests has bounded it already.
fn depth_of(value: &Value) -> usize {
    match value {
        Value::Array(list) => 1 + list.iter().map(depth_of).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(depth_of).max().unwrap_or(0),
        _ => 0,
    }
}

fn bracket_depth(text: &str) -> usize {
    let mut depth = 0usize;
    let mut deepest = 0;
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    deepest
}
