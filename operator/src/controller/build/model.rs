//! Where the model's files are in a pod, and what fetches them: an init container, or a Job that fills a claim once.

use std::collections::BTreeMap;

use ashlar_crds::names::{PULL_CONTAINER, PULL_LABEL, REVISION_LABEL, RUNTIME_PORT};
use k8s_openapi::{
    api::{
        batch::v1::{Job, JobSpec},
        core::v1::{
            ConfigMapKeySelector, Container, ContainerPort, EmptyDirVolumeSource, EnvVar,
            EnvVarSource, HostPathVolumeSource, ImageVolumeSource,
            PersistentVolumeClaimVolumeSource, PodSpec, PodTemplateSpec, SecretKeySelector, Volume,
            VolumeMount,
        },
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use sha2::{Digest as _, Sha256};

use super::{
    super::{
        quantity,
        validate::{ModelSource, ValidatedService},
    },
    Defaults, labels, metadata, revision,
    template::{container_security, pod_security, scratch, variable},
};

/// Where the model is mounted.
const MODELS: &str = "/models";
/// Variable of `pull` that holds what to download.
const PIN_VARIABLE: &str = "ASHLAR_PINNED_REVISION";
/// The keys of `credentialsSecretRef`, and whether one may be missing.
const STORE_KEYS: [(&str, bool); 3] = [
    ("AWS_ACCESS_KEY_ID", false),
    ("AWS_SECRET_ACCESS_KEY", false),
    ("AWS_SESSION_TOKEN", true),
];

/// True when a Job fills a claim before there are pods.
#[must_use]
pub fn is_filled_by_job(service: &ValidatedService) -> bool {
    let cache = service.service.spec.cache.as_ref();
    service.source.pulled_from().is_some() && cache.is_some_and(|cache| cache.pvc.is_some())
}

/// The folder or file that the runtime loads.
pub(super) fn path(service: &ValidatedService) -> String {
    match &service.source {
        ModelSource::Claim { path, .. } if !path.is_empty() => format!("{MODELS}/{path}"),
        ModelSource::Bucket { path } => match path.rsplit_once('/') {
            Some((_, file)) if file.ends_with(".gguf") => format!("{}/{file}", folder(service)),
            _ => folder(service),
        },
        ModelSource::Hub { .. } => folder(service),
        ModelSource::Claim { .. } | ModelSource::Image { .. } => MODELS.to_owned(),
    }
}

/// The folder that `pull` fills.
fn folder(service: &ValidatedService) -> String {
    let cache = service.service.spec.cache.as_ref();
    let shared = cache.is_some_and(|c| c.pvc.is_some() || c.host_path.is_some());
    if shared {
        format!("{MODELS}/sha256/{}", cache_folder(service))
    } else {
        MODELS.to_owned()
    }
}

/// Name of a model in a cache that many models share: by repository, revision and source.
fn cache_folder(service: &ValidatedService) -> String {
    let model = &service.service.spec.model;
    let identity =
        serde_json::json!([service.source.pulled_from(), model.revision, model.endpoint]);
    let digest = Sha256::digest(identity.to_string());
    hex::encode(&digest[..16])
}

/// The name of the folder of a shared cache that a pod made from this template loads; none when it loads from elsewhere.
#[must_use]
pub fn cached_by(template: &PodTemplateSpec, claim: &str) -> Option<String> {
    let spec = template.spec.as_ref()?;
    let mut volumes = spec.volumes.iter().flatten();
    let mounts = volumes.any(|volume| {
        let source = volume.persistent_volume_claim.as_ref();
        source.is_some_and(|source| source.claim_name == claim)
    });
    let runtime = spec.containers.first().filter(|_| mounts)?;
    let model = runtime.args.as_ref()?.first()?;
    let inside = model.strip_prefix(&format!("{MODELS}/sha256/"))?;
    Some(inside.split('/').next().unwrap_or(inside).to_owned())
}

/// The volume with the model; `writable` for whoever fills it.
pub(super) fn volume(service: &ValidatedService, writable: bool) -> Volume {
    let mut model = Volume {
        name: "model".into(),
        ..Volume::default()
    };
    let cache = service.service.spec.cache.as_ref();
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
        ModelSource::Hub { .. } | ModelSource::Bucket { .. } => {
            if let Some(pvc) = cache.and_then(|cache| cache.pvc.as_ref()) {
                model.persistent_volume_claim = Some(PersistentVolumeClaimVolumeSource {
                    claim_name: pvc.claim_name.clone(),
                    read_only: (!writable).then_some(true),
                });
            } else if let Some(host) = cache.and_then(|cache| cache.host_path.as_ref()) {
                let path = host.path.trim_end_matches('/');
                model.host_path = Some(HostPathVolumeSource {
                    path: format!("{path}/{}", service.namespace),
                    type_: Some("Directory".into()),
                });
            } else {
                let empty = cache.and_then(|cache| cache.empty_dir.as_ref());
                model.empty_dir = Some(EmptyDirVolumeSource {
                    size_limit: empty.and_then(|empty| empty.size_limit.clone()),
                    medium: None,
                });
            }
        }
    }
    model
}

/// Mounts the model.
pub(super) fn mount(writable: bool) -> VolumeMount {
    VolumeMount {
        name: "model".into(),
        mount_path: MODELS.into(),
        read_only: (!writable).then_some(true),
        ..VolumeMount::default()
    }
}

/// The first step of a pod that fetches its own model.
pub(super) fn init_container(service: &ValidatedService, defaults: &Defaults) -> Option<Container> {
    let hash = revision::hash(&service.service);
    (!is_filled_by_job(service)).then(|| pull(service, defaults, &hash, &[]))?
}

/// `ashlar pull`, for a model that is downloaded. `keep` names folders of the cache that must stay.
fn pull(
    service: &ValidatedService,
    defaults: &Defaults,
    hash: &str,
    keep: &[String],
) -> Option<Container> {
    let from = service.source.pulled_from()?;
    let model = &service.service.spec.model;
    let mut command = vec![
        "/usr/local/bin/ashlar".to_owned(),
        "pull".to_owned(),
        from,
        format!("--dest={}", folder(service)),
        "--result-file=/dev/termination-log".to_owned(),
        // The runtime is not there yet: its port, which the NetworkPolicy opens to the operator, says how far this is.
        format!("--status-port={RUNTIME_PORT}"),
        format!("--revision=$({PIN_VARIABLE})"),
    ];
    let endpoint = model.endpoint.iter();
    command.extend(endpoint.map(|endpoint| format!("--endpoint={endpoint}")));
    let region = model.region.iter();
    command.extend(region.map(|region| format!("--region={region}")));
    if let Some(bytes) = max_bytes(service) {
        command.push(format!("--max-cache-bytes={bytes}"));
        command.extend(keep.iter().map(|folder| format!("--keep={folder}")));
    }
    Some(Container {
        name: PULL_CONTAINER.into(),
        image: Some(defaults.runtime_image.clone()),
        image_pull_policy: Some("IfNotPresent".into()),
        command: Some(command),
        env: Some(environment(service, hash)),
        security_context: Some(container_security()),
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        volume_mounts: Some(vec![
            mount(true),
            VolumeMount {
                name: "tmp".into(),
                mount_path: "/tmp".into(),
                ..VolumeMount::default()
            },
        ]),
        ..Container::default()
    })
}

fn max_bytes(service: &ValidatedService) -> Option<u64> {
    let cache = service.service.spec.cache.as_ref()?;
    let of_claim = cache.pvc.as_ref().and_then(|pvc| pvc.max_bytes.as_ref());
    let of_host = cache
        .host_path
        .as_ref()
        .and_then(|host| host.max_bytes.as_ref());
    quantity::whole(&of_claim.or(of_host)?.0)
}

fn environment(service: &ValidatedService, hash: &str) -> Vec<EnvVar> {
    let model = &service.service.spec.model;
    let from_secret = |variable: &str, secret: &str, key: &str, optional: bool| EnvVar {
        name: variable.to_owned(),
        value_from: Some(EnvVarSource {
            secret_key_ref: Some(SecretKeySelector {
                name: secret.to_owned(),
                key: key.to_owned(),
                optional: optional.then_some(true),
            }),
            ..EnvVarSource::default()
        }),
        ..EnvVar::default()
    };
    let mut variables = vec![
        variable("HOME", "/tmp"),
        EnvVar {
            name: PIN_VARIABLE.into(),
            value_from: Some(EnvVarSource {
                config_map_key_ref: Some(ConfigMapKeySelector {
                    name: service.service.revision_name(hash),
                    key: revision::PIN_KEY.into(),
                    optional: None,
                }),
                ..EnvVarSource::default()
            }),
            ..EnvVar::default()
        },
    ];
    if let Some(token) = &model.token_secret_ref {
        variables.push(from_secret("HF_TOKEN", &token.name, &token.key, false));
    }
    if let Some(secret) = &model.credentials_secret_ref {
        let keys = STORE_KEYS.iter();
        variables
            .extend(keys.map(|(key, optional)| from_secret(key, &secret.name, key, *optional)));
    }
    variables
}

/// The Job that fills the claim for a revision; none when no Job has to. It needs no GPU, and tries again for ever, as an init
/// container would.
#[must_use]
pub fn job(
    service: &ValidatedService,
    defaults: &Defaults,
    hash: &str,
    keep: &[String],
) -> Option<Job> {
    if !is_filled_by_job(service) {
        return None;
    }
    let spec = &service.service.spec;
    let mut meta = metadata(service, service.service.pull_name(hash));
    let of_revision = (REVISION_LABEL.to_owned(), hash.to_owned());
    meta.labels
        .get_or_insert_default()
        .extend([of_revision.clone()]);
    // Not the label of pods that take requests.
    let mut pod_labels: BTreeMap<String, String> = labels(service);
    pod_labels.retain(|label, _| !label.starts_with("serving.ashlar.dev/"));
    pod_labels.extend([of_revision, (PULL_LABEL.to_owned(), service.name.clone())]);
    let mut container = pull(service, defaults, hash, keep)?;
    container.ports = Some(vec![ContainerPort {
        name: Some("status".into()),
        container_port: RUNTIME_PORT,
        protocol: Some("TCP".into()),
        ..ContainerPort::default()
    }]);
    let pod = PodSpec {
        service_account_name: Some(service.service.service_account_name()),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        restart_policy: Some("OnFailure".into()),
        security_context: Some(pod_security()),
        tolerations: (!spec.tolerations.is_empty()).then(|| spec.tolerations.clone()),
        priority_class_name: spec.priority_class_name.clone(),
        image_pull_secrets: (!spec.image_pull_secrets.is_empty())
            .then(|| spec.image_pull_secrets.clone()),
        containers: vec![container],
        volumes: Some(vec![volume(service, true), scratch("tmp", None)]),
        ..PodSpec::default()
    };
    Some(Job {
        metadata: meta,
        spec: Some(JobSpec {
            backoff_limit: Some(i32::MAX),
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta {
                    labels: Some(pod_labels),
                    ..ObjectMeta::default()
                }),
                spec: Some(pod),
            },
            ..JobSpec::default()
        }),
        ..Job::default()
    })
}
