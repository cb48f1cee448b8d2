//! A platform engineer upgrades from the last release while models serve: no model pod restarts and no request fails.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use ashlar_e2e::cluster::{self, RELEASE, SYSTEM_NAMESPACE, run};
use ashlar_e2e::service::{QUESTION, chat, is_ready, manifest, text};
use ashlar_e2e::with_namespace;
use futures::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::{Api, ListParams};

/// Users who ask one question after the other.
const USERS: usize = 3;

/// The chart of the newest release.
fn last_release() -> Result<PathBuf> {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/released"));
    let archives = std::fs::read_dir(&folder)?.filter_map(|entry| Some(entry.ok()?.path()));
    let mut archives: Vec<_> = archives
        .filter(|path| path.extension().is_some_and(|end| end == "tgz"))
        .collect();
    // By the numbers of the version, so that 0.10 comes after 0.9; what comes before a release has letters.
    archives.sort_by_key(|path| {
        let name = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let numbers: Vec<u64> = name
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|part| part.parse().ok())
            .collect();
        (
            numbers[..numbers.len().min(3)].to_vec(),
            !name.contains("-alpha") && !name.contains("-rc"),
            numbers,
        )
    });
    archives
        .pop()
        .with_context(|| format!("no chart in {}", folder.display()))
}

#[tokio::test]
async fn an_upgrade_from_the_last_release_restarts_no_model_and_fails_no_request() -> Result<()> {
    with_namespace("upgrade", async |ns| {
        let last = last_release()?;
        run(
            "helm",
            &[
                "uninstall",
                RELEASE,
                "--namespace",
                SYSTEM_NAMESPACE,
                "--wait",
                "--timeout",
                "120s",
            ],
        )
        .await?;
        cluster::install_chart(&last.to_string_lossy()).await?;
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
        Ok(())
    })
    .await
}
