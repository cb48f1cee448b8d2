//! Who reaches what: keys, tenants, sizes, and what replicas and clients see of a request.

use bytes::Bytes;
use http::Request;

use super::harness::{Gateway, Setting, echo, fed, full, keyed_service, open_service};

const CHAT: &str = "/v1/chat/completions";

/// Two tenants that serve a model of the same name, and one that leaves its service open.
async fn two_tenants() -> (Gateway, [super::harness::Replica; 3]) {
    let replicas = [echo("red").await, echo("blue").await, echo("open").await];
    let gateway = Gateway::start().await;
    gateway.secrets.set(
        "red/keys",
        &[("red-team", "red-key"), ("both", "shared-key")],
    );
    gateway.secrets.set(
        "blue/keys",
        &[("blue-team", "blue-key"), ("both", "shared-key")],
    );
    let mut blue = keyed_service("blue/llm", "llama");
    blue.hosts = vec!["blue.example.com".to_owned()];
    gateway.publish(&[
        (keyed_service("red/llm", "llama"), &[replicas[0].address]),
        (blue, &[replicas[1].address]),
        (open_service("green/llm", "llama"), &[replicas[2].address]),
    ]);
    (gateway, replicas)
}

#[tokio::test]
async fn a_bare_model_name_means_the_tenant_of_the_key() {
    let (gateway, _replicas) = two_tenants().await;
    let body = r#"{"messages":[{"role":"user","content":"hi"}],"model":"llama"}"#;
    for (key, expected) in [("red-key", "red"), ("blue-key", "blue")] {
        let (status, seen) = gateway.post(CHAT, Some(key), body).await;
        assert_eq!((status, seen["replica"].as_str()), (200, Some(expected)));
        assert_eq!(seen["body"], body, "the body arrives unchanged");
        assert_eq!(seen["path"], CHAT);
    }
    // Nobody's key, no key, a key of several, and a model of nobody all look the same.
    for (key, model) in [
        (Some("guess"), "llama"),
        (None, "llama"),
        (Some("shared-key"), "llama"),
        (Some("red-key"), "mistral"),
    ] {
        let body = format!(r#"{{"model":"{model}"}}"#);
        let (status, error) = gateway.post(CHAT, key, &body).await;
        assert_eq!((status, error["error"]["code"].as_u64()), (404, Some(404)));
        assert_eq!(error["error"]["param"], "model");
    }
}

#[tokio::test]
async fn a_key_opens_its_own_service_only() {
    let (gateway, _replicas) = two_tenants().await;
    for (path, key, expected) in [
        ("/red/llm/v1/models", Some("red-key"), 200),
        ("/red/llm/v1/models", Some("blue-key"), 401),
        ("/red/llm/v1/models", None, 401),
        ("/red/llm/metrics", None, 401),
        ("/red/llm/health", None, 401),
        ("/blue/llm/v1/models", Some("shared-key"), 200),
        ("/green/llm/v1/models", None, 200),
        ("/red/nobody/v1/models", Some("red-key"), 404),
    ] {
        let (status, body) = gateway.get(path, key).await;
        assert_eq!(status, expected, "{path} {key:?}: {body}");
        if status == 401 {
            assert_eq!(body["error"]["type"], "AuthenticationError");
        }
    }
}

#[tokio::test]
async fn hosts_lead_to_their_service() {
    let (gateway, _replicas) = two_tenants().await;
    for (host, key, expected) in [
        ("blue.example.com", "blue-key", 200),
        ("llm.blue.svc", "blue-key", 200),
        ("llm.blue.svc.cluster.local", "blue-key", 200),
        ("llm.red.svc", "blue-key", 401),
    ] {
        let request = gateway
            .request(CHAT)
            .header("host", host)
            .header("authorization", format!("Bearer {key}"))
            .body(full("{}"))
            .unwrap();
        let (status, seen) = gateway.json(request).await;
        assert_eq!(status, expected, "{host}");
        if status == 200 {
            assert_eq!(seen["replica"], "blue");
            assert_eq!(seen["headers"]["x-forwarded-host"], host);
        }
    }
}

#[tokio::test]
async fn namespace_and_name_as_model_become_the_name_that_the_runtime_knows() {
    let (gateway, _replicas) = two_tenants().await;
    let body = r#"{"model":"red/llm","prompt":"hi"}"#;
    let (status, seen) = gateway.post("/v1/completions", Some("red-key"), body).await;
    assert_eq!(status, 200);
    assert_eq!(seen["body"], r#"{"model":"llama","prompt":"hi"}"#);
    assert_eq!(seen["headers"]["content-length"], "31");
    let (status, seen) = gateway
        .post("/v1/completions", None, r#"{"model":"green/llm"}"#)
        .await;
    assert_eq!((status, seen["replica"].as_str()), (200, Some("open")));
    let (status, _) = gateway
        .post("/v1/completions", Some("blue-key"), body)
        .await;
    assert_eq!(status, 401);
}

#[tokio::test]
async fn the_replica_learns_the_client_and_never_the_key() {
    let (gateway, _replicas) = two_tenants().await;
    let request = gateway
        .request("/red/llm/v1/completions")
        .header("authorization", "Bearer red-key")
        .header("x-ashlar-client", "somebody-else")
        .header("x-request-id", "abc")
        .header(
            "traceparent",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        )
        .body(full("{}"))
        .unwrap();
    let (_, seen) = gateway.json(request).await;
    let headers = &seen["headers"];
    assert_eq!(headers["x-ashlar-client"], "red-team");
    assert_eq!(headers["x-request-id"], "abc");
    assert_eq!(headers["x-forwarded-for"], "127.0.0.1");
    assert!(
        headers["traceparent"]
            .as_str()
            .unwrap()
            .contains("b7ad6b7169203331")
    );
    assert!(headers.get("authorization").is_none());
    assert!(!seen.to_string().contains("red-key"));
}

#[tokio::test]
async fn the_list_of_models_is_what_the_key_may_call() {
    let (gateway, _replicas) = two_tenants().await;
    let ids = |list: &serde_json::Value| -> Vec<String> {
        let models = list["data"].as_array().unwrap().iter();
        models
            .map(|m| m["id"].as_str().unwrap().to_owned())
            .collect()
    };
    let (status, list) = gateway.get("/v1/models", Some("red-key")).await;
    assert_eq!((status, ids(&list)), (200, vec!["llama".to_owned()]));
    let (_, list) = gateway.get("/v1/models", Some("shared-key")).await;
    assert_eq!(ids(&list), ["blue/llm", "red/llm"]);
    let (status, card) = gateway.get("/v1/models/blue%2Fllm", Some("blue-key")).await;
    assert_eq!((status, card["owned_by"].as_str()), (200, Some("blue")));
    assert_eq!(
        gateway
            .get("/v1/models/blue%2Fllm", Some("red-key"))
            .await
            .0,
        404
    );
    assert_eq!(gateway.get("/v1/models", Some("guess")).await.0, 401);
    assert_eq!(gateway.get("/v1/models", None).await.0, 401);
}

#[tokio::test]
async fn a_rotated_key_works_at_once() {
    let (gateway, _replicas) = two_tenants().await;
    let path = "/red/llm/v1/models";
    assert_eq!(gateway.get(path, Some("red-key")).await.0, 200);
    assert_eq!(gateway.get(path, Some("new-key")).await.0, 401);
    gateway.secrets.set("red/keys", &[("red-team", "new-key")]);
    assert_eq!(gateway.get(path, Some("new-key")).await.0, 200);
    assert_eq!(gateway.get(path, Some("red-key")).await.0, 401);
}

#[tokio::test]
async fn unreadable_keys_are_503_and_name_the_command() {
    let gateway = Gateway::start().await;
    let replica = echo("r").await;
    gateway.publish(&[(keyed_service("red/llm", "llama"), &[replica.address])]);
    let (status, error) = gateway.get("/red/llm/v1/models", Some("k")).await;
    assert_eq!(status, 503);
    let message = error["error"]["message"].as_str().unwrap();
    assert!(
        message.contains("ashlar-operator grant red/llm"),
        "{message}"
    );
}

#[tokio::test]
async fn a_body_over_the_limit_is_413_announced_or_not() {
    let replica = echo("r").await;
    let mut setting = Setting::default();
    setting.body.total = 1000;
    let gateway = Gateway::with(setting).await;
    gateway.publish(&[(open_service("a/s", "m"), &[replica.address])]);
    let (status, error) = gateway
        .post("/a/s/v1/completions", None, &"x".repeat(1001))
        .await;
    assert_eq!((status, error["error"]["code"].as_u64()), (413, Some(413)));
    assert_eq!(
        gateway
            .post("/a/s/v1/completions", None, &"x".repeat(1000))
            .await
            .0,
        200
    );

    let (feed, body) = fed();
    for _ in 0..11 {
        let piece: &'static str = Box::leak("x".repeat(100).into_boxed_str());
        feed.send(Ok(piece)).unwrap();
    }
    drop(feed);
    let request = gateway.request("/a/s/v1/completions").body(body).unwrap();
    assert_eq!(gateway.json(request).await.0, 413);
}

#[tokio::test]
async fn a_body_without_a_model_says_what_to_do() {
    let (gateway, _replicas) = two_tenants().await;
    for body in ["", "[]", "{}", r#"{"model":7}"#, "{\"model\":"] {
        let (status, error) = gateway.post(CHAT, Some("red-key"), body).await;
        assert_eq!(
            (status, error["error"]["param"].as_str()),
            (400, Some("model")),
            "{body}"
        );
    }
}

#[tokio::test]
async fn every_answer_of_the_gateway_carries_a_request_id() {
    let (gateway, _replicas) = two_tenants().await;
    let request = Request::get(format!("http://{}/nowhere", gateway.address))
        .body(full(Bytes::new()))
        .unwrap();
    let response = gateway.send(request).await;
    assert_eq!(response.status(), 404);
    assert_eq!(response.headers()["x-request-id"].len(), 32);
}
