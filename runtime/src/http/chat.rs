//! A conversation to a prompt: what `/v1/chat/completions`, `/v1/responses` and `/v1/messages` share.

use std::sync::Arc;

use http::StatusCode;
use serde_json::{Map, Value};

use super::{
    App,
    access::AccessInfo,
    choices::{Choices, Prompt},
    error::ApiError,
    message::MessageFormat,
    sampling::{Sampling, SamplingFields},
    tools::{self, Tools},
};
use crate::{chat_template::ChatInput, output::ToolFormat};

/// Most messages of a conversation.
const MAX_MESSAGES: usize = 4096;
/// Most `chat_template_kwargs`.
const MAX_TEMPLATE_KWARGS: usize = 32;
/// What the template is given by the server, not by a request.
const RESERVED_KWARGS: [&str; 8] = [
    "messages",
    "tools",
    "add_generation_prompt",
    "chat_template",
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
];

/// A conversation to be continued.
pub(super) struct Conversation {
    /// OpenAI's messages.
    pub(super) messages: Vec<Value>,
    pub(super) tools: Option<Tools>,
    pub(super) add_generation_prompt: bool,
    /// Further variables of the template.
    pub(super) template_kwargs: Map<String, Value>,
}

/// A conversation after all checks, running.
pub(super) struct Running {
    pub(super) choices: Choices,
    pub(super) sampling: Sampling,
    pub(super) format: MessageFormat,
}

impl Conversation {
    /// Checks everything, renders, tokenises and submits.
    pub(super) async fn run(
        mut self,
        app: &App,
        mut fields: SamplingFields,
        logprobs: Option<u32>,
        info: &Arc<AccessInfo>,
    ) -> Result<Running, ApiError> {
        let forced = self.tools.as_ref().and_then(Tools::forced);
        let mut format = MessageFormat::default();
        if let Some(tools) = &self.tools {
            format.tools = Some(match &forced {
                Some((_, format)) => format.clone(),
                None => app.tool_format.clone(),
            });
            if tools.choice == tools::ToolChoice::Auto && has_special_marks(app, &app.tool_format) {
                fields.skip_special_tokens.get_or_insert(false);
            }
        }
        let defaults = app.model.tokenizer.generation_defaults();
        let mut sampling = fields.validate(defaults, app.limits, logprobs)?;
        if let Some((grammar, _)) = forced {
            if sampling.grammar.is_some() {
                return Err(ApiError::invalid(
                    "tool_choice",
                    "a forced tool call contradicts structured output: leave one out",
                ));
            }
            if sampling.params.min_tokens > 0 {
                return Err(ApiError::invalid(
                    "min_tokens",
                    "min_tokens contradicts a forced tool call: leave one out",
                ));
            }
            sampling.grammar = Some(grammar);
        }
        let text = self.render(app)?;
        if let Some(reasoning) = app.reasoning_format
            && sampling.grammar.is_none()
        {
            let (begin, _) = reasoning.marks();
            format.reasoning = Some((reasoning, text.trim_end().ends_with(begin)));
            if app
                .model
                .tokenizer
                .token_to_id(begin)
                .is_some_and(|id| app.model.tokenizer.is_special(id))
            {
                sampling.text.skip_special_tokens = false;
            }
        }
        let tokens = app
            .encode
            .encode(text, false, app.limits.max_length)
            .await?;
        let prompts = [Prompt { tokens, text: None }];
        let choices = Choices::submit(app, &prompts, &sampling, info).await?;
        Ok(Running {
            choices,
            sampling,
            format,
        })
    }

    /// The prompt.
    pub(super) fn render(&mut self, app: &App) -> Result<String, ApiError> {
        check_messages(&self.messages)?;
        self.messages.iter_mut().for_each(parse_arguments);
        self.check_kwargs()?;
        let template = app.model.chat_template.as_ref().ok_or_else(|| {
            ApiError::new(
                StatusCode::BAD_REQUEST,
                "this model has no chat template: use /v1/completions, or start the server with --chat-template",
            )
        })?;
        let knows_tools = template.mentions("tools");
        let mut tools = self
            .tools
            .as_ref()
            .map(|tools| Value::from(tools.list.clone()));
        let uses_tools = self
            .messages
            .iter()
            .any(|message| message["role"] == "tool" || message["tool_calls"].is_array());
        if !knows_tools && (tools.is_some() || uses_tools) {
            let list = self.tools.as_ref().map_or(&[][..], |tools| &tools.list);
            self.messages = tools::describe_in_text(&self.messages, list);
            tools = None;
        }
        Ok(template.render(&ChatInput {
            messages: &self.messages,
            add_generation_prompt: self.add_generation_prompt,
            tools: tools.as_ref(),
            kwargs: Some(&self.template_kwargs),
        })?)
    }

    fn check_kwargs(&self) -> Result<(), ApiError> {
        let wrong = |message: String| Err(ApiError::invalid("chat_template_kwargs", message));
        if self.template_kwargs.len() > MAX_TEMPLATE_KWARGS {
            return wrong(format!("at most {MAX_TEMPLATE_KWARGS} are allowed"));
        }
        match self
            .template_kwargs
            .keys()
            .find(|key| RESERVED_KWARGS.contains(&key.as_str()))
        {
            Some(key) => wrong(format!("{key} cannot be set this way")),
            None => Ok(()),
        }
    }
}

/// Marks of a notation may be control tokens, which have no text by default.
fn has_special_marks(app: &App, format: &ToolFormat) -> bool {
    let mark = match format {
        ToolFormat::Llama3Json => "<|python_tag|>",
        ToolFormat::Mistral => "[TOOL_CALLS]",
        ToolFormat::Hermes => "<tool_call>",
        ToolFormat::Array | ToolFormat::Named(_) => return false,
    };
    let tokenizer = &app.model.tokenizer;
    tokenizer
        .token_to_id(mark)
        .is_some_and(|id| tokenizer.is_special(id))
}

/// Templates expect a call's arguments as an object; OpenAI's clients send the object's text.
fn parse_arguments(message: &mut Value) {
    let Some(calls) = message.get_mut("tool_calls").and_then(Value::as_array_mut) else {
        return;
    };
    for call in calls {
        let Some(arguments) = call.pointer_mut("/function/arguments") else {
            continue;
        };
        if let Some(text) = arguments.as_str()
            && let Ok(object @ Value::Object(_)) = serde_json::from_str(text)
        {
            *arguments = object;
        }
    }
}

fn check_messages(messages: &[Value]) -> Result<(), ApiError> {
    if messages.is_empty() || messages.len() > MAX_MESSAGES {
        return Err(ApiError::invalid(
            "messages",
            format!(
                "there are {} messages: from 1 to {MAX_MESSAGES} are allowed",
                messages.len()
            ),
        ));
    }
    let mut checks = messages.iter().enumerate();
    checks.try_for_each(|(index, message)| check_message(index, message))
}

fn check_message(index: usize, message: &Value) -> Result<(), ApiError> {
    let field = |name: &str| format!("messages[{index}]{name}");
    let Some(object) = message.as_object() else {
        return Err(ApiError::invalid(&field(""), "a message must be an object"));
    };
    if !object.get("role").is_some_and(Value::is_string) {
        return Err(ApiError::invalid(
            &field(".role"),
            "a message needs a role: system, user, assistant or tool",
        ));
    }
    let calls = object.get("tool_calls").filter(|calls| !calls.is_null());
    if let Some(calls) = calls {
        let is_call = |call: &Value| call["function"]["name"].is_string();
        if !calls
            .as_array()
            .is_some_and(|calls| calls.iter().all(is_call))
        {
            return Err(ApiError::invalid(
                &field(".tool_calls"),
                "tool_calls must be a list of calls, each with function.name",
            ));
        }
    }
    let content = object.get("content").unwrap_or(&Value::Null);
    match content {
        Value::String(_) => Ok(()),
        Value::Null if calls.is_some() => Ok(()),
        Value::Array(parts) => match parts
            .iter()
            .position(|part| part["type"] != "text" || !part["text"].is_string())
        {
            None => Ok(()),
            Some(part) => Err(ApiError::invalid(
                &format!("messages[{index}].content[{part}]"),
                "only parts of the form {\"type\": \"text\", \"text\": …} are supported",
            )),
        },
        _ => Err(ApiError::invalid(
            &field(".content"),
            "a message's content must be a text or a list of text parts",
        )),
    }
}
