//! Nodes, pods and gateways that exist only on the API server: every Deployment of ours gets its pods, on a node and ready,
//! and each of them answers `/metrics` on an address of its own.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, Secret};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;

use crate::processes::until;

/// Calls at one time.
const PARALLEL: usize = 32;
const NODES: usize = 100;
/// What an idle pod says.
const METRICS: &str = "vllm:num_requests_running{model_name=\"m\"} 0\nvllm:num_requests_waiting{model_name=\"m\"} 0\nvllm:kv_cache_usage_perc{model_name=\"m\"} 0\n";

/// Nodes that never had a kubelet, with room for every pod.
pub(crate) async fn nodes(client: &Client) -> Result<()> {
    let api: Api<Node> = Api::all(client.clone());
    let made = futures::stream::iter(0..NODES).map(|n| {
        let api = api.clone();
        async move {
            let name = format!("node-{n}");
            let node = serde_json::from_value(json!({"metadata": {"name": name}}))?;
            api.create(&PostParams::default(), &node).await?;
            let room = json!({"cpu": "1000", "memory": "4000Gi", "pods": "1000", "nvidia.com/gpu": "200"});
            let status = json!({"status": {
                "capacity": room, "allocatable": room,
                "conditions": [{"type": "Ready", "status": "True", "reason": "Simulated", "message": ""}],
            }});
            let patch = Patch::Merge(status);
            api.patch_status(&name, &PatchParams::default(), &patch).await?;
            anyhow::Ok(())
        }
    });
    made.buffer_unordered(PARALLEL).try_collect().await
}

/// Objects of others: as many Pods, Secrets and ConfigMaps each.
pub(crate) async fn foreign(client: &Client, count: usize) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), "foreign");
    let secrets: Api<Secret> = Api::namespaced(client.clone(), "foreign");
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "foreign");
    let made = futures::stream::iter(0..count).map(|n| {
        let (pods, secrets, maps) = (pods.clone(), secrets.clone(), maps.clone());
        async move {
            let meta = json!({"name": format!("foreign-{n}"), "labels": {"app": "foreign"}});
            let params = PostParams::default();
            let text = "x".repeat(1000);
            let secret = json!({"metadata": meta, "stringData": {"text": text}});
            secrets.create(&params, &serde_json::from_value(secret)?).await?;
            let map = json!({"metadata": meta, "data": {"text": text}});
            maps.create(&params, &serde_json::from_value(map)?).await?;
            let container = json!({"name": "c", "image": "foreign", "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}}});
            let spec = json!({"nodeName": format!("node-{}", n % NODES), "containers": [container]});
            let pod = json!({"metadata": meta, "spec": spec});
            pods.create(&params, &serde_json::from_value(pod)?).await?;
            anyhow::Ok(())
        }
    });
    made.buffer_unordered(PARALLEL).try_collect().await
}

/// The gateway's endpoints, as its Service would have them.
pub(crate) async fn gateway(client: &Client, address: &str) -> Result<()> {
    use k8s_openapi::api::discovery::v1::EndpointSlice;
    let api: Api<EndpointSlice> = Api::namespaced(client.clone(), "ashlar-system");
    let slice = json!({
        "metadata": {"name": "ashlar-gateway-1", "labels": {"kubernetes.io/service-name": "ashlar-gateway"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address], "conditions": {"ready": true}}],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    });
    api.create(&PostParams::default(), &serde_json::from_value(slice)?)
        .await?;
    Ok(())
}

/// Answers every request to port 8000 of every loopback address as an idle runtime does.
pub(crate) async fn serve_metrics() -> Result<()> {
    let listener = tokio::net::TcpListener::bind("0.0.0.0:8000").await?;
    tokio::spawn(async move {
        loop {
            let Ok((mut socket, _)) = listener.accept().await else {
                continue;
            };
            tokio::spawn(async move {
                let mut buffer = [0_u8; 2048];
                let answer = format!(
                    "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n\r\n{METRICS}",
                    METRICS.len()
                );
                // One read is one request: they are short and come one at a time.
                while let Ok(1..) = socket.read(&mut buffer).await {
                    if socket.write_all(answer.as_bytes()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    Ok(())
}

/// Pods that exist, by Deployment.
type Counts = Arc<Mutex<HashMap<String, Arc<tokio::sync::Mutex<i32>>>>>;

/// Makes and removes pods as Deployments ask, for ever, and while `runs` is true.
pub(crate) async fn pods(client: Client, runs: watch::Receiver<bool>) -> Result<()> {
    let api: Api<Deployment> = Api::all(client.clone());
    let config = watcher::Config::default().labels(ashlar_crds::names::SERVICE_LABEL);
    let counts = Counts::default();
    let places = Arc::new(tokio::sync::Semaphore::new(PARALLEL));
    let mut events = std::pin::pin!(watcher(api, config).default_backoff().applied_objects());
    while let Some(event) = events.next().await {
        let Ok(deployment) = event else { continue };
        let (client, counts, places) = (client.clone(), Arc::clone(&counts), Arc::clone(&places));
        let mut runs = runs.clone();
        tokio::spawn(async move {
            // Fails only when the benchmark is over.
            let _ = runs.wait_for(|runs| *runs).await;
            let _place = places.acquire().await;
            let key = format!(
                "{}/{}",
                deployment.namespace().unwrap_or_default(),
                deployment.name_any()
            );
            let count = {
                let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
                Arc::clone(counts.entry(key).or_default())
            };
            let (client, deployment, count) = (&client, &deployment, &count);
            // The API server may be one that misbehaves.
            let done = until("simulated pods", || async move {
                // One at a time for each Deployment, and always to what it asks for now.
                let mut count = count.lock().await;
                converge(client, deployment, &mut count).await.is_ok()
            });
            if let Err(error) = done.await {
                complain(&format!("{error:#}"));
            }
        });
    }
    Ok(())
}

/// Takes away pods that are asked to end, as a kubelet does once their containers have.
pub(crate) async fn endings(client: Client) -> Result<()> {
    let config = watcher::Config::default().labels(ashlar_crds::names::SERVICE_LABEL);
    let events = watcher(Api::<Pod>::all(client.clone()), config).default_backoff();
    let ending = events.applied_objects().filter_map(|pod| async {
        pod.ok()
            .filter(|pod| pod.metadata.deletion_timestamp.is_some())
    });
    ending
        .for_each_concurrent(PARALLEL, |pod| {
            let api: Api<Pod> =
                Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
            async move {
                let now = DeleteParams::default().grace_period(0);
                let (api, name, now) = (&api, &pod.name_any(), &now);
                let gone = until("the end of a pod", || async move {
                    match api.delete(name, now).await {
                        Err(kube::Error::Api(error)) => error.code == 404,
                        other => other.is_ok(),
                    }
                });
                if let Err(error) = gone.await {
                    complain(&format!("{error:#}"));
                }
            }
        })
        .await;
    Ok(())
}

fn complain(text: &str) {
    use std::io::Write as _;
    // Nothing can be done about a closed standard error.
    let _ = writeln!(std::io::stderr(), "{text}");
}

async fn converge(client: &Client, seen: &Deployment, count: &mut i32) -> Result<()> {
    let namespace = seen.namespace().unwrap_or_default();
    let name = seen.name_any();
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), &namespace);
    let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let Some(deployment) = deployments.get_opt(&name).await? else {
        return Ok(());
    };
    let wanted = deployment
        .spec
        .as_ref()
        .and_then(|s| s.replicas)
        .unwrap_or(0);
    while *count < wanted {
        make(&api, &deployment, *count).await?;
        *count += 1;
    }
    while *count > wanted {
        let victim = format!("{name}-{}", *count - 1);
        let now = DeleteParams::default().grace_period(0);
        match api.delete(&victim, &now).await {
            Ok(_) => {}
            Err(kube::Error::Api(error)) if error.code == 404 => {}
            Err(error) => return Err(error.into()),
        }
        *count -= 1;
    }
    Ok(())
}

async fn make(api: &Api<Pod>, deployment: &Deployment, index: i32) -> Result<()> {
    static ADDRESSES: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = ADDRESSES.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let template = &deployment.spec.as_ref().context("a spec")?.template;
    let mut spec: Value = serde_json::to_value(&template.spec)?;
    spec["nodeName"] = format!("node-{}", number as usize % NODES).into();
    let name = format!("{}-{index}", deployment.name_any());
    let pod = json!({
        "metadata": {
            "name": name,
            "labels": template.metadata.as_ref().and_then(|m| m.labels.clone()),
            "ownerReferences": [{
                "apiVersion": "apps/v1", "kind": "Deployment", "name": deployment.name_any(),
                "uid": deployment.uid(), "controller": true,
            }],
        },
        "spec": spec,
    });
    match api
        .create(&PostParams::default(), &serde_json::from_value(pod)?)
        .await
    {
        // From a try whose answer was lost.
        Err(kube::Error::Api(error)) if error.code == 409 => {}
        other => drop(other?),
    }
    let now = k8s_openapi::jiff::Timestamp::now().to_string();

    let conditions = ["PodScheduled", "Initialized", "ContainersReady", "Ready"]
        .map(|kind| json!({"type": kind, "status": "True", "lastTransitionTime": now}));
    let status = json!({"status": {
        "phase": "Running",
        "podIP": format!("127.{}.{}.{}", 1 + number / 62_500, (number / 250) % 250, 1 + number % 250),
        "startTime": now,
        "conditions": conditions,
        "containerStatuses": [{
            "name": "runtime", "image": "runtime", "imageID": "runtime", "ready": true, "started": true,
            "restartCount": 0, "state": {"running": {"startedAt": now}},
        }],
    }});
    api.patch_status(&name, &PatchParams::default(), &Patch::Strategic(status))
        .await?;
    Ok(())
}
