//! From API objects to the routing table's inputs.
#![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]

use serde_json::{Value, json};

use super::*;

fn resource(spec: &Value) -> DynamicObject {
    serde_json::from_value(json!({
        "apiVersion": "serving.ashlar.dev/v1alpha1", "kind": "InferenceService",
        "metadata": {"name": "mistral", "namespace": "chat", "creationTimestamp": "2026-01-02T03:04:05Z"},
        "spec": spec,
    }))
    .unwrap()
}

fn pod(name: &str, ready: &str, deleting: bool) -> Pod {
    let mut pod = json!({
        "metadata": {"name": name, "namespace": "chat", "uid": name, "labels": {SERVICE_LABEL: "mistral", REVISION_LABEL: "0123abcd"}},
        "status": {"podIP": "10.1.2.3", "conditions": [
            {"type": "PodScheduled", "status": "True"},
            {"type": "Ready", "status": ready, "lastTransitionTime": "2026-01-02T03:04:05Z"},
        ]},
    });
    if deleting {
        pod["metadata"]["deletionTimestamp"] = json!("2026-01-02T03:05:05Z");
    }
    serde_json::from_value(pod).unwrap()
}

#[test]
fn a_resource_gives_what_routing_needs() {
    let spec = service_spec(&resource(&json!({
        "model": {"uri": "hf://a/b", "name": "mistral-7b"},
        "endpoint": {"auth": "Keys", "apiKeySecretRef": {"name": "team"}, "hosts": ["a.example.com"], "alias": false, "limits": {"requestsPerMinute": 600}},
    })))
    .unwrap();
    assert_eq!(
        spec,
        ServiceSpec {
            id: ServiceId::new("chat", "mistral"),
            model: "mistral-7b".to_owned(),
            access: Access::Keys {
                secret: "team".to_owned()
            },
            limits: Limits {
                requests_per_minute: Some(600),
                concurrent_requests: None,
            },
            hosts: vec!["a.example.com".to_owned()],
            alias: false,
            created: 1_767_323_045,
            canary: None,
        }
    );
    let open = service_spec(&resource(&json!({"endpoint": {"auth": "None"}}))).unwrap();
    assert_eq!(open.access, Access::Open);
    assert_eq!(open.model, "mistral");
    assert!(open.alias);
}

#[test]
fn a_revision_on_trial_is_read_from_the_status() {
    let mut object = resource(&json!({"endpoint": {"auth": "None"}}));
    object.data["status"] = json!({"revision": {"current": "0123abcd", "outdated": false, "canary": {"weightPercent": 10}}});
    let canary = service_spec(&object).unwrap().canary.unwrap();
    assert_eq!((canary.revision.as_str(), canary.percent), ("0123abcd", 10));
    object.data["status"] = json!({"revision": {"current": "0123abcd"}});
    assert_eq!(service_spec(&object).unwrap().canary, None);
    object.data["status"] = json!({"revision": 7});
    assert_eq!(service_spec(&object).unwrap().canary, None);
}

#[test]
fn what_is_not_understood_is_closed() {
    for spec in [
        json!({}),
        json!({"endpoint": {"auth": "Keys"}}),
        json!({"endpoint": {"auth": "Oidc", "apiKeySecretRef": {"name": "x"}}}),
        json!({"endpoint": {"auth": ["None"]}}),
        json!({"endpoint": {"auth": "None", "hosts": 7}}),
        json!("nonsense"),
        Value::Null,
    ] {
        let read = service_spec(&resource(&spec)).unwrap();
        assert_eq!(read.access, Access::Unusable, "{spec}");
    }
}

#[test]
fn only_ready_pods_that_stay_are_replicas() {
    let replica = replica_spec(&pod("p", "True", false), 8000).unwrap();
    assert_eq!(replica.service, ServiceId::new("chat", "mistral"));
    assert_eq!(replica.address.to_string(), "10.1.2.3:8000");
    assert_eq!(replica.revision, "0123abcd");
    assert!(!replica.ready_since.is_empty());
    assert!(replica_spec(&pod("p", "False", false), 8000).is_none());
    assert!(replica_spec(&pod("p", "True", true), 8000).is_none());
    let mut homeless = pod("p", "True", false);
    homeless.status.as_mut().unwrap().pod_ip = None;
    assert!(replica_spec(&homeless, 8000).is_none());
}

#[test]
fn a_listing_replaces_the_last_one_only_when_complete() {
    let reduce = |pod: &Pod| replica_spec(pod, 8000);
    let mut store = Store::new();
    let mut names = |events: Vec<Event<Pod>>| {
        let changed = events
            .into_iter()
            .fold(false, |changed, event| store.apply(event, reduce) | changed);
        let mut names: Vec<_> = store.live.keys().map(|(_, name)| name.clone()).collect();
        names.sort();
        (names.join(" "), changed)
    };
    let ready = |name| pod(name, "True", false);
    let step = |names: &str, changed| (names.to_owned(), changed);

    assert_eq!(
        names(vec![Event::Init, Event::InitApply(ready("a"))]),
        step("", false)
    );
    assert_eq!(names(vec![Event::InitDone]), step("a", true));
    assert_eq!(names(vec![Event::Apply(ready("b"))]), step("a b", true));
    assert_eq!(names(vec![Event::Apply(ready("b"))]), step("a b", false));
    // A relisting: the old picture stands until the new one is whole, then what is gone is gone.
    assert_eq!(
        names(vec![Event::Init, Event::InitApply(ready("b"))]),
        step("a b", false)
    );
    assert_eq!(names(vec![Event::InitDone]), step("b", true));
    assert_eq!(
        names(vec![Event::Apply(pod("b", "False", false))]),
        step("", true)
    );
    assert_eq!(names(vec![Event::Delete(ready("b"))]), step("", false));
}
