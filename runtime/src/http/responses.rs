//! OpenAI's `/v1/responses`, without stored state: the whole conversation comes with each request.

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::State,
    response::{IntoResponse, Response},
};
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
    sampling::SamplingFields,
    sse,
    tools::Tools,
    unix_seconds,
};
use crate::{engine::request::FinishReason, output::MessageEvent};

/// Fields that are used; others are ignored.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct ResponseFields {
    model: Option<String>,
    input: Value,
    instructions: Option<String>,
    max_output_tokens: Option<u32>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    stream: Option<bool>,
    tools: Option<Value>,
    tool_choice: Option<Value>,
    parallel_tool_calls: Option<bool>,
    text: Option<TextFields>,
    previous_response_id: Option<String>,
    conversation: Option<Value>,
    background: Option<bool>,
    metadata: Option<Map<String, Value>>,
    chat_template_kwargs: Option<Map<String, Value>>,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
pub(super) struct TextFields {
    format: Option<Value>,
}

/// `POST /v1/responses`.
pub(super) async fn create(
    State(app): State<Arc<App>>,
    Extension(info): Extension<Arc<AccessInfo>>,
    body: BodyResult,
) -> Result<Response, ApiError> {
    app.check_open()?;
    let body = body_bytes(body)?;
    let fields: ResponseFields = parse(&body)?;
    let mut sampling: SamplingFields = parse(&body)?;
    drop(body);
    app.check_model(fields.model.as_deref())?;
    refuse_state(&fields)?;
    sampling.n = None;
    sampling.stream_options = None;
    sampling.max_tokens = fields.max_output_tokens;
    sampling.max_completion_tokens = None;
    let format = fields.text.clone().unwrap_or_default().format;
    sampling.response_format = format.clone();
    let conversation = Conversation {
        messages: messages(&fields)?,
        tools: Tools::read(
            fields.tools.as_ref(),
            fields.tool_choice.as_ref(),
            fields.parallel_tool_calls,
        )?,
        add_generation_prompt: true,
        template_kwargs: fields.chat_template_kwargs.clone().unwrap_or_default(),
    };
    let Running {
        choices,
        format: message_format,
        ..
    } = conversation.run(&app, sampling, None, &info).await?;
    let mut turn = Turn {
        frame: frame_of(&app, &fields, format),
        message: Message::new(&message_format),
        choices,
        output: Vec::new(),
        open: None,
        sequence: 0,
        phase: Phase::Created,
    };
    if fields.stream == Some(true) {
        return Ok(sse::response(turn, Turn::next));
    }
    while let Some((_, update)) = turn.choices.next().await {
        if let Some(error) = failure(&update) {
            return Err(error);
        }
        let events = turn.message.update(&update);
        turn.build(&events, &mut String::new());
    }
    turn.close(&mut String::new());
    Ok(Json(turn.finished()).into_response())
}

fn refuse_state(fields: &ResponseFields) -> Result<(), ApiError> {
    let stateless = "this server keeps no responses: send the whole conversation as input";
    if fields.previous_response_id.is_some() {
        return Err(ApiError::invalid("previous_response_id", stateless));
    }
    if fields.conversation.as_ref().is_some_and(|c| !c.is_null()) {
        return Err(ApiError::invalid("conversation", stateless));
    }
    if fields.background == Some(true) {
        return Err(ApiError::invalid("background", stateless));
    }
    Ok(())
}

/// The answer's fields that do not depend on the output.
fn frame_of(app: &App, fields: &ResponseFields, format: Option<Value>) -> Map<String, Value> {
    let frame = json!({
        "id": new_id("resp").replacen('-', "_", 1),
        "object": "response",
        "created_at": unix_seconds(),
        "background": false,
        "error": null,
        "incomplete_details": null,
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "metadata": fields.metadata.clone().unwrap_or_default(),
        "model": app.model_name(),
        "output": [],
        "parallel_tool_calls": fields.parallel_tool_calls.unwrap_or(true),
        "previous_response_id": null,
        "reasoning": {"effort": null, "summary": null},
        "service_tier": null,
        "status": "in_progress",
        "store": false,
        "temperature": fields.temperature.unwrap_or(1.0),
        "text": {"format": format.unwrap_or_else(|| json!({"type": "text"}))},
        "tool_choice": fields.tool_choice.clone().unwrap_or_else(|| "auto".into()),
        "tools": fields.tools.clone().unwrap_or_else(|| json!([])),
        "top_p": fields.top_p.unwrap_or(1.0),
        "truncation": "disabled",
        "usage": null,
        "user": null,
    });
    match frame {
        Value::Object(frame) => frame,
        _ => Map::new(),
    }
}

/// The input's items as chat messages.
fn messages(fields: &ResponseFields) -> Result<Vec<Value>, ApiError> {
    let mut messages: Vec<Value> = Vec::new();
    if let Some(instructions) = &fields.instructions {
        messages.push(json!({"role": "system", "content": instructions}));
    }
    match &fields.input {
        Value::String(text) => messages.push(json!({"role": "user", "content": text})),
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                add_item(index, item, &mut messages)?;
            }
        }
        _ => {
            return Err(ApiError::invalid(
                "input",
                "input must be a text or a list of items",
            ));
        }
    }
    Ok(messages)
}

fn add_item(index: usize, item: &Value, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let wrong = |message: &str| Err(ApiError::invalid(&format!("input[{index}]"), message));
    match item["type"].as_str().unwrap_or("message") {
        "message" => {
            let role = match item["role"].as_str() {
                Some("developer") => "system",
                Some(role) => role,
                None => {
                    return wrong("a message needs a role: system, developer, user or assistant");
                }
            };
            let content = match &item["content"] {
                Value::String(text) => text.clone(),
                Value::Array(parts) => {
                    let text = |part: &Value| {
                        let kind = part["type"].as_str();
                        let known = matches!(kind, Some("input_text" | "output_text" | "text"));
                        part["text"].as_str().filter(|_| known).map(str::to_owned)
                    };
                    match parts.iter().map(text).collect::<Option<Vec<_>>>() {
                        Some(texts) => texts.join("\n"),
                        None => return wrong("only text parts are supported"),
                    }
                }
                _ => return wrong("a message's content must be a text or a list of text parts"),
            };
            messages.push(json!({"role": role, "content": content}));
        }
        "function_call" => {
            let (Some(id), Some(name)) = (item["call_id"].as_str(), item["name"].as_str()) else {
                return wrong("a function_call needs call_id and name");
            };
            let call = json!({
                "id": id, "type": "function", "function": {"name": name, "arguments": item["arguments"]},
            });
            // Calls of one turn belong together.
            match messages
                .last_mut()
                .and_then(|last| last.get_mut("tool_calls"))
            {
                Some(Value::Array(calls)) => calls.push(call),
                _ => messages
                    .push(json!({"role": "assistant", "content": null, "tool_calls": [call]})),
            }
        }
        "function_call_output" => {
            let Some(id) = item["call_id"].as_str() else {
                return wrong("a function_call_output needs call_id");
            };
            let content = match &item["output"] {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            messages.push(json!({"role": "tool", "tool_call_id": id, "content": content}));
        }
        // What the model thought earlier is not shown to it again.
        "reasoning" => {}
        _ => return wrong("only messages, function calls and their outputs are supported"),
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Created,
    Running,
    Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Open {
    Reasoning,
    Text,
    Call,
}

/// One answer as it comes about.
struct Turn {
    frame: Map<String, Value>,
    message: Message,
    choices: Choices,
    /// The items; the last one may be open.
    output: Vec<Value>,
    open: Option<Open>,
    sequence: u64,
    phase: Phase,
}

impl Turn {
    /// The next events.
    async fn next(mut self) -> Option<(String, Self)> {
        let mut out = String::new();
        match self.phase {
            Phase::Ended => return None,
            Phase::Created => {
                let response = Value::Object(self.frame.clone());
                self.event(&mut out, "response.created", json!({"response": response}));
                self.event(
                    &mut out,
                    "response.in_progress",
                    json!({"response": response}),
                );
                self.phase = Phase::Running;
                return Some((out, self));
            }
            Phase::Running => {}
        }
        match self.choices.next().await {
            Some((_, update)) => {
                if let Some(error) = failure(&update) {
                    self.phase = Phase::Ended;
                    let mut response = Value::Object(self.frame.clone());
                    response["status"] = "failed".into();
                    response["error"] = json!({"code": "server_error", "message": error.message});
                    self.event(&mut out, "response.failed", json!({"response": response}));
                } else {
                    let events = self.message.update(&update);
                    self.build(&events, &mut out);
                }
            }
            None => {
                self.close(&mut out);
                self.phase = Phase::Ended;
                let response = self.finished();
                let status = response["status"].as_str().unwrap_or_default();
                let name = format!("response.{status}");
                self.event(&mut out, &name, json!({"response": response}));
            }
        }
        Some((out, self))
    }

    fn event(&mut self, out: &mut String, name: &str, mut fields: Value) {
        fields["type"] = name.into();
        fields["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        sse::named_frame(out, name, &fields);
    }

    /// Takes events into items and tells of them.
    fn build(&mut self, events: &[MessageEvent], out: &mut String) {
        let mut next_call = self
            .output
            .iter()
            .filter(|item| item["type"] == "function_call")
            .count();
        for event in events {
            match event {
                MessageEvent::Reasoning(text) => self.add_text(Open::Reasoning, text, out),
                MessageEvent::Content(text) => self.add_text(Open::Text, text, out),
                MessageEvent::ToolCall { name, .. } => {
                    let call = self.message.calls.get(next_call);
                    let call_id = call.map(|call| call.id.clone());
                    next_call += 1;
                    let item = json!({
                        "type": "function_call", "id": new_id("fc").replacen('-', "_", 1), "call_id": call_id,
                        "name": name, "arguments": "", "status": "in_progress",
                    });
                    self.begin(Open::Call, item, out);
                }
                MessageEvent::Arguments(text) => {
                    append(self.output.last_mut(), "/arguments", text);
                    let fields = json!({"delta": text});
                    self.item_event(out, "response.function_call_arguments.delta", fields);
                }
            }
        }
    }

    fn add_text(&mut self, kind: Open, text: &str, out: &mut String) {
        let (event, part) = match kind {
            Open::Reasoning => (
                "response.reasoning_text.delta",
                json!({"type": "reasoning_text", "text": ""}),
            ),
            _ => (
                "response.output_text.delta",
                json!({"type": "output_text", "text": "", "annotations": [], "logprobs": []}),
            ),
        };
        if self.open != Some(kind) {
            let item = match kind {
                Open::Reasoning => json!({
                    "type": "reasoning", "id": new_id("rs").replacen('-', "_", 1), "summary": [], "content": [],
                    "status": "in_progress",
                }),
                _ => json!({
                    "type": "message", "id": new_id("msg").replacen('-', "_", 1), "role": "assistant", "content": [],
                    "status": "in_progress",
                }),
            };
            self.begin(kind, item, out);
            if let Some(Value::Array(content)) = self
                .output
                .last_mut()
                .and_then(|item| item.get_mut("content"))
            {
                content.push(part.clone());
            }
            self.item_event(
                out,
                "response.content_part.added",
                json!({"content_index": 0, "part": part}),
            );
        }
        append(self.output.last_mut(), "/content/0/text", text);
        let mut fields = json!({"content_index": 0, "delta": text});
        if kind == Open::Text {
            fields["logprobs"] = json!([]);
        }
        self.item_event(out, event, fields);
    }

    fn begin(&mut self, kind: Open, item: Value, out: &mut String) {
        self.close(out);
        self.output.push(item.clone());
        self.open = Some(kind);
        let index = self.output.len() - 1;
        let fields = json!({"output_index": index, "item": item});
        self.event(out, "response.output_item.added", fields);
    }

    /// An event of the last item.
    fn item_event(&mut self, out: &mut String, name: &str, mut fields: Value) {
        let Some(last) = self.output.last() else {
            return;
        };
        fields["item_id"] = last["id"].clone();
        fields["output_index"] = (self.output.len() - 1).into();
        self.event(out, name, fields);
    }

    /// Ends the open item.
    fn close(&mut self, out: &mut String) {
        let Some(kind) = self.open.take() else {
            return;
        };
        let item = self.output.last().cloned().unwrap_or_default();
        let part = item["content"][0].clone();
        match kind {
            Open::Call => {
                let fields = json!({"arguments": item["arguments"], "name": item["name"]});
                self.item_event(out, "response.function_call_arguments.done", fields);
            }
            Open::Text | Open::Reasoning => {
                let mut fields = json!({"content_index": 0, "text": part["text"]});
                let name = match kind {
                    Open::Text => {
                        fields["logprobs"] = json!([]);
                        "response.output_text.done"
                    }
                    _ => "response.reasoning_text.done",
                };
                self.item_event(out, name, fields);
                let fields = json!({"content_index": 0, "part": part});
                self.item_event(out, "response.content_part.done", fields);
            }
        }
        let status = if self.is_cut() {
            "incomplete"
        } else {
            "completed"
        };
        if let Some(item) = self.output.last_mut() {
            item["status"] = status.into();
        }
        let item = self.output.last().cloned().unwrap_or_default();
        let index = self.output.len() - 1;
        let fields = json!({"output_index": index, "item": item});
        self.event(out, "response.output_item.done", fields);
    }

    fn is_cut(&self) -> bool {
        let finish = self.message.finish.as_ref();
        finish.is_some_and(|finish| finish.reason != FinishReason::Stop)
    }

    /// The whole response.
    fn finished(&self) -> Value {
        let mut response = Value::Object(self.frame.clone());
        response["output"] = self.output.clone().into();
        response["usage"] = usage(self.choices.usage());
        if self.is_cut() {
            response["status"] = "incomplete".into();
            response["incomplete_details"] = json!({"reason": "max_output_tokens"});
        } else {
            response["status"] = "completed".into();
        }
        response
    }
}

fn append(item: Option<&mut Value>, pointer: &str, text: &str) {
    if let Some(Value::String(before)) = item.and_then(|item| item.pointer_mut(pointer)) {
        before.push_str(text);
    }
}

fn usage(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    })
}
