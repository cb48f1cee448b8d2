//! What users are told: the status, written when it differs, and events when something turns.

use ashlar_crds::{
    InferenceService, InferenceServiceStatus,
    conditions::{ENDPOINT_READY, READY, WORKLOADS_READY},
    names::FIELD_MANAGER,
};
use kube::{
    Api, Resource as _, ResourceExt as _,
    api::{Patch, PatchParams},
};

use super::{Context, events::Event, timed};

/// Longest note of an event; the API server refuses more than 1024 bytes.
const MAX_NOTE_BYTES: usize = 1000;

/// Status could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write status: {0}")]
pub(crate) struct ReportError(#[source] kube::Error);

/// Writes the status if it differs, and events for what has turned.
pub(super) async fn write_status(
    service: &InferenceService,
    status: InferenceServiceStatus,
    context: &Context,
) -> Result<(), ReportError> {
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
        Err(error) => return Err(ReportError(error)),
    }
    let about = service.object_ref(&());
    let explanation = context
        .autoscaler
        .outcome(service)
        .and_then(|o| o.explanation);
    let scaled = scaling_event(service.status.as_ref(), &status, explanation);
    let turned = events(service.status.as_ref(), &status);
    for event in turned.into_iter().chain(scaled) {
        tracing::info!(
            namespace,
            service = name,
            reason = event.reason,
            note = event.note,
            "turned"
        );
        let published = context.events.publish(&event, &about);
        if let Err(error) = timed(published).await {
            tracing::warn!(%error, "cannot publish an event");
        }
    }
    Ok(())
}

/// One event for each condition whose status or reason has turned, one for each turn of a rollout; what is said already by
/// `Ready` is not said again.
fn events(before: Option<&InferenceServiceStatus>, after: &InferenceServiceStatus) -> Vec<Event> {
    let mut events: Vec<Event> = Vec::new();
    for kind in [READY, WORKLOADS_READY, ENDPOINT_READY] {
        let of = |status: &InferenceServiceStatus| {
            let condition = status.conditions.iter().find(|c| c.type_ == kind)?;
            Some((condition.status.clone(), condition.reason.clone()))
        };
        let Some(condition) = after.conditions.iter().find(|c| c.type_ == kind) else {
            continue;
        };
        let turned = before.and_then(of) != of(after);
        if turned && events.iter().all(|event| event.reason != condition.reason) {
            let ready = condition.status == "True";
            events.push(event(
                ready,
                &condition.reason,
                &condition.message,
                "Reconcile",
            ));
        }
    }
    let way = |status: &InferenceServiceStatus| {
        let rollout = status.revision.as_ref()?.rollout.clone()?;
        Some(rollout.split(':').next().unwrap_or_default().to_owned())
    };
    let rollout = after.revision.as_ref().and_then(|r| r.rollout.as_deref());
    if let Some(words) = rollout.filter(|_| before.and_then(way) != way(after)) {
        let halted = words.starts_with("Halted");
        events.push(event(!halted, "Rollout", words, "Rollout"));
    }
    events
}

/// An event for a new number of replicas, with the reason and its figures.
fn scaling_event(
    before: Option<&InferenceServiceStatus>,
    after: &InferenceServiceStatus,
    explanation: Option<String>,
) -> Option<Event> {
    let of = |status: &InferenceServiceStatus| status.scaling.clone()?.last_decision;
    let decision = of(after).filter(|decision| before.and_then(of).as_ref() != Some(decision))?;
    let note = explanation.unwrap_or_else(|| {
        format!(
            "from {} to {} replicas: {}",
            decision.from, decision.to, decision.reason
        )
    });
    let reason = if decision.to > decision.from {
        "ScaledUp"
    } else {
        "ScaledDown"
    };
    Some(event(true, reason, &note, "Scale"))
}

fn event(normal: bool, reason: &str, note: &str, action: &'static str) -> Event {
    Event {
        normal,
        reason: reason.to_owned(),
        note: note[..note.floor_char_boundary(MAX_NOTE_BYTES)].to_owned(),
        action,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use serde_json::{Value, json};

    use super::*;

    fn status(ready: Value, workloads: Value, rollout: Value) -> InferenceServiceStatus {
        let condition = |kind: &str, value: Value| json!({"type": kind, "status": value[0], "reason": value[1], "message": value[2], "lastTransitionTime": "2026-01-01T00:00:00Z"});
        serde_json::from_value(json!({
            "conditions": [condition("Ready", ready), condition("WorkloadsReady", workloads)],
            "revision": {"current": "b", "rollout": rollout},
        }))
        .unwrap()
    }

    fn said(
        before: Option<&InferenceServiceStatus>,
        after: &InferenceServiceStatus,
    ) -> Vec<String> {
        events(before, after)
            .into_iter()
            .map(|event| event.reason)
            .collect()
    }

    #[test]
    fn each_turn_is_told_once_and_progress_is_not() {
        let starting = status(
            json!(["False", "Starting", "0 of 1"]),
            json!(["False", "Starting", "0 of 1"]),
            Value::Null,
        );
        assert_eq!(said(None, &starting), ["Starting"]);
        let more = status(
            json!(["False", "Starting", "0 of 2"]),
            json!(["False", "Starting", "0 of 2"]),
            Value::Null,
        );
        assert!(said(Some(&starting), &more).is_empty());
        let rolling = status(
            json!(["True", "Available", ""]),
            json!(["False", "RollingOut", ""]),
            json!("Surge: why"),
        );
        assert_eq!(
            said(Some(&starting), &rolling),
            ["Available", "RollingOut", "Rollout"]
        );
        assert!(said(Some(&rolling), &rolling).is_empty());
    }
}
