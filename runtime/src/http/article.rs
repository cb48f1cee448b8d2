//! The plain routes: `/generate`, `/generate_measured`, `/stream`.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Instant,
};

use axum::{
    Extension, Json,
    extract::{Query, State, rejection::QueryRejection},
    response::Response,
};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    App,
    access::AccessInfo,
    choices::{Choices, Prompt},
    error::ApiError,
    message::failure,
    openai::{BodyResult, body_bytes},
    parse,
    sampling::{OneOrMany, SamplingFields},
    sse,
};

/// `max_tokens` of a request that does not say; lowered to the room that the prompt leaves.
const DEFAULT_TOKENS: u32 = 256;

#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct GenerateFields {
    prompt: String,
}

/// Query of `/stream`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct StreamQuery {
    prompt: String,
    max_tokens: Option<u32>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<i64>,
    min_p: Option<f64>,
    seed: Option<i64>,
    stop: Option<String>,
}

/// Checks and submits one prompt.
async fn submit(
    app: &App,
    prompt: String,
    mut fields: SamplingFields,
    info: &Arc<AccessInfo>,
) -> Result<Choices, ApiError> {
    if fields.n.is_some_and(|n| n != 1) {
        return Err(ApiError::invalid(
            "n",
            "this route gives one output: use /v1/completions for more",
        ));
    }
    // The route says whether it streams.
    fields.stream = None;
    fields.stream_options = None;
    let asked = fields.max_completion_tokens.or(fields.max_tokens);
    let defaults = app.model.tokenizer.generation_defaults();
    let mut sampling = fields.validate(defaults, app.limits, None)?;
    let tokens = app
        .encode
        .encode(prompt, true, app.limits.max_length)
        .await?;
    if asked.is_none() {
        let room = sampling.max_tokens(tokens.len(), app.limits)?;
        sampling.params.max_tokens = room.min(DEFAULT_TOKENS);
    }
    let prompts = [Prompt { tokens, text: None }];
    Choices::submit(app, &prompts, &sampling, info).await
}

async fn run(app: &App, info: &Arc<AccessInfo>, body: BodyResult) -> Result<String, ApiError> {
    app.check_open()?;
    let body = body_bytes(body)?;
    let fields: GenerateFields = parse(&body)?;
    let sampling: SamplingFields = parse(&body)?;
    drop(body);
    let mut choices = submit(app, fields.prompt, sampling, info).await?;
    let mut text = String::new();
    while let Some((_, update)) = choices.next().await {
        text.push_str(&update.text());
        if let Some(error) = failure(&update) {
            return Err(error);
        }
    }
    Ok(text)
}

/// `POST /generate`: `{prompt, max_tokens, …}` → `{"response": text}`.
pub(super) async fn generate(
    State(app): State<Arc<App>>,
    Extension(info): Extension<Arc<AccessInfo>>,
    body: BodyResult,
) -> Result<Json<Value>, ApiError> {
    let text = run(&app, &info, body).await?;
    Ok(Json(json!({"response": text})))
}

/// `POST /generate_measured`: `/generate` that also feeds `llm_requests_total` and `llm_generation_seconds`.
pub(super) async fn generate_measured(
    State(app): State<Arc<App>>,
    Extension(info): Extension<Arc<AccessInfo>>,
    body: BodyResult,
) -> Result<Json<Value>, ApiError> {
    let started = Instant::now();
    let text = run(&app, &info, body).await?;
    let seconds = started.elapsed().as_secs_f64();
    app.metrics.llm_requests.inc();
    app.metrics.llm_generation_seconds.observe(seconds);
    Ok(Json(json!({
        "response": text,
        "generation_seconds": seconds,
        "tokens": info.completion_tokens.load(Relaxed),
    })))
}

/// `GET /stream?prompt=&max_tokens=`: `data: {"token": id, "text": piece}` for each token, then `data: [DONE]`.
pub(super) async fn stream(
    State(app): State<Arc<App>>,
    Extension(info): Extension<Arc<AccessInfo>>,
    query: Result<Query<StreamQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    app.check_open()?;
    let Query(query) =
        query.map_err(|rejection| ApiError::new(rejection.status(), rejection.body_text()))?;
    let fields = SamplingFields {
        max_tokens: query.max_tokens,
        temperature: query.temperature,
        top_p: query.top_p,
        top_k: query.top_k,
        min_p: query.min_p,
        seed: query.seed,
        stop: query.stop.map(OneOrMany::One),
        ..SamplingFields::default()
    };
    let choices = submit(&app, query.prompt, fields, &info).await?;
    Ok(sse::response((choices, false), next_pieces))
}

async fn next_pieces((mut choices, ended): (Choices, bool)) -> Option<(String, (Choices, bool))> {
    if ended {
        return None;
    }
    let mut out = String::new();
    let Some((_, update)) = choices.next().await else {
        sse::done(&mut out);
        return Some((out, (choices, true)));
    };
    let last = update.tokens.len().checked_sub(1);
    for (at, token) in update.tokens.iter().enumerate() {
        let tail = if Some(at) == last {
            update.tail.as_str()
        } else {
            ""
        };
        let piece = json!({"token": token.id, "text": format!("{}{tail}", token.text)});
        sse::frame(&mut out, &piece);
    }
    if last.is_none() && !update.tail.is_empty() {
        sse::frame(&mut out, &json!({"token": null, "text": update.tail}));
    }
    if let Some(error) = failure(&update) {
        sse::frame(&mut out, &error.body());
    }
    Some((out, (choices, false)))
}
