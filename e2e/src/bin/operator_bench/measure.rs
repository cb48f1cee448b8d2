//! What is measured, each on the benchmark's own clock.

mod changes;
mod failover;

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use ashlar_crds::{InferenceService, inference_service_crd};
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::PostParams;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;
use tokio::sync::watch;

use crate::processes::{Operator, PATIENCE, until, until_within};
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
    /// Whether the kubelets run.
    pub(crate) kubelets: watch::Sender<bool>,
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
        let (kubelets, run) = watch::channel(true);
        tokio::spawn(simulate::pods(client.clone(), run));
        tokio::spawn(simulate::endings(client.clone()));
        let bench = Self {
            args: args.clone(),
            audit: args.state.join("audit.log"),
            kubelets,
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
        let thousands = u32::try_from(self.args.services.div_ceil(1000))?;
        until_within(PATIENCE * thousands, "every service is Ready", || async {
            count() >= self.args.services
        })
        .await?;
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
}
