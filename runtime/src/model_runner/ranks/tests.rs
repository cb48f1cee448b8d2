#![allow(clippy::unwrap_used, missing_docs)] // Tests fail by panicking.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::{
    engine::{
        Engine, EngineConfig, SubmitError,
        request::{Request, SamplingParams},
    },
    model_runner::fake::{FakeConfig, FakeRunner},
};

/// What becomes of a rank.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    Error,
    Panic,
    Hang,
    HangAtRest,
    OtherToken,
}

/// A fake model that meets the other ranks in every step, and fails on one of them at its third.
struct Rank {
    fake: FakeRunner,
    member: Member,
    fault: Option<Fault>,
    steps: u64,
}

static HANGING: AtomicU64 = AtomicU64::new(0);

fn hang() -> ! {
    HANGING.fetch_add(1, Ordering::SeqCst);
    loop {
        thread::park();
    }
}

impl ModelRunner for Rank {
    fn limits(&self) -> &RunnerLimits {
        self.fake.limits()
    }

    fn submit(&mut self, input: &ModelInput) -> Result<StepId, RunnerError> {
        self.steps += 1;
        if self.steps == 3 {
            match self.fault {
                Some(Fault::Error) => {
                    return Err(RunnerError {
                        message: "the device fell off".to_owned(),
                        fatal: true,
                    });
                }
                Some(Fault::Panic) => panic!("injected"),
                Some(Fault::Hang) => hang(),
                Some(Fault::HangAtRest | Fault::OtherToken) | None => {}
            }
        }
        self.member.sum(&[1.0], &mut [0.0])?;
        self.fake.submit(input)
    }

    fn sample(&mut self, step: StepId, input: &SampleInput) -> Result<(), RunnerError> {
        self.fake.sample(step, input)
    }

    fn poll(&mut self, step: StepId, wait: Duration) -> Result<Option<StepOutput>, RunnerError> {
        let mut output = self.fake.poll(step, wait)?;
        if self.steps == 3
            && self.fault == Some(Fault::OtherToken)
            && let Some(output) = &mut output
        {
            output.rows[0].tokens[0].id ^= 1;
        }
        Ok(output)
    }

    fn rest(&mut self) -> Result<(), RunnerError> {
        if self.fault == Some(Fault::HangAtRest) {
            hang();
        }
        Ok(())
    }

    fn depth(&self) -> usize {
        1
    }
}

fn runner(fault: Option<(usize, Fault)>, patience: Duration) -> RankedRunner<Rank> {
    RankedRunner::start_with(3, patience, move |member| {
        Ok::<_, RankError>(Rank {
            fake: FakeRunner::new(FakeConfig::default()),
            fault: fault
                .filter(|(rank, _)| *rank == member.rank())
                .map(|(_, fault)| fault),
            member,
            steps: 0,
        })
    })
    .unwrap()
}

fn request(max_tokens: u32) -> Request {
    Request::new(
        vec![5, 6, 7],
        SamplingParams {
            max_tokens,
            ..SamplingParams::default()
        },
    )
}

/// The engine's last words once a rank has failed, and how long they took.
fn last_words(fault: Fault, rank: usize, patience: Duration) -> (String, Duration) {
    let runner = runner(Some((rank, fault)), patience);
    let engine = Engine::start(Box::new(runner), EngineConfig::default()).unwrap();
    let started = Instant::now();
    // At rest there is no request to be had.
    let _stream = (fault != Fault::HangAtRest).then(|| engine.submit(request(100)).unwrap());
    let error = engine.join_blocking().unwrap_err();
    assert!(matches!(error, SubmitError::EngineDead { .. }), "{error}");
    (error.to_string(), started.elapsed())
}

#[test]
fn whatever_befalls_a_rank_stops_the_engine_with_its_name() {
    let patience = Duration::from_secs(1);
    for (fault, words) in [
        (Fault::Error, "tensor-parallel rank 2: the device fell off"),
        (Fault::Panic, "tensor-parallel rank 2 panicked"),
        (
            Fault::Hang,
            "tensor-parallel rank 2 has not answered for 1 s: it hangs",
        ),
        (
            Fault::HangAtRest,
            "tensor-parallel rank 2 has not answered for 1 s: it hangs",
        ),
        (Fault::OtherToken, "it drew other tokens than rank 0"),
    ] {
        let (message, took) = last_words(fault, 2, patience);
        assert!(message.contains(words), "{fault:?}: {message}");
        assert!(took < Duration::from_secs(10), "{fault:?} took {took:?}");
    }
    assert_eq!(HANGING.load(Ordering::SeqCst), 2);
}

#[test]
fn a_panic_of_the_leader_is_told_by_the_engine() {
    let (message, took) = last_words(Fault::Panic, 0, Duration::from_secs(60));
    assert!(message.contains("injected"), "{message}");
    assert!(took < Duration::from_secs(10), "{took:?}");
}

#[test]
fn a_hanging_rank_is_told_within_ten_seconds_at_the_patience_in_force() {
    assert!(STEP_PATIENCE + GRACE < Duration::from_secs(10));
}

#[test]
fn a_rank_that_cannot_start_is_the_error_of_all() {
    let started = RankedRunner::start(3, |member| {
        if member.rank() == 1 {
            return Err(RankError {
                message: "no memory".to_owned(),
            });
        }
        member.exchange(())?;
        Ok(Rank {
            fake: FakeRunner::new(FakeConfig::default()),
            member,
            fault: None,
            steps: 0,
        })
    });
    let message = started.err().unwrap().message;
    assert!(
        message.starts_with("tensor-parallel rank 1 cannot start: no memory"),
        "{message}"
    );
}

#[test]
fn ranks_answer_as_one_runner_does() {
    let answer = |runner: Box<dyn ModelRunner>| {
        let engine = Engine::start(runner, EngineConfig::default()).unwrap();
        let mut stream = engine.submit(request(40)).unwrap();
        let mut tokens = Vec::new();
        while let Some(update) = stream.next_blocking() {
            tokens.extend(update.tokens.iter().map(|token| token.id));
        }
        engine.shutdown();
        engine.join_blocking().unwrap();
        tokens
    };
    let one = answer(Box::new(FakeRunner::new(FakeConfig::default())));
    assert_eq!(one.len(), 40);
    assert_eq!(answer(Box::new(runner(None, STEP_PATIENCE))), one);
}
