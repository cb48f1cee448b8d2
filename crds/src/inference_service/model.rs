//! `spec.model`: which model, and from where.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::secret::{SecretKeyReference, SecretReference};

/// Which model, and from where.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.uri.matches('^(hf://[A-Za-z0-9][-A-Za-z0-9._]*(/[-A-Za-z0-9._]+)?|s3://[a-z0-9][-a-z0-9.]+(/[-A-Za-z0-9._=+@]+)*/?|pvc://[a-z0-9][-a-z0-9.]*(/[-A-Za-z0-9._/]*)?|oci://[^ ]+)$')").message("spec.model.uri must be hf://ORG/NAME, s3://BUCKET/FOLDER, pvc://CLAIM/PATH or oci://IMAGE"),
    validation = Rule::new("!self.uri.contains('..')").message("spec.model.uri must not contain '..'"),
    validation = Rule::new("!has(self.revision) || self.uri.startsWith('hf://')").message("spec.model.revision is for hf:// models; put the tag or digest of an oci:// model in its uri"),
    validation = Rule::new("!has(self.tokenSecretRef) || self.uri.startsWith('hf://')").message("spec.model.tokenSecretRef is for hf:// models"),
    validation = Rule::new("!has(self.endpoint) || self.uri.startsWith('hf://') || self.uri.startsWith('s3://')").message("spec.model.endpoint is for hf:// and s3:// models"),
    validation = Rule::new("!(has(self.region) || has(self.credentialsSecretRef)) || self.uri.startsWith('s3://')").message("spec.model.region and spec.model.credentialsSecretRef are for s3:// models")
)]
pub struct ModelSpec {
    /// `hf://ORG/NAME`, `s3://BUCKET/FOLDER`, `pvc://CLAIM/PATH` or `oci://IMAGE`.
    #[schemars(length(min = 1, max = 512))]
    pub uri: String,
    /// Commit, tag or branch of an `hf://` model; resolved once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 128),
        regex(pattern = r"^[A-Za-z0-9][-A-Za-z0-9._/]*$")
    )]
    pub revision: Option<String>,
    /// Name served by the API; defaults to the service's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 128),
        regex(pattern = r"^[A-Za-z0-9][-A-Za-z0-9._/:]*$")
    )]
    pub name: Option<String>,
    /// How the weights are quantised; `auto` reads it from the model.
    #[serde(default)]
    pub quantization: Quantization,
    /// Token for a gated or private `hf://` model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_secret_ref: Option<SecretKeyReference>,
    /// Address of a mirror of the hub, or of an S3-compatible store; Amazon's own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256), regex(pattern = r"^https?://[^ ]+$"))]
    pub endpoint: Option<String>,
    /// Region of the store of an `s3://` model; `us-east-1` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[a-z0-9][-a-z0-9]*$"))]
    pub region: Option<String>,
    /// Secret with `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and, if there is one, `AWS_SESSION_TOKEN`, for an `s3://`
    /// model; requests are not signed without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_secret_ref: Option<SecretReference>,
}

/// How weights are quantised.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// Read from the model.
    #[default]
    Auto,
    /// Not quantised.
    None,
    /// AWQ, 4 bit.
    Awq,
    /// GPTQ, 4 bit.
    Gptq,
    /// FP8 (e4m3).
    Fp8,
    /// GGUF block types.
    Gguf,
}

impl Quantization {
    /// Value of the runtime's `--quantization`; none for `auto` and `none`, which pass no flag.
    #[must_use]
    pub fn flag(self) -> Option<&'static str> {
        match self {
            Self::Auto | Self::None => None,
            Self::Awq => Some("awq"),
            Self::Gptq => Some("gptq"),
            Self::Fp8 => Some("fp8"),
            Self::Gguf => Some("gguf"),
        }
    }
}
