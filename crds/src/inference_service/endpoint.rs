//! `spec.endpoint`: who may call the service, and by which names.

use kube::KubeSchema;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::secret::SecretReference;

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

fn open_list(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 16,
        "items": { "type": "object", "x-kubernetes-preserve-unknown-fields": true }
    })
}
