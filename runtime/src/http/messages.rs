//! Anthropic's `/v1/messages` and `/v1/messages/count_tokens`.

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::State,
    response::{IntoResponse, Response},
};
use http::StatusCode;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    App,
    access::AccessInfo,
    chat::{Conversation, Running},
    choices::{Choices, Usage},
    error::ApiError,
    message::{Message, failure},
    openai::{BodyResult, body_bytes, new_id},
    parse,
    sampling::{OneOrMany, SamplingFields},
    sse,
    tools::{Tools, text_of},
};
use crate::{engine::request::FinishReason, output::MessageEvent};

/// Fields that are used; others are ignored.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct MessagesFields {
    model: Option<String>,
    #[schemars(schema_with = "super::openapi::messages")]
    messages: Vec<Value>,
    system: Option<Value>,
    max_tokens: Option<u32>,
    temperature: Option<f64>,
    top_k: Option<i64>,
    top_p: Option<f64>,
    stop_sequences: Option<Vec<String>>,
    stream: Option<bool>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
}

/// An error in Anthropic's envelope.
pub(super) struct MessagesError(ApiError);

impl From<ApiError> for MessagesError {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl MessagesError {
    fn body(error: &ApiError) -> Value {
        let kind = match error.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
            StatusCode::REQUEST_TIMEOUT => "timeout_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "api_error",
        };
        let field = error.param.as_deref().map(|param| format!("{param}: "));
        let message = format!("{}{}", field.unwrap_or_default(), error.message);
        json!({"type": "error", "error": {"type": kind, "message": message}})
    }
}

impl IntoResponse for MessagesError {
    fn into_response(self) -> Response {
        let body = Self::body(&self.0);
        let (mut parts, _) = self.0.into_response().into_parts();
        parts.headers.remove(http::header::CONTENT_LENGTH);
        Response::from_parts(parts, axum::body::Body::from(body.to_string()))
    }
}

/// `POST /v1/messages`.
pub(super) async fn create(
    State(app): State<Arc<App>>,
    Extension(info): Extension<Arc<AccessInfo>>,
    body: BodyResult,
) -> Result<Response, MessagesError> {
    app.check_open()?;
    let fields: MessagesFields = parse(&body_bytes(body)?)?;
    app.check_model(fields.model.as_deref())?;
    let Some(max_tokens) = fields.max_tokens else {
        return Err(ApiError::invalid("max_tokens", "max_tokens is required").into());
    };
    let sampling = SamplingFields {
        max_tokens: Some(max_tokens),
        temperature: fields.temperature,
        top_k: fields.top_k,
        top_p: fields.top_p,
        stop: fields.stop_sequences.clone().map(OneOrMany::Many),
        stream: fields.stream,
        ..SamplingFields::default()
    };
    let Running {
        choices, format, ..
    } = conversation(&fields)?
        .run(&app, sampling, None, &info)
        .await?;
    let mut turn = Turn {
        id: new_id("msg").replacen('-', "_", 1),
        model: app.model_name().to_owned(),
        message: Message::new(&format),
        choices,
        block: None,
        blocks: 0,
        phase: Phase::Start,
    };
    if fields.stream == Some(true) {
        return Ok(sse::response(turn, Turn::next));
    }
    while let Some((_, update)) = turn.choices.next().await {
        if let Some(error) = failure(&update) {
            return Err(error.into());
        }
        turn.message.update(&update);
    }
    Ok(Json(turn.whole()).into_response())
}

/// `POST /v1/messages/count_tokens`.
pub(super) async fn count_tokens(
    State(app): State<Arc<App>>,
    body: BodyResult,
) -> Result<Json<Value>, MessagesError> {
    let fields: MessagesFields = parse(&body_bytes(body)?)?;
    app.check_model(fields.model.as_deref())?;
    let text = conversation(&fields)?.render(&app)?;
    let tokens = app.encode.encode(text, false, u32::MAX).await?;
    Ok(Json(json!({"input_tokens": tokens.len()})))
}

fn conversation(fields: &MessagesFields) -> Result<Conversation, ApiError> {
    let mut messages = Vec::with_capacity(fields.messages.len() + 1);
    if let Some(system) = &fields.system {
        messages.push(json!({"role": "system", "content": text_of(system)}));
    }
    for (index, message) in fields.messages.iter().enumerate() {
        add_message(index, message, &mut messages)?;
    }
    let tools: Option<Value> = fields
        .tools
        .as_ref()
        .map(|tools| tools.iter().map(tool).collect());
    let choice = fields.tool_choice.as_ref();
    let parallel = choice.and_then(|choice| choice["disable_parallel_tool_use"].as_bool());
    let choice = choice.map(tool_choice).transpose()?;
    Ok(Conversation {
        messages,
        tools: Tools::read(tools.as_ref(), choice.as_ref(), parallel.map(|off| !off))?,
        add_generation_prompt: true,
        template_kwargs: Map::new(),
    })
}

/// A tool in OpenAI's form; what is wrong with it is found there.
fn tool(tool: &Value) -> Value {
    let kind = match tool["type"].as_str() {
        None | Some("custom") => "function",
        Some(other) => other,
    };
    json!({"type": kind, "function": {
        "name": tool["name"], "description": tool["description"], "parameters": tool["input_schema"],
    }})
}

fn tool_choice(choice: &Value) -> Result<Value, ApiError> {
    match choice["type"].as_str() {
        Some("auto") => Ok("auto".into()),
        Some("any") => Ok("required".into()),
        Some("none") => Ok("none".into()),
        Some("tool") => Ok(json!({"type": "function", "function": {"name": choice["name"]}})),
        _ => Err(ApiError::invalid(
            "tool_choice",
            "tool_choice.type must be auto, any, tool or none",
        )),
    }
}

/// A message's blocks as chat messages: results of tools become messages of their own.
fn add_message(index: usize, message: &Value, out: &mut Vec<Value>) -> Result<(), ApiError> {
    let field = format!("messages[{index}]");
    let wrong = |message: &str| Err(ApiError::invalid(&field, message));
    let Some(role @ ("user" | "assistant" | "system")) = message["role"].as_str() else {
        return wrong("a message needs a role: user or assistant");
    };
    let blocks = match &message["content"] {
        Value::String(text) => {
            out.push(json!({"role": role, "content": text}));
            return Ok(());
        }
        Value::Array(blocks) => blocks,
        _ => return wrong("a message's content must be a text or a list of blocks"),
    };
    let mut text: Vec<&str> = Vec::new();
    let mut calls: Vec<Value> = Vec::new();
    for block in blocks {
        match block["type"].as_str() {
            Some("text") => match block["text"].as_str() {
                Some(part) => text.push(part),
                None => return wrong("a text block needs text"),
            },
            Some("tool_use") => calls.push(json!({
                "id": block["id"], "type": "function",
                "function": {"name": block["name"], "arguments": block["input"]},
            })),
            Some("tool_result") => out.push(json!({
                "role": "tool", "tool_call_id": block["tool_use_id"], "content": text_of(&block["content"]),
            })),
            // What the model thought earlier is not shown to it again.
            Some("thinking" | "redacted_thinking") => {}
            _ => return wrong("only blocks of text, tool_use and tool_result are supported"),
        }
    }
    if !calls.is_empty() {
        out.push(json!({"role": role, "content": text.join("\n"), "tool_calls": calls}));
    } else if !text.is_empty() {
        out.push(json!({"role": role, "content": text.join("\n")}));
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Start,
    Running,
    Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    Thinking,
    Text,
    ToolUse,
}

/// One answer as it comes about.
struct Turn {
    id: String,
    model: String,
    message: Message,
    choices: Choices,
    block: Option<Block>,
    /// Blocks begun.
    blocks: usize,
    phase: Phase,
}

impl Turn {
    async fn next(mut self) -> Option<(String, Self)> {
        let mut out = String::new();
        match self.phase {
            Phase::Ended => return None,
            Phase::Start => {
                let message = self.object(Vec::new(), Value::Null, self.choices.usage());
                event(&mut out, "message_start", json!({"message": message}));
                self.phase = Phase::Running;
                return Some((out, self));
            }
            Phase::Running => {}
        }
        match self.choices.next().await {
            Some((_, update)) => {
                if let Some(error) = failure(&update) {
                    self.phase = Phase::Ended;
                    sse::named_frame(&mut out, "error", &MessagesError::body(&error));
                } else {
                    let events = self.message.update(&update);
                    self.tell(&events, &mut out);
                }
            }
            None => {
                self.end_block(&mut out);
                self.phase = Phase::Ended;
                let usage = self.choices.usage();
                let delta = json!({
                    "delta": {"stop_reason": self.stop_reason(), "stop_sequence": self.message.stop_string()},
                    "usage": usage_object(usage),
                });
                event(&mut out, "message_delta", delta);
                event(&mut out, "message_stop", json!({}));
            }
        }
        Some((out, self))
    }

    fn tell(&mut self, events: &[MessageEvent], out: &mut String) {
        let begun = events
            .iter()
            .filter(|event| matches!(event, MessageEvent::ToolCall { .. }));
        let mut next_call = self.message.calls.len() - begun.count();
        for event in events {
            match event {
                MessageEvent::Reasoning(text) => {
                    let start = json!({"type": "thinking", "thinking": "", "signature": ""});
                    self.in_block(Block::Thinking, start, out);
                    self.delta(json!({"type": "thinking_delta", "thinking": text}), out);
                }
                MessageEvent::Content(text) => {
                    self.in_block(Block::Text, json!({"type": "text", "text": ""}), out);
                    self.delta(json!({"type": "text_delta", "text": text}), out);
                }
                MessageEvent::ToolCall { name, .. } => {
                    let call = self.message.calls.get(next_call);
                    let id = call.map(|call| tool_use_id(&call.id));
                    next_call += 1;
                    self.end_block(out);
                    let start = json!({"type": "tool_use", "id": id, "name": name, "input": {}});
                    self.in_block(Block::ToolUse, start, out);
                }
                MessageEvent::Arguments(text) => {
                    self.delta(
                        json!({"type": "input_json_delta", "partial_json": text}),
                        out,
                    );
                }
            }
        }
    }

    fn in_block(&mut self, block: Block, start: Value, out: &mut String) {
        if self.block == Some(block) {
            return;
        }
        self.end_block(out);
        let fields = json!({"index": self.blocks, "content_block": start});
        event(out, "content_block_start", fields);
        self.block = Some(block);
        self.blocks += 1;
    }

    fn delta(&self, delta: Value, out: &mut String) {
        let index = self.blocks.saturating_sub(1);
        event(
            out,
            "content_block_delta",
            json!({"index": index, "delta": delta}),
        );
    }

    fn end_block(&mut self, out: &mut String) {
        if self.block.take().is_some() {
            event(out, "content_block_stop", json!({"index": self.blocks - 1}));
        }
    }

    fn stop_reason(&self) -> &'static str {
        if self.message.calls_tools() {
            return "tool_use";
        }
        let reason = self.message.finish.as_ref().map(|finish| finish.reason);
        match reason {
            Some(FinishReason::Length) => "max_tokens",
            _ if self.message.stop_string().is_some() => "stop_sequence",
            _ => "end_turn",
        }
    }

    fn whole(&self) -> Value {
        let message = &self.message;
        let mut content = Vec::new();
        if !message.reasoning.is_empty() {
            content
                .push(json!({"type": "thinking", "thinking": message.reasoning, "signature": ""}));
        }
        if !message.content.is_empty() {
            content.push(json!({"type": "text", "text": message.content}));
        }
        for call in &message.calls {
            // A call that was cut short has no input that could be read.
            let input: Value = serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!({}));
            content.push(json!({
                "type": "tool_use", "id": tool_use_id(&call.id), "name": call.name, "input": input,
            }));
        }
        self.object(content, self.stop_reason().into(), self.choices.usage())
    }

    fn object(&self, content: Vec<Value>, stop_reason: Value, usage: Usage) -> Value {
        json!({
            "id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content,
            "stop_reason": stop_reason, "stop_sequence": self.message.stop_string(), "usage": usage_object(usage),
        })
    }
}

fn tool_use_id(id: &str) -> String {
    format!("toolu_{}", id.trim_start_matches("call_"))
}

/// Anthropic counts cached prompt tokens apart from the others.
fn usage_object(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens.saturating_sub(usage.cached_tokens),
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    })
}

fn event(out: &mut String, name: &str, mut fields: Value) {
    fields["type"] = name.into();
    sse::named_frame(out, name, &fields);
}
