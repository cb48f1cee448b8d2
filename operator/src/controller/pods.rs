//! What pods say of themselves: ready, starting, or blocked, and by what. Pure.

use ashlar_crds::{
    conditions::reason,
    names::{PULL_CONTAINER, RUNTIME_CONTAINER},
};
use k8s_openapi::{
    api::core::v1::{ContainerState, ContainerStateWaiting, ContainerStatus, Pod},
    jiff::Timestamp,
};
use kube::ResourceExt as _;

/// Crashes after which a start counts as failed.
pub const MAX_CRASHES: i32 = 3;
/// Seconds that a pod may wait for a node before that counts.
const UNSCHEDULABLE_AFTER_SECONDS: i64 = 10;
/// Longest part of a container's last words that status repeats.
const LAST_WORDS: usize = 512;

/// Conditions of pods that anything here looks at.
pub(super) const TELLING_CONDITIONS: [&str; 2] = [READY, SCHEDULED];
const READY: &str = "Ready";
const SCHEDULED: &str = "PodScheduled";

/// Why a pod is not ready.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Blocker {
    /// How bad: the worst of a service's blockers is shown.
    pub severity: u8,
    /// CamelCase, from `conditions::reason`.
    pub reason: &'static str,
    /// What is known, and what to do.
    pub message: String,
}

fn blocker(severity: u8, reason: &'static str, message: impl Into<String>) -> Blocker {
    Blocker {
        severity,
        reason,
        message: message.into(),
    }
}

/// True when the pod answers and is not going away.
#[must_use]
pub fn is_ready(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_none()
        && condition(pod, READY).is_some_and(|c| c.0 == "True")
}

/// True when the pod is over, whether it ended by itself, was evicted or is on its way out.
#[must_use]
pub fn is_over(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some() || has_ended(pod)
}

/// True when the pod's containers run no more and never will, as after an eviction: it holds no place on a node.
#[must_use]
pub fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    matches!(phase, Some("Failed" | "Succeeded"))
}

/// True when the pod is on a node.
#[must_use]
pub fn is_scheduled(pod: &Pod) -> bool {
    condition(pod, SCHEDULED).is_some_and(|c| c.0 == "True")
}

/// True while the pod's first step fetches the model.
#[must_use]
pub fn is_downloading(pod: &Pod) -> bool {
    !is_over(pod)
        && statuses(pod).any(|status| {
            let running = status.state.as_ref().is_some_and(|s| s.running.is_some());
            status.name == PULL_CONTAINER && running
        })
}

/// True when the pod has waited so long for a node that a rollout should not count on one.
#[must_use]
pub fn is_unschedulable(pod: &Pod, now: Timestamp) -> bool {
    let waiting = pod
        .creation_timestamp()
        .is_some_and(|at| now.as_second() - at.0.as_second() >= UNSCHEDULABLE_AFTER_SECONDS);
    waiting && condition(pod, SCHEDULED).is_some_and(|c| c.0 == "False" && c.1 == "Unschedulable")
}

/// The words of a failed start: enough crashes, or no answer within `startup_timeout` seconds of being scheduled.
#[must_use]
pub fn failed_start(pod: &Pod, startup_timeout: i64, now: Timestamp) -> Option<String> {
    if is_ready(pod) || pod.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let crashed = statuses(pod).find(|s| s.restart_count >= MAX_CRASHES);
    if let Some(status) = crashed {
        return Some(format!(
            "container {} crashed {} times: {}",
            status.name,
            status.restart_count,
            last_words(status)
        ));
    }
    let started = pod.status.as_ref()?.start_time.as_ref()?.0;
    (now.as_second() - started.as_second() > startup_timeout).then(|| {
        format!(
            "pod {} was not ready within {startup_timeout} s",
            pod.name_any()
        )
    })
}

/// Why this pod is not ready; none when it is.
#[must_use]
pub fn why_not_ready(pod: &Pod) -> Option<Blocker> {
    if is_ready(pod) {
        return None;
    }
    why_waiting(pod)
}

/// What a pod waits for, whatever its readiness says: one that only downloads is ready all along. None when it has ended.
#[must_use]
pub fn why_waiting(pod: &Pod) -> Option<Blocker> {
    if has_ended(pod) {
        return None;
    }
    if pod.metadata.deletion_timestamp.is_some() {
        return Some(blocker(
            1,
            reason::DRAINING,
            "a pod finishes its running requests",
        ));
    }
    if let Some((_, _, message)) = condition(pod, SCHEDULED).filter(|c| c.0 == "False") {
        // Only extended resources, such as nvidia.com/gpu, have a slash in their name.
        let gpu = message
            .split("Insufficient ")
            .skip(1)
            .filter_map(|rest| rest.split_whitespace().next())
            .any(|resource| resource.contains('/'));
        let reason = if gpu {
            reason::INSUFFICIENT_GPU
        } else {
            reason::UNSCHEDULABLE
        };
        return Some(blocker(
            7,
            reason,
            format!("no node takes pod {}: {message}", pod.name_any()),
        ));
    }
    statuses(pod)
        .filter_map(|status| container_blocker(pod, status))
        .max()
        .or_else(|| {
            Some(blocker(
                1,
                reason::STARTING,
                format!("pod {} is being created", pod.name_any()),
            ))
        })
}

/// Admission or quota lets no pod be created: its own words say why.
#[must_use]
pub fn refused(words: &str) -> Blocker {
    let reason = if words.contains("exceeded quota") {
        reason::QUOTA_EXCEEDED
    } else if words.contains("hostPath") {
        reason::CACHE_FORBIDDEN
    } else {
        reason::POD_FORBIDDEN
    };
    blocker(8, reason, format!("no pod can be created: {words}"))
}

/// A Job has yet to say how far it is.
#[must_use]
pub fn filling(job: &str) -> Blocker {
    let message = format!("Job {job} downloads the model before there are pods");
    blocker(1, reason::STARTING, message)
}

fn container_blocker(pod: &Pod, status: &ContainerStatus) -> Option<Blocker> {
    let pull = status.name == PULL_CONTAINER;
    let state = status.state.as_ref();
    let exit = state.and_then(|s| s.terminated.as_ref()).or(status
        .last_state
        .as_ref()
        .and_then(|s| s.terminated.as_ref()));
    if exit.is_some_and(|t| t.reason.as_deref() == Some("OOMKilled")) && !status.ready {
        return Some(blocker(
            8,
            reason::OUT_OF_MEMORY,
            format!(
                "container {} of pod {} was killed for memory (restarts: {}); raise spec.resources.limits.memory or lower --max-model-len",
                status.name,
                pod.name_any(),
                status.restart_count
            ),
        ));
    }
    let waiting = state.and_then(|s| s.waiting.as_ref());
    if let Some(waits) = waiting.and_then(|waiting| why_it_waits(status, waiting)) {
        return Some(waits);
    }
    if let Some(exit) = exit.filter(|t| t.exit_code != 0) {
        let reason = if pull {
            reason::MODEL_DOWNLOAD_FAILED
        } else if status.restart_count >= MAX_CRASHES {
            reason::CRASH_LOOP
        } else {
            reason::MODEL_LOAD_FAILED
        };
        return Some(blocker(
            6,
            reason,
            format!(
                "container {} of pod {} ended with code {}: {}",
                status.name,
                pod.name_any(),
                exit.exit_code,
                last_words(status)
            ),
        ));
    }
    let running = state.is_some_and(|s| s.running.is_some());
    if pull && running {
        return Some(blocker(
            3,
            reason::MODEL_DOWNLOADING,
            "the model is being downloaded",
        ));
    }
    (status.name == RUNTIME_CONTAINER && running)
        .then(|| blocker(2, reason::MODEL_LOADING, "the engine is loading the model"))
}

/// What keeps a container from being started, if it is not just its turn.
fn why_it_waits(status: &ContainerStatus, waiting: &ContainerStateWaiting) -> Option<Blocker> {
    let why = waiting.reason.as_deref().unwrap_or_default();
    let message = waiting.message.as_deref().unwrap_or_default();
    match why {
        "ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull" => {
            Some(blocker(
                7,
                reason::IMAGE_PULL_FAILED,
                // The image may be the container's own or the model's, mounted as a volume: the kubelet's words name it.
                format!(
                    "an image of container {} ({}) cannot be pulled: {}",
                    status.name,
                    status.image,
                    if message.is_empty() { why } else { message }
                ),
            ))
        }
        "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError" => {
            Some(blocker(
                7,
                reason::CRASH_LOOP,
                format!("container {} cannot start: {message}", status.name),
            ))
        }
        _ => None,
    }
}

fn statuses(pod: &Pod) -> impl Iterator<Item = &ContainerStatus> {
    let status = pod.status.as_ref();
    let init = status.and_then(|s| s.init_container_statuses.as_ref());
    let main = status.and_then(|s| s.container_statuses.as_ref());
    init.into_iter().flatten().chain(main.into_iter().flatten())
}

fn condition<'a>(pod: &'a Pod, kind: &str) -> Option<(&'a str, &'a str, &'a str)> {
    let condition = pod
        .status
        .as_ref()?
        .conditions
        .as_ref()?
        .iter()
        .find(|c| c.type_ == kind)?;
    Some((
        &condition.status,
        condition.reason.as_deref().unwrap_or_default(),
        condition.message.as_deref().unwrap_or_default(),
    ))
}

/// The end of what a container said before it ended.
fn last_words(status: &ContainerStatus) -> String {
    let ended = |state: &Option<ContainerState>| {
        state
            .as_ref()
            .and_then(|s| s.terminated.as_ref())
            .and_then(|t| t.message.clone())
    };
    let words = ended(&status.state)
        .or_else(|| ended(&status.last_state))
        .unwrap_or_default();
    let words = words.trim();
    let skip = words.chars().count().saturating_sub(LAST_WORDS);
    if words.is_empty() {
        "it said nothing".to_owned()
    } else {
        words.chars().skip(skip).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use serde_json::json;

    use super::*;

    fn pod(status: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p", "creationTimestamp": "2026-01-01T00:00:00Z"}, "status": status})).unwrap()
    }

    fn reason_of(status: serde_json::Value) -> &'static str {
        why_not_ready(&pod(status)).unwrap().reason
    }

    fn container(name: &str, state: serde_json::Value, restarts: i32) -> serde_json::Value {
        json!({"containerStatuses": [{"name": name, "image": "i", "imageID": "", "ready": false, "restartCount": restarts, "state": state}]})
    }

    #[test]
    fn each_blocker_has_its_reason() {
        assert_eq!(
            reason_of(
                json!({"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes: Insufficient nvidia.com/gpu"}]})
            ),
            reason::INSUFFICIENT_GPU
        );
        for message in ["taint", "0/1 nodes are available: 1 Insufficient cpu."] {
            assert_eq!(
                reason_of(
                    json!({"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}]})
                ),
                reason::UNSCHEDULABLE
            );
        }
        let waiting =
            json!({"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}});
        assert_eq!(
            reason_of(container("runtime", waiting, 0)),
            reason::IMAGE_PULL_FAILED
        );
        assert_eq!(
            reason_of(container("runtime", json!({"running": {}}), 0)),
            reason::MODEL_LOADING
        );
        assert_eq!(
            reason_of(container("pull", json!({"running": {}}), 0)),
            reason::MODEL_DOWNLOADING
        );
        let ended = |code: i32, reason: &str| json!({"terminated": {"exitCode": code, "reason": reason, "message": "bad weights"}});
        assert_eq!(
            reason_of(container("runtime", ended(1, "Error"), 1)),
            reason::MODEL_LOAD_FAILED
        );
        assert_eq!(
            reason_of(container("runtime", ended(1, "Error"), 3)),
            reason::CRASH_LOOP
        );
        assert_eq!(
            reason_of(container("pull", ended(1, "Error"), 1)),
            reason::MODEL_DOWNLOAD_FAILED
        );
        assert_eq!(
            reason_of(container("runtime", ended(137, "OOMKilled"), 1)),
            reason::OUT_OF_MEMORY
        );
        assert!(
            why_not_ready(&pod(container("runtime", ended(1, "Error"), 1)))
                .unwrap()
                .message
                .contains("bad weights")
        );
    }

    #[test]
    fn a_pod_of_a_job_downloads_although_it_is_ready() {
        let running = json!({
            "phase": "Running", "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [{"name": "pull", "image": "i", "imageID": "", "ready": true, "restartCount": 0, "state": {"running": {}}}],
        });
        assert_eq!(why_not_ready(&pod(running.clone())), None);
        let waiting = why_waiting(&pod(running)).unwrap();
        assert_eq!(waiting.reason, reason::MODEL_DOWNLOADING);
        assert_eq!(why_waiting(&pod(json!({"phase": "Succeeded"}))), None);
    }

    #[test]
    fn a_ready_pod_has_no_blocker_and_a_silent_one_fails_by_time() {
        assert_eq!(
            why_not_ready(&pod(
                json!({"conditions": [{"type": "Ready", "status": "True"}]})
            )),
            None
        );
        let slow = pod(json!({"startTime": "2026-01-01T00:00:00Z"}));
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        assert_eq!(failed_start(&slow, 60, at("2026-01-01T00:00:59Z")), None);
        assert!(
            failed_start(&slow, 60, at("2026-01-01T00:01:01Z"))
                .unwrap()
                .contains("60 s")
        );
    }
}
