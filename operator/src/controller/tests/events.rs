//! What is said, what is counted, and how much is remembered.
#![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]

use http::{Method, Request, Response};
use http_body_util::BodyExt as _;
use kube::client::Body;
use serde_json::{Value, json};
use tower_test::mock;

use super::*;

fn event(reason: &str, note: &str) -> Event {
    Event {
        normal: true,
        reason: reason.into(),
        note: note.into(),
        action: "Reconcile",
    }
}

fn about(uid: &str) -> ObjectReference {
    serde_json::from_value(
        json!({"kind": "InferenceService", "namespace": "chat", "name": "m", "uid": uid}),
    )
    .unwrap()
}

/// Answers one call with a status code, and returns its method, its path and its body.
async fn answer(
    server: &mut mock::Handle<Request<Body>, Response<Body>>,
    code: u16,
) -> (Method, String, Value) {
    let (request, reply) = server.next_request().await.unwrap();
    let (head, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let said = match code {
        404 => {
            json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404, "reason": "NotFound", "message": "gone"})
        }
        _ => json!({"metadata": {"name": "m.1", "namespace": "chat"}, "eventTime": null}),
    };
    let response = Response::builder().status(code);
    reply.send_response(
        response
            .body(Body::from(said.to_string().into_bytes()))
            .unwrap(),
    );
    let path = head.uri.path().to_owned();
    (head.method, path, serde_json::from_slice(&body).unwrap())
}

#[tokio::test]
async fn the_same_again_is_counted_and_anew_once_it_is_gone() {
    let (service, mut server) = mock::pair::<Request<Body>, Response<Body>>();
    let recorder = Recorder::new(Client::new(service, "default"), "operator-a".into());
    let about = about("u");
    let said = tokio::spawn(async move {
        for (reason, note) in [
            ("Starting", "0 of 1"),
            ("Starting", "0 of 2"),
            ("Available", ""),
            ("Starting", "0 of 1"),
        ] {
            recorder
                .publish(&event(reason, note), &about)
                .await
                .unwrap();
        }
    });
    let (method, path, body) = answer(&mut server, 201).await;
    let events = "/apis/events.k8s.io/v1/namespaces/chat/events";
    assert_eq!((method, path.as_str()), (Method::POST, events));
    assert_eq!(
        (
            &body["reason"],
            &body["type"],
            &body["note"],
            &body["regarding"]["uid"]
        ),
        (
            &json!("Starting"),
            &json!("Normal"),
            &json!("0 of 1"),
            &json!("u")
        )
    );
    assert_eq!(
        (
            &body["reportingController"],
            &body["reportingInstance"],
            &body["action"]
        ),
        (
            &json!(CONTROLLER),
            &json!("operator-a"),
            &json!("Reconcile")
        )
    );
    let name = format!("{events}/{}", body["metadata"]["name"].as_str().unwrap());
    let (method, path, body) = answer(&mut server, 200).await;
    assert_eq!(
        (method, path.as_str(), &body["series"]["count"]),
        (Method::PATCH, name.as_str(), &json!(2))
    );
    let (method, _, body) = answer(&mut server, 201).await;
    assert_eq!(
        (method, &body["reason"]),
        (Method::POST, &json!("Available"))
    );
    let (method, path, _) = answer(&mut server, 404).await;
    assert_eq!((method, path), (Method::PATCH, name));
    let (method, ..) = answer(&mut server, 201).await;
    assert_eq!(method, Method::POST);
    said.await.unwrap();
}

#[test]
fn the_same_of_another_object_or_after_a_while_is_said_anew() {
    let (mut lately, now) = (Lately::default(), Instant::now());
    let key = event("Starting", "").key(&about("u"));
    lately.remember(
        key,
        Said {
            number: 1,
            count: 1,
            at: now,
        },
    );
    assert_eq!(lately.before(key, now).unwrap().count, 2);
    assert!(lately.before(key, now + SAME).is_none());
    assert!(
        lately
            .before(event("Starting", "").key(&about("v")), now)
            .is_none()
    );
    assert_eq!(event("Starting", "other words").key(&about("u")), key);
}

#[test]
fn no_more_is_remembered_than_there_is_room_for_and_the_newest_stays() {
    let (mut lately, began) = (Lately::default(), Instant::now());
    let said = |n: u64| Said {
        number: 0,
        count: 1,
        at: began + Duration::from_millis(n),
    };
    let last = 3 * MAX_SAID as u64;
    for key in 0..=last {
        lately.remember(key, said(key));
        assert!(lately.0.len() <= MAX_SAID);
    }
    assert!(lately.0.contains_key(&last) && lately.0.len() >= MAX_SAID / 2);
}
