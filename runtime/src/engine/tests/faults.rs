//! A request can fail; the engine cannot because of a request.

use super::*;
use crate::{engine::SubmitError, model_runner::fake::FakeFaults};

const BAD: TokenId = 99;

fn fake(faults: FakeFaults, depth: usize) -> FakeConfig {
    FakeConfig {
        faults,
        depth,
        ..FakeConfig::default()
    }
}

fn error_of(finish: &Finish) -> &str {
    assert_eq!(finish.reason, FinishReason::Error);
    finish.error.as_deref().unwrap()
}

#[test]
fn nan_logits_fail_their_request_alone() {
    for depth in [1, 2] {
        let faults = FakeFaults {
            nan_token: Some(BAD),
            ..FakeFaults::default()
        };
        let (handle, gate) = start_gated(fake(faults, depth), EngineConfig::default());
        let good = handle.submit(request(&[1, 2, 3], 8)).unwrap();
        let bad = handle.submit(request(&[1, BAD], 8)).unwrap();
        gate.open();
        let (tokens, finish) = collect(bad);
        assert!(tokens.is_empty());
        assert!(error_of(&finish).contains("not finite"));
        assert_eq!(collect(good).0.len(), 8);
        stop(&handle);
    }
}

#[test]
fn a_failed_step_fails_its_requests_and_the_engine_goes_on() {
    for depth in [1, 2] {
        for submit in [false, true] {
            let faults = FakeFaults {
                error_token: (!submit).then_some(BAD),
                submit_error_token: submit.then_some(BAD),
                ..FakeFaults::default()
            };
            let (handle, gate) = start_gated(fake(faults, depth), EngineConfig::default());
            let prompt: Vec<u32> = (0..50).collect();
            let reference = {
                let sane = start(FakeConfig::default(), EngineConfig::default());
                let reference = collect(sane.submit(request(&prompt, 8)).unwrap());
                stop(&sane);
                reference
            };
            // The first step holds `first` alone; the next ones hold the bad one and a victim with it.
            let first = handle.submit(request(&[5], 1)).unwrap();
            gate.wait_submitted(1);
            let bad = handle.submit(request(&[BAD, 2], 8)).unwrap();
            let victim = handle.submit(request(&prompt, 8)).unwrap();
            if depth == 2 {
                // Nothing pushes step two before step one is done but its result.
                gate.allow(1);
            }
            gate.open();
            assert_eq!(collect(first).1, finish(FinishReason::Length));
            assert!(error_of(&collect(bad).1).contains("the model runner failed"));
            let (_, victims) = collect(victim);
            assert_eq!(victims.reason, FinishReason::Error);
            // What the failed step had published is gone: the same prompt computes afresh and comes out right.
            let again = handle.submit(request(&prompt, 8)).unwrap();
            assert_eq!(collect(again), reference);
            assert_eq!(handle.stats().failed_steps, 1);
            assert!(handle.stats().alive);
            stop(&handle);
        }
    }
}

#[test]
fn a_lost_device_or_a_panic_ends_every_stream_with_an_error() {
    for panics in [false, true] {
        let faults = FakeFaults {
            fatal_token: (!panics).then_some(BAD),
            panic_token: panics.then_some(BAD),
            ..FakeFaults::default()
        };
        let config = EngineConfig {
            max_num_seqs: 2,
            ..EngineConfig::default()
        };
        let (handle, gate) = start_gated(fake(faults, 1), config);
        let running = handle.submit(request(&[1], 1000)).unwrap();
        let bad = handle.submit(request(&[BAD], 8)).unwrap();
        let waiting = handle.submit(request(&[2], 8)).unwrap();
        gate.open();
        for stream in [running, bad, waiting] {
            let (_, finish) = collect(stream);
            let expected = if panics { "panic" } else { "device is lost" };
            assert!(error_of(&finish).contains(expected), "{finish:?}");
        }
        let error = handle.join_blocking().unwrap_err();
        assert!(matches!(error, SubmitError::EngineDead { .. }));
        assert_eq!(handle.submit(request(&[1], 1)).unwrap_err(), error);
        let stats = handle.stats();
        assert!(!stats.alive);
        assert_eq!((stats.running, stats.waiting), (0, 0));
    }
}

#[test]
fn what_can_never_run_is_refused_with_the_reason() {
    let mut config = FakeConfig::default();
    config.limits.num_blocks = 5;
    config.limits.max_model_len = 100;
    let handle = start(config, EngineConfig::default());
    let refused = |request| handle.submit(request).unwrap_err();
    assert_eq!(refused(request(&[], 1)), SubmitError::EmptyPrompt);
    assert_eq!(refused(request(&[1], 0)), SubmitError::NoTokensWanted);
    assert_eq!(
        refused(request(&[1; 60], 41)),
        SubmitError::TooLong {
            prompt_tokens: 60,
            max_tokens: 41,
            limit: 100
        }
    );
    assert_eq!(
        refused(request(&[1; 60], 6)),
        SubmitError::NeverFits {
            needed: 5,
            available: 4
        }
    );
    let out_of_range = SubmitError::TokenOutOfRange {
        token: 128,
        vocab_size: 128,
    };
    assert_eq!(refused(request(&[1, 128], 1)), out_of_range);
    let mut stop_id = request(&[1], 1);
    stop_id.params.stop_token_ids = vec![128];
    assert_eq!(refused(stop_id), out_of_range);
    let mut biased = request(&[1], 1);
    biased.params.logit_bias = vec![(128, 1.0)];
    assert_eq!(refused(biased), out_of_range);
    // 60 + 5 tokens are 64 computed ones: exactly 4 blocks.
    assert_eq!(
        collect(handle.submit(request(&[1; 60], 5)).unwrap())
            .0
            .len(),
        5
    );
    stop(&handle);
}

#[test]
fn sizes_of_zero_do_not_start() {
    let config = EngineConfig {
        max_num_seqs: 0,
        ..EngineConfig::default()
    };
    let runner = FakeRunner::new(FakeConfig::default());
    let error = Engine::start(Box::new(runner), config).unwrap_err();
    assert!(error.to_string().contains("max_num_seqs"));
}
