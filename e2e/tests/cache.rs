//! A model in a bucket is downloaded once onto a claim, and every pod reads it there.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use ashlar_e2e::bucket::{BUCKET, Bucket, KEY};
use ashlar_e2e::service::{QUESTION, chat, manifest, text};
use ashlar_e2e::wait::{self, Seen};
use ashlar_e2e::with_namespace;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Node, PersistentVolume, Pod};
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use serde_json::json;

/// A folder of this machine that pods of any user may write to, gone when the test ends.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What cannot be removed lies in a folder for such things.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn volume(name: &str, namespace: &str, path: &Path) -> serde_json::Value {
    json!({
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteMany"], "storageClassName": "none",
            "persistentVolumeReclaimPolicy": "Retain",
            "hostPath": {"path": path, "type": "Directory"},
            "claimRef": {"namespace": namespace, "name": "models"},
        },
    })
}

#[tokio::test]
async fn a_model_in_a_bucket_is_downloaded_once_for_all_pods() -> Result<()> {
    with_namespace("cache", async |ns| {
        let nodes: Api<Node> = Api::all(ns.client.clone());
        let node = nodes.list(&ListParams::default()).await?.items.remove(0);
        let addresses = node
            .status
            .and_then(|status| status.addresses)
            .unwrap_or_default();
        let address = addresses
            .iter()
            .find(|address| address.type_ == "InternalIP");
        let address = address.context("a node has an address")?.address.parse()?;
        let model = std::env::var("ASHLAR_TEST_MODEL")
            .context("ASHLAR_TEST_MODEL is not set: run `make e2e`")?;
        let bucket = Bucket::start(address, std::fs::read(&model)?).await?;

        let folder = Folder::new(&ns.name)?;
        let volumes: Api<PersistentVolume> = Api::all(ns.client.clone());
        let volume = serde_json::from_value(volume(&ns.name, &ns.name, &folder.0))?;
        volumes.create(&PostParams::default(), &volume).await?;
        ns.apply(&json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "models"},
            "spec": {
                "accessModes": ["ReadWriteMany"], "storageClassName": "none", "volumeName": ns.name,
                "resources": {"requests": {"storage": "1Gi"}},
            },
        }))
        .await?;

        let mut service = manifest(&ns, "smollm2");
        service["spec"]["model"] =
            json!({"uri": format!("s3://{BUCKET}/{KEY}"), "endpoint": bucket.endpoint});
        service["spec"]["cache"] = json!({"pvc": {"claimName": "models", "maxBytes": "1Gi"}});
        service["spec"]["replicas"] = json!(2);
        ns.serve(&service).await?;
        let both = wait::until("both replicas", wait::STARTUP, async || {
            let service = ns.services().get("smollm2").await?;
            let ready = service.data.pointer("/status/readyReplicas").cloned();
            Ok(if ready == Some(json!(2)) {
                Seen::Done(service)
            } else {
                Seen::NotYet(service.data.to_string())
            })
        });
        let service = both.await?;
        ensure!(bucket.downloads() == 1, "{} downloads", bucket.downloads());
        let size = std::fs::metadata(&model)?.len();
        let status = &service.data["status"]["model"];
        ensure!(
            status["downloadedBytes"] == json!(size) && status["totalBytes"] == json!(size),
            "{status}"
        );
        ensure!(
            text(&service, "/status/model/resolvedRevision")?.len() == 40,
            "{status}"
        );

        let jobs: Api<Job> = Api::namespaced(ns.client.clone(), &ns.name);
        let all = jobs.list(&ListParams::default()).await?.items;
        ensure!(all.len() == 1, "{} Jobs", all.len());
        let pods: Api<Pod> = Api::namespaced(ns.client.clone(), &ns.name);
        let serving = ListParams::default().labels("serving.ashlar.dev/service=smollm2");
        for pod in pods.list(&serving).await? {
            let spec = pod.spec.context("a pod has a spec")?;
            ensure!(
                spec.init_containers.is_none_or(|all| all.is_empty()),
                "a pod downloads by itself"
            );
        }

        let url = format!("{}/chat/completions", text(&service, "/status/url")?);
        let answer = ns
            .http
            .post(&url, &chat("smollm2", QUESTION, 32))
            .await?
            .chat_text()?;
        ensure!(answer.contains("Paris"), "the answer is {answer:?}");
        volumes.delete(&ns.name, &DeleteParams::default()).await?;
        Ok(())
    })
    .await
}
