//! Objects as watches bring them, less what nobody here reads: a page of a listing holds hundreds, and `managedFields` alone
//! are half of each.

use std::{borrow::Cow, collections::BTreeMap};

use k8s_openapi::{
    api::core::v1::{Pod as WholePod, PodStatus},
    apimachinery::pkg::apis::meta::v1::{OwnerReference, Time},
};
use kube::{
    Resource,
    api::{ApiResource, ObjectMeta},
    core::DynamicResourceScope,
};
use serde::{Deserialize, Deserializer, de::IgnoredAny};
use serde_json::{Map, Value};

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Meta {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    generation: Option<i64>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
    owner_references: Option<Vec<OwnerReference>>,
    creation_timestamp: Option<Time>,
    deletion_timestamp: Option<Time>,
}

/// Reads metadata without `managedFields` and the like.
pub(super) fn meta<'de, D: Deserializer<'de>>(from: D) -> Result<ObjectMeta, D::Error> {
    let meta = Meta::deserialize(from)?;
    Ok(ObjectMeta {
        name: meta.name,
        namespace: meta.namespace,
        uid: meta.uid,
        resource_version: meta.resource_version,
        generation: meta.generation,
        labels: meta.labels,
        annotations: meta.annotations,
        owner_references: meta.owner_references,
        creation_timestamp: meta.creation_timestamp,
        deletion_timestamp: meta.deletion_timestamp,
        ..ObjectMeta::default()
    })
}

/// A pod without its `spec`.
#[derive(Debug, Clone, Deserialize, Resource)]
#[resource(inherit = WholePod)]
pub(super) struct Pod {
    #[serde(deserialize_with = "meta")]
    pub(super) metadata: ObjectMeta,
    pub(super) status: Option<PodStatus>,
}

/// A child of any kind. Of its status only conditions are read.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Child {
    #[serde(deserialize_with = "meta")]
    pub(super) metadata: ObjectMeta,
    #[serde(default)]
    pub(super) status: Status,
    /// All that somebody could have edited.
    #[serde(flatten)]
    pub(super) fields: Map<String, Value>,
    // Said once for all in a listing: what is watched is known.
    #[serde(rename = "apiVersion", default)]
    _api_version: IgnoredAny,
    #[serde(rename = "kind", default)]
    _kind: IgnoredAny,
}

/// The part of a status that may be read.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Status {
    pub(super) conditions: Option<Vec<Map<String, Value>>>,
}

impl Resource for Child {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(of: &ApiResource) -> Cow<'_, str> {
        of.kind.as_str().into()
    }

    fn group(of: &ApiResource) -> Cow<'_, str> {
        of.group.as_str().into()
    }

    fn version(of: &ApiResource) -> Cow<'_, str> {
        of.version.as_str().into()
    }

    fn api_version(of: &ApiResource) -> Cow<'_, str> {
        of.api_version.as_str().into()
    }

    fn plural(of: &ApiResource) -> Cow<'_, str> {
        of.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use serde_json::json;

    use super::*;

    #[test]
    fn what_nobody_reads_is_not_even_read() {
        let object = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {
                "name": "m", "namespace": "chat", "uid": "u", "resourceVersion": "7", "generation": 3,
                "labels": {"a": "b"}, "annotations": {"c": "d"}, "finalizers": ["f"],
                "ownerReferences": [{"apiVersion": "a/v1", "kind": "K", "name": "m", "uid": "o"}],
                "creationTimestamp": "2026-01-01T00:00:00Z", "deletionTimestamp": "2026-01-01T00:00:01Z",
                "managedFields": [{"manager": "x", "fieldsV1": {"f:spec": {}}}],
            },
            "spec": {"containers": [{"name": "c"}], "ports": [{"port": 1}]},
            "status": {"loadBalancer": {}, "conditions": [{"type": "Ready", "status": "True"}]},
        });
        let child: Child = serde_json::from_value(object.clone()).unwrap();
        assert_eq!(
            child.fields,
            *json!({"spec": object["spec"]}).as_object().unwrap()
        );
        assert_eq!(child.status.conditions.unwrap().len(), 1);
        let pod: Pod = serde_json::from_value(object.clone()).unwrap();
        assert_eq!(child.metadata, pod.metadata);
        let mut kept = object["metadata"].clone();
        for dropped in ["managedFields", "finalizers"] {
            kept.as_object_mut().unwrap().remove(dropped);
        }
        assert_eq!(serde_json::to_value(&pod.metadata).unwrap(), kept);
    }
}
