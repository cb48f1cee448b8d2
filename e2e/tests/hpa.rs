//! Someone scales by what their cluster has: the docs' HorizontalPodAutoscaler, by the gateways' requests in flight. New pods
//! come, serve, and go again, and no request is lost.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ashlar_e2e::external_metrics::ExternalMetrics;
use ashlar_e2e::prometheus::{CHART, Prometheus};
use ashlar_e2e::service::{QUESTION, chat, manifest, text};
use ashlar_e2e::wait::{self, Seen};
use ashlar_e2e::{Namespace, with_namespace};
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::Event;
use kube::api::{Api, ListParams};
use serde_json::{Value, json};

/// Requests in flight: 20 for each of three replicas, which is the manifest's most, at 41 and more.
const BUSY: usize = 50;
/// Then so many, which one replica takes, while the others go.
const CALM: usize = 4;
/// Seconds that the highest recommendation stands; the manifest leaves Kubernetes' default of five minutes.
const DOWN_WINDOW_SECONDS: u32 = 15;
/// The autoscaler looks every 15 s, and may need one look more to know the resource.
const GROWN: Duration = Duration::from_secs(90);
/// A look, the window, another look, and the pods' drain.
const SHRUNK: Duration = Duration::from_secs(120);

/// The manifest of the docs, for this namespace.
fn autoscaler(ns: &Namespace) -> Result<Value> {
    let page = std::fs::read_to_string(Path::new(CHART).join("../docs/src/howto/scale.md"))?;
    let mut blocks = page
        .split("```yaml\n")
        .skip(1)
        .filter_map(|rest| rest.split("```").next());
    let block = blocks.find(|block| block.contains("kind: HorizontalPodAutoscaler"));
    let mut manifest: Value = serde_yaml_ng::from_str(block.context("scale.md shows no HPA")?)?;
    for place in [
        "/metadata/namespace",
        "/spec/metrics/0/external/metric/selector/matchLabels/namespace",
    ] {
        let namespace = manifest.pointer_mut(place);
        *namespace.with_context(|| format!("the manifest has no {place}"))? = json!(ns.name);
    }
    manifest["spec"]["behavior"] =
        json!({"scaleDown": {"stabilizationWindowSeconds": DOWN_WINDOW_SECONDS}});
    Ok(manifest)
}

/// Clients that ask again and again, so many at a time as `clients` says; each answer has to be whole.
async fn load(ns: &Namespace, url: &str, clients: &AtomicUsize) -> Result<usize> {
    let one = async |number: usize| {
        let mut answered = 0;
        while number < clients.load(Ordering::Relaxed) {
            let mut question = chat("smollm2", QUESTION, 16);
            // Prompts that begin alike go to replicas that know them, which may leave one of three without.
            let alone = json!({"role": "system", "content": format!("You are helper {number}.")});
            let messages = question["messages"].as_array_mut();
            messages.context("a chat: this is a bug")?.insert(0, alone);
            let answer = ns.http.post(url, &question).await;
            let text = answer.and_then(|answer| answer.chat_text());
            let text = text.with_context(|| format!("request {answered} of client {number}"))?;
            ensure!(!text.is_empty(), "an empty answer");
            answered += 1;
        }
        Ok::<_, anyhow::Error>(answered)
    };
    Ok(try_join_all((0..BUSY).map(one)).await?.iter().sum())
}

/// Waits until the autoscaler has set so many replicas, and so many are ready and no other pod is left.
async fn replicas(ns: &Namespace, count: usize, limit: Duration) -> Result<()> {
    wait::until(&format!("{count} replicas"), limit, async || {
        let service = ns.services().get("smollm2").await?;
        let number = |pointer: &str| service.data.pointer(pointer).and_then(Value::as_u64);
        let (wanted, ready) = (number("/spec/replicas"), number("/status/readyReplicas"));
        let pods = ns.pods_of("smollm2").await?.len();
        let all = Some(count as u64);
        Ok(if wanted == all && ready == all && pods == count {
            Seen::Done(())
        } else {
            Seen::NotYet(format!("{wanted:?} wanted, {ready:?} ready, {pods} pods"))
        })
    })
    .await
}

/// Waits until each of so many pods has answered requests.
async fn all_answer(ns: &Namespace, prometheus: &Prometheus, count: usize) -> Result<()> {
    let expression = format!(
        "sum by (pod) (vllm:request_success_total{{namespace={:?}}}) > 0",
        ns.name
    );
    wait::until("answers of each pod", wait::REACTION, async || {
        let answering = prometheus.query(&expression).await?.len();
        Ok(if answering == count {
            Seen::Done(())
        } else {
            Seen::NotYet(format!("{answering} pods have answered"))
        })
    })
    .await
}

async fn play(ns: &Namespace, prometheus: &Prometheus) -> Result<()> {
    // As in the docs: nothing but the autoscaler says how many replicas there are.
    let service = ns.serve(&manifest(ns, "smollm2")).await?;
    let url = format!("{}/chat/completions", text(&service, "/status/url")?);
    ns.apply(&autoscaler(ns)?).await?;

    let (clients, began) = (AtomicUsize::new(BUSY), Instant::now());
    let seconds = || began.elapsed().as_secs_f64();
    let story = async {
        replicas(ns, 3, GROWN).await?;
        eprintln!("three replicas are ready after {:.0} s", seconds());
        all_answer(ns, prometheus, 3).await?;
        eprintln!("each has answered after {:.0} s", seconds());
        clients.store(CALM, Ordering::Relaxed);
        replicas(ns, 1, SHRUNK).await?;
        clients.store(0, Ordering::Relaxed);
        Ok(())
    };
    let (answered, ()) = tokio::try_join!(load(ns, &url, &clients), story)?;
    eprintln!(
        "one replica after {:.0} s; {answered} requests, all answered",
        seconds()
    );

    let events: Api<Event> = Api::namespaced(ns.client.clone(), &ns.name);
    let events = events.list(&ListParams::default()).await?;
    let rescaled = events
        .iter()
        .filter(|event| event.reason.as_deref() == Some("SuccessfulRescale"));
    ensure!(rescaled.count() >= 2, "the HPA does not say that it scaled");
    Ok(())
}

#[tokio::test]
async fn an_hpa_scales_a_service_by_its_requests_in_flight_and_none_is_lost() -> Result<()> {
    with_namespace("hpa", async |ns| {
        let prometheus = Arc::new(Prometheus::start(&ns.cluster).await?);
        let metrics = ExternalMetrics::start(&ns, Arc::clone(&prometheus)).await?;
        let played = play(&ns, &prometheus).await;
        metrics.remove().await?;
        played
    })
    .await
}
