//! OpenAI's `/v1/embeddings`: prompts in, hidden states out.

use std::sync::{Arc, atomic::Ordering::Relaxed};

use axum::{
    Extension, Json,
    extract::State,
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures::{StreamExt, TryStreamExt, stream};
use http::StatusCode;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    App,
    access::AccessInfo,
    choices::tenant_salt,
    error::ApiError,
    openai::{BodyResult, PromptField, body_bytes, new_id},
    parse,
    sampling::{MAX_CACHE_SALT_BYTES, check_id},
    unix_seconds,
};
use crate::engine::{
    Finish,
    request::{FinishReason, Request, TokenId},
};

/// Most inputs of a request, as OpenAI's.
const MAX_INPUTS: usize = 2048;
/// Inputs of one request that are with the engine at once.
const IN_FLIGHT: usize = 32;

/// How the numbers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum EncodingFormat {
    /// A list of numbers.
    #[default]
    Float,
    /// 32-bit floats, little-endian, in base64.
    Base64,
}

/// Fields that are used; others are ignored.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct EmbeddingFields {
    model: Option<String>,
    input: PromptField,
    encoding_format: Option<EncodingFormat>,
    #[schemars(range(min = 1))]
    dimensions: Option<u32>,
    add_special_tokens: Option<bool>,
    #[schemars(range(min = -1))]
    truncate_prompt_tokens: Option<i64>,
    priority: Option<i32>,
    #[schemars(length(max = 256))]
    cache_salt: Option<String>,
}

/// `POST /v1/embeddings`.
pub(super) async fn create(
    State(app): State<Arc<App>>,
    Extension(info): Extension<Arc<AccessInfo>>,
    body: BodyResult,
) -> Result<Response, ApiError> {
    app.check_open()?;
    let fields: EmbeddingFields = parse(&body_bytes(body)?)?;
    app.check_model(fields.model.as_deref())?;
    let width = app.model.engine.hidden_size().ok_or_else(|| {
        ApiError::new(
            StatusCode::NOT_IMPLEMENTED,
            "embeddings are computed on the CPU only so far: start a server with --device cpu for them",
        )
    })?;
    check_fields(&fields, width)?;
    let prompts = prompts(&app, &fields).await?;
    let prompt_tokens: usize = prompts.iter().map(Vec::len).sum();
    let prompt_tokens = u32::try_from(prompt_tokens).unwrap_or(u32::MAX);
    info.prompt_tokens.store(prompt_tokens, Relaxed);
    // A request of many inputs is not to fill the queue by itself: a few of them wait there, the others here.
    let embeddings: Vec<Vec<f32>> = stream::iter(prompts)
        .map(|tokens| embed(&app, &info, &fields, tokens))
        .buffered(IN_FLIGHT)
        .try_collect()
        .await?;
    // Only the first is kept.
    let _ = info.finish.set(FinishReason::Stop.as_str());
    let format = fields.encoding_format.unwrap_or_default();
    let data: Vec<Value> = embeddings
        .into_iter()
        .enumerate()
        .map(|(index, values)| {
            let values = app.config.pooler.finish(values, fields.dimensions);
            json!({"object": "embedding", "index": index, "embedding": write(&values, format)})
        })
        .collect();
    let answer = json!({
        "id": new_id("embd"), "object": "list", "created": unix_seconds(), "model": app.model_name(), "data": data,
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
    });
    Ok(Json(answer).into_response())
}

fn write(values: &[f32], format: EncodingFormat) -> Value {
    match format {
        EncodingFormat::Float => json!(values),
        EncodingFormat::Base64 => {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            STANDARD.encode(bytes).into()
        }
    }
}

fn check_fields(fields: &EmbeddingFields, width: u32) -> Result<(), ApiError> {
    if let Some(dimensions) = fields.dimensions
        && !(1..=width).contains(&dimensions)
    {
        return Err(ApiError::invalid(
            "dimensions",
            format!("dimensions is {dimensions}: it must be from 1 to {width}, the model's width"),
        ));
    }
    if fields
        .truncate_prompt_tokens
        .is_some_and(|n| n < -1 || n == 0)
    {
        return Err(ApiError::invalid(
            "truncate_prompt_tokens",
            "truncate_prompt_tokens must be at least 1, or -1 for the model's length",
        ));
    }
    if fields
        .cache_salt
        .as_ref()
        .is_some_and(|salt| salt.len() > MAX_CACHE_SALT_BYTES)
    {
        return Err(ApiError::invalid(
            "cache_salt",
            format!("cache_salt may have {MAX_CACHE_SALT_BYTES} bytes"),
        ));
    }
    Ok(())
}

/// The inputs' tokens, cut where the request says so.
async fn prompts(app: &App, fields: &EmbeddingFields) -> Result<Vec<Vec<TokenId>>, ApiError> {
    let for_input = |mut error: ApiError| {
        if error.param.as_deref() == Some("prompt") {
            error.param = Some("input".to_owned());
        }
        error
    };
    let kept = fields.truncate_prompt_tokens.map(|kept| match kept {
        -1 => app.limits.max_length as usize,
        kept => usize::try_from(kept).unwrap_or(usize::MAX),
    });
    // What is going to be cut may be longer than the model.
    let limit = kept.map_or(app.limits.max_length, |_| u32::MAX);
    let mut prompts = match &fields.input {
        PromptField::Text(text) => vec![encode(app, fields, text, limit).await.map_err(for_input)?],
        PromptField::Texts(texts) => {
            check_count(texts.len())?;
            let mut prompts = Vec::with_capacity(texts.len());
            for text in texts {
                prompts.push(encode(app, fields, text, limit).await.map_err(for_input)?);
            }
            prompts
        }
        PromptField::Tokens(tokens) => vec![tokens.clone()],
        PromptField::TokenLists(lists) => lists.clone(),
    };
    check_count(prompts.len())?;
    for tokens in &mut prompts {
        if let Some(kept) = kept {
            // As generation does: what is said last counts.
            tokens.drain(..tokens.len().saturating_sub(kept));
        }
        for &id in tokens.iter() {
            check_id("input", id, app.limits)?;
        }
    }
    Ok(prompts)
}

async fn encode(
    app: &App,
    fields: &EmbeddingFields,
    text: &str,
    limit: u32,
) -> Result<Vec<TokenId>, ApiError> {
    let special = fields.add_special_tokens.unwrap_or(true);
    app.encode.encode(text.to_owned(), special, limit).await
}

fn check_count(inputs: usize) -> Result<(), ApiError> {
    if (1..=MAX_INPUTS).contains(&inputs) {
        return Ok(());
    }
    Err(ApiError::invalid(
        "input",
        format!("there are {inputs} inputs: from 1 to {MAX_INPUTS} are allowed"),
    ))
}

/// One input's hidden states, as pooled.
async fn embed(
    app: &App,
    info: &AccessInfo,
    fields: &EmbeddingFields,
    tokens: Vec<TokenId>,
) -> Result<Vec<f32>, ApiError> {
    let request = Request {
        cache_salt: tenant_salt(info, fields.cache_salt.as_deref()),
        priority: if app.config.honour_priority {
            fields.priority.unwrap_or(0)
        } else {
            0
        },
        tenant: info.tenant.get().map_or(0, |tenant| tenant.id),
        deadline: info.deadline.get().copied(),
        ..Request::embed(tokens, app.config.pooler.pooling)
    };
    let engine = &app.model.engine;
    let mut stream = engine
        .submit_arrived(request, info.arrival())
        .map_err(|error| {
            let mut error = ApiError::from_submit(&error, app.metrics.retry_after());
            if error.param.is_some() {
                error.param = Some("input".to_owned());
            }
            error
        })?;
    while let Some(update) = stream.next().await {
        if let Some(timings) = stream.timings() {
            // Only the first is kept.
            let _ = info.timings.set(timings);
        }
        if let Some(embedding) = update.embedding {
            info.cached_tokens
                .fetch_add(update.cached_prompt_tokens, Relaxed);
            return Ok(embedding);
        }
        if let Some(finish) = update.finish {
            return Err(failed(finish));
        }
    }
    Err(ApiError::internal("the engine ended without an answer"))
}

fn failed(finish: Finish) -> ApiError {
    let message = finish.error.unwrap_or_else(|| "it was ended".to_owned());
    match finish.reason {
        FinishReason::Abort => ApiError::new(StatusCode::REQUEST_TIMEOUT, message),
        _ => ApiError::internal(format!("the request failed: {message}")),
    }
}
