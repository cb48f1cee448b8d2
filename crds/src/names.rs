//! Names derived from a service, and the labels and ports that operator, gateway and runtime agree on.

use kube::ResourceExt as _;

use crate::InferenceService;

/// Label of every child object and pod: the service's name.
pub const SERVICE_LABEL: &str = "serving.ashlar.dev/service";
/// Label of every Deployment and pod of a revision: its hash.
pub const REVISION_LABEL: &str = "serving.ashlar.dev/revision";
/// Annotation on a service whose new value renders a new revision with today's defaults.
pub const RESTART_ANNOTATION: &str = "serving.ashlar.dev/restart";
/// Label of the pods that fill a claim with a model's files: the service's name. They take no requests.
pub const PULL_LABEL: &str = "serving.ashlar.dev/pull";
/// Annotation on a service by which a user ends a canary: `promote` or `rollback`, then `@` and the revision's hash.
pub const CANARY_ANNOTATION: &str = "serving.ashlar.dev/canary";
/// Label of pods that serve by TLS, with the value `true`.
pub const TLS_LABEL: &str = "serving.ashlar.dev/tls";
/// Field manager of every server-side apply.
pub const FIELD_MANAGER: &str = "ashlar-operator";
/// Name of the container that runs the engine.
pub const RUNTIME_CONTAINER: &str = "runtime";
/// Name of the init container that downloads the model.
pub const PULL_CONTAINER: &str = "pull";
/// Port on which a runtime pod serves its API and its metrics.
pub const RUNTIME_PORT: i32 = 8000;
/// Name of that port.
pub const RUNTIME_PORT_NAME: &str = "http";
/// First path segments that the gateway keeps for itself: a namespace so named has no path route.
pub const RESERVED_PATH_SEGMENTS: [&str; 11] = [
    "v1",
    "generate",
    "stream",
    "generate_measured",
    "tokenize",
    "detokenize",
    "health",
    "metrics",
    "version",
    "openapi.json",
    "readyz",
];

impl InferenceService {
    /// The name under which the API serves the model: `spec.model.name`, else the service's own.
    #[must_use]
    pub fn served_model_name(&self) -> String {
        self.spec
            .model
            .name
            .clone()
            .unwrap_or_else(|| self.name_any())
    }

    /// ServiceAccount of the model pods.
    #[must_use]
    pub fn service_account_name(&self) -> String {
        format!("{}-ashlar", self.name_any())
    }

    /// Headless Service over the model pods.
    #[must_use]
    pub fn pods_service_name(&self) -> String {
        format!("{}-pods", self.name_any())
    }

    /// Host of the alias Service that ends in the gateway: `NAME.NAMESPACE.svc`.
    #[must_use]
    pub fn alias_host(&self) -> String {
        format!(
            "{}.{}.svc",
            self.name_any(),
            self.namespace().unwrap_or_default()
        )
    }

    /// Name of the Job that fills a claim for a revision.
    #[must_use]
    pub fn pull_name(&self, hash: &str) -> String {
        format!("{}-pull-{hash}", self.name_any())
    }

    /// Name of a revision's ControllerRevision and Deployment.
    #[must_use]
    pub fn revision_name(&self, hash: &str) -> String {
        format!("{}-{hash}", self.name_any())
    }
}
