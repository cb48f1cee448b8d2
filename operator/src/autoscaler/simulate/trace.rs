//! What happens to the modelled fleet: requests, deaths, lost scrapes. A file, or one of eight that are built in.

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde::{Deserialize, Serialize};

/// How a replica works: measured once, then computed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Curve {
    /// Milliseconds of a decode step, however few the requests.
    pub step_ms: f64,
    /// Milliseconds that each request of the batch adds to a step.
    pub step_ms_per_request: f64,
    /// Prompt tokens a second when nothing else runs.
    pub prefill_tokens_per_second: f64,
    /// Tokens that the KV cache holds.
    pub kv_tokens: f64,
    /// Most requests that run at one time.
    pub max_requests: usize,
    /// Seconds from creation to Ready.
    pub startup_seconds: f64,
}

impl Default for Curve {
    fn default() -> Self {
        Self {
            step_ms: 22.0,
            step_ms_per_request: 0.45,
            prefill_tokens_per_second: 6000.0,
            kv_tokens: 12_000.0,
            max_requests: 64,
            startup_seconds: 60.0,
        }
    }
}

/// One kind of request.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Kind {
    /// Share among all kinds.
    pub weight: f64,
    /// Mean tokens of the prompt.
    pub prompt_tokens: f64,
    /// Mean tokens of the answer.
    pub answer_tokens: f64,
}

/// A time during which scrapes are lost.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ScrapeLoss {
    /// First second.
    pub from: f64,
    /// Last second.
    pub to: f64,
    /// Share of scrapes that fail, 0 to 1.
    pub share: f64,
}

/// A scenario.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Trace {
    /// For titles.
    pub name: String,
    /// Length in seconds.
    pub seconds: f64,
    /// Second and requests per second there; straight lines in between.
    pub rate: Vec<(f64, f64)>,
    /// Each ten seconds the rate is off by up to this share.
    pub noise: f64,
    /// Kinds of requests.
    pub kinds: Vec<Kind>,
    /// Seconds at which a ready replica dies.
    pub deaths: Vec<f64>,
    /// When scrapes are lost.
    pub scrape_loss: Vec<ScrapeLoss>,
    /// Replicas at the start.
    pub replicas: i32,
    /// Seconds to the first token within which a request counts as served well. One second where a trace says nothing:
    /// what people who chat take for an answer at once, and strict enough that spare replicas alone do not satisfy it.
    pub slo_seconds: f64,
    /// Randomness.
    pub seed: u64,
    /// The replicas.
    pub curve: Curve,
}

impl Default for Trace {
    fn default() -> Self {
        Self {
            name: "unnamed".to_owned(),
            seconds: 3600.0,
            rate: vec![(0.0, 4.0)],
            noise: 0.0,
            kinds: vec![Kind {
                weight: 1.0,
                prompt_tokens: 220.0,
                answer_tokens: 180.0,
            }],
            deaths: Vec::new(),
            scrape_loss: Vec::new(),
            replicas: 4,
            slo_seconds: 1.0,
            seed: 1,
            curve: Curve::default(),
        }
    }
}

/// Why a trace cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// Neither a file nor a name.
    #[error("cannot read trace {name}: {source}; the built-in ones are {}", NAMES.join(", "))]
    Read {
        /// What was asked for.
        name: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Not YAML of this shape.
    #[error("trace {name}: {source}")]
    Parse {
        /// The file.
        name: String,
        /// Where and why.
        #[source]
        source: serde_yaml_ng::Error,
    },
    /// A figure is out of range.
    #[error("trace {name}: {reason}")]
    Invalid {
        /// The file.
        name: String,
        /// Which, and what it may be.
        reason: &'static str,
    },
}

/// Names of the traces that are built in.
pub const NAMES: [&str; 8] = [
    "step",
    "ramp",
    "diurnal",
    "flash-crowd",
    "noise",
    "bimodal",
    "replica-death",
    "scrape-loss",
];

/// A request as it comes.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    /// Second.
    pub at: f64,
    /// Tokens of the prompt.
    pub prompt: f64,
    /// Tokens of the answer.
    pub answer: f64,
}

/// Most requests that one trace may hold.
const MAX_ARRIVALS: f64 = 5e6;

impl Trace {
    /// Reads a file, or takes one of [`NAMES`].
    ///
    /// # Errors
    /// [`TraceError`] when there is no such trace, or it is not one.
    pub fn load(name: &str) -> Result<Self, TraceError> {
        if let Some(trace) = Self::built_in(name) {
            return Ok(trace);
        }
        let text = std::fs::read_to_string(name).map_err(|source| TraceError::Read {
            name: name.to_owned(),
            source,
        })?;
        let trace: Self = serde_yaml_ng::from_str(&text).map_err(|source| TraceError::Parse {
            name: name.to_owned(),
            source,
        })?;
        trace.check().map_err(|reason| TraceError::Invalid {
            name: name.to_owned(),
            reason,
        })?;
        Ok(trace)
    }

    /// What is wrong with the figures, if anything.
    pub(super) fn check(&self) -> Result<(), &'static str> {
        let curve = &self.curve;
        let positive = [
            curve.step_ms,
            curve.prefill_tokens_per_second,
            curve.kv_tokens,
            self.slo_seconds,
        ];
        let most = self.rate.iter().map(|(_, rate)| *rate).fold(0.0, f64::max);
        if !(1.0..=864_000.0).contains(&self.seconds) {
            Err("seconds must lie between 1 and 864000")
        } else if self.rate.is_empty() || self.rate.iter().any(|(_, r)| r.is_nan() || *r < 0.0) {
            Err("rate needs at least one [second, requests per second], none negative")
        } else if self.rate.windows(2).any(|w| w[0].0 >= w[1].0) {
            Err("the seconds of rate must rise")
        } else if most * self.seconds > MAX_ARRIVALS {
            Err("rate × seconds must not exceed 5 million requests")
        } else if self.kinds.is_empty()
            || self
                .kinds
                .iter()
                .any(|k| !(k.weight > 0.0 && k.prompt_tokens >= 1.0 && k.answer_tokens >= 1.0))
        {
            Err("kinds needs at least one, with a weight above 0 and tokens of at least 1")
        } else if positive.iter().any(|value| value.is_nan() || *value <= 0.0)
            || curve.max_requests == 0
        {
            Err("the curve's figures and sloSeconds must be above 0")
        } else if !(0.0..1.0).contains(&self.noise) || !(0..=1000).contains(&self.replicas) {
            Err("noise must lie between 0 and 1, replicas between 0 and 1000")
        } else {
            Ok(())
        }
    }

    fn built_in(name: &str) -> Option<Self> {
        let base = Self {
            name: name.to_owned(),
            ..Self::default()
        };
        Some(match name {
            "step" => Self {
                rate: vec![
                    (0.0, 10.0),
                    (599.0, 10.0),
                    (600.0, 35.0),
                    (2399.0, 35.0),
                    (2400.0, 10.0),
                ],
                ..base
            },
            "ramp" => Self {
                rate: vec![
                    (0.0, 7.5),
                    (300.0, 7.5),
                    (1800.0, 60.0),
                    (2100.0, 60.0),
                    (3300.0, 7.5),
                ],
                ..base
            },
            "diurnal" => Self {
                seconds: 7200.0,
                rate: (0..=72)
                    .map(|i| {
                        let at = f64::from(i) * 100.0;
                        (
                            at,
                            25.0 - 20.0 * (at / 3600.0 * std::f64::consts::TAU).cos(),
                        )
                    })
                    .collect(),
                noise: 0.1,
                ..base
            },
            "flash-crowd" => Self {
                rate: vec![
                    (0.0, 7.5),
                    (899.0, 7.5),
                    (900.0, 75.0),
                    (1800.0, 75.0),
                    (1801.0, 7.5),
                ],
                ..base
            },
            "noise" => Self {
                seconds: 2100.0,
                rate: vec![(0.0, 40.0)],
                noise: 0.2,
                replicas: 12,
                ..base
            },
            "bimodal" => Self {
                rate: vec![
                    (0.0, 7.5),
                    (900.0, 7.5),
                    (1200.0, 22.5),
                    (2400.0, 22.5),
                    (2700.0, 7.5),
                ],
                kinds: vec![
                    Kind {
                        weight: 0.85,
                        prompt_tokens: 120.0,
                        answer_tokens: 80.0,
                    },
                    Kind {
                        weight: 0.15,
                        prompt_tokens: 1200.0,
                        answer_tokens: 600.0,
                    },
                ],
                replicas: 6,
                ..base
            },
            "replica-death" => Self {
                rate: vec![(0.0, 30.0)],
                deaths: vec![900.0, 1500.0, 1505.0, 2400.0],
                replicas: 9,
                ..base
            },
            "scrape-loss" => Self {
                rate: vec![
                    (0.0, 10.0),
                    (600.0, 10.0),
                    (1200.0, 40.0),
                    (2400.0, 40.0),
                    (3000.0, 10.0),
                ],
                scrape_loss: vec![
                    ScrapeLoss {
                        from: 700.0,
                        to: 1100.0,
                        share: 0.5,
                    },
                    ScrapeLoss {
                        from: 1500.0,
                        to: 1560.0,
                        share: 1.0,
                    },
                    ScrapeLoss {
                        from: 2000.0,
                        to: 2300.0,
                        share: 0.3,
                    },
                ],
                ..base
            },
            _ => return None,
        })
    }

    /// Requests per second meant at a time, without noise.
    #[must_use]
    pub fn rate_at(&self, at: f64) -> f64 {
        let after = self.rate.partition_point(|(second, _)| *second <= at);
        match (
            after.checked_sub(1).map(|i| self.rate[i]),
            self.rate.get(after),
        ) {
            (Some((t0, r0)), Some((t1, r1))) => r0 + (r1 - r0) * (at - t0) / (t1 - t0),
            (Some((_, rate)), None) => rate,
            (None, first) => first.map_or(0.0, |(_, rate)| *rate),
        }
    }

    /// The requests, the same for the same seed.
    #[must_use]
    pub fn arrivals(&self) -> Vec<Arrival> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let weights: f64 = self.kinds.iter().map(|kind| kind.weight).sum();
        let most = self.rate.iter().map(|(_, rate)| *rate).fold(0.0, f64::max) * (1.0 + self.noise);
        let mut arrivals = Vec::new();
        let (mut at, mut factor, mut until) = (0.0, 1.0, 0.0);
        if most <= 0.0 {
            return arrivals;
        }
        loop {
            // Thinning: candidates at the highest rate, each kept with the share of the rate that holds.
            at += -(1.0 - rng.random::<f64>()).ln() / most;
            if at >= self.seconds {
                break;
            }
            while at >= until {
                until += 10.0;
                factor = 1.0 + self.noise * (2.0 * rng.random::<f64>() - 1.0);
            }
            if rng.random::<f64>() * most >= self.rate_at(at) * factor {
                continue;
            }
            let mut draw = rng.random::<f64>() * weights;
            let kind = self.kinds.iter().find(|kind| {
                draw -= kind.weight;
                draw < 0.0
            });
            let kind = kind.unwrap_or(&self.kinds[self.kinds.len() - 1]);
            // Lengths around the mean, with a tail: half to three times.
            let mut around = |mean: f64| {
                let tail = -(1.0 - rng.random::<f64>()).ln();
                (mean * (0.5 + 0.5 * tail).min(3.0)).max(1.0).round()
            };
            arrivals.push(Arrival {
                at,
                prompt: around(kind.prompt_tokens),
                answer: around(kind.answer_tokens),
            });
        }
        arrivals
    }

    /// Share of scrapes lost at a time.
    #[must_use]
    pub fn lost_at(&self, at: f64) -> f64 {
        let hit = self
            .scrape_loss
            .iter()
            .filter(|l| (l.from..l.to).contains(&at));
        hit.map(|loss| loss.share).fold(0.0, f64::max)
    }
}
