//! Connections to replicas, which stay open for the next request, and sending one request on one of them.
//!
//! A connection tells when a request has left it ([`Sent`]): a held request keeps its place in the line until then, so that
//! requests reach their replicas in the order of arrival, on whatever connections and threads.

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::uri::PathAndQuery;
use http::{Extensions, Request, Response, Uri};
use hyper::body::Incoming;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{
    CaptureConnection, Connected, Connection, HttpConnector, capture_connection,
};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::sync::Notify;
use tower::Service;

use super::hold::Turn;
use super::request_body::AttemptBody;
use super::snapshot::Replica;
use crate::model_tls::{self, PodConnector, PodStream, Trust};

/// Idle connections to a replica close before the runtime closes them.
const POOL_IDLE: Duration = Duration::from_secs(20);
/// Read from a replica at once: some dozens of events, and not much for ten thousand streams that wait for theirs.
const READ_BYTES: usize = 4096;
/// A replica's node that is gone is noticed in about `KEEPALIVE + 3 × KEEPALIVE_INTERVAL`.
const KEEPALIVE: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);

/// Why an attempt got no answer.
pub type SendError = hyper_util::client::legacy::Error;

/// Sends requests to replicas.
pub struct Replicas {
    client: Client<Connector, AttemptBody<Incoming>>,
}

impl Replicas {
    /// Waits at most `connect_timeout` for a connection, and speaks TLS only with pods that `trust` knows the CA of.
    #[must_use]
    pub fn new(connect_timeout: Duration, trust: Arc<Trust>) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.set_keepalive(Some(KEEPALIVE));
        tcp.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
        tcp.set_keepalive_retries(Some(3));
        let client = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(POOL_IDLE)
            .pool_timer(TokioTimer::new())
            .http1_read_buf_exact_size(READ_BYTES)
            .build(Connector(PodConnector::new(tcp, trust, connect_timeout)));
        Self { client }
    }

    /// Sends a request, whose URI is a path, to the replica, and gives up its turn when it has left.
    ///
    /// # Errors
    /// There was no connection, or it broke before the head of an answer.
    pub async fn send(
        &self,
        replica: &Replica,
        mut request: Request<AttemptBody<Incoming>>,
        turn: Option<Turn>,
    ) -> Result<Response<Incoming>, SendError> {
        let path = request.uri().path_and_query().cloned();
        let path = path.unwrap_or_else(|| PathAndQuery::from_static("/"));
        *request.uri_mut() = model_tls::uri(replica.address, replica.tls.as_deref(), path);
        match turn {
            None => self.client.request(request).await,
            // Apart, so that requests that were not held keep no room for it.
            Some(turn) => Box::pin(self.send_in_turn(request, turn)).await,
        }
    }

    async fn send_in_turn(
        &self,
        mut request: Request<AttemptBody<Incoming>>,
        turn: Turn,
    ) -> Result<Response<Incoming>, SendError> {
        let mut connection = capture_connection(&mut request);
        let mut answer = pin!(self.client.request(request));
        tokio::select! {
            biased;
            answer = &mut answer => return answer,
            () = has_left(&mut connection) => drop(turn),
        }
        answer.await
    }
}

/// Ends when the request has left on the connection that it was given.
async fn has_left(connection: &mut CaptureConnection) {
    let mut extras = Extensions::new();
    if let Some(connected) = &*connection.wait_for_connection_metadata().await {
        connected.get_extras(&mut extras);
    }
    if let Some(sent) = extras.get::<Sent>() {
        sent.wait().await;
    }
}

/// Whether the newest request of a connection has left; also true when the connection is gone.
#[derive(Debug, Clone, Default)]
struct Sent(Arc<SentState>);

#[derive(Debug, Default)]
struct SentState {
    sent: AtomicBool,
    changed: Notify,
}

impl Sent {
    fn set(&self, sent: bool) {
        self.0.sent.store(sent, Ordering::Release);
        if sent {
            self.0.changed.notify_waiters();
        }
    }

    async fn wait(&self) {
        loop {
            let changed = self.0.changed.notified();
            if self.0.sent.load(Ordering::Acquire) {
                return;
            }
            changed.await;
        }
    }
}

/// Opens connections.
#[derive(Clone)]
struct Connector(PodConnector);

impl Service<Uri> for Connector {
    type Response = Wire<PodStream>;
    type Error = <PodConnector as Service<Uri>>::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = self.0.call(uri);
        Box::pin(async move { Ok(Wire::new(connecting.await?)) })
    }
}

/// A connection that knows whether what was written has gone to the kernel.
struct Wire<S> {
    stream: S,
    /// Something was written since the last flush.
    dirty: bool,
    /// What `sent` says.
    left: bool,
    sent: Sent,
}

impl<S> Wire<S> {
    fn new(stream: S) -> Self {
        Self {
            stream,
            dirty: false,
            left: false,
            sent: Sent::default(),
        }
    }

    fn set(&mut self, left: bool) {
        if self.left != left {
            self.left = left;
            self.sent.set(left);
        }
    }
}

impl<S> Drop for Wire<S> {
    fn drop(&mut self) {
        // Nobody waits for what cannot happen any more.
        self.sent.set(true);
    }
}

impl<S: Connection> Connection for Wire<S> {
    fn connected(&self) -> Connected {
        self.stream.connected().extra(self.sent.clone())
    }
}

impl<S: Read + Unpin> Read for Wire<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let read = ready!(Pin::new(&mut this.stream).poll_read(cx, buffer));
        // An answer: what is written next is the next request.
        this.set(false);
        Poll::Ready(read)
    }
}

impl<S: Write + Unpin> Write for Wire<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.dirty = true;
        Pin::new(&mut this.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.dirty = true;
        Pin::new(&mut this.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = ready!(Pin::new(&mut this.stream).poll_flush(cx));
        if std::mem::take(&mut this.dirty) {
            this.set(true);
        }
        Poll::Ready(flushed)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
