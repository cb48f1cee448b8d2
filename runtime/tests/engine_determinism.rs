//! Tokens and log-probabilities of the default model, bit for bit the same through the whole engine: alone, sixteen at
//! once, in chunks, preempted and resumed, and with the prefix cache on and off; in both modes.
#![allow(clippy::unwrap_used, missing_docs)] // Tests fail by panicking.

mod common;

use std::future::Future;

use ashlar::{
    engine::{
        Engine, EngineConfig, EngineStats,
        request::{FinishReason, Request, SamplingParams, TokenId},
    },
    model_runner::{CpuRunner, CpuRunnerConfig, Dtype, KvCacheSize},
};
use common::model_path;

const OUTPUT: u32 = 24;
const SHARED: usize = 40;
const TOP: u32 = 5;
const REQUESTS: u32 = 16;

/// How a trace is run.
struct Setup {
    blocks: u32,
    seqs: u32,
    batched_tokens: u32,
    prefix_caching: bool,
}

/// One request's tokens and the bits of their log-probabilities, the most likely tokens' included.
type Trace = Vec<(TokenId, Vec<u32>)>;

/// Prompts of mixed lengths; every other one begins with the same tokens.
fn requests() -> Vec<Request> {
    let shared: Vec<TokenId> = (0..SHARED).map(|i| 100 + i as TokenId * 7).collect();
    (0..REQUESTS)
        .map(|i| {
            let own = (0..1 + i * 5).map(|j| 2_000 + i * 311 + j * 13);
            let prompt: Vec<TokenId> = if i % 2 == 0 {
                shared.iter().copied().chain(own).collect()
            } else {
                own.collect()
            };
            let params = SamplingParams {
                // Draws as well as greedy choices.
                temperature: if i % 3 == 0 { 0.8 } else { 0.0 },
                seed: Some(u64::from(i)),
                max_tokens: OUTPUT,
                ignore_eos: true,
                logprobs: Some(TOP),
                ..SamplingParams::default()
            };
            Request::new(prompt, params)
        })
        .collect()
}

fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap()
        .block_on(future)
}

/// Runs the trace, all at once or one after another.
fn run(dtype: Dtype, setup: &Setup, one_by_one: bool) -> (Vec<Trace>, EngineStats) {
    let runner = CpuRunner::new(&CpuRunnerConfig {
        path: model_path(),
        dtype,
        kv_cache: KvCacheSize::Blocks(setup.blocks),
        max_num_seqs: setup.seqs,
        max_num_batched_tokens: setup.batched_tokens,
        max_model_len: Some(160),
        ..CpuRunnerConfig::default()
    })
    .unwrap();
    let config = EngineConfig {
        max_num_seqs: setup.seqs,
        max_num_batched_tokens: setup.batched_tokens,
        enable_prefix_caching: setup.prefix_caching,
        ..EngineConfig::default()
    };
    let engine = Engine::start(Box::new(runner), config).unwrap();
    let collect = |request: Request| {
        let mut stream = engine.submit(request).unwrap();
        async move {
            let mut trace = Trace::new();
            let mut finish = None;
            while let Some(update) = stream.next().await {
                for token in update.tokens {
                    let logprobs = token.logprobs.unwrap();
                    let mut bits = vec![logprobs.sampled.to_bits()];
                    bits.extend(logprobs.top.iter().flat_map(|(id, p)| [*id, p.to_bits()]));
                    trace.push((token.id, bits));
                }
                finish = update.finish.or(finish);
            }
            let finish = finish.unwrap();
            assert_eq!(finish.reason, FinishReason::Length, "{:?}", finish.error);
            assert_eq!(trace.len(), OUTPUT as usize);
            trace
        }
    };
    let traces = if one_by_one {
        requests()
            .into_iter()
            .map(|r| block_on(collect(r)))
            .collect()
    } else {
        let streams: Vec<_> = requests().into_iter().map(collect).collect();
        streams.into_iter().map(block_on).collect()
    };
    let stats = engine.stats();
    engine.shutdown();
    engine.join_blocking().unwrap();
    (traces, stats)
}

fn compare(dtype: Dtype) {
    let roomy = Setup {
        blocks: 256,
        seqs: 16,
        batched_tokens: 512,
        prefix_caching: false,
    };
    let (alone, _) = run(dtype, &roomy, true);
    let same = |what: &str, setup: &Setup, one_by_one: bool| {
        let (traces, stats) = run(dtype, setup, one_by_one);
        for (index, (trace, alone)) in traces.iter().zip(&alone).enumerate() {
            assert!(trace == alone, "request {index} changes {what}");
        }
        assert_eq!(stats.failed_steps, 0);
        stats
    };
    same("in a batch", &roomy, false);
    let chunked = Setup {
        batched_tokens: 24,
        ..roomy
    };
    same("in chunks", &chunked, false);
    let cached = Setup {
        prefix_caching: true,
        ..roomy
    };
    let stats = same("with the prefix cache, alone", &cached, true);
    assert!(stats.prefix_cache_hits > 0, "nothing came from the cache");
    same("with the prefix cache, in a batch", &cached, false);
    for prefix_caching in [false, true] {
        // One whole length and a little more: sequences take blocks from each other.
        let scarce = Setup {
            blocks: 20,
            prefix_caching,
            ..roomy
        };
        let stats = same("when preempted and resumed", &scarce, false);
        assert!(stats.preemptions > 0, "nothing was preempted");
    }
}

#[test]
fn the_engine_changes_no_bit_in_exact_mode() {
    compare(Dtype::Float32);
}

#[test]
fn the_engine_changes_no_bit_in_default_mode() {
    compare(Dtype::Auto);
}
