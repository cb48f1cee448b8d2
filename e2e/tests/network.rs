//! A security engineer asks who reaches what. Each answer is taken twice: with a policy that opens everything, so that only
//! Ashlar's own can be what closes it, and without.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use anyhow::{Context, Result};
use ashlar_e2e::cluster::{self, SYSTEM_NAMESPACE};
use ashlar_e2e::reach::{only, reach_from};
use ashlar_e2e::service::manifest;
use ashlar_e2e::wait::{self, Seen};
use ashlar_e2e::{Namespace, with_namespace};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams};
use serde_json::json;

const GATEWAY: &str = "http://ashlar-gateway.ashlar-system.svc/v1/models";
const API_SERVER: &str = "https://kubernetes.default.svc/version";
/// A policy beside Ashlar's that lets everything in and out.
const OPEN: &str = "e2e-open";

async fn open(ns: &Namespace, namespace: &str) -> Result<()> {
    let policies: Api<NetworkPolicy> = Api::namespaced(ns.client.clone(), namespace);
    let policy = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": OPEN},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress", "Egress"], "ingress": [{}], "egress": [{}]},
    });
    policies
        .patch(OPEN, &PatchParams::apply("e2e"), &Patch::Apply(&policy))
        .await?;
    Ok(())
}

async fn close(ns: &Namespace, namespace: &str) -> Result<()> {
    let policies: Api<NetworkPolicy> = Api::namespaced(ns.client.clone(), namespace);
    policies.delete(OPEN, &DeleteParams::default()).await?;
    Ok(())
}

fn address(pod: &Pod) -> Result<String> {
    let status = pod.status.as_ref();
    status
        .and_then(|status| status.pod_ip.clone())
        .context("a pod without address")
}

/// The one pod of the service.
async fn model_pod(ns: &Namespace) -> Result<Pod> {
    ns.pods_of("smollm2").await?.pop().context("no pod")
}

/// Where a pod of the chart has its metrics.
async fn metrics_of(ns: &Namespace, component: &str) -> Result<String> {
    let pod = ns.cluster.component_pods(component).await?.pop();
    Ok(format!(
        "http://{}:8081/metrics",
        address(&pod.context("no pod")?)?
    ))
}

#[tokio::test]
async fn only_gateway_operator_and_named_peers_reach_a_model_pod() -> Result<()> {
    with_namespace("network", async |ns| {
        with_namespace("foreign", async |foreign| {
            let mut service = manifest(&ns, "smollm2");
            service["spec"]["scaling"] = json!({"minReplicas": 1, "maxReplicas": 2});
            let ready = ns.serve(&service).await?;
            let model = format!("http://{}:8000/health", address(&model_pod(&ns).await?)?);
            let by_name = format!("http://smollm2-pods.{}.svc:8000/health", ns.name);
            let targets = [
                ("model", model.as_str()),
                ("name", &by_name),
                ("gateway", GATEWAY),
            ];
            let stranger = async || {
                foreign
                    .reach_from_new_pod(&json!({"role": "stranger"}), &targets)
                    .await
            };

            open(&ns, &ns.name).await?;
            only(
                "a stranger and an open pod",
                &["model", "name", "gateway"],
                stranger,
            )
            .await?;
            close(&ns, &ns.name).await?;
            only("a stranger and a closed pod", &["gateway"], stranger).await?;

            ns.ask(&ready).await?;
            the_operator_scrapes(&ns).await?;

            // Both selectors of one peer must hold.
            service["spec"]["endpoint"]["allowFrom"] = json!([{
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": foreign.name}},
                "podSelector": {"matchLabels": {"role": "friend"}},
            }]);
            ns.apply(&service).await?;
            let friend = async || {
                foreign
                    .reach_from_new_pod(&json!({"role": "friend"}), &targets)
                    .await
            };
            let neighbour = async || {
                ns.reach_from_new_pod(&json!({"role": "friend"}), &targets)
                    .await
            };
            only("a friend", &["model", "name", "gateway"], friend).await?;
            only("a stranger beside the friend", &["gateway"], stranger).await?;
            only(
                "a friend's label in the service's namespace",
                &["gateway"],
                neighbour,
            )
            .await
        })
        .await
    })
    .await
}

/// The autoscaler knows the service's load, which it asks the pod for.
async fn the_operator_scrapes(ns: &Namespace) -> Result<()> {
    wait::until("a signal of the service", wait::REACTION, async || {
        let mut seen = String::new();
        for pod in ns.cluster.component_pods("operator").await? {
            let page = format!("http://{}:8081/metrics", address(&pod)?);
            let page = ns.http.get(&page).await?.body;
            let of_service = |line: &&str| {
                line.starts_with("ashlar_autoscaler_signal{")
                    && line.contains(&format!("namespace=\"{}\"", ns.name))
            };
            seen.extend(page.lines().filter(of_service));
        }
        Ok(if seen.contains("signal=\"running\"") {
            Seen::Done(())
        } else {
            Seen::NotYet(seen)
        })
    })
    .await
}

#[tokio::test]
async fn a_model_pod_resolves_names_and_reaches_nothing() -> Result<()> {
    with_namespace("egress", async |ns| {
        with_namespace("other", async |other| {
            ns.serve(&manifest(&ns, "smollm2")).await?;
            other.serve(&manifest(&other, "smollm2")).await?;
            // Nothing else closes the other pod.
            open(&other, &other.name).await?;
            let pod = model_pod(&ns).await?.name_any();
            let model = format!("http://{}:8000/health", address(&model_pod(&other).await?)?);
            let targets = [
                ("gateway", GATEWAY),
                ("api-server", API_SERVER),
                ("model", &model),
            ];
            let inside = async || reach_from(&ns.client, (&ns.name, &pod), &targets).await;

            open(&ns, &ns.name).await?;
            only(
                "an open model pod",
                &["gateway", "api-server", "model"],
                inside,
            )
            .await?;
            close(&ns, &ns.name).await?;
            // Names were resolved: `curl` tells a name without address from an address without answer.
            only("a closed model pod", &[], inside).await
        })
        .await
    })
    .await
}

/// Operator and gateway reach what their work needs, and no port beside it: here one of the cluster's DNS server, which is open.
async fn the_chart_reaches_what_it_needs(ns: &Namespace, model: &str) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(ns.client.clone(), "kube-system");
    let dns = ListParams::default().labels("k8s-app=kube-dns");
    let dns = pods.list(&dns).await?.items.pop().context("no DNS pod")?;
    let beside = format!("http://{}:8181/ready", address(&dns)?);
    let targets = [
        ("api-server", API_SERVER),
        ("model", model),
        ("beside", &beside),
    ];
    for component in ["operator", "gateway"] {
        let pod = ns.cluster.component_pods(component).await?.pop();
        let pod = pod.context("no pod")?.name_any();
        let ask = async || reach_from(&ns.client, (SYSTEM_NAMESPACE, &pod), &targets).await;
        open(ns, SYSTEM_NAMESPACE).await?;
        let all = ["api-server", "model", "beside"];
        only(&format!("an open {component}"), &all, ask).await?;
        close(ns, SYSTEM_NAMESPACE).await?;
        let needed = ["api-server", "model"];
        only(&format!("the {component} by default"), &needed, ask).await?;
    }
    Ok(())
}

#[tokio::test]
async fn the_chart_reaches_what_it_needs_and_metrics_are_for_those_whom_it_was_told() -> Result<()>
{
    with_namespace("monitoring", async |ns| {
        with_namespace("curious", async |curious| {
            ns.serve(&manifest(&ns, "smollm2")).await?;
            let model = format!("http://{}:8000/metrics", address(&model_pod(&ns).await?)?);
            the_chart_reaches_what_it_needs(&ns, &model).await?;
            let ask = async |from: &Namespace| {
                // The chart's pods may be new ones since the last time.
                let operator = metrics_of(&ns, "operator").await?;
                let gateway_metrics = metrics_of(&ns, "gateway").await?;
                let targets = [
                    ("operator", operator.as_str()),
                    ("gateway-metrics", &gateway_metrics),
                    ("model", &model),
                    ("gateway", GATEWAY),
                ];
                from.reach_from_new_pod(&json!({}), &targets).await
            };
            let all = ["operator", "gateway-metrics", "model", "gateway"];

            open(&ns, SYSTEM_NAMESPACE).await?;
            open(&ns, &ns.name).await?;
            only("an open chart", &all, async || ask(&curious).await).await?;
            close(&ns, SYSTEM_NAMESPACE).await?;
            close(&ns, &ns.name).await?;
            only("the chart by default", &["gateway"], async || ask(&curious).await).await?;

            let label = "networkPolicy.metricsFrom[0].namespaceSelector.matchLabels.kubernetes\\.io/metadata\\.name";
            cluster::install_with(&[&format!("{label}={}", ns.name)]).await?;
            only("who may read metrics", &all, async || ask(&ns).await).await?;
            only("who may not", &["gateway"], async || ask(&curious).await).await?;

            // As the other tests expect it.
            cluster::install().await
        })
        .await
    })
    .await
}
