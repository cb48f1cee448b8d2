//! A user reads an answer while it is written, leaves in the middle of one, and loses nothing when a pod is told to stop.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ashlar_e2e::client::{streamed_text, total};
use ashlar_e2e::service::{QUESTION, SERVICE_LABEL, chat, manifest, text};
use ashlar_e2e::wait::{self, Seen};
use ashlar_e2e::{Namespace, with_namespace};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, ListParams};
use serde_json::{Value, json};

/// A prompt whose answer goes on for as long as it may.
const LONG: &str = "Write a long story about a lighthouse keeper and the sea.";

fn streamed(question: &str, max_tokens: u32) -> Value {
    let mut request = chat("smollm2", question, max_tokens);
    request["stream"] = json!(true);
    request["stream_options"] = json!({"include_usage": true});
    request
}

async fn pods(ns: &Namespace) -> Result<Vec<Pod>> {
    let api: Api<Pod> = Api::namespaced(ns.client.clone(), &ns.name);
    Ok(api
        .list(&ListParams::default().labels(&format!("{SERVICE_LABEL}=smollm2")))
        .await?
        .items)
}

#[tokio::test]
async fn the_answer_arrives_token_by_token_and_ends_properly() -> Result<()> {
    with_namespace("stream", async |ns| {
        let service = ns.serve(&manifest(&ns, "smollm2")).await?;
        let url = format!("{}/chat/completions", text(&service, "/status/url")?);
        let events = ns
            .http
            .stream(&url, &streamed(LONG, 64))
            .await?
            .rest()
            .await?;

        ensure!(
            events.last().is_some_and(|event| event.data == "[DONE]"),
            "the last event is {:?}",
            events.last()
        );
        let answer = streamed_text(&events)?;
        ensure!(answer.len() > 100, "64 tokens made only {answer:?}");
        let chunks: Vec<Value> = events[..events.len() - 1]
            .iter()
            .map(|event| serde_json::from_str(&event.data))
            .collect::<Result<_, _>>()?;
        let with_text = chunks
            .iter()
            .filter(|c| {
                c.pointer("/choices/0/delta/content")
                    .is_some_and(|t| t != "")
            })
            .count();
        ensure!(with_text > 16, "64 tokens came in {with_text} pieces");
        let spread = events[events.len() - 1].at - events[0].at;
        ensure!(
            spread > Duration::from_millis(20),
            "all events came within {spread:?}: the answer was held back"
        );

        let finish = chunks.iter().find_map(|c| {
            c.pointer("/choices/0/finish_reason")
                .and_then(Value::as_str)
        });
        ensure!(finish == Some("length"), "finish_reason is {finish:?}");
        let usage = chunks
            .iter()
            .find_map(|c| c.get("usage").filter(|u| !u.is_null()))
            .context("no chunk with usage")?;
        ensure!(usage["completion_tokens"] == json!(64), "usage is {usage}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_client_that_leaves_stops_its_request() -> Result<()> {
    with_namespace("leave", async |ns| {
        let service = ns.serve(&manifest(&ns, "smollm2")).await?;
        let url = format!("{}/chat/completions", text(&service, "/status/url")?);
        let address = pods(&ns).await?[0]
            .status
            .as_ref()
            .and_then(|s| s.pod_ip.clone())
            .context("a ready pod has an address")?;
        let metrics = format!("http://{address}:8000/metrics");
        let running = async || {
            Ok::<_, anyhow::Error>(total(
                &ns.http.get(&metrics).await?.body,
                "vllm:num_requests_running",
            ))
        };

        let mut request = streamed(LONG, 1500);
        // Never an end of its own.
        request["ignore_eos"] = json!(true);
        let mut events = ns.http.stream(&url, &request).await?;
        events.next().await?.context("a stream has a first event")?;
        ensure!(
            running().await? > 0.5,
            "the request is not counted as running while it streams"
        );
        drop(events);

        wait::until(
            "the request to end with its client",
            Duration::from_secs(5),
            async || {
                let now = running().await?;
                Ok(if now < 0.5 {
                    Seen::Done(())
                } else {
                    Seen::NotYet(format!("{now} running"))
                })
            },
        )
        .await
    })
    .await
}

#[tokio::test]
async fn a_pod_that_is_told_to_stop_finishes_its_answers_first() -> Result<()> {
    with_namespace("drain", async |ns| {
        let service = ns.serve(&manifest(&ns, "smollm2")).await?;
        let url = format!("{}/chat/completions", text(&service, "/status/url")?);
        let old = pods(&ns)
            .await?
            .remove(0)
            .metadata
            .name
            .context("pods have names")?;

        let mut events = ns.http.stream(&url, &streamed(LONG, 400)).await?;
        let first = events.next().await?.context("a stream has a first event")?;
        let api: Api<Pod> = Api::namespaced(ns.client.clone(), &ns.name);
        api.delete(&old, &DeleteParams::default()).await?;

        let mut all = vec![first];
        all.extend(events.rest().await?);
        ensure!(
            all.last().is_some_and(|event| event.data == "[DONE]"),
            "the stream was cut: {:?}",
            all.last()
        );
        let finish = all.iter().find_map(|event| {
            let chunk: Value = serde_json::from_str(&event.data).ok()?;
            chunk
                .pointer("/choices/0/finish_reason")
                .and_then(Value::as_str)
                .map(ToOwned::to_owned)
        });
        ensure!(
            matches!(finish.as_deref(), Some("stop" | "length")),
            "the stopping pod ended the answer with {finish:?}"
        );

        wait::gone(&api, &old, wait::REACTION).await?;
        ns.ready("smollm2").await?;
        let answer = ns
            .http
            .post(&url, &chat("smollm2", QUESTION, 32))
            .await?
            .chat_text()?;
        ensure!(answer.contains("Paris"), "the new pod answers {answer:?}");
        Ok(())
    })
    .await
}
