//! A fake GPU for the concurrency comparison: the fake model's tokens, and a clock that advances by what a step would
//! take if it were limited by memory or arithmetic alone.
//!
//! Nothing here is a claim about a real GPU's speed; users served at once do not depend on it, throughput ratios do.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::model_runner::{
    ModelInput, ModelRunner, RunnerError, RunnerLimits, SampleInput, StepId, StepOutput,
    fake::{FakeConfig, FakeRunner},
};

/// What limits a step.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Roofline {
    /// Bytes of weights, read once in every step.
    pub weight_bytes: f64,
    /// Floating-point operations per token: twice the parameters.
    pub flop_per_token: f64,
    /// Bytes per second from device memory.
    pub bytes_per_s: f64,
    /// Operations per second.
    pub flop_per_s: f64,
}

impl Roofline {
    /// A dense model of 8 billion parameters in 16 bits, on a GPU that reads 4.55 TB/s and multiplies at 695 TFLOP/s.
    pub const LARGE_GPU_8B: Self = Self {
        weight_bytes: 16.06e9,
        flop_per_token: 16.06e9,
        bytes_per_s: 4.55e12,
        flop_per_s: 695e12,
    };

    /// Seconds of a step.
    #[must_use]
    pub fn seconds(&self, input: &ModelInput, kv_bytes_per_token: u64) -> f64 {
        let context: u64 = input
            .seqs
            .iter()
            .map(|seq| u64::from(seq.context_len))
            .sum();
        let memory =
            (self.weight_bytes + context as f64 * kv_bytes_per_token as f64) / self.bytes_per_s;
        let arithmetic = input.token_ids.len() as f64 * self.flop_per_token / self.flop_per_s;
        memory.max(arithmetic)
    }
}

/// Time as the measured system has it.
#[derive(Debug, Clone)]
pub enum Clock {
    /// The wall's.
    Real(Instant),
    /// The roofline's, in nanoseconds.
    Modelled(Arc<AtomicU64>),
}

impl Clock {
    /// Starts now.
    #[must_use]
    pub fn real() -> Self {
        Self::Real(Instant::now())
    }

    /// Starts at 0 and is advanced by a [`RooflineRunner`].
    #[must_use]
    pub fn modelled() -> Self {
        Self::Modelled(Arc::default())
    }

    /// Seconds since the start.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        match self {
            Self::Real(start) => start.elapsed().as_secs_f64(),
            Self::Modelled(nanos) => {
                Duration::from_nanos(nanos.load(Ordering::Relaxed)).as_secs_f64()
            }
        }
    }
}

/// The fake runner, with a clock.
pub struct RooflineRunner {
    fake: FakeRunner,
    roofline: Roofline,
    nanos: Arc<AtomicU64>,
}

impl RooflineRunner {
    /// A fake of these sizes and its clock.
    #[must_use]
    pub fn new(limits: RunnerLimits, roofline: Roofline) -> (Self, Clock) {
        let nanos = Arc::new(AtomicU64::new(0));
        let clock = Clock::Modelled(Arc::clone(&nanos));
        let fake = FakeRunner::new(FakeConfig {
            limits,
            ..FakeConfig::default()
        });
        (
            Self {
                fake,
                roofline,
                nanos,
            },
            clock,
        )
    }
}

impl ModelRunner for RooflineRunner {
    fn limits(&self) -> &RunnerLimits {
        self.fake.limits()
    }

    fn submit(&mut self, input: &ModelInput) -> Result<StepId, RunnerError> {
        let seconds = self
            .roofline
            .seconds(input, self.fake.limits().kv_bytes_per_token);
        // Saturating by definition of `as`.
        self.nanos
            .fetch_add((seconds * 1e9) as u64, Ordering::Relaxed);
        self.fake.submit(input)
    }

    fn sample(&mut self, step: StepId, input: &SampleInput) -> Result<(), RunnerError> {
        self.fake.sample(step, input)
    }

    fn poll(&mut self, step: StepId, wait: Duration) -> Result<Option<StepOutput>, RunnerError> {
        self.fake.poll(step, wait)
    }

    fn depth(&self) -> usize {
        self.fake.depth()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model_runner::{SeqInput, Slot};

    #[test]
    fn a_step_takes_the_larger_of_memory_and_arithmetic() {
        let roofline = Roofline {
            weight_bytes: 100.0,
            flop_per_token: 10.0,
            bytes_per_s: 100.0,
            flop_per_s: 10.0,
        };
        let step = |tokens: usize, context_len| ModelInput {
            token_ids: vec![1; tokens],
            seqs: vec![SeqInput {
                slot: Slot(0),
                query_start: 0,
                query_len: tokens as u32,
                context_len,
                block_table: Vec::new(),
            }],
            ..ModelInput::default()
        };
        assert_eq!(
            roofline.seconds(&step(1, 50), 2),
            2.0,
            "100 bytes of weights and 100 of cache"
        );
        assert_eq!(roofline.seconds(&step(7, 7), 2), 7.0);
    }
}
