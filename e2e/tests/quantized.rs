//! A developer serves a quantised model by naming its quantisation.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use anyhow::{Result, ensure};
use ashlar_e2e::service::{QUESTION, SERVICE_LABEL, chat, manifest, text};
use ashlar_e2e::with_namespace;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use serde_json::json;

#[tokio::test]
async fn an_awq_model_answers_from_a_pod() -> Result<()> {
    with_namespace("awq", async |ns| {
        let uri = std::env::var("ASHLAR_E2E_AWQ_MODEL_URI")
            .unwrap_or_else(|_| "oci://ashlar.local/models/smollm2-135m-instruct:awq".to_owned());
        let mut wanted = manifest(&ns, "smollm2-awq");
        wanted["spec"]["model"] = json!({"uri": uri, "quantization": "awq"});
        let service = ns.serve(&wanted).await?;

        let pods: Api<Pod> = Api::namespaced(ns.client.clone(), &ns.name);
        let selector = format!("{SERVICE_LABEL}=smollm2-awq");
        let pods = pods.list(&ListParams::default().labels(&selector)).await?;
        let args = pods
            .items
            .iter()
            .flat_map(|pod| &pod.spec.as_ref().unwrap().containers)
            .flat_map(|container| container.args.iter().flatten());
        ensure!(
            args.clone().any(|arg| arg == "--quantization=awq"),
            "the pod's arguments are {:?}",
            args.collect::<Vec<_>>()
        );

        let url = format!("{}/chat/completions", text(&service, "/status/url")?);
        let request = chat("smollm2-awq", QUESTION, 32);
        let answer = ns.http.post(&url, &request).await?.chat_text()?;
        ensure!(answer.contains("Paris"), "the answer is {answer:?}");
        Ok(())
    })
    .await
}
