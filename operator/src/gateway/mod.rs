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
//! - `attempt`: what one at a replica says of it. `request_body`: sending again.
//! - `watch`: the only place that talks to the API server. `server`: sockets, probes, draining. `tls`: certificates.
//!
//! Invariants: routing looks at one immutable snapshot and never waits for the API server; nothing is forwarded
//! before the key is checked; nothing is sent twice after a replica has answered; every buffer, queue and wait has a
//! bound; the gateway keeps no state that another gateway would need.

pub mod affinity;
pub mod attempt;
pub mod auth;
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
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch as channel;
use tokio::task::JoinHandle;

use crate::model_tls::{ModelTlsArgs, Trust, TrustError};
use hold::Holds;
use keys::{KeyPolicy, KeyStore};
use metrics::Metrics;
use proxy::{Proxy, ProxyLimits};
use request_body::BodyLimits;
use server::{Admin, Phase, Server};
use snapshot::{GatewayNames, Snapshot};

/// Arguments of `ashlar-operator gateway`.
#[derive(Debug, Clone, clap::Args)]
pub struct GatewayArgs {
    /// Where clients connect.
    #[arg(
        long,
        env = "ASHLAR_GATEWAY_LISTEN",
        default_value = "0.0.0.0:8080",
        value_name = "ADDRESS"
    )]
    pub listen: SocketAddr,
    /// Where clients connect by TLS; needs --tls-cert and --tls-key.
    #[arg(
        long,
        env = "ASHLAR_GATEWAY_TLS_LISTEN",
        requires = "tls_cert",
        value_name = "ADDRESS"
    )]
    pub tls_listen: Option<SocketAddr>,
    /// The chain of certificates as PEM, the gateway's own first; a new file is taken without a restart.
    #[arg(
        long,
        env = "ASHLAR_GATEWAY_TLS_CERT",
        requires = "tls_key",
        value_name = "FILE"
    )]
    pub tls_cert: Option<PathBuf>,
    /// Its key as PEM.
    #[arg(
        long,
        env = "ASHLAR_GATEWAY_TLS_KEY",
        requires = "tls_listen",
        value_name = "FILE"
    )]
    pub tls_key: Option<PathBuf>,
    /// How pods with TLS are known.
    #[command(flatten)]
    pub model_tls: ModelTlsArgs,
    /// Where /healthz, /readyz and /metrics are served.
    #[arg(
        long,
        env = "ASHLAR_GATEWAY_ADMIN_LISTEN",
        default_value = "0.0.0.0:8081",
        value_name = "ADDRESS"
    )]
    pub admin_listen: SocketAddr,
    /// Name of the gateway's own Service, which no InferenceService may claim as a host.
    #[arg(
        long,
        env = "ASHLAR_GATEWAY_SERVICE_NAME",
        default_value = "ashlar-gateway"
    )]
    pub service_name: String,
    /// Namespace of operator and gateway.
    #[arg(
        long,
        env = "ASHLAR_OPERATOR_NAMESPACE",
        default_value = "ashlar-system"
    )]
    pub namespace: String,
    /// The cluster's DNS domain.
    #[arg(
        long,
        env = "ASHLAR_CLUSTER_DOMAIN",
        default_value = "cluster.local",
        value_name = "DOMAIN"
    )]
    pub cluster_domain: String,
    /// Port of the runtime in its pods.
    #[arg(
        long,
        env = "ASHLAR_RUNTIME_PORT",
        default_value_t = 8000,
        value_name = "PORT"
    )]
    pub runtime_port: u16,
    /// Largest request body; more is answered 413.
    #[arg(
        long,
        env = "ASHLAR_GATEWAY_MAX_BODY_BYTES",
        default_value_t = 10 << 20,
        value_name = "BYTES"
    )]
    pub max_body_bytes: u64,
    /// Bytes of a body kept to send it to another replica, and searched for `model`.
    #[arg(
        long,
        env = "ASHLAR_GATEWAY_REPLAY_BYTES",
        default_value_t = 1 << 20,
        value_name = "BYTES"
    )]
    pub replay_bytes: usize,
    /// Longest pause of a client while it sends a body.
    #[arg(long, env = "ASHLAR_GATEWAY_BODY_TIMEOUT", default_value = "30", value_parser = seconds, value_name = "SECONDS")]
    pub body_timeout: Duration,
    /// Longest wait for a connection to a replica.
    #[arg(long, env = "ASHLAR_GATEWAY_CONNECT_TIMEOUT", default_value = "2", value_parser = seconds, value_name = "SECONDS")]
    pub connect_timeout: Duration,
    /// Longest wait of a request for a ready replica; then it is answered 503.
    #[arg(long, env = "ASHLAR_GATEWAY_HOLD_TIMEOUT", default_value = "30", value_parser = seconds, value_name = "SECONDS")]
    pub hold_timeout: Duration,
    /// Most requests that wait for a replica at one time; more are answered 503.
    #[arg(
        long,
        env = "ASHLAR_GATEWAY_MAX_HELD_REQUESTS",
        default_value_t = 1000,
        value_name = "COUNT"
    )]
    pub max_held_requests: usize,
    /// Most bytes of bodies kept for requests that wait for a replica; with more, requests are answered 503.
    #[arg(
        long,
        env = "ASHLAR_GATEWAY_MAX_HELD_BYTES",
        default_value_t = 64 << 20,
        value_name = "BYTES"
    )]
    pub max_held_bytes: usize,
    /// Most open connections of clients; more wait in the kernel.
    #[arg(long, env = "ASHLAR_GATEWAY_MAX_CONNECTIONS", default_value_t = 16_384, value_parser = clap::value_parser!(u32).range(1..=1_000_000), value_name = "COUNT")]
    pub max_connections: u32,
    /// Longest time from a request's head to its answer's beginning, held or not; then it is answered 504. A client may ask
    /// for less with `x-request-timeout: SECONDS`.
    #[arg(long, env = "ASHLAR_GATEWAY_REQUEST_TIMEOUT", default_value = "3600", value_parser = seconds, value_name = "SECONDS")]
    pub request_timeout: Duration,
    /// After SIGTERM, how long connections are still accepted while endpoints forget this address.
    #[arg(long, env = "ASHLAR_GATEWAY_DRAIN_DELAY", default_value = "10", value_parser = seconds, value_name = "SECONDS")]
    pub drain_delay: Duration,
    /// After that, how long open requests may take to end.
    #[arg(long, env = "ASHLAR_GATEWAY_DRAIN_TIMEOUT", default_value = "120", value_parser = seconds, value_name = "SECONDS")]
    pub drain_timeout: Duration,
}

/// Longest duration that an argument takes: a day.
const MAX_SECONDS: f64 = 86_400.0;

/// `30` or `0.5`, in seconds.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| "write a number of seconds, such as 30 or 0.5".to_owned())?;
    if !(0.0..=MAX_SECONDS).contains(&seconds) {
        return Err(format!("must lie between 0 and {MAX_SECONDS} seconds"));
    }
    Ok(Duration::from_secs_f64(seconds))
}

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

    let names = GatewayNames {
        service: args.service_name.clone(),
        namespace: args.namespace.clone(),
        cluster_domain: args.cluster_domain.trim_matches('.').to_ascii_lowercase(),
    };
    let (snapshots, snapshots_seen) = channel::channel(Arc::new(Snapshot::empty(names)));
    let (synced, synced_seen) = channel::channel(false);
    let (phase, phase_seen) = channel::channel(Phase::Serving);
    let metrics = Arc::new(Metrics::new());
    let secrets = Arc::new(watch::KubeSecrets(client.clone()));
    let keys = Arc::new(KeyStore::new(secrets, KeyPolicy::default()));

    let proxy = Arc::new(Proxy::new(
        snapshots_seen,
        synced_seen.clone(),
        Arc::clone(&keys),
        Holds::new(
            args.max_held_requests,
            args.max_held_bytes,
            args.hold_timeout,
        ),
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
    tokio::spawn(async move {
        if let Err(error) = axum::serve(admin, probes.router()).await {
            tracing::error!(%error, "the server for probes and metrics ended");
        }
    });
    let publish = watch::Publish { snapshots, synced };
    let published = move |snapshot: &Snapshot| {
        metrics.follow(snapshot);
        keys.retain(snapshot);
    };
    tokio::spawn(watch::run(client, args.runtime_port, publish, published));
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
    tracing::info!(listen = %args.listen, tls = ?args.tls_listen, admin = %args.admin_listen, "gateway is up");

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    leave(
        &phase,
        args.drain_delay,
        [serving].into_iter().chain(secured),
    )
    .await;
    Ok(())
}

/// Stops being ready, goes on accepting for a while, then ends the listeners when their requests are finished.
async fn leave(
    phase: &channel::Sender<Phase>,
    delay: Duration,
    listeners: impl Iterator<Item = JoinHandle<usize>>,
) {
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

impl GatewayArgs {
    fn limits(&self) -> ProxyLimits {
        ProxyLimits {
            body: BodyLimits {
                total: self.max_body_bytes,
                replay: self.replay_bytes,
                idle: self.body_timeout,
            },
            connect_timeout: self.connect_timeout,
            request_timeout: self.request_timeout,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_seconds() {
        assert_eq!(seconds("30"), Ok(Duration::from_secs(30)));
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for bad in ["", "-1", "30s", "NaN", "inf", "1e9"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
