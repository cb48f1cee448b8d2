//! Those who run Ashlar see what happens: under load every panel of every dashboard has data, and every rule.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ashlar_e2e::dashboards::{Query, queries};
use ashlar_e2e::prometheus::{CHART, Prometheus};
use ashlar_e2e::service::{QUESTION, SERVICE_LABEL, chat, manifest, text};
use ashlar_e2e::wait::{self, Seen};
use ashlar_e2e::{Namespace, with_namespace};
use futures::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use serde_json::{Value, json};

/// All panels have data within this.
const FILLED: Duration = Duration::from_secs(120);
/// What the pictures in the docs show.
const PICTURED: Duration = Duration::from_secs(150);
/// Requests at one time.
const AT_ONCE: usize = 12;

/// Users: chats in streams and whole, of which some leave, and one who errs.
async fn load(ns: &Namespace, url: &str) -> Result<()> {
    let users = (0..AT_ONCE).map(async |user| {
        let question = format!("{QUESTION} Answer {user} times.");
        let mut request = chat("smollm2", &question, 40);
        if user % 2 == 0 {
            return ns.http.post(url, &request).await?.chat_text().map(drop);
        }
        request["stream"] = json!(true);
        let mut events = ns.http.stream(url, &request).await?;
        events.next().await?;
        // Every fourth leaves in the middle.
        if user % 4 == 1 {
            Ok(())
        } else {
            events.rest().await.map(drop)
        }
    });
    for done in join_all(users).await {
        done?;
    }
    let nowhere = url.replace(&ns.name, "nowhere");
    ns.http
        .post(&nowhere, &chat("smollm2", QUESTION, 8))
        .await?
        .openai_error(http::StatusCode::NOT_FOUND)?;
    Ok(())
}

/// Which panels have a query without a figure, under a load that goes on; but for those that only faults fill.
async fn without_data(
    prometheus: &Prometheus,
    queries: &[Query],
) -> Result<BTreeSet<(String, String)>> {
    let mut silent = BTreeSet::new();
    for query in queries.iter().filter(|query| !query.is_of_faults()) {
        if !query.has_data(prometheus).await? {
            silent.insert((query.dashboard.clone(), query.panel.clone()));
        }
    }
    Ok(silent)
}

#[tokio::test]
async fn every_panel_and_every_rule_has_data_under_load() -> Result<()> {
    with_namespace("observe", async |ns| {
        let prometheus = Prometheus::start(&ns.cluster).await?;
        let mut service = manifest(&ns, "smollm2");
        service["spec"]["scaling"] =
            json!({"minReplicas": 1, "maxReplicas": 2, "targets": {"waitingRequests": 2}});
        service["spec"]["runtime"]["args"] = json!(["--max-num-seqs=4"]);
        let service = ns.serve(&service).await?;
        let url = format!("{}/chat/completions", text(&service, "/status/url")?);
        let queries = queries(&ns.name, "smollm2")?;
        wait::until("data in every panel", FILLED, async || {
            load(&ns, &url).await?;
            let silent = without_data(&prometheus, &queries).await?;
            Ok(if silent.is_empty() {
                Seen::Done(())
            } else {
                Seen::NotYet(format!("no data in {silent:?}"))
            })
        })
        .await?;
        wait::until("data in every rule", FILLED, async || {
            load(&ns, &url).await?;
            Ok(match every_rule_is_sound(&prometheus).await {
                Ok(()) => Seen::Done(()),
                Err(error) => Seen::NotYet(format!("{error:#}")),
            })
        })
        .await?;
        if let Some(folder) = std::env::var_os("ASHLAR_E2E_SERIES") {
            // Long enough for lines to have a shape.
            let began = Instant::now();
            while began.elapsed() < PICTURED {
                load(&ns, &url).await?;
            }
            record(&ns, &prometheus, &queries, Path::new(&folder)).await?;
            return Ok(());
        }
        every_metric_is_documented(&ns).await
    })
    .await
}

/// Metrics of rules that exist only once their fault has happened.
const OF_FAULTS: [&str; 2] = [
    "ashlar_gateway_ejections_total",
    "ashlar_service_model_downloaded_bytes",
];

/// No rule fails, every record has data, and every metric that an alert reads exists or is a fault's own.
async fn every_rule_is_sound(prometheus: &Prometheus) -> Result<()> {
    let rules = prometheus.rules().await?;
    ensure!(rules.len() > 40, "only {} rules", rules.len());
    let mut read = BTreeSet::new();
    for rule in &rules {
        ensure!(rule["health"] == "ok", "{rule}");
        if rule["type"] == "recording" {
            let name = rule["name"].as_str().context("a rule has a name")?;
            ensure!(
                !prometheus.query(name).await?.is_empty(),
                "{name} has no data"
            );
        }
        let query = rule["query"].as_str().context("a rule has a query")?;
        let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':');
        let prefixes = ["ashlar_", "ashlar:", "vllm:", "controller_runtime_"];
        read.extend(
            words
                .filter(|word| prefixes.iter().any(|prefix| word.starts_with(prefix)))
                .map(str::to_owned),
        );
    }
    for name in read
        .iter()
        .filter(|name| !OF_FAULTS.contains(&name.as_str()))
    {
        ensure!(
            !prometheus.query(name).await?.is_empty(),
            "{name} has no data, and a rule reads it"
        );
    }
    Ok(())
}

/// The pages of /metrics: a model pod's, a gateway's and the leading operator's.
async fn pages(ns: &Namespace) -> Result<Vec<(&'static str, String)>> {
    let pods: Api<Pod> = Api::namespaced(ns.client.clone(), &ns.name);
    let models = pods
        .list(&ListParams::default().labels(SERVICE_LABEL))
        .await?
        .items;
    let mut found = Vec::new();
    for (title, pods, port) in [
        (
            "Operator",
            ns.cluster.component_pods("operator").await?,
            8081,
        ),
        ("Gateway", ns.cluster.component_pods("gateway").await?, 8081),
        ("Model pods", models, 8000),
    ] {
        let mut texts = Vec::new();
        for pod in pods {
            let address = pod
                .status
                .and_then(|status| status.pod_ip)
                .context("a pod without address")?;
            texts.push(
                ns.http
                    .get(&format!("http://{address}:{port}/metrics"))
                    .await?
                    .body,
            );
        }
        // A standby has little to say.
        let longest = texts.into_iter().max_by_key(String::len);
        found.push((
            title,
            longest.with_context(|| format!("no page of {title}"))?,
        ));
    }
    Ok(found)
}

/// The book's page of metrics has a row for each.
async fn every_metric_is_documented(ns: &Namespace) -> Result<()> {
    let page = std::fs::read_to_string(Path::new(CHART).join("../docs/src/reference/metrics.md"))?;
    for (title, text) in pages(ns).await? {
        let names = text
            .lines()
            .filter_map(|line| line.strip_prefix("# HELP ")?.split(' ').next());
        let missing: Vec<_> = names
            .filter(|name| !page.contains(&format!("| `{name}` |")))
            .collect();
        ensure!(
            missing.is_empty(),
            "{title}: charts/docs/src/reference/metrics.md does not have {missing:?}"
        );
    }
    Ok(())
}

/// Keeps what the panels show and the pages of metrics, for the docs.
async fn record(
    ns: &Namespace,
    prometheus: &Prometheus,
    queries: &[Query],
    folder: &Path,
) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    let mut all = Vec::new();
    for query in queries {
        let answer = prometheus
            .range(&query.expression, PICTURED.as_secs())
            .await?;
        all.push(
            json!({"dashboard": query.dashboard, "panel": query.panel, "result": answer["result"]}),
        );
    }
    std::fs::write(folder.join("series.json"), Value::from(all).to_string())?;
    for (title, text) in pages(ns).await? {
        std::fs::write(folder.join(format!("{title}.metrics")), text)?;
    }
    Ok(())
}
