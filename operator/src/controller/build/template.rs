//! The pod template of a revision, rendered once.

use std::collections::BTreeMap;

use ashlar_crds::{
    Device, Engine,
    names::{
        PULL_CONTAINER, RESTART_ANNOTATION, RUNTIME_CONTAINER, RUNTIME_PORT, RUNTIME_PORT_NAME,
    },
};
use k8s_openapi::{
    DeepMerge as _,
    api::core::v1::{
        Affinity, Capabilities, ConfigMapKeySelector, Container, ContainerPort,
        EmptyDirVolumeSource, EnvVar, EnvVarSource, HTTPGetAction, ImageVolumeSource, Lifecycle,
        LifecycleHandler, PersistentVolumeClaimVolumeSource, PodSecurityContext, PodSpec,
        PodTemplateSpec, Probe, ResourceRequirements, SeccompProfile, SecretKeySelector,
        SecurityContext, SleepAction, Volume, VolumeMount,
    },
    apimachinery::pkg::{
        api::resource::Quantity, apis::meta::v1::ObjectMeta, util::intstr::IntOrString,
    },
};

use sha2::{Digest as _, Sha256};

use super::{
    super::validate::{InvalidSpec, ModelSource, ValidatedService},
    Defaults, labels, revision,
};

/// User and group of every container.
const USER: i64 = 65532;
/// Where the model is mounted.
const MODELS: &str = "/models";
/// Seconds past the drain before the kubelet kills.
const KILL_MARGIN_SECONDS: i64 = 15;
/// Variable of `pull` that holds what to download.
const PIN_VARIABLE: &str = "ASHLAR_PINNED_REVISION";
/// Memory-backed share for tensor parallelism.
const SHARED_MEMORY: &str = "/dev/shm";

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
            priority_class_name: spec.priority_class_name.clone(),
            image_pull_secrets: (!spec.image_pull_secrets.is_empty())
                .then(|| spec.image_pull_secrets.clone()),
            init_containers: pull(service, defaults).map(|container| vec![container]),
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

fn pod_security() -> PodSecurityContext {
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

fn container_security() -> SecurityContext {
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
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period),
        timeout_seconds: Some(2),
        failure_threshold: Some(failures),
        ..Probe::default()
    };
    let mut mounts = vec![
        VolumeMount {
            name: "model".into(),
            mount_path: MODELS.into(),
            read_only: Some(true),
            ..VolumeMount::default()
        },
        VolumeMount {
            name: "tmp".into(),
            mount_path: "/tmp".into(),
            ..VolumeMount::default()
        },
    ];
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
            // The gateways watch pods and try elsewhere what a leaving one refuses: they need no longer. Whoever lets other
            // clients in (endpoint.allowFrom) can give their address caches more time with --drain-delay.
            variable("ASHLAR_DRAIN_DELAY", "1")
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

fn variable(name: &str, value: &str) -> EnvVar {
    EnvVar {
        name: name.to_owned(),
        value: Some(value.to_owned()),
        ..EnvVar::default()
    }
}

/// Where the runtime finds the model.
fn model_path(service: &ValidatedService) -> String {
    match &service.source {
        ModelSource::Claim { path, .. } if !path.is_empty() => format!("{MODELS}/{path}"),
        ModelSource::Hub { repository } => {
            let cache = service.service.spec.cache.as_ref();
            let shared = cache.is_some_and(|c| c.pvc.is_some() || c.host_path.is_some());
            if shared {
                format!("{MODELS}/{}", cache_folder(service, repository))
            } else {
                MODELS.to_owned()
            }
        }
        ModelSource::Claim { .. } | ModelSource::Image { .. } => MODELS.to_owned(),
    }
}

/// Folder of a model in a cache that many models share: by repository, revision and source.
fn cache_folder(service: &ValidatedService, repository: &str) -> String {
    let model = &service.service.spec.model;
    let identity = serde_json::json!([repository, model.revision, model.endpoint]);
    let digest = Sha256::digest(identity.to_string());
    format!("sha256/{}", hex::encode(&digest[..16]))
}

fn arguments(service: &ValidatedService) -> Vec<String> {
    let spec = &service.service.spec;
    let mut args = vec![
        model_path(service),
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
    args.extend(spec.runtime.args.iter().cloned());
    args
}

fn resources(service: &ValidatedService) -> ResourceRequirements {
    let spec = &service.service.spec;
    let given = spec.resources.clone().unwrap_or_default();
    let (mut limits, requests) = (given.limits, given.requests);
    if service.gpus > 0 {
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
    let spec = &service.service.spec;
    let mut model = Volume {
        name: "model".into(),
        ..Volume::default()
    };
    match &service.source {
        ModelSource::Image { reference } => {
            model.image = Some(ImageVolumeSource {
                reference: Some(reference.clone()),
                pull_policy: Some("IfNotPresent".into()),
            });
        }
        ModelSource::Claim { claim, .. } => {
            model.persistent_volume_claim = Some(PersistentVolumeClaimVolumeSource {
                claim_name: claim.clone(),
                read_only: Some(true),
            });
        }
        ModelSource::Hub { .. } => match &spec.cache {
            Some(cache) if cache.pvc.is_some() => {
                let claim = cache
                    .pvc
                    .as_ref()
                    .map(|pvc| pvc.claim_name.clone())
                    .unwrap_or_default();
                model.persistent_volume_claim = Some(PersistentVolumeClaimVolumeSource {
                    claim_name: claim,
                    read_only: None,
                });
            }
            Some(cache) if cache.host_path.is_some() => {
                let path = cache
                    .host_path
                    .as_ref()
                    .map(|host| host.path.clone())
                    .unwrap_or_default();
                model.host_path = Some(k8s_openapi::api::core::v1::HostPathVolumeSource {
                    path: format!("{}/{}", path.trim_end_matches('/'), service.namespace),
                    type_: Some("Directory".into()),
                });
            }
            cache => {
                let size_limit = cache
                    .as_ref()
                    .and_then(|c| c.empty_dir.as_ref())
                    .and_then(|e| e.size_limit.clone());
                model.empty_dir = Some(EmptyDirVolumeSource {
                    size_limit,
                    medium: None,
                });
            }
        },
    }
    let scratch = |name: &str, medium: Option<String>| Volume {
        name: name.into(),
        empty_dir: Some(EmptyDirVolumeSource {
            medium,
            size_limit: None,
        }),
        ..Volume::default()
    };
    let mut volumes = vec![model, scratch("tmp", None)];
    if service.gpus > 1 {
        volumes.push(scratch("shm", Some("Memory".into())));
    }
    volumes
}

/// The first step of a pod whose model comes from the hub.
fn pull(service: &ValidatedService, defaults: &Defaults) -> Option<Container> {
    let ModelSource::Hub { repository } = &service.source else {
        return None;
    };
    let model = &service.service.spec.model;
    let mut command = vec![
        "/usr/local/bin/ashlar".to_owned(),
        "pull".to_owned(),
        repository.clone(),
        format!("--dest={}", model_path(service)),
        "--result-file=/dev/termination-log".to_owned(),
        // The runtime is not there yet: its port, which the NetworkPolicy opens to the operator, says how far this is.
        format!("--status-port={RUNTIME_PORT}"),
        format!("--revision=$({PIN_VARIABLE})"),
    ];
    command.extend(
        model
            .endpoint
            .iter()
            .map(|endpoint| format!("--endpoint={endpoint}")),
    );
    let hash = revision::hash(&service.service);
    let mut env = vec![
        variable("HOME", "/tmp"),
        EnvVar {
            name: PIN_VARIABLE.into(),
            value_from: Some(EnvVarSource {
                config_map_key_ref: Some(ConfigMapKeySelector {
                    name: service.service.revision_name(&hash),
                    key: revision::PIN_KEY.into(),
                    optional: None,
                }),
                ..EnvVarSource::default()
            }),
            ..EnvVar::default()
        },
    ];
    if let Some(token) = &model.token_secret_ref {
        env.push(EnvVar {
            name: "HF_TOKEN".into(),
            value_from: Some(EnvVarSource {
                secret_key_ref: Some(SecretKeySelector {
                    name: token.name.clone(),
                    key: token.key.clone(),
                    optional: None,
                }),
                ..EnvVarSource::default()
            }),
            ..EnvVar::default()
        });
    }
    Some(Container {
        name: PULL_CONTAINER.into(),
        image: Some(defaults.runtime_image.clone()),
        image_pull_policy: Some("IfNotPresent".into()),
        command: Some(command),
        env: Some(env),
        security_context: Some(container_security()),
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        volume_mounts: Some(vec![
            VolumeMount {
                name: "model".into(),
                mount_path: MODELS.into(),
                ..VolumeMount::default()
            },
            VolumeMount {
                name: "tmp".into(),
                mount_path: "/tmp".into(),
                ..VolumeMount::default()
            },
        ]),
        ..Container::default()
    })
}
