//! Bodies, fields, ids, routes and addresses that are not what they seem.

use std::time::Duration;

use ashlar::http::ApiKeys;
use serde_json::{Value, json};

use crate::{CHAT, COMPLETIONS, Street, chat, support::Setup, text_of, with};

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
