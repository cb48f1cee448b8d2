//! InferenceServices as a user writes them, and what a user reads back.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::{Api, ApiResource, DynamicObject, ListParams, Patch, PatchParams};
use kube::core::GroupVersionKind;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::namespace::Namespace;
use crate::wait::{self, Seen};

/// The label that every child of a service carries, with the service's name as its value.
pub const SERVICE_LABEL: &str = "serving.ashlar.dev/service";

/// The resource, known by name only.
#[must_use]
pub fn resource() -> ApiResource {
    ApiResource::from_gvk_with_plural(
        &GroupVersionKind::gvk("serving.ashlar.dev", "v1alpha1", "InferenceService"),
        "inferenceservices",
    )
}

/// A manifest of a service on the CPU with the default model, open to everybody.
#[must_use]
pub fn manifest(namespace: &Namespace, name: &str) -> Value {
    json!({
        "apiVersion": "serving.ashlar.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": name, "namespace": namespace.name},
        "spec": {
            "model": {"uri": model_uri()},
            "runtime": {"device": "cpu"},
            "endpoint": {"auth": "None"},
        },
    })
}

fn model_uri() -> String {
    std::env::var("ASHLAR_E2E_MODEL_URI")
        .unwrap_or_else(|_| "oci://ashlar.local/models/smollm2-135m-instruct:q4_1".to_owned())
}

/// One condition of a status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// `Ready`, `ModelReady`, …
    pub r#type: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// CamelCase.
    #[serde(default)]
    pub reason: String,
    /// What to do next.
    #[serde(default)]
    pub message: String,
}

/// The condition `kind` of a service, if it has one.
#[must_use]
pub fn condition(service: &DynamicObject, kind: &str) -> Option<Condition> {
    let conditions = service.data.pointer("/status/conditions")?.as_array()?;
    conditions
        .iter()
        .filter_map(|value| serde_json::from_value::<Condition>(value.clone()).ok())
        .find(|c| c.r#type == kind)
}

/// Whether `Ready` is True for the newest spec.
#[must_use]
pub fn is_ready(service: &DynamicObject) -> bool {
    let observed = service
        .data
        .pointer("/status/observedGeneration")
        .and_then(Value::as_i64);
    observed == service.metadata.generation
        && condition(service, "Ready").is_some_and(|ready| ready.status == "True")
}

/// A text field of the service, by JSON pointer.
///
/// # Errors
/// When it is absent.
pub fn text(service: &DynamicObject, pointer: &str) -> Result<String> {
    let found = service.data.pointer(pointer).and_then(Value::as_str);
    Ok(found
        .with_context(|| format!("no {pointer} in {}", service.data))?
        .to_owned())
}

impl Namespace {
    /// The InferenceServices of this namespace.
    #[must_use]
    pub fn services(&self) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), &self.name, &resource())
    }

    /// The pods of a service.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub async fn pods_of(&self, service: &str) -> Result<Vec<Pod>> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.name);
        let its = ListParams::default().labels(&format!("{SERVICE_LABEL}={service}"));
        Ok(pods.list(&its).await?.items)
    }

    /// Asks a service [`QUESTION`] at its own address; the answer must be right.
    ///
    /// # Errors
    /// When it has no address, or the answer is none or wrong.
    pub async fn ask(&self, service: &DynamicObject) -> Result<()> {
        let url = format!("{}/chat/completions", text(service, "/status/url")?);
        let question = chat(&service.name_any(), QUESTION, 32);
        let answer = self.http.post(&url, &question).await?.chat_text()?;
        ensure!(answer.contains("Paris"), "the answer is {answer:?}");
        Ok(())
    }

    /// Applies a manifest of any kind, as `kubectl apply --server-side` does.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub async fn apply(&self, manifest: &Value) -> Result<DynamicObject, kube::Error> {
        let part = |pointer: &str| {
            manifest
                .pointer(pointer)
                .and_then(Value::as_str)
                .unwrap_or_default()
        };
        let (group, version) = part("/apiVersion")
            .split_once('/')
            .unwrap_or(("", part("/apiVersion")));
        let kind = GroupVersionKind::gvk(group, version, part("/kind"));
        let api: Api<DynamicObject> = Api::namespaced_with(
            self.client.clone(),
            &self.name,
            &ApiResource::from_gvk(&kind),
        );
        api.patch(
            part("/metadata/name"),
            &PatchParams::apply("e2e").force(),
            &Patch::Apply(manifest),
        )
        .await
    }

    /// Applies a service and waits until it is Ready.
    ///
    /// # Errors
    /// When it is refused, or not Ready within [`wait::STARTUP`].
    pub async fn serve(&self, manifest: &Value) -> Result<DynamicObject> {
        let applied = self.apply(manifest).await.context("applying the service")?;
        self.ready(
            &applied
                .metadata
                .name
                .context("a service has a name: this is a bug")?,
        )
        .await
    }

    /// Waits until the service `name` is Ready.
    ///
    /// # Errors
    /// When it is not within [`wait::STARTUP`]; the error holds its conditions.
    pub async fn ready(&self, name: &str) -> Result<DynamicObject> {
        let services = self.services();
        wait::until(&format!("{name} to be Ready"), wait::STARTUP, async || {
            let service = services.get(name).await?;
            let conditions = service
                .data
                .pointer("/status/conditions")
                .cloned()
                .unwrap_or_default();
            Ok(if is_ready(&service) {
                Seen::Done(service)
            } else {
                Seen::NotYet(conditions.to_string())
            })
        })
        .await
    }
}

/// A chat request for at most `max_tokens` tokens of greedy output.
#[must_use]
pub fn chat(model: &str, question: &str, max_tokens: u32) -> Value {
    json!({
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
    })
}

/// The question whose answer the default model knows.
pub const QUESTION: &str = "What is the capital of France?";
