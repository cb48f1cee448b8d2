//! One look at one service: the table of contents of the controller.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ashlar_crds::{InferenceService, InferenceServiceStatus, conditions::reason};
use futures::future::try_join_all;
use k8s_openapi::jiff::Timestamp;
use kube::{ResourceExt as _, runtime::controller::Action};

use super::{
    Context,
    apply::{self, ApplyError},
    build::{Child, children, revision, template},
    canary::{self, Verdict},
    endpoint,
    fetch::Observed,
    report::{self, ReportError},
    revisions::{self, RevisionView},
    rollout::{self, Circumstances, RolloutPlan},
    status::{self, Facts, KeyAccess},
    validate::{InvalidSpec, ValidatedService, validate},
    victims::Lowering,
};

/// How often a service that waits for time to pass (a failing start, missing keys) is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// The same while deletion costs are being written; the watch that shows them is usually sooner.
const LOOK_SOON: Duration = Duration::from_millis(250);
/// The same while the gateways' counts decide about a new revision: each second costs requests.
const LOOK_AT_TRIAL: Duration = Duration::from_secs(1);
/// How often a service at rest is looked at again, should a watch have missed something.
const RESYNC: Duration = Duration::from_secs(600);

/// Why a reconcile did not finish.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReconcileError {
    /// The API server refused a write.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// Status could not be written.
    #[error(transparent)]
    Report(#[from] ReportError),
}

pub(crate) async fn reconcile(
    service: Arc<InferenceService>,
    context: Arc<Context>,
) -> Result<Action, ReconcileError> {
    let start = Instant::now();
    let service = context.written.newest(&service);
    let result = reconcile_one(&service, &context).await;
    context
        .metrics
        .reconciled(start, if result.is_ok() { "success" } else { "error" });
    if result.is_ok() {
        context.failures.forget(&service);
    }
    result
}

pub(crate) fn after_error(
    service: Arc<InferenceService>,
    error: &ReconcileError,
    context: Arc<Context>,
) -> Action {
    let wait = context.failures.next_wait(&service);
    tracing::warn!(namespace = service.namespace(), service = service.name_any(), %error, ?wait, "reconcile failed, trying again");
    Action::requeue(wait)
}

async fn reconcile_one(
    service: &InferenceService,
    context: &Context,
) -> Result<Action, ReconcileError> {
    if service.metadata.deletion_timestamp.is_some() {
        // Owner references do the rest.
        return Ok(Action::await_change());
    }
    let now = Timestamp::now();
    match steps(service, context, now).await {
        Ok((status, action)) => {
            report::write_status(service, status, context).await?;
            Ok(action)
        }
        Err(Blocked::Spec(invalid)) => {
            let status = status::blocked(service, reason::INVALID_SPEC, &invalid.to_string(), now);
            report::write_status(service, status, context).await?;
            Ok(Action::await_change())
        }
        Err(Blocked::Apply(error)) => {
            let Some(reason) = error.blocks() else {
                return Err(error.into());
            };
            let status = status::blocked(service, reason, &error.to_string(), now);
            report::write_status(service, status, context).await?;
            Ok(Action::requeue(LOOK_AGAIN))
        }
    }
}

enum Blocked {
    Spec(InvalidSpec),
    Apply(ApplyError),
}

impl From<InvalidSpec> for Blocked {
    fn from(invalid: InvalidSpec) -> Self {
        Self::Spec(invalid)
    }
}

impl From<ApplyError> for Blocked {
    fn from(error: ApplyError) -> Self {
        Self::Apply(error)
    }
}

async fn steps(
    service: &InferenceService,
    context: &Context,
    now: Timestamp,
) -> Result<(InferenceServiceStatus, Action), Blocked> {
    let (namespace, name) = (service.namespace().unwrap_or_default(), service.name_any());
    let mut observed = context.caches.observe(&namespace, &name);
    observed.keep_owned_by(&service.uid().unwrap_or_default());
    let mut validated = validate(service)?;
    let scaling = context.autoscaler.outcome(service);
    if let Some(outcome) = &scaling {
        validated.wanted = outcome.desired;
    }
    let mut view = revisions::view(&validated, &observed, &context.defaults, now)?;
    let canary = on_trial(&validated, &mut view, &observed, context).await;
    let filling = revisions::filling(&validated, &view, &observed, &context.defaults, || {
        folders_to_keep(&validated, context)
    });
    let plan = if filling.waits {
        rollout::wait(validated.wanted, &view.newest, &view.older)
    } else {
        next_step(&validated, &view, canary, context)
    };
    let (asked, waiting) = lower_gently(&validated, &view, &plan, &observed, context).await;

    let gateway_slices = children::sorted_slices(observed.gateway_slices.clone());
    let has_routes = context.caches.has_http_routes();
    let around = children::children(&validated, &context.defaults, &gateway_slices, has_routes)?;
    let groups = Groups {
        around,
        records: revisions::records(&validated, &view, &observed),
        filling: filling.job,
        workloads: revisions::deployments(&validated, &view, &asked, &observed),
    };
    let (built, alias_waits) = groups.apply(service, &observed, context).await?;
    revisions::prune(service, &view, &plan, &built, &observed, context).await?;

    let keys = endpoint::key_access(&validated, context).await;
    let conflict = endpoint::host_conflict(service, || context.services.state());
    let download = context
        .downloads
        .look(&namespace, &name, &observed.pods, &observed.pull_pods)
        .await;
    let default_image = template::image(&validated, &context.defaults);
    let status = status::compute(&Facts {
        service: &validated,
        defaults: &context.defaults,
        pods: &observed.pods,
        pull_pods: &observed.pull_pods,
        filling: filling.waits,
        newest: &view.newest,
        plan: &plan,
        refused: revisions::refused(&observed, &view.newest.hash),
        outdated: revisions::runtime_image(&view.template).is_some_and(|i| i != default_image),
        gateway_endpoints: endpoint::ready_endpoints(&gateway_slices),
        keys,
        scaling: scaling.as_ref(),
        host_conflict: conflict.as_deref(),
        has_http_routes: has_routes,
        download,
        pulled_bytes: revisions::pulled_bytes(&observed, &view.newest.hash),
        resolved_revision: revisions::resolved(&view.pin),
        largest_node: context
            .capacity
            .largest(&service.spec.parallelism.resource_name),
        now,
    });
    let again = look_again(&Unfinished {
        lowering: waiting,
        trial: canary.is_some() && validated.wanted > 0,
        alias: alias_waits,
        anything: view.newest.ready != validated.wanted
            || plan.rollout.is_some()
            || filling.waits
            || keys != KeyAccess::Allowed
            || conflict.is_some(),
    });
    Ok((status, Action::requeue(again)))
}

/// What a reconcile leaves to a later one.
struct Unfinished {
    /// Pods are asked to finish before they go.
    lowering: bool,
    /// A canary is on trial.
    trial: bool,
    /// The alias has no address yet.
    alias: bool,
    /// Something is not yet as the spec wants it.
    anything: bool,
}

/// When to look again though nothing has changed.
fn look_again(unfinished: &Unfinished) -> Duration {
    if unfinished.lowering {
        LOOK_SOON
    } else if unfinished.trial {
        LOOK_AT_TRIAL
    } else if unfinished.alias {
        // Not all at one time.
        LOOK_AGAIN.mul_f64(0.4 + 0.6 * rand::random::<f64>())
    } else if unfinished.anything {
        LOOK_AGAIN
    } else {
        RESYNC
    }
}

/// A service's children, by what needs what.
struct Groups {
    /// What pods need, and the service's own address.
    around: Vec<Child>,
    records: Vec<Child>,
    /// Fills the claim of a cache.
    filling: Option<Child>,
    workloads: Vec<Child>,
}

impl Groups {
    /// Writes what is not as it should be. All children, and whether the service's own address has to wait.
    async fn apply(
        self,
        service: &InferenceService,
        observed: &Observed,
        context: &Context,
    ) -> Result<(Vec<Child>, bool), Blocked> {
        let name = service.name_any();
        let (alias, around): (Vec<_>, Vec<_>) = self
            .around
            .into_iter()
            .partition(|child| child.resource.kind == "Service" && child.name == name);
        // What pods need is there before pods are; within a group the order does not matter.
        apply_all(&around, observed, service, context).await?;
        // Whether a workload's name is free can be asked meanwhile.
        let asked = self
            .workloads
            .iter()
            .map(|child| apply::is_needed(&context.client, service, child, &observed.live));
        let (_, needed) = tokio::try_join!(
            apply_all(&self.records, observed, service, context),
            try_join_all(asked)
        )?;
        if let Some(child) = &self.filling {
            apply_one(child, observed, service, context).await?;
        }
        for (child, _) in self
            .workloads
            .iter()
            .zip(needed)
            .filter(|(_, needed)| *needed)
        {
            apply::write(&context.client, service, child).await?;
            context.metrics.wrote(&child.resource.kind);
        }
        let mut alias_waits = false;
        for child in &alias {
            alias_waits |= !apply_alias(child, observed, service, context).await?;
        }
        let pods = self
            .records
            .into_iter()
            .chain(self.filling)
            .chain(self.workloads);
        let built = around.into_iter().chain(pods).chain(alias).collect();
        Ok((built, alias_waits))
    }
}

/// Folders of the service's claim that some service of the namespace loads from, in any revision that is kept.
fn folders_to_keep(service: &ValidatedService, context: &Context) -> Vec<String> {
    let cache = service.service.spec.cache.as_ref();
    let Some(pvc) = cache.and_then(|cache| cache.pvc.as_ref()) else {
        return Vec::new();
    };
    let services = context.services.state();
    let neighbours = services
        .iter()
        .filter(|other| other.namespace().as_deref() == Some(&service.namespace));
    let mut folders: Vec<String> = neighbours
        .flat_map(|other| {
            let observed = context
                .caches
                .observe(&service.namespace, &other.name_any());
            revisions::folders_in_use(&observed, &pvc.claim_name)
        })
        .collect();
    folders.sort();
    folders.dedup();
    folders
}

/// Judges the newest revision's trial, if it is on one; its share of the requests while that goes on.
async fn on_trial(
    service: &ValidatedService,
    view: &mut RevisionView,
    observed: &Observed,
    context: &Context,
) -> Option<i32> {
    let trial = canary::trial(service, view)?;
    let gateways = endpoint::addresses(&observed.gateway_slices);
    let port = context.gateway_metrics_port;
    match canary::judge(service, trial, view, &gateways, port).await {
        Verdict::Wait => return Some(trial.weight_percent),
        Verdict::Promote => view.newest.promoted = true,
        Verdict::RollBack(why) => view.newest.rolled_back = Some(why),
    }
    None
}

/// Asks `rollout` for the next step, with what nodes have left while there is a rollout.
fn next_step(
    service: &ValidatedService,
    view: &RevisionView,
    canary: Option<i32>,
    context: &Context,
) -> RolloutPlan {
    let key = format!("{}/{}", service.namespace, service.name);
    let rolling = view
        .older
        .iter()
        .any(|old| old.replicas > 0 || old.pods > 0);
    // A new revision that fails by itself may stay where the old one finds room beside it.
    let asks = rolling || view.newest.failed.is_some();
    let pod = view.template.spec.as_ref().filter(|_| asks);
    let room = pod.and_then(|pod| {
        let capacity = &context.capacity;
        capacity.room(&key, &service.namespace, pod, service.wanted.max(1))
    });
    let before = service
        .service
        .status
        .as_ref()
        .and_then(|s| s.revision.as_ref());
    let in_place = before.is_some_and(|revision| {
        let rollout = revision.rollout.as_deref().unwrap_or_default();
        revision.current == view.newest.hash && rollout.starts_with("InPlace")
    });
    let circumstances = Circumstances {
        wanted: service.wanted,
        surge: service.service.spec.rollout_strategy.surge,
        room,
        in_place,
        canary,
    };
    let plan = rollout::plan(&circumstances, &view.newest, &view.older);
    if let Some(pod) = &view.template.spec {
        let coming = plan.newest - view.newest.scheduled;
        context
            .capacity
            .claim(&key, pod, if rolling { coming } else { 0 });
    }
    plan
}

/// The plan with counts that go down only once it is known which pods are the least busy; true while that is waited for.
async fn lower_gently(
    service: &ValidatedService,
    view: &RevisionView,
    plan: &RolloutPlan,
    observed: &Observed,
    context: &Context,
) -> (RolloutPlan, bool) {
    let mut asked = plan.clone();
    let mut waiting = false;
    let previous = asked.previous.iter_mut().map(|(hash, to)| (&*hash, to));
    for (hash, to) in previous.chain([(&view.newest.hash, &mut asked.newest)]) {
        let state = view
            .older
            .iter()
            .chain([&view.newest])
            .find(|r| r.hash == *hash);
        let Some(from) = state.map(|state| state.replicas).filter(|from| from > to) else {
            continue;
        };
        let pods = context.caches.pods_of(&service.namespace, &service.name);
        let lowering = Lowering {
            namespace: &service.namespace,
            deployment: &service.service.revision_name(hash),
            generation: revisions::generation(observed, hash),
            to: *to,
            pods: pods
                .into_iter()
                .filter(|pod| revision::hash_of(&**pod) == Some(hash))
                .collect(),
        };
        if !context.victims.chosen(&context.client, &lowering).await {
            *to = from;
            waiting = true;
        }
    }
    (asked, waiting)
}

/// The alias comes last and waits for its turn: the API server gives out cluster addresses slowly, some ten a second, and a
/// thousand new services that all asked at one time would only see each other time out. False when it is not its turn.
async fn apply_alias(
    alias: &Child,
    observed: &Observed,
    service: &InferenceService,
    context: &Context,
) -> Result<bool, ApplyError> {
    let mut live = observed.live.iter();
    let exists = live.any(|live| live.resource.kind == "Service" && live.name == alias.name);
    let turn = context.new_addresses.try_acquire();
    if !exists && turn.is_err() {
        return Ok(false);
    }
    apply_one(alias, observed, service, context).await?;
    Ok(true)
}

async fn apply_all(
    children: &[Child],
    observed: &Observed,
    service: &InferenceService,
    context: &Context,
) -> Result<(), ApplyError> {
    let applied = children
        .iter()
        .map(|child| apply_one(child, observed, service, context));
    try_join_all(applied).await.map(drop)
}

async fn apply_one(
    child: &Child,
    observed: &Observed,
    service: &InferenceService,
    context: &Context,
) -> Result<(), ApplyError> {
    if apply::apply(&context.client, service, child, &observed.live).await? {
        context.metrics.wrote(&child.resource.kind);
    }
    Ok(())
}
