//! What one client may ask of a service, and the time that a request has.

use std::sync::{Arc, Mutex};

use ashlar_operator::gateway::limits::Limits;
use http::Response;

use super::harness::{Gateway, chunk, echo, fed, full, keyed_service, open_service, replica};

const PATH: &str = "/a/s/v1/completions";

fn limits(requests_per_minute: Option<u32>, concurrent_requests: Option<u32>) -> Limits {
    Limits {
        requests_per_minute,
        concurrent_requests,
    }
}

#[tokio::test]
async fn a_client_that_sends_too_many_waits_and_others_do_not() {
    let replica = echo("r").await;
    let gateway = Gateway::start().await;
    gateway
        .secrets
        .set("a/keys", &[("alice", "alice-key"), ("bob", "bob-key")]);
    let mut service = keyed_service("a/s", "m");
    service.limits = limits(Some(6), None);
    gateway.publish(&[(service, &[replica.address])]);
    // Six a minute: one, and the next after ten seconds. By the model's name it is the same client.
    let by_model = "/v1/completions";
    let (status, _) = gateway.post(PATH, Some("alice-key"), "{}").await;
    assert_eq!(status, 200);
    for path in [PATH, by_model] {
        let mut request = gateway.request(path);
        request = request.header("authorization", "Bearer alice-key");
        let request = request.body(full("{\"model\":\"m\"}")).unwrap();
        let refused = gateway.send(request).await;
        assert_eq!(refused.status(), 429);
        let after: u32 = refused.headers()["retry-after"]
            .to_str()
            .unwrap()
            .parse()
            .unwrap();
        assert!((9..=10).contains(&after), "{after}");
    }
    let (status, error) = gateway.post(PATH, Some("alice-key"), "{}").await;
    assert_eq!(
        (status, error["error"]["type"].as_str()),
        (429, Some("RateLimitError"))
    );
    let (status, _) = gateway.post(PATH, Some("bob-key"), "{}").await;
    assert_eq!(status, 200);
    gateway
        .metric(r#"ashlar_gateway_limited_requests_total{name="s",namespace="a"} 3"#)
        .await;
    // What is refused is no load that replicas are added for.
    let text = gateway.metrics.render();
    assert!(
        !text.contains(r#"ashlar_gateway_requests_total{code="429",name="s""#),
        "{text}"
    );
}

#[tokio::test]
async fn open_requests_are_limited_until_they_end() {
    let (feed, body) = fed();
    let body = Arc::new(Mutex::new(Some(body)));
    let replica = replica(move |_| {
        let body = body.lock().unwrap().take();
        async move { Ok(Response::new(body.unwrap_or_else(|| full("{}")))) }
    })
    .await;
    let gateway = Gateway::start().await;
    let mut service = open_service("a/s", "m");
    service.limits = limits(None, Some(1));
    gateway.publish(&[(service, &[replica.address])]);
    feed.send(Ok("one")).unwrap();
    let request = gateway.request(PATH).body(full("{}")).unwrap();
    let mut stream = gateway.send(request).await.into_body();
    assert_eq!(chunk(&mut stream).await.unwrap().unwrap(), "one");
    let (status, error) = gateway.post(PATH, None, "{}").await;
    assert_eq!(status, 429, "{error}");
    drop(feed);
    assert!(chunk(&mut stream).await.is_none());
    gateway
        .metric(r#"ashlar_gateway_in_flight_requests{name="s",namespace="a"} 0"#)
        .await;
    assert_eq!(gateway.post(PATH, None, "{}").await.0, 200);
}

#[tokio::test]
async fn a_request_has_the_time_that_its_client_gives_it() {
    let stuck = replica(|_| std::future::pending()).await;
    let gateway = Gateway::start().await;
    gateway.publish(&[
        (open_service("a/stuck", "m"), &[stuck.address]),
        (open_service("a/asleep", "m"), &[]),
    ]);
    for path in ["/a/stuck/v1/completions", "/a/asleep/v1/completions"] {
        let request = gateway.request(path).header("x-request-timeout", "0.05");
        let (status, error) = gateway.json(request.body(full("{}")).unwrap()).await;
        assert_eq!(
            (status, error["error"]["code"].as_u64()),
            (504, Some(504)),
            "{path}"
        );
        let text = error["error"]["message"].as_str().unwrap();
        assert!(
            text.contains("within 0.1 s") || text.contains("within 0.0 s"),
            "{text}"
        );
    }
    // The replica's request went with it.
    gateway
        .metric(r#"ashlar_gateway_in_flight_requests{name="stuck",namespace="a"} 0"#)
        .await;
}
