//! What no mock knows: CEL, defaulting, `/scale` and field ownership on a real API server, and the controller against it.
//!
//! Runs when ASHLAR_TEST_KUBECONFIG names an administrator's kubeconfig; otherwise each test says that it was skipped.
//! Only an API server is needed: no node, no controller manager; `hpa` needs more, and says so.
#![allow(
    clippy::unwrap_used,
    unreachable_pub,
    missing_docs,
    reason = "a test fails by panicking, and says when it is skipped"
)]

mod hpa;
mod steps;
mod stubs;
mod support;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use ashlar_crds::{
    InferenceService,
    names::{FIELD_MANAGER, REVISION_LABEL, SERVICE_LABEL},
};
use k8s_openapi::api::{
    apps::v1::{ControllerRevision, Deployment},
    core::v1::{Service, ServiceAccount},
    networking::v1::NetworkPolicy,
    policy::v1::PodDisruptionBudget,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

use support::{Operator, PATIENCE, cluster, drop_namespace, kubeconfig, namespace, service, until};

/// Drift is repaired within this.
const REPAIR: Duration = Duration::from_secs(2);

fn examples(prefix: &str) -> Vec<(String, Value)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crds/examples");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .starts_with(prefix)
        })
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no {prefix}* among the examples");
    files
        .into_iter()
        .map(|path| {
            let text = std::fs::read_to_string(path).unwrap();
            let first = text.lines().next().unwrap().to_owned();
            (first, serde_yaml_ng::from_str(&text).unwrap())
        })
        .collect()
}

fn raw_services(client: &Client, namespace: &str) -> Api<kube::api::DynamicObject> {
    let resource = kube::api::ApiResource::erase::<InferenceService>(&());
    Api::namespaced_with(client.clone(), namespace, &resource)
}

#[tokio::test]
async fn examples_are_accepted_and_refused_by_the_schema_alone() {
    let Some(kubeconfig) = kubeconfig() else {
        return;
    };
    let client = cluster(&kubeconfig).await;
    let ns = namespace(&client, "examples").await;
    let api = raw_services(&client, &ns);
    let dry = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    for (first, example) in examples("valid-") {
        let object = serde_json::from_value(example).unwrap();
        api.create(&dry, &object)
            .await
            .unwrap_or_else(|error| panic!("{first}: {error}"));
    }
    for (first, example) in examples("invalid-") {
        let expected = first.strip_prefix("# expect: ").unwrap();
        let object = serde_json::from_value(example).unwrap();
        let refusal = api
            .create(&dry, &object)
            .await
            .expect_err(expected)
            .to_string();
        assert!(
            refusal.contains(expected),
            "{expected:?} is not in {refusal:?}"
        );
        assert!(refusal.contains("is invalid"), "{refusal:?}");
    }
    drop_namespace(&client, &ns).await;
}

#[tokio::test]
async fn scale_reads_and_writes_replicas_of_a_manifest_without_them() {
    let Some(kubeconfig) = kubeconfig() else {
        return;
    };
    let client = cluster(&kubeconfig).await;
    let ns = namespace(&client, "scale").await;
    let api: Api<InferenceService> = Api::namespaced(client.clone(), &ns);
    raw_services(&client, &ns)
        .create(
            &PostParams::default(),
            &serde_json::from_value(service("m")).unwrap(),
        )
        .await
        .unwrap();
    assert_eq!(
        api.get_scale("m").await.unwrap().spec.unwrap().replicas,
        Some(1)
    );
    let to_three = Patch::Merge(json!({"spec": {"replicas": 3}}));
    api.patch_scale("m", &PatchParams::default(), &to_three)
        .await
        .unwrap();
    assert_eq!(api.get("m").await.unwrap().spec.replicas, 3);
    drop_namespace(&client, &ns).await;
}

async fn list<K>(client: &Client, ns: &str) -> Vec<K>
where
    K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(client.clone(), ns);
    let ours = ListParams::default().labels(SERVICE_LABEL);
    api.list(&ours).await.unwrap().items
}

#[tokio::test]
async fn children_are_made_kept_and_removed() {
    let Some(kubeconfig) = kubeconfig() else {
        return;
    };
    let client = cluster(&kubeconfig).await;
    let ns = namespace(&client, "children").await;
    let operator = Operator::start(&kubeconfig, &ns);
    operator.leads().await;
    let services: Api<InferenceService> = Api::namespaced(client.clone(), &ns);
    let object: InferenceService = serde_json::from_value(service("m")).unwrap();
    let uid = services
        .create(&PostParams::default(), &object)
        .await
        .unwrap()
        .uid()
        .unwrap();

    let deployment = until("a Deployment", PATIENCE, || async {
        list::<Deployment>(&client, &ns).await.pop()
    })
    .await;
    let name = deployment.name_any();
    let hash = deployment.labels()[REVISION_LABEL].clone();
    assert_eq!(name, format!("m-{hash}"));
    let owner = &deployment.owner_references()[0];
    assert_eq!((&owner.uid, owner.controller), (&uid, Some(true)));
    let managers: Vec<_> = deployment
        .managed_fields()
        .iter()
        .map(|f| (f.manager.clone().unwrap(), f.operation.clone().unwrap()))
        .collect();
    assert!(
        managers.contains(&(FIELD_MANAGER.into(), "Apply".into())),
        "{managers:?}"
    );
    assert_eq!(
        list::<ControllerRevision>(&client, &ns).await[0].name_any(),
        name
    );
    assert_eq!(
        list::<ServiceAccount>(&client, &ns).await[0].name_any(),
        "m-ashlar"
    );
    assert_eq!(list::<NetworkPolicy>(&client, &ns).await.len(), 1);
    until("both Services", PATIENCE, || async {
        let mut names: Vec<_> = list::<Service>(&client, &ns)
            .await
            .iter()
            .map(|s| s.name_any())
            .collect();
        names.sort();
        (names == ["m", "m-pods"]).then_some(())
    })
    .await;
    let status = until("a status", PATIENCE, || async {
        services
            .get("m")
            .await
            .unwrap()
            .status
            .filter(|s| s.url.is_some())
    })
    .await;
    assert_eq!(
        status.url.unwrap(),
        format!("http://ashlar-gateway.{ns}.svc/{ns}/m/v1")
    );
    assert_eq!(
        status.selector.as_deref(),
        Some("serving.ashlar.dev/service=m")
    );
    assert_eq!(status.revision.unwrap().current, hash);
    assert_eq!(status.conditions.len(), 5);

    repairs(&client, &ns, &name).await;
    at_rest_nothing_is_written(&operator, &services).await;
    follows_the_spec(&client, &ns, &services, &hash).await;
    drop_namespace(&client, &ns).await;
    operator.terminate().await;
}

/// What others change or delete is put back.
async fn repairs(client: &Client, ns: &str, deployment: &str) {
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), ns);
    let drift = Patch::Merge(
        json!({"spec": {"replicas": 7, "template": {"spec": {"terminationGracePeriodSeconds": 1}}}}),
    );
    deployments
        .patch(deployment, &PatchParams::default(), &drift)
        .await
        .unwrap();
    until("replicas and template are repaired", REPAIR, || async {
        let spec = deployments.get(deployment).await.unwrap().spec.unwrap();
        let grace = spec.template.spec.unwrap().termination_grace_period_seconds;
        (spec.replicas == Some(1) && grace == Some(135)).then_some(())
    })
    .await;
    let services: Api<Service> = Api::namespaced(client.clone(), ns);
    let before = services.get("m").await.unwrap().uid();
    services
        .delete("m", &DeleteParams::default())
        .await
        .unwrap();
    until("the alias is there again", REPAIR, || async {
        let found = services.get_opt("m").await.unwrap()?;
        (found.uid() != before).then_some(())
    })
    .await;
}

/// A look at a service at rest writes nothing: neither children nor status.
async fn at_rest_nothing_is_written(operator: &Operator, services: &Api<InferenceService>) {
    const LOOKS: &str = "controller_runtime_reconcile_total";
    const WRITES: &str = "ashlar_operator_writes_total";
    let look = async |value: &str| {
        let looks = operator.metric(LOOKS).await.unwrap();
        let note = Patch::Merge(json!({"metadata": {"annotations": {"note": value}}}));
        services
            .patch("m", &PatchParams::default(), &note)
            .await
            .unwrap();
        until("another reconcile", PATIENCE, || async {
            (operator.metric(LOOKS).await? > looks).then_some(())
        })
        .await;
    };
    // Without pods nothing changes by itself, whatever nodes there are.
    let none = Patch::Merge(json!({"spec": {"replicas": 0}}));
    services
        .patch("m", &PatchParams::default(), &none)
        .await
        .unwrap();
    until("no pods", PATIENCE, || async {
        let status = services.get("m").await.unwrap().status?;
        let workloads = status
            .conditions
            .iter()
            .find(|c| c.type_ == "WorkloadsReady")?;
        (status.replicas == 0 && workloads.reason == "ScaledToZero").then_some(())
    })
    .await;
    // The last writes are seen and counted, then three looks in a row write nothing.
    let (mut quiet, mut writes) = (0, operator.metric(WRITES).await.unwrap());
    for value in 0..20 {
        look(&value.to_string()).await;
        let now = operator.metric(WRITES).await.unwrap();
        quiet = if now == writes { quiet + 1 } else { 0 };
        writes = now;
        if quiet == 3 {
            return;
        }
    }
    panic!(
        "every look at a service at rest writes: {}",
        operator.metrics().await.unwrap()
    );
}

/// Children come and go with the spec; a new spec is a new revision beside the old one.
async fn follows_the_spec(
    client: &Client,
    ns: &str,
    services: &Api<InferenceService>,
    first: &str,
) {
    let change = async |spec: Value| {
        let patch = Patch::Merge(json!({"spec": spec}));
        services
            .patch("m", &PatchParams::default(), &patch)
            .await
            .unwrap();
    };
    change(json!({"replicas": 2, "endpoint": {"alias": false}})).await;
    until("no alias, and a disruption budget", PATIENCE, || async {
        let alias = list::<Service>(client, ns)
            .await
            .iter()
            .any(|s| s.name_any() == "m");
        let budgets = list::<PodDisruptionBudget>(client, ns).await.len();
        (!alias && budgets == 1).then_some(())
    })
    .await;
    assert_eq!(
        list::<Deployment>(client, ns).await.len(),
        1,
        "replicas and endpoint make no revision"
    );
    change(json!({"replicas": 1, "runtime": {"args": ["--max-model-len=1024"]}})).await;
    let revisions = until("a second revision", PATIENCE, || async {
        let found = list::<ControllerRevision>(client, ns).await;
        (found.len() == 2).then_some(found)
    })
    .await;
    let newest = revisions.iter().max_by_key(|r| r.revision).unwrap();
    assert_ne!(newest.labels()[REVISION_LABEL], first);
    until("no disruption budget for one replica", PATIENCE, || async {
        list::<PodDisruptionBudget>(client, ns)
            .await
            .is_empty()
            .then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_name_that_is_taken_is_left_alone_and_said() {
    let Some(kubeconfig) = kubeconfig() else {
        return;
    };
    let client = cluster(&kubeconfig).await;
    let ns = namespace(&client, "taken").await;
    let foreign: Api<Service> = Api::namespaced(client.clone(), &ns);
    let theirs = serde_json::from_value(json!({
        "metadata": {"name": "m-pods"}, "spec": {"ports": [{"port": 1234}]},
    }))
    .unwrap();
    let before = foreign
        .create(&PostParams::default(), &theirs)
        .await
        .unwrap();
    let operator = Operator::start(&kubeconfig, &ns);
    operator.leads().await;
    let services: Api<InferenceService> = Api::namespaced(client.clone(), &ns);
    let object = serde_json::from_value(service("m")).unwrap();
    services
        .create(&PostParams::default(), &object)
        .await
        .unwrap();
    let ready = until("NameTaken", PATIENCE, || async {
        let conditions = services.get("m").await.unwrap().status?.conditions;
        conditions
            .into_iter()
            .find(|c| c.type_ == "Ready" && c.reason == "NameTaken")
    })
    .await;
    assert_eq!(ready.status, "False");
    assert!(
        ready.message.contains("Service m-pods"),
        "{}",
        ready.message
    );
    let after = foreign.get("m-pods").await.unwrap();
    assert_eq!(after.resource_version(), before.resource_version());
    foreign
        .delete("m-pods", &DeleteParams::default())
        .await
        .unwrap();
    until("the name is ours now", PATIENCE, || async {
        let found = foreign.get_opt("m-pods").await.unwrap()?;
        found.labels().contains_key(SERVICE_LABEL).then_some(())
    })
    .await;
    operator.terminate().await;
    drop_namespace(&client, &ns).await;
}

#[tokio::test]
async fn one_operator_leads_and_another_follows_at_once_when_it_ends() {
    let Some(kubeconfig) = kubeconfig() else {
        return;
    };
    let client = cluster(&kubeconfig).await;
    let ns = namespace(&client, "leader").await;
    let first = Operator::start(&kubeconfig, &ns);
    first.leads().await;
    let second = Operator::start(&kubeconfig, &ns);
    until("the second is ready to lead", PATIENCE, || async {
        (second.metric("ashlar_operator_leader").await? == 0.0).then_some(())
    })
    .await;
    first.terminate().await;
    // The Lease was given up: nobody waits for it to expire.
    let start = Instant::now();
    second.leads().await;
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
    second.terminate().await;
    drop_namespace(&client, &ns).await;
}
