//! What a user reads in `status`, for each situation.

use std::sync::Arc;

use ashlar_crds::{InferenceService, InferenceServiceStatus};
use ashlar_operator::autoscaler::Outcome;
use ashlar_operator::controller::{
    probe::Download,
    rollout::{RevisionState, RolloutPlan},
    status::{Facts, KeyAccess, blocked, compute},
};
use k8s_openapi::{api::core::v1::Pod, jiff::Timestamp};
use serde_json::{Value, json};

use crate::support::{defaults, example, validated};

mod scaling;

/// A situation: what `compute` looks at, with all in order until a test changes it.
struct Scene {
    service: InferenceService,
    pods: Vec<Arc<Pod>>,
    /// Pods of the Job that the newest revision waits for.
    pull_pods: Option<Vec<Arc<Pod>>>,
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
    pulled_bytes: Option<i64>,
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
            pull_pods: None,
            plan: RolloutPlan::default(),
            refused: None,
            gateway_endpoints: 2,
            keys: KeyAccess::Allowed,
            scaling: None,
            wanted: None,
            host_conflict: None,
            download: None,
            pulled_bytes: None,
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
            pull_pods: self.pull_pods.as_deref().unwrap_or_default(),
            filling: self.pull_pods.is_some(),
            newest: &self.newest,
            plan: &self.plan,
            refused: self.refused,
            outdated: false,
            gateway_endpoints: self.gateway_endpoints,
            keys: self.keys,
            scaling: self.scaling.as_ref(),
            host_conflict: self.host_conflict,
            has_http_routes: false,
            download: self.download,
            pulled_bytes: self.pulled_bytes,
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
    // One that was over before anybody asked still said how much it was.
    later.pulled_bytes = Some(700);
    let model = later.status().model.unwrap();
    assert_eq!(
        (model.downloaded_bytes, model.total_bytes),
        (Some(700), Some(700))
    );
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
    let quota = "pods \"p\" is forbidden: exceeded quota: team, requested: requests.nvidia.com/gpu=2, used: requests.nvidia.com/gpu=3, limited: requests.nvidia.com/gpu=4";
    scene.refused = Some(quota);
    let (verdict, message) = said(&scene.status(), "Ready");
    assert_eq!(verdict, "False QuotaExceeded");
    assert!(message.contains(quota), "{message}");
    scene.refused = Some("admission webhook denied the request");
    assert_eq!(said(&scene.status(), "Ready").0, "False PodForbidden");
}

/// What keeps a pod from serving, as the cluster shows it, and what the user reads: the reason, and the words that count.
#[test]
fn every_blocker_is_named_with_the_words_that_explain_it() {
    let container = |state: Value, last: Value, restarts: i32| {
        json!({"phase": "Running", "containerStatuses": [{
            "name": "runtime", "image": "registry/runtime:1", "imageID": "", "ready": false, "restartCount": restarts,
            "state": state, "lastState": last,
        }]})
    };
    let ended = |code: i32, reason: &str, words: &str| json!({"terminated": {"exitCode": code, "reason": reason, "message": words}});
    let waiting =
        |reason: &str, words: &str| json!({"waiting": {"reason": reason, "message": words}});
    let taints = "0/3 nodes are available: 3 node(s) had untolerated taint {dedicated: db}.";
    let cases = [
        (unscheduled(taints), "Unschedulable", taints),
        (
            container(
                waiting("ImagePullBackOff", "registry/runtime:1: not found"),
                json!({}),
                0,
            ),
            "ImagePullFailed",
            "registry/runtime:1: not found",
        ),
        (
            container(
                waiting(
                    "CreateContainerConfigError",
                    "secret \"hub-token\" not found",
                ),
                json!({}),
                0,
            ),
            "CrashLoop",
            "secret \"hub-token\" not found",
        ),
        (
            container(
                ended(1, "Error", "model.safetensors: truncated"),
                json!({}),
                0,
            ),
            "ModelLoadFailed",
            "truncated",
        ),
        (
            container(
                waiting("CrashLoopBackOff", "back-off 40s"),
                ended(101, "Error", "no kernel image for sm_70"),
                4,
            ),
            "CrashLoop",
            "no kernel image for sm_70",
        ),
        (
            container(
                waiting("CrashLoopBackOff", "back-off 10s"),
                ended(137, "OOMKilled", ""),
                2,
            ),
            "OutOfMemory",
            "spec.resources.limits.memory",
        ),
        (
            container(json!({"running": {}}), json!({}), 0),
            "ModelLoading",
            "loading the model",
        ),
    ];
    for (pod, reason, words) in cases {
        let status = Scene::new("valid-smollm2", &[pod]).status();
        for kind in ["Ready", "ModelReady", "WorkloadsReady"] {
            let (verdict, message) = said(&status, kind);
            assert_eq!(verdict, format!("False {reason}"), "{kind}");
            assert!(message.contains(words), "{kind}: {message}");
        }
    }
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

#[test]
fn a_claim_that_is_being_filled_says_how_far_its_job_is() {
    let mut scene = Scene::new("valid-s3", &[]);
    scene.pull_pods = Some(vec![]);
    let status = scene.status();
    let (reason, words) = said(&status, "WorkloadsReady");
    assert_eq!(reason, "False Starting");
    assert!(words.contains("Job qwen-pull-0123abcd"), "{words}");
    let pulling = |state: Value, restarts: i32| {
        let pod = json!({"metadata": {"name": "qwen-pull-x"}, "status": {
            "phase": "Running", "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [{"name": "pull", "image": "i", "imageID": "", "ready": true, "restartCount": restarts, "state": state}],
        }});
        Some(vec![Arc::new(serde_json::from_value::<Pod>(pod).unwrap())])
    };
    scene.pull_pods = pulling(json!({"running": {}}), 0);
    scene.download = Some(Download {
        downloaded_bytes: 250,
        total_bytes: 1000,
    });
    let status = scene.status();
    let (reason, words) = said(&status, "Ready");
    assert_eq!(reason, "False ModelDownloading");
    assert!(words.contains("25 %"), "{words}");
    let model = status.model.unwrap();
    assert_eq!(
        (model.phase.as_str(), model.downloaded_bytes),
        ("Downloading", Some(250))
    );
    scene.download = None;
    scene.pull_pods = pulling(
        json!({"terminated": {"exitCode": 1, "message": "the store has no such bucket"}}),
        2,
    );
    let (reason, words) = said(&scene.status(), "Ready");
    assert_eq!(reason, "False ModelDownloadFailed");
    assert!(words.contains("no such bucket"), "{words}");
}

#[test]
fn a_trial_gives_gateways_its_weight_and_its_end_is_explained() {
    let mut scene = Scene::new("valid-s3", &[ready()]);
    scene.plan.weight = Some(10);
    scene.plan.rollout = Some("Canary: revision 0123abcd gets 10 % of the requests".into());
    scene.plan.previous = Some(("aaaaaaaa".into(), 1));
    let status = scene.status();
    let revision = status.revision.clone().unwrap();
    assert_eq!(revision.canary.unwrap().weight_percent, 10);
    assert_eq!(said(&status, "Ready").0, "True Available");
    let (reason, words) = said(&status, "WorkloadsReady");
    assert_eq!(reason, "False RollingOut");
    assert!(words.contains("10 %"), "{words}");
    scene.newest.rolled_back = Some("9 of 100 requests failed, and 2 % may".into());
    scene.plan.halted = true;
    scene.plan.weight = Some(0);
    let status = scene.status();
    assert_eq!(
        status
            .revision
            .clone()
            .unwrap()
            .canary
            .unwrap()
            .weight_percent,
        0
    );
    assert_eq!(said(&status, "Ready").0, "True RevisionFailed");
    let (reason, words) = said(&status, "WorkloadsReady");
    assert_eq!(reason, "False RevisionFailed");
    assert!(words.contains("rolled back: 9 of 100"), "{words}");
}

#[test]
fn a_route_without_the_gateway_api_is_said_and_the_address_still_answers() {
    let mut scene = Scene::new("valid-keys", &[ready()]);
    scene.service.spec.endpoint.gateway_ref =
        Some(serde_json::from_value(json!({"name": "public"})).unwrap());
    let status = scene.status();
    let (reason, words) = said(&status, "EndpointReady");
    assert_eq!(reason, "False APINotInstalled");
    assert!(words.contains("gateway.networking.k8s.io"), "{words}");
    assert_eq!(said(&status, "Ready").0, "True Available");
}
