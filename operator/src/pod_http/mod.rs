//! The HTTP/1.1 client for model pods: requests stream to a pod, its answer streams back, and the connection stays open for
//! the next one.
//!
//! ```text
//! Client    a kept connection or a new one, and one exchange on it
//! pool      connections that wait for their next request
//! stream    one connection, plain or with TLS
//! upload    a request on its way out: head and body
//! head      the head of an answer, and how its body is framed
//! chunked   the chunked coding of a body
//! answer    the body of an answer on its way in
//! ```
//!
//! Ten thousand streams wait for their next token at a time, so a connection costs next to nothing while it waits: it has no
//! task and no buffer. Who waits for the answer drives the connection; what has come is read into a buffer of the thread and
//! handed on in a piece of its size. **Invariants:** everything that came at once is handed on at once. A connection is used
//! again only after an answer whose end is certain, on which nothing followed, and whose request had gone out whole: what a
//! pod sends beyond that is never taken for the answer to another request. What is read of a pod is bounded, except for the
//! length of a body.

mod answer;
mod chunked;
mod head;
mod pool;
mod stream;
mod upload;

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{Method, Request, Response};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Body;

pub use self::answer::PodBody;
use self::answer::{Decoder, Link};
pub use self::chunked::ChunkError;
pub use self::head::HeadError;
use self::head::{Head, HeadReader};
use self::pool::Pool;
use self::stream::PodStream;
use self::upload::{Progress, Upload, UploadError};
use crate::model_tls::Trust;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why there is no answer, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no connection.
    #[error("no connection to the pod")]
    Connect(#[source] io::Error),
    /// There was no connection in time.
    #[error("no connection to the pod within {0:?}")]
    ConnectTimeout(Duration),
    /// There is a connection, and no TLS on it.
    #[error("no TLS with the pod")]
    Tls(#[source] io::Error),
    /// The pod took too long to agree on TLS.
    #[error("the pod took too long to agree on TLS")]
    TlsTimeout,
    /// The connection broke before anything of the request was sent.
    #[error("the connection to the pod broke before the request was sent")]
    Unsent(#[source] io::Error),
    /// The connection broke while the request was sent, and there was no answer.
    #[error("the connection to the pod broke while the request was sent")]
    Write(#[source] io::Error),
    /// The request's body failed, or was not as long as announced.
    #[error("the request's body failed")]
    Request(#[source] BoxError),
    /// The connection ended before the head of an answer.
    #[error("the pod closed the connection before it answered")]
    Closed,
    /// The connection broke before the end of the answer.
    #[error("the connection to the pod broke")]
    Read(#[source] io::Error),
    /// The head of the answer is not HTTP.
    #[error("the head of the pod's answer is not valid")]
    Head(#[source] HeadError),
    /// The body of the answer is not framed as announced.
    #[error("the body of the pod's answer is not valid")]
    Chunk(#[source] ChunkError),
    /// The connection ended within the body.
    #[error("the pod closed the connection before the end of its answer")]
    Truncated,
}

impl Error {
    /// There was no connection, so nothing of the request was sent.
    #[must_use]
    pub fn is_connect(&self) -> bool {
        matches!(
            self,
            Self::Connect(_) | Self::ConnectTimeout(_) | Self::Tls(_) | Self::TlsTimeout
        )
    }
}

/// Who is asked.
#[derive(Debug, Clone, Copy)]
pub struct Peer<'a> {
    /// Where the pod listens.
    pub address: SocketAddr,
    /// The name that its certificate has to be for; none without TLS.
    pub tls: Option<&'a str>,
}

/// Bounds of a client.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Longest wait for a connection, and once more for TLS on it.
    pub connect_timeout: Duration,
    /// A connection is kept so long for its next request.
    pub idle: Duration,
    /// Connections to one address that are kept at most.
    pub idle_per_address: usize,
}

impl Settings {
    /// For a question now and then: no connection is kept.
    #[must_use]
    pub fn of_one_question(connect_timeout: Duration) -> Self {
        Self {
            connect_timeout,
            idle: Duration::ZERO,
            idle_per_address: 0,
        }
    }
}

/// Asks pods.
pub struct Client {
    pool: Arc<Pool>,
    trust: Arc<Trust>,
    connect_timeout: Duration,
}

impl Client {
    /// Speaks TLS only with pods that `trust` knows the CA of.
    #[must_use]
    pub fn new(settings: Settings, trust: Arc<Trust>) -> Self {
        Self {
            pool: Arc::new(Pool::new(settings.idle, settings.idle_per_address)),
            trust,
            connect_timeout: settings.connect_timeout,
        }
    }

    /// Sends a request, whose URI is a path, and waits for the head of its answer. `until_left` is dropped as soon as all there
    /// is of the request has gone to the kernel.
    ///
    /// Only a request of which nothing was sent is tried again here, on a new connection. Dropping the future, or the answer's
    /// body before its end, closes the connection.
    ///
    /// # Errors
    /// There was no connection, it broke before the head of an answer, or the answer is not valid.
    pub async fn send<B, T>(
        &self,
        peer: Peer<'_>,
        request: Request<B>,
        until_left: T,
    ) -> Result<Response<PodBody<B>>, Error>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<BoxError>,
    {
        let bodiless = request.method() == Method::HEAD;
        let mut upload = Box::new(Upload::new(request, peer.address)?);
        let mut until_left = Some(until_left);
        if let Some(mut stream) = self.pool.take(peer) {
            match exchange(&mut stream, &mut upload, &mut until_left, bodiless).await {
                Err(Error::Unsent(_)) => {}
                Err(error) => return Err(error),
                Ok(begun) => return Ok(self.answer(peer, stream, upload, begun)),
            }
        }
        let mut stream = PodStream::open(peer, &self.trust, self.connect_timeout).await?;
        let begun = exchange(&mut stream, &mut upload, &mut until_left, bodiless).await?;
        Ok(self.answer(peer, stream, upload, begun))
    }

    /// What the pod answers to GET; none unless that is a success of at most `max_bytes`.
    pub async fn get(&self, peer: Peer<'_>, path: PathAndQuery, max_bytes: usize) -> Option<Bytes> {
        let mut request = Request::new(Empty::<Bytes>::new());
        *request.uri_mut() = path.into();
        let response = self.send(peer, request, ()).await.ok()?;
        if !response.status().is_success() {
            return None;
        }
        let body = Limited::new(response.into_body(), max_bytes).collect();
        Some(body.await.ok()?.to_bytes())
    }

    fn answer<B>(
        &self,
        peer: Peer<'_>,
        stream: PodStream,
        upload: Box<Upload<B>>,
        begun: Begun,
    ) -> Response<PodBody<B>> {
        let Begun {
            head,
            decoder,
            first,
        } = begun;
        let link = Link {
            stream,
            pool: Arc::clone(&self.pool),
            address: peer.address,
            // What follows an answer that nobody waits for yet is no answer.
            reusable: head.keep_alive && first.nothing_follows,
        };
        let upload = (!upload.is_done()).then_some(upload);
        let body = PodBody::new(link, decoder, first.payload, upload);
        let mut response = Response::new(body);
        *response.status_mut() = head.status;
        *response.headers_mut() = head.headers;
        response
    }
}

/// An answer whose head has come.
struct Begun {
    head: Head,
    decoder: Decoder,
    first: First,
}

/// What came with the head.
struct First {
    payload: Bytes,
    nothing_follows: bool,
}

/// Sends the request and waits for the head of its answer, which may come before all of the request has gone.
async fn exchange<B, T>(
    stream: &mut PodStream,
    upload: &mut Upload<B>,
    until_left: &mut Option<T>,
    bodiless: bool,
) -> Result<Begun, Error>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    let mut reader = HeadReader::new(bodiless);
    let mut broken = None;
    let step = |cx: &mut Context<'_>| {
        if broken.is_none() && !upload.is_done() {
            match upload.poll(stream, cx) {
                Ok(Progress::Writing) => {}
                Ok(Progress::Waiting | Progress::Done) => *until_left = None,
                Err(UploadError::Body(error)) => return Poll::Ready(Err(Error::Request(error))),
                Err(UploadError::Write(error)) if !upload.has_begun() => {
                    return Poll::Ready(Err(Error::Unsent(error)));
                }
                // It may have answered before it closed.
                Err(UploadError::Write(error)) => broken = Some(error),
            }
        }
        loop {
            let read = match ready!(stream.poll_take(cx, |bytes| begin(&mut reader, bytes))) {
                Ok(Some(Ok(None))) => continue,
                Ok(Some(Ok(Some(begun)))) => Ok(begun),
                Ok(Some(Err(error))) => Err(error),
                Ok(None) => Err(broken.take().map_or(Error::Closed, Error::Write)),
                Err(error) => Err(broken.take().map_or(Error::Read(error), Error::Write)),
            };
            return Poll::Ready(read);
        }
    };
    poll_fn(step).await
}

/// Takes what has come into the head; with it, the beginning of the body.
fn begin(reader: &mut HeadReader, bytes: &mut [u8]) -> Result<Option<Begun>, Error> {
    let Some((head, used)) = reader.take(bytes).map_err(Error::Head)? else {
        return Ok(None);
    };
    let mut decoder = Decoder::new(head.framing);
    let rest = &mut bytes[used..];
    let decoded = decoder.decode(rest).map_err(Error::Chunk)?;
    let first = First {
        payload: Bytes::copy_from_slice(&rest[..decoded.payload]),
        nothing_follows: decoded.used == rest.len(),
    };
    Ok(Some(Begun {
        head,
        decoder,
        first,
    }))
}

#[cfg(test)]
#[path = "tests/exchange.rs"]
mod tests;
