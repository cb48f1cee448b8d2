//! Replay, bounds and the search for `model`, without a network.
#![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]

use futures::StreamExt as _;
use http_body_util::{BodyExt as _, StreamBody, combinators::UnsyncBoxBody};
use proptest::prelude::*;

use super::*;

type Source = UnsyncBoxBody<Bytes, BoxError>;

const LIMITS: BodyLimits = BodyLimits {
    total: 1000,
    replay: 100,
    idle: Duration::from_secs(60),
};

fn source(chunks: &[&str]) -> Source {
    let frames: Vec<_> = chunks
        .iter()
        .map(|chunk| Ok(Frame::data(Bytes::copy_from_slice(chunk.as_bytes()))))
        .collect();
    StreamBody::new(futures::stream::iter(frames)).boxed_unsync()
}

fn never() -> Source {
    StreamBody::new(futures::stream::pending::<Result<Frame<Bytes>, BoxError>>()).boxed_unsync()
}

async fn text(body: AttemptBody<Source>) -> String {
    let collected = body.collect().await.unwrap().to_bytes();
    String::from_utf8(collected.to_vec()).unwrap()
}

#[tokio::test]
async fn each_attempt_sends_the_whole_body() {
    let body = ReplayBody::new(source(&["hel", "", "lo"]), LIMITS);
    let mut first = body.attempt(None);
    let frame = first.frame().await.unwrap().unwrap();
    assert_eq!(frame.into_data().unwrap(), "hel");
    let second = body.attempt(None);
    assert!(
        first.frame().await.unwrap().is_err(),
        "the first attempt is over"
    );
    assert_eq!(text(second).await, "hello");
    assert!(body.can_replay());
    assert_eq!(text(body.attempt(Some(5))).await, "hello");
}

#[tokio::test]
async fn a_body_beyond_the_bound_is_sent_whole_and_once() {
    let big = "x".repeat(60);
    let body = ReplayBody::new(source(&[&big, &big, &big]), LIMITS);
    assert_eq!(text(body.attempt(None)).await.len(), 180);
    assert!(!body.can_replay());
    assert!(lock(&body.0).kept.is_empty(), "nothing is kept in vain");
}

#[tokio::test]
async fn more_than_the_total_is_refused() {
    let big = "x".repeat(600);
    let body = ReplayBody::new(source(&[&big, &big]), LIMITS);
    let mut attempt = body.attempt(None);
    assert!(attempt.frame().await.unwrap().is_ok());
    assert!(attempt.frame().await.unwrap().is_err());
    assert_eq!(
        body.failure(),
        Some(GatewayError::BodyTooLarge { limit: 1000 })
    );
    assert!(!body.can_replay());
}

#[tokio::test]
async fn a_body_that_stands_still_ends() {
    let limits = BodyLimits {
        idle: Duration::from_millis(5),
        ..LIMITS
    };
    let body = ReplayBody::new(never(), limits);
    assert!(body.attempt(None).frame().await.unwrap().is_err());
    assert_eq!(body.failure(), Some(GatewayError::BodyTimeout));
    assert_eq!(body.model().await, Err(GatewayError::BodyTimeout));
}

#[tokio::test]
async fn an_empty_body_is_at_its_end_from_the_start() {
    let empty = http_body_util::Empty::<Bytes>::new();
    let body = ReplayBody::new(empty, LIMITS);
    assert!(body.attempt(None).is_end_stream());
}

#[tokio::test]
async fn model_is_found_before_the_body_ends() {
    let head = futures::stream::iter(["{\"mod", "el\":\"a\",\"mess"])
        .map(|c| Ok::<_, BoxError>(Frame::data(Bytes::from(c))));
    let endless = StreamBody::new(head.chain(futures::stream::pending())).boxed_unsync();
    let body = ReplayBody::new(endless, LIMITS);
    assert_eq!(body.model().await.unwrap(), ("a".to_owned(), 9..12));
}

#[tokio::test]
async fn model_must_come_within_the_bound() {
    let late = format!("{{\"x\":\"{}\",\"model\":\"a\"}}", "x".repeat(200));
    let (a, b) = late.split_at(150);
    let body = ReplayBody::new(source(&[a, b]), LIMITS);
    assert!(matches!(
        body.model().await,
        Err(GatewayError::ModelMissing { .. })
    ));
}

#[tokio::test]
async fn replacing_the_model_keeps_everything_else() {
    let body = ReplayBody::new(source(&["{\"model\":\"ns/na", "me\",\"n\":1", "}"]), LIMITS);
    let (model, literal) = body.model().await.unwrap();
    assert_eq!(model, "ns/name");
    let grown = body.replace(&literal, "a\"b");
    assert_eq!(grown, -3);
    for _ in 0..2 {
        assert_eq!(
            text(body.attempt(None)).await,
            "{\"model\":\"a\\\"b\",\"n\":1}"
        );
    }
}

proptest! {
    /// However the body is cut and wherever attempts break off, the last attempt sends exactly the body.
    #[test]
    fn nothing_is_lost_or_doubled(
        chunks in prop::collection::vec("[a-z]{0,20}", 0..12),
        breaks in prop::collection::vec(0usize..6, 0..4),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let pieces: Vec<&str> = chunks.iter().map(String::as_str).collect();
        let whole = chunks.concat();
        let outcome = runtime.block_on(async {
            let body = ReplayBody::new(source(&pieces), BodyLimits { replay: 80, ..LIMITS });
            for frames in breaks {
                let mut attempt = body.attempt(None);
                for _ in 0..frames {
                    if attempt.frame().await.is_none() {
                        break;
                    }
                }
                if !body.can_replay() {
                    return None;
                }
            }
            Some(text(body.attempt(None)).await)
        });
        match outcome {
            Some(sent) => prop_assert_eq!(sent, whole),
            None => prop_assert!(whole.len() > 80),
        }
    }
}
