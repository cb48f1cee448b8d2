//! Whole rollouts, whatever happens in whatever order.

use proptest::prelude::*;

use super::{tests::state, *};

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
