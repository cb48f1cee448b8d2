//! What is measured, each on the benchmark's own clock.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use ashlar_crds::{InferenceService, inference_service_crd, names::SERVICE_LABEL};
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Namespace, Service};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;
use tokio::sync::mpsc;

use crate::processes::{Operator, PATIENCE, until};
use crate::report::Report;
use crate::{Args, simulate};

/// Services created at one time in a burst.
const PARALLEL: usize = 50;
/// Services of one namespace.
const PER_NAMESPACE: usize = 100;
/// Without a write for so long the cluster is settled.
const QUIET: Duration = Duration::from_secs(10);

/// The prepared cluster.
pub(crate) struct Bench {
    args: Args,
    client: Client,
    audit: PathBuf,
    /// Services that a watch has shown Ready for their newest spec.
    ready: Arc<Mutex<HashMap<String, i64>>>,
}

/// Namespace and name of a service by its number.
pub(crate) fn place(index: usize) -> (String, String) {
    (
        format!("tenant-{}", index / PER_NAMESPACE),
        format!("service-{index}"),
    )
}

fn manifest(args: &Args, index: usize) -> Result<InferenceService> {
    let (namespace, name) = place(index);
    let size = if args.scaled {
        json!({"scaling": {"minReplicas": 2, "maxReplicas": 4}})
    } else {
        json!({"replicas": 2})
    };
    let mut spec = json!({
        "model": {"uri": format!("oci://registry.example/models/m{index}:1")},
        "runtime": {"device": "cpu", "args": ["--max-model-len=4096"]},
        "resources": {"requests": {"cpu": "1", "memory": "2Gi"}},
        "endpoint": {"auth": "None"},
    });
    for (key, value) in size.as_object().context("an object")? {
        spec[key] = value.clone();
    }
    let object = json!({
        "apiVersion": "serving.ashlar.dev/v1alpha1", "kind": "InferenceService",
        "metadata": {"name": name, "namespace": namespace}, "spec": spec,
    });
    Ok(serde_json::from_value(object)?)
}

/// Installs the definition.
pub(crate) async fn install(client: &Client) -> Result<()> {
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    let crd = inference_service_crd();
    crds.create(&PostParams::default(), &crd).await?;
    let name = crd.name_any();
    until("the definition is established", || async {
        let found = crds
            .get(&name)
            .await
            .ok()
            .and_then(|c| c.status?.conditions);
        found.is_some_and(|all| {
            all.iter()
                .any(|c| c.type_ == "Established" && c.status == "True")
        })
    })
    .await
}

impl Bench {
    /// Installs the definition, nodes, what belongs to others, and the simulation of pods.
    pub(crate) async fn prepare(args: &Args, client: Client) -> Result<Self> {
        install(&client).await?;
        let namespaces: Api<Namespace> = Api::all(client.clone());
        let tenants = (0..args.services.div_ceil(PER_NAMESPACE)).map(|n| format!("tenant-{n}"));
        for name in tenants.chain(["foreign".to_owned()]) {
            let namespace = serde_json::from_value(json!({"metadata": {"name": name}}))?;
            namespaces
                .create(&PostParams::default(), &namespace)
                .await?;
        }
        simulate::nodes(&client).await.context("nodes")?;
        simulate::foreign(&client, args.foreign)
            .await
            .context("objects of others")?;
        simulate::gateway(&client, "10.255.0.1")
            .await
            .context("the gateway")?;
        simulate::serve_metrics().await.context("metrics of pods")?;
        tokio::spawn(simulate::pods(client.clone()));
        tokio::spawn(simulate::endings(client.clone()));
        let bench = Self {
            args: args.clone(),
            audit: args.state.join("audit.log"),
            ready: Arc::default(),
            client,
        };
        bench.watch_services();
        Ok(bench)
    }

    fn watch_services(&self) {
        let (ready, api) = (
            Arc::clone(&self.ready),
            Api::<InferenceService>::all(self.client.clone()),
        );
        tokio::spawn(async move {
            let events = watcher(api, watcher::Config::default()).default_backoff();
            let mut events = std::pin::pin!(events.applied_objects());
            while let Some(event) = events.next().await {
                let Ok(service) = event else { continue };
                let Some(status) = &service.status else {
                    continue;
                };
                let ok = |kind: &str| {
                    let mut conditions = status.conditions.iter();
                    conditions.any(|c| c.type_ == kind && c.status == "True")
                };
                if ok("Ready") && ok("WorkloadsReady") {
                    let key = format!(
                        "{}/{}",
                        service.namespace().unwrap_or_default(),
                        service.name_any()
                    );
                    let mut ready = ready.lock().unwrap_or_else(PoisonError::into_inner);
                    ready.insert(key, status.observed_generation.unwrap_or(0));
                }
            }
        });
    }

    fn api(&self, index: usize) -> (Api<InferenceService>, String) {
        let (namespace, name) = place(index);
        (Api::namespaced(self.client.clone(), &namespace), name)
    }

    /// Creates all services, a thousand at a time where there are more; the bar is that of one thousand.
    pub(crate) async fn burst(&self, operator: &Operator, report: &mut Report) -> Result<()> {
        let start = Instant::now();
        futures::stream::iter(0..self.args.services)
            .map(|index| async move {
                let (api, _) = self.api(index);
                api.create(&PostParams::default(), &manifest(&self.args, index)?)
                    .await?;
                anyhow::Ok(())
            })
            .buffer_unordered(PARALLEL)
            .try_collect::<()>()
            .await?;
        let created = start.elapsed();
        let count = || {
            self.ready
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .len()
        };
        until("every service is Ready", || async {
            count() >= self.args.services
        })
        .await?;
        let thousands = u32::try_from(self.args.services.div_ceil(1000))?;
        report.note(
            "all services created after",
            format!("{:.1} s", created.as_secs_f64()),
        );
        report.time(
            "burst: first POST to every service Ready",
            start.elapsed(),
            Duration::from_secs(60) * thousands,
        );
        let errors = operator
            .metric("controller_runtime_reconcile_total", "error")
            .await?;
        report.count("burst: reconciles that failed", errors as usize, 0);
        report.note(
            "burst: leader's CPU time",
            format!("{:.1} s", operator.cpu()?.as_secs_f64()),
        );
        Ok(())
    }

    /// Waits until nothing is written any more.
    pub(crate) async fn settle(&self, operator: &Operator) -> Result<()> {
        let start = Instant::now();
        let mut last = (
            operator.metric("ashlar_operator_writes_total", "").await?,
            Instant::now(),
        );
        while last.1.elapsed() < QUIET {
            if start.elapsed() > PATIENCE {
                bail!("the operator writes without end");
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
            let writes = operator.metric("ashlar_operator_writes_total", "").await?;
            if writes != last.0 {
                last = (writes, Instant::now());
            }
        }
        Ok(())
    }

    /// Lines of the audit log: who, verb, resource.
    pub(crate) fn audited(&self) -> Result<Vec<BTreeMap<String, String>>> {
        let text = std::fs::read_to_string(&self.audit)?;
        let lines = text.lines().filter_map(|line| {
            let event: serde_json::Value = serde_json::from_str(line).ok()?;
            let text = |pointer: &str| Some(event.pointer(pointer)?.as_str()?.to_owned());
            let fields = [
                ("user", "/user/username"),
                ("verb", "/verb"),
                ("resource", "/objectRef/resource"),
                ("at", "/stageTimestamp"),
            ];
            Some(
                fields
                    .into_iter()
                    .filter_map(|(name, p)| Some((name.to_owned(), text(p)?)))
                    .collect(),
            )
        });
        Ok(lines.collect())
    }

    /// Counts every write while nothing happens, in the API server's own audit log.
    pub(crate) async fn rest(&self, operator: &Operator, report: &mut Report) -> Result<()> {
        let (before, cpu) = (self.audited()?.len(), operator.cpu()?);
        tokio::time::sleep(Duration::from_secs(self.args.rest)).await;
        let audited = self.audited()?;
        let writes = &audited[before.min(audited.len())..];
        let mut kinds = BTreeMap::<String, usize>::new();
        for write in writes {
            let word = |name: &str| write.get(name).cloned().unwrap_or_default();
            *kinds
                .entry(format!("{} {}", word("verb"), word("resource")))
                .or_default() += 1;
        }
        report.count(
            &format!("writes at rest in {} s, by the audit log", self.args.rest),
            writes.len(),
            0,
        );
        if !kinds.is_empty() {
            report.note("of which", format!("{kinds:?}"));
        }
        let used = (operator.cpu()? - cpu).as_secs_f64() / self.args.rest.max(1) as f64;
        report.note(
            "leader's CPU at rest",
            format!("{:.1} % of a core", used * 100.0),
        );
        Ok(())
    }

    /// A channel of Deployments as a watch shows them, and when.
    fn deployments(&self) -> mpsc::UnboundedReceiver<(Deployment, Instant)> {
        let (send, receive) = mpsc::unbounded_channel();
        let api = Api::<Deployment>::all(self.client.clone());
        tokio::spawn(async move {
            let config = watcher::Config::default().labels(SERVICE_LABEL);
            let events = watcher(api, config).default_backoff();
            let mut events = std::pin::pin!(events);
            while let Some(event) = events.next().await {
                if let Ok(watcher::Event::Apply(deployment)) = event
                    && send.send((deployment, Instant::now())).is_err()
                {
                    return;
                }
            }
        });
        receive
    }

    /// Time from the answer to a PATCH until the watch shows the last child that has to change for it.
    async fn change(
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
        let mut seen = self.deployments();
        // The watch is there when it shows a change.
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
            if n == 0 {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
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

    /// Leaders that end in one way or another, and the time until the next one acts.
    pub(crate) async fn failover(&self, first: Operator, report: &mut Report) -> Result<()> {
        let start_of = |user: &str, port: u16| {
            Operator::start(&self.args.operator, &self.args.state, user, port)
        };
        let mut seen = self.deployments();
        let second = start_of("operator-b", 9082)?;
        second.is_warm().await?;
        tokio::time::sleep(Duration::from_secs(3)).await;
        let mut next = 0_usize;
        let mut acts = async |seen: &mut mpsc::UnboundedReceiver<(Deployment, Instant)>| {
            next += 1;
            let argument = format!("--max-model-len={}", 3000 + next);
            let spec = json!({"runtime": {"args": [argument]}});
            let is_it = |d: &Deployment| {
                let spec = d.spec.as_ref().and_then(|s| s.template.spec.as_ref());
                spec.and_then(|s| s.containers.first()?.args.clone())
                    .unwrap_or_default()
                    .contains(&argument)
            };
            self.change(next, spec, seen, is_it).await
        };
        let start = Instant::now();
        first.kill()?;
        acts(&mut seen).await?;
        report.time(
            "leader SIGKILL → next acts",
            start.elapsed(),
            Duration::from_secs(15),
        );
        self.never_both(report)?;

        let third = start_of("operator-a", 9083)?;
        third.is_warm().await?;
        tokio::time::sleep(Duration::from_secs(3)).await;
        let start = Instant::now();
        second.terminate().await?;
        acts(&mut seen).await?;
        report.time(
            "leader SIGTERM → next acts",
            start.elapsed(),
            Duration::from_secs(2),
        );
        third.terminate().await?;

        let start = Instant::now();
        let fourth = start_of("operator-b", 9084)?;
        acts(&mut seen).await?;
        let what = format!("start at {} services → acts", self.args.services);
        report.time(&what, start.elapsed(), Duration::from_secs(10));
        fourth.terminate().await
    }

    /// By the audit log: once the second leader has written, the first never does.
    fn never_both(&self, report: &mut Report) -> Result<()> {
        let audited = self.audited()?;
        let who = |event: &BTreeMap<String, String>| event.get("user").cloned().unwrap_or_default();
        let first_of_b = audited.iter().position(|event| who(event) == "operator-b");
        let late = first_of_b.map_or(0, |from| {
            audited[from..]
                .iter()
                .filter(|e| who(e) == "operator-a")
                .count()
        });
        report.count(
            "writes of the old leader after the new one's first",
            late,
            0,
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
