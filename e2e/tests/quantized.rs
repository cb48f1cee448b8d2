//! A developer serves a quantised model by naming its quantisation.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use anyhow::{Result, ensure};
use ashlar_e2e::service::manifest;
use ashlar_e2e::with_namespace;
use serde_json::json;

#[tokio::test]
async fn an_awq_model_answers_from_a_pod() -> Result<()> {
    with_namespace("awq", async |ns| {
        let uri = std::env::var("ASHLAR_E2E_AWQ_MODEL_URI")
            .unwrap_or_else(|_| "oci://ashlar.local/models/smollm2-135m-instruct:awq".to_owned());
        let mut wanted = manifest(&ns, "smollm2-awq");
        wanted["spec"]["model"] = json!({"uri": uri, "quantization": "awq"});
        let service = ns.serve(&wanted).await?;

        let pods = ns.pods_of("smollm2-awq").await?;
        let args = pods
            .iter()
            .flat_map(|pod| &pod.spec.as_ref().unwrap().containers)
            .flat_map(|container| container.args.iter().flatten());
        ensure!(
            args.clone().any(|arg| arg == "--quantization=awq"),
            "the pod's arguments are {:?}",
            args.collect::<Vec<_>>()
        );

        ns.ask(&service).await
    })
    .await
}
