//! What the autoscaler tells Prometheus: of each service its signals, demand and decisions, and of itself its scrapes.

use prometheus::{Histogram, HistogramOpts, IntCounterVec, Opts, Registry};

use super::decision::{Decision, Reason};
use super::scrape::ScrapeMetrics;
use crate::exposition::Family;

/// Reasons that change a count.
const REASONS: [Reason; 7] = [
    Reason::QueueDepth,
    Reason::ArrivalRate,
    Reason::KvCacheUtilization,
    Reason::HeldRequests,
    Reason::LoadDropped,
    Reason::Idle,
    Reason::Bounds,
];

/// Values of the label `signal`.
const SIGNALS: [&str; 4] = ["kv_cache", "waiting", "held", "running"];

/// What is told of one service.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Figures {
    desired: i32,
    demand: f64,
    fresh: u32,
    /// In the order of [`SIGNALS`]; none of what is not known.
    signals: [Option<f64>; 4],
    /// In the order of [`REASONS`]. A counter that first appears at one shows no increase: each begins at zero.
    decisions: [u32; 7],
}

impl Figures {
    pub(super) fn decided(&mut self, decision: &Decision) {
        let figures = &decision.figures;
        self.desired = decision.to;
        self.demand = figures.demand[0];
        self.fresh = u32::try_from(figures.fresh).unwrap_or(u32::MAX);
        // Nothing is known of replicas of which none is fresh: no figure then, rather than a zero.
        let seen = |value: f64| (figures.fresh > 0).then_some(value);
        self.signals = [
            seen(figures.kv_cache),
            seen(figures.waiting),
            figures.held,
            seen(figures.running),
        ];
        if decision.to != decision.from {
            let of = REASONS.iter().position(|r| *r == decision.reason);
            if let Some(count) = of.and_then(|index| self.decisions.get_mut(index)) {
                *count = count.saturating_add(1);
            }
        }
    }
}

/// What is told of every service.
pub(crate) static FAMILIES: [Family<Figures>; 5] = [
    Family::counter(
        "ashlar_autoscaler_decisions_total",
        "Decisions that changed the number of replicas, by reason.",
        |figures, lines| {
            for (reason, count) in REASONS.iter().zip(figures.decisions) {
                lines.add_with(&[("reason", reason.as_str())], f64::from(count));
            }
        },
    ),
    Family::gauge(
        "ashlar_autoscaler_demand_replicas",
        "Replicas that would carry the load at target.",
        |figures, lines| lines.add(figures.demand),
    ),
    Family::gauge(
        "ashlar_autoscaler_desired_replicas",
        "Replicas decided on.",
        |figures, lines| lines.add(f64::from(figures.desired)),
    ),
    Family::gauge(
        "ashlar_autoscaler_fresh_replicas",
        "Ready replicas whose metrics are younger than 3 s.",
        |figures, lines| lines.add(f64::from(figures.fresh)),
    ),
    Family::gauge(
        "ashlar_autoscaler_signal",
        "What decisions are made from: mean share of KV caches in use, requests waiting, held at gateways, running.",
        |figures, lines| {
            for (signal, value) in SIGNALS.into_iter().zip(figures.signals) {
                if let Some(value) = value {
                    lines.add_with(&[("signal", signal)], value);
                }
            }
        },
    ),
];

/// What the autoscaler tells of itself.
pub(super) struct Metrics {
    pub(super) round: Histogram,
}

impl Metrics {
    pub(super) fn new(registry: &Registry) -> prometheus::Result<(Self, ScrapeMetrics)> {
        let metrics = Self {
            round: Histogram::with_opts(
                HistogramOpts::new(
                    "ashlar_autoscaler_round_seconds",
                    "Time to decide on all services once.",
                )
                .buckets(vec![0.0001, 0.001, 0.005, 0.02, 0.1, 0.5]),
            )?,
        };
        let scrapes = ScrapeMetrics {
            scrapes: IntCounterVec::new(
                Opts::new(
                    "ashlar_autoscaler_scrapes_total",
                    "Scrapes of pods and gateways, by result.",
                ),
                &["kind", "result"],
            )?,
            seconds: Histogram::with_opts(
                HistogramOpts::new("ashlar_autoscaler_scrape_seconds", "Time of one scrape.")
                    .buckets(vec![0.001, 0.005, 0.02, 0.1, 0.4, 0.8]),
            )?,
        };
        registry.register(Box::new(metrics.round.clone()))?;
        registry.register(Box::new(scrapes.scrapes.clone()))?;
        registry.register(Box::new(scrapes.seconds.clone()))?;
        Ok((metrics, scrapes))
    }
}
