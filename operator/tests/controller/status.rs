//! What a user reads in `status`, for each situation.

use std::sync::Arc;

use ashlar_crds::{InferenceService, InferenceServiceStatus};
use ashlar_operator::controller::{
    rollout::{RevisionState, RolloutPlan},
    status::{Facts, KeyAccess, blocked, compute},
};
use k8s_openapi::{api::core::v1::Pod, jiff::Timestamp};
use serde_json::{Value, json};

use crate::support::{defaults, example, validated};

/// A situation: what `compute` looks at, with all in order until a test changes it.
struct Scene {
    service: InferenceService,
    pods: Vec<Arc<Pod>>,
    newest: RevisionState,
    plan: RolloutPlan,
    refused: Option<&'static str>,
    gateway_endpoints: usize,
    keys: KeyAccess,
    now: Timestamp,
}

impl Scene {
    fn new(name: &str, pods: &[Value]) -> Self {
        let pods: Vec<Arc<Pod>> = pods
            .iter()
            .map(|status| {
                let pod = json!({"metadata": {"name": "p", "creationTimestamp": "2026-01-01T00:00:00Z"}, "status": status});
                Arc::new(serde_json::from_value(pod).unwrap())
            })
            .collect();
        let ready = pods
            .iter()
            .filter(|pod| ashlar_operator::controller::pods::is_ready(pod))
            .count();
        let count = |n: usize| i32::try_from(n).unwrap();
        Self {
            service: example(name),
            newest: RevisionState {
                hash: "0123abcd".into(),
                pods: count(pods.len()),
                ready: count(ready),
                ..RevisionState::default()
            },
            pods,
            plan: RolloutPlan::default(),
            refused: None,
            gateway_endpoints: 2,
            keys: KeyAccess::Allowed,
            now: "2026-01-01T00:01:00Z".parse().unwrap(),
        }
    }

    fn status(&self) -> InferenceServiceStatus {
        compute(&Facts {
            service: &validated(&self.service),
            defaults: &defaults(),
            pods: &self.pods,
            newest: &self.newest,
            plan: &self.plan,
            refused: self.refused,
            outdated: false,
            gateway_endpoints: self.gateway_endpoints,
            keys: self.keys,
            now: self.now,
        })
    }
}

/// `status reason` of a condition, and its message.
fn said(status: &InferenceServiceStatus, kind: &str) -> (String, String) {
    let condition = status.conditions.iter().find(|c| c.type_ == kind).unwrap();
    (
        format!("{} {}", condition.status, condition.reason),
        condition.message.clone(),
    )
}

fn ready() -> Value {
    json!({"conditions": [{"type": "Ready", "status": "True"}]})
}

fn unscheduled(message: &str) -> Value {
    json!({"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}]})
}

#[test]
fn a_service_whose_pods_answer() {
    let scene = Scene::new("valid-smollm2", &[ready()]);
    insta::assert_yaml_snapshot!(scene.status());
}

#[test]
fn a_service_that_has_just_been_applied() {
    let scene = Scene::new("valid-smollm2", &[]);
    insta::assert_yaml_snapshot!(scene.status());
}

#[test]
fn the_same_situation_later_is_the_same_status() {
    let mut scene = Scene::new("valid-smollm2", &[ready()]);
    let first = scene.status();
    scene.service.status = Some(first.clone());
    scene.now = "2026-01-02T00:00:00Z".parse().unwrap();
    assert_eq!(scene.status(), first);
    // A condition that turns gets the time of turning; others keep theirs.
    scene.gateway_endpoints = 0;
    let later = scene.status();
    let time = |kind: &str| {
        let condition = later.conditions.iter().find(|c| c.type_ == kind).unwrap();
        condition.last_transition_time.0
    };
    assert_eq!(time("EndpointReady"), scene.now);
    assert_ne!(time("WorkloadsReady"), scene.now);
}

#[test]
fn missing_gpus_are_named_in_the_schedulers_words() {
    let words = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.";
    let status = Scene::new("valid-mistral-gpu", &[unscheduled(words)]).status();
    for kind in ["Ready", "WorkloadsReady"] {
        let (verdict, message) = said(&status, kind);
        assert_eq!(verdict, "False InsufficientGPU");
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn unreadable_keys_come_with_the_command_that_mends_them() {
    let mut scene = Scene::new("valid-keys", &[ready(), ready()]);
    scene.keys = KeyAccess::Denied;
    let status = scene.status();
    let (verdict, message) = said(&status, "EndpointReady");
    assert_eq!(verdict, "False KeysUnreadable");
    assert!(
        message.contains("ashlar-operator grant chat/assistant"),
        "{message}"
    );
    assert_eq!(said(&status, "Ready").0, "False KeysUnreadable");
    assert_eq!(said(&status, "WorkloadsReady").0, "True Available");
}

#[test]
fn pods_that_admission_refuses_are_no_mystery() {
    let mut scene = Scene::new("valid-smollm2", &[]);
    scene.refused =
        Some("violates PodSecurity \"restricted\": hostPath volumes (volume \"model\")");
    assert_eq!(
        said(&scene.status(), "WorkloadsReady").0,
        "False CacheForbidden"
    );
    scene.refused = Some("exceeded quota: pods");
    let (verdict, message) = said(&scene.status(), "Ready");
    assert_eq!(verdict, "False PodForbidden");
    assert!(message.contains("exceeded quota: pods"), "{message}");
}

#[test]
fn a_failed_revision_does_not_hide_that_the_old_one_serves() {
    let mut scene = Scene::new("valid-smollm2", &[ready()]);
    scene.newest.ready = 0;
    scene.newest.failed = Some("container runtime crashed 3 times: bad weights".into());
    scene.plan = RolloutPlan {
        previous: Some(("89abcdef".into(), 1)),
        rollout: Some("Halted: bad weights".into()),
        halted: true,
        ..RolloutPlan::default()
    };
    let status = scene.status();
    assert_eq!(said(&status, "Ready").0, "True RevisionFailed");
    let (verdict, message) = said(&status, "WorkloadsReady");
    assert_eq!(verdict, "False RevisionFailed");
    assert!(message.contains("bad weights"), "{message}");
    assert_eq!(
        status.revision.unwrap().previous.as_deref(),
        Some("89abcdef")
    );
}

#[test]
fn zero_replicas_are_ready_only_after_the_model_was() {
    let mut scene = Scene::new("valid-smollm2", &[ready()]);
    let before = scene.status();
    scene = Scene::new("valid-smollm2", &[]);
    scene.service.spec.replicas = 0;
    assert_eq!(said(&scene.status(), "Ready").0, "False ScaledToZero");
    scene.service.status = Some(before);
    assert_eq!(said(&scene.status(), "Ready").0, "True ScaledToZero");
}

#[test]
fn scaling_is_not_pretended() {
    let status = Scene::new("valid-mistral-gpu", &[ready()]).status();
    let (verdict, message) = said(&status, "ScalingReady");
    assert!(verdict.starts_with("False "), "{verdict}");
    assert!(message.contains("keeps 1 replicas"), "{message}");
    let fixed = Scene::new("valid-smollm2", &[ready()]).status();
    assert_eq!(said(&fixed, "ScalingReady").0, "True FixedReplicas");
}

#[test]
fn a_spec_that_cannot_be_built_leaves_what_serves_serving() {
    let mut service = example("valid-smollm2");
    let now = "2026-01-01T00:00:00Z".parse().unwrap();
    let status = blocked(&service, "InvalidSpec", "spec.template: no", now);
    assert_eq!(
        said(&status, "Ready"),
        ("False InvalidSpec".into(), "spec.template: no".into())
    );
    service.status = Some(Scene::new("valid-smollm2", &[ready()]).status());
    let status = blocked(&service, "InvalidSpec", "spec.template: no", now);
    assert_eq!(said(&status, "Ready").0, "True InvalidSpec");
    assert!(status.url.is_some());
}
