//! Room by nodes, pods, claims and quotas.
#![allow(clippy::unwrap_used, reason = "tests")]

use serde_json::json;

use super::*;

fn node(name: &str, gpus: i32) -> Event<Node> {
    Event::Apply(
        serde_json::from_value(json!({
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
            "status": {
                "allocatable": {"cpu": "4", "memory": "8Gi", "pods": "10", "nvidia.com/gpu": gpus.to_string()},
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        }))
        .unwrap(),
    )
}

fn pod(uid: &str, node: Option<&str>, gpus: i32, phase: &str) -> Event<BoundPod> {
    Event::Apply(
        serde_json::from_value(json!({
            "metadata": {"uid": uid},
            "spec": {"nodeName": node, "containers": [{"resources": {"limits": {"nvidia.com/gpu": gpus.to_string()}}}]},
            "status": {"phase": phase},
        }))
        .unwrap(),
    )
}

fn asks(gpus: i32) -> PodSpec {
    serde_json::from_value(json!({"containers": [
        {"name": "runtime", "resources": {"requests": {"cpu": "500m"}, "limits": {"nvidia.com/gpu": gpus.to_string()}}}
    ]}))
    .unwrap()
}

fn known(capacity: &Capacity) {
    capacity.node(Event::InitDone);
    capacity.pod(Event::InitDone);
}

#[test]
fn a_gpu_is_free_when_no_bound_living_pod_has_it() {
    let capacity = Capacity::default();
    assert_eq!(
        capacity.room("a/s", "a", &asks(1), 9),
        None,
        "not listed yet"
    );
    capacity.node(node("n1", 2));
    capacity.node(node("n2", 1));
    known(&capacity);
    assert_eq!(capacity.room("a/s", "a", &asks(1), 9), Some(3));
    assert_eq!(capacity.room("a/s", "a", &asks(1), 2), Some(2));
    // Two GPUs of two nodes are not two GPUs of one pod.
    assert_eq!(capacity.room("a/s", "a", &asks(2), 9), Some(1));
    capacity.pod(pod("p", Some("n1"), 1, "Running"));
    capacity.pod(pod("waiting", None, 1, "Pending"));
    assert_eq!(capacity.room("a/s", "a", &asks(2), 9), Some(0));
    capacity.pod(pod("p", Some("n1"), 1, "Succeeded"));
    assert_eq!(capacity.room("a/s", "a", &asks(2), 9), Some(1));
    assert_eq!(capacity.largest("nvidia.com/gpu"), Some(2.0));
}

#[test]
fn claims_of_others_are_taken_and_end() {
    let capacity = Capacity::default();
    capacity.node(node("n1", 1));
    known(&capacity);
    capacity.claim("a/s", &asks(1), 1);
    assert_eq!(capacity.room("a/s", "a", &asks(1), 9), Some(1), "one's own");
    assert_eq!(capacity.room("b/t", "b", &asks(1), 9), Some(0));
    capacity.claim("a/s", &asks(1), 0);
    assert_eq!(capacity.room("b/t", "b", &asks(1), 9), Some(1));
}

#[test]
fn a_quota_leaves_no_room_on_free_nodes() {
    let capacity = Capacity::default();
    capacity.node(node("n1", 8));
    known(&capacity);
    let quota = json!({
        "metadata": {"namespace": "a", "name": "q"},
        "status": {"hard": {"requests.nvidia.com/gpu": "3"}, "used": {"requests.nvidia.com/gpu": "2"}},
    });
    capacity.quota(Event::Apply(serde_json::from_value(quota).unwrap()));
    assert_eq!(capacity.room("a/s", "a", &asks(1), 9), Some(1));
    assert_eq!(capacity.room("a/s", "a", &asks(2), 9), Some(0));
    assert_eq!(capacity.room("b/s", "b", &asks(2), 9), Some(4));
}

#[test]
fn a_pod_that_a_new_listing_does_not_show_is_gone() {
    let capacity = Capacity::default();
    capacity.node(node("n1", 1));
    capacity.pod(pod("p", Some("n1"), 1, "Running"));
    known(&capacity);
    assert_eq!(capacity.room("a/s", "a", &asks(1), 9), Some(0));
    capacity.pod(Event::Init);
    capacity.pod(Event::InitDone);
    assert_eq!(capacity.room("a/s", "a", &asks(1), 9), Some(1));
}
