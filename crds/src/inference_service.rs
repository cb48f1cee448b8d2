//! `InferenceService`: what a user writes, and what the operator answers.
//!
//! Defaults live in the schema, so that `kubectl get -o yaml` shows them and `/scale` finds `replicas`.

mod cache;
mod endpoint;
mod model;
mod rollout;
mod runtime;
mod scaling;
mod secret;
mod status;

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{LocalObjectReference, Toleration};
use kube::{CustomResource, KubeSchema};
use schemars::{Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::{
    cache::{CacheSpec, EmptyDirCache, HostPathCache, PvcCache},
    endpoint::{Auth, EndpointSpec, GatewayReference, LimitsSpec},
    model::{ModelSpec, Quantization},
    rollout::{CanarySpec, Promote, RolloutStrategySpec, Surge},
    runtime::{Device, Engine, ParallelismSpec, ResourcesSpec, RuntimeSpec},
    scaling::{ScalingSpec, ScalingTargets},
    secret::{SecretKeyReference, SecretReference},
    status::{
        CanaryStatus, InferenceServiceStatus, ModelStatus, RevisionStatus, ScalingDecision,
        ScalingStatus,
    },
};

/// One model, served at one address.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "serving.ashlar.dev",
    version = "v1alpha1",
    kind = "InferenceService",
    plural = "inferenceservices",
    shortname = "infsvc",
    category = "ashlar",
    namespaced,
    status = "InferenceServiceStatus",
    derive = "PartialEq",
    doc = "One model served at one OpenAI-compatible address.",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
    printcolumn(name = "Replicas", type_ = "integer", json_path = ".status.readyReplicas"),
    printcolumn(name = "URL", type_ = "string", json_path = ".status.url"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]{0,40}[a-z0-9])?$')").message("metadata.name must be 1 to 42 lower-case letters, digits or '-', start with a letter and end with a letter or digit")
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(
    validation = Rule::new("!has(self.scaling) || self.replicas == 1").message("spec.scaling sets the number of replicas; remove it to use replicas, kubectl scale, HPA or KEDA"),
    validation = Rule::new("!has(self.cache) || self.model.uri.startsWith('hf://') || self.model.uri.startsWith('s3://')").message("spec.cache is for models that are downloaded (hf://, s3://); pvc:// and oci:// models are read in place"),
    validation = Rule::new("self.runtime.device != 'cpu' || self.parallelism.tensor == 1").message("spec.parallelism.tensor needs GPUs; with spec.runtime.device: cpu it must be 1")
)]
pub struct InferenceServiceSpec {
    /// Which model, and from where.
    pub model: ModelSpec,
    /// Where downloaded model files are kept; once per pod when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheSpec>,
    /// The inference engine and its arguments.
    #[serde(default)]
    pub runtime: RuntimeSpec,
    /// How many GPUs one pod uses together.
    #[serde(default)]
    pub parallelism: ParallelismSpec,
    /// Resources of the runtime container; GPUs are derived from `parallelism` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourcesSpec>,
    /// Labels that a node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub node_selector: BTreeMap<String, String>,
    /// Taints that the pods tolerate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub tolerations: Vec<Toleration>,
    /// Kubernetes `affinity` of the pods, as in a pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "open_object")]
    pub affinity: Option<Value>,
    /// PriorityClass of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub priority_class_name: Option<String>,
    /// Secrets for pulling images.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub image_pull_secrets: Vec<LocalObjectReference>,
    /// Merged into the pod template: the escape hatch for what has no field. Selector labels, restartPolicy, and
    /// args, ports and probes of container `runtime` cannot be changed here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "open_object")]
    pub template: Option<Value>,
    /// Seconds a pod may take until its engine answers.
    #[serde(default = "default_startup_timeout")]
    #[schemars(range(min = 10, max = 86400))]
    pub startup_timeout_seconds: i32,
    /// Replicas wanted while `scaling` is absent; also set by `kubectl scale`, HPA and KEDA.
    #[serde(default = "default_replicas")]
    #[schemars(range(min = 0, max = 1000))]
    pub replicas: i32,
    /// Scale by queue depth and KV-cache use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scaling: Option<ScalingSpec>,
    /// How a new revision replaces the old one.
    #[serde(default)]
    pub rollout_strategy: RolloutStrategySpec,
    /// Who may call the service, and by which names.
    pub endpoint: EndpointSpec,
}

fn default_replicas() -> i32 {
    1
}

fn default_startup_timeout() -> i32 {
    1800
}

fn open_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "object", "nullable": true, "x-kubernetes-preserve-unknown-fields": true })
}
