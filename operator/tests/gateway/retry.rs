//! Another replica is tried as long as nothing has been answered, and only then.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::Response;
use http_body_util::BodyExt as _;
use tokio::net::TcpListener;

use super::harness::{
    Gateway, Setting, chunk, echo, fed, full, nobody, open_service, replica, replica_at, soon,
};

const PATH: &str = "/a/s/v1/completions";

/// A replica that reads a request whole, answers 503 and counts how often it was asked.
async fn unavailable(draining: bool) -> (super::harness::Replica, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let replica = replica(move |request| {
        count.fetch_add(1, Ordering::SeqCst);
        async move {
            request.into_body().collect().await?;
            let mut response = Response::builder().status(503);
            if draining {
                response = response.header("x-ashlar-draining", "1");
            }
            Ok(response.body(full("{\"error\":\"full\"}"))?)
        }
    })
    .await;
    (replica, asked)
}

/// A replica that closes each connection without an answer.
async fn resetting() -> (super::harness::Replica, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let replica = replica(move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        async move { Err("no answer".into()) }
    })
    .await;
    (replica, asked)
}

#[tokio::test]
async fn a_draining_replica_is_passed_over_with_the_whole_body() {
    let (draining, asked) = unavailable(true).await;
    let healthy = echo("healthy").await;
    let gateway = Gateway::start().await;
    gateway.publish(&[(
        open_service("a/s", "m"),
        &[draining.address, healthy.address],
    )]);
    let body = "x".repeat(50_000);
    // The pick is by lot: after this many requests both were first choice for some.
    for _ in 0..40 {
        let (status, seen) = gateway.post(PATH, None, &body).await;
        assert_eq!((status, seen["replica"].as_str()), (200, Some("healthy")));
        assert_eq!(seen["body"].as_str().map(str::len), Some(50_000));
    }
    let retries = asked.load(Ordering::SeqCst);
    assert!(retries > 0);
    let line = r#"ashlar_gateway_retries_total{cause="draining",name="s",namespace="a"}"#;
    gateway.metric(&format!("{line} {retries}")).await;
}

#[tokio::test]
async fn a_refused_connection_is_tried_elsewhere() {
    let gone = nobody().await;
    let healthy = echo("healthy").await;
    let gateway = Gateway::start().await;
    gateway.publish(&[(open_service("a/s", "m"), &[gone, healthy.address])]);
    for _ in 0..40 {
        let (status, seen) = gateway.post(PATH, None, "{}").await;
        assert_eq!((status, seen["replica"].as_str()), (200, Some("healthy")));
    }
    assert!(gateway.metrics.render().contains(r#"cause="connect""#));
}

#[tokio::test]
async fn the_only_replica_is_asked_again_until_it_can_be_reached() {
    let gone = nobody().await;
    let gateway = Gateway::start().await;
    gateway.publish(&[(open_service("a/s", "m"), &[gone])]);
    let asking = gateway.post(PATH, None, "{}");
    let opening = async {
        let line = r#"ashlar_gateway_retries_total{cause="connect",name="s",namespace="a"} 2"#;
        gateway.metric(line).await;
        let listener = TcpListener::bind(gone).await.unwrap();
        replica_at(listener, None, |_| async { Ok(Response::new(full("{}"))) })
    };
    let ((status, _), _open) = tokio::join!(asking, opening);
    assert_eq!(status, 200);
}

#[tokio::test]
async fn an_ordinary_503_is_the_answer() {
    let (full_up, asked) = unavailable(false).await;
    let gateway = Gateway::start().await;
    gateway.publish(&[(open_service("a/s", "m"), &[full_up.address])]);
    let (status, body) = gateway.post(PATH, None, "{}").await;
    assert_eq!((status, body["error"].as_str()), (503, Some("full")));
    assert_eq!(asked.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_broken_connection_is_tried_once_more_and_no_further() {
    let mut replicas = Vec::new();
    let mut counters = Vec::new();
    for _ in 0..4 {
        let (replica, asked) = resetting().await;
        replicas.push(replica);
        counters.push(asked);
    }
    let addresses: Vec<_> = replicas.iter().map(|r| r.address).collect();
    let gateway = Gateway::start().await;
    gateway.publish(&[(open_service("a/s", "m"), &addresses)]);
    let (status, body) = gateway.post(PATH, None, "{}").await;
    assert_eq!(status, 502);
    assert_eq!(body["error"]["type"], "BadGatewayError");
    let visits: usize = counters.iter().map(|c| c.load(Ordering::SeqCst)).sum();
    assert_eq!(
        visits, 2,
        "a request that kills replicas must not visit them all"
    );
}

#[tokio::test]
async fn the_only_replica_is_asked_again_after_a_broken_connection() {
    let asked = Arc::new(AtomicUsize::new(0));
    let replica = replica(move |_| {
        let first = asked.fetch_add(1, Ordering::SeqCst) == 0;
        async move {
            if first {
                return Err("no answer".into());
            }
            Ok(Response::new(full("{}")))
        }
    })
    .await;
    let gateway = Gateway::start().await;
    gateway.publish(&[(open_service("a/s", "m"), &[replica.address])]);
    let (status, _) = gateway.post(PATH, None, "{}").await;
    assert_eq!(status, 200);
}

#[tokio::test]
async fn a_body_too_large_to_keep_is_not_sent_twice() {
    let (draining, asked) = unavailable(true).await;
    let gateway = Gateway::start().await;
    gateway.publish(&[(open_service("a/s", "m"), &[draining.address])]);
    let (feed, body) = fed();
    for _ in 0..100 {
        let piece: &'static str = Box::leak("x".repeat(1000).into_boxed_str());
        feed.send(Ok(piece)).unwrap();
    }
    drop(feed);
    let request = gateway.request(PATH).body(body).unwrap();
    let (status, body) = gateway.json(request).await;
    assert_eq!((status, body["error"].as_str()), (503, Some("full")));
    assert_eq!(asked.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn with_only_draining_replicas_the_request_waits_for_a_new_one() {
    let (draining, asked) = unavailable(true).await;
    let gateway = Gateway::start().await;
    gateway.publish(&[(open_service("a/s", "m"), &[draining.address])]);
    let healthy = echo("healthy").await;
    let asking = gateway.post(PATH, None, "{}");
    let replacing = async {
        gateway
            .metric(r#"ashlar_gateway_held_requests{name="s",namespace="a"} 1"#)
            .await;
        gateway.publish(&[(open_service("a/s", "m"), &[healthy.address])]);
    };
    let ((status, seen), ()) = tokio::join!(asking, replacing);
    assert_eq!((status, seen["replica"].as_str()), (200, Some("healthy")));
    assert_eq!(asked.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_request_is_held_until_there_is_a_replica() {
    let gateway = Gateway::start().await;
    gateway.publish(&[(open_service("a/s", "m"), &[])]);
    let healthy = echo("healthy").await;
    let asking = futures::future::join_all((0..20).map(|_| gateway.post(PATH, None, "{}")));
    let arriving = async {
        gateway
            .metric(r#"ashlar_gateway_held_requests{name="s",namespace="a"} 20"#)
            .await;
        gateway.publish(&[(open_service("a/s", "m"), &[healthy.address])]);
    };
    let (answers, ()) = tokio::join!(asking, arriving);
    assert!(answers.iter().all(|(status, _)| *status == 200));
    gateway
        .metric(r#"ashlar_gateway_held_requests{name="s",namespace="a"} 0"#)
        .await;
}

#[tokio::test]
async fn holding_ends_with_503_and_when_to_come_back() {
    let gateway = Gateway::with(Setting {
        hold: Duration::from_millis(10),
        ..Setting::default()
    })
    .await;
    gateway.publish(&[(open_service("a/s", "m"), &[])]);
    let request = gateway.request(PATH).body(full("{}")).unwrap();
    let response = gateway.send(request).await;
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    assert!(response.headers().contains_key("x-request-id"));
}

#[tokio::test]
async fn the_least_loaded_replica_is_chosen() {
    // Requests on `slow` never end, so each further one must go to `fast`.
    let slow = replica(|_| std::future::pending()).await;
    let fast = echo("fast").await;
    let gateway = Gateway::start().await;
    gateway.publish(&[(open_service("a/s", "m"), &[slow.address])]);
    let stuck = gateway.post(PATH, None, "{}");
    let others = async {
        gateway
            .metric(r#"ashlar_gateway_in_flight_requests{name="s",namespace="a"} 1"#)
            .await;
        gateway.publish(&[(open_service("a/s", "m"), &[slow.address, fast.address])]);
        for _ in 0..30 {
            let (_, seen) = gateway.post(PATH, None, "{}").await;
            assert_eq!(seen["replica"], "fast");
        }
    };
    tokio::select! {
        _ = stuck => panic!("the slow replica never answers"),
        () = others => {}
    }
}

#[tokio::test]
async fn a_replica_that_fails_again_and_again_is_left_out() {
    let (broken, asked) = resetting().await;
    let healthy = echo("healthy").await;
    let gateway = Gateway::start().await;
    gateway.publish(&[(open_service("a/s", "m"), &[broken.address, healthy.address])]);
    for _ in 0..200 {
        let (status, seen) = gateway.post(PATH, None, "{}").await;
        assert_eq!((status, seen["replica"].as_str()), (200, Some("healthy")));
    }
    // By lot it would have been asked a hundred times.
    assert_eq!(asked.load(Ordering::SeqCst), 5);
    gateway
        .metric(r#"ashlar_gateway_ejections_total{name="s",namespace="a"} 1"#)
        .await;
}

#[tokio::test]
async fn a_replica_whose_answers_break_off_is_left_out() {
    // What it has begun to answer, to be broken off once the client has the beginning.
    let begun = Arc::new(Mutex::new(Vec::new()));
    let feeds = Arc::clone(&begun);
    let breaking = replica(move |_| {
        let (feed, body) = fed();
        feed.send(Ok("{\"half")).unwrap();
        feeds.lock().unwrap().push(feed);
        async move { Ok(Response::new(body)) }
    })
    .await;
    let healthy = echo("healthy").await;
    let gateway = Gateway::start().await;
    gateway.publish(&[(
        open_service("a/s", "m"),
        &[breaking.address, healthy.address],
    )]);
    let mut broken = 0;
    for _ in 0..200 {
        let request = gateway.request(PATH).body(full("{}")).unwrap();
        let mut body = gateway.send(request).await.into_body();
        chunk(&mut body).await.unwrap().unwrap();
        for feed in begun.lock().unwrap().drain(..) {
            feed.send(Err("the replica dies".into())).unwrap();
            broken += 1;
        }
        let _ = soon("the end", body.collect()).await;
    }
    // By lot it would have been asked a hundred times.
    assert_eq!(broken, 5);
    gateway
        .metric(r#"ashlar_gateway_ejections_total{name="s",namespace="a"} 1"#)
        .await;
    gateway
        .metric(r#"ashlar_gateway_cut_responses_total{by="upstream",name="s",namespace="a"} 5"#)
        .await;
}

#[tokio::test]
async fn turns_of_a_chat_go_where_the_first_one_went() {
    let replicas = [echo("a").await, echo("b").await, echo("c").await];
    let gateway = Gateway::start().await;
    let addresses: Vec<_> = replicas.iter().map(|replica| replica.address).collect();
    gateway.publish(&[(open_service("a/s", "m"), &addresses)]);
    let mut used = std::collections::HashSet::new();
    for chat in 0..20 {
        let mut messages = vec![];
        let mut replica = None;
        for turn in 0..4 {
            let content = format!("chat {chat} turn {turn} {}", "x".repeat(200));
            messages.push(serde_json::json!({"role": "user", "content": content}));
            let body = serde_json::json!({"model": "m", "messages": messages}).to_string();
            let (status, seen) = gateway.post("/a/s/v1/chat/completions", None, &body).await;
            assert_eq!(status, 200);
            assert_eq!(
                seen["body"].as_str(),
                Some(body.as_str()),
                "the body is whole"
            );
            let name = seen["replica"].as_str().unwrap().to_owned();
            used.insert(name.clone());
            assert_eq!(replica.get_or_insert(name.clone()), &name, "chat {chat}");
        }
    }
    assert_eq!(used.len(), 3);
}
