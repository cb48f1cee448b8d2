//! The HTTP API: OpenAI's routes, the article's, health and metrics. The only place that knows HTTP and JSON.
//!
//! ```text
//! server ──► access (id, log line, metrics) ──► auth ──► openai │ responses │ messages │ article │ tokenize │ health
//!                                                           └► chat (template, tools) ─► sampling (ranges, grammar)
//!                                                                ─► choices (submit, next) ─► message ─► answer, sse
//! ```
//!
//! Invariants:
//! - every answer that is not 2xx is OpenAI's error envelope, whatever went wrong;
//! - the engine sees a request only after every check that can fail it has passed;
//! - nothing here waits on the engine's thread, and no work longer than a millisecond runs on the async threads;
//! - a client that goes away aborts its sequences: they live in the answer's body.

mod access;
mod answer;
mod article;
mod auth;
mod chat;
mod choices;
mod embeddings;
mod encode;
pub mod error;
mod health;
mod message;
mod messages;
mod openai;
mod openapi;
mod responses;
pub mod sampling;
pub mod server;
mod sse;
pub mod structured;
pub mod tls;
mod tokenize;
mod tools;

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::{
    Router,
    extract::DefaultBodyLimit,
    middleware,
    routing::{get, post},
};
use clap::ValueEnum;
use http::{HeaderName, StatusCode};
use serde::de::DeserializeOwned;

pub use auth::ApiKeys;
use encode::EncodePool;
use error::ApiError;
use sampling::Limits;

use crate::{
    chat_template::ChatTemplate,
    grammar::Grammars,
    llm::{LoadedModel, max_length},
    metrics::Metrics,
    output::{ReasoningFormat, ToolFormat},
    pooler::PoolerConfig,
    shutdown::{Lifecycle, Phase},
    traces::Traces,
};

/// Largest request body, in bytes.
pub const MAX_BODY_BYTES: usize = 8 << 20;

/// Settings of the API.
#[derive(Debug, Clone)]
pub struct ApiConfig {
    /// Names that requests may use for the model; answers carry the first. At least one.
    pub served_model_names: Vec<String>,
    /// Keys that clients must send one of; none = open.
    pub api_keys: ApiKeys,
    /// `/health` fails when the engine has given no sign of life for this long, and `/health/live` after twice that.
    pub stall_limit: Duration,
    /// Send `usage` at the end of every stream.
    pub force_include_usage: bool,
    /// One log line per request.
    pub access_log: bool,
    /// How the model writes tool calls.
    pub tool_call_parser: ToolCallParser,
    /// How the model marks its reasoning.
    pub reasoning_parser: ReasoningParser,
    /// A request that takes longer fails.
    pub request_timeout: Option<Duration>,
    /// Header that names whose request it is, set by a trusted proxy; the API key says it otherwise.
    pub tenant_header: Option<HeaderName>,
    /// Keep prefix-cache hits among the requests of one tenant.
    pub isolate_prefix_cache: bool,
    /// Requests may say how urgent they are (`priority`); otherwise that is ignored.
    pub honour_priority: bool,
    /// How embeddings are made.
    pub pooler: PoolerConfig,
    /// Where spans go.
    pub traces: Option<Traces>,
}

impl Default for ApiConfig {
    fn default() -> Self {
        Self {
            served_model_names: Vec::new(),
            api_keys: ApiKeys::default(),
            stall_limit: Duration::from_secs(60),
            force_include_usage: false,
            access_log: true,
            tool_call_parser: ToolCallParser::Auto,
            reasoning_parser: ReasoningParser::Auto,
            request_timeout: None,
            tenant_header: None,
            isolate_prefix_cache: false,
            honour_priority: false,
            pooler: PoolerConfig::default(),
            traces: None,
        }
    }
}

/// `--tool-call-parser`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum ToolCallParser {
    /// As the model's chat template writes calls.
    #[default]
    Auto,
    /// `<tool_call>{…}</tool_call>`: Hermes, Qwen.
    Hermes,
    /// `{"name": …, "parameters": …}`: Llama 3.
    #[value(name = "llama3_json")]
    Llama3Json,
    /// `[TOOL_CALLS]…`: Mistral.
    Mistral,
}

impl ToolCallParser {
    fn format(self, template: Option<&ChatTemplate>) -> ToolFormat {
        let mentions = |text| template.is_some_and(|template| template.mentions(text));
        match self {
            Self::Hermes => ToolFormat::Hermes,
            Self::Llama3Json => ToolFormat::Llama3Json,
            Self::Mistral => ToolFormat::Mistral,
            Self::Auto if mentions("[TOOL_CALLS]") => ToolFormat::Mistral,
            Self::Auto if mentions("<tool_call>") => ToolFormat::Hermes,
            Self::Auto if mentions("<|python_tag|>") || mentions("Environment: ipython") => {
                ToolFormat::Llama3Json
            }
            Self::Auto => ToolFormat::Hermes,
        }
    }
}

/// `--reasoning-parser`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum ReasoningParser {
    /// As the model's chat template marks it, if it does.
    #[default]
    Auto,
    /// All text is the answer.
    None,
    /// `<think> … </think>`: DeepSeek R1.
    #[value(name = "deepseek_r1", alias = "qwen3")]
    DeepseekR1,
    /// `[THINK] … [/THINK]`: Magistral.
    #[value(name = "mistral")]
    Mistral,
}

impl ReasoningParser {
    fn format(self, template: Option<&ChatTemplate>) -> Option<ReasoningFormat> {
        let mentions = |text| template.is_some_and(|template| template.mentions(text));
        match self {
            Self::None => None,
            Self::DeepseekR1 => Some(ReasoningFormat::Think),
            Self::Mistral => Some(ReasoningFormat::Magistral),
            Self::Auto if mentions("</think>") => Some(ReasoningFormat::Think),
            Self::Auto if mentions("[/THINK]") => Some(ReasoningFormat::Magistral),
            Self::Auto => None,
        }
    }
}

/// Everything that handlers share.
pub(crate) struct App {
    pub(crate) model: LoadedModel,
    pub(crate) config: ApiConfig,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) lifecycle: Lifecycle,
    pub(crate) encode: EncodePool,
    /// Seconds since 1970 when serving began.
    pub(crate) created: u64,
    pub(crate) limits: Limits,
    pub(crate) grammars: Grammars,
    pub(crate) tool_format: ToolFormat,
    pub(crate) reasoning_format: Option<ReasoningFormat>,
}

impl App {
    /// The name in answers.
    pub(crate) fn model_name(&self) -> &str {
        self.config
            .served_model_names
            .first()
            .map_or("", String::as_str)
    }

    /// 404 for a model that is not served here.
    pub(crate) fn check_model(&self, asked: Option<&str>) -> Result<(), ApiError> {
        match asked {
            None | Some("") => Ok(()),
            Some(name) if self.config.served_model_names.iter().any(|n| n == name) => Ok(()),
            Some(name) => {
                // The name is the client's: shown in part.
                let shown: String = name.chars().take(128).collect();
                let mut error = ApiError::new(
                    StatusCode::NOT_FOUND,
                    format!(
                        "the model {shown:?} does not exist here: use {:?}",
                        self.model_name()
                    ),
                );
                error.param = Some("model".to_owned());
                Err(error)
            }
        }
    }

    /// 503 while leaving, and 429 while the queue is full: before any work is done for a request.
    pub(crate) fn check_open(&self) -> Result<(), ApiError> {
        if self.lifecycle.phase() >= Phase::Refusing {
            return Err(ApiError::draining());
        }
        let stats = self.model.engine.stats();
        let limit = self.model.engine.config().max_num_queued_reqs;
        if stats.waiting >= limit {
            return Err(ApiError::overloaded(
                format!(
                    "{} requests are waiting and the limit is {limit}: retry later",
                    stats.waiting
                ),
                self.metrics.retry_after(),
            ));
        }
        Ok(())
    }
}

/// Reads a JSON body; the error names the field.
pub(crate) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let mut reader = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let path = error.path().to_string();
        let mut api = ApiError::new(
            StatusCode::BAD_REQUEST,
            format!("the request is not valid: {}", error.inner()),
        );
        // "." is the whole, "?" a text that ended early.
        if !matches!(path.as_str(), "." | "?") {
            api.message = format!("{path} is not valid: {}", error.inner());
            api.param = Some(path);
        }
        api
    })?;
    reader.end().map_err(|error| {
        ApiError::new(
            StatusCode::BAD_REQUEST,
            format!("the request is not valid: {error}"),
        )
    })?;
    Ok(value)
}

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs())
}

/// The API of a running model.
pub fn router(
    model: LoadedModel,
    config: ApiConfig,
    metrics: Arc<Metrics>,
    lifecycle: Lifecycle,
) -> Router {
    let limits = Limits {
        max_length: max_length(&model.engine),
        vocab_size: model.engine.limits().vocab_size,
    };
    let template = model.chat_template.as_deref();
    let app = Arc::new(App {
        grammars: Grammars::new(
            Arc::clone(&model.tokenizer),
            &model.engine.config().eos_token_ids,
            limits.vocab_size,
        ),
        tool_format: config.tool_call_parser.format(template),
        reasoning_format: config.reasoning_parser.format(template),
        encode: EncodePool::new(Arc::clone(&model.tokenizer)),
        limits,
        model,
        config,
        metrics,
        lifecycle,
        created: unix_seconds(),
    });
    let guarded = Router::new()
        .route("/v1/chat/completions", post(openai::chat))
        .route("/v1/completions", post(openai::completions))
        .route("/v1/embeddings", post(embeddings::create))
        .route("/v1/responses", post(responses::create))
        .route("/v1/messages", post(messages::create))
        .route("/v1/messages/count_tokens", post(messages::count_tokens))
        .route("/v1/models", get(openai::models))
        .route("/v1/models/{*model}", get(openai::model))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/generate", post(article::generate))
        .route("/generate_measured", post(article::generate_measured))
        .route("/stream", get(article::stream))
        .route("/version", get(health::version))
        .route("/openapi.json", get(openapi::document))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(
            Arc::clone(&app),
            auth::check,
        ));
    let open = Router::new()
        .route("/health", get(health::ready))
        .route("/ping", get(health::ready))
        .route("/health/live", get(health::live))
        .route("/metrics", get(health::metrics))
        .method_not_allowed_fallback(method_not_allowed);
    open.merge(guarded)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(middleware::from_fn_with_state(
            Arc::clone(&app),
            access::record,
        ))
        .with_state(app)
}

/// What answers while the model is being loaded.
pub fn loading_router() -> Router {
    Router::new()
        .route("/health/live", get(|| async { "alive\n" }))
        // Nothing to tell yet is not a target that is down.
        .route("/metrics", get(|| async { health::exposition(Vec::new()) }))
        .fallback(|| async {
            let mut error = ApiError::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "the model is still being loaded: retry later",
            );
            error.retry_after = Some(2);
            error
        })
}

async fn not_found(uri: http::Uri) -> ApiError {
    let path: String = uri.path().chars().take(256).collect();
    ApiError::new(StatusCode::NOT_FOUND, format!("there is no {path} here"))
}

async fn method_not_allowed(method: http::Method, uri: http::Uri) -> ApiError {
    let path: String = uri.path().chars().take(256).collect();
    let method: String = method.as_str().chars().take(32).collect();
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        format!("{path} does not answer to {method}"),
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]
    use axum::body::Body;
    use tower::ServiceExt as _;

    use super::*;

    #[tokio::test]
    async fn while_the_model_loads_it_lives_and_is_scraped_but_answers_nothing_yet() {
        for (path, status, retry_after) in [
            ("/health/live", 200, None),
            ("/metrics", 200, None),
            ("/health", 503, Some("2")),
            ("/v1/models", 503, Some("2")),
        ] {
            let request = http::Request::get(path).body(Body::empty()).unwrap();
            let answer = loading_router().oneshot(request).await.unwrap();
            let header = answer.headers().get(http::header::RETRY_AFTER);
            let header = header.map(|value| value.to_str().unwrap().to_owned());
            assert_eq!(
                (answer.status().as_u16(), header.as_deref()),
                (status, retry_after),
                "{path}"
            );
        }
    }
}
