//! What the schema cannot say: turns a service into facts that `build` can trust, or says what is wrong. Pure.

use ashlar_crds::{Device, Engine, InferenceService, InferenceServiceSpec};
use kube::ResourceExt as _;

use super::quantity;

/// Why a spec that passed the schema cannot be built. The message has the field's path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {message}")]
pub struct InvalidSpec {
    /// Field, from `spec`.
    pub path: String,
    /// What is wrong, and what to write instead.
    pub message: String,
}

impl InvalidSpec {
    pub(crate) fn new(path: &str, message: impl Into<String>) -> Self {
        Self {
            path: path.to_owned(),
            message: message.into(),
        }
    }
}

/// Where the model's files come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// Downloaded by `ashlar pull`.
    Hub {
        /// `ORG/NAME`.
        repository: String,
    },
    /// Downloaded by `ashlar pull` from an S3-compatible store.
    Bucket {
        /// Folder or `.gguf` file: `BUCKET/PATH`.
        path: String,
    },
    /// On a claim of the namespace.
    Claim {
        /// Its name.
        claim: String,
        /// Folder or file in it, without a leading slash; may be empty.
        path: String,
    },
    /// In an image, mounted as a volume.
    Image {
        /// The image.
        reference: String,
    },
}

impl ModelSource {
    /// The address that `ashlar pull` takes; none for what is read in place.
    #[must_use]
    pub fn pulled_from(&self) -> Option<String> {
        match self {
            Self::Hub { repository } => Some(repository.clone()),
            Self::Bucket { path } => Some(format!("s3://{path}")),
            Self::Claim { .. } | Self::Image { .. } => None,
        }
    }

    /// What to pull when the spec names no revision.
    #[must_use]
    pub fn default_revision(&self) -> &'static str {
        match self {
            Self::Bucket { .. } => "latest",
            Self::Hub { .. } | Self::Claim { .. } | Self::Image { .. } => "main",
        }
    }
}

/// A service whose every field can be built from.
#[derive(Debug, Clone)]
pub struct ValidatedService {
    /// The resource itself.
    pub service: InferenceService,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.uid`, for owner references.
    pub uid: String,
    /// Where the model comes from.
    pub source: ModelSource,
    /// GPUs of one pod; 0 on the CPU.
    pub gpus: i32,
    /// Replicas wanted now.
    pub wanted: i32,
}

/// Checks a service.
///
/// # Errors
/// [`InvalidSpec`] with the path of the field.
pub fn validate(service: &InferenceService) -> Result<ValidatedService, InvalidSpec> {
    let spec = &service.spec;
    let source = source(&spec.model.uri)?;
    check_template(spec.template.as_ref())?;
    let gpus = if spec.runtime.device == Device::Cpu {
        0
    } else {
        spec.parallelism.tensor
    };
    if gpus > 0
        && let Some(limit) = spec
            .resources
            .as_ref()
            .and_then(|r| r.limits.get(&spec.parallelism.resource_name))
        && limit.0 != gpus.to_string()
    {
        return Err(InvalidSpec::new(
            "spec.resources.limits",
            format!(
                "{} is {}, but spec.parallelism.tensor is {gpus}; remove the limit",
                spec.parallelism.resource_name, limit.0
            ),
        ));
    }
    check_cache(spec)?;
    // Until the autoscaler has decided, a scaled service keeps what it had.
    let wanted = crate::autoscaler::initial(service);
    Ok(ValidatedService {
        name: service.name_any(),
        namespace: service.namespace().unwrap_or_default(),
        uid: service.uid().unwrap_or_default(),
        source,
        gpus,
        wanted,
        service: service.clone(),
    })
}

/// A cache that evicts has to see what is in use, and its bound has to be a number of bytes.
fn check_cache(spec: &InferenceServiceSpec) -> Result<(), InvalidSpec> {
    let Some(cache) = &spec.cache else {
        return Ok(());
    };
    let bounds = [
        (
            "pvc",
            cache.pvc.as_ref().and_then(|pvc| pvc.max_bytes.as_ref()),
        ),
        (
            "hostPath",
            cache
                .host_path
                .as_ref()
                .and_then(|host| host.max_bytes.as_ref()),
        ),
    ];
    for (kind, bound) in bounds {
        let Some(bound) = bound else { continue };
        let path = format!("spec.cache.{kind}.maxBytes");
        if quantity::whole(&bound.0).is_none() {
            return Err(InvalidSpec::new(
                &path,
                format!("{} is no number of bytes; write it as 200Gi", bound.0),
            ));
        }
        if kind == "hostPath" && spec.runtime.engine == Engine::Vllm {
            return Err(InvalidSpec::new(
                &path,
                "needs runtime.engine: ashlar, which marks the models that it uses; remove it, or use cache.pvc",
            ));
        }
    }
    Ok(())
}

fn source(uri: &str) -> Result<ModelSource, InvalidSpec> {
    let path = "spec.model.uri";
    let (scheme, rest) = uri
        .split_once("://")
        .ok_or_else(|| InvalidSpec::new(path, "must be SCHEME://…"))?;
    if rest.is_empty() {
        return Err(InvalidSpec::new(
            path,
            format!("{scheme}:// needs something after it"),
        ));
    }
    match scheme {
        "hf" => Ok(ModelSource::Hub {
            repository: rest.to_owned(),
        }),
        "s3" => {
            let rest = rest.trim_end_matches('/');
            if rest.split('/').any(|part| part.is_empty() || part == "..") {
                return Err(InvalidSpec::new(path, "must not contain '..' or '//'"));
            }
            Ok(ModelSource::Bucket {
                path: rest.to_owned(),
            })
        }
        "oci" => Ok(ModelSource::Image {
            reference: rest.to_owned(),
        }),
        "pvc" => {
            let (claim, folder) = rest.split_once('/').unwrap_or((rest, ""));
            if folder.split('/').any(|part| part == "..") {
                return Err(InvalidSpec::new(path, "must not contain '..'"));
            }
            Ok(ModelSource::Claim {
                claim: claim.to_owned(),
                path: folder.trim_matches('/').to_owned(),
            })
        }
        _ => Err(InvalidSpec::new(
            path,
            format!("scheme {scheme}:// is not known; use hf://, s3://, pvc:// or oci://"),
        )),
    }
}

/// `template` may add to the pod, but not to what the operator relies on.
fn check_template(template: Option<&serde_json::Value>) -> Result<(), InvalidSpec> {
    let Some(template) = template else {
        return Ok(());
    };
    let forbidden = |path: &str| {
        Err(InvalidSpec::new(
            path,
            "belongs to the operator; remove it from the template",
        ))
    };
    if let Some(labels) = template
        .pointer("/metadata/labels")
        .and_then(|l| l.as_object())
        && let Some(label) = labels
            .keys()
            .find(|label| label.starts_with("serving.ashlar.dev/"))
    {
        return forbidden(&format!("spec.template.metadata.labels.{label}"));
    }
    if template.pointer("/spec/restartPolicy").is_some() {
        return forbidden("spec.template.spec.restartPolicy");
    }
    let containers = template
        .pointer("/spec/containers")
        .and_then(|c| c.as_array());
    for container in containers.into_iter().flatten() {
        if container.get("name").and_then(|n| n.as_str())
            != Some(ashlar_crds::names::RUNTIME_CONTAINER)
        {
            continue;
        }
        for field in [
            "command",
            "args",
            "ports",
            "livenessProbe",
            "readinessProbe",
            "startupProbe",
        ] {
            if container.get(field).is_some() {
                return forbidden(&format!(
                    "spec.template.spec.containers[name=runtime].{field}"
                ));
            }
        }
    }
    Ok(())
}
