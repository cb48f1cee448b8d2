//! `status`, computed from what was applied and what the pods say. Pure.

mod verdicts;
mod written;

use std::sync::Arc;

use ashlar_crds::{
    CanaryStatus, InferenceService, InferenceServiceStatus, ModelStatus, RevisionStatus,
    ScalingStatus,
    conditions::{ENDPOINT_READY, MODEL_READY, READY, SCALING_READY, WORKLOADS_READY, reason},
    names::SERVICE_LABEL,
};
use k8s_openapi::{
    api::core::v1::Pod,
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};

use crate::autoscaler::Outcome;

use super::{
    build::Defaults,
    pods::{self, Blocker},
    probe::Download,
    rollout::{RevisionState, RolloutPlan},
    validate::ValidatedService,
};
use verdicts::{
    Verdict, endpoint_verdict, model_verdict, ready_verdict, scaling_verdict, verdict,
    workloads_verdict,
};
pub use written::Written;

/// Whether the gateway can check the users' keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyAccess {
    /// It can, or no keys are asked for.
    Allowed,
    /// It may not read the Secret.
    Denied,
    /// The API server did not answer the question.
    Unknown,
}

/// What `compute` looks at.
pub struct Facts<'a> {
    /// The service.
    pub service: &'a ValidatedService,
    /// Where things are.
    pub defaults: &'a Defaults,
    /// Pods of all revisions.
    pub pods: &'a [Arc<Pod>],
    /// Pods of the Jobs that fill the claim.
    pub pull_pods: &'a [Arc<Pod>],
    /// The newest revision's pods wait for such a Job.
    pub filling: bool,
    /// The newest revision.
    pub newest: &'a RevisionState,
    /// What was asked of the Deployments.
    pub plan: &'a RolloutPlan,
    /// Why the cluster creates no pods for the newest revision, in admission's own words.
    pub refused: Option<&'a str>,
    /// A newer default image exists than the one that runs.
    pub outdated: bool,
    /// Ready endpoints of the gateway.
    pub gateway_endpoints: usize,
    /// Users' keys.
    pub keys: KeyAccess,
    /// What the autoscaler decided, for a scaled service.
    pub scaling: Option<&'a Outcome>,
    /// Why one of the hosts does not lead here.
    pub host_conflict: Option<&'a str>,
    /// The cluster has HTTPRoutes.
    pub has_http_routes: bool,
    /// How far the download is, while there is one.
    pub download: Option<Download>,
    /// Bytes of what the newest revision has downloaded, once it has said so.
    pub pulled_bytes: Option<i64>,
    /// The commit that the newest revision downloads, once known.
    pub resolved_revision: Option<&'a str>,
    /// The most GPUs that any node has in all, when nodes are known.
    pub largest_node: Option<f64>,
    /// Now.
    pub now: Timestamp,
}

/// The status of a service that was built and applied.
#[must_use]
pub fn compute(facts: &Facts<'_>) -> InferenceServiceStatus {
    let service = facts.service;
    let ready = facts.pods.iter().filter(|pod| pods::is_ready(pod)).count();
    let worst = worst_blocker(facts);
    let endpoint = endpoint_verdict(facts);
    let workloads = workloads_verdict(facts, worst.as_ref());
    let model = model_verdict(facts, ready, worst.as_ref());
    let overall = ready_verdict(facts, ready, &endpoint, &workloads, worst.as_ref());
    let scaling = scaling_verdict(service, facts.scaling);
    let phase = model_phase(&model, worst.as_ref());
    let old = service.service.status.clone().unwrap_or_default();
    let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    InferenceServiceStatus {
        url: Some(url(service, facts.defaults)),
        alias_url: service
            .service
            .spec
            .endpoint
            .alias
            .then(|| format!("http://{}/v1", service.service.alias_host())),
        replicas: count(facts.pods.iter().filter(|pod| !pods::is_over(pod)).count()),
        ready_replicas: count(ready),
        updated_replicas: facts.newest.pods,
        selector: Some(format!("{SERVICE_LABEL}={}", service.name)),
        revision: Some(revision_status(facts)),
        model: Some(model_status(facts, phase)),
        scaling: Some(ScalingStatus {
            desired_replicas: service.wanted,
            last_decision: match (&service.service.spec.scaling, facts.scaling) {
                (None, _) => None,
                (Some(_), Some(outcome)) => outcome.last.clone(),
                (Some(_), None) => old.scaling.and_then(|s| s.last_decision),
            },
        }),
        ..with_conditions(
            &service.service,
            [
                (READY, overall),
                (MODEL_READY, model),
                (WORKLOADS_READY, workloads),
                (ENDPOINT_READY, endpoint),
                (SCALING_READY, scaling),
            ],
            facts.now,
        )
    }
}

/// What keeps the service most from being ready.
fn worst_blocker(facts: &Facts<'_>) -> Option<Blocker> {
    let job = facts.service.service.pull_name(&facts.newest.hash);
    let filling = facts.filling.then(|| pods::filling(&job));
    let pulling = facts.pull_pods.iter().filter(|_| facts.filling);
    let of_pods = facts.pods.iter().filter_map(|pod| pods::why_not_ready(pod));
    of_pods
        .chain(pulling.filter_map(|pod| pods::why_waiting(pod)))
        .chain(facts.refused.map(pods::refused))
        .chain(filling)
        .max()
        .map(|blocker| explained(facts, blocker))
}

fn model_phase(model: &Verdict, worst: Option<&Blocker>) -> &'static str {
    if model.ok {
        return "Ready";
    }
    match worst.map(|blocker| blocker.reason) {
        Some(reason::MODEL_DOWNLOADING) => "Downloading",
        Some(reason::MODEL_LOADING) => "Loading",
        Some(
            reason::MODEL_DOWNLOAD_FAILED
            | reason::MODEL_LOAD_FAILED
            | reason::CRASH_LOOP
            | reason::OUT_OF_MEMORY,
        ) => "Failed",
        _ => "Pending",
    }
}

fn revision_status(facts: &Facts<'_>) -> RevisionStatus {
    let plan = facts.plan;
    let previous = plan.previous.as_ref().filter(|_| plan.rollout.is_some());
    RevisionStatus {
        current: facts.newest.hash.clone(),
        previous: previous.map(|(hash, _)| hash.clone()),
        outdated: facts.outdated,
        rollout: plan.rollout.clone(),
        canary: plan
            .weight
            .map(|weight_percent| CanaryStatus { weight_percent }),
    }
}

fn model_status(facts: &Facts<'_>, phase: &str) -> ModelStatus {
    let old = facts.service.service.status.as_ref();
    // What an earlier revision downloaded says nothing of this one.
    let same = old
        .and_then(|s| s.revision.as_ref())
        .is_some_and(|r| r.current == facts.newest.hash);
    let old = old
        .and_then(|s| s.model.clone())
        .filter(|_| same)
        .unwrap_or_default();
    let total = facts
        .download
        .map(|d| d.total_bytes)
        .filter(|total| *total > 0)
        .or(facts.pulled_bytes)
        .or(old.total_bytes);
    let downloaded = match facts.download {
        Some(download) => Some(download.downloaded_bytes),
        None if phase == "Loading" || phase == "Ready" => total,
        None => old.downloaded_bytes,
    };
    ModelStatus {
        phase: phase.to_owned(),
        resolved_revision: facts.resolved_revision.map(str::to_owned),
        downloaded_bytes: downloaded,
        total_bytes: total,
    }
}

/// A blocker with what is known beyond its pod.
fn explained(facts: &Facts<'_>, mut blocker: Blocker) -> Blocker {
    let parallelism = &facts.service.service.spec.parallelism;
    if blocker.reason == reason::MODEL_DOWNLOADING
        && let Some(download) = facts.download.filter(|download| download.total_bytes > 0)
    {
        let percent = download.downloaded_bytes.saturating_mul(100) / download.total_bytes;
        blocker.message = format!(
            "the model is being downloaded: {percent} % ({} of {} bytes)",
            download.downloaded_bytes, download.total_bytes
        );
    }
    if blocker.reason == reason::INSUFFICIENT_GPU
        && let Some(largest) = facts.largest_node
        && largest < f64::from(parallelism.tensor)
    {
        blocker.message = format!(
            "a pod needs {} {} on one node, and the largest node has {largest}; lower spec.parallelism.tensor or add a node: {}",
            parallelism.tensor, parallelism.resource_name, blocker.message
        );
    }
    blocker
}

/// The status of a service that could not be built or applied: what it had, and why it is not ready for the new spec.
#[must_use]
pub fn blocked(
    service: &InferenceService,
    reason: &'static str,
    message: &str,
    now: Timestamp,
) -> InferenceServiceStatus {
    let old = service.status.clone().unwrap_or_default();
    // What serves goes on serving: only a service without ready pods is not Ready for it.
    let serving = old.ready_replicas > 0;
    let keep = old.clone();
    InferenceServiceStatus {
        observed_generation: service.metadata.generation,
        conditions: with_conditions(
            service,
            [
                (READY, verdict(serving, reason, message)),
                (WORKLOADS_READY, verdict(false, reason, message)),
            ],
            now,
        )
        .conditions,
        ..keep
    }
}

fn url(service: &ValidatedService, defaults: &Defaults) -> String {
    format!(
        "http://{}.{}.svc/{}/{}/v1",
        defaults.gateway_service, defaults.namespace, service.namespace, service.name
    )
}

/// Conditions with their transition times carried over where nothing changed.
fn with_conditions<const N: usize>(
    service: &InferenceService,
    verdicts: [(&str, Verdict); N],
    now: Timestamp,
) -> InferenceServiceStatus {
    let mut conditions = service
        .status
        .as_ref()
        .map(|s| s.conditions.clone())
        .unwrap_or_default();
    for (kind, verdict) in verdicts {
        let status = if verdict.ok { "True" } else { "False" };
        let old = conditions.iter().position(|c| c.type_ == kind);
        let since = old
            .map(|i| &conditions[i])
            .filter(|c| c.status == status)
            .map(|c| c.last_transition_time.clone());
        let condition = Condition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            reason: verdict.reason.to_owned(),
            message: verdict.message,
            observed_generation: service.metadata.generation,
            last_transition_time: since.unwrap_or(Time(now)),
        };
        match old {
            Some(index) => conditions[index] = condition,
            None => conditions.push(condition),
        }
    }
    InferenceServiceStatus {
        observed_generation: service.metadata.generation,
        conditions,
        ..InferenceServiceStatus::default()
    }
}
