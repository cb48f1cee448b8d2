//! Which replica takes the next request: the one with the fewest open requests, ties by lot. Pure.

use std::sync::Arc;

use rand::Rng;

use super::snapshot::Replica;

/// Picks the least loaded replica that is not excluded; among equals each is as likely as the others.
///
/// `excluded` holds the incarnations that already failed this request. `None` means that no replica is left.
pub fn pick<'a>(
    replicas: &'a [Arc<Replica>],
    excluded: &[String],
    rng: &mut impl Rng,
) -> Option<&'a Arc<Replica>> {
    use rand::RngExt as _;

    let mut best: Option<&Arc<Replica>> = None;
    let mut best_load = usize::MAX;
    let mut ties: u32 = 0;
    for replica in replicas {
        if excluded.contains(&replica.incarnation) {
            continue;
        }
        let load = replica.in_flight();
        if load < best_load || best.is_none() {
            (best, best_load, ties) = (Some(replica), load, 1);
        } else if load == best_load {
            // Reservoir of one: the n-th equal replaces the holder with probability 1/n.
            ties += 1;
            if rng.random_range(0..ties) == 0 {
                best = Some(replica);
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]
    use super::super::snapshot::testing::{replica, service, snapshot};
    use super::super::snapshot::{InFlight, Snapshot};
    use super::*;
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    fn with_loads(loads: &[usize]) -> (Snapshot, Vec<InFlight>) {
        let snapshot = snapshot(
            [service("a", "s", "m")],
            (0..loads.len())
                .map(|i| replica("a", "s", &format!("u{i}"), &format!("10.0.0.{i}:8000"))),
        );
        let guards = snapshot
            .service("a", "s")
            .unwrap()
            .replicas
            .iter()
            .zip(loads)
            .flat_map(|(replica, &n)| (0..n).map(|_| replica.enter()).collect::<Vec<_>>())
            .collect();
        (snapshot, guards)
    }

    proptest! {
        #[test]
        fn the_pick_is_allowed_and_least_loaded(
            loads in prop::collection::vec(0usize..6, 0..12),
            excluded_mask in any::<u16>(),
            seed in any::<u64>(),
        ) {
            let (snapshot, _guards) = with_loads(&loads);
            let replicas = &snapshot.service("a", "s").unwrap().replicas;
            let is_excluded = |i: usize| excluded_mask >> i & 1 == 1;
            let excluded: Vec<String> = replicas.iter().enumerate()
                .filter(|(i, _)| is_excluded(*i)).map(|(_, r)| r.incarnation.clone()).collect();
            let least = replicas.iter().enumerate()
                .filter(|(i, _)| !is_excluded(*i)).map(|(_, r)| r.in_flight()).min();
            let picked = pick(replicas, &excluded, &mut StdRng::seed_from_u64(seed));
            prop_assert_eq!(picked.map(|r| r.in_flight()), least);
            if let Some(picked) = picked {
                prop_assert!(!excluded.contains(&picked.incarnation));
            }
        }
    }

    #[test]
    fn ties_are_drawn_evenly() {
        let (snapshot, _guards) = with_loads(&[1, 0, 0, 0, 2]);
        let replicas = &snapshot.service("a", "s").unwrap().replicas;
        let mut rng = StdRng::seed_from_u64(7);
        let mut counts = [0u32; 5];
        for _ in 0..30_000 {
            let picked = pick(replicas, &[], &mut rng).unwrap();
            let index = replicas
                .iter()
                .position(|r| Arc::ptr_eq(r, picked))
                .unwrap();
            counts[index] += 1;
        }
        assert_eq!((counts[0], counts[4]), (0, 0));
        for count in &counts[1..4] {
            // 10,000 expected, standard deviation 82.
            assert!((9_600..10_400).contains(count), "{counts:?}");
        }
    }
}
