//! An application developer applies a service and asks it a question.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use anyhow::{Context, Result, ensure};
use ashlar_e2e::client::{streamed_text, total};
use ashlar_e2e::cluster::run;
use ashlar_e2e::service::{QUESTION, SERVICE_LABEL, chat, condition, manifest, text};
use ashlar_e2e::wait::{self, Seen};
use ashlar_e2e::with_namespace;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams, Patch, PatchParams};
use serde_json::{Value, json};

#[tokio::test]
async fn a_question_is_answered_through_every_address_of_the_service() -> Result<()> {
    with_namespace("serve", async |ns| {
        let service = ns.serve(&manifest(&ns, "smollm2")).await?;

        let url = text(&service, "/status/url")?;
        ensure!(
            url.ends_with(&format!("/{}/smollm2/v1", ns.name)),
            "status.url is {url}"
        );
        let answer = ns
            .http
            .post(
                &format!("{url}/chat/completions"),
                &chat("smollm2", QUESTION, 32),
            )
            .await?
            .chat_text()?;
        ensure!(
            answer.contains("Paris"),
            "the answer through status.url is {answer:?}"
        );

        let alias = text(&service, "/status/aliasUrl")?;
        ensure!(
            alias == format!("http://smollm2.{}.svc/v1", ns.name),
            "status.aliasUrl is {alias}"
        );
        let through_alias = ns
            .http
            .post(
                &format!("{alias}/chat/completions"),
                &chat("smollm2", QUESTION, 32),
            )
            .await?
            .chat_text()?;
        ensure!(
            through_alias == answer,
            "through status.aliasUrl the answer is {through_alias:?}, not {answer:?}"
        );

        // An open service has no bare name at the gateway's root, but NAMESPACE/NAME finds it.
        let root = url
            .strip_suffix(&format!("/{}/smollm2/v1", ns.name))
            .context("checked above: this is a bug")?;
        let full_name = format!("{}/smollm2", ns.name);
        let by_model = ns
            .http
            .post(
                &format!("{root}/v1/chat/completions"),
                &chat(&full_name, QUESTION, 32),
            )
            .await?
            .chat_text()?;
        ensure!(
            by_model == answer,
            "by model name the answer is {by_model:?}, not {answer:?}"
        );

        let models = ns.http.get(&format!("{url}/models")).await?.json()?;
        ensure!(
            models.pointer("/data/0/id") == Some(&json!("smollm2")),
            "/v1/models lists {models}"
        );
        Ok(())
    })
    .await
}

#[tokio::test]
async fn the_status_tells_what_is_running() -> Result<()> {
    with_namespace("status", async |ns| {
        let service = ns.serve(&manifest(&ns, "smollm2")).await?;
        for (pointer, wanted) in [
            ("/status/replicas", json!(1)),
            ("/status/readyReplicas", json!(1)),
        ] {
            ensure!(
                service.data.pointer(pointer) == Some(&wanted),
                "{pointer} in {}",
                service.data
            );
        }
        for kind in ["Ready", "ModelReady", "WorkloadsReady", "EndpointReady"] {
            let found =
                condition(&service, kind).with_context(|| format!("no condition {kind}"))?;
            ensure!(found.status == "True", "{found:?}");
        }
        let columns = run("kubectl", &["get", "infsvc", "smollm2", "-n", &ns.name]).await?;
        let heading = columns.lines().next().unwrap_or_default();
        for column in ["READY", "REASON", "REPLICAS", "URL", "AGE"] {
            ensure!(heading.contains(column), "no column {column} in {heading}");
        }
        Ok(())
    })
    .await
}

#[tokio::test]
async fn kubectl_scale_changes_the_number_of_replicas() -> Result<()> {
    with_namespace("scale", async |ns| {
        ns.serve(&manifest(&ns, "smollm2")).await?;
        for replicas in [2, 1] {
            let body = Patch::Merge(json!({"spec": {"replicas": replicas}}));
            let scale = ns
                .services()
                .patch_scale("smollm2", &PatchParams::default(), &body)
                .await?;
            let selector = scale
                .status
                .and_then(|status| status.selector)
                .unwrap_or_default();
            ensure!(
                !selector.is_empty(),
                "/scale has no selector, so no autoscaler can use it"
            );
            wait::object(
                &ns.services(),
                "smollm2",
                &format!("{replicas} ready replicas"),
                wait::STARTUP,
                |service| {
                    ["/status/replicas", "/status/readyReplicas"]
                        .iter()
                        .all(|at| service.data.pointer(at) == Some(&json!(replicas)))
                },
            )
            .await?;
            // The same selector counts the pods that an autoscaler would look at.
            let pods: Api<Pod> = Api::namespaced(ns.client.clone(), &ns.name);
            wait::until(
                &format!("{replicas} pods behind the selector {selector}"),
                wait::STARTUP,
                async || {
                    let found = pods
                        .list(&ListParams::default().labels(&selector))
                        .await?
                        .items
                        .len();
                    Ok(if found == replicas {
                        Seen::Done(())
                    } else {
                        Seen::NotYet(format!("{found} pods"))
                    })
                },
            )
            .await?;
        }
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_request_shows_in_the_metrics_of_the_pod_that_served_it() -> Result<()> {
    with_namespace("metrics", async |ns| {
        let service = ns.serve(&manifest(&ns, "smollm2")).await?;
        let pods: Api<Pod> = Api::namespaced(ns.client.clone(), &ns.name);
        let pod = pods
            .list(&ListParams::default().labels(&format!("{SERVICE_LABEL}=smollm2")))
            .await?
            .items
            .remove(0);
        let address = pod
            .status
            .and_then(|status| status.pod_ip)
            .context("a ready pod has an address")?;
        let metrics = format!("http://{address}:8000/metrics");

        let before = ns.http.get(&metrics).await?.body;
        let url = format!("{}/chat/completions", text(&service, "/status/url")?);
        let answer = ns
            .http
            .post(&url, &chat("smollm2", QUESTION, 16))
            .await?
            .json()?;
        let after = ns.http.get(&metrics).await?.body;

        for (metric, usage) in [
            ("vllm:prompt_tokens_total", "/usage/prompt_tokens"),
            ("vllm:generation_tokens_total", "/usage/completion_tokens"),
        ] {
            let moved = total(&after, metric) - total(&before, metric);
            let told = answer
                .pointer(usage)
                .and_then(Value::as_f64)
                .with_context(|| format!("no {usage} in {answer}"))?;
            ensure!(
                (moved - told).abs() < 0.5,
                "{metric} moved by {moved}, the answer says {told}"
            );
        }
        ensure!(
            total(&after, "vllm:num_requests_running").abs() < 0.5,
            "a finished request still counts as running"
        );
        Ok(())
    })
    .await
}

#[tokio::test]
async fn the_same_question_gets_the_same_greedy_answer_whole_and_streamed() -> Result<()> {
    with_namespace("same", async |ns| {
        let service = ns.serve(&manifest(&ns, "smollm2")).await?;
        let url = format!("{}/chat/completions", text(&service, "/status/url")?);
        let mut request = chat("smollm2", "Name three colours of the rainbow.", 48);
        let whole = ns.http.post(&url, &request).await?.chat_text()?;
        request["stream"] = json!(true);
        let streamed = streamed_text(&ns.http.stream(&url, &request).await?.rest().await?)?;
        ensure!(
            whole == streamed,
            "whole: {whole:?}\nstreamed: {streamed:?}"
        );
        Ok(())
    })
    .await
}
