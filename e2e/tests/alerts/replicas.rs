//! Faults of replicas at work: too many requests, full caches, deaths.

use std::time::Duration;

use anyhow::Result;
use ashlar_e2e::processes::{self, Words};
use ashlar_e2e::prometheus::Prometheus;
use ashlar_e2e::service::{QUESTION, SERVICE_LABEL, chat, manifest, text};
use ashlar_e2e::wait::{self, Seen};
use ashlar_e2e::{Namespace, client};
use futures::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, ListParams};
use serde_json::{Value, json};

use super::FIRES;

/// One replica with one place and few KV blocks, and ever more requests.
pub(super) async fn more_requests_than_one_replica_takes(
    ns: &Namespace,
    prometheus: &Prometheus,
) -> Result<()> {
    let mut service = manifest(ns, "busy");
    service["spec"]["scaling"] = json!({"minReplicas": 1, "maxReplicas": 1});
    service["spec"]["runtime"]["args"] = json!(["--max-num-seqs=1", "--max-num-queued-reqs=40"]);
    let service = ns.serve(&service).await?;
    let url = format!("{}/chat/completions", text(&service, "/status/url")?);
    let question = chat("busy", "Tell me a very long story.", 200);
    let users = async {
        // More each second than are answered, until those who come too late are refused.
        let mut asked = Vec::new();
        let mut pace = tokio::time::interval(Duration::from_millis(500));
        for _ in 0..2 * FIRES.as_secs() {
            pace.tick().await;
            for _ in 0..2 {
                let (http, url, question) = (ns.http.clone(), url.clone(), question.clone());
                asked.push(tokio::spawn(async move {
                    http.post(&url, &question).await.map(|answer| answer.status)
                }));
            }
        }
        join_all(asked).await;
        anyhow::Ok(())
    };
    let seen = async {
        for alert in [
            "AshlarQueueGrowingAtMaxReplicas",
            "AshlarFirstTokenBurnFast",
            "AshlarFirstTokenBurnSlow",
            "AshlarRequestsRefused",
        ] {
            prometheus.firing(alert, Some("busy"), FIRES).await?;
        }
        anyhow::Ok(())
    };
    tokio::select! {
        seen = seen => seen,
        ended = users => ended.and(Err(anyhow::anyhow!("the users are through before all alerts fired"))),
    }
}

/// Sixteen sequences share blocks for three.
pub(super) async fn requests_that_fill_the_cache(
    ns: &Namespace,
    prometheus: &Prometheus,
) -> Result<()> {
    let mut service = manifest(ns, "full");
    service["spec"]["runtime"]["args"] = json!([
        "--max-model-len=256",
        "--max-num-seqs=16",
        "--kv-cache-memory-bytes=24M"
    ]);
    let service = ns.serve(&service).await?;
    let url = format!("{}/chat/completions", text(&service, "/status/url")?);
    let seen = prometheus.firing("AshlarKVCacheSaturated", Some("full"), FIRES);
    // Each goes on by itself: at the end of a round that all wait for nobody would.
    let question = endless("full", "Tell me a very long story.", 180);
    let load = join_all((0..24).map(|_| for_ever(|| users(ns, &url, 1, question.clone()))));
    tokio::select! {
        seen = seen => seen,
        ended = load => ended.into_iter().collect(),
    }
}

/// The old pod must end first, and its users take their time.
pub(super) async fn a_rollout_that_waits_for_long_answers(
    ns: &Namespace,
    prometheus: &Prometheus,
) -> Result<()> {
    let mut service = manifest(ns, "slow");
    service["spec"]["rolloutStrategy"] = json!({"surge": "Never", "drainTimeoutSeconds": 300});
    let applied = ns.serve(&service).await?;
    let url = format!("{}/chat/completions", text(&applied, "/status/url")?);
    let answers = users(
        ns,
        &url,
        8,
        endless("slow", "Tell me a very long story.", 1800),
    );
    let rollout = async {
        running(ns, prometheus, "slow").await?;
        service["spec"]["runtime"]["args"] = json!(["--max-num-seqs=8"]);
        ns.apply(&service).await?;
        prometheus
            .firing("AshlarRolloutStuck", Some("slow"), FIRES)
            .await
    };
    tokio::select! {
        seen = rollout => seen,
        ended = answers => ended.and(Err(anyhow::anyhow!("the answers ended before the alert fired"))),
    }
}

/// One pod after the other is killed in the middle of its answers.
pub(super) async fn replicas_that_die(ns: &Namespace, prometheus: &Prometheus) -> Result<()> {
    let mut service = manifest(ns, "dying");
    service["spec"]["replicas"] = json!(2);
    let service = ns.serve(&service).await?;
    let url = format!("{}/chat/completions", text(&service, "/status/url")?);
    let pods: Api<Pod> = Api::namespaced(ns.client.clone(), &ns.name);
    let ours = ListParams::default().labels(&format!("{SERVICE_LABEL}=dying"));
    let now = DeleteParams::default().grace_period(0);
    let kill = async || -> Result<()> {
        let mut streams = Vec::new();
        for _ in 0..6 {
            let mut request = endless("dying", "Tell me a very long story.", 400);
            request["stream"] = json!(true);
            let mut events = ns.http.stream(&url, &request).await?;
            events.next().await?;
            streams.push(events);
        }
        for pod in pods.list(&ours).await? {
            // It may have gone by itself.
            let _ = pods.delete(&pod.name_any(), &now).await;
        }
        // They break off.
        join_all(streams.into_iter().map(client::Events::rest)).await;
        Ok(())
    };
    let seen = prometheus.firing("AshlarAnswersCut", Some("dying"), FIRES);
    until(seen, kill).await
}

/// Their processes end again and again, and until their node has noticed they refuse connections.
pub(super) async fn replicas_that_crash(ns: &Namespace, prometheus: &Prometheus) -> Result<()> {
    let mut service = manifest(ns, "crashing");
    service["spec"]["replicas"] = json!(2);
    // By this their processes are found, so the cluster must be on this machine.
    let model = format!("{}-crashing", ns.name);
    service["spec"]["model"]["name"] = json!(model);
    let service = ns.serve(&service).await?;
    let url = format!("{}/chat/completions", text(&service, "/status/url")?);
    let question = chat(&model, QUESTION, 1);
    let argument = format!("--served-model-name={model}");
    let crash = async || -> Result<()> {
        ns.ready("crashing").await?;
        let killed = async { processes::kill(&[(Words::Arguments, &argument)]) };
        // Who asks meanwhile may be refused; three rounds outlast the time until the gateways know.
        let asked = join_all((0..16).map(async |_| {
            for _ in 0..3 {
                let _ = ns.http.post(&url, &question).await;
            }
        }));
        tokio::join!(killed, asked).0
    };
    let seen = prometheus.firing("AshlarReplicaLeftOut", Some("crashing"), FIRES);
    until(seen, crash).await
}

/// Waits until Prometheus has seen requests of a service run.
pub(super) async fn running(ns: &Namespace, prometheus: &Prometheus, name: &str) -> Result<()> {
    let running = format!(
        "sum(vllm:num_requests_running{{namespace={:?},name={name:?}}}) > 0",
        ns.name
    );
    wait::until("requests that run", wait::REACTION, async || {
        Ok(if prometheus.query(&running).await?.is_empty() {
            Seen::NotYet("none".to_owned())
        } else {
            Seen::Done(())
        })
    })
    .await
}

/// A chat whose answer goes on for as long as it may.
pub(super) fn endless(model: &str, question: &str, max_tokens: u32) -> Value {
    let mut request = chat(model, question, max_tokens);
    request["ignore_eos"] = json!(true);
    request
}

/// As many users at once read one streamed answer each; one that is refused is an answer too.
pub(super) async fn users(
    ns: &Namespace,
    url: &str,
    count: usize,
    mut question: Value,
) -> Result<()> {
    question["stream"] = json!(true);
    join_all((0..count).map(async |_| {
        if let Ok(events) = ns.http.stream(url, &question).await {
            let _ = events.rest().await;
        }
    }))
    .await;
    Ok(())
}

/// Does `again` over and over until `seen` ends.
async fn until<F: Future<Output = Result<()>>>(
    seen: impl Future<Output = Result<()>>,
    again: impl FnMut() -> F,
) -> Result<()> {
    tokio::select! {
        seen = seen => seen,
        failed = for_ever(again) => failed,
    }
}

async fn for_ever<F: Future<Output = Result<()>>>(mut again: impl FnMut() -> F) -> Result<()> {
    loop {
        again().await?;
    }
}
