//! The controller's own metrics and probes on one port.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use bytes::Bytes;
use futures::StreamExt as _;
use prometheus::{
    Encoder as _, Histogram, HistogramOpts, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
};

use super::service_metrics::{Parts, ServiceMetrics};

/// Counters of the controller. Names are controller-runtime's where it has them.
pub struct Metrics {
    registry: Registry,
    reconciles: IntCounterVec,
    reconcile_seconds: Histogram,
    writes: IntCounterVec,
    leader: IntGauge,
    ready: AtomicBool,
    /// What the leader knows of services.
    services: OnceLock<ServiceMetrics>,
}

impl Metrics {
    /// All at zero.
    ///
    /// # Panics
    /// Never: names are static.
    #[must_use]
    pub fn new() -> Self {
        let counter = |name, help, labels: &[&str]| {
            IntCounterVec::new(Opts::new(name, help), labels).expect("static names: this is a bug")
        };
        let metrics = Self {
            registry: Registry::new(),
            reconciles: counter(
                "controller_runtime_reconcile_total",
                "Reconciles by result.",
                &["controller", "result"],
            ),
            reconcile_seconds: Histogram::with_opts(
                HistogramOpts::new(
                    "controller_runtime_reconcile_time_seconds",
                    "Time of one reconcile.",
                )
                .buckets(vec![
                    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
                ]),
            )
            .expect("static names: this is a bug"),
            writes: counter(
                "ashlar_operator_writes_total",
                "Writes to the API server by kind.",
                &["kind"],
            ),
            leader: IntGauge::new("ashlar_operator_leader", "1 while this process leads.")
                .expect("static names: this is a bug"),
            ready: AtomicBool::new(false),
            services: OnceLock::new(),
        };
        let all: [Box<dyn prometheus::core::Collector>; 4] = [
            Box::new(metrics.reconciles.clone()),
            Box::new(metrics.reconcile_seconds.clone()),
            Box::new(metrics.writes.clone()),
            Box::new(metrics.leader.clone()),
        ];
        for collector in all {
            metrics
                .registry
                .register(collector)
                .expect("each name once: this is a bug");
        }
        metrics
    }

    /// Where others of this process register theirs.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Counts a reconcile that started at `start`; `result` is `success` or `error`.
    pub fn reconciled(&self, start: Instant, result: &str) {
        self.reconciles
            .with_label_values(&["inferenceservice", result])
            .inc();
        self.reconcile_seconds
            .observe(start.elapsed().as_secs_f64());
    }

    /// Counts a write.
    pub fn wrote(&self, kind: &str) {
        self.writes.with_label_values(&[kind]).inc();
    }

    /// Says whether this process leads.
    pub fn set_leader(&self, leads: bool) {
        self.leader.set(i64::from(leads));
    }

    /// From now on services are told of, too.
    pub(super) fn tell_of(&self, services: ServiceMetrics) {
        // A process leads once.
        let _ = self.services.set(services);
    }

    /// Says that the caches are filled.
    pub fn set_ready(&self) {
        self.ready.store(true, Ordering::Release);
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Serves `/metrics`, `/healthz` and `/readyz` until the process ends.
///
/// # Errors
/// When the address cannot be listened on.
pub async fn serve(address: SocketAddr, metrics: Arc<Metrics>) -> std::io::Result<()> {
    let listener = tokio::net::TcpListener::bind(address).await?;
    let router = Router::new()
        .route("/metrics", get(exposition))
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(readiness))
        .with_state(metrics);
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(())
}

async fn exposition(State(metrics): State<Arc<Metrics>>) -> Response {
    let mut own = Vec::new();
    if let Err(error) = TextEncoder::new().encode(&metrics.registry.gather(), &mut own) {
        tracing::error!(%error, "cannot write metrics");
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    }
    let services = metrics.services.get().map(ServiceMetrics::parts);
    let services = services.map(|parts| futures::stream::unfold(parts, next_part));
    let own = futures::stream::iter([Ok(own.into())]);
    let text = own.chain(futures::stream::iter(services).flatten());
    let kind = [(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)];
    (kind, Body::from_stream(text)).into_response()
}

/// Thousands of services take a while to write: others get their turn in between.
async fn next_part(mut parts: Parts) -> Option<(Result<Bytes, Infallible>, Parts)> {
    tokio::task::yield_now().await;
    Some((Ok(parts.next()?), parts))
}

async fn readiness(State(metrics): State<Arc<Metrics>>) -> StatusCode {
    if metrics.ready.load(Ordering::Acquire) {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    }
}
