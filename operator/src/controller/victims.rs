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
use crate::model_tls::Trust;

/// By which the ReplicaSet controller chooses.
pub(super) const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";
/// Cost of a pod that does not say how busy it is: unknown is not idle.
const UNKNOWN_COST: i32 = 1_000_000;
/// After this time costs are old: they are asked for again.
const FRESH: Duration = Duration::from_secs(3);
/// Decisions remembered at one time.
const MAX_DECISIONS: usize = 4096;

/// What was written for one lowering, valid for that one alone: a Deployment's generation grows with each new replica count,
/// and pods are told apart by uid.
struct Decision {
    generation: i64,
    to: i32,
    made: Instant,
    /// Uid of each pod that was ready, and the cost that was written; none where the write failed.
    costs: Vec<(String, Option<i32>)>,
}

/// What to do about a lowering.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The least busy pods are known to the cluster.
    Lower,
    /// Costs are written, and not seen yet.
    Wait,
    /// Ask the pods how busy they are.
    Ask,
}

/// Decisions whose costs have been written, by Deployment.
pub(super) struct Victims {
    decisions: Mutex<HashMap<String, Decision>>,
    trust: Arc<Trust>,
}

/// A Deployment that is to have fewer replicas.
pub(super) struct Lowering<'a> {
    /// Namespace of its pods.
    pub(super) namespace: &'a str,
    /// Its name.
    pub(super) deployment: &'a str,
    /// Its generation, as the watch shows it.
    pub(super) generation: i64,
    /// Replicas that are to stay.
    pub(super) to: i32,
    /// Its pods, as the watch shows them.
    pub(super) pods: Vec<Arc<Pod>>,
}

impl Lowering<'_> {
    fn ready(&self) -> impl Iterator<Item = &Arc<Pod>> {
        self.pods.iter().filter(|pod| pods::is_ready(pod))
    }
}

impl Victims {
    /// Nothing decided yet; `trust` knows pods with TLS.
    pub(super) fn new(trust: Arc<Trust>) -> Self {
        Self {
            decisions: Mutex::default(),
            trust,
        }
    }

    /// True when the replica count may be lowered now; false when costs have just been written and are not seen yet.
    pub(super) async fn chosen(&self, client: &Client, lowering: &Lowering<'_>) -> bool {
        match self.step(lowering, Instant::now()) {
            Step::Lower => true,
            Step::Wait => false,
            Step::Ask => {
                let api: Api<Pod> = Api::namespaced(client.clone(), lowering.namespace);
                let made = Instant::now();
                let asked = lowering.ready();
                let costs = asked.map(|pod| write_cost(&api, pod, &self.trust));
                let costs = join_all(costs).await;
                self.remember(lowering, made, costs);
                false
            }
        }
    }

    fn step(&self, lowering: &Lowering<'_>, now: Instant) -> Step {
        let staying = usize::try_from(lowering.to).unwrap_or(0);
        // Pods that are not ready go first anyway, so there is a choice only when a ready one has to go.
        if staying == 0 || lowering.ready().count() <= staying {
            return Step::Lower;
        }
        let decisions = self
            .decisions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let Some(decision) = decisions.get(&key(lowering)) else {
            return Step::Ask;
        };
        // A decision stays until another takes its place: a reconcile that comes before the watch shows the lower count
        // must find the decision that was acted upon, not make a second one for the next lowering to trip over.
        let of_this = decision.generation == lowering.generation && decision.to == lowering.to;
        let fresh = now.saturating_duration_since(decision.made) <= FRESH;
        let asked = |pod: &Pod| {
            let uid = pod.metadata.uid.as_deref();
            decision.costs.iter().find(|(of, _)| Some(&**of) == uid)
        };
        if !of_this || !fresh || lowering.ready().any(|pod| asked(pod).is_none()) {
            return Step::Ask;
        }
        let shown =
            |pod: &Pod| asked(pod).is_none_or(|(_, cost)| cost.is_none() || cost_of(pod) == *cost);
        if lowering.ready().all(|pod| shown(pod)) {
            Step::Lower
        } else {
            Step::Wait
        }
    }

    fn remember(&self, lowering: &Lowering<'_>, made: Instant, costs: Vec<(String, Option<i32>)>) {
        let mut decisions = self
            .decisions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if decisions.len() >= MAX_DECISIONS {
            decisions.retain(|_, decision| decision.made.elapsed() <= FRESH);
        }
        let decision = Decision {
            generation: lowering.generation,
            to: lowering.to,
            made,
            costs,
        };
        decisions.insert(key(lowering), decision);
    }
}

fn key(lowering: &Lowering<'_>) -> String {
    format!("{}/{}", lowering.namespace, lowering.deployment)
}

fn cost_of(pod: &Pod) -> Option<i32> {
    pod.annotations().get(DELETION_COST)?.parse().ok()
}

/// Asks one pod and writes what it says: its uid, and the cost; no cost when the write failed, so that it is not waited for.
async fn write_cost(api: &Api<Pod>, pod: &Pod, trust: &Arc<Trust>) -> (String, Option<i32>) {
    let busy = probe::in_flight(pod, trust).await;
    #[allow(
        clippy::cast_possible_truncation,
        reason = "clamped to the range of costs"
    )]
    let cost = busy.map_or(UNKNOWN_COST, |n| {
        n.clamp(0.0, f64::from(UNKNOWN_COST)) as i32
    });
    let uid = pod.uid().unwrap_or_default();
    if cost_of(pod) == Some(cost) {
        return (uid, Some(cost));
    }
    let patch = serde_json::json!({
        "metadata": {"uid": uid, "annotations": {DELETION_COST: cost.to_string()}}
    });
    let name = pod.name_any();
    let patched = timed(api.patch(&name, &PatchParams::default(), &Patch::Merge(patch))).await;
    match patched {
        Ok(_) => (uid, Some(cost)),
        Err(error) => {
            tracing::warn!(pod = name, %error, "cannot write a deletion cost");
            (uid, None)
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn pod(uid: &str, cost: Option<i32>) -> Arc<Pod> {
        let annotations = cost.map(|cost| json!({DELETION_COST: cost.to_string()}));
        let pod = json!({
            "metadata": {"name": uid, "uid": uid, "annotations": annotations},
            "status": {"conditions": [{"type": "Ready", "status": "True"}]},
        });
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    fn lowering(generation: i64, pods: &[(&str, Option<i32>)]) -> Lowering<'static> {
        Lowering {
            namespace: "a",
            deployment: "s-0",
            generation,
            to: 2,
            pods: pods.iter().map(|(uid, cost)| pod(uid, *cost)).collect(),
        }
    }

    fn wrote(costs: &[(&str, i32)]) -> Vec<(String, Option<i32>)> {
        let owned = |(uid, cost): &(&str, i32)| ((*uid).to_owned(), Some(*cost));
        costs.iter().map(owned).collect()
    }

    #[test]
    fn a_decision_is_acted_upon_once_it_is_seen_and_only_for_its_own_lowering() {
        let (victims, now) = (Victims::new(Trust::none()), Instant::now());
        let blank = lowering(7, &[("x", None), ("y", None), ("z", None)]);
        assert_eq!(victims.step(&blank, now), Step::Ask);
        victims.remember(&blank, now, wrote(&[("x", 1), ("y", 0), ("z", 2)]));
        assert_eq!(victims.step(&blank, now), Step::Wait);
        let seen = lowering(7, &[("x", Some(1)), ("y", Some(0)), ("z", Some(2))]);
        assert_eq!(victims.step(&seen, now), Step::Lower);
        // The watch does not show the lower count yet: the same decision, not a new one.
        assert_eq!(victims.step(&seen, now), Step::Lower);
        // Up and down again within the time that costs are fresh.
        let again = lowering(9, &[("x", Some(1)), ("z", Some(2)), ("new", None)]);
        assert_eq!(victims.step(&again, now), Step::Ask);
        let same_pods = lowering(9, &[("x", Some(1)), ("y", Some(0)), ("z", Some(2))]);
        assert_eq!(victims.step(&same_pods, now), Step::Ask);
        // A pod that became ready meanwhile has not been asked.
        let more = lowering(7, &[("x", Some(1)), ("y", Some(0)), ("late", None)]);
        assert_eq!(victims.step(&more, now), Step::Ask);
        assert_eq!(
            victims.step(&seen, now + FRESH + Duration::from_millis(1)),
            Step::Ask
        );
    }

    #[test]
    fn there_is_no_choice_when_all_go_or_no_ready_one_has_to() {
        let (victims, now) = (Victims::new(Trust::none()), Instant::now());
        let two = lowering(1, &[("x", None), ("y", None)]);
        assert_eq!(victims.step(&two, now), Step::Lower);
        let none_stay = Lowering {
            to: 0,
            ..lowering(1, &[("x", None), ("y", None), ("z", None)])
        };
        assert_eq!(victims.step(&none_stay, now), Step::Lower);
    }

    proptest! {
        /// Replicas go from three to two and back, again and again; between two rounds the loads change, and a reconcile
        /// sees the Deployment and the pods late or in time: whoever goes had the lowest load when it was decided.
        #[test]
        fn the_victim_is_the_least_busy_however_late_watches_are(
            rounds in prop::collection::vec((prop::array::uniform3(0..9i32), prop::collection::vec(any::<u8>(), 1..12)), 1..8),
        ) {
            let (victims, now) = (Victims::new(Trust::none()), Instant::now());
            let mut costs: Vec<(String, Option<i32>)> = (0..3).map(|n| (format!("p{n}"), None)).collect();
            for (round, (loads, lags)) in rounds.iter().enumerate() {
                let generation = i64::try_from(round).unwrap() * 2 + 1;
                let before = costs.clone();
                let mut lowered = false;
                for lag in lags.iter().chain([&0, &0, &0]) {
                    // An odd one sees pods as they were; one of a multiple of three goes on after the count was lowered.
                    let shown = if lag % 2 == 1 { &before } else { &costs };
                    let seen: Vec<_> = shown.iter().map(|(uid, cost)| (uid.as_str(), *cost)).collect();
                    let look = lowering(generation, &seen);
                    match victims.step(&look, now) {
                        Step::Ask => {
                            for ((_, cost), load) in costs.iter_mut().zip(loads) {
                                *cost = Some(*load);
                            }
                            victims.remember(&look, now, costs.clone());
                        }
                        Step::Wait => {}
                        Step::Lower => {
                            let written: Vec<_> = costs.iter().map(|(_, cost)| *cost).collect();
                            let asked: Vec<_> = loads.iter().map(|load| Some(*load)).collect();
                            prop_assert_eq!(written, asked, "costs of another round");
                            lowered = true;
                            if lag % 3 != 0 {
                                break;
                            }
                        }
                    }
                }
                prop_assert!(lowered);
                let gone = (0..3).min_by_key(|n| costs[*n].1).unwrap();
                costs[gone] = (format!("p{round}-{gone}"), None);
            }
        }
    }
}
