//! Who goes when replicas go down: the pods with the fewest requests, by `controller.kubernetes.io/pod-deletion-cost`.
//!
//! Once per decision every pod of the revision is asked how busy it is, the answers are written as deletion costs, and the
//! replica count is lowered only after the watch has shown them: the ReplicaSet controller then ends the cheapest pods.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, ResourceExt as _,
    api::{Patch, PatchParams},
};

use super::{pods, probe, timed};

/// By which the ReplicaSet controller chooses.
pub(super) const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";
/// Cost of a pod that does not say how busy it is: unknown is not idle.
const UNKNOWN_COST: i32 = 1_000_000;
/// After this time costs are old: they are asked for again.
const FRESH: Duration = Duration::from_secs(3);
/// Decisions remembered at one time.
const MAX_DECISIONS: usize = 4096;

struct Decision {
    to: i32,
    made: Instant,
    /// Pod and the cost that was written.
    costs: Vec<(String, i32)>,
}

/// Decisions whose costs have been written, by Deployment.
#[derive(Default)]
pub(super) struct Victims(Mutex<HashMap<String, Decision>>);

/// A Deployment that is to have fewer replicas.
pub(super) struct Lowering<'a> {
    /// Namespace of its pods.
    pub(super) namespace: &'a str,
    /// Its name.
    pub(super) deployment: &'a str,
    /// Replicas that are to stay.
    pub(super) to: i32,
    /// Its pods, as the watch shows them.
    pub(super) pods: Vec<Arc<Pod>>,
}

impl Victims {
    /// True when the replica count may be lowered now; false when costs have just been written and are not seen yet.
    pub(super) async fn chosen(&self, client: &Client, lowering: &Lowering<'_>) -> bool {
        let staying = usize::try_from(lowering.to).unwrap_or(0);
        let ready: Vec<_> = lowering.pods.iter().filter(|p| pods::is_ready(p)).collect();
        // Pods that are not ready go first anyway, so there is a choice only when a ready one has to go.
        if staying == 0 || ready.len() <= staying {
            self.forget(lowering);
            return true;
        }
        match self.seen(lowering) {
            Some(true) => {
                self.forget(lowering);
                return true;
            }
            Some(false) => return false,
            None => {}
        }
        let api: Api<Pod> = Api::namespaced(client.clone(), lowering.namespace);
        let costs = join_all(ready.iter().map(|pod| write_cost(&api, pod))).await;
        self.remember(lowering, costs.into_iter().flatten().collect());
        false
    }

    /// Whether the watch shows the costs of this decision; none when there is no such decision, or an old one.
    fn seen(&self, lowering: &Lowering<'_>) -> Option<bool> {
        let decisions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let decision = decisions.get(&key(lowering))?;
        if decision.to != lowering.to || decision.made.elapsed() > FRESH {
            return None;
        }
        Some(decision.costs.iter().all(|(name, cost)| {
            let pod = lowering.pods.iter().find(|pod| pod.name_any() == *name);
            pod.is_none_or(|pod| pods::is_over(pod) || cost_of(pod) == Some(*cost))
        }))
    }

    fn remember(&self, lowering: &Lowering<'_>, costs: Vec<(String, i32)>) {
        let mut decisions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if decisions.len() >= MAX_DECISIONS {
            decisions.retain(|_, decision| decision.made.elapsed() <= FRESH);
        }
        let decision = Decision {
            to: lowering.to,
            made: Instant::now(),
            costs,
        };
        decisions.insert(key(lowering), decision);
    }

    fn forget(&self, lowering: &Lowering<'_>) {
        let mut decisions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        decisions.remove(&key(lowering));
    }
}

fn key(lowering: &Lowering<'_>) -> String {
    format!("{}/{}", lowering.namespace, lowering.deployment)
}

fn cost_of(pod: &Pod) -> Option<i32> {
    pod.annotations().get(DELETION_COST)?.parse().ok()
}

/// Asks one pod and writes what it says; none when the write failed, so that this pod is not waited for.
async fn write_cost(api: &Api<Pod>, pod: &Pod) -> Option<(String, i32)> {
    let busy = probe::in_flight(pod).await;
    #[allow(
        clippy::cast_possible_truncation,
        reason = "clamped to the range of costs"
    )]
    let cost = busy.map_or(UNKNOWN_COST, |n| {
        n.clamp(0.0, f64::from(UNKNOWN_COST)) as i32
    });
    let name = pod.name_any();
    if cost_of(pod) == Some(cost) {
        return Some((name, cost));
    }
    let patch = serde_json::json!({
        "metadata": {"uid": pod.uid(), "annotations": {DELETION_COST: cost.to_string()}}
    });
    let patched = timed(api.patch(&name, &PatchParams::default(), &Patch::Merge(patch))).await;
    match patched {
        Ok(_) => Some((name, cost)),
        Err(error) => {
            tracing::warn!(pod = name, %error, "cannot write a deletion cost");
            None
        }
    }
}
