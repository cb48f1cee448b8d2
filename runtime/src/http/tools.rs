//! The tools of a request: their checks, what the chat template sees of them, and the grammar that forces a call.

use serde_json::{Map, Value, json};

use super::error::ApiError;
use crate::{grammar::GrammarSpec, output::ToolFormat};

/// Most tools of a request.
const MAX_TOOLS: usize = 128;
/// Longest name of a function.
const MAX_NAME_BYTES: usize = 128;
/// Most calls that a grammar forces in one answer.
const MAX_FORCED_CALLS: usize = 8;

/// Which tools the model may or must call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ToolChoice {
    /// As the model likes.
    Auto,
    /// At least one.
    Required,
    /// This one.
    Named(String),
}

/// Tools that the model is told of.
#[derive(Debug, Clone)]
pub(super) struct Tools {
    /// OpenAI's form: `[{"type": "function", "function": {"name", "description", "parameters"}}]`.
    pub(super) list: Vec<Value>,
    pub(super) choice: ToolChoice,
    /// Several calls in one answer.
    pub(super) parallel: bool,
}

impl Tools {
    /// Checks OpenAI's `tools` and `tool_choice`; `None` when no tool is to be called.
    pub(super) fn read(
        tools: Option<&Value>,
        choice: Option<&Value>,
        parallel: Option<bool>,
    ) -> Result<Option<Self>, ApiError> {
        let list = match tools {
            None | Some(Value::Null) => &[],
            Some(Value::Array(list)) => list.as_slice(),
            Some(_) => return Err(ApiError::invalid("tools", "tools must be a list")),
        };
        if list.len() > MAX_TOOLS {
            return Err(ApiError::invalid(
                "tools",
                format!(
                    "there are {} tools: at most {MAX_TOOLS} are allowed",
                    list.len()
                ),
            ));
        }
        let list: Vec<Value> = list
            .iter()
            .enumerate()
            .map(|(index, tool)| check_tool(index, tool))
            .collect::<Result<_, _>>()?;
        let names = || {
            list.iter()
                .filter_map(|tool| tool["function"]["name"].as_str())
        };
        let choice = match choice {
            None | Some(Value::Null) => ToolChoice::Auto,
            Some(Value::String(word)) => match word.as_str() {
                "none" => return Ok(None),
                "auto" => ToolChoice::Auto,
                "required" => ToolChoice::Required,
                _ => {
                    return Err(bad_choice(
                        "tool_choice must be none, auto, required or a function",
                    ));
                }
            },
            Some(object) => {
                let name = object["function"]["name"]
                    .as_str()
                    .or(object["name"].as_str());
                match name {
                    Some(name) if names().any(|known| known == name) => {
                        ToolChoice::Named(name.to_owned())
                    }
                    _ => {
                        return Err(bad_choice(
                            "tool_choice names a function that tools does not have",
                        ));
                    }
                }
            }
        };
        if list.is_empty() {
            return match choice {
                ToolChoice::Auto => Ok(None),
                _ => Err(bad_choice("tool_choice needs tools")),
            };
        }
        Ok(Some(Self {
            list,
            choice,
            parallel: parallel.unwrap_or(true),
        }))
    }

    /// The grammar of a forced call, and the form that it writes.
    pub(super) fn forced(&self) -> Option<(GrammarSpec, ToolFormat)> {
        match &self.choice {
            ToolChoice::Auto => None,
            ToolChoice::Named(name) => {
                let tool = self
                    .list
                    .iter()
                    .find(|tool| tool["function"]["name"] == **name)?;
                let spec = GrammarSpec::JsonSchema(parameters(tool));
                Some((spec, ToolFormat::Named(name.clone())))
            }
            ToolChoice::Required => {
                let mut definitions = Map::new();
                let mut calls = Vec::new();
                for (index, tool) in self.list.iter().enumerate() {
                    let place = format!("tool_{index}");
                    let prefix = format!("#/$defs/{place}");
                    let schema = moved(parameters(tool), &prefix);
                    calls.push(json!({
                        "type": "object",
                        "properties": {"name": {"const": tool["function"]["name"]}, "arguments": {"$ref": prefix}},
                        "required": ["name", "arguments"],
                        "additionalProperties": false,
                    }));
                    definitions.insert(place, schema);
                }
                let most = if self.parallel { MAX_FORCED_CALLS } else { 1 };
                let schema = json!({
                    "type": "array", "minItems": 1, "maxItems": most, "items": {"anyOf": calls}, "$defs": definitions,
                });
                Some((GrammarSpec::JsonSchema(schema), ToolFormat::Array))
            }
        }
    }
}

fn bad_choice(message: &str) -> ApiError {
    ApiError::invalid("tool_choice", message)
}

/// A tool in the nested form, whether it came nested or flat.
fn check_tool(index: usize, tool: &Value) -> Result<Value, ApiError> {
    let wrong = |field: &str, message: &str| {
        Err(ApiError::invalid(
            &format!("tools[{index}]{field}"),
            message,
        ))
    };
    if tool["type"] != "function" {
        return wrong(".type", "only tools of type function are supported");
    }
    let function = match &tool["function"] {
        Value::Null => tool,
        nested => nested,
    };
    let name = function["name"].as_str().unwrap_or_default();
    let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | ':' | '/');
    if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.chars().all(is_name) {
        return wrong(
            ".function.name",
            "a function needs a name of letters, digits, _ and -",
        );
    }
    let schema = &function["parameters"];
    if !schema.is_null() && !schema.is_object() {
        return wrong(".function.parameters", "parameters must be a JSON schema");
    }
    let description = &function["description"];
    if !description.is_null() && !description.is_string() {
        return wrong(".function.description", "a description must be a text");
    }
    let mut shown = Map::new();
    shown.insert("name".to_owned(), name.into());
    if !description.is_null() {
        shown.insert("description".to_owned(), description.clone());
    }
    let none = || json!({"type": "object", "properties": {}});
    let schema = if schema.is_null() {
        none()
    } else {
        schema.clone()
    };
    shown.insert("parameters".to_owned(), schema);
    Ok(json!({"type": "function", "function": shown}))
}

/// The schema of a tool's arguments: always an object's.
fn parameters(tool: &Value) -> Value {
    let mut schema = tool["function"]["parameters"].clone();
    if let Some(object) = schema.as_object_mut() {
        object.entry("type").or_insert_with(|| "object".into());
    }
    schema
}

/// A schema that now lies at `prefix` of another: its references follow it.
fn moved(schema: Value, prefix: &str) -> Value {
    match schema {
        Value::Object(object) => Value::Object(
            object
                .into_iter()
                .map(|(key, value)| {
                    let value = match (&*key, value) {
                        ("$ref", Value::String(target)) => match target.strip_prefix('#') {
                            Some(rest) => format!("{prefix}{rest}").into(),
                            None => target.into(),
                        },
                        (_, value) => moved(value, prefix),
                    };
                    (key, value)
                })
                .collect(),
        ),
        Value::Array(list) => list.into_iter().map(|value| moved(value, prefix)).collect(),
        other => other,
    }
}

/// The conversation for a template that knows no tools: they are described in the system message, in Hermes's notation,
/// and calls and results become text.
pub(super) fn describe_in_text(messages: &[Value], tools: &[Value]) -> Vec<Value> {
    let mut described = String::from(
        "You may call functions to help with the user's request. The functions are:\n",
    );
    for tool in tools {
        described.push_str(&tool["function"].to_string());
        described.push('\n');
    }
    described.push_str(
        "To call one, write <tool_call>{\"name\": NAME, \"arguments\": ARGUMENTS}</tool_call> and nothing else.",
    );
    let mut out = Vec::with_capacity(messages.len() + 1);
    let mut rest = messages;
    let system = messages
        .first()
        .filter(|message| message["role"] == "system");
    if let Some(system) = system {
        let text = text_of(&system["content"]);
        out.push(json!({"role": "system", "content": format!("{text}\n\n{described}")}));
        rest = &messages[1..];
    } else {
        out.push(json!({"role": "system", "content": described}));
    }
    out.extend(rest.iter().map(as_text));
    out
}

fn as_text(message: &Value) -> Value {
    if message["role"] == "tool" {
        let text = text_of(&message["content"]);
        let content = format!("<tool_response>\n{text}\n</tool_response>");
        return json!({"role": "user", "content": content});
    }
    let Some(calls) = message["tool_calls"].as_array() else {
        return message.clone();
    };
    let mut content = text_of(&message["content"]);
    for call in calls {
        let call =
            json!({"name": call["function"]["name"], "arguments": call["function"]["arguments"]});
        content.push_str(&format!("<tool_call>{call}</tool_call>"));
    }
    json!({"role": message["role"], "content": content})
}

/// A message's content as one text.
pub(super) fn text_of(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let texts: Vec<&str> = parts
                .iter()
                .filter_map(|part| part["text"].as_str())
                .collect();
            texts.join("\n")
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // Tests.

    use super::*;

    fn tool(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name, "parameters": {
            "type": "object", "properties": {"x": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"type": "integer"}},
        }}})
    }

    #[test]
    fn references_follow_their_schema() {
        let tools = json!([tool("f"), tool("g")]);
        let read = Tools::read(Some(&tools), Some(&json!("required")), Some(false))
            .unwrap()
            .unwrap();
        let Some((GrammarSpec::JsonSchema(schema), ToolFormat::Array)) = read.forced() else {
            panic!("a schema");
        };
        assert_eq!(schema["maxItems"], 1);
        assert_eq!(
            schema["$defs"]["tool_1"]["properties"]["x"]["$ref"],
            "#/$defs/tool_1/$defs/x"
        );
        assert_eq!(
            schema["items"]["anyOf"][1]["properties"]["name"]["const"],
            "g"
        );
    }

    #[test]
    fn choices_are_checked() {
        let tools = json!([tool("f")]);
        let read = |choice: Value| Tools::read(Some(&tools), Some(&choice), None);
        assert!(read(json!("none")).unwrap().is_none());
        let named = read(json!({"type": "function", "function": {"name": "f"}})).unwrap();
        assert_eq!(named.unwrap().choice, ToolChoice::Named("f".to_owned()));
        for wrong in [
            json!("always"),
            json!({"function": {"name": "h"}}),
            json!(7),
        ] {
            assert_eq!(
                read(wrong).unwrap_err().param.as_deref(),
                Some("tool_choice")
            );
        }
        assert!(Tools::read(None, Some(&json!("required")), None).is_err());
        assert!(
            Tools::read(None, Some(&json!("auto")), None)
                .unwrap()
                .is_none()
        );
        let unnamed = json!([{"type": "function", "function": {}}]);
        assert!(Tools::read(Some(&unnamed), None, None).is_err());
    }

    #[test]
    fn a_template_without_tools_sees_text() {
        let messages = [
            json!({"role": "user", "content": "?"}),
            json!({"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}),
            json!({"role": "tool", "content": "42", "tool_call_id": "1"}),
        ];
        let seen = describe_in_text(&messages, &[tool("f")]);
        assert_eq!(seen[0]["role"], "system");
        assert!(
            seen[2]["content"]
                .as_str()
                .unwrap()
                .contains("<tool_call>{\"name\":\"f\"")
        );
        assert_eq!(seen[3]["content"], "<tool_response>\n42\n</tool_response>");
    }
}
