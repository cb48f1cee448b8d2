//! One step at a time.

#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;

pub(super) fn state(hash: &str, number: i64, replicas: i32, ready: i32) -> RevisionState {
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
