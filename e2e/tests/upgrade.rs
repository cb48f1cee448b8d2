//! A platform engineer upgrades from the last release while models serve: no model pod restarts and no request fails.
//!
//! What is upgraded from is the last release's chart with its own definition, operator and gateway (e2e/release/previous). Where
//! the environment does not name them it is this chart with other operator and gateway pods.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context as _, Result, ensure};
use ashlar_e2e::cluster::{self, PREVIOUS_RUNTIME, RELEASE, SYSTEM_NAMESPACE, run};
use ashlar_e2e::service::{QUESTION, chat, is_ready, manifest, text};
use ashlar_e2e::wait::{self, Seen};
use ashlar_e2e::with_namespace;
use futures::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::{Api, ListParams};
use serde_json::json;

/// Users who ask one question after the other.
const USERS: usize = 3;

#[tokio::test]
async fn an_upgrade_restarts_no_model_and_fails_no_request() -> Result<()> {
    with_namespace("upgrade", async |ns| {
        let released = cluster::install_previous().await?;
        if !released {
            cluster::install_with(&["log.level=debug"]).await?;
        }
        let service = ns.serve(&manifest(&ns, "smollm2")).await?;
        let url = format!("{}/chat/completions", text(&service, "/status/url")?);
        let pods: Api<Pod> = Api::namespaced(ns.client.clone(), &ns.name);
        let identities = async || -> Result<Vec<_>> {
            let listed = pods.list(&ListParams::default()).await?;
            Ok(listed
                .iter()
                .map(|pod| (pod.name_any(), pod.uid()))
                .collect())
        };
        let images = async || -> Result<Vec<_>> {
            let listed = pods.list(&ListParams::default()).await?;
            let specs = listed.into_iter().filter_map(|pod| pod.spec);
            Ok(specs
                .flat_map(|spec| spec.containers.into_iter().filter_map(|one| one.image))
                .collect())
        };
        let before = identities().await?;

        let (over, answered) = (Arc::new(AtomicBool::new(false)), AtomicUsize::new(0));
        let users = join_all((0..USERS).map(async |_| {
            while !over.load(Ordering::Relaxed) {
                let answer = ns
                    .http
                    .post(&url, &chat("smollm2", QUESTION, 24))
                    .await?
                    .chat_text()?;
                ensure!(answer.contains("Paris"), "the answer is {answer:?}");
                answered.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        }));
        let upgrade = async {
            let upgraded = cluster::install().await;
            over.store(true, Ordering::Relaxed);
            upgraded
        };
        let (users, upgraded) = tokio::join!(users, upgrade);
        upgraded?;
        for user in users {
            user.context("a request during the upgrade")?;
        }
        let answered = answered.into_inner();
        ensure!(
            answered >= USERS,
            "only {answered} answers during the upgrade"
        );

        ensure!(before == identities().await?, "model pods were replaced");
        ensure!(
            is_ready(&ns.services().get("smollm2").await?),
            "the service is no longer Ready"
        );
        run(
            "helm",
            &[
                "test",
                RELEASE,
                "--namespace",
                SYSTEM_NAMESPACE,
                "--timeout",
                "60s",
            ],
        )
        .await?;
        if released {
            let from = [PREVIOUS_RUNTIME.to_owned()];
            ensure!(images().await? == from, "{:?}", images().await?);
        }
        // What the new release defaults to is taken with the user's next edit.
        let mut edited = manifest(&ns, "smollm2");
        edited["spec"]["runtime"]["args"] = json!(["--max-num-seqs=8"]);
        ns.serve(&edited).await?;
        let to = [cluster::image("ASHLAR_E2E_RUNTIME_IMAGE")?];
        wait::until("pods of the new default only", wait::REACTION, async || {
            let images = images().await?;
            Ok(if images == to {
                Seen::Done(())
            } else {
                Seen::NotYet(format!("{images:?}"))
            })
        })
        .await
    })
    .await
}
