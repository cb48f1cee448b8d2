//! `spec.rolloutStrategy`: how a new revision replaces the old one.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
