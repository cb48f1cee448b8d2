//! A fixed number of requests, at most so many at once, the next as soon as one ends.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use super::{
    report::{Outcome, Report},
    trace::{Job, Scenario, jobs},
};

/// Sends one job and measures it.
pub trait Target: Clone + Send + Sync + 'static {
    /// Measures one request; the error is what the user should read.
    fn run(&self, job: &Job) -> impl Future<Output = Result<Outcome, String>> + Send;
}

/// Runs all jobs; results are in no particular order.
pub async fn run_all<T: Target>(
    target: &T,
    work: Vec<Job>,
    concurrency: usize,
) -> Vec<Result<Outcome, String>> {
    let work = Arc::new(work);
    let next = Arc::new(AtomicUsize::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..concurrency.clamp(1, work.len().max(1)) {
        let (target, work, next) = (target.clone(), Arc::clone(&work), Arc::clone(&next));
        tasks.spawn(async move {
            let mut results = Vec::new();
            while let Some(job) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
                results.push(target.run(job).await);
            }
            results
        });
    }
    tasks.join_all().await.into_iter().flatten().collect()
}

/// Warms up, then measures a scenario.
///
/// # Errors
/// The first failure of the warm-up: nothing was measured then.
pub async fn measure<T: Target>(
    target: &T,
    scenario: &Scenario,
    vocab_size: u32,
    max_model_len: usize,
    seed: u64,
) -> Result<Report, String> {
    let shape = scenario.shape(max_model_len);
    // Other prompts than the measured ones: a prefix cache must not know them, except for the shared prefix.
    for result in run_all(
        target,
        warmup_jobs(scenario, &shape, vocab_size, seed),
        scenario.concurrency,
    )
    .await
    {
        result?;
    }
    let work = jobs(&shape, scenario.requests, vocab_size, seed);
    let start = Instant::now();
    let results = run_all(target, work, scenario.concurrency).await;
    Ok(Report::new(
        scenario.name,
        results,
        start.elapsed().as_secs_f64(),
    ))
}

fn warmup_jobs(
    scenario: &Scenario,
    shape: &super::trace::Shape,
    vocab_size: u32,
    seed: u64,
) -> Vec<Job> {
    jobs(shape, scenario.warmup, vocab_size, seed ^ 0xffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Counting {
        inside: Arc<AtomicUsize>,
        most: Arc<AtomicUsize>,
        seen: Arc<AtomicUsize>,
    }

    impl Target for Counting {
        async fn run(&self, job: &Job) -> Result<Outcome, String> {
            let inside = self.inside.fetch_add(1, Ordering::SeqCst) + 1;
            self.most.fetch_max(inside, Ordering::SeqCst);
            // Every other task gets its turn before this one ends.
            for _ in 0..50 {
                tokio::task::yield_now().await;
            }
            self.inside.fetch_sub(1, Ordering::SeqCst);
            match self.seen.fetch_add(1, Ordering::SeqCst) {
                5 => Err("sixth".to_owned()),
                _ => Ok(Outcome {
                    input: job.prompt.len(),
                    output: job.output,
                    ..Outcome::default()
                }),
            }
        }
    }

    #[tokio::test]
    async fn runs_every_job_once_and_keeps_to_its_bound() {
        let target = Counting::default();
        let shape = Scenario {
            requests: 20,
            ..super::super::trace::SCENARIOS[0]
        }
        .shape(4096);
        let results = run_all(&target, jobs(&shape, 20, 1000, 1), 4).await;
        assert_eq!(
            (
                results.len(),
                results.iter().filter(|result| result.is_err()).count()
            ),
            (20, 1)
        );
        assert_eq!(target.most.load(Ordering::SeqCst), 4);
    }

    #[tokio::test]
    async fn a_failing_warm_up_measures_nothing() {
        let target = Counting::default();
        let scenario = Scenario {
            warmup: 8,
            concurrency: 2,
            ..super::super::trace::SCENARIOS[0]
        };
        assert_eq!(
            measure(&target, &scenario, 1000, 4096, 1).await,
            Err("sixth".to_owned())
        );
        assert_eq!(target.seen.load(Ordering::SeqCst), 8);
    }
}
