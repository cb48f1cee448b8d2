//! Revisions: the hash of what a pod is made from, and the ControllerRevision that keeps its template.

use ashlar_crds::{
    InferenceService,
    names::{RESTART_ANNOTATION, REVISION_LABEL},
};
use k8s_openapi::{
    api::{
        apps::v1::ControllerRevision,
        core::v1::{ConfigMap, PodTemplateSpec},
    },
    apimachinery::pkg::runtime::RawExtension,
};
use kube::ResourceExt as _;
use sha2::{Digest as _, Sha256};

use super::{super::validate::ValidatedService, metadata};

/// Fields of the spec that do not make a new revision.
const NOT_OF_THE_POD: [&str; 4] = ["replicas", "scaling", "endpoint", "rolloutStrategy"];

/// Eight hex digits over the fields of the spec that pods are made from, and the restart annotation. It depends on the
/// spec alone: an upgrade of the operator changes nothing.
#[must_use]
pub fn hash(service: &InferenceService) -> String {
    let mut spec =
        serde_json::to_value(&service.spec).expect("a spec is plain data: this is a bug");
    if let Some(fields) = spec.as_object_mut() {
        fields.retain(|name, _| !NOT_OF_THE_POD.contains(&name.as_str()));
        fields.insert(
            "drainTimeoutSeconds".into(),
            service.spec.rollout_strategy.drain_timeout_seconds.into(),
        );
        if let Some(restart) = service.annotations().get(RESTART_ANNOTATION) {
            fields.insert("restart".into(), restart.clone().into());
        }
    }
    // Equal specs hash equally, whatever the order of their fields.
    spec.sort_all_objects();
    hex::encode(&Sha256::digest(spec.to_string())[..4])
}

/// The immutable record of a revision.
#[must_use]
pub fn controller_revision(
    service: &ValidatedService,
    hash: &str,
    number: i64,
    template: &PodTemplateSpec,
) -> ControllerRevision {
    let mut meta = metadata(service, service.service.revision_name(hash));
    meta.labels
        .get_or_insert_default()
        .insert(REVISION_LABEL.to_owned(), hash.to_owned());
    let template = serde_json::to_value(template).expect("a template is plain data: this is a bug");
    ControllerRevision {
        metadata: meta,
        revision: number,
        data: Some(RawExtension(serde_json::json!({ "template": template }))),
    }
}

/// Key of what a revision's pods download.
pub const PIN_KEY: &str = "revision";

/// What a revision's pods download: a branch or tag until one of them has resolved it, then a commit.
#[must_use]
pub fn pin(service: &ValidatedService, hash: &str, revision: &str) -> ConfigMap {
    let mut meta = metadata(service, service.service.revision_name(hash));
    meta.labels
        .get_or_insert_default()
        .insert(REVISION_LABEL.to_owned(), hash.to_owned());
    ConfigMap {
        metadata: meta,
        data: Some([(PIN_KEY.to_owned(), revision.to_owned())].into()),
        ..ConfigMap::default()
    }
}

/// The template that a ControllerRevision keeps; none when someone has damaged it.
#[must_use]
pub fn stored_template(revision: &ControllerRevision) -> Option<PodTemplateSpec> {
    let data = &revision.data.as_ref()?.0;
    serde_json::from_value(data.get("template")?.clone()).ok()
}

/// The hash that an object of a revision carries.
#[must_use]
pub fn hash_of<K: kube::Resource>(object: &K) -> Option<&str> {
    object
        .meta()
        .labels
        .as_ref()?
        .get(REVISION_LABEL)
        .map(String::as_str)
}
