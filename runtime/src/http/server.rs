//! Connections: HTTP/1.1 with limits on everything a client controls, and an orderly end.

use std::{
    convert::Infallible,
    panic::AssertUnwindSafe,
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::{Router, body::Body, response::IntoResponse};
use futures::FutureExt;
use http::Request;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
};
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;

use super::{error::ApiError, loading_router};
use crate::shutdown::{Lifecycle, Phase};

/// Most connections at once; more wait in the kernel's queue.
pub const MAX_CONNECTIONS: usize = 16_384;
/// Most header lines of a request.
const MAX_HEADERS: usize = 100;
/// Most bytes of a request's head; also the size of a connection's read buffer at its largest.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// Longest wait for a request's head, idle time between requests included. Above what pooling clients keep
/// connections for (90 s is common), so that the client ends an idle connection first.
const HEAD_TIMEOUT: Duration = Duration::from_secs(120);
/// A client has this long to agree on TLS.
const TLS_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after `accept` failed (no file descriptors left): the next attempt would fail as well.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What answers requests: `503` until the model is loaded, its API from then on.
#[derive(Clone)]
pub struct Site {
    loading: Router,
    ready: Arc<OnceLock<Router>>,
}

impl Default for Site {
    fn default() -> Self {
        Self {
            loading: loading_router(),
            ready: Arc::default(),
        }
    }
}

impl Site {
    /// The API takes over; only the first call has an effect.
    pub fn set_ready(&self, router: Router) {
        // Once by contract.
        let _ = self.ready.set(router);
    }

    async fn answer(
        self,
        request: Request<Incoming>,
    ) -> Result<axum::response::Response, Infallible> {
        let router = self.ready.get().unwrap_or(&self.loading).clone();
        let answer = AssertUnwindSafe(router.oneshot(request.map(Body::new))).catch_unwind();
        Ok(match answer.await {
            Ok(Ok(response)) => response,
            Ok(Err(never)) => match never {},
            // A bug in a handler is this request's problem alone. The panic was logged where it happened.
            Err(_) => ApiError::internal("the request could not be handled: this is a bug")
                .into_response(),
        })
    }
}

impl std::fmt::Debug for Site {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Site")
            .field("ready", &self.ready.get().is_some())
            .finish()
    }
}

/// Open connections.
#[derive(Debug, Clone)]
pub struct Connections {
    places: Arc<Semaphore>,
    open: watch::Sender<usize>,
}

impl Default for Connections {
    fn default() -> Self {
        Self {
            places: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            open: watch::Sender::new(0),
        }
    }
}

impl Connections {
    /// Returns once no connection is open.
    pub async fn all_ended(&self) {
        // The sender lives in `self`.
        let _ = self.open.subscribe().wait_for(|open| *open == 0).await;
    }

    /// A place for one connection, waiting for one to be free.
    async fn enter(&self) -> Option<Place> {
        let permit = Arc::clone(&self.places).acquire_owned().await.ok()?;
        self.open.send_modify(|open| *open += 1);
        Some(Place {
            open: self.open.clone(),
            _permit: permit,
        })
    }
}

/// Held by an open connection.
struct Place {
    open: watch::Sender<usize>,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.open.send_modify(|open| *open -= 1);
    }
}

/// Accepts connections for ever, with `tls` if there is one. Once the lifecycle is refusing, connections end after the answer they are in.
pub async fn serve(
    listener: TcpListener,
    site: Site,
    lifecycle: Lifecycle,
    connections: Connections,
    tls: Option<TlsAcceptor>,
) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Some(place) = connections.enter().await else {
            return;
        };
        let site = site.clone();
        let lifecycle = lifecycle.clone();
        let tls = tls.clone();
        tokio::spawn(async move {
            set_nodelay(&stream);
            match tls {
                None => serve_connection(stream, site, lifecycle).await,
                // Apart, so that connections without TLS keep no room for it.
                Some(tls) => Box::pin(serve_secured(&tls, stream, site, lifecycle)).await,
            }
            drop(place);
        });
    }
}

/// Agrees on TLS with one client, then answers it.
async fn serve_secured(tls: &TlsAcceptor, stream: TcpStream, site: Site, lifecycle: Lifecycle) {
    match tokio::time::timeout(TLS_TIMEOUT, tls.accept(stream)).await {
        Ok(Ok(stream)) => serve_connection(stream, site, lifecycle).await,
        Ok(Err(error)) => tracing::debug!(%error, "no TLS with this client"),
        Err(_) => tracing::debug!("the client took too long to agree on TLS"),
    }
}

fn set_nodelay(stream: &TcpStream) {
    // Each token is a small write that must not wait for the next.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY could not be set");
    }
}

async fn serve_connection<S>(stream: S, site: Site, lifecycle: Lifecycle)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request| site.clone().answer(request));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    // A connection that comes when requests are refused already gets its answer, with `connection: close`.
    let mut ending = lifecycle.phase() >= Phase::Refusing;
    loop {
        tokio::select! {
            result = connection.as_mut() => {
                if let Err(error) = result {
                    tracing::debug!(%error, "a connection ended early");
                }
                return;
            }
            () = lifecycle.reached(Phase::Refusing), if !ending => {
                ending = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}
