//! What `/metrics` shows, with vLLM's names, labels and bucket edges, so that its dashboards work unchanged.
//!
//! The engine thread only adds to atomics. Gauges and the engine's own counters are read from [`EngineStats`] when
//! somebody scrapes, so a scrape costs the engine nothing.

mod process;

use std::{
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec,
    Opts, Registry, TextEncoder, core::Collector,
};

use crate::engine::{EngineHandle, EngineObserver, EngineStats, FinishedRequest, StepReport};

/// Edges of latencies from a request's first to its last moment.
const REQUEST_SECONDS: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
const FIRST_TOKEN_SECONDS: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
const TOKEN_SECONDS: [f64; 19] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
const STEP_TOKENS: [f64; 15] = [
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
    32768.0, 65536.0,
];
const HTTP_SECONDS: [f64; 3] = [0.1, 0.5, 1.0];
const HTTP_FINE_SECONDS: [f64; 21] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0,
    7.5, 10.0, 30.0, 60.0,
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
    /// Smoothed time that a request has a place, in µs: how fast places become free.
    inference_us: Arc<AtomicU64>,
}

struct Gauges {
    running: Gauge,
    waiting: Gauge,
    waiting_capacity: Gauge,
    kv_cache_usage: Gauge,
}

/// Counters that follow [`EngineStats`], and its last reading.
struct Counters {
    last: Option<EngineStats>,
    prefix_cache_queries: IntCounter,
    prefix_cache_hits: IntCounter,
    preemptions: IntCounter,
    prompt_tokens: IntCounter,
    prompt_tokens_cached: IntCounter,
    prompt_computed: IntCounter,
    prompt_cache_hit: IntCounter,
    generation_tokens: IntCounter,
}

/// Distributions over requests and steps.
#[derive(Clone)]
struct Requests {
    success: IntCounterVec,
    prompt_tokens: Histogram,
    generation_tokens: Histogram,
    max_num_generation_tokens: Histogram,
    params_max_tokens: Histogram,
    params_n: Histogram,
    computed_tokens: Histogram,
    preemptions: Histogram,
    iteration_tokens: Histogram,
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    time_per_output_token: Histogram,
    e2e: Histogram,
    queue: Histogram,
    inference: Histogram,
    prefill: Histogram,
    decode: Histogram,
}

struct Http {
    requests: IntCounterVec,
    duration: HistogramVec,
    fine_duration: Histogram,
    request_bytes: HistogramVec,
    response_bytes: HistogramVec,
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

/// 1, 2, 5, 10, 20, 50, … up to `limit`.
fn length_edges(limit: u32) -> Vec<f64> {
    let decades = (0..9).map(|power| 10f64.powi(power));
    let edges = decades.flat_map(|ten| [ten, 2.0 * ten, 5.0 * ten]);
    edges
        .take_while(|&edge| edge <= f64::from(limit.max(1)))
        .collect()
}

impl Gauges {
    fn new(build: &Builder<'_>, engine: &EngineHandle) -> prometheus::Result<Self> {
        let reasons = build.add(GaugeVec::new(
            build.opts(
                "vllm:num_requests_waiting_by_reason",
                "Requests without a place, by what they wait for",
            ),
            &["reason"],
        ))?;
        reasons.with_label_values(&["deferred"]).set(0.0);
        let sleep = build.add(GaugeVec::new(
            build.opts(
                "vllm:engine_sleep_state",
                "1 for the state that the engine is in",
            ),
            &["sleep_state"],
        ))?;
        sleep.with_label_values(&["awake"]).set(1.0);
        sleep.with_label_values(&["weights_offloaded"]).set(0.0);
        sleep.with_label_values(&["discard_all"]).set(0.0);
        let limits = engine.limits();
        let info = Opts::new("vllm:cache_config_info", "How the KV cache is set up")
            .const_label("engine", "0")
            .const_label("block_size", limits.block_size.to_string())
            .const_label("num_gpu_blocks", limits.num_blocks.to_string())
            .const_label("kv_bytes_per_token", limits.kv_bytes_per_token.to_string())
            .const_label(
                "enable_prefix_caching",
                engine.config().enable_prefix_caching.to_string(),
            );
        build.add(Gauge::with_opts(info))?.set(1.0);
        Ok(Self {
            running: build.gauge("vllm:num_requests_running", "Requests that have a place")?,
            waiting: build.gauge("vllm:num_requests_waiting", "Requests without a place")?,
            waiting_capacity: reasons.with_label_values(&["capacity"]),
            kv_cache_usage: build.gauge(
                "vllm:kv_cache_usage_perc",
                "Share of the KV cache in use by requests, 0 to 1",
            )?,
        })
    }

    fn set(&self, stats: &EngineStats) {
        self.running.set(f64::from(stats.running));
        self.waiting.set(f64::from(stats.waiting));
        self.waiting_capacity.set(f64::from(stats.waiting));
        self.kv_cache_usage.set(stats.kv_cache_usage);
    }
}

impl Counters {
    fn new(build: &Builder<'_>) -> prometheus::Result<Self> {
        let by_source = build.add(IntCounterVec::new(
            build.opts(
                "vllm:prompt_tokens_by_source_total",
                "Prompt tokens, by where their KV came from",
            ),
            &["source"],
        ))?;
        by_source.with_label_values(&["external_kv_transfer"]);
        Ok(Self {
            last: None,
            prefix_cache_queries: build.counter(
                "vllm:prefix_cache_queries_total",
                "Prompt tokens looked up in the prefix cache",
            )?,
            prefix_cache_hits: build.counter(
                "vllm:prefix_cache_hits_total",
                "Prompt tokens found in the prefix cache",
            )?,
            preemptions: build.counter(
                "vllm:num_preemptions_total",
                "Times a running request lost its place",
            )?,
            prompt_tokens: build.counter("vllm:prompt_tokens_total", "Prompt tokens processed")?,
            prompt_tokens_cached: build.counter(
                "vllm:prompt_tokens_cached_total",
                "Prompt tokens taken from a cache",
            )?,
            prompt_computed: by_source.with_label_values(&["local_compute"]),
            prompt_cache_hit: by_source.with_label_values(&["local_cache_hit"]),
            generation_tokens: build.counter("vllm:generation_tokens_total", "Tokens generated")?,
        })
    }

    fn follow(&mut self, now: &EngineStats) {
        let last = self.last.replace(*now);
        let since = |field: fn(&EngineStats) -> u64| {
            field(now).saturating_sub(last.as_ref().map_or(0, field))
        };
        self.prefix_cache_queries
            .inc_by(since(|stats| stats.prefix_cache_queries));
        self.prefix_cache_hits
            .inc_by(since(|stats| stats.prefix_cache_hits));
        self.preemptions.inc_by(since(|stats| stats.preemptions));
        self.generation_tokens
            .inc_by(since(|stats| stats.generation_tokens));
        let prompt = since(|stats| stats.prompt_tokens);
        let cached = since(|stats| stats.prompt_tokens_cached);
        self.prompt_tokens.inc_by(prompt);
        self.prompt_tokens_cached.inc_by(cached);
        self.prompt_cache_hit.inc_by(cached);
        self.prompt_computed.inc_by(prompt.saturating_sub(cached));
    }
}

impl Requests {
    fn new(build: &Builder<'_>, max_model_len: u32) -> prometheus::Result<Self> {
        let success = build.add(IntCounterVec::new(
            build.opts("vllm:request_success_total", "Requests that ended, by how"),
            &["finished_reason"],
        ))?;
        for reason in ["stop", "length", "abort", "error", "repetition"] {
            success.with_label_values(&[reason]);
        }
        let lengths = length_edges(max_model_len);
        let tokens = |name: &str, help: &str| build.histogram(name, help, &lengths);
        let seconds = |name: &str, help: &str| build.histogram(name, help, &REQUEST_SECONDS);
        Ok(Self {
            success,
            prompt_tokens: tokens("vllm:request_prompt_tokens", "Prompt tokens of a request")?,
            generation_tokens: tokens(
                "vllm:request_generation_tokens",
                "Tokens generated for a request",
            )?,
            max_num_generation_tokens: tokens(
                "vllm:request_max_num_generation_tokens",
                "Most tokens generated for one choice of a request",
            )?,
            params_max_tokens: tokens("vllm:request_params_max_tokens", "max_tokens of a request")?,
            computed_tokens: tokens(
                "vllm:request_prefill_kv_computed_tokens",
                "Prompt tokens of a request that no cache had",
            )?,
            params_n: build.histogram(
                "vllm:request_params_n",
                "n of a request",
                &[1.0, 2.0, 5.0, 10.0, 20.0],
            )?,
            preemptions: build.histogram(
                "vllm:request_num_preemptions",
                "Times a request lost its place",
                &[1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0],
            )?,
            iteration_tokens: build.histogram(
                "vllm:iteration_tokens_total",
                "Tokens computed in a step",
                &STEP_TOKENS,
            )?,
            time_to_first_token: build.histogram(
                "vllm:time_to_first_token_seconds",
                "From arrival to the first token",
                &FIRST_TOKEN_SECONDS,
            )?,
            inter_token_latency: build.histogram(
                "vllm:inter_token_latency_seconds",
                "From one token of a request to the next",
                &TOKEN_SECONDS,
            )?,
            time_per_output_token: build.histogram(
                "vllm:request_time_per_output_token_seconds",
                "A request's mean time per token after the first",
                &TOKEN_SECONDS,
            )?,
            e2e: seconds(
                "vllm:e2e_request_latency_seconds",
                "From arrival to the end",
            )?,
            queue: seconds("vllm:request_queue_time_seconds", "Time without a place")?,
            inference: seconds("vllm:request_inference_time_seconds", "Time with a place")?,
            prefill: seconds(
                "vllm:request_prefill_time_seconds",
                "From a place to the first token",
            )?,
            decode: seconds(
                "vllm:request_decode_time_seconds",
                "From the first to the last token",
            )?,
        })
    }
}

impl Http {
    fn new(registry: &Registry) -> prometheus::Result<Self> {
        fn add<C: Collector + Clone + 'static>(
            registry: &Registry,
            collector: prometheus::Result<C>,
        ) -> prometheus::Result<C> {
            let collector = collector?;
            registry.register(Box::new(collector.clone()))?;
            Ok(collector)
        }
        let histogram = |name: &str, help: &str, edges: &[f64]| HistogramOpts {
            common_opts: Opts::new(name, help),
            buckets: edges.to_vec(),
        };
        let bytes = [
            256.0,
            1024.0,
            4096.0,
            16384.0,
            65536.0,
            262_144.0,
            1_048_576.0,
        ];
        Ok(Self {
            requests: add(
                registry,
                IntCounterVec::new(
                    Opts::new("http_requests_total", "Requests answered"),
                    &["method", "status", "handler"],
                ),
            )?,
            duration: add(
                registry,
                HistogramVec::new(
                    histogram(
                        "http_request_duration_seconds",
                        "Time to answer",
                        &HTTP_SECONDS,
                    ),
                    &["method", "handler"],
                ),
            )?,
            fine_duration: add(
                registry,
                Histogram::with_opts(histogram(
                    "http_request_duration_highr_seconds",
                    "Time to answer, in fine steps",
                    &HTTP_FINE_SECONDS,
                )),
            )?,
            request_bytes: add(
                registry,
                HistogramVec::new(
                    histogram("http_request_size_bytes", "Bytes of request bodies", &bytes),
                    &["handler"],
                ),
            )?,
            response_bytes: add(
                registry,
                HistogramVec::new(
                    histogram(
                        "http_response_size_bytes",
                        "Bytes of response bodies",
                        &bytes,
                    ),
                    &["handler"],
                ),
            )?,
        })
    }
}

/// One answered HTTP request.
#[derive(Debug, Clone, Copy)]
pub struct HttpSample<'a> {
    /// One of the known methods, or `OTHER`.
    pub method: &'static str,
    /// `2xx`, `4xx`, …
    pub status_class: &'static str,
    /// The route's pattern, or `none`.
    pub handler: &'a str,
    /// From the head of the request to the end of the answer.
    pub duration: Duration,
    /// Bytes of the request's body.
    pub request_bytes: u64,
    /// Bytes of the answer's body.
    pub response_bytes: u64,
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
        let counters = Mutex::new(Counters::new(&build)?);
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
            inference_us: Arc::new(AtomicU64::new(0)),
        })
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
            counters.follow(&stats);
        }
        if names.is_empty() || names.iter().any(|name| name.starts_with("process_")) {
            self.process.read();
        }
        let mut families = self.registry.gather();
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

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// Counts what the engine reports.
struct RequestObserver {
    requests: Requests,
    inference_us: Arc<AtomicU64>,
}

impl EngineObserver for RequestObserver {
    fn on_step(&self, report: &StepReport<'_>) {
        let requests = &self.requests;
        requests
            .iteration_tokens
            .observe(f64::from(report.num_tokens));
        for time in report.time_to_first_token {
            requests.time_to_first_token.observe(time.as_secs_f64());
        }
        for time in report.inter_token_latency {
            requests.inter_token_latency.observe(time.as_secs_f64());
        }
    }

    fn on_finished(&self, request: &FinishedRequest) {
        let to = &self.requests;
        to.success
            .with_label_values(&[request.reason.as_str()])
            .inc();
        let generated = f64::from(request.num_generation_tokens);
        let computed = request
            .num_prompt_tokens
            .saturating_sub(request.num_cached_tokens);
        to.prompt_tokens
            .observe(f64::from(request.num_prompt_tokens));
        to.generation_tokens.observe(generated);
        to.max_num_generation_tokens.observe(generated);
        to.params_max_tokens.observe(f64::from(request.max_tokens));
        to.computed_tokens.observe(f64::from(computed));
        to.preemptions.observe(f64::from(request.num_preemptions));
        let seconds =
            |from, to: std::time::Instant| to.saturating_duration_since(from).as_secs_f64();
        to.e2e.observe(seconds(request.arrival, request.finished));
        let Some(scheduled) = request.scheduled else {
            to.queue.observe(seconds(request.queued, request.finished));
            return;
        };
        to.queue.observe(seconds(request.queued, scheduled));
        let (Some(first), Some(last)) = (request.first_token, request.last_token) else {
            return;
        };
        let inference = seconds(scheduled, last);
        to.prefill.observe(seconds(scheduled, first));
        to.decode.observe(seconds(first, last));
        to.inference.observe(inference);
        if request.num_generation_tokens > 1 {
            to.time_per_output_token
                .observe(seconds(first, last) / (generated - 1.0));
        }
        let before = self.inference_us.load(Relaxed);
        let now = (inference * 1e6) as u64;
        let smoothed = if before == 0 {
            now
        } else {
            (before * 7 + now) / 8
        };
        self.inference_us.store(smoothed, Relaxed);
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

#[cfg(test)]
mod tests {
    use super::length_edges;

    #[test]
    fn length_edges_stop_at_the_model_s_length() {
        assert_eq!(length_edges(60), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]);
        assert_eq!(length_edges(0), [1.0]);
    }
}
