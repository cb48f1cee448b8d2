//! Inputs that have hurt other servers: each is sent for real, is refused with words that help or served safely, and a
//! neighbour that runs all the while says exactly what it says alone.
#![allow(clippy::unwrap_used, missing_docs)] // Tests.

use std::time::{Duration, Instant};

use ashlar::http::ApiKeys;
use serde_json::{Value, json};
use support::{Reply, Server, Setup, tiny_tokenizer};
use tokio::task::JoinHandle;

#[path = "support/http_server.rs"]
mod support;

const NEIGHBOUR: &str = "neighbour";

/// A long stream with a seed of its own.
fn neighbour_body() -> String {
    json!({"prompt": NEIGHBOUR, "max_tokens": 200, "seed": 5, "temperature": 1, "stream": true, "ignore_eos": true})
        .to_string()
}

fn text_of(reply: &Reply) -> String {
    let frames = reply.frames();
    assert_eq!(
        frames.last().unwrap()["choices"][0]["finish_reason"],
        "length",
        "{reply:?}"
    );
    let texts = frames
        .iter()
        .map(|frame| frame["choices"][0]["text"].as_str().unwrap());
    texts.collect()
}

struct Street {
    server: std::sync::Arc<Server>,
    alone: String,
}

impl Street {
    async fn new() -> Self {
        let setup = Setup::default().step(Duration::from_millis(2));
        let server = std::sync::Arc::new(setup.start().await);
        let reply = server
            .send("POST", "/v1/completions", &[], &neighbour_body())
            .await;
        Self {
            alone: text_of(&reply),
            server,
        }
    }

    fn neighbour(&self) -> JoinHandle<Reply> {
        let server = std::sync::Arc::clone(&self.server);
        tokio::spawn(async move {
            server
                .send("POST", "/v1/completions", &[], &neighbour_body())
                .await
        })
    }

    /// Sends bad bodies while a neighbour runs.
    async fn send(&self, path: &str, bodies: &[String]) -> Vec<Reply> {
        let neighbour = self.neighbour();
        self.server
            .until("the neighbour runs", |stats| stats.running > 0)
            .await;
        let mut replies = Vec::new();
        for body in bodies {
            replies.push(self.server.send("POST", path, &[], body).await);
        }
        assert_eq!(
            text_of(&neighbour.await.unwrap()),
            self.alone,
            "{path}: {bodies:?}"
        );
        replies
    }

    /// Each is a 400 that names the field and says something.
    async fn refuses(&self, path: &str, cases: &[(Value, &str)]) {
        let bodies: Vec<String> = cases.iter().map(|(body, _)| body.to_string()).collect();
        let replies = self.send(path, &bodies).await;
        for ((body, param), reply) in cases.iter().zip(replies) {
            let message = reply.error(400, Some(param));
            assert!(message.len() > 10, "{body}: {message}");
        }
    }
}

fn with(extra: Value) -> Value {
    let mut body = json!({"prompt": "abc", "max_tokens": 5});
    let extra = extra.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(extra);
    body
}

fn chat(extra: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5});
    let extra = extra.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(extra);
    body
}

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn counts_without_bound() {
    let street = Street::new().await;
    let many: Vec<String> = vec!["a".to_owned(); 257];
    street
        .refuses(
            COMPLETIONS,
            &[
                (with(json!({"n": 1_000_000})), "n"),
                (with(json!({"n": 128, "prompt": ["a", "b", "c"]})), "n"),
                (with(json!({"prompt": many})), "prompt"),
                (with(json!({"logprobs": 129})), "logprobs"),
                (with(json!({"prompt_logprobs": 129})), "prompt_logprobs"),
                (with(json!({"stop": vec!["x"; 1000]})), "stop"),
                (
                    with(json!({"stop_token_ids": vec![1; 5000]})),
                    "stop_token_ids",
                ),
                (with(json!({"bad_words": vec!["x"; 5000]})), "bad_words"),
                (
                    with(json!({"allowed_token_ids": vec![1; 5000]})),
                    "allowed_token_ids",
                ),
                (
                    with(json!({"cache_salt": "s".repeat(10_000)})),
                    "cache_salt",
                ),
            ],
        )
        .await;
    let large = with(json!({"user": "x".repeat(9 << 20)})).to_string();
    street.send(COMPLETIONS, &[large]).await[0].error(413, None);
    let many: Vec<Value> = vec![json!({"role": "user", "content": "x"}); 5000];
    let tools: Vec<Value> = vec![json!({"type": "function", "function": {"name": "f"}}); 200];
    street
        .refuses(
            CHAT,
            &[
                (chat(json!({"messages": many})), "messages"),
                (chat(json!({"tools": tools})), "tools"),
            ],
        )
        .await;
}

#[tokio::test]
async fn numbers_that_are_none() {
    let street = Street::new().await;
    let fields = [
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ];
    let mut bodies = Vec::new();
    for field in fields {
        for number in [
            "NaN",
            "Infinity",
            "-Infinity",
            "1e400",
            "-1e400",
            "1e308",
            "\"nan\"",
            "[1]",
        ] {
            bodies.push(format!(
                "{{\"prompt\": \"a\", \"max_tokens\": 2, \"{field}\": {number}}}"
            ));
        }
    }
    for bias in ["NaN", "1e400", "1e308"] {
        bodies.push(format!(
            "{{\"prompt\": \"a\", \"logit_bias\": {{\"1\": {bias}}}}}"
        ));
    }
    for (body, reply) in bodies.iter().zip(street.send(COMPLETIONS, &bodies).await) {
        assert_eq!(reply.status, 400, "{body}: {reply:?}");
        assert!(reply.json()["error"]["message"].as_str().unwrap().len() > 10);
    }
}

#[tokio::test]
async fn least_tokens_without_most_tokens() {
    let street = Street::new().await;
    street
        .refuses(
            COMPLETIONS,
            &[
                (
                    with(json!({"min_tokens": 4_000_000_000_u32, "max_tokens": null})),
                    "min_tokens",
                ),
                (with(json!({"min_tokens": 6})), "min_tokens"),
            ],
        )
        .await;
    let body = chat(json!({"min_tokens": 3, "max_tokens": null, "stop": ["a"]})).to_string();
    assert_eq!(street.send(CHAT, &[body]).await[0].status, 200);
}

#[tokio::test]
async fn token_ids_outside_the_vocabulary() {
    let street = Street::new().await;
    let id = tiny_tokenizer::VOCAB_SIZE;
    street
        .refuses(
            COMPLETIONS,
            &[
                (with(json!({"prompt": [1, id]})), "prompt"),
                (with(json!({"prompt": [[1], [u32::MAX]]})), "prompt"),
                (with(json!({"stop_token_ids": [id]})), "stop_token_ids"),
                (
                    with(json!({"allowed_token_ids": [1, id]})),
                    "allowed_token_ids",
                ),
                (
                    with(json!({"logit_bias": {id.to_string(): 1}})),
                    "logit_bias",
                ),
                (with(json!({"logit_bias": {"-1": 1}})), "logit_bias"),
            ],
        )
        .await;
    let replies = street
        .send("/detokenize", &[json!({"tokens": [id]}).to_string()])
        .await;
    replies[0].error(400, Some("tokens"));
    let negative = with(json!({"prompt": [-1]})).to_string();
    assert_eq!(street.send(COMPLETIONS, &[negative]).await[0].status, 400);
}

#[tokio::test]
async fn schemas_and_expressions_that_are_none_or_too_much() {
    let street = Street::new().await;
    let mut deep = json!({"type": "string"});
    for _ in 0..70 {
        deep = json!({"items": deep});
    }
    let so = |value: Value| with(json!({"structured_outputs": value}));
    street
        .refuses(
            COMPLETIONS,
            &[
                (
                    so(json!({"json": {"type": "nonsense"}})),
                    "structured_outputs",
                ),
                (so(json!({"json": "not json"})), "structured_outputs"),
                (so(json!({"json": 7})), "structured_outputs"),
                (
                    so(json!({"json": {"type": "object", "properties": 7}})),
                    "structured_outputs",
                ),
                (
                    so(json!({"json": {"$ref": "http://169.254.169.254/"}})),
                    "structured_outputs",
                ),
                (so(json!({"json": {"pattern": "("}})), "structured_outputs"),
                (
                    so(json!({"json": json!({"type": "array", "items": {"items": deep}})})),
                    "structured_outputs",
                ),
                (so(json!({"regex": "(("})), "structured_outputs"),
                (so(json!({"regex": "(".repeat(500)})), "structured_outputs"),
                (
                    so(json!({"regex": "x".repeat(200_000)})),
                    "structured_outputs",
                ),
                (so(json!({"choice": []})), "structured_outputs"),
                (so(json!({"choice": vec!["x"; 2000]})), "structured_outputs"),
                (so(json!({"grammar": "start: ("})), "structured_outputs"),
                (
                    so(json!({"grammar": "root ::= \"a\""})),
                    "structured_outputs",
                ),
                (
                    so(json!({"regex": "a", "choice": ["b"]})),
                    "structured_outputs",
                ),
                (
                    with(json!({"response_format": {"type": "json_schema"}})),
                    "response_format",
                ),
            ],
        )
        .await;
    let tool = |parameters: Value| {
        let tool = json!({"type": "function", "function": {"name": "f", "parameters": parameters}});
        chat(json!({"tools": [tool], "tool_choice": "required"}))
    };
    street
        .refuses(
            CHAT,
            &[
                (tool(json!([1])), "tools[0].function.parameters"),
                (tool(json!({"type": 7})), "structured_outputs"),
                (
                    tool(json!({"properties": {"x": {"type": "nonsense"}}})),
                    "structured_outputs",
                ),
            ],
        )
        .await;
    // Expressions that blow up elsewhere: answered, whatever the answer, in bounded time.
    let started = Instant::now();
    let hostile = [
        "(a+)+b",
        "((a{1,100}){1,100}){1,100}",
        "(.*a){25}",
        "(x|xx|xxx)*y",
        "[a-z]{1,100000}",
    ];
    let bodies: Vec<String> = hostile
        .iter()
        .map(|regex| {
            with(json!({"structured_outputs": {"regex": regex}, "max_tokens": 40})).to_string()
        })
        .collect();
    for reply in street.send(COMPLETIONS, &bodies).await {
        assert!([200, 400].contains(&reply.status), "{reply:?}");
    }
    assert!(
        started.elapsed() < Duration::from_secs(30),
        "{:?}",
        started.elapsed()
    );
}

#[tokio::test]
async fn many_different_grammars() {
    let street = Street::new().await;
    let bodies: Vec<String> = (0..300)
        .map(|n| {
            with(json!({"structured_outputs": {"regex": format!("[ab]{n}")}, "max_tokens": 6}))
                .to_string()
        })
        .collect();
    for (n, reply) in street.send(COMPLETIONS, &bodies).await.iter().enumerate() {
        let text = reply.json()["choices"][0]["text"]
            .as_str()
            .unwrap()
            .to_owned();
        assert!(
            ["a", "b"].iter().any(|c| text == format!("{c}{n}")),
            "{text}"
        );
    }
}

#[tokio::test]
async fn templates_and_their_variables() {
    let street = Street::new().await;
    let many: serde_json::Map<String, Value> =
        (0..100).map(|n| (format!("k{n}"), json!(n))).collect();
    street
        .refuses(
            CHAT,
            &[
                (
                    chat(json!({"chat_template": "{% for i in range(10 ** 12) %}x{% endfor %}"})),
                    "chat_template",
                ),
                (
                    chat(json!({"chat_template_kwargs": {"messages": []}})),
                    "chat_template_kwargs",
                ),
                (
                    chat(json!({"chat_template_kwargs": {"chat_template": "x"}})),
                    "chat_template_kwargs",
                ),
                (
                    chat(json!({"chat_template_kwargs": many})),
                    "chat_template_kwargs",
                ),
            ],
        )
        .await;
    let fine = chat(json!({"chat_template_kwargs": {"enable_thinking": false}})).to_string();
    assert_eq!(street.send(CHAT, &[fine]).await[0].status, 200);
}

#[tokio::test]
async fn embeddings_without_bound() {
    let street = Street::new().await;
    let id = tiny_tokenizer::VOCAB_SIZE;
    street
        .refuses(
            "/v1/embeddings",
            &[
                (json!({"input": vec!["a"; 5000]}), "input"),
                (json!({"input": "a".repeat(100_000)}), "input"),
                (json!({"input": [[1], [id]]}), "input"),
                (json!({"input": ""}), "input"),
                (json!({"input": "a", "dimensions": u32::MAX}), "dimensions"),
            ],
        )
        .await;
    let many = json!({"input": vec!["a"; 2048]}).to_string();
    let reply = street.send("/v1/embeddings", &[many]).await.remove(0);
    assert_eq!(reply.status, 200);
}

#[tokio::test]
async fn nothing_is_fetched() {
    let street = Street::new().await;
    let part = |part: Value| chat(json!({"messages": [{"role": "user", "content": [part]}]}));
    let field = "messages[0].content[0]";
    street
        .refuses(
            CHAT,
            &[
                (
                    part(json!({"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}})),
                    field,
                ),
                (
                    part(json!({"type": "video_url", "video_url": {"url": "file:///etc/passwd"}})),
                    field,
                ),
                (
                    part(json!({"type": "input_audio", "input_audio": {"data": "AAAA"}})),
                    field,
                ),
            ],
        )
        .await;
}

#[tokio::test]
async fn fields_that_are_not_ours_change_nothing() {
    let street = Street::new().await;
    let plain = with(json!({"seed": 1}));
    let odd = with(json!({
        "seed": 1, "kv_transfer_params": {"remote_host": "10.0.0.1"}, "prompt_embeds": "AAAA", "request_id": "x",
        "vllm_xargs": {"x": 1}, "lora_path": "/etc", "return_hidden_states": true,
    }));
    let replies = street
        .send(COMPLETIONS, &[plain.to_string(), odd.to_string()])
        .await;
    assert_eq!(replies[0].json()["choices"], replies[1].json()["choices"]);
    let only_embeds = json!({"prompt_embeds": "AAAA", "max_tokens": 2}).to_string();
    assert_eq!(
        street.send(COMPLETIONS, &[only_embeds]).await[0].status,
        400
    );
}

#[tokio::test]
async fn bodies_that_are_no_requests() {
    let street = Street::new().await;
    let nested = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let bodies: Vec<String> = [
        "",
        "{",
        "null",
        "[]",
        "\"x\"",
        "{\"prompt\": \"a\"} {}",
        "{\"prompt\": \"\\ud800\"}",
        "{\"prompt\": {}}",
        "\u{FEFF}{}",
    ]
    .iter()
    .map(ToString::to_string)
    .chain([nested.clone()])
    .collect();
    for path in [
        COMPLETIONS,
        CHAT,
        "/v1/responses",
        "/v1/messages",
        "/v1/embeddings",
        "/tokenize",
        "/generate",
    ] {
        for (body, reply) in bodies.iter().zip(street.send(path, &bodies).await) {
            let shown: String = body.chars().take(40).collect();
            assert_eq!(reply.status, 400, "{path} {shown}: {reply:?}");
        }
    }
    // What nobody reads may be nested: skipping it needs no stack.
    let ignored = format!("{{\"prompt\": \"a\", \"max_tokens\": 2, \"x\": {nested}}}");
    assert_eq!(street.send(COMPLETIONS, &[ignored]).await[0].status, 200);
}

#[tokio::test]
async fn a_request_s_id_gives_no_power_over_another() {
    let street = Street::new().await;
    let neighbour = street.neighbour();
    street
        .server
        .until("it runs", |stats| stats.running > 0)
        .await;
    let reply = street
        .server
        .send(
            "POST",
            COMPLETIONS,
            &["x-request-id: same"],
            &with(json!({})).to_string(),
        )
        .await;
    assert_eq!(reply.status, 200);
    let stream = street
        .server
        .open(
            "POST",
            COMPLETIONS,
            &["x-request-id: same"],
            &with(json!({"stream": true, "max_tokens": 100})).to_string(),
        )
        .await;
    drop(stream);
    assert_eq!(text_of(&neighbour.await.unwrap()), street.alone);
}

#[tokio::test]
async fn routes_methods_and_heads() {
    let mut setup = Setup::default().step(Duration::from_millis(2));
    setup.api.api_keys = ApiKeys::new(&["key"]);
    let server = setup.start().await;
    let key = "authorization: Bearer key";
    for path in [
        "/tokenize",
        "/detokenize",
        COMPLETIONS,
        "/v1/embeddings",
        "/v1/messages",
        "/v1/responses",
        "/generate",
        "/openapi.json",
    ] {
        let reply = server.send("POST", path, &[], "{}").await;
        assert_eq!(reply.status, 401, "{path}");
    }
    for path in [
        "/collective_rpc",
        "/reset_prefix_cache",
        "/start_profile",
        "/pause",
        "/abort",
        "/load_lora_adapter",
        "/slots",
    ] {
        assert_eq!(
            server.send("POST", path, &[key], "{}").await.status,
            404,
            "{path}"
        );
    }
    assert_eq!(
        server.send("BREW", COMPLETIONS, &[key], "").await.status,
        405
    );
    let metrics = server.get("/metrics").await.body;
    assert!(metrics.contains("method=\"OTHER\"") && !metrics.contains("BREW"));
    let many: Vec<String> = (0..200).map(|n| format!("x-{n}: 1")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert_eq!(
        server.send("GET", "/v1/models", &many, "").await.status,
        431
    );
    let long = format!("x-long: {}", "x".repeat(1 << 20));
    let status = server.send("GET", "/v1/models", &[&long], "").await.status;
    assert_eq!(status, 431);
    assert_eq!(
        server.send("GET", "/v1/models", &[key], "").await.status,
        200
    );
}
