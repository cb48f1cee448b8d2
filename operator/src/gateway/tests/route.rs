//! Least load, exclusions, ejections, prompts. What prompts gain is tested in `tests/prefix_affinity.rs`.
#![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]

use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::super::health::FAILURES;
use super::super::snapshot::testing::{replica, service, snapshot};
use super::super::snapshot::{InFlight, Snapshot};
use super::*;

fn with_loads(loads: &[usize]) -> (Snapshot, Vec<InFlight>) {
    let snapshot = snapshot(
        [service("a", "s", "m")],
        (0..loads.len()).map(|i| replica("a", "s", &format!("u{i}"), &format!("10.0.0.{i}:8000"))),
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

fn replicas(snapshot: &Snapshot) -> &[Arc<Replica>] {
    &snapshot.service("a", "s").unwrap().replicas
}

fn without_prompt<'a>(excluded: &'a [&'a str]) -> Choice<'a> {
    Choice {
        excluded,
        prefix: None,
    }
}

fn body(prompt: &str) -> Vec<u8> {
    serde_json::json!({"model": "m", "messages": [{"role": "user", "content": prompt}]})
        .to_string()
        .into_bytes()
}

proptest! {
    #[test]
    fn the_pick_is_allowed_and_least_loaded(
        loads in prop::collection::vec(0usize..6, 0..12),
        excluded_mask in any::<u16>(),
        seed in any::<u64>(),
    ) {
        let (snapshot, _guards) = with_loads(&loads);
        let replicas = replicas(&snapshot);
        let is_excluded = |i: usize| excluded_mask >> i & 1 == 1;
        let excluded: Vec<&str> = replicas.iter().enumerate()
            .filter(|(i, _)| is_excluded(*i)).map(|(_, r)| r.incarnation.as_str()).collect();
        let least = replicas.iter().enumerate()
            .filter(|(i, _)| !is_excluded(*i)).map(|(_, r)| r.in_flight()).min();
        let index = Index::default();
        let picked = pick(replicas, &without_prompt(&excluded), &index, &mut StdRng::seed_from_u64(seed));
        prop_assert_eq!(picked.map(|r| r.in_flight()), least);
        if let Some(picked) = picked {
            prop_assert!(!excluded.contains(&picked.incarnation.as_str()));
        }
    }

    /// By prompt the pick is allowed too, exists whenever one is left, and its load is bounded by the mean.
    #[test]
    fn the_pick_by_prompt_is_allowed_and_bounded(
        loads in prop::collection::vec(0usize..40, 1..12),
        excluded_mask in any::<u16>(),
        prompt in "[a-z]{100,400}",
        sent in 0usize..12,
    ) {
        let (snapshot, _guards) = with_loads(&loads);
        let replicas = replicas(&snapshot);
        let left: Vec<_> = replicas.iter().enumerate()
            .filter(|(i, _)| excluded_mask >> i & 1 == 0).map(|(_, r)| r).collect();
        let excluded: Vec<&str> = replicas.iter()
            .filter(|r| !left.iter().any(|l| Arc::ptr_eq(l, r))).map(|r| r.incarnation.as_str()).collect();
        let prefix = Prefix::of_body(&body(&prompt)).unwrap();
        let mut index = Index::default();
        index.sent(&prefix, replicas[sent % replicas.len()].id);
        let choice = Choice { excluded: &excluded, prefix: Some(&prefix) };
        let picked = pick(replicas, &choice, &index, &mut StdRng::seed_from_u64(1));
        prop_assert_eq!(picked.is_some(), !left.is_empty());
        if let Some(picked) = picked {
            prop_assert!(!excluded.contains(&picked.incarnation.as_str()));
            let mean = left.iter().map(|r| r.in_flight()).sum::<usize>() as f64 / left.len() as f64;
            prop_assert!(picked.in_flight() as f64 <= mean * LOAD_FACTOR + LOAD_FACTOR);
        }
    }
}

#[test]
fn ties_are_drawn_evenly() {
    let (snapshot, _guards) = with_loads(&[1, 0, 0, 0, 2]);
    let replicas = replicas(&snapshot);
    let mut rng = StdRng::seed_from_u64(7);
    let mut counts = [0u32; 5];
    for _ in 0..30_000 {
        let picked = pick(replicas, &without_prompt(&[]), &Index::default(), &mut rng).unwrap();
        let index = replicas.iter().position(|r| Arc::ptr_eq(r, picked));
        counts[index.unwrap()] += 1;
    }
    assert_eq!((counts[0], counts[4]), (0, 0));
    for count in &counts[1..4] {
        // 10,000 expected, standard deviation 82.
        assert!((9_600..10_400).contains(count), "{counts:?}");
    }
}

#[test]
fn a_failing_replica_is_left_out_unless_most_fail() {
    let (snapshot, _guards) = with_loads(&[0, 3, 3]);
    let replicas = replicas(&snapshot);
    let mut rng = StdRng::seed_from_u64(7);
    let mut picked = || {
        let picked = pick(replicas, &without_prompt(&[]), &Index::default(), &mut rng).unwrap();
        replicas
            .iter()
            .position(|r| Arc::ptr_eq(r, picked))
            .unwrap()
    };
    assert_eq!(picked(), 0);
    for _ in 0..FAILURES {
        let _ = replicas[0].failed();
    }
    assert_ne!(picked(), 0);
    for _ in 0..FAILURES {
        let _ = replicas[1].failed();
    }
    assert_eq!(picked(), 0, "most are ejected: the fault is elsewhere");
}

#[test]
fn the_same_prompt_goes_to_the_same_replica_on_every_gateway() {
    let (snapshot, _guards) = with_loads(&[0; 8]);
    let mut used = std::collections::HashSet::new();
    for number in 0..64 {
        let prefix = Prefix::of_body(&body(&format!("{number:0>80}"))).unwrap();
        let choice = Choice {
            excluded: &[],
            prefix: Some(&prefix),
        };
        // Two gateways that remember nothing, with other luck.
        let [one, two] = [1, 2].map(|seed| {
            let mut rng = StdRng::seed_from_u64(seed);
            pick(replicas(&snapshot), &choice, &Index::default(), &mut rng)
                .unwrap()
                .id
        });
        assert_eq!(one, two);
        used.insert(one);
    }
    assert_eq!(used.len(), 8, "prompts spread over all replicas");
}
