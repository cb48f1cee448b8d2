//! Requests to measure with, from a seed. Prompts are token ids, so no tokenizer takes part.

use rand::{RngExt, SeedableRng, rngs::StdRng};

/// Spread of log-normal lengths, like chat traffic.
const SIGMA: f64 = 0.9;
/// Token ids below this are often special.
const FIRST_TOKEN: u32 = 10;
/// A log-normal length is at most this many times its median.
const MAX_TIMES_MEDIAN: usize = 8;
/// The shortest log-normal length.
const MIN_LOGNORMAL: usize = 4;

/// Lengths of a trace, in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Prompt; the median if `lognormal`.
    pub input: usize,
    /// Output; the median if `lognormal`.
    pub output: usize,
    /// Draw lengths from log-normals around `input` and `output`.
    pub lognormal: bool,
    /// Tokens at the start of every prompt that all share.
    pub shared_prefix: usize,
    /// Prompt and output together are cut to this.
    pub max_model_len: usize,
}

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// Tokens to generate (end-of-sequence is ignored), at least one.
    pub output: usize,
}

/// A named measurement: how many requests of which shape, how many at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scenario {
    /// Name in reports.
    pub name: &'static str,
    /// Requests.
    pub requests: usize,
    /// Of these in flight at once.
    pub concurrency: usize,
    /// Median or exact prompt length.
    pub input: usize,
    /// Median or exact output length.
    pub output: usize,
    /// See [`Shape::lognormal`].
    pub lognormal: bool,
    /// See [`Shape::shared_prefix`].
    pub shared_prefix: usize,
    /// Uncounted requests before it.
    pub warmup: usize,
}

impl Scenario {
    const fn new(
        name: &'static str,
        requests: usize,
        concurrency: usize,
        input: usize,
        output: usize,
    ) -> Self {
        Self {
            name,
            requests,
            concurrency,
            input,
            output,
            lognormal: false,
            shared_prefix: 0,
            warmup: 2,
        }
    }

    /// Its lengths, cut to a model.
    #[must_use]
    pub fn shape(&self, max_model_len: usize) -> Shape {
        Shape {
            input: self.input,
            output: self.output,
            lognormal: self.lognormal,
            shared_prefix: self.shared_prefix,
            max_model_len,
        }
    }
}

/// The scenarios known by name. `single chat16 prefill1k` fit a small CPU; the others are for GPUs.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        warmup: 1,
        ..Scenario::new("single", 4, 1, 128, 256)
    },
    Scenario::new("chat16", 48, 16, 128, 64),
    Scenario::new("prefill1k", 6, 1, 1024, 1),
    Scenario::new("chat64", 256, 64, 512, 256),
    Scenario::new("sat256", 768, 256, 1024, 128),
    Scenario {
        lognormal: true,
        ..Scenario::new("burst", 1000, 1000, 220, 180)
    },
    Scenario::new("prefill", 64, 8, 4096, 1),
    Scenario {
        shared_prefix: 2048,
        ..Scenario::new("prefix", 512, 64, 128, 64)
    },
];

/// The scenario of that name.
#[must_use]
pub fn scenario(name: &str) -> Option<Scenario> {
    SCENARIOS
        .iter()
        .find(|scenario| scenario.name == name)
        .copied()
}

/// `count` requests. Equal arguments give equal requests, on every machine.
#[must_use]
pub fn jobs(shape: &Shape, count: usize, vocab_size: u32, seed: u64) -> Vec<Job> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut prefix_rng = StdRng::seed_from_u64(seed ^ 0x5eed);
    let tokens = |rng: &mut StdRng, count: usize| -> Vec<u32> {
        let last = vocab_size.max(FIRST_TOKEN + 1);
        (0..count)
            .map(|_| rng.random_range(FIRST_TOKEN..last))
            .collect()
    };
    let room = shape.max_model_len.saturating_sub(2);
    let prefix = tokens(&mut prefix_rng, shape.shared_prefix.min(room));
    (0..count)
        .map(|_| {
            let input = length(shape.input, shape.lognormal, &mut rng);
            let output = length(shape.output, shape.lognormal, &mut rng);
            let input = input.clamp(
                1,
                (shape.max_model_len.saturating_sub(prefix.len() + 1)).max(1),
            );
            let output = output.clamp(
                1,
                (shape.max_model_len.saturating_sub(prefix.len() + input)).max(1),
            );
            let mut prompt = prefix.clone();
            prompt.extend(tokens(&mut rng, input));
            Job { prompt, output }
        })
        .collect()
}

fn length(median: usize, lognormal: bool, rng: &mut StdRng) -> usize {
    if !lognormal {
        return median;
    }
    // Box–Muller; 1 − u keeps the logarithm finite.
    let (u, v): (f64, f64) = (rng.random(), rng.random());
    let normal = (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos();
    let drawn = median as f64 * (SIGMA * normal).exp();
    // Saturating by definition of `as`; then clamped.
    (drawn as usize).clamp(MIN_LOGNORMAL, median * MAX_TIMES_MEDIAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BURST: Shape = Shape {
        input: 220,
        output: 180,
        lognormal: true,
        shared_prefix: 0,
        max_model_len: 8192,
    };

    #[test]
    fn the_same_seed_gives_the_same_trace() {
        assert_eq!(jobs(&BURST, 50, 1000, 7), jobs(&BURST, 50, 1000, 7));
        assert_ne!(jobs(&BURST, 50, 1000, 7), jobs(&BURST, 50, 1000, 8));
    }

    #[test]
    fn lognormal_lengths_have_the_median_and_the_spread() {
        let mut lengths: Vec<usize> = jobs(&BURST, 4001, 1000, 1)
            .iter()
            .map(|job| job.prompt.len())
            .collect();
        lengths.sort_unstable();
        let median = lengths[2000];
        assert!((200..=240).contains(&median), "median {median}");
        let quartiles = lengths[3000] as f64 / lengths[1000] as f64;
        // exp(2 · 0.6745 · 0.9)
        assert!(
            (3.0..3.8).contains(&quartiles),
            "upper to lower quartile {quartiles}"
        );
    }

    #[test]
    fn lengths_and_ids_stay_inside_the_model() {
        let shape = Shape {
            max_model_len: 300,
            shared_prefix: 64,
            ..BURST
        };
        for job in jobs(&shape, 500, 40, 3) {
            assert!(
                job.prompt.len() + job.output <= 300 && job.output >= 1 && job.prompt.len() > 64
            );
            assert!(
                job.prompt
                    .iter()
                    .all(|&token| (FIRST_TOKEN..40).contains(&token))
            );
        }
    }

    #[test]
    fn prompts_share_exactly_the_prefix() {
        let shape = Shape {
            shared_prefix: 20,
            lognormal: false,
            ..BURST
        };
        let jobs = jobs(&shape, 3, 50_000, 3);
        assert!(
            jobs.iter()
                .all(|job| job.prompt[..20] == jobs[0].prompt[..20])
        );
        assert_ne!(jobs[0].prompt[20..], jobs[1].prompt[20..]);
    }

    #[test]
    fn scenarios_have_different_names() {
        let names: std::collections::BTreeSet<_> =
            SCENARIOS.iter().map(|scenario| scenario.name).collect();
        assert_eq!(names.len(), SCENARIOS.len());
        assert!(
            scenario("burst").is_some_and(|burst| burst.lognormal) && scenario("none").is_none()
        );
    }
}
