//! Sockets and the end of the process: the traffic listener, the small server for probes and metrics, and draining.
//!
//! On SIGTERM the phases follow each other: [`Phase::Serving`]; [`Phase::Leaving`], not ready any more but
//! accepting, because the removal of this address from the endpoints races the signal; [`Phase::Closed`], no new
//! connections, the open requests are finished.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{RawQuery, State};
use axum::routing::get;
use http::header::{CONNECTION, CONTENT_TYPE, HeaderValue};
use http::{Request, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_rustls::TlsAcceptor;

use super::metrics::Metrics;
use super::proxy::Proxy;

/// A client has this long to send a request's head, or the next one on an open connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);
/// A client has this long to agree on TLS.
const TLS_TIMEOUT: Duration = Duration::from_secs(10);
/// Names that one `/metrics?name[]=` may list.
const MAX_METRIC_NAMES: usize = 64;
/// After a failed accept (out of file descriptors, mostly) the next try waits this long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Where the process is on its way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Ready.
    Serving,
    /// Not ready, still accepting; responses close their connections.
    Leaving,
    /// No new connections.
    Closed,
}

/// The traffic listener's bounds and company.
#[derive(Clone)]
pub struct Server {
    /// Answers the requests.
    pub proxy: Arc<Proxy>,
    /// Counts the connections.
    pub metrics: Arc<Metrics>,
    /// Follows the process's phase.
    pub phase: watch::Receiver<Phase>,
    /// Most open connections; more wait in the kernel.
    pub max_connections: u32,
    /// Longest wait for open requests after [`Phase::Closed`].
    pub drain_timeout: Duration,
    /// Speaks TLS with this listener's clients.
    pub tls: Option<TlsAcceptor>,
}

impl Server {
    /// Serves until the phase is closed and the open requests are done or out of time. Returns how many were cut.
    pub async fn serve(self, listener: TcpListener) -> usize {
        let slots = Arc::new(Semaphore::new(self.max_connections as usize));
        let mut phase = self.phase.clone();
        loop {
            let accepted = tokio::select! {
                accepted = accept(&listener, &slots) => accepted,
                () = closed(&mut phase) => break,
            };
            match accepted {
                Ok((stream, slot)) => self.spawn(stream, slot),
                Err(error) => {
                    tracing::warn!(%error, "could not accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        drop(listener);
        let all = slots.acquire_many(self.max_connections);
        let drained = tokio::time::timeout(self.drain_timeout, all).await;
        if drained.is_ok() {
            return 0;
        }
        self.max_connections as usize - slots.available_permits()
    }

    fn spawn(&self, stream: TcpStream, slot: OwnedSemaphorePermit) {
        let Ok(peer) = stream.peer_addr() else {
            return; // already gone
        };
        // Tokens are small writes that must not wait for each other.
        let _ = stream.set_nodelay(true);
        let (server, tls) = (self.clone(), self.tls.clone());
        tokio::spawn(async move {
            let _slot = slot;
            server.metrics.connections.inc();
            match tls {
                None => server.connection(stream, peer).await,
                // Apart, so that connections without TLS keep no room for it.
                Some(tls) => Box::pin(server.secured(&tls, stream, peer)).await,
            }
            server.metrics.connections.dec();
        });
    }

    /// Agrees on TLS with one client, then answers it.
    async fn secured(&self, tls: &TlsAcceptor, stream: TcpStream, peer: SocketAddr) {
        match tokio::time::timeout(TLS_TIMEOUT, tls.accept(stream)).await {
            Ok(Ok(stream)) => self.connection(stream, peer).await,
            Ok(Err(error)) => tracing::debug!(%peer, %error, "no TLS with this client"),
            Err(_) => tracing::debug!(%peer, "the client took too long to agree on TLS"),
        }
    }

    /// Answers one client until it leaves, or until the phase is closed.
    async fn connection<S>(&self, stream: S, peer: SocketAddr)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut phase = self.phase.clone();
        let handler = service_fn(|request: Request<Incoming>| {
            // A connection keeps room for its service's future as long as it is open, a stream for its whole length: room for
            // a pointer, while the future itself goes when the answer begins.
            let answer = Box::pin(self.proxy.handle(request, peer));
            async move {
                let mut response = answer.await;
                if *self.phase.borrow() > Phase::Serving {
                    let close = HeaderValue::from_static("close");
                    response.headers_mut().insert(CONNECTION, close);
                }
                Ok::<_, std::convert::Infallible>(response)
            }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .serve_connection(TokioIo::new(stream), handler);
        let mut connection = std::pin::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = closed(&mut phase) => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%peer, %error, "connection ended");
        }
    }
}

/// Ends when no new connections are wanted.
async fn closed(phase: &mut watch::Receiver<Phase>) {
    // An error means that nobody leads the process any more, which is as final.
    let _ = phase.wait_for(|phase| *phase == Phase::Closed).await;
}

/// The next connection, once there is a slot for it.
async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> std::io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let slot = Arc::clone(slots)
        .acquire_owned()
        .await
        .expect("the semaphore is never closed: this is a bug");
    let (stream, _) = listener.accept().await?;
    Ok((stream, slot))
}

/// What probes and Prometheus ask for.
#[derive(Clone)]
pub struct Admin {
    /// The metrics.
    pub metrics: Arc<Metrics>,
    /// True once there is a picture of the cluster.
    pub synced: watch::Receiver<bool>,
    /// The process's phase.
    pub phase: watch::Receiver<Phase>,
}

impl Admin {
    /// `/healthz`, `/readyz` and `/metrics`.
    pub fn router(self) -> Router {
        Router::new()
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(Self::ready))
            .route("/metrics", get(Self::metrics))
            .with_state(self)
    }

    async fn ready(State(admin): State<Self>) -> (StatusCode, &'static str) {
        if *admin.phase.borrow() > Phase::Serving {
            (StatusCode::SERVICE_UNAVAILABLE, "shutting down\n")
        } else if *admin.synced.borrow() {
            (StatusCode::OK, "ok\n")
        } else {
            (
                StatusCode::SERVICE_UNAVAILABLE,
                "waiting for the first listing of services and pods\n",
            )
        }
    }

    /// All metrics, or those of `?name[]=…`.
    async fn metrics(
        State(admin): State<Self>,
        RawQuery(query): RawQuery,
    ) -> ([(http::HeaderName, &'static str); 1], String) {
        let kind = (CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8");
        let query = query.unwrap_or_default();
        let names: Vec<&str> = query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .filter(|(key, _)| matches!(*key, "name[]" | "name%5B%5D" | "name%5b%5d"))
            .map(|(_, name)| name)
            .take(MAX_METRIC_NAMES)
            .collect();
        ([kind], admin.metrics.render_only(&names))
    }
}
