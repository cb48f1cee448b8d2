//! The body of a response on its way to the client: frames pass as they come, and the request stays counted until
//! the last one has gone or the client has left.
//!
//! Dropping it drops the replica's response, which closes that connection and so ends the generation. A stream of
//! events that breaks off at the replica ends with an error event, so the client sees more than a closed socket.
//!
//! Events that have arrived together go on together: each alone would cost the client's connection a write. None waits
//! for another that has not arrived ([`Tracked::gather`]).

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::{Body, Frame, SizeHint};

use super::attempt::Attempt;
use super::metrics::{CutBy, Meter};
use super::request_body::BoxError;

/// What follows the events of a stream that broke off: the envelope, then the usual end.
const BROKEN_STREAM: &str = concat!(
    r#"data: {"error":{"message":"the replica broke off before the end: try again","#,
    r#""type":"BadGatewayError","param":null,"code":502}}"#,
    "\n\ndata: [DONE]\n\n"
);

/// Chunks of events that go on at once at most, and the bytes from which on they wait for no more.
const TOGETHER: usize = 64;
const TOGETHER_BYTES: usize = 4096;
/// Rounds of the scheduler that bring nothing, after which they go on. Alone a stream's rounds are over at once.
const EMPTY_ROUNDS: u8 = 4;

/// A response of the gateway's own, or a replica's.
pub enum GatewayBody<B: Body> {
    /// The gateway's own, with the meter that counts it if a service was found.
    Own(Full<Bytes>, Option<Meter>),
    /// A replica's.
    Replica(Tracked<B>),
}

/// A replica's response body with all that is counted while it lasts.
pub struct Tracked<B: Body> {
    source: B,
    meter: Meter,
    attempt: Attempt,
    /// A stream of events can carry an error of the gateway's.
    events: bool,
    /// The last byte passed on was the end of an event.
    at_boundary: bool,
    ended: bool,
    /// Events that go on with those that follow at once.
    gathered: Vec<Bytes>,
    /// How often the server has asked since the last of them came; it asks twice in a round.
    asked: u8,
    /// What comes after them.
    after: Option<Result<Frame<Bytes>, BoxError>>,
}

impl<B: Body> Tracked<B> {
    /// Follows `source`; `events` says that it is `text/event-stream`.
    pub fn new(source: B, meter: Meter, attempt: Attempt, events: bool) -> Self {
        Self {
            ended: source.is_end_stream(),
            source,
            meter,
            attempt,
            events,
            at_boundary: true,
            gathered: Vec::new(),
            asked: 0,
            after: None,
        }
    }

    /// The client has, or is about to be given, everything.
    fn is_done(&self) -> bool {
        let all = self.ended || self.source.is_end_stream();
        all && self.gathered.is_empty() && self.after.is_none()
    }
}

impl<B> Tracked<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.events {
            return self.gather(cx);
        }
        self.poll_source(cx)
    }

    /// The next events. A chunk has all that had come when it was read, and is kept for [`EMPTY_ROUNDS`] rounds of the scheduler:
    /// while many streams are busy, more has come by then.
    fn gather(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.after.is_none() {
            match self.poll_source(cx) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(chunk) => {
                        self.gathered.push(chunk);
                        let bytes: usize = self.gathered.iter().map(Bytes::len).sum();
                        if self.gathered.len() < TOGETHER && bytes < TOGETHER_BYTES {
                            self.asked = 0;
                            cx.waker().wake_by_ref();
                            return Poll::Pending;
                        }
                    }
                    Err(frame) => self.after = Some(Ok(frame)),
                },
                Poll::Ready(Some(Err(error))) => self.after = Some(Err(error)),
                Poll::Ready(None) => {}
                Poll::Pending if self.gathered.is_empty() => return Poll::Pending,
                Poll::Pending if self.asked < EMPTY_ROUNDS * 2 - 1 => {
                    self.asked += 1;
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Poll::Pending => {}
            }
        }
        let together = match self.gathered.len() {
            0 => return Poll::Ready(self.after.take()),
            1 => self.gathered.remove(0),
            _ => Bytes::from(self.gathered.concat()),
        };
        self.gathered.clear();
        Poll::Ready(Some(Ok(Frame::data(together))))
    }

    fn poll_source(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        match ready!(Pin::new(&mut self.source).poll_frame(cx)) {
            Some(Ok(frame)) => {
                if let Some(chunk) = frame.data_ref().filter(|chunk| !chunk.is_empty()) {
                    self.meter.byte();
                    self.at_boundary = chunk.ends_with(b"\n\n");
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                self.ended = true;
                self.meter.cut(CutBy::Upstream);
                self.attempt.failed();
                Poll::Ready(Some(if self.events && self.at_boundary {
                    Ok(Frame::data(Bytes::from_static(BROKEN_STREAM.as_bytes())))
                } else {
                    Err(error.into())
                }))
            }
            None => {
                self.ended = true;
                Poll::Ready(None)
            }
        }
    }
}

impl<B: Body> Drop for Tracked<B> {
    fn drop(&mut self) {
        // The server stops polling after the last announced byte, so the end may not have been seen here.
        if !self.is_done() {
            self.meter.cut(CutBy::Client);
        }
    }
}

impl<B> Body for GatewayBody<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.get_mut() {
            Self::Own(body, meter) => {
                if let Some(meter) = meter {
                    meter.byte();
                }
                Pin::new(body)
                    .poll_frame(cx)
                    .map_err(|never| match never {})
            }
            Self::Replica(body) => body.poll(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Own(body, _) => body.is_end_stream(),
            Self::Replica(body) => body.is_done(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Own(body, _) => body.size_hint(),
            // An error event may be added to a stream, whose length is never announced anyway.
            Self::Replica(body) if body.events => SizeHint::default(),
            Self::Replica(body) => body.source.size_hint(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]
    use std::sync::Arc;
    use std::time::Instant;

    use futures::{Stream, StreamExt as _};
    use http_body_util::{BodyExt as _, StreamBody};

    use super::super::health::FAILURES;
    use super::super::metrics::Metrics;
    use super::super::snapshot::Snapshot;
    use super::super::snapshot::testing::{replica, service, snapshot};
    use super::*;

    type Item = Result<Frame<Bytes>, BoxError>;

    fn tracked(
        metrics: &Arc<Metrics>,
        snapshot: &Snapshot,
        items: Vec<Item>,
        events: bool,
    ) -> GatewayBody<impl Body<Data = Bytes, Error = BoxError> + Unpin> {
        tracked_stream(metrics, snapshot, futures::stream::iter(items), events)
    }

    fn tracked_stream(
        metrics: &Arc<Metrics>,
        snapshot: &Snapshot,
        items: impl Stream<Item = Item> + Unpin,
        events: bool,
    ) -> GatewayBody<impl Body<Data = Bytes, Error = BoxError> + Unpin> {
        let service = snapshot.service("a", "s").unwrap();
        let replica = Arc::clone(&service.replicas[0]);
        let in_flight = replica.enter();
        let mut attempt = Attempt::new(metrics, service, replica, in_flight);
        attempt.head(http::StatusCode::OK);
        let meter = metrics.meter(&service.spec.id, Instant::now());
        let source = StreamBody::new(items);
        GatewayBody::Replica(Tracked::new(source, meter, attempt, events))
    }

    fn world() -> (Arc<Metrics>, Snapshot) {
        let world = snapshot(
            [service("a", "s", "m")],
            [replica("a", "s", "u", "10.0.0.1:8000")],
        );
        (Arc::new(Metrics::new()), world)
    }

    fn data(text: &'static str) -> Item {
        Ok(Frame::data(Bytes::from_static(text.as_bytes())))
    }

    fn broken() -> Item {
        Err("connection reset".into())
    }

    #[tokio::test]
    async fn a_request_is_in_flight_until_its_body_ends() {
        let (metrics, world) = world();
        let in_flight = || world.service("a", "s").unwrap().replicas[0].in_flight();
        let body = tracked(&metrics, &world, vec![data("one"), data("two")], false);
        assert_eq!(in_flight(), 1);
        assert_eq!(body.collect().await.unwrap().to_bytes(), "onetwo");
        assert_eq!(in_flight(), 0);
        assert!(!metrics.render().contains("cut_responses_total{"));
    }

    #[tokio::test]
    async fn a_client_that_leaves_is_counted() {
        let (metrics, world) = world();
        let mut body = tracked(&metrics, &world, vec![data("one"), data("two")], false);
        body.frame().await.unwrap().unwrap();
        drop(body);
        assert_eq!(world.service("a", "s").unwrap().replicas[0].in_flight(), 0);
        assert!(metrics.render().contains("by=\"client\""));
    }

    #[tokio::test]
    async fn a_broken_event_stream_ends_with_an_error_event() {
        let (metrics, world) = world();
        let body = tracked(&metrics, &world, vec![data("data: x\n\n"), broken()], true);
        let text = body.collect().await.unwrap().to_bytes();
        let text = std::str::from_utf8(&text).unwrap();
        let (events, end) = text.split_once("\n\ndata: [DONE]").unwrap();
        assert_eq!(end, "\n\n");
        let error = events
            .strip_prefix("data: x\n\ndata: ")
            .map(serde_json::from_str::<serde_json::Value>);
        assert_eq!(error.unwrap().unwrap()["error"]["code"], 502);
        assert!(metrics.render().contains("by=\"upstream\""));
    }

    #[tokio::test]
    async fn events_that_are_there_go_on_together_and_wait_for_no_other() {
        let (metrics, world) = world();
        let items = [data("data: 1\n\n"), data("data: 2\n\n")];
        let source = futures::stream::iter(items).chain(futures::stream::pending());
        let mut body = tracked_stream(&metrics, &world, source, true);
        let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
        assert_eq!(first, "data: 1\n\ndata: 2\n\n");
        assert!(futures::poll!(body.frame()).is_pending());
        drop(body);
        assert!(metrics.render().contains("by=\"client\""));
    }

    /// An item, and so many rounds later another, and so on.
    fn apart(rounds: u8, items: Vec<Item>) -> impl Stream<Item = Item> + Unpin {
        let (mut items, mut empty) = (items.into_iter(), 0);
        futures::stream::poll_fn(move |_| {
            if empty > 0 {
                empty -= 1;
                return Poll::Pending;
            }
            empty = rounds * 2 - 1;
            items
                .next()
                .map_or(Poll::Pending, |item| Poll::Ready(Some(item)))
        })
    }

    #[tokio::test]
    async fn an_event_goes_on_after_a_few_rounds_with_what_came_in_them() {
        let both = "data: 1\n\ndata: 2\n\n";
        for (rounds, first, waits) in [(EMPTY_ROUNDS, both, 2), (EMPTY_ROUNDS + 1, &both[..9], 1)] {
            let (metrics, world) = world();
            let source = apart(rounds, vec![data(&both[..9]), data(&both[9..])]);
            let mut body = tracked_stream(&metrics, &world, source, true);
            for _ in 0..waits * EMPTY_ROUNDS * 2 {
                assert!(futures::poll!(body.frame()).is_pending());
            }
            let events = body.frame().await.unwrap().unwrap().into_data();
            assert_eq!(events.unwrap(), first);
        }
    }

    #[tokio::test]
    async fn a_long_run_of_events_goes_on_in_parts() {
        let (metrics, world) = world();
        let event: &str = "data: 0123456789\n\n";
        let items = (0..1000).map(|_| data(event)).collect();
        let mut body = tracked(&metrics, &world, items, true);
        let (mut all, mut parts) = (0, 0);
        while let Some(frame) = body.frame().await {
            (all, parts) = (all + frame.unwrap().into_data().unwrap().len(), parts + 1);
        }
        assert_eq!(
            (all, parts),
            (1000 * event.len(), 1000_usize.div_ceil(TOGETHER))
        );
        drop(body);
        assert!(!metrics.render().contains("cut_responses_total{"));
    }

    #[tokio::test]
    async fn a_replica_that_breaks_off_is_ejected_unless_the_client_left() {
        for breaks in [false, true] {
            let (metrics, world) = world();
            for _ in 0..FAILURES {
                let mut items = vec![data("data: x\n\n")];
                items.extend(breaks.then(broken));
                let source = futures::stream::iter(items).chain(futures::stream::pending());
                let mut body = tracked_stream(&metrics, &world, source, true);
                body.frame().await;
                if breaks {
                    body.frame().await;
                }
            }
            let replica = &world.service("a", "s").unwrap().replicas[0];
            assert_eq!(replica.is_ejected(), breaks);
        }
    }

    #[tokio::test]
    async fn half_an_event_and_plain_bodies_are_cut() {
        let (metrics, world) = world();
        for (text, events) in [("data: x", true), ("{\"a\":", false)] {
            let body = tracked(&metrics, &world, vec![data(text), broken()], events);
            assert!(body.collect().await.is_err());
        }
    }
}
