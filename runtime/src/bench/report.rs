//! What a run is summed up as.

use serde::Serialize;

/// One request's measurement. Times in seconds from sending it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outcome {
    /// To the first token.
    pub ttft: f64,
    /// Between deliveries of tokens.
    pub itl: Vec<f64>,
    /// To the end.
    pub e2e: f64,
    /// Prompt tokens.
    pub input: usize,
    /// Tokens generated, as the server counts them.
    pub output: usize,
}

/// Median and tail, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Percentiles {
    /// Median.
    pub p50: Option<f64>,
    /// 99th percentile.
    pub p99: Option<f64>,
}

/// One scenario's result, as printed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Scenario.
    pub name: String,
    /// Requests that succeeded.
    pub ok: usize,
    /// Requests that did not.
    pub errors: usize,
    /// The first failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_error: Option<String>,
    /// Seconds from first to last.
    pub wall_s: f64,
    /// Requests per second.
    pub req_s: f64,
    /// Prompt tokens per second.
    pub in_tok_s: f64,
    /// Generated tokens per second over the whole run.
    pub out_tok_s: f64,
    /// Time to first token.
    pub ttft_ms: Percentiles,
    /// Time between two deliveries.
    pub itl_ms: Percentiles,
    /// Mean time per token after the first, one value per request.
    pub tpot_ms: Percentiles,
    /// Whole request.
    pub e2e_ms: Percentiles,
}

impl Report {
    /// Sums up a run that took `wall` seconds.
    #[must_use]
    pub fn new(name: &str, results: Vec<Result<Outcome, String>>, wall: f64) -> Self {
        let (mut outcomes, mut failures) = (Vec::new(), Vec::new());
        for result in results {
            match result {
                Ok(outcome) => outcomes.push(outcome),
                Err(error) => failures.push(error),
            }
        }
        let of = |value: fn(&Outcome) -> f64| percentiles(outcomes.iter().map(value).collect());
        let tpot = |outcome: &Outcome| {
            (outcome.output > 1).then(|| (outcome.e2e - outcome.ttft) / (outcome.output - 1) as f64)
        };
        let sum = |value: fn(&Outcome) -> usize| outcomes.iter().map(value).sum::<usize>() as f64;
        Self {
            name: name.to_owned(),
            ok: outcomes.len(),
            errors: failures.len(),
            first_error: failures.into_iter().next(),
            wall_s: round(wall, 3),
            req_s: round(outcomes.len() as f64 / wall, 3),
            in_tok_s: round(sum(|outcome| outcome.input) / wall, 1),
            out_tok_s: round(sum(|outcome| outcome.output) / wall, 1),
            ttft_ms: of(|outcome| outcome.ttft),
            itl_ms: percentiles(
                outcomes
                    .iter()
                    .flat_map(|outcome| outcome.itl.iter().copied())
                    .collect(),
            ),
            tpot_ms: percentiles(outcomes.iter().filter_map(tpot).collect()),
            e2e_ms: of(|outcome| outcome.e2e),
        }
    }
}

/// Nearest-rank percentiles of seconds, in milliseconds; none of nothing.
#[must_use]
pub fn percentiles(mut seconds: Vec<f64>) -> Percentiles {
    seconds.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let last = seconds.len().checked_sub(1)?;
        Some(round(
            seconds[(last as f64 * share).round() as usize] * 1000.0,
            3,
        ))
    };
    Percentiles {
        p50: at(0.5),
        p99: at(0.99),
    }
}

/// Rounds for printing.
#[must_use]
pub fn round(value: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_up_by_hand() {
        let outcome = |ttft, e2e| Outcome {
            ttft,
            itl: vec![0.1, 0.2],
            e2e,
            input: 10,
            output: 3,
        };
        let report = Report::new(
            "x",
            vec![
                Ok(outcome(1.0, 2.0)),
                Err("boom".into()),
                Ok(outcome(3.0, 4.0)),
            ],
            4.0,
        );
        assert_eq!(
            (report.ok, report.errors, report.first_error.as_deref()),
            (2, 1, Some("boom"))
        );
        assert_eq!(
            (report.req_s, report.in_tok_s, report.out_tok_s),
            (0.5, 5.0, 1.5)
        );
        assert_eq!(
            report.tpot_ms,
            Percentiles {
                p50: Some(500.0),
                p99: Some(500.0)
            }
        );
        assert_eq!(
            report.ttft_ms,
            Percentiles {
                p50: Some(3000.0),
                p99: Some(3000.0)
            }
        );
        assert_eq!(
            report.itl_ms,
            Percentiles {
                p50: Some(200.0),
                p99: Some(200.0)
            }
        );
    }

    #[test]
    fn nothing_has_no_percentiles() {
        assert_eq!(
            percentiles(Vec::new()),
            Percentiles {
                p50: None,
                p99: None
            }
        );
        assert_eq!(
            percentiles((1..=101).map(f64::from).collect()),
            Percentiles {
                p50: Some(51_000.0),
                p99: Some(100_000.0)
            }
        );
    }
}
