//! The exact calls of an apply: none too many, none after a refusal.

use ashlar_operator::controller::{
    apply::{ApplyError, apply, delete},
    build::{Child, children},
    fetch::LiveChild,
};
use serde_json::{Value, json};

use crate::support::{api, defaults, example, validated};

const ACCOUNT: &str = "/api/v1/namespaces/chat/serviceaccounts/smollm2-ashlar";

fn account() -> Child {
    let built = children::children(
        &validated(&example("valid-smollm2")),
        &defaults(),
        &[],
        false,
    );
    built.unwrap().remove(0)
}

fn live(value: Value, owner: &str) -> LiveChild {
    let child = account();
    LiveChild {
        resource: child.resource,
        name: child.name,
        owner: Some(owner.into()),
        terminating: false,
        value,
    }
}

#[tokio::test]
async fn a_new_child_is_looked_for_and_then_applied() {
    let (client, mut server) = api();
    let child = account();
    let service = example("valid-smollm2");
    let stored = child.value.clone();
    let script = tokio::spawn(async move {
        server.fails(&format!("GET {ACCOUNT}"), 404).await;
        let (query, body) = server
            .answers(&format!("PATCH {ACCOUNT}"), 200, stored.clone())
            .await;
        assert!(query.contains("fieldManager=ashlar-operator") && query.contains("force=true"));
        assert_eq!(body, stored);
        server.finish().await;
    });
    assert!(apply(&client, &service, &child, &[]).await.unwrap());
    drop(client);
    script.await.unwrap();
}

#[tokio::test]
async fn a_child_as_wanted_is_not_touched() {
    let (client, server) = api();
    let child = account();
    let live = live(child.value.clone(), "uid-1");
    assert!(
        !apply(&client, &example("valid-smollm2"), &child, &[live])
            .await
            .unwrap()
    );
    drop(client);
    server.finish().await;
}

#[tokio::test]
async fn drift_is_applied_without_a_look() {
    let (client, mut server) = api();
    let child = account();
    let mut changed = child.value.clone();
    changed["automountServiceAccountToken"] = json!(true);
    let live = live(changed, "uid-1");
    let stored = child.value.clone();
    let script = tokio::spawn(async move {
        server
            .answers(&format!("PATCH {ACCOUNT}"), 200, stored)
            .await;
        server.finish().await;
    });
    assert!(
        apply(&client, &example("valid-smollm2"), &child, &[live])
            .await
            .unwrap()
    );
    drop(client);
    script.await.unwrap();
}

#[tokio::test]
async fn what_belongs_to_another_is_never_written() {
    let child = account();
    let service = example("valid-smollm2");
    // Seen in the cache: no call at all.
    let (client, server) = api();
    let theirs = live(child.value.clone(), "uid-2");
    let refused = apply(&client, &service, &child, &[theirs]).await;
    assert!(
        matches!(refused, Err(ApplyError::NameTaken { .. })),
        "{refused:?}"
    );
    drop(client);
    server.finish().await;
    // Found by looking: no write.
    let (client, mut server) = api();
    let script = tokio::spawn(async move {
        let foreign = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "smollm2-ashlar"}});
        server
            .answers(&format!("GET {ACCOUNT}"), 200, foreign)
            .await;
        server.finish().await;
    });
    let refused = apply(&client, &service, &child, &[]).await.unwrap_err();
    assert!(
        refused
            .to_string()
            .contains("ServiceAccount smollm2-ashlar"),
        "{refused}"
    );
    drop(client);
    script.await.unwrap();
}

#[tokio::test]
async fn refusals_say_what_was_tried() {
    for code in [409, 422, 500] {
        let (client, mut server) = api();
        let child = account();
        let script = tokio::spawn(async move {
            server.fails(&format!("GET {ACCOUNT}"), 404).await;
            server.fails(&format!("PATCH {ACCOUNT}"), code).await;
            server.finish().await;
        });
        let error = apply(&client, &example("valid-smollm2"), &child, &[])
            .await
            .unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with("cannot apply ServiceAccount smollm2-ashlar"),
            "{text}"
        );
        drop(client);
        script.await.unwrap();
    }
}

#[tokio::test]
async fn only_the_object_that_was_seen_is_deleted_and_gone_is_fine() {
    let (client, mut server) = api();
    let mut value = account().value;
    value["metadata"]["uid"] = json!("child-uid");
    let live = live(value, "uid-1");
    let script = tokio::spawn(async move {
        let (_, body) = server.fails(&format!("DELETE {ACCOUNT}"), 404).await;
        assert_eq!(body["preconditions"]["uid"], "child-uid");
        server.fails(&format!("DELETE {ACCOUNT}"), 500).await;
        server.finish().await;
    });
    let service = example("valid-smollm2");
    delete(&client, &service, &live.resource, &live)
        .await
        .unwrap();
    assert!(
        delete(&client, &service, &live.resource, &live)
            .await
            .is_err()
    );
    drop(client);
    script.await.unwrap();
}
