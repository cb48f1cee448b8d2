//! A namespace per test: made, used, dumped when the test fails, removed.

use std::panic::AssertUnwindSafe;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use futures::FutureExt;
use kube::Client;
use kube::api::{Api, DeleteParams, PostParams};
use serde_json::json;

use crate::client::Http;
use crate::{Cluster, dump};

/// A test's own namespace.
#[derive(Clone)]
pub struct Namespace {
    /// Its name, different in every run.
    pub name: String,
    /// The API server.
    pub client: Client,
    /// The cluster it is in.
    pub cluster: Cluster,
    /// An HTTP client without a key.
    pub http: Http,
}

impl Namespace {
    /// Makes a namespace whose name starts with `story`.
    ///
    /// # Errors
    /// When there is no cluster, or it refuses.
    pub async fn create(story: &str) -> Result<Self> {
        let cluster = Cluster::connect().await?;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .context("the clock is before 1970")?;
        let name = format!("e2e-{story}-{:x}", now.as_micros() & 0xff_ffff_ffff);
        // The strictest level that Kubernetes has: pods of a service must pass it as they are.
        let manifest = json!({"metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}});
        let namespaces: Api<k8s_openapi::api::core::v1::Namespace> =
            Api::all(cluster.client.clone());
        namespaces
            .create(&PostParams::default(), &serde_json::from_value(manifest)?)
            .await
            .context("making a namespace")?;
        Ok(Self {
            name,
            client: cluster.client.clone(),
            cluster,
            http: Http::new(),
        })
    }

    /// Starts the removal of the namespace, and of all that is in it.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn delete(&self) -> Result<()> {
        let namespaces: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(self.client.clone());
        namespaces
            .delete(&self.name, &DeleteParams::default())
            .await
            .with_context(|| format!("removing {}", self.name))?;
        Ok(())
    }
}

/// Runs a test in a namespace of its own. When it fails, by error or panic, what is in the namespace is written out first.
///
/// # Errors
/// Those of the test.
///
/// # Panics
/// When the test does.
pub async fn with_namespace(
    story: &str,
    test: impl AsyncFnOnce(Namespace) -> Result<()>,
) -> Result<()> {
    let namespace = Namespace::create(story).await?;
    let outcome = AssertUnwindSafe(test(namespace.clone()))
        .catch_unwind()
        .await;
    if !matches!(outcome, Ok(Ok(()))) {
        dump::write(&namespace).await;
    }
    let removed = namespace.delete().await;
    match outcome {
        Ok(result) => result.and(removed),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
