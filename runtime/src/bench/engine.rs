//! An engine in this process as a target.

use std::time::Instant;

use super::{closed_loop::Target, report::Outcome, trace::Job};
use crate::engine::{
    EngineHandle,
    request::{FinishReason, Request, SamplingParams, TokenId},
};

/// The engine, greedy and past end-of-sequence, so that every run does the same work.
#[derive(Clone, Debug)]
pub struct EngineTarget {
    engine: EngineHandle,
}

impl EngineTarget {
    /// Measures `engine`.
    #[must_use]
    pub fn new(engine: EngineHandle) -> Self {
        Self { engine }
    }

    /// Runs one job and hands back its tokens too.
    ///
    /// # Errors
    /// In words, when the engine does not take the request or ends it early.
    pub async fn tokens(&self, job: &Job) -> Result<(Outcome, Vec<TokenId>), String> {
        let max_tokens = u32::try_from(job.output)
            .map_err(|_| "an output of more than 2³² tokens".to_owned())?;
        let params = SamplingParams {
            temperature: 0.0,
            max_tokens,
            ignore_eos: true,
            ..SamplingParams::default()
        };
        let request = Request::new(job.prompt.as_slice(), params);
        let start = Instant::now();
        let mut stream = self
            .engine
            .submit(request)
            .map_err(|error| error.to_string())?;
        let (mut tokens, mut first, mut last, mut itl) =
            (Vec::with_capacity(job.output), None, start, Vec::new());
        let mut finish = None;
        while let Some(update) = stream.next().await {
            if !update.tokens.is_empty() {
                let now = Instant::now();
                match first {
                    None => first = Some(now),
                    Some(_) => itl.push((now - last).as_secs_f64()),
                }
                last = now;
            }
            tokens.extend(update.tokens.iter().map(|token| token.id));
            finish = update.finish.or(finish);
        }
        let finish = finish.ok_or("the engine went away")?;
        if finish.reason != FinishReason::Length || tokens.len() != job.output {
            let reason = finish
                .error
                .unwrap_or_else(|| finish.reason.as_str().to_owned());
            return Err(format!(
                "the request ended after {} of {} tokens: {reason}",
                tokens.len(),
                job.output
            ));
        }
        let ttft = (first.ok_or("no token came")? - start).as_secs_f64();
        let outcome = Outcome {
            ttft,
            itl,
            e2e: start.elapsed().as_secs_f64(),
            input: job.prompt.len(),
            output: tokens.len(),
        };
        Ok((outcome, tokens))
    }
}

impl Target for EngineTarget {
    async fn run(&self, job: &Job) -> Result<Outcome, String> {
        self.tokens(job).await.map(|(outcome, _)| outcome)
    }
}
