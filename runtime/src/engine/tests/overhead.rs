//! What a step costs beside the model.

use std::time::{Duration, Instant};

use super::*;
use crate::engine::{Sequence, input::InputBuilder, request::SeqId, scheduler::Scheduler};

/// Plan, input and update of a steady decode of 256 sequences; the best of many steps, so that a busy machine does not
/// fail it.
#[test]
fn a_step_of_256_decodes_costs_under_100_microseconds() {
    let limits = RunnerLimits {
        block_size: 16,
        num_blocks: 20_000,
        max_num_seqs: 256,
        max_num_batched_tokens: 65_536,
        max_logit_rows: 256,
        max_model_len: 2048,
        vocab_size: 50_000,
        kv_bytes_per_token: 1,
    };
    let config = EngineConfig {
        max_num_batched_tokens: 65_536,
        ..EngineConfig::default()
    };
    let mut scheduler = Scheduler::new(&config, &limits);
    for id in 0..256u32 {
        let prompt = vec![id; 200];
        let sequence = Sequence::new(SeqId(id.into()), request(&prompt, 1000), &config, 16);
        scheduler.add(sequence);
    }
    let mut builder = InputBuilder::default();
    let mut costs: Vec<Duration> = Vec::new();
    for step in 0..600 {
        let start = Instant::now();
        let plan = scheduler.schedule();
        builder.prepare(&plan, &scheduler, limits.vocab_size);
        for item in plan.items.iter().filter(|item| item.samples) {
            scheduler.update(item, &[3]).unwrap();
        }
        scheduler.complete(plan.step);
        if step > 0 {
            assert_eq!(plan.num_tokens, 256);
            costs.push(start.elapsed());
        }
    }
    costs.sort_unstable();
    let best = costs[0];
    #[expect(clippy::print_stdout, reason = "a measurement is for reading")]
    {
        let median = costs[costs.len() / 2];
        println!("256 decodes: best {best:?}, median {median:?} per step");
    }
    assert!(best < Duration::from_micros(100), "{best:?} per step");
}

/// Requests that come one after another find the engine idle: what it then does for itself must not delay them, however large
/// the pool is. The best of some.
#[test]
fn a_request_after_another_does_not_wait_for_a_large_pool() {
    let mut fake = FakeConfig {
        model: FakeModel::Script(vec![3]),
        ..FakeConfig::default()
    };
    fake.limits.num_blocks = 1_000_000;
    let handle = start(fake, EngineConfig::default());
    let answer = || {
        // What a client takes between an answer and its next request.
        std::thread::sleep(Duration::from_millis(1));
        let start = Instant::now();
        collect(handle.submit(request(&[1], 1)).unwrap());
        start.elapsed()
    };
    answer();
    let best = (0..8).map(|_| answer()).min().unwrap();
    assert!(best < Duration::from_millis(1), "{best:?} for a request");
    stop(&handle);
}
