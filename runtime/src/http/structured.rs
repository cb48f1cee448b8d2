//! What an output must be: `response_format`, `structured_outputs` and their older names.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use super::{error::ApiError, sampling::SamplingFields};
use crate::grammar::{GrammarError, GrammarSpec};

/// `structured_outputs`: one of its fields.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[allow(missing_docs)] // The names are vLLM's.
pub struct StructuredFields {
    pub json: Option<Value>,
    pub regex: Option<String>,
    pub choice: Option<Vec<String>>,
    pub grammar: Option<String>,
    pub json_object: Option<bool>,
}

/// A schema, or its text.
fn schema(name: &str, value: &Value) -> Result<GrammarSpec, ApiError> {
    let schema = match value {
        Value::String(text) => serde_json::from_str(text)
            .map_err(|error| ApiError::invalid(name, format!("the schema is not JSON: {error}")))?,
        other => other.clone(),
    };
    if !schema.is_object() && !schema.is_boolean() {
        return Err(ApiError::invalid(name, "a JSON schema must be an object"));
    }
    Ok(GrammarSpec::JsonSchema(schema))
}

/// OpenAI's `response_format`, also in the flat form of `/v1/responses`.
pub(super) fn response_format(format: &Value) -> Result<Option<GrammarSpec>, ApiError> {
    match format["type"].as_str() {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(GrammarSpec::JsonObject)),
        Some("json_schema") => {
            let nested = &format["json_schema"]["schema"];
            let found = if nested.is_null() {
                &format["schema"]
            } else {
                nested
            };
            if found.is_null() {
                return Err(ApiError::invalid(
                    "response_format",
                    "response_format of type json_schema needs json_schema.schema",
                ));
            }
            schema("response_format", found).map(Some)
        }
        _ => Err(ApiError::invalid(
            "response_format",
            "response_format.type must be text, json_object or json_schema",
        )),
    }
}

/// The one grammar that a request asks for.
pub(super) fn grammar_of(fields: &SamplingFields) -> Result<Option<GrammarSpec>, ApiError> {
    let mut found: Vec<GrammarSpec> = Vec::new();
    if let Some(format) = &fields.response_format {
        found.extend(response_format(format)?);
    }
    let structured = fields.structured_outputs.clone().unwrap_or_default();
    for json in [&structured.json, &fields.guided_json]
        .into_iter()
        .flatten()
    {
        found.push(schema("structured_outputs", json)?);
    }
    let regexes = [structured.regex, fields.guided_regex.clone()];
    found.extend(regexes.into_iter().flatten().map(GrammarSpec::Regex));
    let choices = [structured.choice, fields.guided_choice.clone()];
    found.extend(choices.into_iter().flatten().map(GrammarSpec::Choice));
    let grammars = [structured.grammar, fields.guided_grammar.clone()];
    found.extend(grammars.into_iter().flatten().map(GrammarSpec::Lark));
    if structured.json_object == Some(true) {
        found.push(GrammarSpec::JsonObject);
    }
    if found.len() > 1 {
        return Err(ApiError::invalid(
            "structured_outputs",
            "the request says in several ways what the output must be: leave one",
        ));
    }
    Ok(found.pop())
}

/// What a grammar that cannot be used means to a client.
pub(super) fn refused(error: &GrammarError) -> ApiError {
    match error {
        GrammarError::Busy => ApiError::overloaded(error.to_string(), 1),
        GrammarError::Tokenizer(_) => ApiError::internal(error.to_string()),
        GrammarError::Invalid(_) | GrammarError::TooLarge { .. } | GrammarError::TooSlow => {
            let message = format!("the grammar or schema cannot be used: {error}");
            ApiError::invalid("structured_outputs", message)
        }
    }
}
