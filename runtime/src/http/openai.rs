//! `/v1/chat/completions`, `/v1/completions`, `/v1/models`.

use std::sync::Arc;

use axum::{
    Extension, Json,
    body::Bytes,
    extract::{Path, State, rejection::BytesRejection},
    response::{IntoResponse, Response},
};
use http::StatusCode;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    App,
    access::AccessInfo,
    answer::{Answer, Kind, PromptLogprobs},
    chat::{Conversation, Running},
    choices::{Choices, Prompt},
    error::ApiError,
    message::{MessageFormat, failure},
    parse,
    sampling::{Sampling, SamplingFields, check_id},
    sse::{self, ChunkStream},
    tools::Tools,
    unix_seconds,
};
use crate::engine::request::TokenId;

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
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct ChatFields {
    model: Option<String>,
    #[schemars(schema_with = "super::openapi::messages")]
    messages: Vec<Value>,
    logprobs: Option<bool>,
    #[schemars(range(max = 20))]
    top_logprobs: Option<u32>,
    add_generation_prompt: Option<bool>,
    chat_template_kwargs: Option<Map<String, Value>>,
    tools: Option<Value>,
    tool_choice: Option<Value>,
    parallel_tool_calls: Option<bool>,
    chat_template: Option<Value>,
}

/// A prompt of a text completion, in any of its four forms.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum PromptField {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<TokenId>),
    TokenLists(Vec<Vec<TokenId>>),
}

/// Fields of a text completion beside [`SamplingFields`].
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct CompletionFields {
    model: Option<String>,
    prompt: PromptField,
    #[schemars(range(max = 20))]
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
    app.check_open()?;
    let body = body_bytes(body)?;
    let fields: ChatFields = parse(&body)?;
    let sampling: SamplingFields = parse(&body)?;
    drop(body);
    app.check_model(fields.model.as_deref())?;
    if fields.chat_template.is_some() {
        return Err(ApiError::invalid(
            "chat_template",
            "templates come with the model, not with a request: leave it out",
        ));
    }
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
    let conversation = Conversation {
        messages: fields.messages,
        tools: Tools::read(
            fields.tools.as_ref(),
            fields.tool_choice.as_ref(),
            fields.parallel_tool_calls,
        )?,
        add_generation_prompt: fields.add_generation_prompt.unwrap_or(true),
        template_kwargs: fields.chat_template_kwargs.unwrap_or_default(),
    };
    let running = conversation.run(&app, sampling, logprobs, &info).await?;
    let Running {
        choices,
        sampling,
        format,
    } = running;
    let prompt_logprobs = sampling.prompt_logprobs.map(|_| PromptLogprobs {
        prompts: choices.prompts(),
        n: sampling.n as usize,
        in_echo: false,
    });
    let answer = Answer {
        kind: Kind::Chat,
        id: new_id("chatcmpl"),
        created: unix_seconds(),
        model: app.model_name().to_owned(),
        tokenizer: Arc::clone(&app.model.tokenizer),
        logprobs: sampling.params.logprobs.is_some(),
        echo: Vec::new(),
        format,
        prompt_logprobs,
    };
    respond(&app, answer, choices, &sampling).await
}

/// A new id of an answer.
pub(super) fn new_id(prefix: &str) -> String {
    format!("{prefix}-{}", uuid::Uuid::new_v4().simple())
}

/// `POST /v1/completions`.
pub(super) async fn completions(
    State(app): State<Arc<App>>,
    Extension(info): Extension<Arc<AccessInfo>>,
    body: BodyResult,
) -> Result<Response, ApiError> {
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
    let echoes_logprobs = echo && fields.logprobs.is_some();
    if echoes_logprobs {
        if sampling.stream == Some(true) {
            return Err(ApiError::invalid(
                "echo",
                "the log-probabilities of a prompt come with whole answers: leave out stream, echo or logprobs",
            ));
        }
        sampling.prompt_logprobs = fields.logprobs;
    }
    if sampling.max_tokens.is_none() && sampling.max_completion_tokens.is_none() {
        sampling.max_tokens = Some(DEFAULT_COMPLETION_TOKENS);
    }
    let defaults = app.model.tokenizer.generation_defaults();
    let sampling = sampling.validate(defaults, app.limits, fields.logprobs)?;
    let add_special_tokens = fields.add_special_tokens.unwrap_or(true);
    let prompts = prompts(&app, fields.prompt, add_special_tokens).await?;
    let choices = Choices::submit(&app, &prompts, &sampling, &info).await?;
    let prompt_logprobs = sampling.prompt_logprobs.map(|_| PromptLogprobs {
        prompts: choices.prompts(),
        n: sampling.n as usize,
        in_echo: echoes_logprobs,
    });
    let answer = Answer {
        kind: Kind::Completion,
        id: new_id("cmpl"),
        created: unix_seconds(),
        model: app.model_name().to_owned(),
        tokenizer: Arc::clone(&app.model.tokenizer),
        logprobs: sampling.params.logprobs.is_some(),
        echo: if echo {
            echoes(&app, &prompts, sampling.n)?
        } else {
            Vec::new()
        },
        format: MessageFormat::default(),
        prompt_logprobs,
    };
    respond(&app, answer, choices, &sampling).await
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
    answer: Answer,
    mut choices: Choices,
    sampling: &Sampling,
) -> Result<Response, ApiError> {
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
        if let Some(error) = failure(&update) {
            return Err(error);
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
