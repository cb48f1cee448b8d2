//! A service sleeps when nobody asks, wakes soon for one request and for a hundred at once, grows, and sleeps again: no
//! request is lost, though one of the gateways that hold them ends meanwhile.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ashlar_e2e::cluster::SYSTEM_NAMESPACE;
use ashlar_e2e::service::{QUESTION, SERVICE_LABEL, chat, condition, manifest, text};
use ashlar_e2e::wait::{self, Seen};
use ashlar_e2e::{Namespace, with_namespace};
use futures::future::join_all;
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::{Event, Pod};
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, ListParams, WatchEvent, WatchParams};
use serde_json::json;

/// Requests of the burst.
const BURST: usize = 100;
/// Quiet time, the window, and a pod's drain.
const ASLEEP: Duration = Duration::from_secs(180);

/// The most that waking may add to the pod's own start: to see the request, to decide, and to send it on.
const OVERHEAD: Duration = Duration::from_secs(2);

/// The service's pods as they change from now on.
async fn pod_changes(
    ns: &Namespace,
) -> Result<impl Stream<Item = kube::Result<WatchEvent<Pod>>> + Unpin> {
    let pods: Api<Pod> = Api::namespaced(ns.client.clone(), &ns.name);
    let labels = format!("{SERVICE_LABEL}=smollm2");
    let now = pods.list(&ListParams::default().labels(&labels)).await?;
    let version = now.metadata.resource_version.context("no version")?;
    let changes = WatchParams::default().labels(&labels);
    Ok(pods.watch(&changes, &version).await?.boxed())
}

/// How long the next pod takes from its creation until it is Ready.
async fn pod_start(
    mut changes: impl Stream<Item = kube::Result<WatchEvent<Pod>>> + Unpin,
) -> Result<Duration> {
    let mut created = None;
    while let Some(change) = changes.try_next().await? {
        let (WatchEvent::Added(pod) | WatchEvent::Modified(pod)) = change else {
            continue;
        };
        let created = *created.get_or_insert_with(Instant::now);
        let conditions = pod.status.and_then(|status| status.conditions);
        if conditions
            .into_iter()
            .flatten()
            .any(|c| c.type_ == "Ready" && c.status == "True")
        {
            return Ok(created.elapsed());
        }
    }
    bail!("no pod became Ready")
}

/// Wakes the service with one request, whose answer is one token, and says what took how long.
async fn wakes_within_bounds(ns: &Namespace, url: &str) -> Result<()> {
    let changes = pod_changes(ns).await?;
    let asked = Instant::now();
    let answer = async {
        let question = chat("smollm2", QUESTION, 1);
        let answer = ns.http.post(url, &question).await?;
        let took = asked.elapsed();
        answer.chat_text()?;
        Ok(took)
    };
    let (took, start) = tokio::try_join!(answer, pod_start(changes))?;
    let overhead = took.saturating_sub(start);
    eprintln!(
        "scale from zero: answered in {:.2} s, of which {:.2} s were the pod's own start and {:.2} s overhead",
        took.as_secs_f64(),
        start.as_secs_f64(),
        overhead.as_secs_f64()
    );
    ensure!(
        overhead <= OVERHEAD,
        "waking added {overhead:?} to a start of {start:?}"
    );
    Ok(())
}

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
        wakes_within_bounds(&ns, &url).await?;
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
