//! `spec.runtime`, `spec.parallelism` and `spec.resources`: what runs in a pod, and what it takes of a node.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
