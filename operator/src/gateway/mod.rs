//! The gateway: one OpenAI-compatible front door for every service of the cluster.
//!
//! ```text
//! API server ─ watch ─▶ Snapshot ─┐
//!                                 ▼
//! client ─ server ─▶ proxy: resolve ─▶ auth/keys ─▶ hold ─▶ route ─▶ replica
//!                      └──────────── response_body ◀────────────────────┘
//! ```
//!
//! - `resolve`, `route`, `canary`, `affinity`, `health`, `auth`, `headers`, `model_field`, `models`, `snapshot`: pure.
//! - `limits`: what one client may ask. `keys`: the cache of users' keys. `hold`: waiting for a replica.
//! - `attempt`: what one at a replica says of it. `avoid`: where a request goes after one that failed. `request_body`: sending again.
//! - `watch`: the only place that talks to the API server. `server`: sockets, probes, draining. `tls`: certificates. `args`: flags.
//!
//! Invariants: routing looks at one immutable snapshot and never waits for the API server; nothing is forwarded
//! before the key is checked; nothing is sent twice after a replica has answered; every buffer, queue and wait has a
//! bound; the gateway keeps no state that another gateway would need.

pub mod affinity;
pub mod args;
pub mod attempt;
pub mod auth;
pub mod avoid;
pub mod canary;
pub mod error;
pub mod grant;
pub mod headers;
pub mod health;
pub mod hold;
pub mod keys;
pub mod limits;
pub mod metrics;
pub mod model_field;
pub mod models;
pub mod proxy;
pub mod request_body;
pub mod resolve;
pub mod response_body;
pub mod route;
pub mod server;
pub mod snapshot;
pub mod tls;
pub mod watch;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch as channel;
use tokio::task::JoinHandle;

use crate::model_tls::{Trust, TrustError};
pub use args::GatewayArgs;
use keys::{KeyPolicy, KeyStore};
use metrics::Metrics;
use proxy::Proxy;
use server::{Admin, Phase, Server};
use snapshot::Snapshot;

/// Why the gateway could not start.
#[derive(Debug, thiserror::Error)]
pub enum GatewayRunError {
    /// There is no way to the API server.
    #[error(
        "no cluster to serve: run inside one with a ServiceAccount, or point KUBECONFIG at one"
    )]
    Client(#[source] kube::Error),
    /// An address is taken or not ours.
    #[error("cannot listen on {address}: free it, or choose another with {flag}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The flag that sets it.
        flag: &'static str,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Certificate or key.
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
    /// The CAs of model pods.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// Signals cannot be received.
    #[error("cannot listen for signals")]
    Signals(#[source] std::io::Error),
}

/// Serves until SIGTERM or SIGINT, then drains.
///
/// # Errors
/// [`GatewayRunError`] when it cannot start; nothing that happens later ends the gateway.
pub async fn run(args: GatewayArgs) -> Result<(), GatewayRunError> {
    let client = kube::Client::try_default()
        .await
        .map_err(GatewayRunError::Client)?;
    let traffic = listen(args.listen, "--listen").await?;
    let admin = listen(args.admin_listen, "--admin-listen").await?;
    let secure = secure(&args).await?;
    let trust = Trust::load(&args.model_tls)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(GatewayRunError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(GatewayRunError::Signals)?;

    let (snapshots, snapshots_seen) = channel::channel(Arc::new(Snapshot::empty(args.names())));
    let (synced, synced_seen) = channel::channel(false);
    let (phase, phase_seen) = channel::channel(Phase::Serving);
    let metrics = Arc::new(Metrics::new());
    let secrets = Arc::new(watch::KubeSecrets(client.clone()));
    let keys = Arc::new(KeyStore::new(secrets, KeyPolicy::default()));

    let proxy = Arc::new(Proxy::new(
        snapshots_seen,
        synced_seen.clone(),
        Arc::clone(&keys),
        args.holds(),
        Arc::clone(&metrics),
        args.limits(),
        Arc::clone(&trust),
    ));
    tokio::spawn(trust.follow());
    let server = Server {
        proxy,
        metrics: Arc::clone(&metrics),
        phase: phase_seen.clone(),
        max_connections: args.max_connections,
        drain_timeout: args.drain_timeout,
        tls: None,
    };
    let probes = Admin {
        metrics: Arc::clone(&metrics),
        synced: synced_seen,
        phase: phase_seen,
    };
    tokio::spawn(serve_probes(admin, probes));
    let publish = watch::Publish { snapshots, synced };
    let published = move |snapshot: &Snapshot| {
        metrics.follow(snapshot);
        keys.retain(snapshot);
    };
    tokio::spawn(watch::run(client, args.runtime_port, publish, published));
    let listeners = serve(server, traffic, secure);
    tracing::info!(listen = %args.listen, tls = ?args.tls_listen, admin = %args.admin_listen, "gateway is up");

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    leave(&phase, args.drain_delay, listeners).await;
    Ok(())
}

async fn serve_probes(listener: TcpListener, probes: Admin) {
    if let Err(error) = axum::serve(listener, probes.router()).await {
        tracing::error!(%error, "the server for probes and metrics ended");
    }
}

/// Serves clients without TLS, and with it where there is a certificate; each listener counts in the end what it cut.
fn serve(
    server: Server,
    traffic: TcpListener,
    secure: Option<(TcpListener, Arc<tls::Certificate>)>,
) -> Vec<JoinHandle<usize>> {
    let secured = secure.map(|(listener, certificate)| {
        let tls = Some(certificate.acceptor());
        tokio::spawn(certificate.follow());
        let server = Server {
            tls,
            ..server.clone()
        };
        tokio::spawn(server.serve(listener))
    });
    let serving = tokio::spawn(server.serve(traffic));
    [serving].into_iter().chain(secured).collect()
}

/// Stops being ready, goes on accepting for a while, then ends the listeners when their requests are finished.
async fn leave(phase: &channel::Sender<Phase>, delay: Duration, listeners: Vec<JoinHandle<usize>>) {
    tracing::info!(?delay, "leaving: not ready any more, still accepting");
    phase.send_replace(Phase::Leaving);
    tokio::time::sleep(delay).await;
    phase.send_replace(Phase::Closed);
    for ended in futures::future::join_all(listeners).await {
        match ended {
            Ok(0) => tracing::info!("all requests were finished"),
            Ok(cut) => tracing::warn!(cut, "connections were still open after the drain timeout"),
            Err(error) => tracing::error!(%error, "the listener ended early"),
        }
    }
}

/// The listener for TLS, and what it shows.
async fn secure(
    args: &GatewayArgs,
) -> Result<Option<(TcpListener, Arc<tls::Certificate>)>, GatewayRunError> {
    let (Some(address), Some(certificate), Some(key)) =
        (args.tls_listen, &args.tls_cert, &args.tls_key)
    else {
        return Ok(None);
    };
    let files = tls::TlsFiles {
        certificate: certificate.clone(),
        key: key.clone(),
    };
    let certificate = tls::Certificate::load(files)?;
    Ok(Some((listen(address, "--tls-listen").await?, certificate)))
}

async fn listen(address: SocketAddr, flag: &'static str) -> Result<TcpListener, GatewayRunError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| GatewayRunError::Listen {
            address,
            flag,
            source,
        })
}
