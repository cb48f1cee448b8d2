//! A model in a bucket is downloaded once onto a claim, and every pod reads it there.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use ashlar_e2e::bucket::{BUCKET, Bucket, KEY};
use ashlar_e2e::service::{manifest, text};
use ashlar_e2e::wait::{self, Seen};
use ashlar_e2e::with_namespace;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::PersistentVolume;
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
        let bucket = Bucket::of_the_model(&ns.cluster).await?;

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
        let size = bucket.size;
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
        for pod in ns.pods_of("smollm2").await? {
            let spec = pod.spec.context("a pod has a spec")?;
            ensure!(
                spec.init_containers.is_none_or(|all| all.is_empty()),
                "a pod downloads by itself"
            );
        }

        ns.ask(&service).await?;
        volumes.delete(&ns.name, &DeleteParams::default()).await?;
        Ok(())
    })
    .await
}
