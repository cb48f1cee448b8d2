//! Requests over the whole service with a model that makes up its answers: `ROUTE BODY`, a byte before the body.

use std::{sync::LazyLock, time::Duration};

use ashlar::{
    chat_template::ChatTemplate,
    engine::{Engine, EngineConfig},
    http::{self, ApiConfig},
    llm::LoadedModel,
    metrics::Metrics,
    model_runner::fake::{FakeConfig, FakeRunner},
    shutdown::Lifecycle,
};
use axum::{
    Router,
    body::{Body, Bytes, to_bytes},
};
use serde_json::Value;
use tokio::runtime::Runtime;
use tower::ServiceExt;

use crate::tiny_tokenizer::{EOS, VOCAB_SIZE};

const ROUTES: [&str; 10] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/generate",
    "/generate_measured",
    "/v1/embeddings",
];
/// Longest answer: far above what the largest `n` of the longest answers takes.
const MAX_ANSWER_BYTES: usize = 256 << 20;

struct Service {
    runtime: Runtime,
    router: Router,
}

static SERVICE: LazyLock<Service> = LazyLock::new(|| {
    let mut fake = FakeConfig {
        eos_token_ids: vec![EOS],
        ..FakeConfig::default()
    };
    fake.limits.vocab_size = VOCAB_SIZE;
    fake.limits.max_model_len = 64;
    let config = EngineConfig {
        eos_token_ids: vec![EOS],
        max_num_queued_reqs: 1 << 16,
        ..EngineConfig::default()
    };
    let engine =
        Engine::start(Box::new(FakeRunner::new(fake)), config).expect("the fake engine starts");
    let tokenizer = crate::tokenizer();
    let template = tokenizer.chat_template().unwrap_or_default().to_owned();
    let template = ChatTemplate::new(template, &tokenizer).expect("the tiny template is valid");
    let metrics = Metrics::new("tiny", engine.clone()).expect("metrics have distinct names");
    let api = ApiConfig {
        served_model_names: vec!["tiny".to_owned()],
        access_log: false,
        request_timeout: Some(Duration::from_secs(20)),
        ..ApiConfig::default()
    };
    let model = LoadedModel {
        path: "tiny".into(),
        tokenizer,
        chat_template: Some(template.into()),
        engine,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("the async runtime starts");
    let router = {
        let _inside = runtime.enter();
        http::router(model, api, metrics.into(), Lifecycle::default())
    };
    Service { runtime, router }
});

/// Sends one request and reads the whole answer.
pub(crate) fn run(data: &[u8]) {
    let Some((&route, body)) = data.split_first() else {
        return;
    };
    let route = ROUTES[usize::from(route) % ROUTES.len()];
    let service = &*SERVICE;
    let request = ::http::Request::post(route)
        .header("content-type", "application/json")
        .body(Body::from(Bytes::copy_from_slice(body)))
        .expect("the request is valid");
    let (status, answer) = service.runtime.block_on(async {
        let response = service.router.clone().oneshot(request).await;
        let response = response.expect("the service always answers");
        let status = response.status();
        let answer = to_bytes(response.into_body(), MAX_ANSWER_BYTES).await;
        (status, answer.expect("the answer ends"))
    });
    let text = String::from_utf8_lossy(&answer);
    assert!(!status.is_server_error(), "{route}: {status}: {text}");
    if !status.is_success() {
        let error: Value = serde_json::from_slice(&answer).expect("an error is JSON");
        let message = error["error"]["message"].as_str();
        assert!(message.is_some_and(|text| !text.is_empty()), "{error}");
    }
}
