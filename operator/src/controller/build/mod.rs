//! Everything a service owns, built from facts alone. Pure: no client, no clock.

pub mod children;
pub mod model;
pub mod revision;
pub mod template;

use ashlar_crds::names::{FIELD_MANAGER, SERVICE_LABEL};
use k8s_openapi::api::networking::v1::NetworkPolicyPeer;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{
    Resource,
    api::{ApiResource, ObjectMeta},
};
use serde::Serialize;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;

use super::validate::ValidatedService;

/// Facts about the installation that a build depends on.
#[derive(Debug, Clone)]
pub struct Defaults {
    /// Runtime image without CUDA.
    pub runtime_image: String,
    /// Runtime image with CUDA.
    pub runtime_image_cuda: String,
    /// Namespace of operator and gateway.
    pub namespace: String,
    /// Name of the gateway's Service.
    pub gateway_service: String,
    /// The cluster's DNS domain.
    pub cluster_domain: String,
    /// Who may scrape the metrics of model pods, beside the operator.
    pub metrics_from: Vec<NetworkPolicyPeer>,
}

/// Annotation of every child: a digest of what was applied.
const APPLIED_ANNOTATION: &str = "serving.ashlar.dev/applied";

/// One object to apply.
#[derive(Debug, Clone)]
pub struct Child {
    /// Its kind.
    pub resource: ApiResource,
    /// Its name.
    pub name: String,
    /// The whole object.
    pub value: Value,
}

impl Child {
    pub(super) fn new<K: Resource<DynamicType = ()> + Serialize>(object: &K) -> Self {
        let value =
            serde_json::to_value(object).expect("Kubernetes objects are plain data: this is a bug");
        let name = object.meta().name.clone().unwrap_or_default();
        Self::of(ApiResource::erase::<K>(&()), name, value)
    }

    /// One of a kind that has no type here.
    fn of(resource: ApiResource, name: String, mut value: Value) -> Self {
        value["apiVersion"] = resource.api_version.clone().into();
        value["kind"] = resource.kind.clone().into();
        value.sort_all_objects();
        // What is no longer said must go too: a difference in the digest alone makes an apply.
        let digest = hex::encode(&Sha256::digest(value.to_string())[..8]);
        value["metadata"]["annotations"][APPLIED_ANNOTATION] = digest.into();
        Self {
            name,
            resource,
            value,
        }
    }
}

/// Labels of every child.
pub(super) fn labels(service: &ValidatedService) -> BTreeMap<String, String> {
    [
        (SERVICE_LABEL, service.name.as_str()),
        ("app.kubernetes.io/name", "inference-service"),
        ("app.kubernetes.io/instance", service.name.as_str()),
        ("app.kubernetes.io/managed-by", FIELD_MANAGER),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .collect()
}

/// The labels that select a service's pods, of any revision.
pub(super) fn selector(service: &ValidatedService) -> BTreeMap<String, String> {
    BTreeMap::from([(SERVICE_LABEL.to_owned(), service.name.clone())])
}

pub(super) fn owner(service: &ValidatedService) -> OwnerReference {
    OwnerReference {
        api_version: ashlar_crds::InferenceService::api_version(&()).into_owned(),
        kind: ashlar_crds::InferenceService::kind(&()).into_owned(),
        name: service.name.clone(),
        uid: service.uid.clone(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

pub(super) fn metadata(service: &ValidatedService, name: String) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: Some(service.namespace.clone()),
        labels: Some(labels(service)),
        owner_references: Some(vec![owner(service)]),
        ..ObjectMeta::default()
    }
}
