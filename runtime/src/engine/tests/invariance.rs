//! A sequence's tokens depend on its request alone: not on company, chunks, preemption, prefix cache, depth or
//! reservation. The fake model reads its whole context through the block tables, so any slip changes tokens.

use std::cell::Cell;

use proptest::{prelude::*, test_runner::TestRunner};

use super::*;
use crate::engine::KvReservation;

#[derive(Debug, Clone)]
struct Setup {
    num_blocks: u32,
    block_size: u32,
    max_num_seqs: u32,
    max_num_batched_tokens: u32,
    threshold: u32,
    prefix_caching: bool,
    depth: usize,
    reservation: KvReservation,
}

const MAX_LEN: u32 = 96;

fn setup() -> impl Strategy<Value = Setup> {
    (
        prop_oneof![Just(4u32), Just(16)],
        0u32..30,
        1u32..9,
        8u32..64,
        prop_oneof![Just(0u32), 1u32..9],
        any::<bool>(),
        1usize..3,
        prop_oneof![4 => Just(KvReservation::Paged), 1 => Just(KvReservation::Contiguous)],
    )
        .prop_map(
            |(
                block_size,
                spare,
                max_num_seqs,
                budget,
                threshold,
                prefix_caching,
                depth,
                reservation,
            )| Setup {
                // Barely one request of full length, or a little more: preemption is the rule.
                num_blocks: MAX_LEN / block_size + 1 + spare * 4 / block_size,
                block_size,
                max_num_seqs,
                max_num_batched_tokens: budget,
                threshold,
                prefix_caching,
                depth,
                reservation,
            },
        )
}

/// Prompts over few tokens, so that prefixes repeat; a mix of greedy and seeded draws with penalties.
fn requests() -> impl Strategy<Value = Vec<Request>> {
    let one = (
        prop::collection::vec(0u32..3, 1..50),
        prop::sample::select(vec![3usize, 17, 33]),
        1u32..30,
        any::<u64>(),
        prop_oneof![Just(0.0f32), Just(0.9)],
        prop_oneof![Just(0.0f32), Just(0.4)],
        prop::option::weighted(0.3, 0u32..2),
    )
        .prop_map(
            |(tail, shared, max_tokens, seed, temperature, penalty, salt)| {
                let mut prompt: Vec<u32> = (0..shared as u32).map(|i| i % 5).collect();
                prompt.extend(tail);
                prompt.truncate(60);
                let params = SamplingParams {
                    temperature,
                    seed: Some(seed),
                    top_k: 20,
                    presence_penalty: penalty,
                    repetition_penalty: 1.0 + penalty,
                    max_tokens,
                    min_tokens: 1,
                    stop_token_ids: vec![9],
                    ..SamplingParams::default()
                };
                Request {
                    cache_salt: salt.map(|tenant| tenant.to_string()),
                    ..Request::new(prompt, params)
                }
            },
        );
    prop::collection::vec(one, 1..14)
}

fn fake(setup: &Setup) -> FakeConfig {
    FakeConfig {
        limits: RunnerLimits {
            block_size: setup.block_size,
            num_blocks: setup.num_blocks,
            max_num_seqs: setup.max_num_seqs,
            max_num_batched_tokens: setup.max_num_batched_tokens,
            max_logit_rows: setup.max_num_seqs + 3,
            max_model_len: MAX_LEN,
            vocab_size: 50,
            kv_bytes_per_token: 1,
        },
        depth: setup.depth,
        eos_token_ids: vec![11],
        ..FakeConfig::default()
    }
}

fn run_all(setup: &Setup, requests: &[Request]) -> (Vec<(Vec<TokenId>, Finish)>, u64) {
    let config = EngineConfig {
        max_num_seqs: setup.max_num_seqs,
        max_num_batched_tokens: setup.max_num_batched_tokens,
        long_prefill_token_threshold: setup.threshold,
        enable_prefix_caching: setup.prefix_caching,
        eos_token_ids: vec![11],
        reservation: setup.reservation,
        ..EngineConfig::default()
    };
    // All requests are there before the first step ends, so that a case runs the same way each time.
    let (handle, gate) = start_gated(fake(setup), config);
    let streams: Vec<_> = requests
        .iter()
        .map(|request| handle.submit(request.clone()).unwrap())
        .collect();
    gate.open();
    let results = streams.into_iter().map(collect).collect();
    let preemptions = handle.stats().preemptions;
    stop(&handle);
    (results, preemptions)
}

/// Each request by itself, unchunked, nothing shared.
fn alone(requests: &[Request]) -> Vec<(Vec<TokenId>, Finish)> {
    let setup = Setup {
        num_blocks: 64,
        block_size: 8,
        max_num_seqs: 1,
        max_num_batched_tokens: MAX_LEN,
        threshold: 0,
        prefix_caching: false,
        depth: 1,
        reservation: KvReservation::Paged,
    };
    let one = |request: &Request| run_all(&setup, std::slice::from_ref(request)).0.remove(0);
    requests.iter().map(one).collect()
}

#[test]
fn tokens_depend_on_the_request_alone() {
    let preempted = Cell::new(0);
    let mut runner = TestRunner::new(ProptestConfig::with_cases(200));
    runner
        .run(&(setup(), requests()), |(setup, requests)| {
            let (together, preemptions) = run_all(&setup, &requests);
            preempted.set(preempted.get() + preemptions);
            prop_assert_eq!(together, alone(&requests));
            Ok(())
        })
        .unwrap();
    // The loads must really preempt, or the property says nothing about it.
    assert!(preempted.get() > 20, "{} preemptions", preempted.get());
}

#[test]
fn a_repeated_prompt_hits_the_prefix_cache_and_says_so() {
    let handle = start(FakeConfig::default(), EngineConfig::default());
    let prompt: Vec<u32> = (0..100).collect();
    let mut cached = Vec::new();
    let mut outputs = Vec::new();
    for _ in 0..2 {
        let mut stream = handle.submit(request(&prompt, 4)).unwrap();
        cached.push(stream.next_blocking().unwrap().cached_prompt_tokens);
        drop(stream);
        outputs.push(collect(handle.submit(request(&prompt, 4)).unwrap()));
    }
    assert_eq!(cached, [0, 96]);
    assert_eq!(outputs[0], outputs[1]);
    let other_tenant = Request {
        cache_salt: Some("other".to_owned()),
        ..request(&prompt, 4)
    };
    let mut stream = handle.submit(other_tenant).unwrap();
    assert_eq!(stream.next_blocking().unwrap().cached_prompt_tokens, 0);
    drop(stream);
    let stats = handle.stats();
    assert_eq!(stats.prefix_cache_queries, 500);
    assert_eq!(stats.prefix_cache_hits, 3 * 96);
    stop(&handle);
}

#[test]
fn a_request_without_a_seed_draws_from_the_engines() {
    let run = |seed| {
        let config = EngineConfig {
            seed,
            ..EngineConfig::default()
        };
        let handle = start(FakeConfig::default(), config);
        let mut unseeded = request(&[1, 2, 3], 20);
        unseeded.params.temperature = 1.0;
        let first = collect(handle.submit(unseeded.clone()).unwrap()).0;
        let second = collect(handle.submit(unseeded).unwrap()).0;
        stop(&handle);
        (first, second)
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
    assert_ne!(run(1).0, run(1).1);
}

#[test]
fn choices_of_one_seeded_request_differ() {
    let handle = start(FakeConfig::default(), EngineConfig::default());
    let choice = |choice_index| {
        let mut seeded = request(&[1, 2, 3], 20);
        seeded.params.temperature = 1.0;
        seeded.params.seed = Some(5);
        seeded.choice_index = choice_index;
        collect(handle.submit(seeded).unwrap()).0
    };
    assert_eq!(choice(0), choice(0));
    assert_ne!(choice(0), choice(1));
    stop(&handle);
}
