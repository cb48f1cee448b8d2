//! What changes and how long it takes: new specs, edits by hand, deletions.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use ashlar_crds::names::SERVICE_LABEL;
use futures::StreamExt as _;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Service;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, ResourceExt as _};
use serde_json::json;
use tokio::sync::{mpsc, oneshot};

use super::{Bench, place};
use crate::processes::{PATIENCE, until};
use crate::report::Report;

impl Bench {
    /// A channel of Deployments as a watch shows them from now on, and when.
    pub(super) async fn deployments(
        &self,
    ) -> Result<mpsc::UnboundedReceiver<(Deployment, Instant)>> {
        let (send, receive) = mpsc::unbounded_channel();
        let (listed, watching) = oneshot::channel();
        let api = Api::<Deployment>::all(self.client.clone());
        tokio::spawn(async move {
            let config = watcher::Config::default().labels(SERVICE_LABEL);
            let events = watcher(api, config).default_backoff();
            let mut events = std::pin::pin!(events);
            let mut listed = Some(listed);
            while let Some(event) = events.next().await {
                match event {
                    Ok(watcher::Event::Apply(deployment)) => {
                        let sent = send.send((deployment, Instant::now()));
                        // Nobody reads any more.
                        let Ok(()) = sent else { return };
                    }
                    Ok(watcher::Event::InitDone) => {
                        if let Some(listed) = listed.take() {
                            // Fails only when the benchmark is over.
                            let _ = listed.send(());
                        }
                    }
                    _ => {}
                }
            }
        });
        let listed = tokio::time::timeout(PATIENCE, watching).await;
        listed.context("the Deployments are not listed")??;
        Ok(receive)
    }

    /// Time from the answer to a PATCH until the watch shows the last child that has to change for it.
    pub(super) async fn change(
        &self,
        index: usize,
        spec: serde_json::Value,
        seen: &mut mpsc::UnboundedReceiver<(Deployment, Instant)>,
        is_it: impl Fn(&Deployment) -> bool,
    ) -> Result<Duration> {
        let (api, name) = self.api(index);
        let (namespace, _) = place(index);
        let patch = Patch::Merge(json!({"spec": spec}));
        api.patch(&name, &PatchParams::default(), &patch).await?;
        let answered = Instant::now();
        let of_service = |d: &Deployment| {
            d.labels().get(SERVICE_LABEL) == Some(&name)
                && d.namespace().as_deref() == Some(&namespace)
        };
        loop {
            let next = tokio::time::timeout(PATIENCE, seen.recv()).await;
            let (deployment, at) = next
                .with_context(|| format!("{name} did not change"))?
                .context("the watch ended")?;
            if of_service(&deployment) && is_it(&deployment) {
                return Ok(at.saturating_duration_since(answered));
            }
        }
    }

    /// New revisions and new replica counts, one service after the other.
    pub(crate) async fn changes(&self, report: &mut Report) -> Result<()> {
        let mut seen = self.deployments().await?;
        let note =
            |n: usize| json!({"runtime": {"args": [format!("--max-model-len={}", 1000 + n)]}});
        let few = self.args.patches.min(self.args.services);
        let stride = self.args.services / few.max(1);
        let mut revisions = Vec::new();
        for n in 0..few {
            let argument = format!("--max-model-len={}", 1000 + n);
            let is_it = |d: &Deployment| {
                let spec = d.spec.as_ref().and_then(|s| s.template.spec.as_ref());
                let args = spec
                    .and_then(|s| s.containers.first()?.args.clone())
                    .unwrap_or_default();
                args.contains(&argument)
            };
            revisions.push(self.change(n * stride, note(n), &mut seen, is_it).await?);
        }
        percentiles(
            report,
            "PATCH of the model's arguments → last child",
            revisions,
        );
        if !self.args.scaled {
            let mut counts = Vec::new();
            for n in (0..few).rev() {
                // Those whose rollout is long over.
                let index = (n * stride + stride / 2).min(self.args.services - 1);
                if index == n * stride {
                    continue;
                }
                let three = |d: &Deployment| d.spec.as_ref().and_then(|s| s.replicas) == Some(3);
                counts.push(
                    self.change(index, json!({"replicas": 3}), &mut seen, three)
                        .await?,
                );
            }
            if !counts.is_empty() {
                percentiles(report, "PATCH of replicas → Deployment", counts);
            }
        }
        Ok(())
    }

    /// Children edited and deleted by hand.
    pub(crate) async fn drift(&self, report: &mut Report) -> Result<()> {
        let mut worst = Duration::ZERO;
        for index in (0..self.args.services).step_by((self.args.services / 20).max(1)) {
            let (namespace, name) = place(index);
            let services: Api<Service> = Api::namespaced(self.client.clone(), &namespace);
            let child = format!("{name}-pods");
            let edit = Patch::Merge(json!({"spec": {"selector": {"by": "hand"}}}));
            services
                .patch(&child, &PatchParams::default(), &edit)
                .await?;
            let start = Instant::now();
            until("an edited child is repaired", || async {
                let found = services
                    .get(&child)
                    .await
                    .ok()
                    .and_then(|s| s.spec?.selector);
                found.is_some_and(|selector| !selector.contains_key("by"))
            })
            .await?;
            worst = worst.max(start.elapsed());
            services.delete(&child, &DeleteParams::default()).await?;
            let start = Instant::now();
            until("a deleted child is back", || async {
                services
                    .get_opt(&child)
                    .await
                    .is_ok_and(|found| found.is_some())
            })
            .await?;
            worst = worst.max(start.elapsed());
        }
        report.time(
            "drift: edited or deleted child repaired, the slowest",
            worst,
            Duration::from_secs(2),
        );
        Ok(())
    }

    /// A deleted service leaves no child behind.
    pub(crate) async fn deletion(&self, report: &mut Report) -> Result<()> {
        let index = self.args.services - 1;
        let (api, name) = self.api(index);
        api.delete(&name, &DeleteParams::background()).await?;
        let start = Instant::now();
        let (namespace, _) = place(index);
        let left = || async {
            let ours = ListParams::default().labels(&format!("{SERVICE_LABEL}={name}"));
            let deployments: Api<Deployment> = Api::namespaced(self.client.clone(), &namespace);
            let services: Api<Service> = Api::namespaced(self.client.clone(), &namespace);
            let pods: Api<k8s_openapi::api::core::v1::Pod> =
                Api::namespaced(self.client.clone(), &namespace);
            let (a, b, c) = (
                deployments.list(&ours).await,
                services.list(&ours).await,
                pods.list(&ours).await,
            );
            match (a, b, c) {
                (Ok(a), Ok(b), Ok(c)) => a.items.len() + b.items.len() + c.items.len(),
                _ => usize::MAX,
            }
        };
        until("the children of a deleted service are gone", || async {
            left().await == 0
        })
        .await?;
        report.note(
            "service deleted → all children gone",
            format!("{:.0} ms", start.elapsed().as_secs_f64() * 1e3),
        );
        Ok(())
    }
}

fn percentiles(report: &mut Report, what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share).ceil() as usize];
    report.note(
        &format!("{what}, p50 of {}", times.len()),
        format!("{:.0} ms", at(0.5).as_secs_f64() * 1e3),
    );
    report.time(
        &format!("{what}, p99"),
        at(0.99),
        Duration::from_millis(250),
    );
}
