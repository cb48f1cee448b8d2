//! A new revision on trial gets its share of a service's requests, whatever its share of the replicas. Pure.
//!
//! The operator says in `status.revision` which revision that is and how many percent it gets; 0 means that it was rolled back
//! and its pods are only finishing.

use std::sync::Arc;

use rand::{Rng, RngExt as _};

use super::snapshot::Replica;

/// A revision on trial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Canary {
    /// Its hash, as its pods carry it.
    pub revision: String,
    /// Its share of the requests.
    pub percent: u32,
}

impl Canary {
    /// The replicas that the next request may go to: those of the revision that is drawn, or all when none of them is left.
    pub fn side(
        &self,
        replicas: &[Arc<Replica>],
        excluded: &[&str],
        rng: &mut impl Rng,
    ) -> Vec<Arc<Replica>> {
        let drawn = rng.random_range(0..100) < self.percent;
        let of_side = |replica: &&Arc<Replica>| (replica.revision == self.revision) == drawn;
        let side: Vec<_> = replicas.iter().filter(of_side).cloned().collect();
        if side
            .iter()
            .all(|replica| excluded.contains(&replica.incarnation.as_str()))
        {
            return replicas.to_vec();
        }
        side
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::super::snapshot::testing::{replica, service, snapshot};
    use super::*;

    /// Three old replicas and one new one.
    fn replicas() -> Vec<Arc<Replica>> {
        let specs = [("a", "old"), ("b", "old"), ("c", "old"), ("d", "new")];
        let specs = specs.map(|(uid, revision)| {
            let mut spec = replica("n", "s", uid, "10.0.0.1:8000");
            spec.revision = revision.to_owned();
            spec
        });
        let snapshot = snapshot([service("n", "s", "m")], specs);
        snapshot.service("n", "s").unwrap().replicas.clone()
    }

    fn share(percent: u32) -> f64 {
        let canary = Canary {
            revision: "new".into(),
            percent,
        };
        let (replicas, mut rng) = (replicas(), StdRng::seed_from_u64(7));
        let new = (0..10_000).filter(|_| {
            let side = canary.side(&replicas, &[], &mut rng);
            assert!(
                side.windows(2)
                    .all(|pair| pair[0].revision == pair[1].revision)
            );
            side[0].revision == "new"
        });
        new.count() as f64 / 100.0
    }

    #[test]
    fn the_share_is_of_requests_and_not_of_replicas() {
        for percent in [1, 10, 50, 99] {
            let seen = share(percent);
            // Four standard deviations of ten thousand draws.
            let p = f64::from(percent) / 100.0;
            let bound = 4.0 * (p * (1.0 - p) / 10_000.0).sqrt() * 100.0;
            assert!(
                (seen - f64::from(percent)).abs() <= bound,
                "{seen} of {percent} %"
            );
        }
        assert!(share(0) < f64::EPSILON, "rolled back");
    }

    #[test]
    fn a_request_is_answered_by_the_other_side_when_its_own_is_gone() {
        let canary = Canary {
            revision: "new".into(),
            percent: 100,
        };
        let (replicas, mut rng) = (replicas(), StdRng::seed_from_u64(7));
        let excluded = [replicas
            .iter()
            .find(|r| r.revision == "new")
            .unwrap()
            .incarnation
            .as_str()];
        assert_eq!(canary.side(&replicas, &excluded, &mut rng).len(), 4);
    }
}
