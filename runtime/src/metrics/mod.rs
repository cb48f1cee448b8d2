//! What `/metrics` shows, with vLLM's names, labels and bucket edges, so that its dashboards work unchanged.
//!
//! The engine thread only adds to atomics. Gauges and the engine's own counters are read from [`EngineStats`] when
//! somebody scrapes, so a scrape costs the engine nothing.

mod engine;
mod http;
mod process;
mod requests;

use std::sync::{
    Arc, Mutex, OnceLock, PoisonError,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, IntCounter, Opts, Registry, TextEncoder,
    core::Collector, proto::MetricFamily,
};

pub use self::http::HttpSample;
use self::{
    engine::{Counters, Gauges},
    http::Http,
    requests::{RequestObserver, Requests},
};
use crate::engine::{EngineHandle, EngineObserver, FinishedRequest, StepReport};

/// Names that vLLM has dropped and other projects still ask for, and what they are called now; without one, what they
/// count does not exist here, and is 0.
const FORMER_NAMES: [(&str, Option<&str>); 6] = [
    (
        "vllm:gpu_cache_usage_perc",
        Some("vllm:kv_cache_usage_perc"),
    ),
    (
        "vllm:gpu_prefix_cache_queries_total",
        Some("vllm:prefix_cache_queries_total"),
    ),
    (
        "vllm:gpu_prefix_cache_hits_total",
        Some("vllm:prefix_cache_hits_total"),
    ),
    (
        "vllm:time_per_output_token_seconds",
        Some("vllm:inter_token_latency_seconds"),
    ),
    ("vllm:num_requests_swapped", None),
    ("vllm:cpu_cache_usage_perc", None),
];
/// Longest time that a client is told to wait before it tries again.
const MAX_RETRY_AFTER_SECONDS: f64 = 60.0;

/// All metrics of a server.
pub struct Metrics {
    registry: Registry,
    engine: EngineHandle,
    gauges: Gauges,
    counters: Mutex<Counters>,
    requests: Requests,
    http: Http,
    process: process::Process,
    /// Requests of `/generate_measured` that were answered.
    pub llm_requests: IntCounter,
    /// Time that `/generate_measured` took to generate.
    pub llm_generation_seconds: Histogram,
    /// Show [`FORMER_NAMES`] too.
    former_names: bool,
    /// Smoothed time that a request has a place, in µs: how fast places become free.
    inference_us: Arc<AtomicU64>,
}

/// Registers under a model's labels.
struct Builder<'a> {
    registry: &'a Registry,
    model: &'a str,
}

impl Builder<'_> {
    fn opts(&self, name: &str, help: &str) -> Opts {
        Opts::new(name, help)
            .const_label("model_name", self.model)
            .const_label("engine", "0")
    }

    fn add<C: Collector + Clone + 'static>(
        &self,
        collector: prometheus::Result<C>,
    ) -> prometheus::Result<C> {
        let collector = collector?;
        self.registry.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    fn gauge(&self, name: &str, help: &str) -> prometheus::Result<Gauge> {
        self.add(Gauge::with_opts(self.opts(name, help)))
    }

    fn counter(&self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        self.add(IntCounter::with_opts(self.opts(name, help)))
    }

    fn histogram(&self, name: &str, help: &str, edges: &[f64]) -> prometheus::Result<Histogram> {
        let opts = HistogramOpts {
            common_opts: self.opts(name, help),
            buckets: edges.to_vec(),
        };
        self.add(Histogram::with_opts(opts))
    }
}

impl Metrics {
    /// Metrics of an engine that serves as `model_name`.
    ///
    /// # Errors
    /// [`prometheus::Error`] when a name is registered twice: a bug.
    pub fn new(model_name: &str, engine: EngineHandle) -> prometheus::Result<Self> {
        let registry = Registry::new();
        let build = Builder {
            registry: &registry,
            model: model_name,
        };
        let gauges = Gauges::new(&build, &engine)?;
        let counters = Mutex::new(Counters::new(&build, &engine)?);
        let requests = Requests::new(&build, engine.limits().max_model_len)?;
        let llm_requests = build.add(IntCounter::new(
            "llm_requests_total",
            "Requests answered by /generate_measured",
        ))?;
        let llm_generation_seconds = build.add(Histogram::with_opts(HistogramOpts::new(
            "llm_generation_seconds",
            "Time that /generate_measured took to generate",
        )))?;
        Ok(Self {
            http: Http::new(&registry)?,
            process: process::Process::new(&registry)?,
            registry,
            engine,
            gauges,
            counters,
            requests,
            llm_requests,
            llm_generation_seconds,
            former_names: false,
            inference_us: Arc::new(AtomicU64::new(0)),
        })
    }

    /// Also shows what vLLM called some metrics formerly.
    ///
    /// # Errors
    /// [`prometheus::Error`] when a name is registered twice: a bug.
    pub fn with_former_names(mut self, model_name: &str) -> prometheus::Result<Self> {
        self.former_names = true;
        let build = Builder {
            registry: &self.registry,
            model: model_name,
        };
        for (name, _) in FORMER_NAMES.iter().filter(|(_, now)| now.is_none()) {
            build.gauge(name, "Always 0: there is no such memory here")?;
        }
        Ok(self)
    }

    /// What the engine is to report to.
    #[must_use]
    pub fn observer(&self) -> Arc<dyn EngineObserver> {
        Arc::new(RequestObserver {
            requests: self.requests.clone(),
            inference_us: Arc::clone(&self.inference_us),
        })
    }

    /// Counts a request's `n`.
    pub fn observe_n(&self, n: u32) {
        self.requests.params_n.observe(f64::from(n));
    }

    /// Counts an answered HTTP request.
    pub fn observe_http(&self, sample: &HttpSample<'_>) {
        let http = &self.http;
        let seconds = sample.duration.as_secs_f64();
        http.requests
            .with_label_values(&[sample.method, sample.status_class, sample.handler])
            .inc();
        http.duration
            .with_label_values(&[sample.method, sample.handler])
            .observe(seconds);
        http.fine_duration.observe(seconds);
        http.request_bytes
            .with_label_values(&[sample.handler])
            .observe(sample.request_bytes as f64);
        http.response_bytes
            .with_label_values(&[sample.handler])
            .observe(sample.response_bytes as f64);
    }

    /// Seconds until a place is likely to be free for one more waiting request, at least 1.
    #[must_use]
    pub fn retry_after(&self) -> u32 {
        let stats = self.engine.stats();
        let seconds = self.inference_us.load(Relaxed) as f64 / 1e6;
        let places = f64::from(stats.running.max(1));
        let wait = seconds * f64::from(stats.waiting) / places;
        wait.ceil().clamp(1.0, MAX_RETRY_AFTER_SECONDS) as u32
    }

    /// The text that Prometheus reads. With `names`, only these metrics: by family, or by one of a family's series
    /// (`…_bucket`, `…_sum`, `…_count`).
    #[must_use]
    pub fn render(&self, names: &[&str]) -> Vec<u8> {
        {
            let mut counters = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
            // Read under the lock: two scrapes must not count backwards.
            let stats = self.engine.stats();
            self.gauges.set(&stats);
            counters.follow(&stats, &self.engine);
        }
        if names.is_empty() || names.iter().any(|name| name.starts_with("process_")) {
            self.process.read();
        }
        let mut families = self.registry.gather();
        if self.former_names {
            add_former_names(&mut families);
        }
        if !names.is_empty() {
            let series = ["_bucket", "_sum", "_count"];
            families.retain(|family| {
                names.iter().any(|name| {
                    let rest = name.strip_prefix(family.name());
                    rest.is_some_and(|rest| rest.is_empty() || series.contains(&rest))
                })
            });
        }
        let mut text = Vec::with_capacity(32 << 10);
        if let Err(error) = TextEncoder::new().encode(&families, &mut text) {
            tracing::error!(%error, "the metrics could not be written");
        }
        text
    }
}

fn add_former_names(families: &mut Vec<MetricFamily>) {
    for (former, now) in FORMER_NAMES {
        let found = families.iter().find(|family| Some(family.name()) == now);
        if let Some(mut family) = found.cloned() {
            family.set_name(former.to_owned());
            families.push(family);
        }
    }
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// An observer for an engine that starts before its metrics exist: they need its sizes.
#[derive(Default)]
pub struct LateObserver(OnceLock<Arc<dyn EngineObserver>>);

impl LateObserver {
    /// Sets the observer; only the first call has an effect.
    pub fn set(&self, observer: Arc<dyn EngineObserver>) {
        // A second observer is ignored by contract.
        let _ = self.0.set(observer);
    }
}

impl EngineObserver for LateObserver {
    fn on_step(&self, report: &StepReport<'_>) {
        if let Some(observer) = self.0.get() {
            observer.on_step(report);
        }
    }

    fn on_finished(&self, request: &FinishedRequest) {
        if let Some(observer) = self.0.get() {
            observer.on_finished(request);
        }
    }
}
