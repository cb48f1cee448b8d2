//! The claim that paging was made for: on the same cache bytes, pages serve many times the users that reserving the
//! model's whole length for each request does.
//!
//! The same trace runs twice, everything submitted at once: with [`KvReservation::Contiguous`], then with
//! [`KvReservation::Paged`]. Where a token does not depend on its batch, the tokens of both runs must be the same, or nothing
//! is reported; elsewhere it is reported how many requests had the same.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use serde::Serialize;

use super::{CheckError, engine::EngineTarget, report::round, roofline::Clock, trace::Job};
use crate::{
    engine::{
        Engine, EngineConfig, EngineHandle, EngineObserver, KvReservation, StepReport,
        request::TokenId,
    },
    model_runner::{ModelRunner, RunnerLimits},
};

/// Why no comparison came out.
#[derive(Debug, thiserror::Error)]
pub enum ConcurrencyError {
    /// A runner or an engine could not be made.
    #[error("cannot start the engine: {0}")]
    Start(String),
    /// A request failed.
    #[error("a request failed with {mode} reservation: {message}")]
    Request {
        /// `contiguous` or `paged`.
        mode: &'static str,
        /// What the engine said.
        message: String,
    },
    /// The runs differ.
    #[error(transparent)]
    Check(#[from] CheckError),
}

/// One mode's figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModeReport {
    /// Most requests running at once.
    pub peak_running: u32,
    /// Mean of the requests running, over time, while others waited for a place.
    pub mean_running: f64,
    /// Seconds until the last request had its last token.
    pub wall_s: f64,
    /// Generated tokens per second.
    pub out_tok_s: f64,
    /// Steps of the engine.
    pub steps: u64,
    /// Requests that lost their blocks and were computed again.
    pub preemptions: u64,
}

/// Both, and what pages gained.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ConcurrencyReport {
    /// Requests of the trace.
    pub requests: usize,
    /// Prompt tokens of the trace.
    pub prompt_tokens: usize,
    /// Output tokens of the trace.
    pub output_tokens: usize,
    /// Bytes of KV cache in both modes.
    pub kv_cache_bytes: u64,
    /// What contiguous reservation takes per request, in tokens.
    pub max_model_len: u32,
    /// The model's whole length for each request.
    pub contiguous: ModeReport,
    /// Block by block.
    pub paged: ModeReport,
    /// Users at once, paged to contiguous: means.
    pub users_ratio: f64,
    /// Users at once, paged to contiguous: peaks.
    pub peak_ratio: f64,
    /// Output tokens per second, paged to contiguous.
    pub throughput_ratio: f64,
    /// Requests that got the same tokens both times.
    pub same_answers: usize,
}

/// What is asked of the answers of both runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answers {
    /// They are the same, or nothing is reported.
    Same,
    /// Those that are the same are counted: a product's last bits depend on the batch.
    Counted,
}

/// A runner and the clock that its work takes.
pub type TimedRunner = (Box<dyn ModelRunner>, Clock);

/// Runs the trace in both modes. `runner` makes one runner per mode; both must have the same limits.
///
/// # Errors
/// [`ConcurrencyError`]: no engine, a failed request, or different tokens.
pub async fn compare<R>(
    mut runner: R,
    config: &EngineConfig,
    jobs: &[Job],
    answers: Answers,
) -> Result<ConcurrencyReport, ConcurrencyError>
where
    R: FnMut() -> Result<TimedRunner, String>,
{
    let mut mode = async |reservation| {
        let runner = runner().map_err(ConcurrencyError::Start)?;
        run_mode(
            runner,
            EngineConfig {
                reservation,
                ..config.clone()
            },
            jobs,
        )
        .await
    };
    let (contiguous, old_tokens, limits) = mode(KvReservation::Contiguous).await?;
    let (paged, new_tokens, new_limits) = mode(KvReservation::Paged).await?;
    if limits.num_blocks != new_limits.num_blocks {
        return Err(ConcurrencyError::Start(
            "the two runners have caches of different size".to_owned(),
        ));
    }
    let same = |(old, new): (&Vec<TokenId>, &Vec<TokenId>)| old == new;
    let pairs = || old_tokens.iter().zip(&new_tokens);
    let differs = pairs().position(|pair| !same(pair));
    if let (Answers::Same, Some(at)) = (answers, differs) {
        return Err(CheckError(format!(
            "request {at} got other tokens with pages than with contiguous reservation"
        ))
        .into());
    }
    let tokens = u64::from(limits.block_size) * u64::from(limits.num_blocks.saturating_sub(1));
    Ok(ConcurrencyReport {
        requests: jobs.len(),
        prompt_tokens: jobs.iter().map(|job| job.prompt.len()).sum(),
        output_tokens: jobs.iter().map(|job| job.output).sum(),
        kv_cache_bytes: tokens * limits.kv_bytes_per_token,
        max_model_len: limits.max_model_len,
        users_ratio: round(paged.mean_running / contiguous.mean_running, 2),
        peak_ratio: round(
            f64::from(paged.peak_running) / f64::from(contiguous.peak_running),
            2,
        ),
        throughput_ratio: round(paged.out_tok_s / contiguous.out_tok_s, 2),
        same_answers: pairs().filter(|pair| same(*pair)).count(),
        contiguous,
        paged,
    })
}

type ModeResult = (ModeReport, Vec<Vec<TokenId>>, RunnerLimits);

async fn run_mode(
    (runner, clock): TimedRunner,
    config: EngineConfig,
    jobs: &[Job],
) -> Result<ModeResult, ConcurrencyError> {
    let mode = match config.reservation {
        KvReservation::Contiguous => "contiguous",
        KvReservation::Paged => "paged",
    };
    let counter = Arc::new(Counter::new(clock.clone()));
    let engine = Engine::start_observed(runner, config, counter.clone())
        .map_err(|error| ConcurrencyError::Start(error.to_string()))?;
    // Set once, before the first request and so before the first step.
    let _ = counter.engine.set(engine.clone());
    let target = EngineTarget::new(engine.clone());
    let start = clock.seconds();
    let results = futures::future::join_all(jobs.iter().map(|job| target.tokens(job))).await;
    let wall = clock.seconds() - start;
    let stats = engine.stats();
    engine.shutdown();
    let failed = |message: String| ConcurrencyError::Request { mode, message };
    engine
        .join()
        .await
        .map_err(|error| failed(error.to_string()))?;
    let tokens = results
        .into_iter()
        .map(|result| result.map(|(_, tokens)| tokens))
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)?;
    let (peak_running, mean_running) = counter.figures();
    let report = ModeReport {
        peak_running,
        mean_running: round(mean_running, 2),
        wall_s: round(wall, 3),
        out_tok_s: round(tokens.iter().map(Vec::len).sum::<usize>() as f64 / wall, 1),
        steps: stats.steps,
        preemptions: stats.preemptions,
    };
    Ok((report, tokens, engine.limits().clone()))
}

/// Counts, after every step, who runs and whether anyone waits.
struct Counter {
    engine: OnceLock<EngineHandle>,
    clock: Clock,
    sums: Mutex<Sums>,
}

#[derive(Default)]
struct Sums {
    peak: u32,
    /// The clock at the last step.
    last: f64,
    /// While others wait: seconds, and running × seconds.
    seconds: f64,
    weighted: f64,
    /// The same over all steps, for a trace that never waits.
    all_seconds: f64,
    all_weighted: f64,
}

impl Counter {
    fn new(clock: Clock) -> Self {
        let sums = Sums {
            last: clock.seconds(),
            ..Sums::default()
        };
        Self {
            engine: OnceLock::new(),
            clock,
            sums: Mutex::new(sums),
        }
    }

    fn figures(&self) -> (u32, f64) {
        let sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let mean = if sums.seconds > 0.0 {
            sums.weighted / sums.seconds
        } else {
            sums.all_weighted / sums.all_seconds
        };
        (sums.peak, mean)
    }
}

impl EngineObserver for Counter {
    fn on_step(&self, _report: &StepReport<'_>) {
        let Some(stats) = self.engine.get().map(EngineHandle::stats) else {
            return;
        };
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.clock.seconds();
        let (seconds, running) = (now - sums.last, f64::from(stats.running));
        sums.last = now;
        sums.peak = sums.peak.max(stats.running);
        sums.all_seconds += seconds;
        sums.all_weighted += seconds * running;
        if stats.waiting > 0 {
            sums.seconds += seconds;
            sums.weighted += seconds * running;
        }
    }
}

#[cfg(test)]
#[path = "concurrency/tests.rs"]
mod tests;
