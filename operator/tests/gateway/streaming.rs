//! Bytes go through as they come, in both directions, and an end on one side is an end on the other.

use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Empty};
use tokio::sync::{Mutex, mpsc, oneshot};

use super::harness::{Gateway, chunk, fed, full, open_service, replica, soon};

const PATH: &str = "/a/s/v1/completions";

/// Tells when it is dropped.
struct Alarm(Option<oneshot::Sender<()>>);

impl Drop for Alarm {
    fn drop(&mut self) {
        let _ = self.0.take().map(|sender| sender.send(()));
    }
}

fn alarm() -> (Alarm, oneshot::Receiver<()>) {
    let (sender, receiver) = oneshot::channel();
    (Alarm(Some(sender)), receiver)
}

/// A gateway with one replica that answers once with `response`.
async fn once(response: Response<super::harness::TestBody>) -> (Gateway, super::harness::Replica) {
    let response = Arc::new(Mutex::new(Some(response)));
    let replica = replica(move |_| {
        let response = Arc::clone(&response);
        async move { Ok(response.lock().await.take().expect("one request only")) }
    })
    .await;
    let gateway = Gateway::start().await;
    gateway.publish(&[(open_service("a/s", "m"), &[replica.address])]);
    (gateway, replica)
}

#[tokio::test]
async fn a_chunk_arrives_before_the_next_is_made() {
    let (feed, body) = fed();
    let (gateway, _replica) = once(Response::new(body)).await;
    feed.send(Ok("one")).unwrap();
    let request = gateway.request(PATH).body(full("{}")).unwrap();
    let mut body = gateway.send(request).await.into_body();
    assert_eq!(chunk(&mut body).await.unwrap().unwrap(), "one");
    feed.send(Ok("two")).unwrap();
    assert_eq!(chunk(&mut body).await.unwrap().unwrap(), "two");
    drop(feed);
    assert!(chunk(&mut body).await.is_none());
    gateway
        .metric(r#"ashlar_gateway_requests_total{code="200",name="s",namespace="a"} 1"#)
        .await;
}

#[tokio::test]
async fn the_replica_reads_a_body_that_is_still_being_written() {
    let (seen, mut arrivals) = mpsc::unbounded_channel();
    let replica = replica(move |request: Request<hyper::body::Incoming>| {
        let seen = seen.clone();
        async move {
            let mut body = request.into_body();
            while let Some(text) = chunk(&mut body).await {
                seen.send(text?).unwrap();
            }
            Ok(Response::new(full("done")))
        }
    })
    .await;
    let gateway = Gateway::start().await;
    gateway.publish(&[(open_service("a/s", "m"), &[replica.address])]);
    let (feed, body) = fed();
    let sending = gateway.send(gateway.request(PATH).body(body).unwrap());
    let writing = async {
        for text in ["one", "two"] {
            feed.send(Ok(text)).unwrap();
            assert_eq!(
                soon("the replica to read", arrivals.recv()).await.unwrap(),
                text
            );
        }
        drop(feed);
    };
    let (response, ()) = tokio::join!(sending, writing);
    assert_eq!(response.collect().await.unwrap().to_bytes(), "done");
}

#[tokio::test]
async fn a_client_that_leaves_mid_stream_ends_the_generation() {
    let (alarm, ended) = alarm();
    let (feed, body) = fed();
    // The alarm lives in the body: it rings when the replica's server lets go of it.
    let body = body.map_frame(move |frame| {
        let _ = &alarm;
        frame
    });
    let (gateway, _replica) = once(Response::new(body.boxed_unsync())).await;
    feed.send(Ok("one")).unwrap();
    let request = gateway.request(PATH).body(full("{}")).unwrap();
    let mut body = gateway.send(request).await.into_body();
    assert_eq!(chunk(&mut body).await.unwrap().unwrap(), "one");
    drop(body);
    soon("the replica to notice", ended).await.unwrap();
    gateway
        .metric(r#"ashlar_gateway_cut_responses_total{by="client",name="s",namespace="a"} 1"#)
        .await;
    gateway
        .metric(r#"ashlar_gateway_in_flight_requests{name="s",namespace="a"} 0"#)
        .await;
}

#[tokio::test]
async fn a_client_that_leaves_before_the_answer_ends_the_request() {
    let (alarm, ended) = alarm();
    let (started, has_started) = oneshot::channel();
    let parts = Arc::new(Mutex::new(Some((alarm, started))));
    let replica = replica(move |_| {
        let parts = Arc::clone(&parts);
        async move {
            let (_alarm, started) = parts.lock().await.take().expect("one request only");
            started.send(()).unwrap();
            std::future::pending().await
        }
    })
    .await;
    let gateway = Gateway::start().await;
    gateway.publish(&[(open_service("a/s", "m"), &[replica.address])]);
    {
        let sending = gateway.send(gateway.request(PATH).body(full("{}")).unwrap());
        tokio::select! {
            _ = sending => panic!("there is no answer"),
            started = has_started => started.unwrap(),
        }
    }
    soon("the replica to notice", ended).await.unwrap();
    gateway
        .metric(r#"ashlar_gateway_requests_total{code="499",name="s",namespace="a"} 1"#)
        .await;
}

#[tokio::test]
async fn a_broken_event_stream_says_so() {
    let (feed, body) = fed();
    let mut response = Response::new(body);
    response
        .headers_mut()
        .insert("content-type", "text/event-stream".parse().unwrap());
    let (gateway, _replica) = once(response).await;
    feed.send(Ok("data: x\n\n")).unwrap();
    let request = gateway.request(PATH).body(full("{}")).unwrap();
    let mut body = gateway.send(request).await.into_body();
    assert_eq!(chunk(&mut body).await.unwrap().unwrap(), "data: x\n\n");
    feed.send(Err("the replica dies".into())).unwrap();
    let rest = soon("the end", body.collect()).await.unwrap().to_bytes();
    let rest = std::str::from_utf8(&rest).unwrap();
    assert!(
        rest.starts_with("data: {\"error\":") && rest.ends_with("data: [DONE]\n\n"),
        "{rest}"
    );
}

#[tokio::test]
async fn a_broken_answer_is_not_taken_for_a_whole_one() {
    let (feed, body) = fed();
    let (gateway, _replica) = once(Response::new(body)).await;
    feed.send(Ok("{\"half")).unwrap();
    let request = gateway.request(PATH).body(full("{}")).unwrap();
    let mut body = gateway.send(request).await.into_body();
    assert_eq!(chunk(&mut body).await.unwrap().unwrap(), "{\"half");
    feed.send(Err("the replica dies".into())).unwrap();
    assert!(chunk(&mut body).await.unwrap().is_err());
}

#[tokio::test]
async fn requests_without_a_body_are_sent_without_one() {
    let replica = super::harness::echo("r").await;
    let gateway = Gateway::start().await;
    gateway.publish(&[(open_service("a/s", "m"), &[replica.address])]);
    let request = Request::get(format!(
        "http://{}/a/s/stream?prompt=hi%20there",
        gateway.address
    ))
    .body(
        Empty::<Bytes>::new()
            .map_err(|never| match never {})
            .boxed_unsync(),
    )
    .unwrap();
    let (status, seen) = gateway.json(request).await;
    assert_eq!(status, 200);
    assert_eq!(seen["path"], "/stream?prompt=hi%20there");
    assert_eq!(seen["method"], "GET");
    assert!(seen["headers"].get("transfer-encoding").is_none(), "{seen}");
}
