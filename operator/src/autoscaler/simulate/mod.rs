//! `ashlar-operator simulate TRACE`: the autoscaler's own decision code against a modelled fleet, beside its rivals.
//!
//! ```text
//! trace ──▶ arrivals ──▶ fleet (engine, gateway, scrapes) ⇄ scalers (ours; HPA, KPA, KEDA) ──▶ report (table, SVG)
//! ```
//!
//! Invariants: the same trace and seed give the same run; ours is `decide` itself at the defaults of the resource; a
//! rival is judged by the best of all its settings, at our replica-hours.
//!
//! Where everybody serves 99.9 % a single run says little: a replica that dies takes five requests more or less along.
//! So a comparison plays each trace with several seeds and adds them up, ours and every setting of the rivals alike; a
//! rival's best setting is the best over all seeds, because nobody sets an autoscaler for one day's chance.

pub mod fleet;
pub mod report;
pub mod scalers;
pub mod trace;

use std::collections::HashMap;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use fleet::{Run, play};
use scalers::{Fixed, Ours, RIVALS, Setting, settings};
use trace::{Arrival, NAMES, Trace, TraceError};

/// Share of requests that the oracle serves within the SLO.
const ORACLE_ATTAINMENT: f64 = 0.99;
/// Seeds that a comparison plays each trace with.
pub const SEEDS: u64 = 10;
/// Most replicas that the oracle tries.
const ORACLE_MAX: i32 = 200;

/// Arguments of `ashlar-operator simulate`.
#[derive(Debug, Clone, clap::Args)]
pub struct SimulateArgs {
    /// A trace file (YAML), `all`, or one of step, ramp, diurnal, flash-crowd, noise, bimodal, replica-death, scrape-loss.
    #[arg(value_name = "TRACE")]
    pub trace: String,
    /// Also play HPA, Knative's KPA and KEDA, each at every one of its settings.
    #[arg(long)]
    pub rivals: bool,
    /// With --rivals: play each trace with so many seeds, from its own on, and add them up.
    #[arg(long, value_name = "COUNT", default_value_t = SEEDS, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub seeds: u64,
    /// Draw each trace into this folder, as TRACE.svg.
    #[arg(long, value_name = "FOLDER")]
    pub svg: Option<PathBuf>,
    /// Print the trace as a file to start from, and play nothing.
    #[arg(long)]
    pub print: bool,
}

/// Why nothing could be simulated.
#[derive(Debug, thiserror::Error)]
pub enum SimulateError {
    /// The trace.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// A picture or the table could not be written.
    #[error("cannot write {what}: {source}")]
    Write {
        /// Which file.
        what: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

/// A rival's best at our replica-hours.
#[derive(Debug, Clone)]
pub struct RivalResult {
    /// `HPA`, `KPA` or `KEDA`.
    pub rival: &'static str,
    /// Share within the SLO at our replica-hours.
    pub attainment: f64,
    /// The setting nearest to it, in words.
    pub setting: String,
    /// That setting's run.
    pub run: Run,
    /// Settings that were tried.
    pub settings: usize,
}

/// A trace, played.
#[derive(Debug, Clone)]
pub struct Played {
    /// The trace.
    pub trace: Trace,
    /// Ours.
    pub ours: Run,
    /// The least fixed number of replicas that serves 99 % within the SLO.
    pub oracle: i32,
    /// Ours over all seeds.
    pub total: Total,
    /// The rivals over all seeds, if they were asked for.
    pub rivals: Vec<RivalResult>,
}

/// One scaler's runs over several seeds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Total {
    /// Requests after the warm-up.
    pub requests: usize,
    /// Those whose first token came within the SLO.
    pub served_well: usize,
    /// Replicas × hours.
    pub replica_hours: f64,
}

impl Total {
    fn of<'a>(runs: impl IntoIterator<Item = &'a Run>) -> Self {
        runs.into_iter().fold(Self::default(), |sum, run| Self {
            requests: sum.requests + run.requests,
            served_well: sum.served_well + run.served_well,
            replica_hours: sum.replica_hours + run.replica_hours,
        })
    }

    /// Share of requests served within the SLO.
    #[must_use]
    pub fn attainment(&self) -> f64 {
        self.served_well as f64 / self.requests.max(1) as f64
    }
}

/// Plays a trace with ours.
#[must_use]
pub fn simulate(trace: &Trace) -> Played {
    let arrivals = trace.arrivals();
    let ours = play(trace, &arrivals, &mut Ours::default());
    Played {
        oracle: oracle(trace, &arrivals),
        trace: trace.clone(),
        total: Total::of([&ours]),
        ours,
        rivals: Vec::new(),
    }
}

/// Plays a trace with ours and with all rivals, with so many seeds.
#[must_use]
pub fn compare(trace: &Trace, seeds: u64) -> Played {
    let days: Vec<Day> = (0..seeds.max(1))
        .map(|more| {
            let trace = Trace {
                seed: trace.seed.wrapping_add(more),
                ..trace.clone()
            };
            (trace.arrivals(), trace)
        })
        .collect();
    let ours = |index: usize| {
        let (arrivals, trace) = &days[index];
        play(trace, arrivals, &mut Ours::default())
    };
    let ours = play_all(days.len(), ours);
    let total = Total::of(&ours);
    let rivals = against(&days, total.replica_hours);
    let (arrivals, first) = &days[0];
    Played {
        oracle: oracle(first, arrivals),
        trace: trace.clone(),
        ours: ours[0].clone(),
        total,
        rivals,
    }
}

/// A trace with one seed, and its requests.
type Day = (Vec<Arrival>, Trace);

fn oracle(trace: &Trace, arrivals: &[Arrival]) -> i32 {
    let serves = |count: i32| {
        let trace = Trace {
            replicas: count,
            deaths: Vec::new(),
            ..trace.clone()
        };
        play(&trace, arrivals, &mut Fixed(count)).attainment() >= ORACLE_ATTAINMENT
    };
    let (mut low, mut high) = (0, 1);
    while high < ORACLE_MAX && !serves(high) {
        (low, high) = (high, (high * 2).min(ORACLE_MAX));
    }
    while high - low > 1 {
        let middle = i32::midpoint(low, high);
        if serves(middle) {
            high = middle;
        } else {
            low = middle;
        }
    }
    high
}

fn against(days: &[Day], hours: f64) -> Vec<RivalResult> {
    let settings = settings();
    let runs = play_all(settings.len() * days.len(), |index| {
        let (arrivals, trace) = &days[index % days.len()];
        play(trace, arrivals, &mut *(settings[index / days.len()].make)())
    });
    RIVALS
        .iter()
        .map(|rival| {
            let of_rival: Vec<(&Setting, &Run, Total)> = settings
                .iter()
                .zip(runs.chunks(days.len()))
                .filter(|(setting, _)| setting.rival == *rival)
                .map(|(setting, runs)| (setting, &runs[0], Total::of(runs)))
                .collect();
            let points: Vec<(f64, f64)> = of_rival
                .iter()
                .map(|(.., total)| (total.replica_hours, total.attainment()))
                .collect();
            let attainment = at_equal_hours(&points, hours);
            let off = |total: &Total| {
                (total.attainment() - attainment).abs() + (total.replica_hours / hours - 1.0).abs()
            };
            let nearest = of_rival
                .iter()
                .min_by(|(.., a), (.., b)| off(a).total_cmp(&off(b)));
            let (setting, run, _) = nearest.expect("every rival has settings: this is a bug");
            RivalResult {
                rival,
                attainment,
                setting: setting.words.clone(),
                run: (*run).clone(),
                settings: of_rival.len(),
            }
        })
        .collect()
}

/// Plays so many runs, on all processors.
fn play_all(count: usize, one: impl Fn(usize) -> Run + Sync) -> Vec<Run> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicUsize::new(0);
    let done: Mutex<HashMap<usize, Run>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..workers.min(count) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= count {
                        return;
                    }
                    let run = one(index);
                    done.lock()
                        .expect("no worker panics with the lock: this is a bug")
                        .insert(index, run);
                }
            });
        }
    });
    let mut done = done
        .into_inner()
        .expect("no worker panics with the lock: this is a bug");
    (0..count)
        .map(|index| {
            done.remove(&index)
                .expect("every run is played: this is a bug")
        })
        .collect()
}

/// The best attainment that settings of these `(replica-hours, attainment)` reach at `hours`: on the upper hull of all
/// of them, because a user may run part of the time at one and part at another setting.
#[must_use]
pub fn at_equal_hours(points: &[(f64, f64)], hours: f64) -> f64 {
    let cheaper = points.iter().filter(|(h, _)| *h <= hours);
    let mut best = cheaper.clone().map(|(_, a)| *a).fold(0.0, f64::max);
    let origin = [(0.0, 0.0)];
    for (h0, a0) in cheaper.chain(&origin) {
        for (h1, a1) in points.iter().filter(|(h, _)| *h > hours) {
            best = best.max(a0 + (a1 - a0) * (hours - h0) / (h1 - h0));
        }
    }
    best
}

/// Plays what the arguments ask for, and prints a table.
///
/// # Errors
/// [`SimulateError`] when the trace is none, or a file cannot be written.
pub fn run(args: &SimulateArgs) -> Result<(), SimulateError> {
    let names: Vec<&str> = if args.trace == "all" {
        NAMES.to_vec()
    } else {
        vec![&args.trace]
    };
    let traces: Vec<Trace> = names
        .into_iter()
        .map(Trace::load)
        .collect::<Result<_, _>>()?;
    let mut text = String::new();
    if args.print {
        for trace in &traces {
            text += &serde_yaml_ng::to_string(trace).expect("a trace is plain data: this is a bug");
        }
    } else {
        text += &report::heading(args.rivals);
        for trace in &traces {
            let played = if args.rivals {
                compare(trace, args.seeds)
            } else {
                simulate(trace)
            };
            text += &report::row(&played);
            if let Some(folder) = &args.svg {
                let path = folder.join(format!("{}.svg", file_name(&trace.name)));
                let written = std::fs::create_dir_all(folder)
                    .and_then(|()| std::fs::write(&path, report::svg(&played)));
                written.map_err(|source| SimulateError::Write {
                    what: path.display().to_string(),
                    source,
                })?;
            }
        }
    }
    let written = std::io::stdout().write_all(text.as_bytes());
    written.map_err(|source| SimulateError::Write {
        what: "the table".to_owned(),
        source,
    })
}

/// The name without what a file's name may not have.
fn file_name(name: &str) -> String {
    let kept = name.chars().map(|c| {
        if c.is_alphanumeric() || c == '-' {
            c
        } else {
            '-'
        }
    });
    kept.take(64).collect()
}

#[cfg(test)]
#[path = "../tests/simulate.rs"]
mod tests;
