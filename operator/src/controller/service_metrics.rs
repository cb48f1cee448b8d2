//! What dashboards and alerts read of every service: replicas, conditions, download. Collected from the watch's cache when
//! somebody scrapes, so that a service that is gone leaves nothing behind and a reconcile pays nothing.

use ashlar_crds::InferenceService;
use kube::{ResourceExt as _, runtime::reflector::Store};
use prometheus::{
    GaugeVec, Opts,
    core::{Collector, Desc},
    proto::MetricFamily,
};

/// Labels of every figure.
const SERVICE: [&str; 2] = ["namespace", "name"];

/// Metrics of all services in a cache.
pub(super) struct ServiceMetrics {
    services: Store<InferenceService>,
    /// Never filled: says which metrics there are.
    empty: Figures,
}

impl ServiceMetrics {
    /// Of the services in this cache.
    pub(super) fn new(services: Store<InferenceService>) -> Self {
        Self {
            services,
            empty: Figures::new(),
        }
    }
}

impl Collector for ServiceMetrics {
    fn desc(&self) -> Vec<&Desc> {
        self.empty
            .all()
            .into_iter()
            .flat_map(Collector::desc)
            .collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let figures = Figures::new();
        for service in self.services.state() {
            figures.add(&service);
        }
        let families = figures.all().into_iter().flat_map(Collector::collect);
        families
            .filter(|family| !family.get_metric().is_empty())
            .collect()
    }
}

struct Figures {
    wanted: GaugeVec,
    existing: GaugeVec,
    ready: GaugeVec,
    updated: GaugeVec,
    least: GaugeVec,
    most: GaugeVec,
    condition: GaugeVec,
    downloaded: GaugeVec,
    total: GaugeVec,
}

impl Figures {
    fn new() -> Self {
        let gauge = |name: &str, help: &str, more: &[&str]| {
            let labels = [&SERVICE, more].concat();
            GaugeVec::new(Opts::new(name, help), &labels).expect("static names: this is a bug")
        };
        Self {
            wanted: gauge(
                "ashlar_service_replicas_wanted",
                "Replicas that are wanted now.",
                &[],
            ),
            existing: gauge(
                "ashlar_service_replicas",
                "Pods that exist, of any revision.",
                &[],
            ),
            ready: gauge(
                "ashlar_service_replicas_ready",
                "Pods that answer, of any revision.",
                &[],
            ),
            updated: gauge(
                "ashlar_service_replicas_updated",
                "Pods of the newest revision.",
                &[],
            ),
            least: gauge(
                "ashlar_service_replicas_min",
                "Fewest replicas that scaling may choose.",
                &[],
            ),
            most: gauge(
                "ashlar_service_replicas_max",
                "Most replicas that scaling may choose.",
                &[],
            ),
            condition: gauge(
                "ashlar_service_condition",
                "1 for what each condition of the service says now.",
                &["type", "status", "reason"],
            ),
            downloaded: gauge(
                "ashlar_service_model_downloaded_bytes",
                "Bytes of the model that are on disk.",
                &[],
            ),
            total: gauge(
                "ashlar_service_model_bytes",
                "Bytes of the whole model.",
                &[],
            ),
        }
    }

    fn all(&self) -> [&GaugeVec; 9] {
        [
            &self.wanted,
            &self.existing,
            &self.ready,
            &self.updated,
            &self.least,
            &self.most,
            &self.condition,
            &self.downloaded,
            &self.total,
        ]
    }

    fn add(&self, service: &InferenceService) {
        let (namespace, name) = (service.namespace().unwrap_or_default(), service.name_any());
        let of = [namespace.as_str(), name.as_str()];
        let set = |gauge: &GaugeVec, value: f64| gauge.with_label_values(&of).set(value);
        if let Some(scaling) = &service.spec.scaling {
            set(&self.least, f64::from(scaling.min_replicas));
            set(&self.most, f64::from(scaling.max_replicas));
        }
        // Before its first look a service has no status, and nothing is known of it.
        let Some(status) = &service.status else {
            return;
        };
        let decided = status.scaling.as_ref().map(|s| s.desired_replicas);
        set(
            &self.wanted,
            f64::from(decided.unwrap_or(service.spec.replicas)),
        );
        set(&self.existing, f64::from(status.replicas));
        set(&self.ready, f64::from(status.ready_replicas));
        set(&self.updated, f64::from(status.updated_replicas));
        for condition in &status.conditions {
            let labels = [
                of[0],
                of[1],
                &condition.type_,
                &condition.status,
                &condition.reason,
            ];
            self.condition.with_label_values(&labels).set(1.0);
        }
        let Some(model) = &status.model else {
            return;
        };
        #[allow(clippy::cast_precision_loss, reason = "a gauge is a float")]
        let bytes = |gauge: &GaugeVec, bytes: Option<i64>| {
            if let Some(bytes) = bytes {
                set(gauge, bytes as f64);
            }
        };
        bytes(&self.downloaded, model.downloaded_bytes);
        bytes(&self.total, model.total_bytes);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use kube::runtime::{reflector, watcher::Event};
    use prometheus::{Encoder as _, Registry, TextEncoder};
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

    fn text(registry: &Registry) -> String {
        let mut text = Vec::new();
        TextEncoder::new()
            .encode(&registry.gather(), &mut text)
            .unwrap();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn a_scrape_shows_what_the_cache_holds_and_nothing_else() {
        let (store, mut writer) = reflector::store();
        let registry = Registry::new();
        registry
            .register(Box::new(ServiceMetrics::new(store)))
            .unwrap();
        assert_eq!(text(&registry), "");

        let condition = |status: &str, reason: &str| json!({"conditions": [{"type": "Ready", "status": status, "reason": reason, "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]});
        writer.apply_watcher_event(&Event::Apply(service(condition(
            "False",
            "ModelDownloading",
        ))));
        assert!(
            text(&registry)
                .contains("reason=\"ModelDownloading\",status=\"False\",type=\"Ready\"} 1")
        );

        let mut status = condition("True", "Available");
        status["replicas"] = json!(3);
        status["readyReplicas"] = json!(2);
        status["scaling"] = json!({"desiredReplicas": 4});
        status["model"] = json!({"phase": "Ready", "downloadedBytes": 7, "totalBytes": 9});
        let last = service(status);
        writer.apply_watcher_event(&Event::Apply(last.clone()));
        let seen = text(&registry);
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
        assert_eq!(text(&registry), "");
    }
}
