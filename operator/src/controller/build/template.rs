//! The pod template of a revision, rendered once.

use std::collections::BTreeMap;

use ashlar_crds::{
    Device, Engine,
    names::{RESTART_ANNOTATION, RUNTIME_CONTAINER, RUNTIME_PORT, RUNTIME_PORT_NAME, TLS_LABEL},
};
use k8s_openapi::{
    DeepMerge as _,
    api::core::v1::{
        Affinity, Capabilities, Container, ContainerPort, EmptyDirVolumeSource, EnvVar,
        HTTPGetAction, KeyToPath, Lifecycle, LifecycleHandler, PodSecurityContext, PodSpec,
        PodTemplateSpec, Probe, ResourceRequirements, SeccompProfile, SecretVolumeSource,
        SecurityContext, SleepAction, TopologySpreadConstraint, Volume, VolumeMount,
    },
    apimachinery::pkg::{
        api::resource::Quantity,
        apis::meta::v1::{LabelSelector, ObjectMeta},
        util::intstr::IntOrString,
    },
};

use super::{
    super::validate::{InvalidSpec, ValidatedService},
    Defaults, labels, model, selector,
};

/// User and group of every container.
const USER: i64 = 65532;
/// Seconds past the drain before the kubelet kills.
const KILL_MARGIN_SECONDS: i64 = 15;
/// Memory-backed share for tensor parallelism.
const SHARED_MEMORY: &str = "/dev/shm";
/// Where the pod's certificate and key are, under the names that a Secret of type `kubernetes.io/tls` has for them. A folder
/// and not single files: a renewed Secret reaches the pod.
const TLS_FOLDER: &str = "/etc/ashlar/tls";
const TLS_CERT_KEY: &str = "tls.crt";
const TLS_PRIVATE_KEY_KEY: &str = "tls.key";

/// Renders the pods of a revision.
///
/// # Errors
/// [`InvalidSpec`] when `affinity` or `template` is not what a pod takes.
pub fn pod_template(
    service: &ValidatedService,
    defaults: &Defaults,
) -> Result<PodTemplateSpec, InvalidSpec> {
    let spec = &service.service.spec;
    let mut pod_labels = labels(service);
    pod_labels.insert("llm-d.ai/inference-serving".into(), "true".into());
    pod_labels.insert("llm-d.ai/engine-type".into(), "vllm".into());
    let mut annotations = BTreeMap::from([
        ("prometheus.io/scrape".to_owned(), "true".to_owned()),
        ("prometheus.io/port".to_owned(), RUNTIME_PORT.to_string()),
        ("prometheus.io/path".to_owned(), "/metrics".to_owned()),
        (
            "kubectl.kubernetes.io/default-container".to_owned(),
            RUNTIME_CONTAINER.to_owned(),
        ),
    ]);
    if spec.runtime.tls_secret_name.is_some() {
        pod_labels.insert(TLS_LABEL.into(), "true".into());
        annotations.insert("prometheus.io/scheme".into(), "https".into());
    }
    if let Some(restart) = service
        .service
        .metadata
        .annotations
        .as_ref()
        .and_then(|a| a.get(RESTART_ANNOTATION))
    {
        annotations.insert(RESTART_ANNOTATION.to_owned(), restart.clone());
    }
    let affinity: Option<Affinity> = parse("spec.affinity", spec.affinity.as_ref())?;
    let image = image(service, defaults);
    let mut template = PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(pod_labels),
            annotations: Some(annotations),
            ..ObjectMeta::default()
        }),
        spec: Some(PodSpec {
            service_account_name: Some(service.service.service_account_name()),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            termination_grace_period_seconds: Some(
                i64::from(spec.rollout_strategy.drain_timeout_seconds) + KILL_MARGIN_SECONDS,
            ),
            security_context: Some(pod_security()),
            node_selector: (!spec.node_selector.is_empty()).then(|| spec.node_selector.clone()),
            tolerations: (!spec.tolerations.is_empty()).then(|| spec.tolerations.clone()),
            affinity,
            topology_spread_constraints: Some(spread(service)),
            priority_class_name: spec.priority_class_name.clone(),
            image_pull_secrets: (!spec.image_pull_secrets.is_empty())
                .then(|| spec.image_pull_secrets.clone()),
            init_containers: model::init_container(service, defaults)
                .map(|container| vec![container]),
            containers: vec![runtime(service, image)],
            volumes: Some(volumes(service)),
            ..PodSpec::default()
        }),
    };
    if let Some(patch) = parse::<PodTemplateSpec>("spec.template", spec.template.as_ref())? {
        template.merge_from(patch);
    }
    Ok(template)
}

/// Replicas apart, on other nodes and in other zones, where there are any to choose from.
fn spread(service: &ValidatedService) -> Vec<TopologySpreadConstraint> {
    let apart = |topology: &str| TopologySpreadConstraint {
        max_skew: 1,
        topology_key: topology.to_owned(),
        when_unsatisfiable: "ScheduleAnyway".to_owned(),
        label_selector: Some(LabelSelector {
            match_labels: Some(selector(service)),
            ..LabelSelector::default()
        }),
        ..TopologySpreadConstraint::default()
    };
    ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
        .map(apart)
        .into()
}

fn parse<T: serde::de::DeserializeOwned>(
    path: &str,
    value: Option<&serde_json::Value>,
) -> Result<Option<T>, InvalidSpec> {
    // A pod spec without containers is no pod spec to the parser, and a patch need not name any.
    let mut value = value.cloned();
    if let Some(spec) = value
        .as_mut()
        .and_then(|v| v.get_mut("spec"))
        .and_then(|s| s.as_object_mut())
    {
        spec.entry("containers")
            .or_insert_with(|| serde_json::json!([]));
    }
    value
        .map(serde_json::from_value)
        .transpose()
        .map_err(|error| InvalidSpec::new(path, error.to_string()))
}

/// The image of the runtime container.
#[must_use]
pub fn image(service: &ValidatedService, defaults: &Defaults) -> String {
    let default = if service.gpus == 0 {
        &defaults.runtime_image
    } else {
        &defaults.runtime_image_cuda
    };
    service
        .service
        .spec
        .runtime
        .image
        .clone()
        .unwrap_or_else(|| default.clone())
}

pub(super) fn pod_security() -> PodSecurityContext {
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: Some(USER),
        run_as_group: Some(USER),
        fs_group: Some(USER),
        seccomp_profile: Some(SeccompProfile {
            type_: "RuntimeDefault".into(),
            ..SeccompProfile::default()
        }),
        ..PodSecurityContext::default()
    }
}

pub(super) fn container_security() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        read_only_root_filesystem: Some(true),
        capabilities: Some(Capabilities {
            drop: Some(vec!["ALL".into()]),
            add: None,
        }),
        ..SecurityContext::default()
    }
}

fn runtime(service: &ValidatedService, image: String) -> Container {
    let spec = &service.service.spec;
    let vllm = spec.runtime.engine == Engine::Vllm;
    let health = |path: &str, period: i32, failures: i32| Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String(RUNTIME_PORT_NAME.to_owned()),
            scheme: spec
                .runtime
                .tls_secret_name
                .as_ref()
                .map(|_| "HTTPS".to_owned()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period),
        timeout_seconds: Some(2),
        failure_threshold: Some(failures),
        ..Probe::default()
    };
    let mut mounts = vec![
        model::mount(false),
        VolumeMount {
            name: "tmp".into(),
            mount_path: "/tmp".into(),
            ..VolumeMount::default()
        },
    ];
    if spec.runtime.tls_secret_name.is_some() {
        mounts.push(VolumeMount {
            name: "tls".into(),
            mount_path: TLS_FOLDER.into(),
            read_only: Some(true),
            ..VolumeMount::default()
        });
    }
    if service.gpus > 1 {
        mounts.push(VolumeMount {
            name: "shm".into(),
            mount_path: SHARED_MEMORY.into(),
            ..VolumeMount::default()
        });
    }
    Container {
        name: RUNTIME_CONTAINER.into(),
        image: Some(image),
        image_pull_policy: Some("IfNotPresent".into()),
        args: Some(arguments(service)),
        env: Some(vec![if vllm {
            variable("HOME", "/tmp")
        } else {
            variable("ASHLAR_DRAIN_DELAY", drain_delay(service))
        }]),
        ports: Some(vec![ContainerPort {
            name: Some(RUNTIME_PORT_NAME.into()),
            container_port: RUNTIME_PORT,
            protocol: Some("TCP".into()),
            ..ContainerPort::default()
        }]),
        resources: Some(resources(service)),
        security_context: Some(container_security()),
        startup_probe: Some(health("/health", 1, spec.startup_timeout_seconds)),
        readiness_probe: Some(health("/health", 1, 3)),
        liveness_probe: (!vllm).then(|| health("/health/live", 10, 3)),
        lifecycle: vllm.then(|| Lifecycle {
            pre_stop: Some(LifecycleHandler {
                sleep: Some(SleepAction { seconds: 5 }),
                ..LifecycleHandler::default()
            }),
            ..Lifecycle::default()
        }),
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        volume_mounts: Some(mounts),
        ..Container::default()
    }
}

/// Seconds for which a leaving pod still takes new requests (`operator/design/20261125.drain-delay.md`). Gateways watch pods and
/// try elsewhere what a leaving one refuses; other clients find out by their address caches.
fn drain_delay(service: &ValidatedService) -> &'static str {
    let only_gateways = service.service.spec.endpoint.allow_from.is_empty();
    if only_gateways { "1" } else { "5" }
}

pub(super) fn variable(name: &str, value: &str) -> EnvVar {
    EnvVar {
        name: name.to_owned(),
        value: Some(value.to_owned()),
        ..EnvVar::default()
    }
}

fn arguments(service: &ValidatedService) -> Vec<String> {
    let spec = &service.service.spec;
    let mut args = vec![
        model::path(service),
        "--host=0.0.0.0".to_owned(),
        format!("--port={RUNTIME_PORT}"),
        format!(
            "--served-model-name={}",
            service.service.served_model_name()
        ),
    ];
    if spec.runtime.engine == Engine::Ashlar {
        args.push(format!(
            "--shutdown-timeout={}",
            spec.rollout_strategy.drain_timeout_seconds
        ));
        let device = match (spec.runtime.device, service.gpus) {
            (Device::Cpu, _) | (_, 0) => "cpu",
            (Device::Cuda, _) => "cuda",
            (Device::Auto, _) => "auto",
        };
        args.push(format!("--device={device}"));
    }
    if let Some(utilization) = spec
        .runtime
        .gpu_memory_utilization
        .filter(|_| service.gpus > 0)
    {
        args.push(format!("--gpu-memory-utilization={utilization}"));
    }
    if service.gpus > 1 {
        args.push(format!("--tensor-parallel-size={}", service.gpus));
    }
    if let Some(quantization) = spec.model.quantization.flag() {
        args.push(format!("--quantization={quantization}"));
    }
    if spec.runtime.tls_secret_name.is_some() {
        args.push(format!("--ssl-certfile={TLS_FOLDER}/{TLS_CERT_KEY}"));
        args.push(format!("--ssl-keyfile={TLS_FOLDER}/{TLS_PRIVATE_KEY_KEY}"));
        if spec.runtime.engine == Engine::Vllm {
            args.push("--enable-ssl-refresh".to_owned());
        }
    }
    args.extend(spec.runtime.args.iter().cloned());
    args
}

/// Whether `template` gives the runtime its GPUs by claims (dynamic resource allocation): the extended resource would be a second
/// set of them.
fn claims_devices(template: Option<&serde_json::Value>) -> bool {
    let containers = template.and_then(|t| t.pointer("/spec/containers")?.as_array());
    let mut runtime = containers
        .into_iter()
        .flatten()
        .filter(|c| c["name"] == RUNTIME_CONTAINER);
    runtime.any(|c| {
        let claims = c.pointer("/resources/claims").and_then(|c| c.as_array());
        claims.is_some_and(|claims| !claims.is_empty())
    })
}

fn resources(service: &ValidatedService) -> ResourceRequirements {
    let spec = &service.service.spec;
    let given = spec.resources.clone().unwrap_or_default();
    let (mut limits, requests) = (given.limits, given.requests);
    if service.gpus > 0 && !claims_devices(spec.template.as_ref()) {
        limits.insert(
            spec.parallelism.resource_name.clone(),
            Quantity(service.gpus.to_string()),
        );
    }
    ResourceRequirements {
        limits: (!limits.is_empty()).then_some(limits),
        requests: (!requests.is_empty()).then_some(requests),
        claims: None,
    }
}

fn volumes(service: &ValidatedService) -> Vec<Volume> {
    let mut volumes = vec![
        model::volume(service, !model::is_filled_by_job(service)),
        scratch("tmp", None),
    ];
    if let Some(secret) = &service.service.spec.runtime.tls_secret_name {
        volumes.push(tls(secret));
    }
    if service.gpus > 1 {
        volumes.push(scratch("shm", Some("Memory".into())));
    }
    volumes
}

/// The pod's certificate and key, and nothing else that the Secret may hold.
fn tls(secret: &str) -> Volume {
    let item = |key: &str| KeyToPath {
        key: key.to_owned(),
        path: key.to_owned(),
        mode: None,
    };
    Volume {
        name: "tls".into(),
        secret: Some(SecretVolumeSource {
            secret_name: Some(secret.to_owned()),
            default_mode: Some(0o440),
            items: Some(vec![item(TLS_CERT_KEY), item(TLS_PRIVATE_KEY_KEY)]),
            optional: None,
        }),
        ..Volume::default()
    }
}

/// A folder that ends with the pod.
pub(super) fn scratch(name: &str, medium: Option<String>) -> Volume {
    Volume {
        name: name.into(),
        empty_dir: Some(EmptyDirVolumeSource {
            medium,
            size_limit: None,
        }),
        ..Volume::default()
    }
}
