//! What the caches keep of each object, and how it is read again.

use std::sync::Arc;

use ashlar_crds::names::{FIELD_MANAGER, SERVICE_LABEL};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Resource, ResourceExt as _,
    api::{ApiResource, DynamicObject, ObjectMeta},
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::LiveChild;
use crate::controller::{
    build::children::SLICE_MANAGER_LABEL, index::Reduced, victims::DELETION_COST,
};

/// Conditions of children that a reconcile looks at.
const TELLING: [&str; 2] = ["ReplicaFailure", "Complete"];

/// A child at rest: its text, to be read when its service is looked at.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Stored(Arc<str>);

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
        serde_json::from_str(&stored.0).expect("text that we wrote: this is a bug");
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
pub(super) fn reduce_child(mut object: DynamicObject) -> Option<Reduced<Stored>> {
    let service = service_of(&object.metadata, SERVICE_LABEL)?;
    // The cluster's own controller copies our labels to the slices of the headless Service: those are not ours.
    let manager = object.labels().get(SLICE_MANAGER_LABEL);
    if manager.is_some_and(|manager| manager != FIELD_MANAGER) {
        return None;
    }
    let meta = &mut object.metadata;
    meta.managed_fields = None;
    meta.resource_version = None;
    meta.creation_timestamp = None;
    let name = meta.name.clone()?;
    let mut data = object.data;
    data["metadata"] = serde_json::to_value(meta).expect("metadata is plain data: this is a bug");
    if let Some(fields) = data.as_object_mut() {
        let telling = fields.remove("status").and_then(telling_conditions);
        if let Some(telling) = telling {
            fields.insert("status".into(), telling);
        }
    }
    Some(Reduced {
        service,
        name,
        value: Stored(data.to_string().into()),
    })
}

/// The part of a status that says why a Deployment's pods are not created, or that a Job is over.
fn telling_conditions(mut status: Value) -> Option<Value> {
    let conditions = status.get_mut("conditions")?.as_array_mut()?;
    let telling = |c: &Value| TELLING.iter().any(|kind| c["type"] == *kind);
    conditions.retain(|c| telling(c) && c["status"] == "True");
    for condition in conditions.iter_mut().filter_map(Value::as_object_mut) {
        condition.remove("lastUpdateTime");
        condition.remove("lastProbeTime");
    }
    let any = !conditions.is_empty();
    any.then(|| serde_json::json!({ "conditions": status["conditions"] }))
}

/// Pods: identity, labels and state.
pub(super) fn reduce_pod(mut pod: Pod, label: &str) -> Option<Reduced<Arc<Pod>>> {
    let service = service_of(&pod.metadata, label)?;
    let meta = std::mem::take(&mut pod.metadata);
    let name = meta.name.clone()?;
    pod.spec = None;
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
    Some(Reduced {
        service,
        name,
        value: Arc::new(pod),
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
        let reduced = reduce_child(serde_json::from_value(stored).unwrap()).unwrap();
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
        let kept =
            telling_conditions(json!({"replicas": 3, "conditions": [other, refusal]})).unwrap();
        assert_eq!(
            kept,
            json!({"conditions": [{"type": "ReplicaFailure", "status": "True", "message": "quota"}]})
        );
        assert_eq!(telling_conditions(json!({"conditions": [other]})), None);
        let complete = json!({"type": "Complete", "status": "True", "lastProbeTime": "t"});
        assert_eq!(
            telling_conditions(json!({"succeeded": 1, "conditions": [complete]})).unwrap(),
            json!({"conditions": [{"type": "Complete", "status": "True"}]})
        );
    }
}
