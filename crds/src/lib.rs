//! # Ashlar's custom resources
//!
//! One resource, `inferenceservices.serving.ashlar.dev`, version `v1alpha1`, short name `infsvc`.
//!
//! ```text
//! inference_service   the types a user writes and reads, each bound and rule beside its field
//! conditions          condition types and reasons: the vocabulary of `status.conditions`
//! names               labels, ports, and the names of everything derived from a service
//! bin/crdgen          prints the YAML that lies in crds/yaml
//! ```
//!
//! Invariants:
//! - all validation is in the schema and in CEL: no webhook exists, what CEL cannot know becomes a condition;
//! - every list, map and string has a bound, so that the API server can afford the rules;
//! - no embedded PodSpec: `template` and `affinity` are open, everything else is typed and small;
//! - fields are added, never renamed or retyped: a later version is this schema plus optional fields.
#![forbid(unsafe_code)]

pub mod conditions;
#[allow(
    unreachable_pub,
    reason = "KubeSchema derives an inner item that the lint takes for the type"
)]
mod inference_service;
pub mod names;

pub use inference_service::*;

/// The CRD as installed: derived from the types, with what a derive cannot say added.
#[must_use]
pub fn inference_service_crd()
-> k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition {
    use kube::CustomResourceExt as _;
    InferenceService::crd()
}

/// The CRD as YAML, as committed in `crds/yaml`.
///
/// # Panics
/// Never: the CRD is static data.
#[must_use]
pub fn inference_service_crd_yaml() -> String {
    let mut crd =
        serde_json::to_value(inference_service_crd()).expect("a CRD is plain data: this is a bug");
    crd.sort_all_objects();
    serde_yaml_ng::to_string(&crd).expect("a CRD is plain data: this is a bug")
}
