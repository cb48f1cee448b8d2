//! What the autoscaler tells Prometheus: signals, demand and decisions of each service, gone with it.

use prometheus::{GaugeVec, Histogram, HistogramOpts, IntCounterVec, IntGaugeVec, Opts, Registry};

use super::Key;
use super::decision::{Decision, Reason};
use super::scrape::ScrapeMetrics;

/// What the autoscaler tells Prometheus.
pub(super) struct Metrics {
    desired: IntGaugeVec,
    demand: GaugeVec,
    fresh: IntGaugeVec,
    signal: GaugeVec,
    decisions: IntCounterVec,
    pub(super) round: Histogram,
}

/// Reasons that change a count, for removal of labels.
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

impl Metrics {
    pub(super) fn new(registry: &Registry) -> prometheus::Result<(Self, ScrapeMetrics)> {
        let of_service = ["namespace", "name"];
        let metrics = Self {
            desired: IntGaugeVec::new(
                Opts::new("ashlar_autoscaler_desired_replicas", "Replicas decided on."),
                &of_service,
            )?,
            demand: GaugeVec::new(
                Opts::new(
                    "ashlar_autoscaler_demand_replicas",
                    "Replicas that would carry the load at target.",
                ),
                &of_service,
            )?,
            fresh: IntGaugeVec::new(
                Opts::new(
                    "ashlar_autoscaler_fresh_replicas",
                    "Ready replicas whose metrics are younger than 3 s.",
                ),
                &of_service,
            )?,
            signal: GaugeVec::new(
                Opts::new(
                    "ashlar_autoscaler_signal",
                    "What decisions are made from: mean share of KV caches in use, requests waiting, held at gateways, running.",
                ),
                &["namespace", "name", "signal"],
            )?,
            decisions: IntCounterVec::new(
                Opts::new(
                    "ashlar_autoscaler_decisions_total",
                    "Decisions that changed the number of replicas, by reason.",
                ),
                &["namespace", "name", "reason"],
            )?,
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
        registry.register(Box::new(metrics.desired.clone()))?;
        registry.register(Box::new(metrics.demand.clone()))?;
        registry.register(Box::new(metrics.fresh.clone()))?;
        registry.register(Box::new(metrics.signal.clone()))?;
        registry.register(Box::new(metrics.decisions.clone()))?;
        registry.register(Box::new(metrics.round.clone()))?;
        registry.register(Box::new(scrapes.scrapes.clone()))?;
        registry.register(Box::new(scrapes.seconds.clone()))?;
        Ok((metrics, scrapes))
    }

    /// A counter that first appears at one shows no increase: each begins at zero.
    pub(super) fn begin(&self, key: &Key) {
        for reason in REASONS {
            self.decisions
                .with_label_values(&[&key.0, &key.1, reason.as_str()]);
        }
    }

    pub(super) fn decided(&self, key: &Key, decision: &Decision) {
        let labels = [key.0.as_str(), key.1.as_str()];
        self.desired
            .with_label_values(&labels)
            .set(i64::from(decision.to));
        self.demand
            .with_label_values(&labels)
            .set(decision.figures.demand[0]);
        self.fresh
            .with_label_values(&labels)
            .set(i64::try_from(decision.figures.fresh).unwrap_or(i64::MAX));
        let figures = &decision.figures;
        // Nothing is known of replicas of which none is fresh: no figure then, rather than a zero.
        let seen = |value: f64| (figures.fresh > 0).then_some(value);
        let signals = [
            seen(figures.kv_cache),
            seen(figures.waiting),
            figures.held,
            seen(figures.running),
        ];
        for (signal, value) in SIGNALS.into_iter().zip(signals) {
            let labels = [labels[0], labels[1], signal];
            match value {
                Some(value) => self.signal.with_label_values(&labels).set(value),
                // Removal fails when there was nothing to remove, which is as good.
                None => drop(self.signal.remove_label_values(&labels)),
            }
        }
        if decision.to != decision.from {
            self.decisions
                .with_label_values(&[labels[0], labels[1], decision.reason.as_str()])
                .inc();
        }
    }

    pub(super) fn forget(&self, key: &Key) {
        let labels = [key.0.as_str(), key.1.as_str()];
        // Removal fails when there was nothing to remove, which is as good.
        let _ = self.desired.remove_label_values(&labels);
        let _ = self.demand.remove_label_values(&labels);
        let _ = self.fresh.remove_label_values(&labels);
        for signal in SIGNALS {
            let labels = [labels[0], labels[1], signal];
            let _ = self.signal.remove_label_values(&labels);
        }
        for reason in REASONS {
            let labels = [labels[0], labels[1], reason.as_str()];
            let _ = self.decisions.remove_label_values(&labels);
        }
    }
}
