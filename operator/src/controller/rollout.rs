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
    /// Pods that are on a node.
    pub scheduled: i32,
    /// All its replicas were ready once.
    pub proven: bool,
    /// A pod has waited ten seconds for a node.
    pub unschedulable: bool,
    /// Its pods do not start: the words of the failure.
    pub failed: Option<String>,
    /// Its trial is over, and it takes over.
    pub promoted: bool,
    /// Its trial is over, and the revision before stays: why.
    pub rolled_back: Option<String>,
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
    /// Share of the requests that the newest revision gets, in percent, while it is on trial or was rolled back.
    pub weight: Option<i32>,
}

/// What a step depends on besides the revisions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Circumstances {
    /// Replicas wanted in all.
    pub wanted: i32,
    /// Whether a new pod may start before an old one ends.
    pub surge: Surge,
    /// How many pods more nodes have room for; none when that is not known.
    pub room: Option<i32>,
    /// This rollout has been going on in place.
    pub in_place: bool,
    /// The newest revision is on trial with so many percent of the requests.
    pub canary: Option<i32>,
}

/// Decides the next step.
///
/// Surge: one new pod more, and when it is ready one old pod less. In place: one old pod less, and when it is gone one
/// new pod more: never a pending pod. An old revision never gets more replicas, so that the two ways cannot take turns,
/// with two exceptions: a new revision that fails to start stops the rollout, and the one before serves again; and during a
/// trial the one before keeps its share of what is wanted, from zero too.
#[must_use]
pub fn plan(
    circumstances: &Circumstances,
    newest: &RevisionState,
    older: &[RevisionState],
) -> RolloutPlan {
    let plan = steps(circumstances, newest, older);
    match (circumstances.canary, &plan.previous) {
        (Some(weight), Some(_)) if !plan.halted => {
            on_trial(plan, circumstances, newest, older, weight)
        }
        _ => plan,
    }
}

/// A rollout goes on until the newest revision has its share of the replicas, and at least one old pod stays.
fn on_trial(
    mut plan: RolloutPlan,
    circumstances: &Circumstances,
    newest: &RevisionState,
    older: &[RevisionState],
    weight: i32,
) -> RolloutPlan {
    let wanted = circumstances.wanted;
    let share = (wanted.saturating_mul(weight) + 99) / 100;
    let share = share.clamp(1, (wanted - 1).max(1));
    plan.newest = plan.newest.min(share);
    let mut waking = false;
    if let Some((hash, old)) = &mut plan.previous {
        *old = (*old).max(wanted - share).max(wanted.min(1));
        let is = |other: &&RevisionState| other.hash == *hash;
        waking = older.iter().find(is).is_some_and(|r| r.replicas == 0);
    }
    if waking {
        // The place that is left, if it is one only, belongs to the revision that has proved itself.
        plan.newest = plan.newest.min(newest.replicas);
    }
    plan.weight = Some(weight);
    let hash = &newest.hash;
    let state = if wanted == 0 {
        "it goes on when requests come".to_owned()
    } else if newest.ready >= share {
        format!("revision {hash} gets {weight} % of the requests")
    } else if waking {
        "the revision before starts first".to_owned()
    } else if plan.newest == 0 {
        "no node has room for one pod more beside the last one".to_owned()
    } else {
        format!(
            "{} of {share} pods of revision {hash} are ready",
            newest.ready
        )
    };
    plan.rollout = Some(format!(
        "Canary: {state}; to decide by hand set annotation serving.ashlar.dev/canary to promote@{hash} or rollback@{hash}"
    ));
    plan
}

fn steps(
    circumstances: &Circumstances,
    newest: &RevisionState,
    older: &[RevisionState],
) -> RolloutPlan {
    let wanted = circumstances.wanted;
    let previous = older
        .iter()
        .filter(|r| {
            let back = newest.failed.is_some() || newest.rolled_back.is_some();
            let tried_against = circumstances.canary.is_some() && r.proven;
            r.replicas > 0 || r.pods > 0 || back || tried_against
        })
        .max_by_key(|r| {
            // Of those that serve, the last one: it has most pods by now.
            let proven = r.proven && (r.replicas == 0 || circumstances.canary.is_some());
            (r.ready > 0, r.replicas > 0, proven, r.number)
        });
    let Some(previous) = previous else {
        return RolloutPlan {
            newest: wanted,
            ..RolloutPlan::default()
        };
    };
    let step = |newest, old, rollout| RolloutPlan {
        newest,
        previous: Some((previous.hash.clone(), old)),
        rollout,
        ..RolloutPlan::default()
    };
    // Pods of every old revision hold their places until they are gone.
    let old_pods: i32 = older.iter().map(|r| r.pods).sum();
    let in_place = why_in_place(circumstances, newest, old_pods);
    if wanted == 0 {
        return step(0, 0, None);
    }
    if let Some(why) = &newest.rolled_back {
        return RolloutPlan {
            halted: true,
            weight: Some(0),
            ..step(0, wanted, Some(format!("Halted: {why}")))
        };
    }
    if let Some(failure) = &newest.failed {
        let back = wanted - newest.ready.min(wanted);
        let needs_place = in_place.is_some()
            || older.iter().any(|r| r.unschedulable)
            || finds_no_place(previous, back, circumstances.room);
        return RolloutPlan {
            halted: true,
            ..step(
                kept_of_failed(newest, needs_place),
                back,
                Some(format!("Halted: {failure}")),
            )
        };
    }
    let ready = newest.ready.min(wanted);
    if ready == wanted && old_pods == 0 {
        return step(wanted, 0, None);
    }
    if let Some(reason) = in_place {
        return step(
            // A place is free when its pod object is gone, not when it has been asked to go.
            (wanted - old_pods).max(ready).min(wanted),
            previous.replicas.min((wanted - ready - 1).max(0)),
            Some(format!("InPlace: {reason}")),
        );
    }
    let room = circumstances
        .room
        .filter(|_| circumstances.surge == Surge::Auto);
    let up =
        (wanted + 1 - old_pods).min(room.map_or(wanted, |room| newest.pods.saturating_add(room)));
    step(
        up.max(newest.replicas).clamp(0, wanted),
        previous.replicas.min(wanted - ready),
        Some("Surge: a new pod starts before an old one ends".to_owned()),
    )
}

/// The step while the newest revision's model is still on its way: it gets no replica more, and who serves goes on.
#[must_use]
pub fn wait(wanted: i32, newest: &RevisionState, older: &[RevisionState]) -> RolloutPlan {
    let kept = newest.replicas.min(wanted);
    let serving = older
        .iter()
        .filter(|r| r.replicas > 0 || r.pods > 0)
        .max_by_key(|r| (r.ready > 0, r.replicas > 0, r.number));
    RolloutPlan {
        newest: kept,
        previous: serving.map(|r| (r.hash.clone(), wanted - kept)),
        rollout: serving
            .map(|_| "Waiting: the model of the new revision is being downloaded".to_owned()),
        ..RolloutPlan::default()
    }
}

/// Why the rollout goes on in place; none when it surges.
fn why_in_place(
    circumstances: &Circumstances,
    newest: &RevisionState,
    old_pods: i32,
) -> Option<&'static str> {
    // The surge pod that exists has taken the room that was found for it.
    let surging = newest.pods > 0 && newest.pods + old_pods > circumstances.wanted;
    match circumstances.surge {
        Surge::Never => Some("surge is Never"),
        Surge::Auto if newest.unschedulable => Some("the scheduler finds no node for one pod more"),
        Surge::Auto if circumstances.in_place => Some("no node had room for one pod more"),
        Surge::Auto if !surging && circumstances.room.is_some_and(|room| room <= 0) => {
            Some("no node has room for one pod more")
        }
        Surge::Auto | Surge::Always => None,
    }
}

/// Whether the revision that serves again has fewer pods on nodes than it needs, and no other places are known for them. In
/// place this is always so, and it is seen without a memory of how the rollout went; after a surge all its pods are there.
fn finds_no_place(previous: &RevisionState, back: i32, room: Option<i32>) -> bool {
    back - previous.scheduled > room.unwrap_or(0).max(0)
}

/// Keeps one failing pod to look at while the old revision does not need its place.
fn kept_of_failed(newest: &RevisionState, needs_place: bool) -> i32 {
    if needs_place {
        newest.ready
    } else {
        newest.ready.max(1).min(newest.replicas)
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
            scheduled: replicas,
            ready,
            ..RevisionState::default()
        }
    }

    fn auto(wanted: i32, room: Option<i32>) -> Circumstances {
        Circumstances {
            wanted,
            room,
            ..Circumstances::default()
        }
    }

    fn never(wanted: i32) -> Circumstances {
        Circumstances {
            surge: Surge::Never,
            ..auto(wanted, None)
        }
    }

    #[test]
    fn the_first_revision_gets_all_replicas() {
        assert_eq!(
            plan(&auto(3, None), &RevisionState::default(), &[]).newest,
            3
        );
    }

    #[test]
    fn an_old_revision_without_pods_is_left_alone() {
        let plan = plan(&auto(2, None), &state("b", 2, 2, 1), &[state("a", 1, 0, 0)]);
        assert_eq!((plan.newest, plan.previous), (2, None));
    }

    #[test]
    fn surge_never_has_fewer_ready_pods_than_wanted() {
        let old = [state("a", 1, 2, 2)];
        let first = plan(&auto(2, Some(1)), &state("b", 2, 0, 0), &old);
        assert_eq!((first.newest, first.previous), (1, Some(("a".into(), 2))));
        // Its own pod has taken the room: that does not turn the rollout.
        let second = plan(&auto(2, Some(0)), &state("b", 2, 1, 1), &old);
        assert_eq!((second.newest, second.previous), (1, Some(("a".into(), 1))));
        assert!(second.rollout.unwrap().starts_with("Surge"));
    }

    #[test]
    fn without_room_an_old_pod_goes_first_and_room_it_leaves_does_not_bring_it_back() {
        let newest = state("b", 2, 0, 0);
        let start = plan(&auto(1, Some(0)), &newest, &[state("a", 1, 1, 1)]);
        assert_eq!((start.newest, start.previous), (0, Some(("a".into(), 0))));
        assert!(start.rollout.unwrap().starts_with("InPlace"));
        let half = RevisionState {
            pods: 1,
            ..state("a", 1, 1, 1)
        };
        for in_place in [false, true] {
            let circumstances = Circumstances {
                in_place,
                ..auto(2, Some(1))
            };
            let next = plan(&circumstances, &newest, std::slice::from_ref(&half));
            assert_eq!((next.newest, next.previous), (1, Some(("a".into(), 1))));
        }
    }

    #[test]
    fn in_place_waits_until_the_old_pod_is_gone() {
        let going = RevisionState {
            pods: 1,
            replicas: 0,
            ..state("a", 1, 0, 0)
        };
        let waiting = plan(&never(1), &state("b", 2, 0, 0), &[going]);
        assert_eq!(
            (waiting.newest, waiting.previous),
            (0, Some(("a".into(), 0)))
        );
        assert_eq!(
            plan(&never(1), &state("b", 2, 0, 0), &[state("a", 1, 0, 0)]).newest,
            1
        );
    }

    #[test]
    fn a_surge_pod_without_a_node_turns_the_rollout_to_in_place() {
        let stuck = RevisionState {
            unschedulable: true,
            ..state("b", 2, 1, 0)
        };
        let plan = plan(&auto(1, None), &stuck, &[state("a", 1, 1, 1)]);
        assert_eq!((plan.newest, plan.previous), (0, Some(("a".into(), 0))));
        assert!(plan.rollout.unwrap().contains("InPlace"));
    }

    #[test]
    fn a_failed_revision_halts_and_the_old_one_serves_again() {
        let failed = RevisionState {
            failed: Some("exit 1".into()),
            ..state("b", 2, 1, 0)
        };
        let serving = plan(&auto(2, None), &failed, &[state("a", 1, 2, 2)]);
        assert_eq!(
            (serving.previous, serving.halted),
            (Some(("a".into(), 2)), true)
        );
        let in_place = Circumstances {
            in_place: true,
            ..auto(1, Some(0))
        };
        for circumstances in [never(1), in_place] {
            let gone = plan(&circumstances, &failed, &[state("a", 1, 0, 0)]);
            assert_eq!(
                (gone.newest, gone.previous, gone.halted),
                (0, Some(("a".into(), 1)), true)
            );
        }
    }

    #[test]
    fn a_failing_pod_stays_only_where_the_old_revision_does_not_need_its_place() {
        let failed = RevisionState {
            failed: Some("exit 1".into()),
            ..state("b", 2, 1, 0)
        };
        let waiting = |unschedulable| RevisionState {
            scheduled: 0,
            unschedulable,
            ..state("a", 1, 1, 0)
        };
        // How the rollout went is forgotten in all of these.
        for (wanted, room, old, kept) in [
            (1, None, state("a", 1, 0, 0), 0),
            (1, Some(0), state("a", 1, 0, 0), 0),
            (2, None, state("a", 1, 1, 1), 0),
            (1, Some(0), waiting(false), 0),
            // The room was not for this pod.
            (1, Some(1), waiting(true), 0),
            (1, Some(1), waiting(false), 1),
            (1, Some(1), state("a", 1, 0, 0), 1),
            (2, Some(1), state("a", 1, 0, 0), 0),
            // It surged: the old revision has all its pods, even if one is not ready just now.
            (1, None, state("a", 1, 1, 1), 1),
            (2, Some(0), state("a", 1, 2, 1), 1),
        ] {
            let what = format!("{wanted} wanted, room for {room:?}, {old:?}");
            let plan = plan(&auto(wanted, room), &failed, &[old]);
            assert_eq!(
                (plan.newest, plan.previous, plan.halted),
                (kept, Some(("a".into(), wanted)), true),
                "{what}"
            );
        }
    }

    #[test]
    fn a_revert_goes_back_to_the_old_revision_at_once() {
        let failing = RevisionState {
            failed: Some("exit 1".into()),
            ..state("b", 2, 1, 0)
        };
        let back = plan(&auto(2, Some(0)), &state("a", 3, 2, 2), &[failing]);
        assert_eq!(
            (back.newest, back.previous, back.halted),
            (2, Some(("b".into(), 0)), false)
        );
    }

    fn trial(wanted: i32, room: i32, weight: i32) -> Circumstances {
        Circumstances {
            canary: Some(weight),
            ..auto(wanted, Some(room))
        }
    }

    #[test]
    fn a_canary_stops_at_its_share_of_the_replicas() {
        let old = |replicas| [state("a", 1, replicas, replicas)];
        let half = plan(&trial(8, 1, 50), &state("b", 2, 4, 4), &old(4));
        assert_eq!(
            (half.newest, half.previous, half.weight),
            (4, Some(("a".into(), 4)), Some(50))
        );
        let words = half.rollout.unwrap();
        assert!(
            words.starts_with("Canary") && words.contains("promote@b"),
            "{words}"
        );
        // A smaller weight gives replicas back, a promotion goes on from there.
        let less = plan(&trial(8, 1, 10), &state("b", 2, 4, 4), &old(4));
        assert_eq!((less.newest, less.previous), (1, Some(("a".into(), 7))));
        let promoted = plan(&auto(8, Some(1)), &state("b", 2, 4, 4), &old(4));
        assert!(promoted.newest == 5 && promoted.weight.is_none());
    }

    #[test]
    fn the_last_old_pod_stays_while_its_successor_is_on_trial() {
        let old = [state("a", 1, 1, 1)];
        let with_room = plan(&trial(1, 1, 10), &state("b", 2, 0, 0), &old);
        assert_eq!(
            (with_room.newest, with_room.previous),
            (1, Some(("a".into(), 1)))
        );
        let without = plan(&trial(1, 0, 10), &state("b", 2, 0, 0), &old);
        assert_eq!(
            (without.newest, without.previous),
            (0, Some(("a".into(), 1)))
        );
        assert!(without.rollout.unwrap().contains("no node has room"));
    }

    #[test]
    fn a_trial_outlasts_a_sleep_and_the_proven_revision_wakes_first() {
        let old = |replicas| RevisionState {
            proven: true,
            ..state("a", 1, replicas, replicas)
        };
        let never_served = state("z", 2, 0, 0);
        let parts = |plan: RolloutPlan| (plan.newest, plan.previous, plan.weight);
        // The last pods of a service that goes to sleep decide nothing.
        let asleep = plan(&trial(0, 1, 10), &state("b", 3, 1, 1), &[old(1)]);
        assert_eq!(parts(asleep), (0, Some(("a".into(), 0)), Some(10)));
        let older = |replicas| [old(replicas), never_served.clone()];
        let still = plan(&trial(0, 1, 10), &state("b", 3, 0, 0), &older(0));
        assert!(still.rollout.as_ref().unwrap().contains("goes on when"));
        assert_eq!(parts(still), (0, Some(("a".into(), 0)), Some(10)));
        for (wanted, kept) in [(1, 1), (4, 3)] {
            let waking = plan(&trial(wanted, 4, 10), &state("b", 3, 0, 0), &older(0));
            assert_eq!(parts(waking), (0, Some(("a".into(), kept)), Some(10)));
            let woken = plan(&trial(wanted, 4, 10), &state("b", 3, 0, 0), &older(kept));
            assert_eq!(parts(woken), (1, Some(("a".into(), kept)), Some(10)));
        }
    }

    #[test]
    fn a_trial_is_against_the_proven_revision_and_a_failure_goes_back_to_it() {
        let proven = |replicas| RevisionState {
            proven: true,
            ..state("a", 1, replicas, replicas)
        };
        let tried = |replicas| state("b", 2, replicas, replicas);
        let previous = |circumstances: &Circumstances, newest: &RevisionState, older: &[_]| {
            plan(circumstances, newest, older)
                .previous
                .map(|(hash, _)| hash)
        };
        let next = state("c", 3, 0, 0);
        let serving = [proven(3), tried(1)];
        assert_eq!(
            previous(&trial(4, 1, 10), &next, &serving),
            Some("a".into())
        );
        // Without a trial the one that took over goes on serving.
        let serving = [proven(1), tried(3)];
        assert_eq!(
            previous(&auto(4, Some(1)), &next, &serving),
            Some("b".into())
        );
        let failed = RevisionState {
            failed: Some("exit 1".into()),
            ..next
        };
        let gone = [proven(0), tried(0)];
        assert_eq!(
            previous(&auto(4, Some(1)), &failed, &gone),
            Some("a".into())
        );
    }

    #[test]
    fn a_rollback_gives_everything_to_the_revision_before() {
        let back = RevisionState {
            rolled_back: Some("9 of 100 requests failed".into()),
            ..state("b", 2, 2, 2)
        };
        let plan = plan(&auto(4, Some(1)), &back, &[state("a", 1, 2, 2)]);
        assert_eq!(
            (plan.newest, plan.previous, plan.weight, plan.halted),
            (0, Some(("a".into(), 4)), Some(0), true)
        );
        assert!(plan.rollout.unwrap().contains("9 of 100"));
    }

    #[test]
    fn while_the_model_is_on_its_way_the_old_revision_serves_all() {
        let old = [state("a", 1, 2, 2), state("z", 0, 0, 0)];
        let waiting = wait(3, &state("b", 2, 0, 0), &old);
        assert_eq!(
            (waiting.newest, waiting.previous),
            (0, Some(("a".into(), 3)))
        );
        assert!(waiting.rollout.unwrap().starts_with("Waiting"));
        // A first revision waits without a rollout, and one that has pods keeps them.
        assert_eq!(wait(2, &state("b", 2, 0, 0), &[]), RolloutPlan::default());
        assert_eq!(wait(2, &state("b", 2, 1, 1), &[]).newest, 1);
    }

    /// A cluster with so many places, played one event at a time.
    struct Cluster {
        places: i32,
        newest: RevisionState,
        old: RevisionState,
        /// Pods of the newest revision crash instead of becoming ready.
        bad: bool,
    }

    impl Cluster {
        fn new(places: i32, wanted: i32, bad: bool) -> Self {
            Self {
                places,
                newest: state("b", 2, 0, 0),
                old: state("a", 1, wanted, wanted),
                bad,
            }
        }

        fn free(&self) -> i32 {
            self.places - self.newest.scheduled - self.old.scheduled
        }

        /// Takes the plan's counts; replicas are pods at once, and pods of the newest that are too many go at once.
        fn ask(&mut self, plan: &RolloutPlan) {
            self.newest.replicas = plan.newest;
            self.old.replicas = plan.previous.as_ref().map_or(0, |(_, replicas)| *replicas);
            self.newest.pods = self.newest.replicas;
            self.newest.scheduled = self.newest.scheduled.min(self.newest.pods);
            self.newest.ready = self.newest.ready.min(self.newest.pods);
            self.old.pods = self.old.pods.max(self.old.replicas);
            self.old.ready = self.old.ready.min(self.old.replicas);
        }

        /// The `event`-th kind of thing happens next.
        fn happen(&mut self, event: u8) {
            let (free, newest, old) = (self.free(), &mut self.newest, &mut self.old);
            match event % EVENTS {
                0 => {
                    old.pods = (old.pods - 1).max(old.replicas);
                    old.scheduled = old.scheduled.min(old.pods);
                }
                1 if newest.scheduled < newest.pods && free > 0 => newest.scheduled += 1,
                2 if newest.ready < newest.scheduled && self.bad => {
                    newest.failed = Some("exit 1".into());
                }
                2 if newest.ready < newest.scheduled => newest.ready += 1,
                3 if old.scheduled < old.pods && free > 0 => old.scheduled += 1,
                4 if old.ready < old.scheduled.min(old.replicas) => old.ready += 1,
                _ => {}
            }
            let waits = self.newest.scheduled < self.newest.pods && self.free() <= 0;
            self.newest.unschedulable = waits && event % EVENTS == 5;
        }
    }

    /// Kinds of events.
    const EVENTS: u8 = 6;

    /// Each kind of event in turn, long enough for anything to end.
    fn orderly() -> impl Iterator<Item = u8> {
        (0..60).flat_map(|_| 0..EVENTS)
    }

    proptest! {
        /// Whatever room there is and in whatever order things happen: every rollout ends; with surge the ready pods never
        /// fall below what is wanted; in place they are never more than one below; there is never more than one pod too many.
        #[test]
        fn rollouts_end_and_serve_all_along(
            wanted in 1..6i32,
            spare in 0..3i32,
            known in any::<bool>(),
            surge in prop::sample::select(vec![Surge::Auto, Surge::Never]),
            events in prop::collection::vec(any::<u8>(), 400),
        ) {
            let mut cluster = Cluster::new(wanted + spare, wanted, false);
            let mut in_place = false;
            for event in events.into_iter().chain(orderly()) {
                let room = known.then(|| (cluster.free() - (cluster.newest.pods - cluster.newest.scheduled)).max(0));
                let now = Circumstances { wanted, surge, room, in_place, canary: None };
                let plan = plan(&now, &cluster.newest, std::slice::from_ref(&cluster.old));
                let rollout = plan.rollout.clone().unwrap_or_default();
                in_place |= rollout.starts_with("InPlace");
                prop_assert!(!plan.halted);
                cluster.ask(&plan);
                prop_assert!(cluster.newest.replicas + cluster.old.replicas <= wanted + 1);
                let serving = cluster.newest.ready.min(plan.newest) + cluster.old.ready.min(cluster.old.replicas);
                prop_assert!(serving >= wanted - i32::from(in_place), "{serving} of {wanted} serve");
                prop_assert!(!known || surge == Surge::Never || spare == 0 || serving >= wanted, "there was room");
                cluster.happen(event);
            }
            prop_assert_eq!((cluster.newest.ready, cluster.old.pods), (wanted, 0));
        }

        /// A bad revision, whatever room there is, whether or not it is known at each step, and with nothing remembered but the
        /// last status: in the end the old revision serves all again, without any pod having waited long enough to be called
        /// unschedulable; and where it surged, it served all along and the failing pod is still there to be looked at.
        #[test]
        fn a_bad_revision_gives_the_old_one_its_places_back(
            wanted in 1..6i32,
            spare in 0..3i32,
            surge in prop::sample::select(vec![Surge::Auto, Surge::Never, Surge::Always]),
            events in prop::collection::vec(any::<u8>(), 200),
        ) {
            // With `Always` and no room the new pod waits for ever, as asked.
            let spare = if surge == Surge::Always { spare.max(1) } else { spare };
            let mut cluster = Cluster::new(wanted + spare, wanted, true);
            let (mut status, mut gave_up) = (String::new(), false);
            for event in events.into_iter().chain(orderly()) {
                let room = (event < 128).then(|| cluster.free().max(0));
                let in_place = status.starts_with("InPlace");
                gave_up |= in_place;
                let now = Circumstances { wanted, surge, room, in_place, canary: None };
                let plan = plan(&now, &cluster.newest, std::slice::from_ref(&cluster.old));
                status = plan.rollout.clone().unwrap_or_default();
                cluster.ask(&plan);
                prop_assert!(cluster.old.ready >= wanted || gave_up || status.starts_with("InPlace"));
                cluster.happen(event);
            }
            prop_assert!(status.starts_with("Halted"), "{status}");
            prop_assert_eq!(cluster.old.ready, wanted);
            prop_assert!(gave_up || cluster.newest.scheduled == 1);
        }

        /// On trial the newest revision never gets more than its share of the replicas, the old one keeps the rest and at least
        /// one, and there is never more than one pod too many.
        #[test]
        fn a_trial_stays_within_its_share(
            wanted in 1..12i32,
            weight in 1..100i32,
            old in 1..12i32,
            new in 0..12i32,
            room in prop::option::of(0..3i32),
            surge in prop::sample::select(vec![Surge::Auto, Surge::Never, Surge::Always]),
        ) {
            let (old, new) = (old.min(wanted), new.min(wanted));
            let now = Circumstances { wanted, surge, room, in_place: false, canary: Some(weight) };
            let plan = plan(&now, &state("b", 2, new, new), &[state("a", 1, old, old)]);
            let share = ((wanted * weight + 99) / 100).clamp(1, (wanted - 1).max(1));
            let kept = plan.previous.map_or(0, |(_, replicas)| replicas);
            prop_assert_eq!(plan.weight, Some(weight));
            prop_assert!(plan.newest <= share, "{} of {share}", plan.newest);
            prop_assert!(kept >= (wanted - share).max(1), "{kept} old ones of {wanted}");
            prop_assert!(plan.newest + kept <= wanted.max(old + new) + 1);
        }
    }
}
