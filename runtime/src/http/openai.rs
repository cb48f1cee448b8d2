//! `/v1/chat/completions`, `/v1/completions`, `/v1/models`.

use std::{sync::Arc, time::Instant};

use axum::{
    Extension, Json,
    body::Bytes,
    extract::{Path, State, rejection::BytesRejection},
    response::{IntoResponse, Response},
};
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    App,
    access::AccessInfo,
    answer::{Answer, Kind},
    choices::{Choices, Prompt},
    error::ApiError,
    parse,
    sampling::{Sampling, SamplingFields, check_id},
    sse::{self, ChunkStream},
    unix_seconds,
};
use crate::{
    chat_template::ChatInput,
    engine::request::{FinishReason, TokenId},
};

/// Most messages of a conversation.
const MAX_MESSAGES: usize = 4096;
/// Most prompts of a request.
const MAX_PROMPTS: usize = 256;
/// `max_tokens` of a text completion that does not say, as OpenAI's.
const DEFAULT_COMPLETION_TOKENS: u32 = 16;

/// A body, or why it could not be read.
pub(super) type BodyResult = Result<Bytes, BytesRejection>;

/// The body's bytes; too many are a 413.
pub(super) fn body_bytes(body: BodyResult) -> Result<Bytes, ApiError> {
    body.map_err(|rejection| {
        let status = rejection.status();
        let message = match status {
            StatusCode::PAYLOAD_TOO_LARGE => format!(
                "the request's body is larger than {} bytes",
                super::MAX_BODY_BYTES
            ),
            _ => rejection.body_text(),
        };
        ApiError::new(status, message)
    })
}

/// Fields of a chat request beside [`SamplingFields`].
#[derive(Debug, Deserialize)]
struct ChatFields {
    model: Option<String>,
    messages: Vec<Value>,
    logprobs: Option<bool>,
    top_logprobs: Option<u32>,
    add_generation_prompt: Option<bool>,
    tools: Option<Value>,
    tool_choice: Option<Value>,
}

/// A prompt of a text completion, in any of its four forms.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum PromptField {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<TokenId>),
    TokenLists(Vec<Vec<TokenId>>),
}

/// Fields of a text completion beside [`SamplingFields`].
#[derive(Debug, Deserialize)]
struct CompletionFields {
    model: Option<String>,
    prompt: PromptField,
    logprobs: Option<u32>,
    echo: Option<bool>,
    suffix: Option<String>,
    add_special_tokens: Option<bool>,
}

/// `POST /v1/chat/completions`.
pub(super) async fn chat(
    State(app): State<Arc<App>>,
    Extension(info): Extension<Arc<AccessInfo>>,
    body: BodyResult,
) -> Result<Response, ApiError> {
    let arrival = Instant::now();
    app.check_open()?;
    let body = body_bytes(body)?;
    let fields: ChatFields = parse(&body)?;
    let sampling: SamplingFields = parse(&body)?;
    drop(body);
    app.check_model(fields.model.as_deref())?;
    let logprobs = match (fields.logprobs.unwrap_or(false), fields.top_logprobs) {
        (true, top) => Some(top.unwrap_or(0)),
        (false, None | Some(0)) => None,
        (false, Some(_)) => {
            return Err(ApiError::invalid(
                "top_logprobs",
                "top_logprobs needs logprobs: true",
            ));
        }
    };
    let defaults = app.model.tokenizer.generation_defaults();
    let sampling = sampling.validate(defaults, app.limits, logprobs)?;
    let text = render(&app, &fields)?;
    let tokens = app
        .encode
        .encode(text, false, app.limits.max_length)
        .await?;
    let prompts = [Prompt { tokens, text: None }];
    respond(&app, Kind::Chat, &prompts, &sampling, &info, arrival, false).await
}

/// The prompt of a conversation.
fn render(app: &App, fields: &ChatFields) -> Result<String, ApiError> {
    let asks_for_tools = fields.tools.as_ref().is_some_and(|tools| {
        tools.as_array().is_none_or(|list| !list.is_empty()) && !tools.is_null()
    });
    if asks_for_tools
        && fields
            .tool_choice
            .as_ref()
            .is_none_or(|choice| choice != "none")
    {
        return Err(ApiError::invalid(
            "tools",
            "tools are not supported by this server: leave them out",
        ));
    }
    render_messages(
        app,
        &fields.messages,
        fields.add_generation_prompt.unwrap_or(true),
    )
}

/// Checks the messages' shape and renders them with the model's template.
pub(super) fn render_messages(
    app: &App,
    messages: &[Value],
    add_generation_prompt: bool,
) -> Result<String, ApiError> {
    if messages.is_empty() || messages.len() > MAX_MESSAGES {
        return Err(ApiError::invalid(
            "messages",
            format!(
                "there are {} messages: from 1 to {MAX_MESSAGES} are allowed",
                messages.len()
            ),
        ));
    }
    for (index, message) in messages.iter().enumerate() {
        check_message(index, message)?;
    }
    let template = app.model.chat_template.as_ref().ok_or_else(|| {
        ApiError::new(
            StatusCode::BAD_REQUEST,
            "this model has no chat template: use /v1/completions, or start the server with --chat-template",
        )
    })?;
    Ok(template.render(&ChatInput {
        messages,
        add_generation_prompt,
        tools: None,
    })?)
}

fn check_message(index: usize, message: &Value) -> Result<(), ApiError> {
    let field = |name: &str| format!("messages[{index}]{name}");
    let Some(object) = message.as_object() else {
        return Err(ApiError::invalid(&field(""), "a message must be an object"));
    };
    if !object.get("role").is_some_and(Value::is_string) {
        return Err(ApiError::invalid(
            &field(".role"),
            "a message needs a role: system, user or assistant",
        ));
    }
    let content = object.get("content").unwrap_or(&Value::Null);
    match content {
        Value::String(_) => Ok(()),
        Value::Null if object.contains_key("tool_calls") => Ok(()),
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

/// `POST /v1/completions`.
pub(super) async fn completions(
    State(app): State<Arc<App>>,
    Extension(info): Extension<Arc<AccessInfo>>,
    body: BodyResult,
) -> Result<Response, ApiError> {
    let arrival = Instant::now();
    app.check_open()?;
    let body = body_bytes(body)?;
    let fields: CompletionFields = parse(&body)?;
    let mut sampling: SamplingFields = parse(&body)?;
    drop(body);
    app.check_model(fields.model.as_deref())?;
    if fields
        .suffix
        .as_deref()
        .is_some_and(|suffix| !suffix.is_empty())
    {
        return Err(ApiError::invalid(
            "suffix",
            "suffix is not supported by this server: leave it out",
        ));
    }
    let echo = fields.echo.unwrap_or(false);
    if echo && fields.logprobs.is_some() {
        return Err(ApiError::invalid(
            "echo",
            "echo with logprobs is not supported by this server: leave one out",
        ));
    }
    if sampling.max_tokens.is_none() && sampling.max_completion_tokens.is_none() {
        sampling.max_tokens = Some(DEFAULT_COMPLETION_TOKENS);
    }
    let defaults = app.model.tokenizer.generation_defaults();
    let sampling = sampling.validate(defaults, app.limits, fields.logprobs)?;
    let add_special_tokens = fields.add_special_tokens.unwrap_or(true);
    let prompts = prompts(&app, fields.prompt, add_special_tokens).await?;
    respond(
        &app,
        Kind::Completion,
        &prompts,
        &sampling,
        &info,
        arrival,
        echo,
    )
    .await
}

async fn prompts(
    app: &App,
    field: PromptField,
    add_special_tokens: bool,
) -> Result<Vec<Prompt>, ApiError> {
    let lists = match field {
        PromptField::Text(text) => return encode_all(app, vec![text], add_special_tokens).await,
        PromptField::Texts(texts) => return encode_all(app, texts, add_special_tokens).await,
        PromptField::Tokens(tokens) => vec![tokens],
        PromptField::TokenLists(lists) => lists,
    };
    check_count(lists.len())?;
    for &id in lists.iter().flatten() {
        check_id("prompt", id, app.limits)?;
    }
    Ok(lists
        .into_iter()
        .map(|tokens| Prompt { tokens, text: None })
        .collect())
}

async fn encode_all(
    app: &App,
    texts: Vec<String>,
    add_special_tokens: bool,
) -> Result<Vec<Prompt>, ApiError> {
    check_count(texts.len())?;
    let mut prompts = Vec::with_capacity(texts.len());
    for text in texts {
        let tokens = app
            .encode
            .encode(text.clone(), add_special_tokens, app.limits.max_length)
            .await?;
        prompts.push(Prompt {
            tokens,
            text: Some(text),
        });
    }
    Ok(prompts)
}

fn check_count(prompts: usize) -> Result<(), ApiError> {
    if (1..=MAX_PROMPTS).contains(&prompts) {
        return Ok(());
    }
    Err(ApiError::invalid(
        "prompt",
        format!("there are {prompts} prompts: from 1 to {MAX_PROMPTS} are allowed"),
    ))
}

/// Generates and answers, as a stream or whole.
async fn respond(
    app: &App,
    kind: Kind,
    prompts: &[Prompt],
    sampling: &Sampling,
    info: &Arc<AccessInfo>,
    arrival: Instant,
    echo: bool,
) -> Result<Response, ApiError> {
    let mut choices = Choices::submit(app, prompts, sampling, info, arrival)?;
    let prefix = match kind {
        Kind::Chat => "chatcmpl",
        Kind::Completion => "cmpl",
    };
    let answer = Answer {
        kind,
        id: format!("{prefix}-{}", uuid::Uuid::new_v4().simple()),
        created: unix_seconds(),
        model: app.model_name().to_owned(),
        tokenizer: Arc::clone(&app.model.tokenizer),
        logprobs: sampling.params.logprobs.is_some(),
        echo: if echo {
            echoes(app, prompts, sampling.n)?
        } else {
            Vec::new()
        },
    };
    let mut states = answer.states(choices.len());
    if sampling.stream {
        let stream = ChunkStream {
            answer,
            choices,
            states,
            include_usage: sampling.include_usage || app.config.force_include_usage,
            continuous_usage: sampling.continuous_usage,
            ended: false,
        };
        return Ok(sse::response(stream, ChunkStream::next));
    }
    while let Some((index, update)) = choices.next().await {
        if let Some(finish) = &update.finish
            && finish.reason == FinishReason::Error
        {
            return Err(ApiError::from_finish(finish));
        }
        answer.collect(&mut states[index], update);
    }
    Ok(Json(answer.full(&states, choices.usage())).into_response())
}

/// Each choice's prompt as text.
fn echoes(app: &App, prompts: &[Prompt], n: u32) -> Result<Vec<String>, ApiError> {
    let mut texts = Vec::new();
    for prompt in prompts {
        let text = match &prompt.text {
            Some(text) => text.clone(),
            None => app.model.tokenizer.decode(&prompt.tokens, true)?,
        };
        texts.extend(std::iter::repeat_n(text, n as usize));
    }
    Ok(texts)
}

fn model_object(app: &App, name: &str) -> Value {
    json!({
        "id": name, "object": "model", "created": app.created, "owned_by": "ashlar",
        "root": app.model.path.display().to_string(), "parent": null, "max_model_len": app.limits.max_length,
    })
}

/// `GET /v1/models`.
pub(super) async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let names = app.config.served_model_names.iter();
    let data: Vec<Value> = names.map(|name| model_object(&app, name)).collect();
    Json(json!({"object": "list", "data": data}))
}

/// `GET /v1/models/NAME`.
pub(super) async fn model(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    app.check_model(Some(&name))?;
    Ok(Json(model_object(&app, &name)))
}
