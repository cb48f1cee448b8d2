//! Election against an API server that answers as told, with short times.

use std::time::{Duration, Instant};

use ashlar_operator::controller::{
    leader::{Elector, Timing},
    tenure::Tenure,
};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, api::DeleteParams};
use serde_json::{Value, json};

use crate::support::{Server, api};

const LEASE: &str = "/apis/coordination.k8s.io/v1/namespaces/ashlar-system/leases/l";
const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/ashlar-system/leases";

const TIMING: Timing = Timing {
    lease: Duration::from_millis(300),
    renew_deadline: Duration::from_millis(200),
    retry: Duration::from_millis(30),
    call: Duration::from_millis(100),
};

fn elector(client: kube::Client) -> Elector {
    Elector::new(client, "ashlar-system", "l", "me".into(), TIMING)
}

/// Another's Lease, renewed at a time that its own clock believes in.
fn theirs(renewed: &str, version: &str) -> Value {
    json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": "l", "resourceVersion": version},
        "spec": {"holderIdentity": "other", "renewTime": renewed, "leaseTransitions": 4},
    })
}

/// A Lease that nobody holds.
fn free() -> Value {
    let mut free = theirs("2026-01-01T00:00:00.000000Z", "1");
    free["spec"]["holderIdentity"] = json!("");
    free
}

async fn takes(server: &mut Server, found: Value) -> Value {
    server.answers(&format!("GET {LEASE}"), 200, found).await;
    server
        .answers(
            &format!("PUT {LEASE}"),
            200,
            theirs("2026-01-01T00:00:00.000000Z", "9"),
        )
        .await
        .1
}

#[tokio::test]
async fn a_lease_that_does_not_exist_is_made() {
    let (client, mut server) = api();
    let script = tokio::spawn(async move {
        server.fails(&format!("GET {LEASE}"), 404).await;
        let stored = theirs("2026-01-01T00:00:00.000000Z", "1");
        let (_, body) = server.answers(&format!("POST {LEASES}"), 201, stored).await;
        assert_eq!(body["spec"]["holderIdentity"], "me");
    });
    elector(client).acquire().await;
    script.await.unwrap();
}

#[tokio::test]
async fn another_holds_it_until_it_has_not_changed_for_the_whole_lease() {
    let (client, mut server) = api();
    let script = tokio::spawn(async move {
        // Renewed an age ago by the other's clock: that means nothing.
        let mut last_change = Instant::now();
        for second in 0..4 {
            let renewed = format!("2001-01-01T00:00:0{second}.000000Z");
            server
                .answers(&format!("GET {LEASE}"), 200, theirs(&renewed, "1"))
                .await;
            last_change = Instant::now();
        }
        loop {
            let found = theirs("2001-01-01T00:00:03.000000Z", "7");
            server.answers(&format!("GET {LEASE}"), 200, found).await;
            if last_change.elapsed() > TIMING.lease {
                break;
            }
        }
        let stored = theirs("2026-01-01T00:00:00.000000Z", "8");
        let (_, body) = server.answers(&format!("PUT {LEASE}"), 200, stored).await;
        assert_eq!(
            body["metadata"]["resourceVersion"], "7",
            "a faster rival makes the write fail"
        );
        assert_eq!(body["spec"]["leaseTransitions"], 5);
        last_change.elapsed()
    });
    elector(client).acquire().await;
    assert!(script.await.unwrap() >= TIMING.lease);
}

#[tokio::test]
async fn who_loses_the_race_for_a_free_lease_does_not_lead() {
    let (client, mut server) = api();
    let free = free();
    let script = tokio::spawn(async move {
        server
            .answers(&format!("GET {LEASE}"), 200, free.clone())
            .await;
        server.fails(&format!("PUT {LEASE}"), 409).await;
        takes(&mut server, free).await;
    });
    elector(client).acquire().await;
    script.await.unwrap();
}

#[tokio::test]
async fn a_leader_without_an_api_server_gives_up_at_the_deadline() {
    let (client, mut server) = api();
    let silence = tokio::spawn(async move {
        takes(&mut server, free()).await;
        server // kept open, and never answers again
    });
    let mut elector = elector(client);
    elector.acquire().await;
    let start = Instant::now();
    elector.hold().await;
    let held = start.elapsed();
    assert!(held >= TIMING.renew_deadline, "{held:?}");
    assert!(held < TIMING.lease, "no other may lead yet: {held:?}");
    drop(silence.await);
}

#[tokio::test]
async fn a_leader_whose_lease_was_taken_gives_up_at_once() {
    let (client, mut server) = api();
    let script = tokio::spawn(async move {
        takes(&mut server, free()).await;
        let taken = theirs("2026-01-01T00:00:05.000000Z", "10");
        server.answers(&format!("GET {LEASE}"), 200, taken).await;
        server.finish().await;
    });
    let mut elector = elector(client);
    elector.acquire().await;
    elector.hold().await;
    drop(elector);
    script.await.unwrap();
}

#[tokio::test]
async fn writes_end_with_the_tenure_and_reads_go_on() {
    const MAP: &str = "/api/v1/namespaces/chat/configmaps/m";
    let (client, mut server) = api();
    let tenure = Tenure::default();
    let maps: Api<ConfigMap> = Api::namespaced(tenure.guard(client, 1), "chat");
    let delete = async || maps.delete("m", &DeleteParams::default()).await;
    assert!(delete().await.is_err(), "it never led");
    tenure.lasts_until(Instant::now() + Duration::from_secs(60));
    let script = tokio::spawn(async move {
        let deleted = json!({"kind": "Status", "apiVersion": "v1", "status": "Success"});
        server.answers(&format!("DELETE {MAP}"), 200, deleted).await;
        // The next that arrives is the read.
        server.fails(&format!("GET {MAP}"), 404).await;
    });
    assert!(delete().await.is_ok());
    tenure.lasts_until(Instant::now());
    let refused = delete().await.unwrap_err();
    assert!(refused.to_string().contains("renewed"), "{refused}");
    assert!(maps.get_opt("m").await.unwrap().is_none());
    script.await.unwrap();
}

#[tokio::test]
async fn who_takes_a_lease_may_write_until_it_has_to_be_renewed() {
    let (client, mut server) = api();
    let script = tokio::spawn(async move {
        takes(&mut server, free()).await;
    });
    let mut elector = elector(client);
    let tenure = elector.tenure();
    assert!(!tenure.lasts());
    elector.acquire().await;
    assert!(tenure.lasts());
    while tenure.lasts() {
        tokio::task::yield_now().await;
    }
    script.await.unwrap();
}
