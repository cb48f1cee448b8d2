//! What a user reads in `status`, for each situation.

use std::sync::Arc;

use ashlar_crds::{InferenceService, InferenceServiceStatus, ScalingDecision};
use ashlar_operator::autoscaler::Outcome;
use ashlar_operator::controller::{
    probe::Download,
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
    scaling: Option<Outcome>,
    /// Instead of what the spec and its status ask for.
    wanted: Option<i32>,
    host_conflict: Option<&'static str>,
    download: Option<Download>,
    largest_node: Option<f64>,
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
            scaling: None,
            wanted: None,
            host_conflict: None,
            download: None,
            largest_node: None,
            now: "2026-01-01T00:01:00Z".parse().unwrap(),
        }
    }

    fn status(&self) -> InferenceServiceStatus {
        let mut service = validated(&self.service);
        service.wanted = self.wanted.unwrap_or(service.wanted);
        compute(&Facts {
            service: &service,
            defaults: &defaults(),
            pods: &self.pods,
            newest: &self.newest,
            plan: &self.plan,
            refused: self.refused,
            outdated: false,
            gateway_endpoints: self.gateway_endpoints,
            keys: self.keys,
            scaling: self.scaling.as_ref(),
            host_conflict: self.host_conflict,
            download: self.download,
            resolved_revision: None,
            largest_node: self.largest_node,
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
fn a_pod_larger_than_any_node_says_so() {
    let words = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.";
    let mut scene = Scene::new("valid-mistral-gpu", &[unscheduled(words)]);
    scene.service.spec.parallelism.tensor = 8;
    scene.service.spec.resources = None;
    scene.largest_node = Some(4.0);
    let (_, message) = said(&scene.status(), "Ready");
    assert!(
        message.contains("needs 8 nvidia.com/gpu") && message.contains("has 4"),
        "{message}"
    );
    assert!(message.contains(words), "{message}");
}

#[test]
fn a_download_says_how_far_it_is() {
    let pulling = json!({"initContainerStatuses": [{"name": "pull", "image": "i", "imageID": "", "ready": false, "restartCount": 0, "state": {"running": {}}}]});
    let mut scene = Scene::new("valid-mistral-gpu", &[pulling]);
    scene.download = Some(Download {
        downloaded_bytes: 250,
        total_bytes: 1000,
    });
    let status = scene.status();
    let (verdict, message) = said(&status, "ModelReady");
    assert_eq!(verdict, "False ModelDownloading");
    assert!(message.contains("25 % (250 of 1000 bytes)"), "{message}");
    let model = status.model.clone().unwrap();
    assert_eq!(
        (model.downloaded_bytes, model.total_bytes),
        (Some(250), Some(1000))
    );
    // Loading after it: the bytes are all there. A later revision starts from nothing.
    let loading = json!({"containerStatuses": [{"name": "runtime", "image": "i", "imageID": "", "ready": false, "restartCount": 0, "state": {"running": {}}}]});
    let mut later = Scene::new("valid-mistral-gpu", &[loading]);
    later.service.status = Some(status);
    let model = later.status().model.unwrap();
    assert_eq!(
        (model.phase.as_str(), model.downloaded_bytes),
        ("Loading", Some(1000))
    );
    later.newest.hash = "89abcdef".into();
    assert_eq!(later.status().model.unwrap().total_bytes, None);
}

#[test]
fn a_host_of_another_service_is_said_and_the_rest_answers() {
    let mut scene = Scene::new("valid-smollm2", &[ready()]);
    scene.host_conflict = Some("host x belongs to InferenceService y");
    let status = scene.status();
    assert_eq!(said(&status, "EndpointReady").0, "False HostConflict");
    assert_eq!(said(&status, "Ready").0, "True Available");
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

fn outcome(desired: i32, blind: Option<&str>) -> Outcome {
    Outcome {
        desired,
        last: Some(ScalingDecision {
            from: 1,
            to: desired,
            reason: "QueueDepth".into(),
            ..ScalingDecision::default()
        }),
        explanation: Some(format!("from 1 to {desired} replicas: 23 requests wait")),
        blind: blind.map(str::to_owned),
    }
}

#[test]
fn a_scaled_service_says_what_was_decided_and_what_cannot_be_seen() {
    let mut scene = Scene::new("valid-mistral-gpu", &[ready()]);
    scene.scaling = Some(outcome(5, None));
    let status = scene.status();
    let (verdict, message) = said(&status, "ScalingReady");
    assert_eq!(verdict, "True Available");
    assert!(message.contains("23 requests wait"), "{message}");
    let decision = status.scaling.unwrap().last_decision.unwrap();
    assert_eq!((decision.to, decision.reason.as_str()), (5, "QueueDepth"));

    scene.scaling = Some(outcome(5, Some("0 of 1 ready pods have answered")));
    let (verdict, message) = said(&scene.status(), "ScalingReady");
    assert_eq!(verdict, "False MetricsUnavailable");
    assert!(message.contains("0 of 1"), "{message}");

    let fixed = Scene::new("valid-smollm2", &[ready()]).status();
    assert_eq!(said(&fixed, "ScalingReady").0, "True FixedReplicas");
    assert_eq!(fixed.scaling.unwrap().last_decision, None);
}

#[test]
fn a_service_that_slept_is_ready_while_it_wakes_unless_its_pods_cannot_start() {
    let mut scene = Scene::new("valid-mistral-gpu", &[ready()]);
    let scaling = scene.service.spec.scaling.as_mut().unwrap();
    scaling.min_replicas = 0;
    scene.service.status = Some(scene.status());
    let mut asleep = Scene::new("valid-mistral-gpu", &[]);
    asleep.service = scene.service.clone();
    asleep.wanted = Some(0);
    let status = asleep.status();
    let (verdict, message) = said(&status, "Ready");
    assert_eq!(verdict, "True ScaledToZero");
    assert!(message.contains("wakes the service"), "{message}");

    asleep.service.status = Some(status);
    asleep.wanted = Some(1);
    let waking = asleep.status();
    assert_eq!(said(&waking, "Ready").0, "True WakingUp");
    let mut stuck = Scene::new(
        "valid-mistral-gpu",
        &[unscheduled("Insufficient nvidia.com/gpu.")],
    );
    stuck.service = asleep.service.clone();
    stuck.service.status = Some(waking);
    stuck.wanted = Some(1);
    assert_eq!(said(&stuck.status(), "Ready").0, "False InsufficientGPU");
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
