//! The API as clients see it, over real sockets, with a fake model.
#![allow(clippy::unwrap_used, missing_docs)] // Tests.

use std::time::Duration;

use ashlar::{http::ApiKeys, shutdown::Phase};
use serde_json::{Value, json};
use support::{Setup, tiny_tokenizer};
use tokio::io::AsyncReadExt;

#[path = "support/http_server.rs"]
mod support;

fn chat(extra: Value) -> Value {
    let mut body =
        json!({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5});
    body.as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    body
}

fn completion(extra: Value) -> Value {
    let mut body = json!({"prompt": "abc", "max_tokens": 5, "temperature": 0});
    body.as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn a_chat_is_answered_with_usage() {
    let server = Setup::saying("hello").start().await;
    let reply = server.post("/v1/chat/completions", &chat(json!({}))).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert!(reply.headers.contains_key("x-request-id"));
    let json = reply.json();
    assert!(json["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(json["object"], "chat.completion");
    assert_eq!(json["model"], "tiny");
    let choice = &json["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["message"]["content"], "hello");
    assert_eq!(choice["finish_reason"], "length");
    // <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n in tokens.
    assert_eq!(json["usage"]["prompt_tokens"], 1 + 5 + 2 + 1 + 1 + 1 + 10);
    assert_eq!(json["usage"]["completion_tokens"], 5);
    assert_eq!(json["usage"]["total_tokens"], 26);
    assert_eq!(json["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
}

#[tokio::test]
async fn a_stream_has_a_chunk_per_token_and_usage_at_the_end() {
    let server = Setup::saying("a日b").start().await;
    let body = chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let reply = server.post("/v1/chat/completions", &body).await;
    assert!(reply.headers["content-type"].starts_with("text/event-stream"));
    let frames = reply.frames();
    assert_eq!(frames.len(), 6);
    let contents: Vec<&str> = frames[..5]
        .iter()
        .map(|frame| frame["choices"][0]["delta"]["content"].as_str().unwrap())
        .collect();
    assert_eq!(contents, ["a", "", "", "日", "b"]);
    assert_eq!(frames[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(frames[0]["object"], "chat.completion.chunk");
    assert_eq!(frames[3]["choices"][0]["finish_reason"], Value::Null);
    assert_eq!(frames[4]["choices"][0]["finish_reason"], "length");
    assert_eq!(frames[5]["choices"], json!([]));
    assert_eq!(frames[5]["usage"]["completion_tokens"], 5);
    assert!(frames.iter().all(|frame| frame["id"] == frames[0]["id"]));
}

#[tokio::test]
async fn streams_say_what_whole_answers_say() {
    let server = Setup::default().start().await;
    for extra in [
        json!({"seed": 7, "temperature": 1.0, "n": 3, "max_tokens": 20}),
        json!({"logprobs": 2, "n": 2}),
        json!({"prompt": ["ab", "cd"], "echo": true}),
        json!({"frequency_penalty": 1.5, "logit_bias": {"65": 5}, "min_tokens": 3}),
    ] {
        let whole = server
            .post("/v1/completions", &completion(extra.clone()))
            .await;
        let whole = whole.json();
        let mut streamed = completion(extra);
        streamed["stream"] = json!(true);
        let frames = server.post("/v1/completions", &streamed).await.frames();
        for choice in whole["choices"].as_array().unwrap() {
            let mine: Vec<&Value> = frames
                .iter()
                .map(|frame| &frame["choices"][0])
                .filter(|chunk| chunk["index"] == choice["index"])
                .collect();
            let text: String = mine.iter().map(|c| c["text"].as_str().unwrap()).collect();
            assert_eq!(choice["text"], text.as_str());
            assert_eq!(
                choice["finish_reason"],
                mine.last().unwrap()["finish_reason"]
            );
            if !choice["logprobs"].is_null() {
                let tokens: Vec<&Value> = mine
                    .iter()
                    .flat_map(|c| c["logprobs"]["token_logprobs"].as_array().unwrap())
                    .collect();
                let whole: Vec<&Value> = choice["logprobs"]["token_logprobs"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .collect();
                assert_eq!(whole, tokens);
                assert_eq!(
                    choice["logprobs"]["top_logprobs"][0]
                        .as_object()
                        .unwrap()
                        .len(),
                    2
                );
            }
        }
    }
}

#[tokio::test]
async fn choices_differ_and_seeds_repeat() {
    let server = Setup::default().start().await;
    let body = completion(json!({"seed": 7, "temperature": 1.0, "n": 3, "max_tokens": 20}));
    let first = server.post("/v1/completions", &body).await.json();
    let again = server.post("/v1/completions", &body).await.json();
    assert_eq!(first["choices"], again["choices"]);
    let texts: std::collections::HashSet<&str> = first["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| choice["text"].as_str().unwrap())
        .collect();
    assert_eq!(texts.len(), 3);
    assert_eq!(first["usage"]["prompt_tokens"], 3);
}

#[tokio::test]
async fn chat_logprobs_have_tokens_and_bytes() {
    let server = Setup::default().start().await;
    let body = chat(json!({"logprobs": true, "top_logprobs": 3, "temperature": 0}));
    let json = server.post("/v1/chat/completions", &body).await.json();
    let content = json["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    assert_eq!(content.len(), 5);
    for entry in content {
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        // Greedy: the sampled token is the most likely one.
        assert_eq!(entry["logprob"], top[0]["logprob"]);
        assert_eq!(entry["bytes"], top[0]["bytes"]);
        assert!(entry["logprob"].as_f64().unwrap() <= 0.0);
    }
}

#[tokio::test]
async fn stop_strings_end_the_answer_and_are_named() {
    let server = Setup::saying("one END two").start().await;
    let body = completion(json!({"stop": ["zzz", "END"], "max_tokens": 50}));
    let json = server.post("/v1/completions", &body).await.json();
    assert_eq!(json["choices"][0]["text"], "one ");
    assert_eq!(json["choices"][0]["finish_reason"], "stop");
    assert_eq!(json["choices"][0]["stop_reason"], "END");
    assert_eq!(json["usage"]["completion_tokens"], 7);
    server
        .until("the sequence ends", |stats| stats.running == 0)
        .await;
}

#[tokio::test]
async fn the_article_s_routes() {
    let server = Setup::saying("hello").start().await;
    let body = json!({"prompt": "abc", "max_tokens": 5});
    let reply = server.post("/generate", &body).await;
    assert_eq!(reply.json(), json!({"response": "hello"}));

    let frames = server
        .get("/stream?prompt=a%20b&max_tokens=5")
        .await
        .frames();
    assert_eq!(frames.len(), 5);
    assert_eq!(frames[0], json!({"token": u32::from(b'h'), "text": "h"}));

    let before = server.get("/metrics?name[]=llm_requests_total").await.body;
    assert!(before.contains("llm_requests_total 0"), "{before}");
    let measured = server.post("/generate_measured", &body).await.json();
    assert_eq!(measured["response"], "hello");
    let after = server.get("/metrics").await.body;
    assert!(after.contains("llm_requests_total 1"), "{after}");
    assert!(after.contains("llm_generation_seconds_count 1"), "{after}");
}

#[tokio::test]
async fn models_version_and_tokens() {
    let server = Setup::default().start().await;
    let models = server.get("/v1/models").await.json();
    assert_eq!(models["data"][0]["id"], "tiny");
    assert_eq!(models["data"][1]["id"], "alias");
    assert_eq!(models["data"][0]["max_model_len"], 256);
    assert_eq!(server.get("/v1/models/alias").await.json()["id"], "alias");
    server
        .get("/v1/models/other")
        .await
        .error(404, Some("model"));
    assert!(server.get("/version").await.json()["version"].is_string());
    let tokens = server
        .post("/tokenize", &json!({"prompt": "hello"}))
        .await
        .json();
    assert_eq!(tokens["tokens"], json!([258, 111]));
    assert_eq!(tokens["count"], 2);
    let text = server
        .post("/detokenize", &json!({"tokens": [258, 111]}))
        .await
        .json();
    assert_eq!(text["prompt"], "hello");
    server
        .post("/detokenize", &json!({"tokens": [9999]}))
        .await
        .error(400, Some("tokens"));
}

#[tokio::test]
async fn what_is_wrong_is_refused_by_name() {
    let server = Setup::default().start().await;
    let cases = [
        (json!({"temperature": -1}), "temperature"),
        (json!({"temperature": 1e300}), "temperature"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_p": 1.5}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"min_p": 2}), "min_p"),
        (json!({"n": 0}), "n"),
        (json!({"n": 100_000}), "n"),
        (json!({"prompt": vec!["a"; 200], "n": 100}), "n"),
        (json!({"prompt": vec!["a"; 300]}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": [999]}), "prompt"),
        (json!({"prompt": [[1], [261]]}), "prompt"),
        (json!({"prompt": "x".repeat(300)}), "prompt"),
        (json!({"prompt": "x".repeat(5000)}), "prompt"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": 254}), "max_tokens"),
        (json!({"max_tokens": -1}), "max_tokens"),
        (json!({"min_tokens": 6}), "min_tokens"),
        (json!({"presence_penalty": 3}), "presence_penalty"),
        (json!({"frequency_penalty": -3}), "frequency_penalty"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"logit_bias": {"261": 1}}), "logit_bias"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias"),
        (json!({"logit_bias": {"1": 101}}), "logit_bias"),
        (json!({"stop_token_ids": [261]}), "stop_token_ids"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": vec!["a"; 17]}), "stop"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"stream_options": {}}), "stream_options"),
        (
            json!({"response_format": {"type": "xml"}}),
            "response_format",
        ),
        (json!({"cache_salt": "x".repeat(257)}), "cache_salt"),
        (json!({"best_of": 4}), "best_of"),
    ];
    for (extra, param) in cases {
        let reply = server
            .post("/v1/completions", &completion(extra.clone()))
            .await;
        let message = reply.error(400, Some(param));
        assert!(!message.is_empty(), "{extra}");
    }
    let message = server
        .post("/v1/completions", &completion(json!({"max_tokens": 254})))
        .await
        .error(400, Some("max_tokens"));
    assert!(
        message.contains("253") && message.contains("256"),
        "{message}"
    );
    // None of it reached the engine, and the next request is served.
    assert_eq!(server.engine.stats().generation_tokens, 0);
    let reply = server
        .post(
            "/v1/completions",
            &completion(json!({"unknown": 1, "user": null})),
        )
        .await;
    assert_eq!(reply.status, 200);
}

#[tokio::test]
async fn chats_that_cannot_be_rendered_are_refused() {
    let server = Setup::default().start().await;
    let cases = [
        (json!([]), "messages"),
        (json!(["hi"]), "messages[0]"),
        (json!([{"content": "hi"}]), "messages[0].role"),
        (json!([{"role": "user"}]), "messages[0].content"),
        (
            json!([{"role": "user", "content": [{"type": "image_url"}]}]),
            "messages[0].content[0]",
        ),
        (json!([{"role": "bad", "content": "x"}]), "messages"),
    ];
    for (messages, param) in cases {
        let reply = server
            .post("/v1/chat/completions", &chat(json!({"messages": messages})))
            .await;
        reply.error(400, Some(param));
    }
    let tools = chat(json!({"tools": [{"type": "function"}]}));
    server
        .post("/v1/chat/completions", &tools)
        .await
        .error(400, Some("tools[0].function.name"));
    let parts =
        chat(json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}));
    assert_eq!(
        server.post("/v1/chat/completions", &parts).await.status,
        200
    );
}

#[tokio::test]
async fn every_error_has_the_envelope() {
    let server = Setup::default().start().await;
    server.get("/nowhere").await.error(404, None);
    server.get("/v1/completions").await.error(405, None);
    server
        .send("DELETE", "/health", &[], "")
        .await
        .error(405, None);
    server
        .send("POST", "/v1/completions", &[], "{")
        .await
        .error(400, None);
    server
        .send("POST", "/v1/completions", &[], "{} x")
        .await
        .error(400, None);
    server.get("/stream").await.error(400, None);
    let other = completion(json!({"model": "other"}));
    server
        .post("/v1/completions", &other)
        .await
        .error(404, Some("model"));
    let large = "x".repeat(ashlar::http::MAX_BODY_BYTES + 1);
    let mut stream = server.open("POST", "/v1/completions", &[], &large).await;
    let mut head = [0; 12];
    stream.read_exact(&mut head).await.unwrap();
    assert_eq!(&head, b"HTTP/1.1 413");
}

#[tokio::test]
async fn keys_guard_everything_but_probes() {
    let mut setup = Setup::default();
    setup.api.api_keys = ApiKeys::new(&["one", "two"]);
    let server = setup.start().await;
    for path in ["/v1/models", "/version", "/nowhere"] {
        server.get(path).await.error(401, None);
        let wrong = server
            .send("GET", path, &["authorization: Bearer on"], "")
            .await;
        wrong.error(401, None);
    }
    server
        .post("/tokenize", &json!({"prompt": "x"}))
        .await
        .error(401, None);
    let right = server
        .send("GET", "/v1/models", &["authorization: bearer two"], "")
        .await;
    assert_eq!(right.status, 200);
    for path in ["/health", "/health/live", "/metrics"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
}

#[tokio::test]
async fn request_ids_are_kept_or_made() {
    let server = Setup::default().start().await;
    let reply = server
        .send("GET", "/version", &["x-request-id: mine-1"], "")
        .await;
    assert_eq!(reply.headers["x-request-id"], "mine-1");
    let long = format!("x-request-id: {}", "x".repeat(200));
    let reply = server.send("GET", "/version", &[&long], "").await;
    assert_eq!(reply.headers["x-request-id"].len(), 32);
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_place() {
    let server = Setup::saying("hello")
        .step(Duration::from_millis(5))
        .start()
        .await;
    for body in [
        completion(json!({"stream": true, "max_tokens": 250})),
        completion(json!({"n": 4, "max_tokens": 250})),
    ] {
        let stream = server
            .open("POST", "/v1/completions", &[], &body.to_string())
            .await;
        server.until("it runs", |stats| stats.running > 0).await;
        drop(stream);
        server
            .until("it is aborted", |stats| {
                stats.running == 0 && stats.waiting == 0 && stats.blocks_free == stats.blocks_total
            })
            .await;
    }
    let metrics = server.get("/metrics").await.body;
    assert!(metrics.contains("finished_reason=\"abort\",model_name=\"tiny\"} 5")
        || metrics.contains("vllm:request_success_total{engine=\"0\",finished_reason=\"abort\",model_name=\"tiny\"} 5"), "{metrics}");
}

#[tokio::test]
async fn a_full_queue_is_answered_429() {
    let mut setup = Setup::saying("hello").step(Duration::from_millis(20));
    setup.engine.max_num_seqs = 1;
    setup.engine.max_num_queued_reqs = 1;
    let server = setup.start().await;
    let body = completion(json!({"max_tokens": 250})).to_string();
    let first = server.open("POST", "/v1/completions", &[], &body).await;
    server.until("one runs", |stats| stats.running == 1).await;
    let second = server.open("POST", "/v1/completions", &[], &body).await;
    server.until("one waits", |stats| stats.waiting == 1).await;
    let reply = server.post("/v1/completions", &completion(json!({}))).await;
    reply.error(429, None);
    assert!(reply.headers["retry-after"].parse::<u32>().unwrap() >= 1);
    drop((first, second));
}

#[tokio::test]
async fn a_failed_step_is_an_error_for_its_requests_alone() {
    let mut setup = Setup::saying("hello");
    setup.fake.faults.nan_token = Some(u32::from(b'!'));
    let server = setup.start().await;
    let bad = completion(json!({"prompt": "!"}));
    server.post("/v1/completions", &bad).await.error(500, None);
    let mut bad = bad;
    bad["stream"] = json!(true);
    let frames = server.post("/v1/completions", &bad).await.frames();
    assert_eq!(frames.last().unwrap()["error"]["code"], 500);
    assert_eq!(
        server
            .post("/v1/completions", &completion(json!({})))
            .await
            .status,
        200
    );
    assert_eq!(server.get("/health").await.status, 200);
}

#[tokio::test]
async fn health_fails_when_the_engine_is_stuck_or_gone() {
    let mut setup = Setup::saying("hello").step(Duration::from_secs(6));
    // Without work it gives a sign of life four times a second.
    setup.api.stall_limit = Duration::from_secs(1);
    let server = setup.start().await;
    assert_eq!(server.get("/health").await.status, 200);
    let request = server
        .open(
            "POST",
            "/v1/completions",
            &[],
            &completion(json!({})).to_string(),
        )
        .await;
    server
        .until("it is stuck", |stats| {
            stats.silent_for > Duration::from_secs(2)
        })
        .await;
    server.get("/health").await.error(503, None);
    server.get("/health/live").await.error(503, None);
    drop(request);

    let mut setup = Setup::default();
    setup.fake.faults.panic_token = Some(u32::from(b'!'));
    let server = setup.start().await;
    server
        .post("/v1/completions", &completion(json!({"prompt": "!"})))
        .await
        .error(500, None);
    server.until("it is gone", |stats| !stats.alive).await;
    server.get("/health").await.error(503, None);
    server.get("/health/live").await.error(503, None);
    server
        .post("/v1/completions", &completion(json!({})))
        .await
        .error(503, None);
}

#[tokio::test]
async fn a_leaving_server_serves_then_refuses_and_finishes_what_runs() {
    let server = Setup::saying("hello")
        .step(Duration::from_millis(5))
        .start()
        .await;
    let body = completion(json!({"max_tokens": 60, "stream": true})).to_string();
    let mut running = server.open("POST", "/v1/completions", &[], &body).await;
    server
        .until("it runs", |stats| stats.generation_tokens > 0)
        .await;

    server.lifecycle.enter(Phase::Leaving);
    let reply = server.get("/health").await;
    reply.error(503, None);
    assert_eq!(reply.headers["x-ashlar-draining"], "1");
    assert_eq!(
        server
            .post("/v1/completions", &completion(json!({})))
            .await
            .status,
        200
    );

    server.lifecycle.enter(Phase::Refusing);
    server
        .engine
        .drain(std::time::Instant::now() + Duration::from_secs(20));
    let reply = server.post("/v1/completions", &completion(json!({}))).await;
    reply.error(503, None);
    assert_eq!(reply.headers["x-ashlar-draining"], "1");

    let mut bytes = Vec::new();
    running.read_to_end(&mut bytes).await.unwrap();
    let text = String::from_utf8(bytes).unwrap();
    assert!(
        text.contains("\"finish_reason\":\"length\"") && text.contains("data: [DONE]"),
        "{text}"
    );
    server.engine.join().await.unwrap();
    tokio::time::timeout(Duration::from_secs(20), server.connections.all_ended())
        .await
        .unwrap();
}

#[tokio::test]
async fn metrics_have_vllm_s_names_and_move() {
    let server = Setup::default().start().await;
    let prompt = "x".repeat(64);
    for _ in 0..2 {
        let reply = server
            .post("/v1/completions", &completion(json!({"prompt": prompt})))
            .await;
        assert_eq!(reply.status, 200);
    }
    let text = server.get("/metrics").await.body;
    let label = "{engine=\"0\",model_name=\"tiny\"}";
    for (name, value) in [
        ("vllm:num_requests_running", 0),
        ("vllm:num_requests_waiting", 0),
        ("vllm:prompt_tokens_total", 128),
        ("vllm:generation_tokens_total", 10),
        ("vllm:num_preemptions_total", 0),
        ("vllm:prefix_cache_queries_total", 128),
        ("vllm:prefix_cache_hits_total", 48),
        ("vllm:time_to_first_token_seconds_count", 2),
        ("vllm:inter_token_latency_seconds_count", 8),
        ("vllm:request_prompt_tokens_sum", 128),
        ("vllm:e2e_request_latency_seconds_count", 2),
        ("vllm:request_params_n_count", 2),
    ] {
        let line = format!("{name}{label} {value}\n");
        assert!(text.contains(&line), "{line}{text}");
    }
    for name in [
        "vllm:kv_cache_usage_perc",
        "vllm:cache_config_info",
        "vllm:engine_sleep_state",
        "vllm:num_requests_waiting_by_reason",
        "vllm:request_success_total",
        "vllm:iteration_tokens_total_bucket",
        "vllm:request_queue_time_seconds_bucket",
        "vllm:request_time_per_output_token_seconds_bucket",
        "http_requests_total",
        "http_request_duration_highr_seconds_bucket",
        "process_resident_memory_bytes",
    ] {
        assert!(text.contains(name), "{name}");
    }
    assert!(text.contains(
        "http_requests_total{handler=\"/v1/completions\",method=\"POST\",status=\"2xx\"} 2"
    ));
    assert!(!text.contains("handler=\"/metrics\""));
    let some = server
        .get("/metrics?name[]=vllm:num_requests_waiting&name%5B%5D=vllm%3Akv_cache_usage_perc")
        .await
        .body;
    let families: Vec<&str> = some
        .lines()
        .filter(|line| line.starts_with("# TYPE"))
        .collect();
    assert_eq!(families.len(), 2, "{some}");
}

#[tokio::test]
async fn special_tokens_of_the_model_end_answers() {
    let mut setup = Setup::default();
    let mut script: Vec<u32> = "hey".bytes().map(u32::from).collect();
    script.push(tiny_tokenizer::EOS);
    setup.fake.model = ashlar::model_runner::fake::FakeModel::Script(script);
    let server = setup.start().await;
    let json = server
        .post("/v1/completions", &completion(json!({"max_tokens": 9})))
        .await
        .json();
    assert_eq!(json["choices"][0]["text"], "hey");
    assert_eq!(json["choices"][0]["finish_reason"], "stop");
    assert_eq!(json["choices"][0]["stop_reason"], Value::Null);
    let on = server
        .post(
            "/v1/completions",
            &completion(json!({"max_tokens": 9, "ignore_eos": true})),
        )
        .await
        .json();
    assert_eq!(on["choices"][0]["text"], "heyheyh");
    assert_eq!(on["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn the_api_s_description_is_true() {
    let server = Setup::saying("x").start().await;
    let document = server.get("/openapi.json").await.json();
    assert_eq!(document["openapi"], "3.1.0");
    let text = document.to_string();
    // Every reference has its target.
    for reference in text.split("\"$ref\":\"#").skip(1) {
        let target = reference.split('"').next().unwrap();
        assert!(document.pointer(target).is_some(), "{target}");
    }
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            let path = path.replace("{model}", "tiny");
            let has_body = operation["requestBody"].is_object();
            let reply = server
                .send(
                    &method.to_uppercase(),
                    &path,
                    &[],
                    if has_body { "{}" } else { "" },
                )
                .await;
            assert!(![404, 405].contains(&reply.status), "{method} {path}");
            let described = &operation["responses"][reply.status.to_string()];
            assert!(described.is_object(), "{method} {path}: {}", reply.status);
            let kind = reply.headers["content-type"].split(';').next().unwrap();
            assert!(
                described["content"][kind].is_object(),
                "{method} {path}: {kind}"
            );
        }
    }
    // A field of the code is in the description.
    let fields = &document["components"]["schemas"]["SamplingFields"]["properties"];
    for field in ["temperature", "bad_words", "structured_outputs"] {
        assert!(fields[field].is_object(), "{field}");
    }
}
