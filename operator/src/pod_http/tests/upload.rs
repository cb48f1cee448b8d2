#![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]
use std::convert::Infallible;

use futures::stream;
use http_body_util::{Empty, Full, StreamBody};
use hyper::body::Frame;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};

use super::*;

/// What goes out of a request, and how it ends.
async fn sent<B>(request: Request<B>) -> (String, Result<Progress, String>)
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap());
    let mut stream = PodStream::Plain(stream.await.unwrap());
    let (mut other, _) = listener.accept().await.unwrap();
    let address = "10.0.0.1:8000".parse().unwrap();
    let mut upload = Upload::new(request, address).unwrap_or_else(|error| panic!("{error}"));
    let sending = async move {
        std::future::poll_fn(|cx| match upload.poll(&mut stream, cx) {
            Ok(Progress::Done) => Poll::Ready(Ok(Progress::Done)),
            Ok(_) => Poll::Pending,
            Err(UploadError::Body(error)) => Poll::Ready(Err(error.to_string())),
            Err(UploadError::Write(error)) => Poll::Ready(Err(error.to_string())),
        })
        .await
    };
    let reading = async {
        let mut text = Vec::new();
        other.read_to_end(&mut text).await.unwrap();
        String::from_utf8(text).unwrap()
    };
    tokio::join!(reading, sending)
}

/// A body of these pieces, of the announced length if there is one.
fn pieces(
    length: Option<u64>,
    pieces: &[&'static str],
) -> impl Body<Data = Bytes, Error = Infallible> + Unpin + use<> {
    struct Announced<B>(B, Option<u64>);
    impl<B: Body + Unpin> Body for Announced<B> {
        type Data = B::Data;
        type Error = B::Error;
        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
            Pin::new(&mut self.0).poll_frame(cx)
        }
        fn size_hint(&self) -> hyper::body::SizeHint {
            self.1
                .map_or_else(Default::default, hyper::body::SizeHint::with_exact)
        }
    }
    let frames: Vec<_> = pieces
        .iter()
        .map(|text| Ok(Frame::data(Bytes::from(*text))))
        .collect();
    Announced(StreamBody::new(stream::iter(frames)), length)
}

#[tokio::test]
async fn a_request_is_framed_by_its_body() {
    let head = |method: &str, rest: &str| {
        format!("{method} /p?q=1 HTTP/1.1\r\nhost: 10.0.0.1:8000\r\n{rest}")
    };
    let of = |method: &str| Request::builder().method(method).uri("/p?q=1");

    let (text, end) = sent(of("GET").body(Empty::<Bytes>::new()).unwrap()).await;
    assert_eq!((text, end), (head("GET", "\r\n"), Ok(Progress::Done)));
    let (text, _) = sent(of("POST").body(Empty::<Bytes>::new()).unwrap()).await;
    assert_eq!(text, head("POST", "content-length: 0\r\n\r\n"));
    // What the head says of the framing is of another connection.
    let wrong = of("POST")
        .header("content-length", "9")
        .header("transfer-encoding", "chunked");
    let wrong = wrong.header("connection", "close").header("x-a", "1");
    let (text, _) = sent(wrong.body(Full::new(Bytes::from("hello"))).unwrap()).await;
    assert_eq!(
        text,
        head("POST", "x-a: 1\r\ncontent-length: 5\r\n\r\nhello")
    );
    let (text, _) = sent(
        of("POST")
            .body(pieces(None, &["hello", "", " world"]))
            .unwrap(),
    )
    .await;
    let chunks = "transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n";
    assert_eq!(text, head("POST", chunks));
    let (text, _) = sent(
        of("GET")
            .header("host", "h")
            .body(Empty::<Bytes>::new())
            .unwrap(),
    )
    .await;
    assert_eq!(text, "GET /p?q=1 HTTP/1.1\r\nhost: h\r\n\r\n");
}

#[tokio::test]
async fn a_body_that_is_not_as_long_as_announced_fails() {
    for (length, ends) in [(5, Ok(Progress::Done)), (4, Err(())), (6, Err(()))] {
        let request = Request::post("/").body(pieces(Some(length), &["he", "llo"]));
        let (text, end) = sent(request.unwrap()).await;
        assert_eq!(end.map_err(|_| ()), ends, "{length}");
        // Nothing goes out that the pod could take for another request.
        let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        assert!(body.len() as u64 <= length);
    }
}

#[tokio::test]
async fn no_tunnel_is_asked_for() {
    let request = Request::builder()
        .method("CONNECT")
        .uri("/")
        .body(Empty::<Bytes>::new());
    let upload = Upload::new(request.unwrap(), "10.0.0.1:8000".parse().unwrap());
    assert!(matches!(upload, Err(Error::Request(_))));
}
