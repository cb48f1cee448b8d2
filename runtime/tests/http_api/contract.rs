//! What is refused, how errors look, who is let in, and that the description says so.

use ashlar::http::ApiKeys;
use serde_json::json;
use tokio::io::AsyncReadExt;

use crate::{chat, completion, support::Setup};

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
