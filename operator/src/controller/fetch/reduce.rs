//! What the caches keep of each object, and how it is read again.

use std::sync::Arc;

use ashlar_crds::names::{FIELD_MANAGER, SERVICE_LABEL};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Resource,
    api::{ApiResource, ObjectMeta},
};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{
    LiveChild,
    rest::{Packed, Packer},
};
use crate::{
    autoscaler::ReadyPod,
    controller::{
        build::children::SLICE_MANAGER_LABEL, index::Reduced, pods::TELLING_CONDITIONS, seen,
        victims::DELETION_COST,
    },
};

/// Conditions of children that a reconcile looks at.
const TELLING: [&str; 2] = ["ReplicaFailure", "Complete"];

/// A child at rest: its text, to be read when its service is looked at.
pub(super) type Stored = Packed;

/// A pod at rest: its text, and what the autoscaler looks at several times a second.
#[derive(Debug, Clone)]
pub(super) struct StoredPod {
    text: Packed,
    /// Where to ask it, while it is ready.
    pub(super) ready: Option<Arc<ReadyPod>>,
}

impl PartialEq for StoredPod {
    fn eq(&self, other: &Self) -> bool {
        // The rest is read from the text.
        self.text == other.text
    }
}

impl StoredPod {
    /// The pod, as far as it was kept.
    pub(super) fn pod(&self) -> Arc<Pod> {
        let pod = serde_json::from_slice(&self.text.unpack());
        Arc::new(pod.expect("text that we wrote: this is a bug"))
    }
}

/// The children of kind `K`, read whole; one that someone has damaged is as good as absent.
pub(super) fn typed<K>(live: &[LiveChild]) -> Vec<Arc<K>>
where
    K: Resource<DynamicType = ()> + DeserializeOwned,
{
    let kind = K::kind(&());
    live.iter()
        .filter(|child| child.resource.kind == kind)
        .filter_map(|child| K::deserialize(&child.value).ok().map(Arc::new))
        .collect()
}

pub(super) fn live_child(resource: &ApiResource, stored: &Stored) -> LiveChild {
    let mut value: Value =
        serde_json::from_slice(&stored.unpack()).expect("text that we wrote: this is a bug");
    value["apiVersion"] = resource.api_version.clone().into();
    value["kind"] = resource.kind.clone().into();
    let text = |pointer: &str| {
        value
            .pointer(pointer)
            .and_then(Value::as_str)
            .map(str::to_owned)
    };
    let owners = value.pointer("/metadata/ownerReferences");
    let owner = owners.and_then(Value::as_array).and_then(|owners| {
        let controller = owners.iter().find(|owner| owner["controller"] == true)?;
        Some(controller["uid"].as_str()?.to_owned())
    });
    LiveChild {
        resource: resource.clone(),
        name: text("/metadata/name").unwrap_or_default(),
        owner,
        terminating: text("/metadata/deletionTimestamp").is_some(),
        value,
    }
}

/// Children: all that somebody could have edited, nothing that only the cluster writes.
pub(super) fn reduce_child(child: seen::Child, packer: &Packer) -> Option<Reduced<Stored>> {
    let mut meta = child.metadata;
    let service = service_of(&meta, SERVICE_LABEL)?;
    // The cluster's own controller copies our labels to the slices of the headless Service: those are not ours.
    let labels = meta.labels.as_ref();
    let manager = labels.and_then(|labels| labels.get(SLICE_MANAGER_LABEL));
    if manager.is_some_and(|manager| manager != FIELD_MANAGER) {
        return None;
    }
    meta.resource_version = None;
    meta.creation_timestamp = None;
    let name = meta.name.clone()?;
    let mut fields = child.fields;
    let meta = serde_json::to_value(meta).expect("metadata is plain data: this is a bug");
    fields.insert("metadata".into(), meta);
    if let Some(telling) = telling_conditions(child.status) {
        fields.insert("status".into(), telling);
    }
    Some(Reduced {
        service,
        name,
        value: packer.pack(&Value::Object(fields).to_string()),
    })
}

/// The part of a status that says why a Deployment's pods are not created, or that a Job is over.
fn telling_conditions(status: seen::Status) -> Option<Value> {
    let mut conditions = status.conditions?;
    let is = |condition: &Map<String, Value>, field: &str, value: &str| {
        condition.get(field).and_then(Value::as_str) == Some(value)
    };
    conditions.retain(|c| {
        is(c, "status", "True") && TELLING.iter().any(|telling| is(c, "type", telling))
    });
    for condition in &mut conditions {
        condition.remove("lastUpdateTime");
        condition.remove("lastProbeTime");
    }
    let any = !conditions.is_empty();
    any.then(|| serde_json::json!({ "conditions": conditions }))
}

/// Pods: identity, labels and state.
pub(super) fn reduce_pod(
    seen: seen::Pod,
    label: &str,
    packer: &Packer,
) -> Option<Reduced<StoredPod>> {
    let meta = seen.metadata;
    let service = service_of(&meta, label)?;
    let name = meta.name.clone()?;
    let mut pod = Pod {
        status: seen.status,
        ..Pod::default()
    };
    if let Some(status) = pod.status.as_mut() {
        for container in status
            .init_container_statuses
            .iter_mut()
            .chain(status.container_statuses.iter_mut())
            .flatten()
        {
            container.container_id = None;
            container.image_id = String::new();
            container.allocated_resources = None;
            container.resources = None;
            container.volume_mounts = None;
            container.user = None;
        }
        status.pod_ips = None;
        status.host_ips = None;
        status.host_ip = None;
        status.resource_claim_statuses = None;
        if let Some(conditions) = status.conditions.as_mut() {
            conditions.retain(|condition| TELLING_CONDITIONS.contains(&&*condition.type_));
        }
    }
    pod.metadata = ObjectMeta {
        annotations: meta.annotations.and_then(|mut annotations| {
            annotations.retain(|key, _| key == DELETION_COST);
            (!annotations.is_empty()).then_some(annotations)
        }),
        name: meta.name,
        namespace: meta.namespace,
        uid: meta.uid,
        labels: meta.labels.map(|mut labels| {
            labels.retain(|key, _| key.starts_with("serving.ashlar.dev/"));
            labels
        }),
        creation_timestamp: meta.creation_timestamp,
        deletion_timestamp: meta.deletion_timestamp,
        ..ObjectMeta::default()
    };
    let text = serde_json::to_string(&pod).expect("a pod is plain data: this is a bug");
    Some(Reduced {
        service,
        name,
        value: StoredPod {
            text: packer.pack(&text),
            ready: ReadyPod::of(&pod).map(Arc::new),
        },
    })
}

fn service_of(meta: &ObjectMeta, label: &str) -> Option<String> {
    let service = meta.labels.as_ref()?.get(label)?;
    Some(format!("{}/{service}", meta.namespace.as_deref()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use k8s_openapi::api::core::v1::Service;
    use serde_json::json;

    use super::*;
    use crate::controller::apply::is_current;

    fn through_the_cache(mut stored: Value) -> LiveChild {
        let resource = ApiResource::erase::<Service>(&());
        // As in a list: kind and version are said once for all.
        for field in ["apiVersion", "kind"] {
            stored.as_object_mut().unwrap().remove(field);
        }
        let stored = serde_json::from_value(stored).unwrap();
        let reduced = reduce_child(stored, &Packer::default()).unwrap();
        assert_eq!(
            (reduced.service.as_str(), reduced.name.as_str()),
            ("chat/m", "m-pods")
        );
        live_child(&resource, &reduced.value)
    }

    #[test]
    fn a_child_as_applied_is_current_when_the_watch_shows_it() {
        let applied = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {
                "name": "m-pods", "namespace": "chat", "labels": {(SERVICE_LABEL): "m"},
                "annotations": {"serving.ashlar.dev/applied": "0123"},
                "ownerReferences": [{"apiVersion": "a/v1", "kind": "K", "name": "m", "uid": "u", "controller": true, "blockOwnerDeletion": true}],
            },
            "spec": {"clusterIP": "None", "ports": [{"port": 8000}]},
        });
        let mut stored = applied.clone();
        stored["metadata"]["resourceVersion"] = "7".into();
        stored["metadata"]["managedFields"] = json!([{"manager": "ashlar-operator"}]);
        stored["status"] = json!({"loadBalancer": {}});
        let live = through_the_cache(stored.clone());
        assert!(is_current(&applied, &live.value), "{}", live.value);
        assert_eq!(
            (live.owner.as_deref(), live.terminating),
            (Some("u"), false)
        );
        assert_eq!(live.value.get("status"), None);
        stored["spec"]["ports"][0]["port"] = 1.into();
        assert!(!is_current(&applied, &through_the_cache(stored).value));
    }

    #[test]
    fn of_a_status_only_a_refusal_and_an_end_are_kept() {
        let refusal = json!({"type": "ReplicaFailure", "status": "True", "message": "quota", "lastUpdateTime": "t"});
        let other = json!({"type": "Available", "status": "True"});
        let telling = |status: Value| telling_conditions(serde_json::from_value(status).unwrap());
        let kept = telling(json!({"replicas": 3, "conditions": [other, refusal]})).unwrap();
        assert_eq!(
            kept,
            json!({"conditions": [{"type": "ReplicaFailure", "status": "True", "message": "quota"}]})
        );
        assert_eq!(telling(json!({"conditions": [other]})), None);
        let complete = json!({"type": "Complete", "status": "True", "lastProbeTime": "t"});
        assert_eq!(
            telling(json!({"succeeded": 1, "conditions": [complete]})).unwrap(),
            json!({"conditions": [{"type": "Complete", "status": "True"}]})
        );
    }

    #[test]
    fn of_a_pod_only_what_is_read_is_kept() {
        let packer = Packer::default();
        let pod = |n: usize| -> seen::Pod {
            let condition = |kind: &str| json!({"type": kind, "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"});
            let kinds = ["PodScheduled", "Initialized", "ContainersReady", "Ready"];
            serde_json::from_value(json!({
                "metadata": {
                    "name": format!("m-{n}"), "namespace": "chat", "uid": format!("u{n}"), "resourceVersion": "7",
                    "labels": {(SERVICE_LABEL): "m", "app.kubernetes.io/name": "m"},
                    "annotations": {(DELETION_COST): "3", "example.com/large": "x".repeat(9000)},
                    "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:status": {}}}],
                },
                "spec": {"containers": [{"name": "runtime", "image": "i"}]},
                "status": {
                    "phase": "Running", "podIP": format!("10.0.0.{n}"), "podIPs": [{"ip": "10.0.0.1"}],
                    "conditions": kinds.map(condition),
                    "containerStatuses": [{"name": "runtime", "image": "i", "imageID": "sha256:0", "containerID": "c", "ready": true, "restartCount": 0, "state": {"running": {}}}],
                },
            }))
            .unwrap()
        };
        let stored = |n| reduce_pod(pod(n), SERVICE_LABEL, &packer).unwrap().value;
        stored(1);
        let stored = stored(2);
        assert!(stored.text.size() < 128, "{} bytes", stored.text.size());
        assert!(stored.ready.is_some());
        let kept = stored.pod();
        let metadata = json!({
            "name": "m-2", "namespace": "chat", "uid": "u2",
            "labels": {(SERVICE_LABEL): "m"}, "annotations": {(DELETION_COST): "3"},
        });
        assert_eq!(serde_json::to_value(&kept.metadata).unwrap(), metadata);
        assert_eq!(kept.spec, None);
        let status = kept.status.as_ref().unwrap();
        let conditions = status.conditions.as_ref().unwrap();
        let kinds: Vec<_> = conditions.iter().map(|c| &*c.type_).collect();
        assert_eq!(kinds, ["PodScheduled", "Ready"]);
        assert_eq!(
            (status.pod_ip.as_deref(), &status.pod_ips),
            (Some("10.0.0.2"), &None)
        );
        let container = &status.container_statuses.as_ref().unwrap()[0];
        assert_eq!((&*container.image_id, &container.container_id), ("", &None));
    }
}
