//! `InferenceService`: what a user writes, and what the operator answers.
//!
//! Defaults live in the schema, so that `kubectl get -o yaml` shows them and `/scale` finds `replicas`.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        autoscaling::v2::HorizontalPodAutoscalerBehavior,
        core::v1::{LocalObjectReference, Toleration},
    },
    apimachinery::pkg::{api::resource::Quantity, apis::meta::v1::Condition},
};
use kube::{CustomResource, KubeSchema};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::Value;

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

/// Which model, and from where.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.uri.matches('^(hf://[A-Za-z0-9][-A-Za-z0-9._]*(/[-A-Za-z0-9._]+)?|s3://[a-z0-9][-a-z0-9.]+(/[-A-Za-z0-9._=+@]+)*/?|pvc://[a-z0-9][-a-z0-9.]*(/[-A-Za-z0-9._/]*)?|oci://[^ ]+)$')").message("spec.model.uri must be hf://ORG/NAME, s3://BUCKET/FOLDER, pvc://CLAIM/PATH or oci://IMAGE"),
    validation = Rule::new("!self.uri.contains('..')").message("spec.model.uri must not contain '..'"),
    validation = Rule::new("!has(self.revision) || self.uri.startsWith('hf://')").message("spec.model.revision is for hf:// models; put the tag or digest of an oci:// model in its uri"),
    validation = Rule::new("!has(self.tokenSecretRef) || self.uri.startsWith('hf://')").message("spec.model.tokenSecretRef is for hf:// models"),
    validation = Rule::new("!has(self.endpoint) || self.uri.startsWith('hf://') || self.uri.startsWith('s3://')").message("spec.model.endpoint is for hf:// and s3:// models"),
    validation = Rule::new("!(has(self.region) || has(self.credentialsSecretRef)) || self.uri.startsWith('s3://')").message("spec.model.region and spec.model.credentialsSecretRef are for s3:// models")
)]
pub struct ModelSpec {
    /// `hf://ORG/NAME`, `s3://BUCKET/FOLDER`, `pvc://CLAIM/PATH` or `oci://IMAGE`.
    #[schemars(length(min = 1, max = 512))]
    pub uri: String,
    /// Commit, tag or branch of an `hf://` model; resolved once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 128),
        regex(pattern = r"^[A-Za-z0-9][-A-Za-z0-9._/]*$")
    )]
    pub revision: Option<String>,
    /// Name served by the API; defaults to the service's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 128),
        regex(pattern = r"^[A-Za-z0-9][-A-Za-z0-9._/:]*$")
    )]
    pub name: Option<String>,
    /// How the weights are quantised; `auto` reads it from the model.
    #[serde(default)]
    pub quantization: Quantization,
    /// Token for a gated or private `hf://` model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_secret_ref: Option<SecretKeyReference>,
    /// Address of a mirror of the hub, or of an S3-compatible store; Amazon's own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256), regex(pattern = r"^https?://[^ ]+$"))]
    pub endpoint: Option<String>,
    /// Region of the store of an `s3://` model; `us-east-1` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[a-z0-9][-a-z0-9]*$"))]
    pub region: Option<String>,
    /// Secret with `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and, if there is one, `AWS_SESSION_TOKEN`, for an `s3://`
    /// model; requests are not signed without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_secret_ref: Option<SecretReference>,
}

/// How weights are quantised.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// Read from the model.
    #[default]
    Auto,
    /// Not quantised.
    None,
    /// AWQ, 4 bit.
    Awq,
    /// GPTQ, 4 bit.
    Gptq,
    /// FP8 (e4m3).
    Fp8,
    /// GGUF block types.
    Gguf,
}

impl Quantization {
    /// Value of the runtime's `--quantization`; none for `auto` and `none`, which pass no flag.
    #[must_use]
    pub fn flag(self) -> Option<&'static str> {
        match self {
            Self::Auto | Self::None => None,
            Self::Awq => Some("awq"),
            Self::Gptq => Some("gptq"),
            Self::Fp8 => Some("fp8"),
            Self::Gguf => Some("gguf"),
        }
    }
}

/// One key of a Secret in the service's namespace.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct SecretKeyReference {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Key in its data.
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
}

/// Where downloaded files are kept. Exactly one of the fields.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("[has(self.emptyDir), has(self.pvc), has(self.hostPath)].filter(x, x).size() == 1").message("spec.cache must have exactly one of emptyDir, pvc, hostPath"))]
pub struct CacheSpec {
    /// Once per pod, gone with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub empty_dir: Option<EmptyDirCache>,
    /// Once per claim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pvc: Option<PvcCache>,
    /// Once per node; the namespace must allow hostPath volumes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_path: Option<HostPathCache>,
}

/// A cache that lives with its pod.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct EmptyDirCache {
    /// Most bytes, as a quantity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_limit: Option<Quantity>,
}

/// A cache on a claim.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct PvcCache {
    /// Name of the PersistentVolumeClaim.
    #[schemars(length(min = 1, max = 253))]
    pub claim_name: String,
    /// Most bytes of all models in it, as a quantity; models that no service names any more go first, the least recently
    /// used before others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<Quantity>,
}

/// A cache on the node.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct HostPathCache {
    /// Absolute folder on the node, made by the chart's cache DaemonSet.
    #[schemars(length(min = 2, max = 256), regex(pattern = r"^/[-A-Za-z0-9._/]+$"))]
    pub path: String,
    /// Most bytes of the namespace's models in it, as a quantity; what no pod uses goes first, the least recently used
    /// before others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<Quantity>,
}

/// The engine that runs in the pods.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// Ashlar's own runtime.
    #[default]
    Ashlar,
    /// A vLLM image.
    Vllm,
}

/// What computes.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// GPUs.
    #[default]
    Auto,
    /// No GPU is asked for.
    Cpu,
    /// NVIDIA GPUs.
    Cuda,
}

/// The inference engine and its arguments.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.engine != 'vllm' || has(self.image)").message("spec.runtime.image is required with spec.runtime.engine: vllm"),
    validation = Rule::new("!has(self.args) || self.args.all(a, !a.matches('^--(host|port|served-model-name|revision|gpu-memory-utilization|tensor-parallel-size|shutdown-timeout|quantization|device|api-key)(=|$)'))").message("spec.runtime.args must not set what has a field of its own or belongs to the operator: host, port, served-model-name, revision, gpu-memory-utilization, tensor-parallel-size, shutdown-timeout, quantization, device, api-key")
)]
pub struct RuntimeSpec {
    /// `ashlar` or `vllm`.
    #[serde(default)]
    pub engine: Engine,
    /// Image of the runtime; the operator's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,
    /// `auto` (GPU), `cuda`, or `cpu`.
    #[serde(default)]
    pub device: Device,
    /// More arguments for the engine, for example `--max-model-len=8192`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 256)))]
    pub args: Vec<String>,
    /// Share of the GPU's memory that the engine may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.05, max = 0.99))]
    pub gpu_memory_utilization: Option<f64>,
    /// Secret of type `kubernetes.io/tls` in the service's namespace: the pods serve by TLS with it, and take a renewed one
    /// without a restart. Its certificate is for `NAME-pods.NAMESPACE.svc`, signed by a CA that the chart's
    /// `modelTls.caSecretName` holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub tls_secret_name: Option<String>,
}

/// How many GPUs one pod uses together.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ParallelismSpec {
    /// Tensor parallelism: GPUs in a pod.
    #[serde(default = "default_tensor")]
    #[schemars(range(min = 1, max = 64))]
    pub tensor: i32,
    /// Extended resource of one GPU.
    #[serde(default = "default_gpu_resource")]
    #[schemars(
        length(min = 3, max = 253),
        regex(pattern = r"^[a-z0-9][-a-z0-9.]*/[A-Za-z0-9][-A-Za-z0-9._]*$")
    )]
    pub resource_name: String,
}

fn default_tensor() -> i32 {
    1
}

fn default_gpu_resource() -> String {
    "nvidia.com/gpu".to_owned()
}

impl Default for ParallelismSpec {
    fn default() -> Self {
        Self {
            tensor: default_tensor(),
            resource_name: default_gpu_resource(),
        }
    }
}

/// Resources of the runtime container, as in a pod.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ResourcesSpec {
    /// Most the container may use.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    pub limits: BTreeMap<String, Quantity>,
    /// What the scheduler sets aside.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    pub requests: BTreeMap<String, Quantity>,
}

/// Scale by queue depth and KV-cache use.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.minReplicas <= self.maxReplicas").message("spec.scaling.minReplicas must not exceed spec.scaling.maxReplicas"))]
pub struct ScalingSpec {
    /// Fewest replicas; 0 scales to zero when idle.
    #[serde(default = "default_replicas")]
    #[schemars(range(min = 0, max = 1000))]
    pub min_replicas: i32,
    /// Most replicas.
    #[schemars(range(min = 1, max = 1000))]
    pub max_replicas: i32,
    /// Load that one replica is meant to carry.
    #[serde(default)]
    pub targets: ScalingTargets,
    /// Quiet seconds before zero.
    #[serde(default = "default_idle_seconds")]
    #[schemars(range(min = 1, max = 86400))]
    pub idle_seconds: i32,
    /// HorizontalPodAutoscaler v2's `behavior`, word for word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub behavior: Option<HorizontalPodAutoscalerBehavior>,
}

fn default_idle_seconds() -> i32 {
    300
}

/// Load that one replica is meant to carry.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ScalingTargets {
    /// Share of KV-cache blocks in use.
    #[serde(default = "default_kv_target")]
    #[schemars(range(min = 0.05, max = 1.0))]
    pub kv_cache_utilization: f64,
    /// Requests waiting per replica.
    #[serde(default = "default_waiting_target")]
    #[schemars(range(min = 1, max = 10000))]
    pub waiting_requests: i32,
    /// Seconds to the first token; with it, waiting tokens count at the rate that pods measure, instead of waitingRequests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.05, max = 600.0))]
    pub time_to_first_token_seconds: Option<f64>,
}

fn default_kv_target() -> f64 {
    0.80
}

fn default_waiting_target() -> i32 {
    5
}

impl Default for ScalingTargets {
    fn default() -> Self {
        Self {
            kv_cache_utilization: default_kv_target(),
            waiting_requests: default_waiting_target(),
            time_to_first_token_seconds: None,
        }
    }
}

/// Whether a new pod may start before an old one ends.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Surge {
    /// Surge if a GPU is free for it, otherwise in place; status says which.
    #[default]
    Auto,
    /// Always start the new pod first.
    Always,
    /// Always end the old pod first.
    Never,
}

/// How a new revision replaces the old one.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct RolloutStrategySpec {
    /// Seconds that running requests get to finish when a pod ends.
    #[serde(default = "default_drain_timeout")]
    #[schemars(range(min = 0, max = 86400))]
    pub drain_timeout_seconds: i32,
    /// `Auto`, `Always` or `Never`.
    #[serde(default)]
    pub surge: Surge,
    /// Give a new revision a share of the requests first; it takes over when it is promoted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary: Option<CanarySpec>,
}

/// A new revision's trial.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct CanarySpec {
    /// Share of the requests that go to the new revision, in percent.
    #[schemars(range(min = 1, max = 99))]
    pub weight_percent: i32,
    /// Who decides: `Manual`, by annotation `serving.ashlar.dev/canary: promote` or `rollback`, or `OnErrorRate`.
    #[serde(default)]
    pub promote: Promote,
    /// With `OnErrorRate`: roll back above this share of failed requests, in percent; promote at or below it.
    #[serde(default = "default_max_error")]
    #[schemars(range(min = 0, max = 100))]
    pub max_error_percent: i32,
    /// With `OnErrorRate`: requests that the new revision has to answer before anything is decided.
    #[serde(default = "default_min_requests")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub min_requests: i32,
}

fn default_max_error() -> i32 {
    1
}

fn default_min_requests() -> i32 {
    100
}

/// Who decides about a canary.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Promote {
    /// The user, by annotation.
    #[default]
    Manual,
    /// Its share of failed requests.
    OnErrorRate,
}

fn default_drain_timeout() -> i32 {
    120
}

impl Default for RolloutStrategySpec {
    fn default() -> Self {
        Self {
            drain_timeout_seconds: default_drain_timeout(),
            surge: Surge::default(),
            canary: None,
        }
    }
}

/// Who may call the service.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Auth {
    /// Callers show a key.
    Keys,
    /// Anyone who reaches the gateway.
    None,
}

/// Who may call the service, and by which names.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.auth != 'Keys' || has(self.apiKeySecretRef)").message("spec.endpoint.apiKeySecretRef is required with spec.endpoint.auth: Keys"),
    validation = Rule::new("self.auth != 'None' || !has(self.apiKeySecretRef)").message("spec.endpoint.apiKeySecretRef must be absent with spec.endpoint.auth: None"),
    validation = Rule::new("!has(self.gatewayRef) || (self.alias && has(self.hosts))").message("spec.endpoint.gatewayRef needs spec.endpoint.hosts, and spec.endpoint.alias: true, which the route leads to"),
    validation = Rule::new("!has(self.hosts) || self.hosts.all(h, !h.endsWith('.svc') && !h.endsWith('.local'))").message("spec.endpoint.hosts must not end in .svc or .local: those names belong to the cluster")
)]
pub struct EndpointSpec {
    /// `Keys`, or `None` to leave the service open: there is no default.
    pub auth: Auth,
    /// Secret that holds `<client>: sha256:<hex of the key's digest>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key_secret_ref: Option<SecretReference>,
    /// Host names under which the gateway serves this service.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 16),
        inner(
            length(min = 1, max = 253),
            regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$")
        )
    )]
    pub hosts: Vec<String>,
    /// Gateway (Gateway API) through which the hosts are reached from outside: an HTTPRoute is made for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway_ref: Option<GatewayReference>,
    /// Make the Service `NAME` in the service's namespace, an alias of the gateway.
    #[serde(default = "default_alias")]
    pub alias: bool,
    /// Most that one key's holder may ask; with `auth: None`, all callers together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitsSpec>,
    /// NetworkPolicy peers that may reach the runtime pods directly.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "open_list")]
    pub allow_from: Vec<Value>,
}

fn default_alias() -> bool {
    true
}

/// Most that one client may ask. Each gateway enforces its part: the limit divided by the gateways that are ready.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct LimitsSpec {
    /// Requests in a minute; more are answered 429 with Retry-After.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub requests_per_minute: Option<i32>,
    /// Requests open at one time; more are answered 429.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000))]
    pub concurrent_requests: Option<i32>,
}

/// A Gateway of the Gateway API.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct GatewayReference {
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Its namespace; the service's own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub namespace: Option<String>,
    /// One of its listeners; all that take the hosts when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub section_name: Option<String>,
}

/// A Secret in the service's namespace.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct SecretReference {
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// What the operator answers.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct InferenceServiceStatus {
    /// Generation of the spec that this status answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// OpenAI-compatible base address, ending in `/v1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// The same by the name of the service in its own namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias_url: Option<String>,
    /// Pods that exist, of any revision.
    #[serde(default)]
    pub replicas: i32,
    /// Pods that answer, of any revision.
    #[serde(default)]
    pub ready_replicas: i32,
    /// Pods of the newest revision.
    #[serde(default)]
    pub updated_replicas: i32,
    /// Label selector of the pods, for `/scale`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// Revisions: what the pods run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<RevisionStatus>,
    /// The model's files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelStatus>,
    /// Who set the number of replicas, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scaling: Option<ScalingStatus>,
    /// Ready, ModelReady, WorkloadsReady, EndpointReady, ScalingReady.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// What the pods run.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct RevisionStatus {
    /// Hash of the newest revision.
    pub current: String,
    /// Hash of the revision that it replaces, while that still has pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<String>,
    /// True when the operator's default image is newer than the one that runs.
    #[serde(default)]
    pub outdated: bool,
    /// How the rollout proceeds (`Surge`, `InPlace`, `Canary`, `Waiting` or `Halted`) and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<String>,
    /// The newest revision is on trial, or was rolled back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary: Option<CanaryStatus>,
}

/// What gateways give a revision that is on trial.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct CanaryStatus {
    /// Its share of the requests in percent; 0 when it was rolled back.
    pub weight_percent: i32,
}

/// The model's files.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ModelStatus {
    /// `Pending`, `Downloading`, `Loading`, `Ready` or `Failed`.
    pub phase: String,
    /// Commit that a tag or branch stood for when it was first resolved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resolved_revision: Option<String>,
    /// Bytes on disk so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downloaded_bytes: Option<i64>,
    /// Bytes of the whole model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_bytes: Option<i64>,
}

/// Who set the number of replicas, and why.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ScalingStatus {
    /// Replicas wanted.
    pub desired_replicas: i32,
    /// The last decision that changed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_decision: Option<ScalingDecision>,
}

/// One decision with its inputs.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ScalingDecision {
    /// When, RFC 3339.
    pub time: String,
    /// Replicas before.
    pub from: i32,
    /// Replicas after.
    pub to: i32,
    /// Why, CamelCase.
    pub reason: String,
    /// The figures it was made from.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub inputs: BTreeMap<String, String>,
}

fn open_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "object", "nullable": true, "x-kubernetes-preserve-unknown-fields": true })
}

fn open_list(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 16,
        "items": { "type": "object", "x-kubernetes-preserve-unknown-fields": true }
    })
}
