//! How replicas move from old revisions to the newest: counts of at most two Deployments. Pure.

use ashlar_crds::Surge;

/// What is known of one revision's pods.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RevisionState {
    /// Its hash.
    pub hash: String,
    /// Order of creation.
    pub number: i64,
    /// Replicas that its Deployment asks for now.
    pub replicas: i32,
    /// Pod objects, terminating ones included.
    pub pods: i32,
    /// Pods that are ready and not terminating.
    pub ready: i32,
    /// All its replicas were ready once.
    pub proven: bool,
    /// A pod has waited ten seconds for a node.
    pub unschedulable: bool,
    /// Its pods do not start: the words of the failure.
    pub failed: Option<String>,
}

/// What to ask of the Deployments.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RolloutPlan {
    /// Replicas of the newest revision.
    pub newest: i32,
    /// Hash and replicas of the revision that it replaces, while that has any.
    pub previous: Option<(String, i32)>,
    /// `Surge` or `InPlace`, with the reason, while a rollout is under way.
    pub rollout: Option<String>,
    /// The newest revision has failed while an older one exists: the old one serves.
    pub halted: bool,
}

/// Decides the next step.
///
/// Surge: one new pod more, and when it is ready one old pod less. In place: one old pod less, and when it is gone one
/// new pod more: never a pending pod. A revision that fails to start stops the rollout, and the one before serves again.
#[must_use]
pub fn plan(
    wanted: i32,
    surge: Surge,
    newest: &RevisionState,
    older: &[RevisionState],
) -> RolloutPlan {
    let previous = older
        .iter()
        .filter(|r| r.replicas > 0 || r.pods > 0 || newest.failed.is_some())
        .max_by_key(|r| (r.ready > 0, r.replicas > 0, r.number));
    let Some(previous) = previous else {
        return RolloutPlan {
            newest: wanted,
            ..RolloutPlan::default()
        };
    };
    if wanted == 0 {
        return RolloutPlan {
            newest: 0,
            previous: Some((previous.hash.clone(), 0)),
            ..RolloutPlan::default()
        };
    }
    let in_place = match surge {
        Surge::Never => Some("surge is Never"),
        Surge::Auto if newest.unschedulable => Some("no node has room for one pod more"),
        Surge::Auto | Surge::Always => None,
    };
    if let Some(failure) = &newest.failed {
        // Keep one failing pod to look at where there is room for it; otherwise give its place back.
        let newest_keeps = if in_place.is_some() {
            newest.ready
        } else {
            newest.ready.max(1).min(newest.replicas)
        };
        return RolloutPlan {
            newest: newest_keeps,
            previous: Some((previous.hash.clone(), wanted - newest.ready.min(wanted))),
            rollout: Some(format!("Halted: {failure}")),
            halted: true,
        };
    }
    let ready = newest.ready.min(wanted);
    if ready == wanted && previous.pods == 0 {
        return RolloutPlan {
            newest: wanted,
            previous: Some((previous.hash.clone(), 0)),
            ..RolloutPlan::default()
        };
    }
    if let Some(reason) = in_place {
        let old = (wanted - ready - 1).max(0);
        // A place is free when its pod object is gone, not when it has been asked to go.
        let places = wanted - previous.pods.min(wanted);
        return RolloutPlan {
            newest: places.max(ready).min(wanted),
            previous: Some((previous.hash.clone(), old)),
            rollout: Some(format!("InPlace: {reason}")),
            halted: false,
        };
    }
    RolloutPlan {
        newest: (ready + 1).min(wanted).max(newest.replicas.min(wanted)),
        previous: Some((previous.hash.clone(), wanted - ready)),
        rollout: Some("Surge: a new pod starts before an old one ends".to_owned()),
        halted: false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    fn state(hash: &str, number: i64, replicas: i32, ready: i32) -> RevisionState {
        RevisionState {
            hash: hash.into(),
            number,
            replicas,
            pods: replicas,
            ready,
            ..RevisionState::default()
        }
    }

    #[test]
    fn the_first_revision_gets_all_replicas() {
        assert_eq!(
            plan(3, Surge::Auto, &RevisionState::default(), &[]).newest,
            3
        );
    }

    #[test]
    fn an_old_revision_without_pods_is_left_alone() {
        let plan = plan(2, Surge::Auto, &state("b", 2, 2, 1), &[state("a", 1, 0, 0)]);
        assert_eq!((plan.newest, plan.previous), (2, None));
    }

    #[test]
    fn surge_never_has_fewer_ready_pods_than_wanted() {
        let old = state("a", 1, 2, 2);
        let first = plan(
            2,
            Surge::Auto,
            &state("b", 2, 0, 0),
            std::slice::from_ref(&old),
        );
        assert_eq!((first.newest, first.previous), (1, Some(("a".into(), 2))));
        let second = plan(2, Surge::Auto, &state("b", 2, 1, 1), &[old]);
        assert_eq!((second.newest, second.previous), (2, Some(("a".into(), 1))));
    }

    #[test]
    fn in_place_waits_until_the_old_pod_is_gone() {
        let going = RevisionState {
            pods: 1,
            replicas: 0,
            ..state("a", 1, 0, 0)
        };
        let waiting = plan(1, Surge::Never, &state("b", 2, 0, 0), &[going]);
        assert_eq!(
            (waiting.newest, waiting.previous),
            (0, Some(("a".into(), 0)))
        );
        let gone = plan(
            1,
            Surge::Never,
            &state("b", 2, 0, 0),
            &[state("a", 1, 0, 0)],
        );
        assert_eq!(gone.newest, 1);
    }

    #[test]
    fn a_surge_pod_without_a_node_turns_the_rollout_to_in_place() {
        let stuck = RevisionState {
            unschedulable: true,
            ..state("b", 2, 1, 0)
        };
        let plan = plan(1, Surge::Auto, &stuck, &[state("a", 1, 1, 1)]);
        assert_eq!((plan.newest, plan.previous), (0, Some(("a".into(), 0))));
        assert!(plan.rollout.unwrap().contains("InPlace"));
    }

    #[test]
    fn a_failed_revision_halts_and_the_old_one_serves_again() {
        let failed = RevisionState {
            failed: Some("exit 1".into()),
            ..state("b", 2, 1, 0)
        };
        let serving = plan(2, Surge::Auto, &failed, &[state("a", 1, 2, 2)]);
        assert_eq!(
            (serving.previous, serving.halted),
            (Some(("a".into(), 2)), true)
        );
        let gone = plan(1, Surge::Never, &failed, &[state("a", 1, 0, 0)]);
        assert_eq!(
            (gone.newest, gone.previous, gone.halted),
            (0, Some(("a".into(), 1)), true)
        );
    }

    proptest! {
        /// Played against pods that become ready and go away, every rollout ends, and with surge the ready pods never
        /// fall below what is wanted.
        #[test]
        fn rollouts_end(wanted in 1..6i32, never in any::<bool>()) {
            let surge = if never { Surge::Never } else { Surge::Auto };
            let mut newest = state("b", 2, 0, 0);
            let mut old = state("a", 1, wanted, wanted);
            for step in 0..100 {
                let plan = plan(wanted, surge, &newest, &[old.clone()]);
                let old_wanted = plan.previous.clone().map_or(0, |(_, replicas)| replicas);
                prop_assert!(never || newest.ready + old.ready >= wanted);
                prop_assert!(plan.newest + old_wanted <= wanted + i32::from(!never));
                if plan.newest == wanted && newest.ready == wanted && old.pods == 0 {
                    return Ok(());
                }
                // One thing happens at a time: a pod leaves, or a pod becomes ready.
                newest.replicas = plan.newest;
                old.replicas = old_wanted;
                old.ready = old.ready.min(old_wanted);
                if step % 2 == 0 { old.pods = (old.pods - 1).max(old_wanted) } else {
                    newest.pods = plan.newest;
                    newest.ready = (newest.ready + 1).min(plan.newest);
                }
            }
            prop_assert!(false, "did not end");
        }
    }
}
