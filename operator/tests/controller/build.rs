//! Every child of every valid example, as it would be applied: reviewed like code.

use std::collections::BTreeMap;

use ashlar_operator::controller::build::{Child, children, model, revision, template};
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
    let mut all: Vec<Value> = children::children(&validated, &defaults(), &gateway_slices(), true)
        .unwrap()
        .into_iter()
        .map(|child: Child| child.value)
        .collect();
    if let Some(job) = model::job(&validated, &defaults(), "0123abcd", &["kept".into()]) {
        all.push(serde_json::to_value(job).unwrap());
    }
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
fn a_bucket_on_a_claim_that_a_job_fills() {
    insta::assert_yaml_snapshot!(everything("valid-s3"));
}

#[test]
fn a_vllm_image_on_a_claim() {
    insta::assert_yaml_snapshot!(everything("valid-pvc-vllm"));
}

#[test]
fn two_replicas_behind_keys() {
    insta::assert_yaml_snapshot!(everything("valid-keys"));
}

/// Every container of every pod, of Jobs too, keeps to `restricted` Pod Security.
#[test]
fn pods_are_restricted() {
    for name in [
        "valid-smollm2",
        "valid-mistral-gpu",
        "valid-pvc-vllm",
        "valid-keys",
        "valid-s3",
    ] {
        let all = everything(name);
        let templates = all
            .iter()
            .filter_map(|child| child.pointer("/spec/template/spec"));
        let pods: Vec<_> = templates.collect();
        assert!(!pods.is_empty());
        for pod in pods {
            assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
            assert_eq!(
                pod["securityContext"]["seccompProfile"]["type"],
                "RuntimeDefault"
            );
            assert_eq!(pod["automountServiceAccountToken"], false);
            let containers = ["initContainers", "containers"].map(|key| pod[key].as_array());
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
        let built = children::children(&validated(service), &defaults(), &[], true).unwrap();
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
        let service = validated(&service);
        let template = template::pod_template(&service, &defaults()).unwrap();
        let pod = template.spec.clone().unwrap();
        assert_eq!(pod.init_containers, None, "the Job has pulled it already");
        let path = pod.containers[0].args.clone().unwrap()[0].clone();
        let job = model::job(&service, &defaults(), "0123abcd", &[]).unwrap();
        let pull = job.spec.unwrap().template.spec.unwrap().containers;
        let command = pull[0].command.clone().unwrap();
        assert!(command.contains(&format!("--dest={path}")), "{command:?}");
        let name = model::cached_by(&template, "models").unwrap();
        assert_eq!(path, format!("/models/sha256/{name}"));
        assert_eq!(model::cached_by(&template, "others"), None);
        name
    };
    assert_eq!(folder("main"), folder("main"));
    assert_ne!(folder("main"), folder("v2"));
}

/// Pods that take requests are told from those that download by their label: no Service, gateway or budget selects the latter.
#[test]
fn pods_that_download_take_no_requests() {
    let service = validated(&example("valid-s3"));
    let job = model::job(&service, &defaults(), "0123abcd", &[]).unwrap();
    let labels = job.spec.unwrap().template.metadata.unwrap().labels.unwrap();
    assert_eq!(labels.get("serving.ashlar.dev/service"), None);
    assert_eq!(
        labels.get("serving.ashlar.dev/pull").map(String::as_str),
        Some("qwen")
    );
}

#[test]
fn a_cache_on_the_node_is_bounded_and_pulled_by_the_pod() {
    let mut service = example("valid-smollm2");
    service.spec.model.uri = "hf://a/b".into();
    let cache = json!({"hostPath": {"path": "/var/lib/ashlar/", "maxBytes": "1Gi"}});
    service.spec.cache = Some(serde_json::from_value(cache).unwrap());
    let template = template::pod_template(&validated(&service), &defaults()).unwrap();
    let pod = template.spec.unwrap();
    let command = pod.init_containers.unwrap()[0].command.clone().unwrap();
    assert!(
        command.contains(&"--max-cache-bytes=1073741824".to_owned()),
        "{command:?}"
    );
    let host = pod.volumes.unwrap()[0].host_path.clone().unwrap();
    assert_eq!(host.path, "/var/lib/ashlar/chat");
    assert_eq!(
        model::job(&validated(&service), &defaults(), "0123abcd", &[]),
        None
    );
    let mut invalid = service.clone();
    invalid
        .spec
        .cache
        .as_mut()
        .unwrap()
        .host_path
        .as_mut()
        .unwrap()
        .max_bytes = Some(k8s_openapi::apimachinery::pkg::api::resource::Quantity(
        "lots".into(),
    ));
    let error = ashlar_operator::controller::validate::validate(&invalid).unwrap_err();
    assert_eq!(error.path, "spec.cache.hostPath.maxBytes");
}

#[test]
fn a_pod_waits_longer_for_clients_that_do_not_try_again() {
    let delay = |service: &ashlar_crds::InferenceService| {
        let template = template::pod_template(&validated(service), &defaults()).unwrap();
        let env = template.spec.unwrap().containers[0].env.clone().unwrap();
        let delay = env
            .into_iter()
            .find(|e| e.name == "ASHLAR_DRAIN_DELAY")
            .unwrap();
        delay.value.unwrap()
    };
    let mut service = example("valid-smollm2");
    assert_eq!(delay(&service), "1");
    service.spec.endpoint.allow_from = vec![json!({"podSelector": {}})];
    assert_eq!(delay(&service), "5");
}

/// With dynamic resource allocation the GPUs come from claims that the template names, and not a second time by their count.
#[test]
fn gpus_by_claims_are_not_asked_for_twice() {
    let mut service = example("valid-mistral-gpu");
    let limit = |service: &ashlar_crds::InferenceService| {
        let template = template::pod_template(&validated(service), &defaults()).unwrap();
        let runtime = template
            .spec
            .unwrap()
            .containers
            .remove(0)
            .resources
            .unwrap();
        let claims = runtime.claims.unwrap_or_default().len();
        let gpus = runtime
            .limits
            .and_then(|limits| limits.get("nvidia.com/gpu").cloned());
        (gpus.map(|gpus| gpus.0), claims)
    };
    assert_eq!(limit(&service), (Some("2".into()), 0));
    service.spec.template = Some(json!({"spec": {
        "resourceClaims": [{"name": "gpus", "resourceClaimTemplateName": "two-h100"}],
        "containers": [{"name": "runtime", "resources": {"claims": [{"name": "gpus"}]}}],
    }}));
    assert_eq!(limit(&service), (None, 1));
}

/// With a certificate a pod serves by it, is probed by it, and says so; nothing else of it changes.
#[test]
fn a_certificate_changes_what_it_has_to() {
    for (name, refresh) in [("valid-smollm2", false), ("valid-pvc-vllm", true)] {
        let mut service = example(name);
        let render = |service: &ashlar_crds::InferenceService| {
            let template = template::pod_template(&validated(service), &defaults()).unwrap();
            serde_json::to_value(template).unwrap()
        };
        let (plain, hash) = (render(&service), revision::hash(&service));
        service.spec.runtime.tls_secret_name = Some("chat-tls".into());
        assert_ne!(revision::hash(&service), hash);
        let mut tls = render(&service);

        let metadata = tls["metadata"].as_object_mut().unwrap();
        let label = metadata["labels"]["serving.ashlar.dev/tls"].take();
        let scheme = metadata["annotations"]["prometheus.io/scheme"].take();
        assert_eq!((label, scheme), (json!("true"), json!("https")));
        for (map, key) in [
            ("labels", "serving.ashlar.dev/tls"),
            ("annotations", "prometheus.io/scheme"),
        ] {
            metadata[map].as_object_mut().unwrap().remove(key);
        }
        let volumes = tls["spec"]["volumes"].as_array_mut().unwrap();
        assert_eq!(
            volumes.pop().unwrap(),
            json!({"name": "tls", "secret": {
                "secretName": "chat-tls", "defaultMode": 0o440,
                "items": [{"key": "tls.crt", "path": "tls.crt"}, {"key": "tls.key", "path": "tls.key"}],
            }})
        );
        let runtime = &mut tls["spec"]["containers"][0];
        assert_eq!(
            runtime["volumeMounts"]
                .as_array_mut()
                .unwrap()
                .pop()
                .unwrap(),
            json!({"name": "tls", "mountPath": "/etc/ashlar/tls", "readOnly": true})
        );
        let mut flags = vec![
            "--ssl-certfile=/etc/ashlar/tls/tls.crt",
            "--ssl-keyfile=/etc/ashlar/tls/tls.key",
        ];
        flags.extend(refresh.then_some("--enable-ssl-refresh"));
        let args = runtime["args"].as_array_mut().unwrap();
        for flag in flags {
            let at = args.iter().position(|arg| arg == flag).unwrap();
            args.remove(at);
        }
        for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
            if let Some(get) = runtime.pointer_mut(&format!("/{probe}/httpGet")) {
                assert_eq!(
                    get.as_object_mut().unwrap().remove("scheme"),
                    Some(json!("HTTPS"))
                );
            }
        }
        assert_eq!(tls, plain);
    }
}
