//! `spec.cache`: where downloaded files are kept.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
