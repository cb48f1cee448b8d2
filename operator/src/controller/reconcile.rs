//! One look at one service: the table of contents of the controller.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use ashlar_crds::{
    Auth, InferenceService, InferenceServiceStatus,
    conditions::{READY, reason},
    names::FIELD_MANAGER,
};
use k8s_openapi::{
    api::{
        apps::v1::ControllerRevision,
        authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec},
        core::v1::PodTemplateSpec,
        discovery::v1::EndpointSlice,
    },
    jiff::Timestamp,
};
use kube::{
    Api, Resource as _, ResourceExt as _,
    api::{Patch, PatchParams, PostParams},
    runtime::{
        controller::Action,
        events::{Event, EventType},
    },
};

use super::{
    Context,
    apply::{self, ApplyError},
    build::{Child, children, revision, template},
    fetch::Observed,
    pods,
    rollout::{self, RevisionState, RolloutPlan},
    status::{self, Facts, KeyAccess},
    timed,
    validate::{InvalidSpec, ValidatedService, validate},
};

/// Revisions that are kept.
const KEPT_REVISIONS: usize = 3;
/// How often a service that waits for time to pass (a failing start, missing keys) is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// How often a service at rest is looked at again, should a watch have missed something.
const RESYNC: Duration = Duration::from_secs(600);
/// Annotation that remembers why a revision failed, after its pods are gone.
const FAILED_ANNOTATION: &str = "serving.ashlar.dev/failed";
/// Annotation of a revision that has had all its replicas ready once: what happens later is no failed start.
const PROVEN_ANNOTATION: &str = "serving.ashlar.dev/proven";

/// Why a reconcile did not finish.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReconcileError {
    /// The API server refused a write.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// Status could not be written.
    #[error("cannot write status: {0}")]
    Status(#[source] kube::Error),
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
    result
}

pub(crate) fn after_error(
    service: Arc<InferenceService>,
    error: &ReconcileError,
    _: Arc<Context>,
) -> Action {
    tracing::warn!(namespace = service.namespace(), service = service.name_any(), %error, "reconcile failed, trying again");
    Action::requeue(Duration::from_secs(2))
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
            write_status(service, status, context).await?;
            Ok(action)
        }
        Err(Blocked::Spec(invalid)) => {
            let status = status::blocked(service, reason::INVALID_SPEC, &invalid.to_string(), now);
            write_status(service, status, context).await?;
            Ok(Action::await_change())
        }
        Err(Blocked::Apply(error)) => {
            let reason = match &error {
                ApplyError::NameTaken { .. } => reason::NAME_TAKEN,
                ApplyError::Call {
                    source: kube::Error::Api(api),
                    ..
                } if api.code == 400 || api.code == 422 => reason::INVALID_SPEC,
                ApplyError::Call {
                    source: kube::Error::Api(api),
                    ..
                } if api.code == 403 => reason::FORBIDDEN,
                ApplyError::Call { .. } => return Err(error.into()),
            };
            let status = status::blocked(service, reason, &error.to_string(), now);
            write_status(service, status, context).await?;
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
    let mut observed = context.caches.observe(
        &service.namespace().unwrap_or_default(),
        &service.name_any(),
    );
    observed.keep_owned_by(&service.uid().unwrap_or_default());
    let mut validated = validate(service)?;
    let scaling = context.autoscaler.outcome(service);
    if let Some(outcome) = &scaling {
        validated.wanted = outcome.desired;
    }
    let hash = revision::hash(service);
    let current = current_template(&validated, &hash, &observed, context)?;
    let (newest, older) = revision_states(&validated, &hash, &observed, now);
    let plan = rollout::plan(
        validated.wanted,
        validated.service.spec.rollout_strategy.surge,
        &newest,
        &older,
    );

    let gateway_slices = children::sorted_slices(observed.gateway_slices.clone());
    let mut built = children::children(&validated, &context.defaults, &gateway_slices)?;
    built.extend(current.record.iter().map(Child::new));
    built.extend(deployments(
        &validated,
        &hash,
        &current.template,
        &newest,
        &older,
        &plan,
        &observed,
    ));
    for child in &built {
        if apply::apply(&context.client, service, child, &observed.live).await? {
            context.metrics.wrote(&child.resource.kind);
        }
    }
    prune(service, &hash, &plan, &built, &observed, context).await?;

    let keys = key_access(&validated, context).await;
    let default_image = template::image(&validated, &context.defaults);
    let status = status::compute(&Facts {
        service: &validated,
        defaults: &context.defaults,
        pods: &observed.pods,
        newest: &newest,
        plan: &plan,
        refused: refused(&observed, &hash),
        outdated: runtime_image(&current.template).is_some_and(|image| image != default_image),
        gateway_endpoints: ready_endpoints(&gateway_slices),
        keys,
        scaling: scaling.as_ref(),
        now,
    });
    let settled =
        newest.ready == validated.wanted && plan.rollout.is_none() && keys == KeyAccess::Allowed;
    Ok((
        status,
        Action::requeue(if settled { RESYNC } else { LOOK_AGAIN }),
    ))
}

/// The newest revision's template, from its record, or rendered now with a record to apply.
struct CurrentTemplate {
    template: PodTemplateSpec,
    record: Option<ControllerRevision>,
}

fn current_template(
    service: &ValidatedService,
    hash: &str,
    observed: &Observed,
    context: &Context,
) -> Result<CurrentTemplate, InvalidSpec> {
    let stored = observed
        .revisions
        .iter()
        .find(|r| revision::hash_of(&***r) == Some(hash))
        .and_then(|r| revision::stored_template(r));
    if let Some(template) = stored {
        return Ok(CurrentTemplate {
            template,
            record: None,
        });
    }
    let template = template::pod_template(service, &context.defaults)?;
    let number = observed
        .revisions
        .iter()
        .map(|r| r.revision)
        .max()
        .unwrap_or(0)
        + 1;
    let record = revision::controller_revision(service, hash, number, &template);
    Ok(CurrentTemplate {
        template,
        record: Some(record),
    })
}

/// What is known of the newest revision, and of all others.
fn revision_states(
    service: &ValidatedService,
    hash: &str,
    observed: &Observed,
    now: Timestamp,
) -> (RevisionState, Vec<RevisionState>) {
    let startup = i64::from(service.service.spec.startup_timeout_seconds);
    let state = |hash: &str, number: i64| {
        let pods: Vec<_> = observed
            .pods
            .iter()
            .filter(|pod| revision::hash_of(&***pod) == Some(hash) && !pods::has_ended(pod))
            .collect();
        let deployment = observed
            .deployments
            .iter()
            .find(|d| revision::hash_of(&***d) == Some(hash));
        let ready = pods.iter().filter(|pod| pods::is_ready(pod)).count();
        let remembered = deployment.and_then(|d| d.annotations().get(FAILED_ANNOTATION).cloned());
        let proven = deployment.is_some_and(|d| d.annotations().contains_key(PROVEN_ANNOTATION));
        RevisionState {
            hash: hash.to_owned(),
            number,
            replicas: deployment
                .and_then(|d| d.spec.as_ref())
                .and_then(|s| s.replicas)
                .unwrap_or(0),
            pods: i32::try_from(pods.len()).unwrap_or(i32::MAX),
            ready: i32::try_from(ready).unwrap_or(i32::MAX),
            unschedulable: pods.iter().any(|pod| pods::is_unschedulable(pod, now)),
            proven,
            failed: if ready > 0 || proven {
                None
            } else {
                remembered.or_else(|| {
                    pods.iter()
                        .find_map(|pod| pods::failed_start(pod, startup, now))
                })
            },
        }
    };
    let older = observed
        .revisions
        .iter()
        .filter_map(|r| {
            revision::hash_of(&**r)
                .filter(|h| *h != hash)
                .map(|h| state(h, r.revision))
        })
        .collect();
    (state(hash, i64::MAX), older)
}

/// A Deployment for the newest revision and for each older one that still exists.
fn deployments(
    service: &ValidatedService,
    hash: &str,
    template: &PodTemplateSpec,
    newest: &RevisionState,
    older: &[RevisionState],
    plan: &RolloutPlan,
    observed: &Observed,
) -> Vec<Child> {
    let mut annotations = BTreeMap::new();
    if let Some(failure) = newest.failed.as_ref().filter(|_| plan.halted) {
        annotations.insert(FAILED_ANNOTATION.to_owned(), failure.clone());
    }
    if newest.proven || (newest.ready > 0 && newest.ready >= service.wanted) {
        annotations.insert(PROVEN_ANNOTATION.to_owned(), "true".to_owned());
    }
    // Old revisions go down before the newest goes up, so that an in-place rollout never asks for both.
    let mut children: Vec<Child> = older
        .iter()
        .filter_map(|old| {
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
            let mut annotations = BTreeMap::new();
            if old.proven {
                annotations.insert(PROVEN_ANNOTATION.to_owned(), "true".to_owned());
            }
            Some(Child::new(&children::deployment(
                service,
                &old.hash,
                replicas,
                template,
                annotations,
            )))
        })
        .collect();
    children.push(Child::new(&children::deployment(
        service,
        hash,
        plan.newest,
        template.clone(),
        annotations,
    )));
    children
}

/// Deletes children that are no longer built, and revisions past the last few.
async fn prune(
    service: &InferenceService,
    hash: &str,
    plan: &RolloutPlan,
    built: &[Child],
    observed: &Observed,
    context: &Context,
) -> Result<(), ApplyError> {
    let uid = service.uid().unwrap_or_default();
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

fn runtime_image(template: &PodTemplateSpec) -> Option<String> {
    let containers = &template.spec.as_ref()?.containers;
    containers
        .iter()
        .find(|c| c.name == ashlar_crds::names::RUNTIME_CONTAINER)?
        .image
        .clone()
}

fn ready_endpoints(slices: &[EndpointSlice]) -> usize {
    slices
        .iter()
        .flat_map(|slice| slice.endpoints.iter().flatten())
        .filter(|endpoint| {
            endpoint
                .conditions
                .as_ref()
                .is_none_or(|c| c.ready.unwrap_or(true))
        })
        .map(|endpoint| endpoint.addresses.len())
        .sum()
}

/// The words with which the cluster refuses to create the newest revision's pods.
fn refused<'a>(observed: &'a Observed, hash: &str) -> Option<&'a str> {
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

/// Asks the API server whether the gateway may read the service's Secret.
async fn key_access(service: &ValidatedService, context: &Context) -> KeyAccess {
    let endpoint = &service.service.spec.endpoint;
    let Some(secret) = endpoint
        .api_key_secret_ref
        .as_ref()
        .filter(|_| endpoint.auth == Auth::Keys)
    else {
        return KeyAccess::Allowed;
    };
    let review = SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some(format!(
                "system:serviceaccount:{}:{}",
                context.defaults.namespace, context.gateway_account
            )),
            resource_attributes: Some(ResourceAttributes {
                namespace: Some(service.namespace.clone()),
                verb: Some("get".into()),
                version: Some("v1".into()),
                resource: Some("secrets".into()),
                name: Some(secret.name.clone()),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    };
    let reviews: Api<SubjectAccessReview> = Api::all(context.client.clone());
    match timed(reviews.create(&PostParams::default(), &review)).await {
        Ok(answer) if answer.status.as_ref().is_some_and(|status| status.allowed) => {
            KeyAccess::Allowed
        }
        Ok(_) => KeyAccess::Denied,
        Err(error) => {
            tracing::warn!(%error, "cannot ask whether the gateway may read the keys");
            KeyAccess::Unknown
        }
    }
}

/// Writes the status if it differs, and an event if readiness changed.
async fn write_status(
    service: &InferenceService,
    status: InferenceServiceStatus,
    context: &Context,
) -> Result<(), ReconcileError> {
    if service.status.as_ref() == Some(&status) {
        return Ok(());
    }
    let namespace = service.namespace().unwrap_or_default();
    let api: Api<InferenceService> = Api::namespaced(context.client.clone(), &namespace);
    let patch = serde_json::json!({
        "apiVersion": InferenceService::api_version(&()),
        "kind": InferenceService::kind(&()),
        "status": status,
    });
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let name = service.name_any();
    match timed(api.patch_status(&name, &params, &Patch::Apply(&patch))).await {
        Ok(stored) => {
            context.metrics.wrote("InferenceService");
            context.written.remember(&stored);
        }
        Err(kube::Error::Api(error)) if error.code == 404 => return Ok(()),
        Err(error) => return Err(ReconcileError::Status(error)),
    }
    publish_transition(service, &status, context).await;
    publish_decision(service, &status, context).await;
    Ok(())
}

/// An event for a new number of replicas, with the reason and its figures.
async fn publish_decision(
    service: &InferenceService,
    status: &InferenceServiceStatus,
    context: &Context,
) {
    let of = |status: Option<&InferenceServiceStatus>| status?.scaling.clone()?.last_decision;
    let (before, after) = (of(service.status.as_ref()), of(Some(status)));
    let Some(decision) = after.filter(|after| before.as_ref() != Some(after)) else {
        return;
    };
    let explanation = context
        .autoscaler
        .outcome(service)
        .and_then(|o| o.explanation);
    let note = explanation.unwrap_or_else(|| {
        format!(
            "from {} to {} replicas: {}",
            decision.from, decision.to, decision.reason
        )
    });
    tracing::info!(
        namespace = service.namespace(),
        service = service.name_any(),
        reason = decision.reason,
        note,
        "scaled"
    );
    let event = Event {
        type_: EventType::Normal,
        reason: if decision.to > decision.from {
            "ScaledUp"
        } else {
            "ScaledDown"
        }
        .into(),
        note: Some(note.chars().take(1000).collect()),
        action: "Scale".into(),
        secondary: None,
    };
    let about = service.object_ref(&());
    let published = context.events.publish(&event, &about);
    if let Err(error) = timed(published).await {
        tracing::warn!(%error, "cannot publish an event");
    }
}

async fn publish_transition(
    service: &InferenceService,
    status: &InferenceServiceStatus,
    context: &Context,
) {
    let of = |status: Option<&InferenceServiceStatus>| {
        let condition = status?.conditions.iter().find(|c| c.type_ == READY)?;
        Some((
            condition.status.clone(),
            condition.reason.clone(),
            condition.message.clone(),
        ))
    };
    let (before, after) = (of(service.status.as_ref()), of(Some(status)));
    let Some((ready, reason, message)) = after else {
        return;
    };
    if before.is_some_and(|(old_ready, old_reason, _)| old_ready == ready && old_reason == reason) {
        return;
    }
    tracing::info!(
        namespace = service.namespace(),
        service = service.name_any(),
        ready,
        reason,
        message,
        "readiness changed"
    );
    let event = Event {
        type_: if ready == "True" {
            EventType::Normal
        } else {
            EventType::Warning
        },
        reason,
        note: Some(message.chars().take(1000).collect()),
        action: "Reconcile".into(),
        secondary: None,
    };
    let about = service.object_ref(&());
    let published = context.events.publish(&event, &about);
    if let Err(error) = timed(published).await {
        tracing::warn!(%error, "cannot publish an event");
    }
}
