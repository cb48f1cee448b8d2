//! Who owns a host, what is found by model, and what lives on from picture to picture.
#![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]

use super::testing::{names, replica, service, snapshot};
use super::*;

#[test]
fn hosts_are_normalised() {
    for (raw, expected) in [
        ("Chat.Example.com", "chat.example.com"),
        ("chat.example.com.", "chat.example.com"),
        ("chat.example.com:8080", "chat.example.com"),
        ("chat.example.com.:80", "chat.example.com"),
        ("[::1]:8080", "[::1]"),
        ("[::1]", "[::1]"),
        ("::1", "::1"),
        ("", ""),
    ] {
        assert_eq!(normalize_host(raw), expected, "{raw}");
    }
}

#[test]
fn the_oldest_claim_on_a_host_wins() {
    let mut young = service("a", "young", "m");
    young.hosts = vec!["Chat.Example.com".to_owned()];
    young.created = 200;
    let mut old = service("z", "old", "m");
    old.hosts = vec!["chat.example.com".to_owned()];
    old.created = 100;
    for order in [
        vec![young.clone(), old.clone()],
        vec![old.clone(), young.clone()],
    ] {
        let snapshot = snapshot(order, []);
        assert_eq!(
            snapshot.by_host("chat.example.com").unwrap().spec.id,
            old.id
        );
    }
}

#[test]
fn names_inside_the_cluster_cannot_be_claimed() {
    let mut thief = service("thief", "t", "m");
    thief.hosts = [
        "ashlar-gateway",
        "ashlar-gateway.ashlar-system",
        "ashlar-gateway.ashlar-system.svc",
        "victim.tenant.svc",
        "victim.tenant.svc.cluster.local",
        "cluster.local",
        "10.0.0.1",
        "[::1]",
        "localhost",
        "good.example.com",
    ]
    .map(str::to_owned)
    .to_vec();
    let snapshot = snapshot([thief.clone()], []);
    for host in &thief.hosts {
        assert_eq!(
            snapshot.by_host(host).is_some(),
            host == "good.example.com",
            "{host}"
        );
    }
}

#[test]
fn open_services_are_not_found_by_model() {
    let mut open = service("a", "open", "m");
    open.access = Access::Open;
    let snapshot = snapshot([open, service("b", "keyed", "m")], []);
    let found: Vec<_> = snapshot
        .by_model("m")
        .iter()
        .map(|s| s.spec.id.to_string())
        .collect();
    assert_eq!(found, ["b/keyed"]);
}

#[test]
fn counters_survive_a_rebuild_and_belong_to_the_pod() {
    let first = snapshot(
        [service("a", "s", "m")],
        [replica("a", "s", "u1", "10.0.0.1:8000")],
    );
    let guard = first.service("a", "s").unwrap().replicas[0].enter();
    let second = Snapshot::build(
        &first,
        [service("a", "s", "m")],
        [
            replica("a", "s", "u1", "10.0.0.1:8000"),
            replica("a", "s", "u2", "10.0.0.2:8000"),
        ],
    );
    let loads = |s: &Snapshot| -> Vec<usize> {
        s.service("a", "s")
            .unwrap()
            .replicas
            .iter()
            .map(|r| r.in_flight())
            .collect()
    };
    assert_eq!(loads(&second), [1, 0]);
    drop(guard);
    assert_eq!(loads(&second), [0, 0]);
}

#[test]
fn replicas_stay_in_their_own_namespace() {
    let snapshot = Snapshot::build(
        &Snapshot::empty(names()),
        [service("a", "s", "m"), service("b", "s", "m")],
        [replica("a", "s", "u1", "10.0.0.1:8000")],
    );
    assert_eq!(snapshot.service("a", "s").unwrap().replicas.len(), 1);
    assert!(snapshot.service("b", "s").unwrap().replicas.is_empty());
}
