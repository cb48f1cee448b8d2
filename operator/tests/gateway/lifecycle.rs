//! Starting, probes, and leaving without losing a request.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
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
    let body = Arc::new(Mutex::new(Some(body)));
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

/// A replica on a thread of its own, which takes one connection after the other as they come and answers one request on
/// each: it hears requests in exactly the order in which they reach this machine's network.
fn listener() -> (SocketAddr, Arc<Mutex<Vec<usize>>>) {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let order = Arc::clone(&heard);
    let (ready, address) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async move {
            let replica = replica(move |request| {
                let number = request.uri().path().trim_start_matches("/v1/");
                order.lock().unwrap().push(number.parse().unwrap());
                let answer = Response::builder().header("connection", "close");
                async move { Ok(answer.body(full("{}"))?) }
            })
            .await;
            ready.send(replica.address).unwrap();
            std::future::pending::<()>().await;
        });
    });
    (address.recv().unwrap(), heard)
}

/// On several threads, as in a pod: that one is sent on before the next is no accident of one thread's order.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_hundred_held_requests_go_on_in_order_and_none_is_lost() {
    const HELD: usize = 100;
    let (fresh, heard) = listener();
    let gateway = Gateway::start().await;
    gateway.publish(&[(open_service("a/s", "m"), &[])]);
    let ask = |number: usize| {
        let gateway = &gateway;
        async move {
            // One after the other: each is held before the next one comes.
            let line = r#"ashlar_gateway_held_requests{name="s",namespace="a"}"#;
            gateway.metric(&format!("{line} {number}")).await;
            let path = format!("/a/s/v1/{number}");
            // With a body and without one.
            match number % 2 {
                0 => gateway.post(&path, None, "{}").await,
                _ => gateway.get(&path, None).await,
            }
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
        gateway.publish(&[(open_service("a/s", "m"), &[fresh])]);
    };
    let (answers, ()) = tokio::join!(asking, leaving);
    assert!(answers.iter().all(|(status, _)| *status == 200));
    assert_eq!(*heard.lock().unwrap(), (0..HELD).collect::<Vec<_>>());
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
