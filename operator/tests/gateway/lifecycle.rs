//! Starting, probes, and leaving without losing a request.

use std::time::Duration;

use ashlar_operator::gateway::server::Phase;
use http::{Request, Response};
use http_body_util::BodyExt as _;
use tokio::net::TcpStream;

use super::harness::{Gateway, Setting, chunk, echo, fed, full, open_service, replica, soon};

const PATH: &str = "/a/s/v1/completions";

async fn probe(gateway: &Gateway, path: &str) -> (u16, String) {
    let request = Request::get(format!("http://{}{path}", gateway.admin))
        .body(full(""))
        .unwrap();
    let response = gateway.send(request).await;
    let status = response.status().as_u16();
    let body = response.collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

#[tokio::test]
async fn readiness_follows_the_first_listing_and_the_end() {
    let gateway = Gateway::start().await;
    gateway.synced.send_replace(false);
    assert_eq!(probe(&gateway, "/readyz").await.0, 503);
    assert_eq!(probe(&gateway, "/healthz").await.0, 200);
    let (status, error) = gateway.post(PATH, None, "{}").await;
    assert_eq!((status, error["error"]["code"].as_u64()), (503, Some(503)));
    gateway.synced.send_replace(true);
    assert_eq!(probe(&gateway, "/readyz").await.0, 200);
    gateway.phase.send_replace(Phase::Leaving);
    assert_eq!(probe(&gateway, "/readyz").await.0, 503);
    assert_eq!(probe(&gateway, "/healthz").await.0, 200);
    let (_, metrics) = probe(&gateway, "/metrics").await;
    assert!(metrics.contains("# TYPE ashlar_gateway_requests_total counter"));
    let (_, one) = probe(&gateway, "/metrics?name[]=ashlar_gateway_connections").await;
    assert!(one.contains("ashlar_gateway_connections"), "{one}");
    assert!(!one.contains("ashlar_gateway_requests_total"), "{one}");
}

#[tokio::test]
async fn leaving_it_still_answers_and_closes_connections() {
    let replica = echo("r").await;
    let gateway = Gateway::start().await;
    gateway.publish(&[(open_service("a/s", "m"), &[replica.address])]);
    gateway.phase.send_replace(Phase::Leaving);
    let request = gateway.request(PATH).body(full("{}")).unwrap();
    let response = gateway.send(request).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["connection"], "close");
}

#[tokio::test]
async fn open_streams_are_finished_and_new_connections_refused() {
    let (feed, body) = fed();
    let body = std::sync::Arc::new(std::sync::Mutex::new(Some(body)));
    let replica = replica(move |_| {
        let body = body.lock().unwrap().take().expect("one request only");
        async move { Ok(Response::new(body)) }
    })
    .await;
    let gateway = Gateway::start().await;
    gateway.publish(&[(open_service("a/s", "m"), &[replica.address])]);
    feed.send(Ok("one")).unwrap();
    let request = gateway.request(PATH).body(full("{}")).unwrap();
    let mut body = gateway.send(request).await.into_body();
    assert_eq!(chunk(&mut body).await.unwrap().unwrap(), "one");

    gateway.phase.send_replace(Phase::Closed);
    soon("the listener to close", async {
        while TcpStream::connect(gateway.address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    feed.send(Ok("two")).unwrap();
    assert_eq!(chunk(&mut body).await.unwrap().unwrap(), "two");
    drop(feed);
    assert!(chunk(&mut body).await.is_none());
    assert_eq!(gateway.drained().await, 0);
}

#[tokio::test]
async fn held_requests_are_answered_while_draining() {
    let gateway = Gateway::start().await;
    gateway.publish(&[(open_service("a/s", "m"), &[])]);
    let fresh = echo("fresh").await;
    let asking = gateway.post(PATH, None, "{}");
    let leaving = async {
        gateway
            .metric(r#"ashlar_gateway_held_requests{name="s",namespace="a"} 1"#)
            .await;
        gateway.phase.send_replace(Phase::Closed);
        gateway.publish(&[(open_service("a/s", "m"), &[fresh.address])]);
    };
    let ((status, _), ()) = tokio::join!(asking, leaving);
    assert_eq!(status, 200);
}

#[tokio::test]
async fn a_hundred_held_requests_go_on_in_order_and_none_is_lost() {
    const HELD: usize = 100;
    let seen = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let order = std::sync::Arc::clone(&seen);
    let fresh = replica(move |request| {
        order.lock().unwrap().push(request.uri().path().to_owned());
        async move { Ok(Response::new(full("{}"))) }
    })
    .await;
    let gateway = Gateway::start().await;
    gateway.publish(&[(open_service("a/s", "m"), &[])]);
    let ask = |number: usize| {
        let gateway = &gateway;
        async move {
            // One after the other: each is held before the next one comes.
            let line = r#"ashlar_gateway_held_requests{name="s",namespace="a"}"#;
            gateway.metric(&format!("{line} {number}")).await;
            gateway.post(&format!("/a/s/v1/{number}"), None, "{}").await
        }
    };
    let asking = futures::future::join_all((0..HELD).map(ask));
    let leaving = async {
        gateway
            .metric(&format!(
                r#"ashlar_gateway_held_requests{{name="s",namespace="a"}} {HELD}"#
            ))
            .await;
        gateway.phase.send_replace(Phase::Closed);
        gateway.publish(&[(open_service("a/s", "m"), &[fresh.address])]);
    };
    let (answers, ()) = tokio::join!(asking, leaving);
    assert!(answers.iter().all(|(status, _)| *status == 200));
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), HELD);
    for (place, path) in seen.iter().enumerate() {
        let number: usize = path.trim_start_matches("/v1/").parse().unwrap();
        // They leave in order; on connections of their own one may pass another by a little.
        assert!(
            number.abs_diff(place) <= 8,
            "{number} came at place {place}"
        );
    }
}

#[tokio::test]
async fn what_outlasts_the_drain_is_counted() {
    let stuck = replica(|_| std::future::pending()).await;
    let gateway = Gateway::with(Setting {
        drain: Duration::from_millis(20),
        ..Setting::default()
    })
    .await;
    gateway.publish(&[(open_service("a/s", "m"), &[stuck.address])]);
    let asking = gateway.post(PATH, None, "{}");
    let leaving = async {
        gateway
            .metric(r#"ashlar_gateway_in_flight_requests{name="s",namespace="a"} 1"#)
            .await;
        gateway.phase.send_replace(Phase::Closed);
    };
    tokio::pin!(asking);
    tokio::select! {
        _ = &mut asking => panic!("the replica never answers"),
        () = leaving => {}
    }
    assert_eq!(gateway.drained().await, 1);
}
