//! What dashboards and alerts read of every service: replicas, conditions, download, and what the autoscaler sees and decides.
//! Written from the caches when somebody scrapes, so that a service that is gone leaves nothing behind, a reconcile pays
//! nothing, and nothing is kept twice.

use std::sync::Arc;

use ashlar_crds::{InferenceService, InferenceServiceStatus};
use bytes::Bytes;
use kube::{ResourceExt as _, runtime::reflector::Store};

use crate::{
    autoscaler::{self, Autoscaler},
    exposition::{Family, Lines},
};

/// Bytes of one part of the text, and a little more.
const PART: usize = 32 << 10;

/// Metrics of all services in a cache.
pub(super) struct ServiceMetrics {
    services: Store<InferenceService>,
    autoscaler: Arc<Autoscaler>,
}

impl ServiceMetrics {
    /// Of the services in this cache, and of what is decided about them.
    pub(super) fn new(services: Store<InferenceService>, autoscaler: Arc<Autoscaler>) -> Self {
        Self {
            services,
            autoscaler,
        }
    }

    /// The whole text, part by part.
    pub(super) fn parts(&self) -> Parts {
        Parts {
            services: self.services.state(),
            autoscaler: Arc::clone(&self.autoscaler),
            family: 0,
            service: 0,
            headed: false,
        }
    }
}

/// A text that is written as it is read.
pub(super) struct Parts {
    services: Vec<Arc<InferenceService>>,
    autoscaler: Arc<Autoscaler>,
    family: usize,
    service: usize,
    headed: bool,
}

impl Iterator for Parts {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        let mut text = String::with_capacity(PART + 1024);
        while text.len() < PART && self.family < FAMILIES.len() + autoscaler::FAMILIES.len() {
            let Some(service) = self.services.get(self.service) else {
                (self.family, self.service, self.headed) = (self.family + 1, 0, false);
                continue;
            };
            self.service += 1;
            let (namespace, name) = (service.namespace().unwrap_or_default(), service.name_any());
            let of = (namespace.as_str(), name.as_str());
            match FAMILIES.get(self.family) {
                Some(family) => family.append(service, of, &mut self.headed, &mut text),
                None => {
                    let family = &autoscaler::FAMILIES[self.family - FAMILIES.len()];
                    if let Some(figures) = self.autoscaler.figures(service) {
                        family.append(&figures, of, &mut self.headed, &mut text);
                    }
                }
            }
        }
        (!text.is_empty()).then(|| text.into())
    }
}

/// Before its first look a service has no status, and nothing is known of it.
fn status(service: &InferenceService) -> Option<&InferenceServiceStatus> {
    service.status.as_ref()
}

fn count(lines: &mut Lines<'_>, value: Option<i32>) {
    if let Some(value) = value {
        lines.add(f64::from(value));
    }
}

#[allow(clippy::cast_precision_loss, reason = "a gauge is a float")]
fn bytes(lines: &mut Lines<'_>, value: Option<i64>) {
    if let Some(value) = value {
        lines.add(value as f64);
    }
}

fn wanted(service: &InferenceService) -> Option<i32> {
    let scaling = status(service)?.scaling.as_ref();
    Some(scaling.map_or(service.spec.replicas, |scaling| scaling.desired_replicas))
}

static FAMILIES: [Family<InferenceService>; 9] = [
    Family::gauge(
        "ashlar_service_condition",
        "1 for what each condition of the service says now.",
        |service, lines| {
            for condition in status(service).iter().flat_map(|status| &status.conditions) {
                let labels = [
                    ("reason", condition.reason.as_str()),
                    ("status", &condition.status),
                    ("type", &condition.type_),
                ];
                lines.add_with(&labels, 1.0);
            }
        },
    ),
    Family::gauge(
        "ashlar_service_model_bytes",
        "Bytes of the whole model.",
        |service, lines| {
            let model = status(service).and_then(|status| status.model.as_ref());
            bytes(lines, model.and_then(|model| model.total_bytes));
        },
    ),
    Family::gauge(
        "ashlar_service_model_downloaded_bytes",
        "Bytes of the model that are on disk.",
        |service, lines| {
            let model = status(service).and_then(|status| status.model.as_ref());
            bytes(lines, model.and_then(|model| model.downloaded_bytes));
        },
    ),
    Family::gauge(
        "ashlar_service_replicas",
        "Pods that exist, of any revision.",
        |service, lines| count(lines, status(service).map(|status| status.replicas)),
    ),
    Family::gauge(
        "ashlar_service_replicas_max",
        "Most replicas that scaling may choose.",
        |service, lines| {
            let scaling = service.spec.scaling.as_ref();
            count(lines, scaling.map(|scaling| scaling.max_replicas));
        },
    ),
    Family::gauge(
        "ashlar_service_replicas_min",
        "Fewest replicas that scaling may choose.",
        |service, lines| {
            let scaling = service.spec.scaling.as_ref();
            count(lines, scaling.map(|scaling| scaling.min_replicas));
        },
    ),
    Family::gauge(
        "ashlar_service_replicas_ready",
        "Pods that answer, of any revision.",
        |service, lines| count(lines, status(service).map(|status| status.ready_replicas)),
    ),
    Family::gauge(
        "ashlar_service_replicas_updated",
        "Pods of the newest revision.",
        |service, lines| {
            count(lines, status(service).map(|status| status.updated_replicas));
        },
    ),
    Family::gauge(
        "ashlar_service_replicas_wanted",
        "Replicas that are wanted now.",
        |service, lines| count(lines, wanted(service)),
    ),
];

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use kube::runtime::{
        reflector::{self, store::Writer},
        watcher::Event,
    };
    use prometheus::Registry;
    use serde_json::json;

    use super::*;

    fn service(status: serde_json::Value) -> InferenceService {
        serde_json::from_value(json!({
            "apiVersion": "serving.ashlar.dev/v1alpha1",
            "kind": "InferenceService",
            "metadata": {"name": "mistral", "namespace": "chat"},
            "spec": {
                "model": {"uri": "hf://a/b"},
                "endpoint": {"auth": "None"},
                "scaling": {"minReplicas": 0, "maxReplicas": 4},
            },
            "status": status,
        }))
        .unwrap()
    }

    fn metrics() -> (ServiceMetrics, Writer<InferenceService>) {
        let (store, writer) = reflector::store();
        let trust = crate::model_tls::Trust::none();
        let autoscaler = Autoscaler::new(&Registry::new(), 8081, trust).unwrap();
        (ServiceMetrics::new(store, Arc::new(autoscaler)), writer)
    }

    fn text(metrics: &ServiceMetrics) -> String {
        let parts = metrics.parts().flatten().collect();
        String::from_utf8(parts).unwrap()
    }

    #[test]
    fn a_scrape_shows_what_the_cache_holds_and_nothing_else() {
        let (metrics, mut writer) = metrics();
        assert_eq!(text(&metrics), "");

        let condition = |status: &str, reason: &str| json!({"conditions": [{"type": "Ready", "status": status, "reason": reason, "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]});
        writer.apply_watcher_event(&Event::Apply(service(condition(
            "False",
            "ModelDownloading",
        ))));
        assert!(
            text(&metrics)
                .contains("reason=\"ModelDownloading\",status=\"False\",type=\"Ready\"} 1")
        );

        let mut status = condition("True", "Available");
        status["replicas"] = json!(3);
        status["readyReplicas"] = json!(2);
        status["scaling"] = json!({"desiredReplicas": 4});
        status["model"] = json!({"phase": "Ready", "downloadedBytes": 7, "totalBytes": 9});
        let last = service(status);
        writer.apply_watcher_event(&Event::Apply(last.clone()));
        let seen = text(&metrics);
        for line in [
            "ashlar_service_condition{name=\"mistral\",namespace=\"chat\",reason=\"Available\",status=\"True\",type=\"Ready\"} 1",
            "ashlar_service_replicas{name=\"mistral\",namespace=\"chat\"} 3",
            "ashlar_service_replicas_ready{name=\"mistral\",namespace=\"chat\"} 2",
            "ashlar_service_replicas_wanted{name=\"mistral\",namespace=\"chat\"} 4",
            "ashlar_service_replicas_max{name=\"mistral\",namespace=\"chat\"} 4",
            "ashlar_service_model_downloaded_bytes{name=\"mistral\",namespace=\"chat\"} 7",
        ] {
            assert!(seen.contains(line), "{line}\n{seen}");
        }
        assert!(!seen.contains("ModelDownloading"), "{seen}");

        writer.apply_watcher_event(&Event::Delete(last));
        assert_eq!(text(&metrics), "");
    }

    #[test]
    fn a_large_text_comes_in_small_parts_and_names_each_metric_once() {
        let (metrics, mut writer) = metrics();
        for number in 0..1000 {
            let mut service = service(json!({"replicas": 2, "readyReplicas": 1}));
            service.metadata.name = Some(format!("service-{number}"));
            writer.apply_watcher_event(&Event::Apply(service));
        }
        let sizes: Vec<usize> = metrics.parts().map(|part| part.len()).collect();
        assert!(
            sizes.len() > 10 && sizes.iter().all(|size| *size < PART + 1024),
            "{sizes:?}"
        );
        let text = text(&metrics);
        let named = |name: &str| text.matches(&format!("# TYPE {name} gauge\n")).count();
        assert_eq!(
            (
                named("ashlar_service_replicas"),
                named("ashlar_service_model_bytes")
            ),
            (1, 0)
        );
        let lines = text
            .lines()
            .filter(|line| line.starts_with("ashlar_service_replicas_ready{"));
        assert_eq!(lines.count(), 1000);
    }
}
