//! Faults of models and revisions that do not start.

use anyhow::Result;
use ashlar_e2e::Namespace;
use ashlar_e2e::bucket::{BUCKET, Bucket, KEY};
use ashlar_e2e::prometheus::Prometheus;
use ashlar_e2e::service::{QUESTION, chat, manifest, text};
use ashlar_e2e::wait;
use futures::future::join_all;
use serde_json::{Value, json};

use super::FIRES;

/// A service that asks for an image that nobody has.
pub(super) fn without_image(ns: &Namespace, name: &str) -> Value {
    let mut service = manifest(ns, name);
    service["spec"]["runtime"]["image"] = json!("ashlar.local/nothing:1");
    service
}

pub(super) async fn pods_that_do_not_start(ns: &Namespace, prometheus: &Prometheus) -> Result<()> {
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

pub(super) async fn a_revision_that_does_not_start(
    ns: &Namespace,
    prometheus: &Prometheus,
) -> Result<()> {
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

pub(super) async fn a_model_that_is_not_to_be_had(
    ns: &Namespace,
    prometheus: &Prometheus,
) -> Result<()> {
    let mut service = manifest(ns, "absent");
    service["spec"]["model"] =
        json!({"uri": "hf://nobody/nothing", "endpoint": "http://127.0.0.1:9"});
    ns.apply(&service).await?;
    prometheus
        .firing("AshlarModelDownloadFailing", Some("absent"), FIRES)
        .await
}

/// No fault: what downloads show is empty for models in an image, which the others are.
pub(super) async fn a_model_that_is_downloaded(ns: &Namespace) -> Result<()> {
    let bucket = Bucket::of_the_model(&ns.cluster).await?;
    let mut service = manifest(ns, "fetched");
    service["spec"]["model"] =
        json!({"uri": format!("s3://{BUCKET}/{KEY}"), "endpoint": bucket.endpoint});
    ns.serve(&service).await.map(drop)
}

/// A hub that takes connections and never answers.
pub(super) async fn a_hub_that_goes_silent(ns: &Namespace, prometheus: &Prometheus) -> Result<()> {
    let hub = tokio::net::TcpListener::bind("0.0.0.0:0").await?;
    let address = ns.cluster.node_address().await?;
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
