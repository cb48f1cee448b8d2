//! Who decides in the model: our own code, the rules of others, and the least fixed number that would have done.
//!
//! The rivals are written from their documentation. HPA: `ceil(value ÷ target)` every 15 s, tolerance 10 %, up by the
//! greater of 100 % and 4 pods in 15 s, down by the highest of a window. Knative's KPA: every 2 s the mean of a stable
//! and a panic window; panic at twice the capacity, no step down while it lasts. KEDA: polls its source, HPA acts on
//! what was polled. HPA and KEDA read from a Prometheus that scrapes every 15 s; KPA scrapes by itself.

use std::collections::VecDeque;

use super::fleet::{Scaler, View};
use crate::autoscaler::behavior::{Behavior, Record};
use crate::autoscaler::decide::{History, Observation, Policy, Replica, decide};
use crate::autoscaler::signal::Signal;

/// Bounds of every scaler of the model.
pub const MIN: i32 = 1;
/// The upper one.
pub const MAX: i32 = 100;
/// How often Prometheus scrapes, in seconds.
const PROMETHEUS_SECONDS: f64 = 15.0;

/// Ours, at its defaults.
pub struct Ours {
    policy: Policy,
    history: Option<History>,
}

impl Default for Ours {
    fn default() -> Self {
        let targets = ashlar_crds::ScalingTargets::default();
        Self {
            policy: Policy {
                min: MIN,
                max: MAX,
                kv_target: targets.kv_cache_utilization,
                waiting_target: f64::from(targets.waiting_requests),
                first_token_target: None,
                idle_seconds: 300.0,
                behavior: Behavior::of(None),
            },
            history: None,
        }
    }
}

impl Scaler for Ours {
    fn wanted(&mut self, view: &View<'_>) -> i32 {
        let ready: Vec<Replica> = view
            .ready
            .iter()
            .map(|(id, reading)| Replica {
                id: *id,
                load: reading.map_or(Signal::Absent, |r| Signal::of_age(r.load, view.now - r.at)),
                read_at: reading.map_or(view.now, |r| r.at),
            })
            .collect();
        let seen = Observation {
            now: view.now,
            wanted: view.wanted,
            ready: &ready,
            gateways: Signal::Fresh(view.gateway),
        };
        let history = self
            .history
            .get_or_insert_with(|| History::begin(view.now, view.wanted));
        decide(&self.policy, &seen, history).to
    }
}

/// A number that never changes.
pub struct Fixed(
    /// The number.
    pub i32,
);

impl Scaler for Fixed {
    fn wanted(&mut self, _: &View<'_>) -> i32 {
        self.0
    }
}

/// What a rival scales on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Metric {
    /// Requests running and waiting, per replica.
    InFlight,
    /// Share of the KV cache in use, averaged.
    KvCache,
}

/// The value, summed over replicas, that Prometheus shows; nothing when no scrape came through.
struct Prometheus {
    next: f64,
    shown: Option<f64>,
}

impl Prometheus {
    fn new() -> Self {
        Self {
            next: 0.0,
            shown: None,
        }
    }

    fn sum(&mut self, view: &View<'_>, metric: Metric) -> Option<f64> {
        if view.now >= self.next {
            self.next = view.now + PROMETHEUS_SECONDS;
            // Series of failed scrapes are gone: a sum goes on without them.
            let seen = view.ready.iter().filter_map(|(_, reading)| *reading);
            let fresh: Vec<_> = seen.filter(|reading| view.now - reading.at < 1.5).collect();
            let of_pods = fresh.iter().map(|reading| match metric {
                Metric::InFlight => reading.load.running + reading.load.waiting,
                Metric::KvCache => reading.load.kv_cache,
            });
            let held = if metric == Metric::InFlight {
                view.gateway.held
            } else {
                0.0
            };
            self.shown = (!fresh.is_empty() || held > 0.0).then(|| of_pods.sum::<f64>() + held);
        }
        self.shown
    }
}

/// HPA on an external metric; with a poll interval, KEDA before it.
pub struct Hpa {
    metric: Metric,
    target: f64,
    behavior: Behavior,
    record: Record,
    prometheus: Prometheus,
    /// KEDA's poll interval; HPA alone asks when it acts.
    poll: Option<f64>,
    polled: (f64, Option<f64>),
    next: f64,
    began: bool,
}

/// How often HPA acts, in seconds.
const HPA_SECONDS: f64 = 15.0;

impl Hpa {
    /// HPA with a target per replica and a window for scaling down.
    #[must_use]
    pub fn new(metric: Metric, target: f64, down_window: i32, poll: Option<f64>) -> Self {
        let field = serde_json::json!({"scaleDown": {"stabilizationWindowSeconds": down_window}});
        let field = serde_json::from_value(field).expect("a behavior: this is a bug");
        Self {
            metric,
            target,
            behavior: Behavior::of(Some(&field)),
            record: Record::default(),
            prometheus: Prometheus::new(),
            poll,
            polled: (0.0, None),
            next: 0.0,
            began: false,
        }
    }
}

impl Scaler for Hpa {
    fn wanted(&mut self, view: &View<'_>) -> i32 {
        let shown = self.prometheus.sum(view, self.metric);
        let value = match self.poll {
            None => shown,
            Some(poll) => {
                if view.now >= self.polled.0 {
                    self.polled = (view.now + poll, shown);
                }
                self.polled.1
            }
        };
        if view.now < self.next {
            return view.wanted;
        }
        self.next = view.now + HPA_SECONDS;
        if !self.began {
            // The number it finds stands for the first window.
            self.began = true;
            self.record.remember(view.now, view.wanted);
        }
        let Some(value) = value else {
            return view.wanted;
        };
        let usage = value / self.target;
        let ratio = usage / f64::from(view.wanted.max(1));
        let recommended = if (ratio - 1.0).abs() <= 0.1 {
            view.wanted
        } else {
            usage.ceil() as i32
        };
        let recommended = recommended.clamp(MIN, MAX);
        self.record
            .apply(&self.behavior, view.now, view.wanted, recommended)
    }
}

/// Knative's KPA on concurrency.
pub struct Kpa {
    target: f64,
    stable_window: f64,
    samples: VecDeque<(f64, f64)>,
    panic: Option<(f64, i32)>,
    next: f64,
}

impl Kpa {
    /// KPA with a target of requests in flight per replica.
    #[must_use]
    pub fn new(target: f64, stable_window: f64) -> Self {
        Self {
            target,
            stable_window,
            samples: VecDeque::new(),
            panic: None,
            next: 0.0,
        }
    }
}

impl Scaler for Kpa {
    fn wanted(&mut self, view: &View<'_>) -> i32 {
        let fresh = view.ready.iter().filter_map(|(_, reading)| *reading);
        let fresh: Vec<_> = fresh
            .filter(|reading| view.now - reading.at < 1.5)
            .collect();
        if !fresh.is_empty() || view.ready.is_empty() {
            let sum: f64 = fresh.iter().map(|r| r.load.running + r.load.waiting).sum();
            // What was not scraped is taken to be like what was.
            let scale = view.ready.len() as f64 / fresh.len().max(1) as f64;
            self.samples
                .push_back((view.now, sum * scale + view.gateway.held));
        }
        while self
            .samples
            .front()
            .is_some_and(|(at, _)| view.now - at >= self.stable_window)
        {
            self.samples.pop_front();
        }
        if view.now < self.next || self.samples.is_empty() {
            return view.wanted;
        }
        self.next = view.now + 2.0;
        let mean = |window: f64| {
            let recent = self.samples.iter().filter(|(at, _)| view.now - at < window);
            let (sum, count) = recent.fold((0.0, 0.0), |(s, c), (_, v)| (s + v, c + 1.0));
            sum / f64::max(count, 1.0)
        };
        let ready = (view.ready.len() as f64).max(1.0);
        let limit = |value: f64| {
            (value / self.target)
                .ceil()
                .clamp((ready / 2.0).floor(), ready * 1000.0) as i32
        };
        let stable = limit(mean(self.stable_window));
        let panic = limit(mean(self.stable_window / 10.0));
        if f64::from(panic) / ready >= 2.0 {
            let highest = self.panic.map_or(0, |(_, highest)| highest);
            self.panic = Some((view.now, highest.max(panic)));
        } else if self
            .panic
            .is_some_and(|(since, _)| view.now - since > self.stable_window)
        {
            self.panic = None;
        }
        let wanted = match &mut self.panic {
            Some((_, highest)) => {
                *highest = (*highest).max(panic).max(view.wanted.min(*highest));
                (*highest).max(stable)
            }
            None => stable,
        };
        wanted.clamp(MIN, MAX)
    }
}

/// A rival at one setting.
pub struct Setting {
    /// `HPA`, `KPA` or `KEDA`.
    pub rival: &'static str,
    /// The setting in words.
    pub words: String,
    /// Makes it anew for each run.
    pub make: Box<dyn Fn() -> Box<dyn Scaler> + Send + Sync>,
}

/// Names of the rivals.
pub const RIVALS: [&str; 3] = ["HPA", "KPA", "KEDA"];

/// Every setting of every rival: at least twenty of each.
#[must_use]
pub fn settings() -> Vec<Setting> {
    let mut all: Vec<Setting> = Vec::new();
    let concurrency = [8.0, 11.0, 14.0, 17.0, 20.0, 23.0, 26.0, 30.0, 35.0, 42.0];
    for target in concurrency {
        for window in [60, 300] {
            all.push(Setting {
                rival: "HPA",
                words: format!("{target} in flight, down window {window} s"),
                make: Box::new(move || Box::new(Hpa::new(Metric::InFlight, target, window, None))),
            });
        }
        for window in [30.0, 60.0, 120.0] {
            all.push(Setting {
                rival: "KPA",
                words: format!("{target} in flight, stable window {window} s"),
                make: Box::new(move || Box::new(Kpa::new(target, window))),
            });
        }
        for poll in [5.0, 30.0] {
            all.push(Setting {
                rival: "KEDA",
                words: format!("{target} in flight, polled every {poll} s"),
                make: Box::new(move || {
                    Box::new(Hpa::new(Metric::InFlight, target, 300, Some(poll)))
                }),
            });
        }
    }
    for target in [0.4, 0.5, 0.6, 0.7, 0.8] {
        for window in [60, 300] {
            all.push(Setting {
                rival: "HPA",
                words: format!("KV cache {target}, down window {window} s"),
                make: Box::new(move || Box::new(Hpa::new(Metric::KvCache, target, window, None))),
            });
        }
    }
    all
}
