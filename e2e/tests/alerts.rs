//! Alerts fire when their fault is caused, on a real Prometheus with the chart's own rules in time-lapse. One fault after the
//! other where it concerns every service.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ashlar_e2e::cluster::{self, SYSTEM_NAMESPACE};
use ashlar_e2e::processes::{self, Words};
use ashlar_e2e::prometheus::Prometheus;
use ashlar_e2e::service::{QUESTION, SERVICE_LABEL, chat, manifest, text};
use ashlar_e2e::wait::{self, Seen};
use ashlar_e2e::{Namespace, client, with_namespace};
use futures::future::join_all;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::api::rbac::v1::{ClusterRole, RoleBinding};
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

/// An alert of the chart's slowest rule here fires within this.
const FIRES: Duration = Duration::from_secs(120);

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

/// A service that asks for an image that nobody has.
fn without_image(ns: &Namespace, name: &str) -> Value {
    let mut service = manifest(ns, name);
    service["spec"]["runtime"]["image"] = json!("ashlar.local/nothing:1");
    service
}

#[tokio::test]
async fn alerts_fire_when_their_fault_is_caused() -> Result<()> {
    with_namespace("alerts", async |ns| {
        let prometheus = Prometheus::start(&ns.cluster).await?;
        let ns = &ns;
        let prometheus = &prometheus;
        tokio::try_join!(
            pods_that_do_not_start(ns, prometheus),
            a_revision_that_does_not_start(ns, prometheus),
            a_model_that_is_not_to_be_had(ns, prometheus),
            a_hub_that_goes_silent(ns, prometheus),
            more_requests_than_one_replica_takes(ns, prometheus),
        )?;
        tokio::try_join!(
            requests_that_fill_the_cache(ns, prometheus),
            a_rollout_that_waits_for_long_answers(ns, prometheus),
            replicas_that_die(ns, prometheus),
            replicas_that_crash(ns, prometheus),
            an_engine_that_hangs(ns, prometheus),
        )?;
        models_that_are_not_scraped(prometheus).await?;
        without_gateway(ns, prometheus).await?;
        // From here on nobody reconciles as he should; installing again mends it.
        let outcome = an_operator_that_may_not_write(ns, prometheus).await;
        let outcome = outcome.and(without_leader(ns, prometheus).await);
        let outcome = outcome.and(without_operator(ns, prometheus).await);
        cluster::install().await.and(outcome)
    })
    .await
}

async fn pods_that_do_not_start(ns: &Namespace, prometheus: &Prometheus) -> Result<()> {
    let service = ns.apply(&without_image(ns, "broken")).await?;
    wait::object(
        &ns.services(),
        "broken",
        "an address",
        wait::REACTION,
        |service| text(service, "/status/url").is_ok(),
    )
    .await?;
    drop(service);
    let of = Some("broken");
    for alert in [
        "AshlarPodsFailing",
        "AshlarServiceNotReady",
        "AshlarReplicasMissing",
    ] {
        prometheus.firing(alert, of, FIRES).await?;
    }
    // Who asks is held, and refused in the end.
    let service = ns.services().get("broken").await?;
    let url = format!("{}/chat/completions", text(&service, "/status/url")?);
    let question = chat("broken", QUESTION, 8);
    let refused = async {
        for _ in 0..3 {
            let answers = join_all((0..8).map(|_| ns.http.post(&url, &question))).await;
            for answer in answers {
                answer?.openai_error(http::StatusCode::SERVICE_UNAVAILABLE)?;
            }
        }
        anyhow::Ok(())
    };
    let (refused, held, burn, slow) = tokio::join!(
        refused,
        prometheus.firing("AshlarRequestsHeld", of, FIRES),
        prometheus.firing("AshlarAvailabilityBurnFast", of, FIRES),
        prometheus.firing("AshlarAvailabilityBurnSlow", of, FIRES),
    );
    refused.and(held).and(burn).and(slow)
}

async fn a_revision_that_does_not_start(ns: &Namespace, prometheus: &Prometheus) -> Result<()> {
    ns.serve(&manifest(ns, "halted")).await?;
    let mut next = without_image(ns, "halted");
    next["spec"]["startupTimeoutSeconds"] = json!(10);
    ns.apply(&next).await?;
    prometheus
        .firing("AshlarRevisionFailed", Some("halted"), FIRES)
        .await?;
    // Its users notice nothing.
    ns.ready("halted").await.map(drop)
}

async fn a_model_that_is_not_to_be_had(ns: &Namespace, prometheus: &Prometheus) -> Result<()> {
    let mut service = manifest(ns, "absent");
    service["spec"]["model"] =
        json!({"uri": "hf://nobody/nothing", "endpoint": "http://127.0.0.1:9"});
    ns.apply(&service).await?;
    prometheus
        .firing("AshlarModelDownloadFailing", Some("absent"), FIRES)
        .await
}

/// A hub that takes connections and never answers.
async fn a_hub_that_goes_silent(ns: &Namespace, prometheus: &Prometheus) -> Result<()> {
    let hub = tokio::net::TcpListener::bind("0.0.0.0:0").await?;
    let nodes: Api<Node> = Api::all(ns.client.clone());
    let node = nodes.list(&ListParams::default()).await?.items.remove(0);
    let addresses = node.status.and_then(|status| status.addresses);
    let address = addresses
        .iter()
        .flatten()
        .find(|one| one.type_ == "InternalIP");
    let address = &address.context("the node has no address")?.address;
    let endpoint = format!("http://{address}:{}", hub.local_addr()?.port());
    let mut service = manifest(ns, "silent");
    service["spec"]["model"] = json!({"uri": "hf://nobody/nothing", "endpoint": endpoint});
    ns.apply(&service).await?;
    let silence = async {
        let mut held = Vec::new();
        loop {
            match hub.accept().await {
                Ok(connection) => held.push(connection),
                Err(error) => return Err(anyhow::Error::from(error)),
            }
        }
    };
    tokio::select! {
        seen = prometheus.firing("AshlarModelDownloadStalled", Some("silent"), FIRES) => seen,
        broken = silence => broken,
    }
}

/// One replica with one place and few KV blocks, and ever more requests.
async fn more_requests_than_one_replica_takes(
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

async fn without_gateway(ns: &Namespace, prometheus: &Prometheus) -> Result<()> {
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

/// Sixteen sequences share blocks for three.
async fn requests_that_fill_the_cache(ns: &Namespace, prometheus: &Prometheus) -> Result<()> {
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
async fn a_rollout_that_waits_for_long_answers(
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
async fn replicas_that_die(ns: &Namespace, prometheus: &Prometheus) -> Result<()> {
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
async fn replicas_that_crash(ns: &Namespace, prometheus: &Prometheus) -> Result<()> {
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

/// The engine's thread stops, as when a device hangs; all else of its pod goes on.
async fn an_engine_that_hangs(ns: &Namespace, prometheus: &Prometheus) -> Result<()> {
    let mut service = manifest(ns, "hanging");
    // By this its process is found, so the cluster must be on this machine.
    service["spec"]["model"]["name"] = json!(ns.name);
    let service = ns.serve(&service).await?;
    let url = format!("{}/chat/completions", text(&service, "/status/url")?);
    let answers = users(ns, &url, 2, endless(&ns.name, "Who waits?", 1500));
    let hang = async {
        running(ns, prometheus, "hanging").await?;
        let mut stall = Command::new("python3")
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/cluster/stall.py"))
            .args([&format!("--served-model-name={}", ns.name), "ashlar-engine"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut said = String::new();
        let output = stall.stdout.take().context("no output: this is a bug")?;
        BufReader::new(output).read_line(&mut said)?;
        ensure!(said.trim() == "stopped", "the engine's thread goes on");
        let seen = prometheus
            .firing("AshlarEngineStalled", Some("hanging"), FIRES)
            .await;
        // It may have been restarted by then, with nothing left to let go.
        drop(stall.stdin.take());
        let _ = stall.wait();
        seen
    };
    tokio::select! {
        seen = hang => seen,
        ended = answers => ended.and(Err(anyhow::anyhow!("the answers ended although the engine hangs"))),
    }
}

async fn models_that_are_not_scraped(prometheus: &Prometheus) -> Result<()> {
    prometheus.leave_out_models(true);
    let seen = prometheus
        .firing("AshlarModelMetricsMissing", None, FIRES)
        .await;
    prometheus.leave_out_models(false);
    seen
}

/// The right to write status is taken away.
async fn an_operator_that_may_not_write(ns: &Namespace, prometheus: &Prometheus) -> Result<()> {
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
async fn without_leader(ns: &Namespace, prometheus: &Prometheus) -> Result<()> {
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

async fn without_operator(ns: &Namespace, prometheus: &Prometheus) -> Result<()> {
    scale(ns, "operator", 0).await?;
    let missing = prometheus
        .firing("AshlarOperatorMetricsMissing", None, FIRES)
        .await;
    scale(ns, "operator", 2).await?;
    missing
}

/// Waits until Prometheus has seen requests of a service run.
async fn running(ns: &Namespace, prometheus: &Prometheus, name: &str) -> Result<()> {
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
fn endless(model: &str, question: &str, max_tokens: u32) -> Value {
    let mut request = chat(model, question, max_tokens);
    request["ignore_eos"] = json!(true);
    request
}

/// As many users at once read one streamed answer each; one that is refused is an answer too.
async fn users(ns: &Namespace, url: &str, count: usize, mut question: Value) -> Result<()> {
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
