//! The revisions of a service as they are, and the objects that each of them has.

use std::{collections::BTreeMap, sync::Arc};

use ashlar_crds::{
    InferenceService,
    names::{PULL_CONTAINER, RUNTIME_CONTAINER},
};
use k8s_openapi::{
    api::{
        apps::v1::ControllerRevision,
        core::v1::{ConfigMap, Pod, PodTemplateSpec},
    },
    jiff::Timestamp,
};
use kube::ResourceExt as _;

use super::{
    Context,
    apply::{self, ApplyError},
    build::{Child, Defaults, children, model, revision, template},
    fetch::Observed,
    pods,
    rollout::{RevisionState, RolloutPlan},
    validate::{InvalidSpec, ValidatedService},
};

/// Revisions that are kept.
const KEPT_REVISIONS: usize = 3;
/// Annotation that remembers why a revision failed, after its pods are gone.
const FAILED_ANNOTATION: &str = "serving.ashlar.dev/failed";
/// Annotation of a revision that has had all its replicas ready once: what happens later is no failed start.
const PROVEN_ANNOTATION: &str = "serving.ashlar.dev/proven";

/// Annotation of a revision whose trial is over: `promoted`, or why it was rolled back.
const TRIAL_ANNOTATION: &str = "serving.ashlar.dev/trial";
const PROMOTED: &str = "promoted";

/// What is known of a service's revisions.
pub(super) struct RevisionView {
    /// The newest one.
    pub(super) newest: RevisionState,
    /// All others that still have a record.
    pub(super) older: Vec<RevisionState>,
    /// Template of the newest, from its record, or rendered now.
    pub(super) template: PodTemplateSpec,
    /// Record of the newest, when it has none yet.
    pub(super) record: Option<ControllerRevision>,
    /// What the newest revision's pods download; none when nothing is downloaded.
    pub(super) pin: Option<String>,
}

/// Looks at all revisions.
///
/// # Errors
/// [`InvalidSpec`] when the newest has no record and cannot be rendered.
pub(super) fn view(
    service: &ValidatedService,
    observed: &Observed,
    defaults: &Defaults,
    now: Timestamp,
) -> Result<RevisionView, InvalidSpec> {
    let hash = revision::hash(&service.service);
    let stored = observed
        .revisions
        .iter()
        .find(|r| revision::hash_of(&***r) == Some(&hash))
        .and_then(|r| revision::stored_template(r));
    let (template, record) = match stored {
        Some(template) => (template, None),
        None => {
            let template = template::pod_template(service, defaults)?;
            let numbers = observed.revisions.iter().map(|r| r.revision);
            let number = numbers.max().unwrap_or(0) + 1;
            let record = revision::controller_revision(service, &hash, number, &template);
            (template, Some(record))
        }
    };
    let older = observed
        .revisions
        .iter()
        .filter_map(|r| Some((revision::hash_of(&**r).filter(|h| *h != hash)?, r.revision)))
        .map(|(hash, number)| state(service, hash, number, observed, now))
        .collect();
    Ok(RevisionView {
        newest: state(service, &hash, i64::MAX, observed, now),
        older,
        template,
        record,
        pin: pin(service, &hash, observed),
    })
}

fn state(
    service: &ValidatedService,
    hash: &str,
    number: i64,
    observed: &Observed,
    now: Timestamp,
) -> RevisionState {
    let startup = i64::from(service.service.spec.startup_timeout_seconds);
    let pods: Vec<_> = observed
        .pods
        .iter()
        .filter(|pod| revision::hash_of(&***pod) == Some(hash) && !pods::has_ended(pod))
        .collect();
    let deployment = observed
        .deployments
        .iter()
        .find(|d| revision::hash_of(&***d) == Some(hash));
    let count = |is: &dyn Fn(&Pod) -> bool| {
        i32::try_from(pods.iter().filter(|pod| is(pod)).count()).unwrap_or(i32::MAX)
    };
    let ready = count(&pods::is_ready);
    let remembered = deployment.and_then(|d| d.annotations().get(FAILED_ANNOTATION).cloned());
    let proven = deployment.is_some_and(|d| d.annotations().contains_key(PROVEN_ANNOTATION));
    let trial = deployment.and_then(|d| d.annotations().get(TRIAL_ANNOTATION));
    let failing = || {
        pods.iter()
            .find_map(|pod| pods::failed_start(pod, startup, now))
    };
    RevisionState {
        hash: hash.to_owned(),
        number,
        replicas: deployment
            .and_then(|d| d.spec.as_ref())
            .and_then(|s| s.replicas)
            .unwrap_or(0),
        pods: count(&|_| true),
        ready,
        scheduled: count(&pods::is_scheduled),
        unschedulable: pods.iter().any(|pod| pods::is_unschedulable(pod, now)),
        proven,
        promoted: trial.is_some_and(|end| end == PROMOTED),
        rolled_back: trial.filter(|end| *end != PROMOTED).cloned(),
        failed: if ready > 0 || proven {
            None
        } else {
            remembered.or_else(failing)
        },
    }
}

/// The commit that a revision's pods download: once one of them has resolved a branch or tag, all later ones get the same.
fn pin(service: &ValidatedService, hash: &str, observed: &Observed) -> Option<String> {
    service.source.pulled_from()?;
    let name = service.service.revision_name(hash);
    let live = observed
        .live
        .iter()
        .find(|live| live.resource.kind == "ConfigMap" && live.name == name)
        .and_then(|live| {
            live.value
                .pointer("/data")?
                .get(revision::PIN_KEY)?
                .as_str()
        });
    let of_revision = |pod: &&Arc<Pod>| revision::hash_of(&***pod) == Some(hash);
    let reported = || {
        let pods = observed.pods.iter().chain(&observed.pull_pods);
        pods.filter(of_revision).find_map(|pod| pulled(pod))
    };
    live.filter(|pinned| is_commit(pinned))
        .map(str::to_owned)
        .or_else(reported)
        .or_else(|| service.service.spec.model.revision.clone())
        .or_else(|| Some(service.source.default_revision().to_owned()))
}

/// The commit that a pod's `pull` says it has downloaded.
fn pulled(pod: &Pod) -> Option<String> {
    let result = pull_result(pod)?;
    let commit = result.get("revision")?.as_str()?;
    is_commit(commit).then(|| commit.to_owned())
}

/// Bytes of the model that a revision's `pull` has downloaded.
pub(super) fn pulled_bytes(observed: &Observed, hash: &str) -> Option<i64> {
    let pods = observed.pods.iter().chain(&observed.pull_pods);
    let mut of_revision = pods.filter(|pod| revision::hash_of(&***pod) == Some(hash));
    of_revision.find_map(|pod| pull_result(pod)?.get("bytes")?.as_i64())
}

/// What a pod's `pull` said at its end.
fn pull_result(pod: &Pod) -> Option<serde_json::Value> {
    let status = pod.status.as_ref()?;
    let init = status.init_container_statuses.iter().flatten();
    let mut all = init.chain(status.container_statuses.iter().flatten());
    let pull = all.find(|s| s.name == PULL_CONTAINER)?;
    let message = pull.state.as_ref()?.terminated.as_ref()?.message.as_ref()?;
    serde_json::from_str(message).ok()
}

fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The pin, once it is a commit.
pub(super) fn resolved(pin: &Option<String>) -> Option<&str> {
    pin.as_deref().filter(|pin| is_commit(pin))
}

/// Whether the newest revision's pods still wait for a Job to fill their claim, and the Job if there is none yet.
pub(super) struct Filling {
    /// They wait.
    pub(super) waits: bool,
    /// To be made.
    pub(super) job: Option<Child>,
}

/// Looks at the Job of the newest revision. `keep` is asked which folders of the claim must stay when one is made.
pub(super) fn filling(
    service: &ValidatedService,
    view: &RevisionView,
    observed: &Observed,
    defaults: &Defaults,
    keep: impl FnOnce() -> Vec<String>,
) -> Filling {
    let spec = view.template.spec.as_ref();
    let inits = spec.and_then(|spec| spec.init_containers.as_ref());
    // Revisions rendered by an older operator fetch their model themselves.
    let by_itself = inits.is_some_and(|all| all.iter().any(|c| c.name == PULL_CONTAINER));
    if by_itself || !model::is_filled_by_job(service) {
        return Filling {
            waits: false,
            job: None,
        };
    }
    let name = service.service.pull_name(&view.newest.hash);
    let mut live = observed.live.iter();
    let Some(job) = live.find(|live| live.resource.kind == "Job" && live.name == name) else {
        let job = model::job(service, defaults, &view.newest.hash, &keep());
        return Filling {
            waits: true,
            job: job.as_ref().map(Child::new),
        };
    };
    let conditions = job
        .value
        .pointer("/status/conditions")
        .and_then(|c| c.as_array());
    let complete = conditions.is_some_and(|all| all.iter().any(|c| c["type"] == "Complete"));
    Filling {
        waits: !complete,
        job: None,
    }
}

/// The folders of a claim that revisions of a service load from.
pub(super) fn folders_in_use(observed: &Observed, claim: &str) -> Vec<String> {
    let templates = observed
        .revisions
        .iter()
        .filter_map(|r| revision::stored_template(r));
    templates
        .filter_map(|template| model::cached_by(&template, claim))
        .collect()
}

/// What the newest revision needs before its pods: its record, and what they download.
pub(super) fn records(
    service: &ValidatedService,
    view: &RevisionView,
    observed: &Observed,
) -> Vec<Child> {
    let hash = &view.newest.hash;
    let record = view.record.iter().map(Child::new);
    let newest = view
        .pin
        .as_deref()
        .map(|pin| revision::pin(service, hash, pin));
    // Pods of an old revision still start when a node dies: what they download stays as it is.
    let older = observed.live.iter().filter(|live| {
        live.resource.kind == "ConfigMap" && live.name != service.service.revision_name(hash)
    });
    let older = older.filter_map(|live| {
        let map: ConfigMap = serde_json::from_value(live.value.clone()).ok()?;
        let pin = map.data.as_ref()?.get(revision::PIN_KEY)?;
        let hash = revision::hash_of(&map)?;
        Some(revision::pin(service, hash, pin))
    });
    let pins = newest.into_iter().chain(older);
    record.chain(pins.map(|map| Child::new(&map))).collect()
}

/// A Deployment for the newest revision and for each older one that still exists.
pub(super) fn deployments(
    service: &ValidatedService,
    view: &RevisionView,
    plan: &RolloutPlan,
    observed: &Observed,
) -> Vec<Child> {
    let newest = &view.newest;
    let mut annotations = BTreeMap::new();
    if let Some(failure) = newest.failed.as_ref().filter(|_| plan.halted) {
        annotations.insert(FAILED_ANNOTATION.to_owned(), failure.clone());
    }
    if newest.promoted {
        annotations.insert(TRIAL_ANNOTATION.to_owned(), PROMOTED.to_owned());
    } else if let Some(why) = &newest.rolled_back {
        annotations.insert(TRIAL_ANNOTATION.to_owned(), why.clone());
    }
    // One that is on trial has still to prove itself.
    let all_ready = newest.ready > 0 && newest.ready >= service.wanted && plan.weight.is_none();
    if newest.proven || all_ready {
        annotations.insert(PROVEN_ANNOTATION.to_owned(), "true".to_owned());
    }
    // Old revisions go down before the newest goes up, so that an in-place rollout never asks for both.
    let mut children: Vec<Child> = view
        .older
        .iter()
        .filter_map(|old| old_deployment(service, old, plan, observed))
        .collect();
    children.push(Child::new(&children::deployment(
        service,
        &newest.hash,
        plan.newest,
        view.template.clone(),
        annotations,
    )));
    children
}

fn old_deployment(
    service: &ValidatedService,
    old: &RevisionState,
    plan: &RolloutPlan,
    observed: &Observed,
) -> Option<Child> {
    let record = observed
        .revisions
        .iter()
        .find(|r| revision::hash_of(&***r) == Some(&old.hash))?;
    let replicas = plan
        .previous
        .as_ref()
        .filter(|(hash, _)| *hash == old.hash)
        .map_or(0, |(_, replicas)| *replicas);
    let template = revision::stored_template(record)?;
    let proven = old
        .proven
        .then(|| (PROVEN_ANNOTATION.to_owned(), "true".to_owned()));
    let annotations = proven.into_iter().collect();
    let deployment = children::deployment(service, &old.hash, replicas, template, annotations);
    Some(Child::new(&deployment))
}

/// Deletes children that are no longer built, and revisions past the last few.
pub(super) async fn prune(
    service: &InferenceService,
    view: &RevisionView,
    plan: &RolloutPlan,
    built: &[Child],
    observed: &Observed,
    context: &Context,
) -> Result<(), ApplyError> {
    let uid = service.uid().unwrap_or_default();
    let hash = view.newest.hash.as_str();
    let mut revisions: Vec<_> = observed.revisions.iter().collect();
    revisions.sort_by_key(|r| std::cmp::Reverse(r.revision));
    let previous = plan.previous.as_ref().map(|(hash, _)| hash.as_str());
    let kept: Vec<&str> = revisions
        .iter()
        .filter_map(|r| revision::hash_of(&***r))
        .filter(|h| *h != hash && Some(*h) != previous)
        .take(KEPT_REVISIONS.saturating_sub(1 + usize::from(previous.is_some())))
        .chain(previous)
        .chain([hash])
        .collect();
    for live in &observed.live {
        let of_revision = live
            .value
            .pointer("/metadata/labels/serving.ashlar.dev~1revision")
            .and_then(|v| v.as_str());
        let wanted = match of_revision {
            Some(revision) => kept.contains(&revision),
            None => built
                .iter()
                .any(|child| child.resource.kind == live.resource.kind && child.name == live.name),
        };
        if !wanted && !live.terminating && live.owner.as_deref() == Some(&uid) {
            apply::delete(&context.client, service, &live.resource, live).await?;
            context.metrics.wrote(&live.resource.kind);
        }
    }
    Ok(())
}

pub(super) fn runtime_image(template: &PodTemplateSpec) -> Option<String> {
    let containers = &template.spec.as_ref()?.containers;
    let runtime = containers.iter().find(|c| c.name == RUNTIME_CONTAINER)?;
    runtime.image.clone()
}

/// Generation of a revision's Deployment: it grows with each new replica count.
pub(super) fn generation(observed: &Observed, hash: &str) -> i64 {
    let mut deployments = observed.deployments.iter();
    let deployment = deployments.find(|d| revision::hash_of(&***d) == Some(hash));
    deployment.and_then(|d| d.metadata.generation).unwrap_or(0)
}

/// The words with which the cluster refuses to create a revision's pods.
pub(super) fn refused<'a>(observed: &'a Observed, hash: &str) -> Option<&'a str> {
    let deployment = observed
        .deployments
        .iter()
        .find(|d| revision::hash_of(&***d) == Some(hash))?;
    let conditions = deployment.status.as_ref()?.conditions.as_ref()?;
    let failure = conditions
        .iter()
        .find(|c| c.type_ == "ReplicaFailure" && c.status == "True")?;
    failure.message.as_deref()
}
