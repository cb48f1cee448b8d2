//! `status`, computed from what was applied and what the pods say. Pure.

use ashlar_crds::{
    Auth, CanaryStatus, InferenceService, InferenceServiceStatus, ModelStatus, RevisionStatus,
    ScalingStatus,
    conditions::{ENDPOINT_READY, MODEL_READY, READY, SCALING_READY, WORKLOADS_READY, reason},
    names::SERVICE_LABEL,
};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
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

/// Statuses written but not yet seen again by the watch, so that a reconcile in between starts from the newest.
#[derive(Default)]
pub struct Written(Mutex<HashMap<(String, String), (u64, InferenceServiceStatus)>>);

impl Written {
    /// The service with the newest status that is known.
    #[must_use]
    pub fn newest(&self, service: &Arc<InferenceService>) -> Arc<InferenceService> {
        let mut written = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = key(service);
        match written.get(&key) {
            Some((version, status)) if version_of(service) < *version => {
                let mut newest = (**service).clone();
                newest.status = Some(status.clone());
                Arc::new(newest)
            }
            Some(_) => {
                written.remove(&key);
                Arc::clone(service)
            }
            None => Arc::clone(service),
        }
    }

    /// Remembers what the API server has just stored.
    pub fn remember(&self, stored: &InferenceService) {
        let Some(status) = stored.status.clone() else {
            return;
        };
        let mut written = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Only services that were deleted before the watch showed the write stay behind.
        if written.len() >= MAX_WRITTEN {
            written.clear();
        }
        written.insert(key(stored), (version_of(stored), status));
    }
}

/// Most statuses remembered at one time.
const MAX_WRITTEN: usize = 16_384;

fn key(service: &InferenceService) -> (String, String) {
    let meta = &service.metadata;
    (
        meta.uid.clone().unwrap_or_default(),
        meta.name.clone().unwrap_or_default(),
    )
}

fn version_of(service: &InferenceService) -> u64 {
    let version = service.metadata.resource_version.as_deref();
    version.and_then(|v| v.parse().ok()).unwrap_or(0)
}

struct Verdict {
    ok: bool,
    reason: &'static str,
    message: String,
}

fn verdict(ok: bool, reason: &'static str, message: impl Into<String>) -> Verdict {
    Verdict {
        ok,
        reason,
        message: message.into(),
    }
}

/// The status of a service that was built and applied.
#[must_use]
pub fn compute(facts: &Facts<'_>) -> InferenceServiceStatus {
    let service = facts.service;
    let ready = facts.pods.iter().filter(|pod| pods::is_ready(pod)).count();
    let refused = facts.refused.map(pods::refused);
    let job = service.service.pull_name(&facts.newest.hash);
    let filling = facts.filling.then(|| pods::filling(&job));
    let pulling = facts.pull_pods.iter().filter(|_| facts.filling);
    let worst = facts
        .pods
        .iter()
        .filter_map(|pod| pods::why_not_ready(pod))
        .chain(pulling.filter_map(|pod| pods::why_waiting(pod)))
        .chain(refused)
        .chain(filling)
        .max()
        .map(|blocker| explained(facts, blocker));
    let endpoint = endpoint_verdict(facts);
    let workloads = workloads_verdict(facts, worst.as_ref());
    let model = model_verdict(facts, ready, worst.as_ref());
    let overall = ready_verdict(facts, ready, &endpoint, &workloads, worst.as_ref());
    let scaling = scaling_verdict(service, facts.scaling);
    let phase = match (&model, worst.as_ref().map(|b| b.reason)) {
        (Verdict { ok: true, .. }, _) => "Ready",
        (_, Some(reason::MODEL_DOWNLOADING)) => "Downloading",
        (_, Some(reason::MODEL_LOADING)) => "Loading",
        (
            _,
            Some(
                reason::MODEL_DOWNLOAD_FAILED
                | reason::MODEL_LOAD_FAILED
                | reason::CRASH_LOOP
                | reason::OUT_OF_MEMORY,
            ),
        ) => "Failed",
        _ => "Pending",
    };
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
        revision: Some(RevisionStatus {
            current: facts.newest.hash.clone(),
            previous: facts
                .plan
                .previous
                .as_ref()
                .filter(|_| facts.plan.rollout.is_some())
                .map(|(hash, _)| hash.clone()),
            outdated: facts.outdated,
            rollout: facts.plan.rollout.clone(),
            canary: facts
                .plan
                .weight
                .map(|weight_percent| CanaryStatus { weight_percent }),
        }),
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

fn endpoint_verdict(facts: &Facts<'_>) -> Verdict {
    let spec = &facts.service.service.spec.endpoint;
    if facts.gateway_endpoints == 0 {
        return verdict(
            false,
            reason::GATEWAY_UNAVAILABLE,
            format!(
                "Service {} in namespace {} has no ready endpoint; look at its Deployment",
                facts.defaults.gateway_service, facts.defaults.namespace
            ),
        );
    }
    if let Some(conflict) = facts.host_conflict {
        // By its other addresses the service answers, but not by all that the user asked for.
        return verdict(false, reason::HOST_CONFLICT, conflict);
    }
    if spec.gateway_ref.is_some() && !facts.has_http_routes {
        return verdict(
            false,
            reason::API_NOT_INSTALLED,
            "spec.endpoint.gatewayRef needs the Gateway API (HTTPRoute, gateway.networking.k8s.io/v1), which this cluster does not have; install it, or remove the field",
        );
    }
    match (spec.auth, facts.keys) {
        (Auth::Keys, KeyAccess::Denied) => verdict(
            false,
            reason::KEYS_UNREADABLE,
            format!(
                "the gateway may not read Secret {}; let it: ashlar-operator grant {}/{} | kubectl apply -f -",
                spec.api_key_secret_ref
                    .as_ref()
                    .map_or("", |s| s.name.as_str()),
                facts.service.namespace,
                facts.service.name
            ),
        ),
        (Auth::Keys, KeyAccess::Unknown) => verdict(
            false,
            reason::KEYS_UNREADABLE,
            "it is not known yet whether the gateway may read the keys",
        ),
        (Auth::Keys, KeyAccess::Allowed) => verdict(true, reason::AVAILABLE, "callers show a key"),
        (Auth::None, _) => verdict(
            true,
            reason::AVAILABLE,
            "open to whoever reaches the gateway",
        ),
    }
}

fn workloads_verdict(facts: &Facts<'_>, worst: Option<&Blocker>) -> Verdict {
    let wanted = facts.service.wanted;
    if facts.plan.halted {
        if let Some(why) = &facts.newest.rolled_back {
            return verdict(
                false,
                reason::REVISION_FAILED,
                format!(
                    "revision {} was rolled back: {why}; apply the old spec, or another",
                    facts.newest.hash
                ),
            );
        }
        let words = facts.newest.failed.clone().unwrap_or_default();
        return verdict(
            false,
            reason::REVISION_FAILED,
            format!(
                "revision {} does not start: {words}; apply the old spec to go back",
                facts.newest.hash
            ),
        );
    }
    if wanted == 0 {
        return verdict(true, reason::SCALED_TO_ZERO, "no replica is wanted");
    }
    if facts.newest.ready >= wanted && facts.plan.rollout.is_none() {
        return verdict(
            true,
            reason::AVAILABLE,
            format!("{wanted} of {wanted} replicas are ready"),
        );
    }
    let progress = format!(
        "{} of {wanted} replicas of revision {} are ready",
        facts.newest.ready, facts.newest.hash
    );
    match worst {
        Some(blocker) if blocker.severity >= 3 => verdict(
            false,
            blocker.reason,
            format!("{progress}; {}", blocker.message),
        ),
        _ if facts.plan.rollout.is_some() => {
            let reason = if worst.is_some_and(|b| b.reason == reason::DRAINING) {
                reason::DRAINING
            } else {
                reason::ROLLING_OUT
            };
            verdict(
                false,
                reason,
                format!(
                    "{progress}; {}",
                    facts.plan.rollout.clone().unwrap_or_default()
                ),
            )
        }
        Some(blocker) => verdict(
            false,
            blocker.reason,
            format!("{progress}; {}", blocker.message),
        ),
        None => verdict(false, reason::STARTING, progress),
    }
}

fn model_verdict(facts: &Facts<'_>, ready: usize, worst: Option<&Blocker>) -> Verdict {
    if ready > 0 {
        return verdict(
            true,
            reason::AVAILABLE,
            format!("{} is loaded", facts.service.service.spec.model.uri),
        );
    }
    match worst {
        Some(blocker) => verdict(false, blocker.reason, blocker.message.clone()),
        None if facts.service.wanted == 0 => {
            verdict(true, reason::SCALED_TO_ZERO, "no replica is wanted")
        }
        None => verdict(false, reason::STARTING, "no pod exists yet"),
    }
}

fn ready_verdict(
    facts: &Facts<'_>,
    ready: usize,
    endpoint: &Verdict,
    workloads: &Verdict,
    worst: Option<&Blocker>,
) -> Verdict {
    // A host that leads nowhere does not keep `status.url` from answering.
    let of_hosts = [reason::HOST_CONFLICT, reason::API_NOT_INSTALLED].contains(&endpoint.reason);
    if !endpoint.ok && !of_hosts {
        return verdict(false, endpoint.reason, endpoint.message.clone());
    }
    if ready > 0 {
        let reason = if facts.plan.halted {
            reason::REVISION_FAILED
        } else {
            reason::AVAILABLE
        };
        let message = if workloads.ok {
            "requests are answered".to_owned()
        } else {
            format!("requests are answered; {}", workloads.message)
        };
        return verdict(true, reason, message);
    }
    let was_ready = facts.service.service.status.as_ref().is_some_and(|status| {
        let same = status
            .revision
            .as_ref()
            .is_some_and(|r| r.current == facts.newest.hash);
        same && status
            .conditions
            .iter()
            .any(|c| c.type_ == READY && c.status == "True")
    });
    let scaled = facts.service.service.spec.scaling.is_some();
    if facts.service.wanted == 0 {
        let message = if scaled {
            "no replica is wanted; the next request is held and wakes the service"
        } else {
            "no replica is wanted; set replicas to serve again"
        };
        return verdict(was_ready, reason::SCALED_TO_ZERO, message);
    }
    // Requests are held while a service that slept wakes up: nothing is wrong unless its pods cannot start.
    let waking = was_ready
        && scaled
        && facts.service.service.status.as_ref().is_some_and(|status| {
            let mut conditions = status.conditions.iter();
            conditions.any(|c| {
                c.type_ == READY
                    && [reason::SCALED_TO_ZERO, reason::WAKING_UP].contains(&&*c.reason)
            })
        });
    if waking && worst.is_none_or(|blocker| blocker.severity < 3) {
        return verdict(
            true,
            reason::WAKING_UP,
            "requests are held until the first pod is ready",
        );
    }
    verdict(false, workloads.reason, workloads.message.clone())
}

fn scaling_verdict(service: &ValidatedService, outcome: Option<&Outcome>) -> Verdict {
    let Some(scaling) = &service.service.spec.scaling else {
        return verdict(
            true,
            reason::FIXED_REPLICAS,
            "spec.replicas, kubectl scale, HPA or KEDA set the number of replicas",
        );
    };
    if let Some(blind) = outcome.and_then(|outcome| outcome.blind.as_ref()) {
        return verdict(false, reason::METRICS_UNAVAILABLE, blind.clone());
    }
    let range = format!(
        "between {} and {} replicas by KV-cache use and waiting requests",
        scaling.min_replicas, scaling.max_replicas
    );
    let last = outcome.and_then(|o| o.explanation.as_ref());
    let message = last.map_or(range.clone(), |last| format!("{range}; last {last}"));
    verdict(true, reason::AVAILABLE, message)
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
