//! Gauges and counters that are read from the engine when somebody scrapes.

use prometheus::{Counter, Gauge, GaugeVec, IntCounter, IntCounterVec, Opts};

use super::Builder;
use crate::engine::{EngineHandle, EngineStats};

pub(super) struct Gauges {
    running: Gauge,
    waiting: Gauge,
    waiting_capacity: Gauge,
    waiting_tokens: Gauge,
    prefill_rate: Gauge,
    decode_rate: Gauge,
    kv_cache_usage: Gauge,
    silent: Gauge,
}

/// Counters that follow [`EngineStats`], and its last reading.
pub(super) struct Counters {
    last: Option<EngineStats>,
    prefix_cache_queries: IntCounter,
    prefix_cache_hits: IntCounter,
    preemptions: IntCounter,
    prompt_tokens: IntCounter,
    prompt_tokens_cached: IntCounter,
    prompt_cached_on_device: IntCounter,
    prompt_computed: IntCounter,
    prompt_cache_hit: IntCounter,
    generation_tokens: IntCounter,
    corrupted: IntCounter,
    work: Option<Work>,
}

/// Estimates of what the device did.
struct Work {
    flops: Counter,
    read_bytes: Counter,
    write_bytes: Counter,
}

impl Gauges {
    pub(super) fn new(build: &Builder<'_>, engine: &EngineHandle) -> prometheus::Result<Self> {
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
        Self::add_info(build, engine)?;
        Ok(Self {
            running: build.gauge("vllm:num_requests_running", "Requests that have a place")?,
            waiting: build.gauge("vllm:num_requests_waiting", "Requests without a place")?,
            waiting_capacity: reasons.with_label_values(&["capacity"]),
            waiting_tokens: build.gauge(
                "ashlar:waiting_tokens",
                "Tokens of the requests without a place, to be computed before they answer",
            )?,
            prefill_rate: build.gauge(
                "ashlar:prefill_tokens_per_second",
                "Prompt tokens computed per second, measured over the last steps that computed some",
            )?,
            decode_rate: build.gauge(
                "ashlar:decode_tokens_per_second",
                "Tokens generated per second, measured over the last steps that generated some",
            )?,
            kv_cache_usage: build.gauge(
                "vllm:kv_cache_usage_perc",
                "Share of the KV cache in use by requests, 0 to 1",
            )?,
            silent: build.gauge(
                "ashlar:engine_silent_seconds",
                "Time since the engine ended a step or, without work, last looked for some",
            )?,
        })
    }

    /// Gauges whose labels say it all.
    fn add_info(build: &Builder<'_>, engine: &EngineHandle) -> prometheus::Result<()> {
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
        let adapters = Opts::new(
            "vllm:lora_requests_info",
            "Adapters in use; none can be loaded",
        )
        .const_label("max_lora", "0")
        .const_label("waiting_lora_adapters", "")
        .const_label("running_lora_adapters", "");
        build.add(Gauge::with_opts(adapters))?;
        Ok(())
    }

    pub(super) fn set(&self, stats: &EngineStats) {
        self.running.set(f64::from(stats.running));
        self.waiting.set(f64::from(stats.waiting));
        self.waiting_capacity.set(f64::from(stats.waiting));
        self.waiting_tokens.set(stats.waiting_tokens as f64);
        self.prefill_rate.set(stats.prefill_tokens_per_second);
        self.decode_rate.set(stats.decode_tokens_per_second);
        self.kv_cache_usage.set(stats.kv_cache_usage);
        self.silent.set(stats.silent_for.as_secs_f64());
    }
}

/// Caches and drafts that this runtime does not have: dashboards expect their counters, and nothing is what they did.
const NEVER: [(&str, &str); 7] = [
    (
        "vllm:external_prefix_cache_queries_total",
        "Prompt tokens looked up in another server's cache",
    ),
    (
        "vllm:external_prefix_cache_hits_total",
        "Prompt tokens found in another server's cache",
    ),
    (
        "vllm:mm_cache_queries_total",
        "Media looked up in the cache of media",
    ),
    (
        "vllm:mm_cache_hits_total",
        "Media found in the cache of media",
    ),
    ("vllm:spec_decode_num_drafts_total", "Drafts"),
    ("vllm:spec_decode_num_draft_tokens_total", "Drafted tokens"),
    (
        "vllm:spec_decode_num_accepted_tokens_total",
        "Drafted tokens that the model accepted",
    ),
];

impl Counters {
    pub(super) fn new(build: &Builder<'_>, engine: &EngineHandle) -> prometheus::Result<Self> {
        let by = |name: &str, help: &str, label: &str, values: &[&str]| {
            let counters = build.add(IntCounterVec::new(build.opts(name, help), &[label]))?;
            for value in values {
                counters.with_label_values(&[*value]);
            }
            prometheus::Result::Ok(counters)
        };
        let by_source = by(
            "vllm:prompt_tokens_by_source_total",
            "Prompt tokens, by where their KV came from",
            "source",
            &["external_kv_transfer"],
        )?;
        let cached_by_source = by(
            "vllm:prompt_tokens_cached_by_source_total",
            "Prompt tokens taken from a cache, by where it is",
            "source",
            &["host", "disk", "p2p", "external_unspecified"],
        )?;
        by(
            "vllm:spec_decode_num_accepted_tokens_per_pos_total",
            "Drafted tokens that the model accepted, by their place in the draft",
            "position",
            &["0"],
        )?;
        for (name, help) in NEVER {
            build.counter(name, help)?;
        }
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
            prompt_cached_on_device: cached_by_source.with_label_values(&["device"]),
            prompt_computed: by_source.with_label_values(&["local_compute"]),
            prompt_cache_hit: by_source.with_label_values(&["local_cache_hit"]),
            generation_tokens: build.counter("vllm:generation_tokens_total", "Tokens generated")?,
            corrupted: build.counter(
                "vllm:corrupted_requests_total",
                "Requests that failed because the model's numbers were not finite",
            )?,
            work: engine.costs().map(|_| Work::new(build)).transpose()?,
        })
    }

    pub(super) fn follow(&mut self, now: &EngineStats, engine: &EngineHandle) {
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
        self.corrupted
            .inc_by(since(|stats| stats.corrupted_requests));
        let prompt = since(|stats| stats.prompt_tokens);
        let cached = since(|stats| stats.prompt_tokens_cached);
        self.prompt_tokens.inc_by(prompt);
        self.prompt_tokens_cached.inc_by(cached);
        self.prompt_cached_on_device.inc_by(cached);
        self.prompt_cache_hit.inc_by(cached);
        self.prompt_computed.inc_by(prompt.saturating_sub(cached));
        if let (Some(work), Some(costs)) = (&self.work, engine.costs()) {
            let count = |field: fn(&EngineStats) -> u64| since(field) as f64;
            let rows = count(|stats| stats.computed_tokens);
            let kv_bytes = engine.limits().kv_bytes_per_token as f64;
            work.flops.inc_by(
                rows * costs.flops_per_token
                    + count(|stats| stats.generation_tokens) * costs.flops_per_output
                    + count(|stats| stats.attended_tokens) * costs.flops_per_attended,
            );
            work.read_bytes.inc_by(
                count(|stats| stats.steps) * costs.weight_bytes as f64
                    + count(|stats| stats.context_tokens) * kv_bytes,
            );
            work.write_bytes.inc_by(rows * kv_bytes);
        }
    }
}

impl Work {
    fn new(build: &Builder<'_>) -> prometheus::Result<Self> {
        let counter = |name, help| build.add(Counter::with_opts(build.opts(name, help)));
        Ok(Self {
            flops: counter(
                "vllm:estimated_flops_per_gpu_total",
                "Floating-point operations of the steps, computed from the model's sizes",
            )?,
            read_bytes: counter(
                "vllm:estimated_read_bytes_per_gpu_total",
                "Bytes of weights and KV cache that the steps read, computed from the model's sizes",
            )?,
            write_bytes: counter(
                "vllm:estimated_write_bytes_per_gpu_total",
                "Bytes of KV cache that the steps wrote, computed from the model's sizes",
            )?,
        })
    }
}
