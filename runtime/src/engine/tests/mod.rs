#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod constraints;
mod embeddings;
mod faults;
mod invariance;
mod lifecycle;
mod overhead;
mod scheduler;

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::{
    Engine, EngineConfig, EngineHandle, Finish, SequenceStream,
    request::{FinishReason, Request, SamplingParams, TokenId},
};
use crate::model_runner::{
    ModelInput, ModelRunner, RunnerError, RunnerLimits, SampleInput, StepId, StepOutput,
    fake::{FakeConfig, FakeModel, FakeRunner},
};

fn start(fake: FakeConfig, config: EngineConfig) -> EngineHandle {
    Engine::start(Box::new(FakeRunner::new(fake)), config).unwrap()
}

fn request(prompt: &[TokenId], max_tokens: u32) -> Request {
    Request::new(
        prompt,
        SamplingParams {
            temperature: 0.0,
            max_tokens,
            ..SamplingParams::default()
        },
    )
}

/// Everything a stream gives.
fn collect(mut stream: SequenceStream) -> (Vec<TokenId>, Finish) {
    let mut tokens = Vec::new();
    while let Some(update) = stream.next_blocking() {
        tokens.extend(update.tokens.iter().map(|token| token.id));
        if let Some(finish) = update.finish {
            assert!(stream.next_blocking().is_none());
            return (tokens, finish);
        }
    }
    panic!("the stream ended without a finish");
}

fn finish(reason: FinishReason) -> Finish {
    Finish::because(reason)
}
/// Ends the engine and checks that nothing is left in it.
fn stop(handle: &EngineHandle) {
    handle.shutdown();
    handle.join_blocking().unwrap();
    let stats = handle.stats();
    assert_eq!((stats.running, stats.waiting), (0, 0));
    assert_eq!(stats.blocks_free, stats.blocks_total, "blocks leaked");
}

/// Lets a test decide when steps finish.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<GateState>, Condvar)>);

#[derive(Default)]
struct GateState {
    /// Steps that may finish.
    permits: u64,
    /// Steps submitted.
    submitted: u64,
}

impl Gate {
    fn allow(&self, steps: u64) {
        let mut state = self.0.0.lock().unwrap();
        state.permits = state.permits.saturating_add(steps);
        self.0.1.notify_all();
    }

    fn open(&self) {
        self.allow(u64::MAX);
    }

    /// Waits until `steps` steps were submitted.
    fn wait_submitted(&self, steps: u64) {
        let state = self.0.0.lock().unwrap();
        drop(
            self.0
                .1
                .wait_while(state, |state| state.submitted < steps)
                .unwrap(),
        );
    }
}

/// A fake runner whose steps finish when the gate lets them.
struct Gated {
    inner: FakeRunner,
    gate: Gate,
}

impl ModelRunner for Gated {
    fn limits(&self) -> &RunnerLimits {
        self.inner.limits()
    }

    fn submit(&mut self, input: &ModelInput) -> Result<StepId, RunnerError> {
        let step = self.inner.submit(input);
        self.gate.0.0.lock().unwrap().submitted += 1;
        self.gate.0.1.notify_all();
        step
    }

    fn sample(&mut self, step: StepId, input: &SampleInput) -> Result<(), RunnerError> {
        self.inner.sample(step, input)
    }

    fn poll(&mut self, step: StepId, wait: Duration) -> Result<Option<StepOutput>, RunnerError> {
        let state = self.gate.0.0.lock().unwrap();
        let (mut state, timeout) = self
            .gate
            .0
            .1
            .wait_timeout_while(state, wait, |state| state.permits == 0)
            .unwrap();
        if timeout.timed_out() {
            return Ok(None);
        }
        state.permits -= 1;
        drop(state);
        self.inner.poll(step, Duration::MAX)
    }

    fn depth(&self) -> usize {
        self.inner.depth()
    }
}

fn start_gated(fake: FakeConfig, config: EngineConfig) -> (EngineHandle, Gate) {
    let gate = Gate::default();
    let runner = Gated {
        inner: FakeRunner::new(fake),
        gate: gate.clone(),
    };
    (Engine::start(Box::new(runner), config).unwrap(), gate)
}
