//! What the gateway tells Prometheus. Labels are only ever names of services that exist, and no key or client.

mod labels;
mod meter;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

pub use self::labels::{Cause, CutBy, Outcome, Trial};
pub use self::meter::{Held, Meter};

use prometheus::{
    Encoder as _, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use super::snapshot::{Service, ServiceId, Snapshot};

/// Buckets from a cached answer to a long generation, in seconds.
const SECONDS: [f64; 16] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0,
];

/// The gateway's metrics, all in one registry.
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    duration: HistogramVec,
    first_byte: HistogramVec,
    in_flight: IntGaugeVec,
    held: IntGaugeVec,
    retries: IntCounterVec,
    cut: IntCounterVec,
    ejections: IntCounterVec,
    limited: IntCounterVec,
    trials: IntCounterVec,
    ready_replicas: IntGaugeVec,
    /// Open connections of clients.
    pub connections: IntGauge,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    services: HashSet<ServiceId>,
    codes: HashSet<u16>,
    /// The revision on trial of each service that has one.
    trials: HashMap<ServiceId, String>,
}

impl Metrics {
    /// Registers everything.
    #[must_use]
    pub fn new() -> Self {
        let registry = Registry::new();
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let metric = IntCounterVec::new(Opts::new(name, help), labels);
            registered(&registry, metric)
        };
        let gauge = |name: &str, help: &str| {
            let metric = IntGaugeVec::new(Opts::new(name, help), &["namespace", "name"]);
            registered(&registry, metric)
        };
        let histogram = |name: &str, help: &str| {
            let opts = HistogramOpts::new(name, help).buckets(SECONDS.to_vec());
            registered(&registry, HistogramVec::new(opts, &["namespace", "name"]))
        };
        Self {
            requests: counter(
                "ashlar_gateway_requests_total",
                "Requests answered, by service and HTTP status; no service when none was found, 499 when the client left first.",
                &["namespace", "name", "code"],
            ),
            duration: histogram(
                "ashlar_gateway_request_duration_seconds",
                "From the request's head to the last byte of the response.",
            ),
            first_byte: histogram(
                "ashlar_gateway_time_to_first_byte_seconds",
                "From the request's head to the first byte of the response's body.",
            ),
            in_flight: gauge(
                "ashlar_gateway_in_flight_requests",
                "Requests that were accepted and have not ended, held ones included.",
            ),
            held: gauge(
                "ashlar_gateway_held_requests",
                "Requests that wait for a ready replica.",
            ),
            retries: counter(
                "ashlar_gateway_retries_total",
                "Attempts repeated before the first byte, by cause.",
                &["namespace", "name", "cause"],
            ),
            cut: counter(
                "ashlar_gateway_cut_responses_total",
                "Responses that ended before their last byte, by who ended them.",
                &["namespace", "name", "by"],
            ),
            ejections: counter(
                "ashlar_gateway_ejections_total",
                "Times that a replica was left out for a while because its answers failed.",
                &["namespace", "name"],
            ),
            limited: counter(
                "ashlar_gateway_limited_requests_total",
                "Requests refused because their client had sent too many or had too many open; no other metric counts them for the service.",
                &["namespace", "name"],
            ),
            trials: counter(
                "ashlar_gateway_canary_requests_total",
                "Requests that a revision on trial took, by outcome: failed are 5xx answers, and connections that broke before the answer's end.",
                &["namespace", "name", "revision", "outcome"],
            ),
            ready_replicas: gauge(
                "ashlar_gateway_ready_replicas",
                "Replicas that this gateway would send requests to.",
            ),
            connections: registered(
                &registry,
                IntGauge::new("ashlar_gateway_connections", "Open connections of clients."),
            ),
            registry,
            seen: Mutex::default(),
        }
    }

    /// The text that Prometheus reads.
    #[must_use]
    pub fn render(&self) -> String {
        self.render_only(&[])
    }

    /// The same of these metrics only, or of all when none is named.
    #[must_use]
    pub fn render_only(&self, names: &[&str]) -> String {
        let mut out = Vec::new();
        let mut families = self.registry.gather();
        if !names.is_empty() {
            families.retain(|family| names.contains(&family.name()));
        }
        TextEncoder::new()
            .encode(&families, &mut out)
            .expect("writing metrics to memory does not fail: this is a bug");
        String::from_utf8(out).expect("metrics are UTF-8: this is a bug")
    }

    /// Counts a replica's ejection.
    pub fn ejected(&self, service: &ServiceId) {
        let labels = [service.namespace.as_str(), service.name.as_str()];
        self.ejections.with_label_values(&labels).inc();
    }

    /// Counts a request that its client's limits refused.
    pub fn limited(&self, service: &ServiceId) {
        let labels = [service.namespace.as_str(), service.name.as_str()];
        self.limited.with_label_values(&labels).inc();
    }

    /// Starts counting what a revision on trial makes of a request; of others nothing is counted.
    #[must_use]
    pub fn trial(&self, service: &Service, revision: &str) -> Option<Trial> {
        let on_trial = service.spec.canary.as_ref();
        on_trial.filter(|canary| canary.revision == revision)?;
        let ServiceId { namespace, name } = &service.spec.id;
        let counter = |outcome: Outcome| {
            let labels = [namespace.as_str(), name, revision, outcome.label()];
            self.trials.with_label_values(&labels)
        };
        Some(Trial {
            answered: counter(Outcome::Answered),
            failed: counter(Outcome::Failed),
        })
    }

    /// Counts a request that no service was found for.
    pub fn unresolved(&self, code: u16) {
        self.requests
            .with_label_values(&["", "", &code.to_string()])
            .inc();
    }

    /// Starts counting a request for `service`, which began at `started`.
    #[must_use]
    pub fn meter(self: &Arc<Self>, service: &ServiceId, started: Instant) -> Meter {
        let labels = [service.namespace.as_str(), service.name.as_str()];
        let in_flight = self.in_flight.with_label_values(&labels);
        in_flight.inc();
        Meter {
            metrics: Arc::clone(self),
            service: service.clone(),
            started,
            code: None,
            first_byte: false,
            in_flight,
            permit: None,
            counts: true,
        }
    }

    /// Publishes how many replicas each service has, and forgets services that are gone.
    pub fn follow(&self, snapshot: &Snapshot) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        for service in snapshot.services() {
            let id = &service.spec.id;
            let ready = i64::try_from(service.replicas.len()).unwrap_or(i64::MAX);
            self.ready_replicas
                .with_label_values(&[&id.namespace, &id.name])
                .set(ready);
            self.held.with_label_values(&[&id.namespace, &id.name]); // zero is a value that scalers read
            // A counter that first appears at one shows no increase: what alerts read begins at zero.
            self.ejections.with_label_values(&[&id.namespace, &id.name]);
            for by in CutBy::ALL {
                self.cut
                    .with_label_values(&[&id.namespace, &id.name, by.label()]);
            }
            if !seen.services.contains(id) {
                seen.services.insert(id.clone());
            }
        }
        self.follow_trials(snapshot, &mut seen.trials);
        let codes: Vec<String> = seen.codes.iter().map(u16::to_string).collect();
        seen.services.retain(|id| {
            let known = snapshot.get(id).is_some();
            if !known {
                self.forget(id, &codes);
            }
            known
        });
    }

    /// A trial that is over leaves no label, and a new one begins with both outcomes at zero.
    fn follow_trials(&self, snapshot: &Snapshot, known: &mut HashMap<ServiceId, String>) {
        let now: HashMap<ServiceId, String> = snapshot
            .services()
            .filter_map(|service| {
                let canary = service.spec.canary.as_ref()?;
                Some((service.spec.id.clone(), canary.revision.clone()))
            })
            .collect();
        for (id, revision) in known.iter().filter(|(id, was)| now.get(id) != Some(was)) {
            for outcome in Outcome::ALL {
                let labels = [
                    &*id.namespace,
                    &*id.name,
                    revision.as_str(),
                    outcome.label(),
                ];
                // Removal fails when there was nothing to remove, which is as good.
                let _ = self.trials.remove_label_values(&labels);
            }
        }
        for (id, revision) in &now {
            for outcome in Outcome::ALL {
                let labels = [
                    &*id.namespace,
                    &*id.name,
                    revision.as_str(),
                    outcome.label(),
                ];
                self.trials.with_label_values(&labels);
            }
        }
        *known = now;
    }

    fn forget(&self, id: &ServiceId, codes: &[String]) {
        let labels = [id.namespace.as_str(), id.name.as_str()];
        // Removal fails when there was nothing to remove, which is as good.
        for code in codes {
            let _ = self
                .requests
                .remove_label_values(&[labels[0], labels[1], code]);
        }
        for cause in Cause::ALL {
            let labels = [labels[0], labels[1], cause.label()];
            let _ = self.retries.remove_label_values(&labels);
        }
        for by in CutBy::ALL {
            let labels = [labels[0], labels[1], by.label()];
            let _ = self.cut.remove_label_values(&labels);
        }
        let _ = self.ejections.remove_label_values(&labels);
        let _ = self.limited.remove_label_values(&labels);
        for gauge in [&self.in_flight, &self.held, &self.ready_replicas] {
            let _ = gauge.remove_label_values(&labels);
        }
        for histogram in [&self.duration, &self.first_byte] {
            let _ = histogram.remove_label_values(&labels);
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

fn registered<M>(registry: &Registry, metric: prometheus::Result<M>) -> M
where
    M: prometheus::core::Collector + Clone + 'static,
{
    let metric = metric.expect("the metric's name and labels are valid: this is a bug");
    registry
        .register(Box::new(metric.clone()))
        .expect("each metric is registered once: this is a bug");
    metric
}

#[cfg(test)]
mod tests {
    use super::super::snapshot::testing::{service, snapshot};
    use super::*;

    #[test]
    fn a_request_is_counted_once_with_its_status() {
        let metrics = Arc::new(Metrics::new());
        let id = ServiceId::new("chat", "mistral");
        let mut meter = metrics.meter(&id, Instant::now());
        assert!(
            metrics.render().contains(
                "ashlar_gateway_in_flight_requests{name=\"mistral\",namespace=\"chat\"} 1"
            )
        );
        meter.head(200);
        meter.byte();
        meter.byte();
        drop(meter);
        drop(metrics.meter(&id, Instant::now()));
        let some = metrics.render_only(&["ashlar_gateway_held_requests", "nothing"]);
        assert!(!some.contains("ashlar_gateway_requests_total"), "{some}");
        let text = metrics.render();
        for line in [
            "ashlar_gateway_requests_total{code=\"200\",name=\"mistral\",namespace=\"chat\"} 1",
            "ashlar_gateway_requests_total{code=\"499\",name=\"mistral\",namespace=\"chat\"} 1",
            "ashlar_gateway_in_flight_requests{name=\"mistral\",namespace=\"chat\"} 0",
            "ashlar_gateway_time_to_first_byte_seconds_count{name=\"mistral\",namespace=\"chat\"} 1",
            "ashlar_gateway_request_duration_seconds_count{name=\"mistral\",namespace=\"chat\"} 2",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }

    #[test]
    fn only_a_revision_on_trial_is_counted_and_only_while_it_is() {
        let metrics = Metrics::new();
        let mut spec = service("chat", "mistral", "m");
        spec.canary = Some(super::super::canary::Canary {
            revision: "new".into(),
            percent: 10,
        });
        let on_trial = snapshot([spec], []);
        metrics.follow(&on_trial);
        let service = on_trial.services().next().expect("a service");
        let trial = metrics.trial(service, "new").expect("it is on trial");
        trial.end(Outcome::Failed);
        assert!(metrics.trial(service, "old").is_none());
        let line = |outcome: &str, count: u32| {
            format!(
                "ashlar_gateway_canary_requests_total{{name=\"mistral\",namespace=\"chat\",outcome=\"{outcome}\",revision=\"new\"}} {count}"
            )
        };
        let text = metrics.render();
        assert!(
            text.contains(&line("failed", 1)) && text.contains(&line("answered", 0)),
            "{text}"
        );
        assert!(!text.contains("revision=\"old\""), "{text}");
        metrics.follow(&snapshot(
            [super::super::snapshot::testing::service(
                "chat", "mistral", "m",
            )],
            [],
        ));
        assert!(!metrics.render().contains("revision="));
    }

    #[test]
    fn a_service_that_is_gone_leaves_no_label() {
        let metrics = Arc::new(Metrics::new());
        metrics.follow(&snapshot([service("chat", "mistral", "m")], []));
        let mut meter = metrics.meter(&ServiceId::new("chat", "mistral"), Instant::now());
        meter.head(503);
        meter.byte();
        meter.retry(Cause::Draining);
        meter.cut(CutBy::Client);
        drop(meter.hold());
        drop(meter);
        metrics.limited(&ServiceId::new("chat", "mistral"));
        assert!(metrics.render().contains("mistral"));
        metrics.follow(&snapshot([], []));
        assert!(
            !metrics.render().contains("mistral"),
            "{}",
            metrics.render()
        );
    }
}
