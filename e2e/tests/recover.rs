//! Things are deleted or die; the service comes back by itself, or leaves nothing behind when it was meant to go.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test fails by panicking, and may tell what it measured"
)]

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ashlar_e2e::cluster::SYSTEM_NAMESPACE;
use ashlar_e2e::processes::{self, Words};
use ashlar_e2e::service::{QUESTION, SERVICE_LABEL, chat, is_ready, manifest, text};
use ashlar_e2e::wait::{self, Seen};
use ashlar_e2e::{Namespace, with_namespace};
use futures::future::join_all;
use k8s_openapi::api::apps::v1::{ControllerRevision, Deployment};
use k8s_openapi::api::core::v1::{Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{Api, DeleteParams, ListParams};
use kube::{Resource, ResourceExt};
use serde_json::json;

#[tokio::test]
async fn a_deleted_pod_is_replaced() -> Result<()> {
    with_namespace("pod", async |ns| {
        let service = ns.serve(&manifest(&ns, "smollm2")).await?;
        let pods: Api<Pod> = Api::namespaced(ns.client.clone(), &ns.name);
        let ours = ListParams::default().labels(&format!("{SERVICE_LABEL}=smollm2"));
        let old = pods.list(&ours).await?.items.remove(0).name_any();
        // As when a node dies: no time to finish anything.
        pods.delete(&old, &DeleteParams::default().grace_period(0))
            .await?;
        wait::gone(&pods, &old, wait::REACTION).await?;
        wait::until("a ready pod in its place", wait::STARTUP, async || {
            let found = pods.list(&ours).await?.items;
            let ready = |pod: &Pod| {
                let conditions = pod
                    .status
                    .as_ref()
                    .and_then(|status| status.conditions.as_ref());
                conditions
                    .is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
            };
            let new = found.iter().any(|pod| pod.name_any() != old && ready(pod));
            Ok(if new {
                Seen::Done(())
            } else {
                Seen::NotYet(format!("{} pods, none new and ready", found.len()))
            })
        })
        .await?;
        ns.ready("smollm2").await?;
        ns.ask(&service).await
    })
    .await
}

#[tokio::test]
async fn a_killed_operator_comes_back_and_goes_on() -> Result<()> {
    with_namespace("operator", async |ns| {
        let service = ns.serve(&manifest(&ns, "first")).await?;
        let pods: Api<Pod> = Api::namespaced(ns.client.clone(), SYSTEM_NAMESPACE);
        for pod in ns.cluster.component_pods("operator").await? {
            pods.delete(&pod.name_any(), &DeleteParams::default().grace_period(0))
                .await?;
        }
        // The data path does not need the operator …
        ns.ask(&service).await?;
        // … and what is applied meanwhile is picked up by its successor.
        let second = ns.serve(&manifest(&ns, "smollm2")).await?;
        ns.ask(&second).await?;
        ensure!(
            is_ready(&ns.services().get("first").await?),
            "the first service is no longer Ready"
        );
        Ok(())
    })
    .await
}

/// After a gateway has died new requests may be refused for so long: until its node has noticed and traffic goes to the other.
const REFUSED_FOR: Duration = Duration::from_secs(3);

#[tokio::test]
async fn a_killed_gateway_loses_only_what_is_open_on_it() -> Result<()> {
    with_namespace("gateway", async |ns| {
        let service = ns.serve(&manifest(&ns, "smollm2")).await?;
        let url = format!("{}/chat/completions", text(&service, "/status/url")?);
        let gateways = ns.cluster.component_pods("gateway").await?;
        ensure!(gateways.len() == 2, "{} gateways", gateways.len());
        let mut story = chat("smollm2", "Tell me a very long story.", 400);
        (story["stream"], story["ignore_eos"]) = (json!(true), json!(true));
        let mut open = Vec::new();
        for gateway in &gateways {
            let status = gateway.status.as_ref();
            let address = status.and_then(|status| status.pod_ip.as_deref());
            let address = address.context("a gateway has an address")?;
            let url = format!(
                "http://{address}:8080/{}/smollm2/v1/chat/completions",
                ns.name
            );
            let mut events = ns.http.stream(&url, &story).await?;
            events.next().await?;
            open.push(events.rest());
        }
        let host = format!("HOSTNAME={}", gateways[0].name_any());
        let (begun, killed) = (Instant::now(), OnceLock::new());
        let answered = AtomicUsize::new(0);
        let question = chat("smollm2", QUESTION, 1);
        // Each asks on a connection of its own; what was refused, and how long after the end it was asked.
        let users = join_all((0..4).map(async |_| {
            let mut refused = Vec::new();
            let goes_on = || {
                let over = |at: &Instant| at.elapsed() > 3 * REFUSED_FOR;
                begun.elapsed() < wait::STARTUP && !killed.get().is_some_and(over)
            };
            while goes_on() {
                let asked = Instant::now();
                match ns
                    .http
                    .post(&url, &question)
                    .await
                    .and_then(|answer| answer.chat_text())
                {
                    Ok(_) => drop(answered.fetch_add(1, Ordering::SeqCst)),
                    Err(error) => refused.push((asked, format!("{error:#}"))),
                }
            }
            refused
        }));
        let kill = async {
            wait::until("some answers", wait::REACTION, async || {
                let some = answered.load(Ordering::SeqCst);
                Ok(if some >= 8 {
                    Seen::Done(())
                } else {
                    Seen::NotYet(format!("{some}"))
                })
            })
            .await?;
            let _ = killed.set(Instant::now());
            processes::kill(&[(Words::Environment, &host), (Words::Arguments, "gateway")])
        };
        let (refused, outcome, open) = tokio::join!(users, kill, join_all(open));
        outcome?;
        ensure!(
            open[0].is_err(),
            "the answer that was open on the killed gateway ended whole"
        );
        let whole = open[1]
            .as_ref()
            .is_ok_and(|events| events.last().is_some_and(|event| event.data == "[DONE]"));
        ensure!(
            whole,
            "the answer that was open on the other gateway: {:?}",
            open[1]
        );
        let killed = *killed.get().context("it was killed")?;
        let refused: Vec<_> = refused.into_iter().flatten().collect();
        let last = refused
            .iter()
            .map(|(asked, _)| asked.saturating_duration_since(killed))
            .max();
        eprintln!(
            "{} answered, {} refused, the last {last:?} after the gateway's end",
            answered.load(Ordering::SeqCst),
            refused.len()
        );
        ensure!(
            last.unwrap_or_default() <= REFUSED_FOR,
            "refused {last:?} after the gateway's end: {:?}",
            refused.last()
        );
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_deleted_or_edited_child_is_repaired() -> Result<()> {
    with_namespace("drift", async |ns| {
        let service = ns.serve(&manifest(&ns, "smollm2")).await?;
        let services: Api<Service> = Api::namespaced(ns.client.clone(), &ns.name);
        let headless = services.get("smollm2-pods").await?;
        services
            .delete("smollm2-pods", &DeleteParams::default())
            .await?;
        wait::object(
            &services,
            "smollm2-pods",
            "made again",
            wait::REACTION,
            |new| new.uid() != headless.uid(),
        )
        .await?;

        let deployments: Api<Deployment> = Api::namespaced(ns.client.clone(), &ns.name);
        let name = deployments
            .list(&ListParams::default())
            .await?
            .items
            .remove(0)
            .name_any();
        let edit = kube::api::Patch::Merge(json!({"spec": {"replicas": 0}}));
        let edited = deployments
            .patch(&name, &kube::api::PatchParams::default(), &edit)
            .await?;
        wait::object(
            &deployments,
            &name,
            "scaled back to 1",
            wait::REACTION,
            |deployment| {
                deployment.metadata.generation > edited.metadata.generation
                    && deployment.spec.as_ref().and_then(|spec| spec.replicas) == Some(1)
            },
        )
        .await?;
        ns.ready("smollm2").await?;
        ns.ask(&service).await
    })
    .await
}

#[tokio::test]
async fn a_deleted_service_leaves_nothing_behind() -> Result<()> {
    with_namespace("delete", async |ns| {
        let service = ns.serve(&manifest(&ns, "smollm2")).await?;
        let url = text(&service, "/status/url")?;
        let before = children(&ns).await?;
        for kind in [
            "Deployment",
            "ControllerRevision",
            "Service",
            "EndpointSlice",
            "ServiceAccount",
            "Pod",
        ] {
            ensure!(
                before.iter().any(|child| child.starts_with(kind)),
                "a running service has no {kind}: {before:?}"
            );
        }
        ns.services()
            .delete("smollm2", &DeleteParams::default())
            .await?;
        wait::gone(&ns.services(), "smollm2", wait::REACTION).await?;
        wait::until("the end of all children", wait::STARTUP, async || {
            let left = children(&ns).await?;
            Ok(if left.is_empty() {
                Seen::Done(())
            } else {
                Seen::NotYet(format!("{left:?}"))
            })
        })
        .await?;
        let after = ns
            .http
            .post(
                &format!("{url}/chat/completions"),
                &chat("smollm2", QUESTION, 8),
            )
            .await?;
        after
            .openai_error(http::StatusCode::NOT_FOUND)
            .context("asking a deleted service")
            .map(drop)
    })
    .await
}

/// Everything in the namespace that belongs to the service, as `Kind/name`.
async fn children(ns: &Namespace) -> Result<Vec<String>> {
    let mut found = list::<Deployment>(ns).await?;
    found.extend(list::<ControllerRevision>(ns).await?);
    found.extend(list::<Service>(ns).await?);
    found.extend(list::<EndpointSlice>(ns).await?);
    found.extend(list::<ServiceAccount>(ns).await?);
    found.extend(list::<NetworkPolicy>(ns).await?);
    found.extend(list::<PodDisruptionBudget>(ns).await?);
    found.extend(list::<Pod>(ns).await?);
    Ok(found)
}

async fn list<K>(ns: &Namespace) -> Result<Vec<String>>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(ns.client.clone(), &ns.name);
    // By name, not by label: a child that lost its label must not escape.
    let listed = api.list(&ListParams::default()).await?;
    Ok(listed
        .iter()
        .map(ResourceExt::name_any)
        .filter(|name| name.starts_with("smollm2"))
        .map(|name| format!("{}/{name}", K::kind(&())))
        .collect())
}
