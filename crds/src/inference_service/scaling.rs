//! `spec.scaling`: bounds and targets of the autoscaler.

use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscalerBehavior;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::default_replicas;

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
