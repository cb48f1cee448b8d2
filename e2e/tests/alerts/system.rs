//! Faults of the gateway, the operator and of what is scraped: they concern every service, so come one after the other.

use anyhow::{Context, Result, ensure};
use ashlar_e2e::Namespace;
use ashlar_e2e::cluster::SYSTEM_NAMESPACE;
use ashlar_e2e::prometheus::Prometheus;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::rbac::v1::{ClusterRole, RoleBinding};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use super::FIRES;
use super::models::without_image;

/// Sets the replicas of a Deployment of the chart.
async fn scale(ns: &Namespace, component: &str, replicas: i32) -> Result<()> {
    let deployments: Api<Deployment> = Api::namespaced(ns.client.clone(), SYSTEM_NAMESPACE);
    let patch = Patch::Merge(json!({"spec": {"replicas": replicas}}));
    deployments
        .patch(
            &format!("ashlar-{component}"),
            &PatchParams::default(),
            &patch,
        )
        .await?;
    Ok(())
}

pub(super) async fn models_that_are_not_scraped(prometheus: &Prometheus) -> Result<()> {
    prometheus.leave_out_models(true);
    let seen = prometheus
        .firing("AshlarModelMetricsMissing", None, FIRES)
        .await;
    prometheus.leave_out_models(false);
    seen
}

pub(super) async fn without_gateway(ns: &Namespace, prometheus: &Prometheus) -> Result<()> {
    scale(ns, "gateway", 0).await?;
    let missing = prometheus
        .firing("AshlarGatewayMetricsMissing", None, FIRES)
        .await;
    let blind = prometheus
        .firing("AshlarAutoscalerBlind", Some("busy"), FIRES)
        .await;
    scale(ns, "gateway", 2).await?;
    missing.and(blind)
}

/// The right to write status is taken away.
pub(super) async fn an_operator_that_may_not_write(
    ns: &Namespace,
    prometheus: &Prometheus,
) -> Result<()> {
    let roles: Api<ClusterRole> = Api::all(ns.client.clone());
    let role = roles.get("ashlar-operator").await?;
    let rules = serde_json::to_value(&role.rules)?;
    let mut fewer = rules.clone();
    let all = fewer.as_array_mut().context("a role has rules")?;
    all.retain(|rule| rule["resources"] != json!(["inferenceservices/status"]));
    ensure!(json!(all) != rules, "the role has no rule for status");
    let patch = |rules: &Value| Patch::Merge(json!({"rules": rules}));
    let params = PatchParams::default();
    roles
        .patch("ashlar-operator", &params, &patch(&fewer))
        .await?;
    for name in ["new-a", "new-b", "new-c"] {
        ns.apply(&without_image(ns, name)).await?;
    }
    let seen = prometheus
        .firing("AshlarReconcileErrors", None, FIRES)
        .await;
    roles
        .patch("ashlar-operator", &params, &patch(&rules))
        .await?;
    seen
}

/// The right to hold the Lease is taken away, and who holds it ends.
pub(super) async fn without_leader(ns: &Namespace, prometheus: &Prometheus) -> Result<()> {
    let bindings: Api<RoleBinding> = Api::namespaced(ns.client.clone(), SYSTEM_NAMESPACE);
    let mut binding = bindings.get("ashlar-operator-leases").await?;
    bindings
        .delete("ashlar-operator-leases", &DeleteParams::default())
        .await?;
    let seen = prometheus.firing("AshlarNoLeader", None, FIRES).await;
    binding.metadata.resource_version = None;
    binding.metadata.uid = None;
    bindings.create(&PostParams::default(), &binding).await?;
    seen
}

pub(super) async fn without_operator(ns: &Namespace, prometheus: &Prometheus) -> Result<()> {
    scale(ns, "operator", 0).await?;
    let missing = prometheus
        .firing("AshlarOperatorMetricsMissing", None, FIRES)
        .await;
    scale(ns, "operator", 2).await?;
    missing
}
