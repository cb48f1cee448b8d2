#![allow(clippy::unwrap_used)] // a test may panic

use super::*;
use crate::{
    bench::{
        roofline::{Roofline, RooflineRunner},
        trace::{Shape, jobs},
    },
    model_runner::fake::{FakeConfig, FakeModel, FakeRunner},
};

const LENGTH: u32 = 256;

/// Room for three whole sequences.
fn limits() -> RunnerLimits {
    RunnerLimits {
        block_size: 16,
        num_blocks: 3 * LENGTH / 16 + 1,
        max_num_seqs: 64,
        max_num_batched_tokens: 512,
        max_logit_rows: 64,
        max_model_len: LENGTH,
        vocab_size: 128,
        kv_bytes_per_token: 1000,
    }
}

fn trace() -> Vec<Job> {
    let shape = Shape {
        input: 12,
        output: 10,
        lognormal: true,
        shared_prefix: 0,
        max_model_len: LENGTH as usize,
    };
    jobs(&shape, 60, 128, 1)
}

fn config() -> EngineConfig {
    EngineConfig {
        max_num_seqs: 64,
        max_num_queued_reqs: 100,
        ..EngineConfig::default()
    }
}

#[tokio::test]
async fn contiguous_serves_what_its_length_allows_and_pages_serve_many_times_that() {
    let runner = || {
        let (runner, clock) = RooflineRunner::new(limits(), Roofline::LARGE_GPU_8B);
        Ok::<TimedRunner, String>((Box::new(runner), clock))
    };
    let report = compare(runner, &config(), &trace(), Answers::Same)
        .await
        .unwrap();
    assert_eq!(
        report.contiguous.peak_running, 3,
        "the cache holds three whole lengths"
    );
    assert_eq!(report.kv_cache_bytes, 3 * u64::from(LENGTH) * 1000);
    assert!(report.paged.peak_running > 15, "{report:?}");
    assert!(
        report.users_ratio > 5.0 && report.throughput_ratio > 2.0,
        "{report:?}"
    );
    assert!(
        report.contiguous.mean_running <= 3.0 && report.contiguous.mean_running > 2.0,
        "{report:?}"
    );
    assert!(report.paged.wall_s < report.contiguous.wall_s);
    assert_eq!(report.same_answers, report.requests);
}

#[tokio::test]
async fn different_tokens_are_refused_or_counted() {
    for answers in [Answers::Same, Answers::Counted] {
        let mut token = 20;
        let runner = || {
            token += 1;
            let model = FakeModel::Script(vec![token]);
            let runner = FakeRunner::new(FakeConfig {
                limits: limits(),
                model,
                ..FakeConfig::default()
            });
            Ok::<TimedRunner, String>((Box::new(runner), Clock::real()))
        };
        match compare(runner, &config(), &trace(), answers).await {
            Err(error) => {
                assert_eq!(answers, Answers::Same);
                assert!(matches!(error, ConcurrencyError::Check(_)), "{error}");
            }
            Ok(report) => assert_eq!((answers, report.same_answers), (Answers::Counted, 0)),
        }
    }
}

#[tokio::test]
async fn a_request_that_fails_is_no_result() {
    let runner = || {
        let (runner, clock) = RooflineRunner::new(limits(), Roofline::LARGE_GPU_8B);
        Ok::<TimedRunner, String>((Box::new(runner), clock))
    };
    let too_long = [Job {
        prompt: vec![11; 250],
        output: 20,
    }];
    let error = compare(runner, &config(), &too_long, Answers::Same)
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            ConcurrencyError::Request {
                mode: "contiguous",
                ..
            }
        ),
        "{error}"
    );
    let error = compare(
        || Err("no GPU".to_owned()),
        &config(),
        &trace(),
        Answers::Same,
    )
    .await
    .unwrap_err();
    assert!(error.to_string().contains("no GPU"), "{error}");
}
