//! Exchanges over real sockets on the loopback: with hyper's server, and with pods that send what they should not.
#![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]

mod connections;

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::stream;
use http_body_util::{Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};

use super::*;

const LONG: Duration = Duration::from_secs(20);

fn client() -> Client {
    client_that_keeps(Duration::from_secs(60))
}

fn client_that_keeps(idle: Duration) -> Client {
    let settings = Settings {
        connect_timeout: LONG,
        idle,
        idle_per_address: 2,
    };
    Client::new(settings, Trust::none())
}

fn peer(address: SocketAddr) -> Peer<'static> {
    Peer { address, tls: None }
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    let waited = tokio::time::timeout(LONG, future).await;
    waited.unwrap_or_else(|_| panic!("waited {LONG:?} for {what}"))
}

async fn post(client: &Client, address: SocketAddr, body: &str) -> Result<(u16, String), Error> {
    let request = Request::post("/").body(Full::new(Bytes::from(body.to_owned())));
    let response = soon("a head", client.send(peer(address), request.unwrap(), ())).await?;
    let status = response.status().as_u16();
    let body = soon("a body", response.into_body().collect())
        .await?
        .to_bytes();
    Ok((status, String::from_utf8(body.into()).unwrap()))
}

/// A pod that does `on_connection` with each of its connections, and counts them.
async fn pod<R>(
    on_connection: impl Fn(TcpStream, usize) -> R + Send + 'static,
) -> (SocketAddr, Arc<AtomicUsize>)
where
    R: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            stream.set_nodelay(true).unwrap();
            let number = counted.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(on_connection(stream, number));
        }
    });
    (address, count)
}

/// A pod of hyper's, which sends back what it was sent, in a chunk for each of its own.
async fn echo() -> (SocketAddr, Arc<AtomicUsize>) {
    async fn answer(request: Request<Incoming>) -> Result<Response<Incoming>, Infallible> {
        Ok(Response::new(request.into_body()))
    }
    pod(|stream, _| async move {
        let server = hyper::server::conn::http1::Builder::new();
        let _ = server
            .serve_connection(TokioIo::new(stream), service_fn(answer))
            .await;
    })
    .await
}

/// Reads one request with a body of a known length.
async fn read_request(stream: &mut TcpStream) -> Option<String> {
    let mut text = String::new();
    loop {
        let head = text.find("\r\n\r\n").map(|at| at + 4);
        if let Some(head) = head {
            let length = text
                .lines()
                .find_map(|line| line.strip_prefix("content-length: "));
            if text.len() >= head + length.map_or(0, |length| length.parse::<usize>().unwrap()) {
                return Some(text);
            }
        }
        let mut bytes = [0; 4096];
        let read = stream
            .read(&mut bytes)
            .await
            .ok()
            .filter(|read| *read > 0)?;
        text.push_str(std::str::from_utf8(&bytes[..read]).unwrap());
    }
}

/// A pod that answers each request on a connection with these bytes.
async fn saying(answer: &'static str) -> (SocketAddr, Arc<AtomicUsize>) {
    pod(move |mut stream, _| async move {
        while read_request(&mut stream).await.is_some() {
            if stream.write_all(answer.as_bytes()).await.is_err() {
                return;
            }
        }
    })
    .await
}

#[tokio::test]
async fn the_rest_of_a_request_goes_on_while_its_answer_comes() {
    let (address, connections) = echo().await;
    let client = client();
    let (sender, mut receiver) = mpsc::unbounded_channel::<Result<Frame<Bytes>, Infallible>>();
    let body = StreamBody::new(stream::poll_fn(move |cx| receiver.poll_recv(cx)));
    let (left, has_left) = oneshot::channel::<()>();
    let request = Request::post("/").body(body).unwrap();
    // hyper's server answers with a head as soon as the handler returns: before the body has come.
    let response = soon("the head", client.send(peer(address), request, left))
        .await
        .unwrap();
    assert!(soon("that all there is has left", has_left).await.is_err());
    let mut body = response.into_body();
    for text in ["one", "two"] {
        sender.send(Ok(Frame::data(Bytes::from(text)))).unwrap();
        let frame = soon("an echo", body.frame()).await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), text);
    }
    drop(sender);
    assert!(soon("the end", body.frame()).await.is_none());
    // Whether the pod had read all of the request when it answered is not known.
    assert_eq!(client.pool.len(), 0);
    post(&client, address, "x").await.unwrap();
    assert_eq!(connections.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn an_answer_may_come_before_the_request_was_read() {
    let (address, _) = pod(|mut stream, _| async move {
        let mut some = [0; 100];
        stream.read_exact(&mut some).await.unwrap();
        let answer = "HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno";
        stream.write_all(answer.as_bytes()).await.unwrap();
        std::future::pending::<()>().await;
    })
    .await;
    let client = client();
    let large = "x".repeat(30 << 20);
    let answer = post(&client, address, &large).await.unwrap();
    assert_eq!(answer, (413, "no".to_owned()));
    assert_eq!(client.pool.len(), 0);
}

#[tokio::test]
async fn events_that_came_together_are_handed_on_together() {
    let (more, waits) = oneshot::channel::<()>();
    let waits = std::sync::Mutex::new(Some(waits));
    let (address, _) = pod(move |mut stream, _| {
        let waits = waits.lock().unwrap().take();
        async move {
            read_request(&mut stream).await.unwrap();
            let start = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n1\r\nb\r\n";
            stream.write_all(start.as_bytes()).await.unwrap();
            waits.unwrap().await.unwrap();
            let rest = "1\r\nc\r\n1;x=y\r\nd\r\n1\r\ne\r\n0\r\nt: 1\r\n\r\n";
            stream.write_all(rest.as_bytes()).await.unwrap();
            std::future::pending::<()>().await;
        }
    })
    .await;
    let client = client();
    let request = Request::post("/").body(Empty::<Bytes>::new()).unwrap();
    let response = soon("the head", client.send(peer(address), request, ()))
        .await
        .unwrap();
    let mut body = response.into_body();
    let frame = soon("two", body.frame()).await.unwrap().unwrap();
    assert_eq!(frame.into_data().unwrap(), "ab");
    assert!(futures::poll!(body.frame()).is_pending());
    more.send(()).unwrap();
    let frame = soon("three", body.frame()).await.unwrap().unwrap();
    assert_eq!(frame.into_data().unwrap(), "cde");
    assert!(body.is_end_stream());
    assert_eq!(client.pool.len(), 1);
}

#[tokio::test]
async fn some_answers_end_with_their_heads_and_some_with_the_connection() {
    let (address, connections) =
        saying("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n").await;
    let client = client();
    for _ in 0..3 {
        let answer = post(&client, address, "x").await.unwrap();
        assert_eq!(answer, (204, String::new()));
    }
    assert_eq!(connections.load(Ordering::SeqCst), 1);
    let (address, connections) = saying("HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n").await;
    for _ in 0..3 {
        let request = Request::head("/").body(Empty::<Bytes>::new()).unwrap();
        let response = soon("a head", client.send(peer(address), request, ()))
            .await
            .unwrap();
        assert!(response.body().is_end_stream());
        assert_eq!(response.headers()["content-length"], "7");
    }
    assert_eq!(connections.load(Ordering::SeqCst), 1);
    let (address, _) = pod(|mut stream, _| async move {
        read_request(&mut stream).await.unwrap();
        stream
            .write_all(b"HTTP/1.1 200 OK\r\n\r\nuntil")
            .await
            .unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        stream.write_all(b" the end").await.unwrap();
    })
    .await;
    let answer = post(&client, address, "x").await.unwrap();
    assert_eq!(answer, (200, "until the end".to_owned()));
}

#[tokio::test]
async fn what_follows_an_answer_is_never_the_next_one() {
    for answer in [
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil",
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok\r\n",
    ] {
        let (address, connections) = saying(answer).await;
        let client = client();
        for _ in 0..3 {
            let answer = post(&client, address, "x").await.unwrap();
            assert_eq!(answer, (200, "ok".to_owned()));
            assert_eq!(client.pool.len(), 0);
        }
        assert_eq!(connections.load(Ordering::SeqCst), 3);
    }
}

#[tokio::test]
async fn errors_tell_what_happened() {
    let client = client();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let nobody = listener.local_addr().unwrap();
    drop(listener);
    let error = post(&client, nobody, "x").await.unwrap_err();
    assert!(error.is_connect() && matches!(error, Error::Connect(_)));
    for (answer, expected) in [
        ("", "Closed"),
        ("HTTP/1.1 200 OK\r\nx", "Closed"),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok",
            "Truncated",
        ),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n",
            "Truncated",
        ),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n",
            "Truncated",
        ),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nx",
            "Chunk(Size)",
        ),
        (
            "HTTP/1.1 200 OK\ncontent-length: 2\r\n\r\nok",
            "Head(LineEnd)",
        ),
    ] {
        let (address, _) = pod(move |mut stream, _| async move {
            read_request(&mut stream).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
        })
        .await;
        let error = post(&client, address, "x").await.unwrap_err();
        assert!(!error.is_connect());
        assert_eq!(format!("{error:?}"), expected, "{answer:?}");
    }
    let (address, _) = echo().await;
    let body = stream::iter([Err::<Frame<Bytes>, _>("the client left")]);
    let request = Request::post("/").body(StreamBody::new(body)).unwrap();
    let error = client.send(peer(address), request, ()).await.err().unwrap();
    assert!(matches!(error, Error::Request(_)));
}

#[tokio::test]
async fn the_whole_of_a_short_success_is_got() {
    let client = client();
    let path = || PathAndQuery::from_static("/metrics?x=1");
    let (address, _) = saying("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
    let got = client.get(peer(address), path(), 2).await;
    assert_eq!(got.as_deref(), Some(&b"ok"[..]));
    assert_eq!(client.get(peer(address), path(), 1).await, None);
    let (address, _) = saying("HTTP/1.1 500 No\r\ncontent-length: 2\r\n\r\nno").await;
    assert_eq!(client.get(peer(address), path(), 2).await, None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever a pod says, in whatever pieces: one answer or an error, and of its answer nothing but its own body.
    #[test]
    fn an_answer_is_the_same_in_whatever_pieces(
        cuts in proptest::collection::vec(1..50_usize, 1..6),
        chunked in any::<bool>(),
        rest in prop_oneof![Just(""), Just("\r\n"), Just("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n!")],
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let body = if chunked {
                "transfer-encoding: chunked\r\n\r\n3;a=b\r\nthe\r\nA\r\n whole one\r\n0\r\nt: v\r\n\r\n"
            } else {
                "content-length: 13\r\n\r\nthe whole one"
            };
            let answer = format!("HTTP/1.1 103 Hints\r\n\r\nHTTP/1.1 200 OK\r\n{body}");
            let (address, connections) = pod(move |mut stream, _| {
                let (answer, cuts) = (answer.clone(), cuts.clone());
                async move {
                    while read_request(&mut stream).await.is_some() {
                        let (mut left, mut cuts) = (answer.as_bytes(), cuts.iter().cycle());
                        while !left.is_empty() {
                            let (piece, after) = left.split_at((*cuts.next().unwrap()).min(left.len()));
                            // What follows comes with the end: later, nobody could tell it from the next answer.
                            let rest = if after.is_empty() { rest } else { "" };
                            if stream.write_all(&[piece, rest.as_bytes()].concat()).await.is_err() {
                                return;
                            }
                            tokio::task::yield_now().await;
                            left = after;
                        }
                    }
                }
            }).await;
            let client = client();
            for _ in 0..2 {
                let answer = post(&client, address, "x").await.unwrap();
                assert_eq!(answer, (200, "the whole one".to_owned()));
            }
            let expected = if rest.is_empty() { 1 } else { 2 };
            assert_eq!(connections.load(Ordering::SeqCst), expected);
        });
    }
}
