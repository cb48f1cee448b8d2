//! Engines that hang.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use ashlar_e2e::Namespace;
use ashlar_e2e::prometheus::Prometheus;
use ashlar_e2e::service::{manifest, text};
use serde_json::json;

use super::FIRES;
use super::replicas::{endless, running, users};

/// The engine's thread stops, as when a device hangs, while it answers; all else of its pod goes on.
pub(super) async fn an_engine_that_hangs(ns: &Namespace, prometheus: &Prometheus) -> Result<()> {
    let mut service = manifest(ns, "hanging");
    // By this its process is found, so the cluster must be on this machine.
    service["spec"]["model"]["name"] = json!(ns.name);
    let service = ns.serve(&service).await?;
    let url = format!("{}/chat/completions", text(&service, "/status/url")?);
    let answers = users(ns, &url, 2, endless(&ns.name, "Who waits?", 1500));
    let hang = async {
        running(ns, prometheus, "hanging").await?;
        stalled_while_it_hangs(prometheus, &ns.name, "hanging").await
    };
    tokio::select! {
        seen = hang => seen,
        ended = answers => ended.and(Err(anyhow::anyhow!("the answers ended although the engine hangs"))),
    }
}

/// The same while nobody asks anything.
pub(super) async fn an_idle_engine_that_hangs(
    ns: &Namespace,
    prometheus: &Prometheus,
) -> Result<()> {
    let mut service = manifest(ns, "hanging-idle");
    let model = format!("{}-idle", ns.name);
    service["spec"]["model"]["name"] = json!(model);
    ns.serve(&service).await?;
    stalled_while_it_hangs(prometheus, &model, "hanging-idle").await
}

/// Stops the thread of the engine that serves `model`, and waits until the alert says so of `service`.
async fn stalled_while_it_hangs(prometheus: &Prometheus, model: &str, service: &str) -> Result<()> {
    let mut stall = Command::new("python3")
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/cluster/stall.py"))
        .args([&format!("--served-model-name={model}"), "ashlar-engine"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut said = String::new();
    let output = stall.stdout.take().context("no output: this is a bug")?;
    BufReader::new(output).read_line(&mut said)?;
    ensure!(said.trim() == "stopped", "the engine's thread goes on");
    let seen = prometheus
        .firing("AshlarEngineStalled", Some(service), FIRES)
        .await;
    // It may have been restarted by then, with nothing left to let go.
    drop(stall.stdin.take());
    let _ = stall.wait();
    seen
}
