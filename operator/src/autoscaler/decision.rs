//! A decision and how it explains itself: its reason, its figures, its sentence.

use std::collections::BTreeMap;

use super::capacity::Known;

/// Why the count is what it is; CamelCase, as in status and events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Nothing to change.
    Steady,
    /// Requests wait.
    QueueDepth,
    /// KV caches fill.
    KvCacheUtilization,
    /// More requests arrive, or will have arrived when a replica has started, than the replicas sustain.
    ArrivalRate,
    /// Requests arrived while no replica was there.
    HeldRequests,
    /// Less load than the replicas are meant to carry.
    LoadDropped,
    /// No request for `idleSeconds`.
    Idle,
    /// minReplicas or maxReplicas changed.
    Bounds,
    /// Too few signals to decide.
    MetricsUnavailable,
}

impl Reason {
    /// CamelCase.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Steady => "Steady",
            Self::QueueDepth => "QueueDepth",
            Self::KvCacheUtilization => "KVCacheUtilization",
            Self::ArrivalRate => "ArrivalRate",
            Self::HeldRequests => "HeldRequests",
            Self::LoadDropped => "LoadDropped",
            Self::Idle => "Idle",
            Self::Bounds => "Bounds",
            Self::MetricsUnavailable => "MetricsUnavailable",
        }
    }
}

/// The figures that a decision was made from.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Figures {
    /// Ready replicas.
    pub ready: usize,
    /// Those whose signal is fresh.
    pub fresh: usize,
    /// Mean KV-cache use of the replicas that tell, 0 to 1.
    pub kv_cache: f64,
    /// Requests waiting at replicas.
    pub waiting: f64,
    /// Requests held at gateways, when the gateways tell.
    pub held: Option<f64>,
    /// Requests that generate.
    pub running: f64,
    /// Replicas that would carry the load at target: now, over 4 s, over 60 s.
    pub demand: [f64; 3],
    /// The part of it that KV caches ask for: over 30 s.
    pub cache_demand: f64,
    /// A replica's rate and the arrivals, when known.
    pub known: Option<Known>,
    /// A panic is on.
    pub panic: bool,
    /// Quiet seconds so far.
    pub idle: f64,
}

/// What to do.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// Replicas wanted before.
    pub from: i32,
    /// Replicas wanted now.
    pub to: i32,
    /// Why.
    pub reason: Reason,
    /// From which figures.
    pub figures: Figures,
    /// What cannot be seen, if anything that matters.
    pub blind: Option<String>,
}

impl Decision {
    /// The figures by name, for status.
    #[must_use]
    pub fn inputs(&self) -> BTreeMap<String, String> {
        let figures = &self.figures;
        let mut inputs = BTreeMap::from([
            ("readyReplicas".to_owned(), figures.ready.to_string()),
            ("freshReplicas".to_owned(), figures.fresh.to_string()),
            (
                "kvCacheUtilization".to_owned(),
                format!("{:.3}", figures.kv_cache),
            ),
            (
                "waitingRequests".to_owned(),
                format!("{:.0}", figures.waiting),
            ),
            (
                "runningRequests".to_owned(),
                format!("{:.0}", figures.running),
            ),
            ("demand".to_owned(), format!("{:.2}", figures.demand[0])),
            ("demand4s".to_owned(), format!("{:.2}", figures.demand[1])),
            ("demand60s".to_owned(), format!("{:.2}", figures.demand[2])),
        ]);
        if let Some(held) = figures.held {
            inputs.insert("heldRequests".to_owned(), format!("{held:.0}"));
        }
        if let Some(known) = figures.known {
            inputs.insert(
                "arrivalsPerSecond".to_owned(),
                format!("{:.2}", known.arrivals.now),
            );
            inputs.insert(
                "arrivalsTrendPerMinute".to_owned(),
                format!("{:+.2}", known.arrivals.trend * 60.0),
            );
            inputs.insert("startupSeconds".to_owned(), format!("{:.0}", known.startup));
            inputs.insert(
                "requestsPerSecondOfReplica".to_owned(),
                format!("{:.2}", known.per_replica),
            );
        }
        if figures.panic {
            inputs.insert("panic".to_owned(), "true".to_owned());
        }
        inputs
    }

    /// One sentence for people.
    #[must_use]
    pub fn explain(&self) -> String {
        let figures = &self.figures;
        let cause = match self.reason {
            Reason::QueueDepth => format!(
                "{:.0} requests wait ({:.0} of them at the gateways) at {} ready replicas",
                figures.waiting + figures.held.unwrap_or(0.0),
                figures.held.unwrap_or(0.0),
                figures.ready
            ),
            Reason::KvCacheUtilization => format!(
                "KV caches are {:.0} % full on average of {} ready replicas",
                figures.kv_cache * 100.0,
                figures.ready
            ),
            Reason::ArrivalRate => figures.known.map_or_else(String::new, |known| {
                let trend = known.arrivals.ahead(known.startup) - known.arrivals.ahead(0.0);
                let trend = if trend > 0.0 {
                    format!(
                        ", {trend:+.1} by the time a replica has started ({:.0} s)",
                        known.startup
                    )
                } else {
                    String::new()
                };
                format!(
                    "{:.1} requests arrive per second{trend}, and a replica is meant for {:.1}",
                    known.arrivals.now, known.per_replica
                )
            }),
            Reason::HeldRequests => format!(
                "the gateways hold {:.0} requests and no replica is there",
                figures.held.unwrap_or(0.0)
            ),
            Reason::LoadDropped => format!(
                "the load of the last minute needs {:.1} replicas, and as many can hold it",
                figures.demand[2]
            ),
            Reason::Idle => format!("no request for {:.0} s", figures.idle),
            Reason::Bounds => "minReplicas or maxReplicas changed".to_owned(),
            Reason::MetricsUnavailable => "too few pods answer with their metrics".to_owned(),
            Reason::Steady => format!("the load needs {:.1} replicas", figures.demand[1]),
        };
        format!("from {} to {} replicas: {cause}", self.from, self.to)
    }
}
