//! Every child of every valid example, as it would be applied: reviewed like code.

use std::collections::BTreeMap;

use ashlar_operator::controller::build::{Child, children, revision, template};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::{Value, json};

use crate::support::{defaults, example, validated};

fn gateway_slices() -> Vec<EndpointSlice> {
    vec![serde_json::from_value(json!({
        "metadata": {"name": "ashlar-gateway-x2b"},
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["10.0.0.7"], "conditions": {"ready": true}, "targetRef": {"kind": "Pod", "name": "g"}}],
        "ports": [{"name": "metrics", "port": 8081, "protocol": "TCP"}, {"name": "http", "port": 8080, "protocol": "TCP"}],
    }))
    .unwrap()]
}

fn everything(name: &str) -> Vec<Value> {
    let service = example(name);
    let validated = validated(&service);
    let template = template::pod_template(&validated, &defaults()).unwrap();
    let deployment = children::deployment(
        &validated,
        "0123abcd",
        validated.wanted,
        template,
        BTreeMap::new(),
    );
    let mut all: Vec<Value> = children::children(&validated, &defaults(), &gateway_slices())
        .unwrap()
        .into_iter()
        .map(|child: Child| child.value)
        .collect();
    all.push(serde_json::to_value(deployment).unwrap());
    all.iter_mut().for_each(Value::sort_all_objects);
    all
}

#[test]
fn an_oci_model_on_the_cpu() {
    insta::assert_yaml_snapshot!(everything("valid-smollm2"));
}

#[test]
fn a_hub_model_on_two_gpus_with_a_shared_cache() {
    insta::assert_yaml_snapshot!(everything("valid-mistral-gpu"));
}

#[test]
fn a_vllm_image_on_a_claim() {
    insta::assert_yaml_snapshot!(everything("valid-pvc-vllm"));
}

#[test]
fn two_replicas_behind_keys() {
    insta::assert_yaml_snapshot!(everything("valid-keys"));
}

/// Every container keeps to `restricted` Pod Security.
#[test]
fn pods_are_restricted() {
    for name in [
        "valid-smollm2",
        "valid-mistral-gpu",
        "valid-pvc-vllm",
        "valid-keys",
    ] {
        let pod = everything(name).pop().unwrap()["spec"]["template"]["spec"].clone();
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(
            pod["securityContext"]["seccompProfile"]["type"],
            "RuntimeDefault"
        );
        assert_eq!(pod["automountServiceAccountToken"], false);
        let containers = ["initContainers", "containers"].map(|key| pod[key].as_array().cloned());
        let containers: Vec<_> = containers.into_iter().flatten().flatten().collect();
        assert!(!containers.is_empty());
        for container in containers {
            let security = &container["securityContext"];
            assert_eq!(security["allowPrivilegeEscalation"], false);
            assert_eq!(security["readOnlyRootFilesystem"], true);
            assert_eq!(security["capabilities"]["drop"], json!(["ALL"]));
        }
    }
}

#[test]
fn a_revision_is_made_of_pod_fields_alone() {
    let service = example("valid-smollm2");
    let hash = revision::hash(&service);
    let mut same = service.clone();
    same.spec.replicas = 7;
    same.spec.endpoint.alias = false;
    same.spec.rollout_strategy.surge = ashlar_crds::Surge::Never;
    same.metadata.annotations = Some([("note".to_owned(), "x".to_owned())].into());
    assert_eq!(revision::hash(&same), hash);
    let mut others = [(); 4].map(|()| service.clone());
    others[0].spec.runtime.args = vec!["--max-model-len=1".into()];
    others[1].spec.rollout_strategy.drain_timeout_seconds = 1;
    others[2].metadata.annotations =
        Some([("serving.ashlar.dev/restart".to_owned(), "1".to_owned())].into());
    others[3].spec.model.name = Some("other".into());
    for other in others {
        assert_ne!(revision::hash(&other), hash);
    }
    // Released: a change here would restart every pod at an upgrade.
    assert_eq!(hash, "acf22972");
}

#[test]
fn a_template_is_kept_as_first_rendered() {
    let service = validated(&example("valid-mistral-gpu"));
    let template = template::pod_template(&service, &defaults()).unwrap();
    let record = revision::controller_revision(&service, "0123abcd", 1, &template);
    assert_eq!(revision::stored_template(&record), Some(template));
    assert_eq!(revision::hash_of(&record), Some("0123abcd"));
}

#[test]
fn a_digest_changes_with_what_is_dropped() {
    let mut service = example("valid-keys");
    let digest = |service: &ashlar_crds::InferenceService| {
        let built = children::children(&validated(service), &defaults(), &[]).unwrap();
        let policy = built
            .iter()
            .find(|c| c.resource.kind == "NetworkPolicy")
            .unwrap();
        policy.value["metadata"]["annotations"]["serving.ashlar.dev/applied"].clone()
    };
    let before = digest(&service);
    assert!(before.is_string());
    service.spec.endpoint.allow_from = vec![json!({"podSelector": {}})];
    assert_ne!(digest(&service), before);
}

#[test]
fn caches_are_shared_by_the_same_model_only() {
    let folder = |revision: &str| {
        let mut service = example("valid-mistral-gpu");
        service.spec.model.revision = Some(revision.into());
        let pod = template::pod_template(&validated(&service), &defaults())
            .unwrap()
            .spec
            .unwrap();
        let model = pod.containers[0].args.clone().unwrap()[0].clone();
        let command = pod.init_containers.unwrap()[0].command.clone().unwrap();
        assert!(command.contains(&format!("--dest={model}")), "{command:?}");
        model
    };
    assert_eq!(folder("main"), folder("main"));
    assert_ne!(folder("main"), folder("v2"));
    assert!(folder("main").starts_with("/models/sha256/"));
}
