//! A service sleeps when nobody asks, wakes for a hundred at once, grows, and sleeps again: no request is lost, though one
//! of the gateways that hold them ends meanwhile.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ashlar_e2e::cluster::SYSTEM_NAMESPACE;
use ashlar_e2e::service::{QUESTION, SERVICE_LABEL, chat, condition, manifest, text};
use ashlar_e2e::wait::{self, Seen};
use ashlar_e2e::{Namespace, with_namespace};
use futures::future::join_all;
use k8s_openapi::api::core::v1::{Event, Pod};
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, ListParams};
use serde_json::json;

/// Requests of the burst.
const BURST: usize = 100;
/// Quiet time, the window, and a pod's drain.
const ASLEEP: Duration = Duration::from_secs(180);

/// Waits until no pod is left and the service says that it sleeps.
async fn asleep(ns: &Namespace) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(ns.client.clone(), &ns.name);
    let mine = ListParams::default().labels(&format!("{SERVICE_LABEL}=smollm2"));
    wait::until("smollm2 to sleep", ASLEEP, async || {
        let service = ns.services().get("smollm2").await?;
        let pods = pods.list(&mine).await?.items.len();
        let desired = service.data.pointer("/status/scaling/desiredReplicas");
        let ready = condition(&service, "Ready").context("no condition Ready")?;
        let sleeps = desired == Some(&json!(0))
            && (ready.status.as_str(), ready.reason.as_str()) == ("True", "ScaledToZero");
        Ok(if sleeps && pods == 0 {
            Seen::Done(())
        } else {
            Seen::NotYet(format!("{pods} pods, {}", service.data["status"]))
        })
    })
    .await
}

/// Once requests wait for the first pod, ends one of the gateways that hold them, as an upgrade does.
async fn a_gateway_leaves(ns: &Namespace) -> Result<()> {
    wait::object(
        &ns.services(),
        "smollm2",
        "a replica wanted",
        wait::REACTION,
        |service| service.data.pointer("/status/scaling/desiredReplicas") != Some(&json!(0)),
    )
    .await?;
    let gateways = ns.cluster.component_pods("gateway").await?;
    ensure!(gateways.len() >= 2, "{} gateways", gateways.len());
    let pods: Api<Pod> = Api::namespaced(ns.client.clone(), SYSTEM_NAMESPACE);
    pods.delete(&gateways[0].name_any(), &DeleteParams::default())
        .await?;
    Ok(())
}

/// Waits until the autoscaler wants two replicas.
async fn grown(ns: &Namespace) -> Result<()> {
    wait::object(
        &ns.services(),
        "smollm2",
        "two replicas wanted",
        wait::STARTUP,
        |service| service.data.pointer("/status/scaling/desiredReplicas") == Some(&json!(2)),
    )
    .await?;
    Ok(())
}

#[tokio::test]
async fn a_sleeping_service_answers_a_burst_whole_and_sleeps_again() -> Result<()> {
    with_namespace("autoscale", async |ns| {
        let mut service = manifest(&ns, "smollm2");
        service["spec"]["scaling"] = json!({
            "minReplicas": 0,
            "maxReplicas": 2,
            "idleSeconds": 10,
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 10}},
        });
        service["spec"]["rolloutStrategy"] = json!({"drainTimeoutSeconds": 10});
        let service = ns.serve(&service).await?;
        let url = format!("{}/chat/completions", text(&service, "/status/url")?);
        asleep(&ns).await?;

        let question = chat("smollm2", QUESTION, 8);
        let answers = join_all((0..BURST).map(|_| ns.http.post(&url, &question)));
        let meanwhile = async {
            a_gateway_leaves(&ns).await?;
            grown(&ns).await
        };
        let (answers, grew) = tokio::join!(answers, meanwhile);
        grew?;
        let mut lost = Vec::new();
        for answer in answers {
            match answer.and_then(|answer| answer.chat_text()) {
                Ok(text) if !text.is_empty() => {}
                Ok(_) => lost.push("an empty answer".to_owned()),
                Err(error) => lost.push(format!("{error:#}")),
            }
        }
        ensure!(
            lost.is_empty(),
            "{} of {BURST} requests were lost: {:?}",
            lost.len(),
            &lost[..lost.len().min(3)]
        );

        let scaled = ns.services().get("smollm2").await?;
        let reason = condition(&scaled, "ScalingReady").context("no condition ScalingReady")?;
        ensure!(reason.status == "True", "{reason:?}");
        ensure!(
            reason.message.contains("replicas: "),
            "no explanation: {reason:?}"
        );
        asleep(&ns).await?;

        let events: Api<Event> = Api::namespaced(ns.client.clone(), &ns.name);
        let events = events.list(&ListParams::default()).await?.items;
        for wanted in ["ScaledUp", "ScaledDown"] {
            ensure!(
                events
                    .iter()
                    .any(|event| event.reason.as_deref() == Some(wanted)),
                "no event {wanted}"
            );
        }
        Ok(())
    })
    .await
}
