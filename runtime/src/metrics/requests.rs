//! Distributions over requests and steps, told by the engine.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use prometheus::{Histogram, IntCounterVec};

use super::Builder;
use crate::engine::{EngineObserver, FinishedRequest, StepReport};

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
const STEP_TOKENS: [f64; 13] = [
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
];
/// Distributions over requests and steps.
#[derive(Clone)]
pub(super) struct Requests {
    success: IntCounterVec,
    prompt_tokens: Histogram,
    generation_tokens: Histogram,
    max_num_generation_tokens: Histogram,
    params_max_tokens: Histogram,
    pub(super) params_n: Histogram,
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

/// 1, 2, 5, 10, 20, 50, … up to `limit`.
fn length_edges(limit: u32) -> Vec<f64> {
    let decades = (0..9).map(|power| 10f64.powi(power));
    let edges = decades.flat_map(|ten| [ten, 2.0 * ten, 5.0 * ten]);
    edges
        .take_while(|&edge| edge <= f64::from(limit.max(1)))
        .collect()
}

impl Requests {
    pub(super) fn new(build: &Builder<'_>, max_model_len: u32) -> prometheus::Result<Self> {
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

/// Counts what the engine reports.
pub(super) struct RequestObserver {
    pub(super) requests: Requests,
    pub(super) inference_us: Arc<AtomicU64>,
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
        if let Some(max_tokens) = request.max_tokens {
            to.generation_tokens.observe(generated);
            to.max_num_generation_tokens.observe(generated);
            to.params_max_tokens.observe(f64::from(max_tokens));
        }
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

#[cfg(test)]
mod tests {
    use super::length_edges;

    #[test]
    fn length_edges_stop_at_the_model_s_length() {
        assert_eq!(length_edges(60), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]);
        assert_eq!(length_edges(0), [1.0]);
    }
}
