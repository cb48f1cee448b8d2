//! How soon a step of the load is a new number of replicas on the API server: scrapes, decision and write, all real.

use std::{
    collections::HashMap,
    io::Write as _,
    net::Ipv4Addr,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use ashlar_crds::{
    InferenceService,
    names::{REVISION_LABEL, SERVICE_LABEL},
};
use futures::{StreamExt as _, future::join_all};
use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod, discovery::v1::EndpointSlice};
use kube::{
    Api, Client, ResourceExt as _,
    api::{Patch, PatchParams, PostParams},
    runtime::{WatchStreamExt as _, watcher},
};
use serde_json::json;

use crate::stubs::{self, Load};
use crate::support::{
    Operator, PATIENCE, cluster, drop_namespace, kubeconfig, namespace, service, until,
};

/// Steps that are measured, each on a service of its own.
const STEPS: usize = 40;
/// Ninety-five of a hundred steps are answered within this.
const ANSWERED: Duration = Duration::from_secs(3);
/// Pods of a service before its step.
const PODS: usize = 4;
/// Requests per second of a service, before and after: those of the simulator's step.
const RATES: (f64, f64) = (10.0, 35.0);
/// So often each pod is asked before the step: by then its rate is known.
const WATCHED: usize = 30;
/// Steps come at all moments of the scrapes' and decisions' clocks: so far from each other.
const APART: Duration = Duration::from_millis(137);

/// Replicas of each service's Deployment as a watch showed them, and when.
type Seen = Arc<Mutex<HashMap<String, Vec<(Instant, i32)>>>>;

fn watch_deployments(client: &Client, ns: &str) -> Seen {
    let seen = Seen::default();
    let (api, into) = (
        Api::<Deployment>::namespaced(client.clone(), ns),
        Arc::clone(&seen),
    );
    tokio::spawn(async move {
        let config = watcher::Config::default().labels(SERVICE_LABEL);
        let events = watcher(api, config).default_backoff();
        let mut events = std::pin::pin!(events.applied_objects());
        while let Some(event) = events.next().await {
            let Ok(deployment) = event else { continue };
            let at = Instant::now();
            let replicas = deployment.spec.as_ref().and_then(|s| s.replicas);
            let name = deployment.labels()[SERVICE_LABEL].clone();
            let mut seen = into.lock().unwrap_or_else(PoisonError::into_inner);
            seen.entry(name)
                .or_default()
                .push((at, replicas.unwrap_or(0)));
        }
    });
    seen
}

/// A service of two replicas whose Deployment's own pods find no node, and two pods that are ready beside them.
async fn start(client: &Client, ns: &str, index: usize) -> Arc<Load> {
    let name = format!("step-{index}");
    let services: Api<InferenceService> = Api::namespaced(client.clone(), ns);
    let mut object = service(&name);
    object["spec"]["scaling"] = json!({"minReplicas": PODS, "maxReplicas": 50});
    object["spec"]["nodeSelector"] = json!({"ashlar.invalid/node": "none"});
    let object = serde_json::from_value(object).unwrap();
    services
        .create(&PostParams::default(), &object)
        .await
        .unwrap();
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), ns);
    let of_service = kube::api::ListParams::default().labels(&format!("{SERVICE_LABEL}={name}"));
    let deployment = until("a Deployment", PATIENCE, || async {
        deployments.list(&of_service).await.unwrap().items.pop()
    })
    .await;
    let addresses: Vec<Ipv4Addr> = (0..PODS)
        .map(|pod| {
            Ipv4Addr::new(
                127,
                77,
                1 + u8::try_from(index).unwrap(),
                1 + u8::try_from(pod).unwrap(),
            )
        })
        .collect();
    let load = Load::serve(
        (ns.to_owned(), name.clone()),
        &addresses,
        RATES.0,
        index as u64,
    )
    .await;
    for (number, address) in addresses.iter().enumerate() {
        let labels = json!({
            SERVICE_LABEL: name, REVISION_LABEL: deployment.labels()[REVISION_LABEL],
        });
        ready_pod(client, ns, &format!("{name}-{number}"), &labels, *address).await;
    }
    load
}

/// A pod that no scheduler and no kubelet looks at, ready at an address.
async fn ready_pod(
    client: &Client,
    ns: &str,
    name: &str,
    labels: &serde_json::Value,
    address: Ipv4Addr,
) {
    let pods: Api<Pod> = Api::namespaced(client.clone(), ns);
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "schedulerName": "none", "automountServiceAccountToken": false,
            "containers": [{"name": "runtime", "image": "ashlar.invalid/runtime:1"}],
        },
    }))
    .unwrap();
    // Refused until the namespace has its ServiceAccount, where a controller makes one.
    until("a pod", PATIENCE, || async {
        pods.create(&PostParams::default(), &pod).await.ok()
    })
    .await;
    let now = k8s_openapi::jiff::Timestamp::now().to_string();
    let conditions = ["PodScheduled", "Initialized", "ContainersReady", "Ready"]
        .map(|kind| json!({"type": kind, "status": "True", "lastTransitionTime": now}));
    let status = json!({"status": {
        "phase": "Running", "podIP": address.to_string(), "startTime": now, "conditions": conditions,
    }});
    pods.patch_status(name, &PatchParams::default(), &Patch::Strategic(status))
        .await
        .unwrap();
}

/// The gateway's endpoints, as its Service would have them.
async fn gateway_slice(client: &Client, ns: &str, address: std::net::IpAddr) {
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), ns);
    let slice = serde_json::from_value(json!({
        "metadata": {"name": "ashlar-gateway-1", "labels": {"kubernetes.io/service-name": "ashlar-gateway"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address.to_string()], "conditions": {"ready": true}}],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }))
    .unwrap();
    slices.create(&PostParams::default(), &slice).await.unwrap();
}

/// Makes the step of one service, and waits for more replicas than there were.
async fn step(load: &Load, name: &str, seen: &Seen) -> Duration {
    let replicas = || {
        let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.get(name).cloned().unwrap_or_default()
    };
    let before = replicas().last().map_or(0, |(_, replicas)| *replicas);
    load.set_rate(RATES.1);
    let start = Instant::now();
    let at = until("more replicas", PATIENCE, || async {
        let mut later = replicas().into_iter().filter(|(at, _)| *at >= start);
        later.find(|(_, replicas)| *replicas > before)
    })
    .await;
    at.0 - start
}

async fn measure(kubeconfig: &Path, client: &Client, ns: &str) -> Vec<Duration> {
    // The gateway listens before the services are there: its port is an argument of the operator.
    let loads = stubs::Loads::default();
    let address = stubs::gateway(Arc::clone(&loads)).await;
    gateway_slice(client, ns, address.ip()).await;
    let port = format!("--gateway-metrics-port={}", address.port());
    let operator = Operator::start_with(kubeconfig, ns, &[port]);
    operator.leads().await;
    let seen = watch_deployments(client, ns);
    let started = join_all((0..STEPS).map(|index| start(client, ns, index))).await;
    loads
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone_from(&started);
    until("the pods' rates are known", 3 * PATIENCE, || async {
        started
            .iter()
            .all(|load| load.scrapes() >= WATCHED)
            .then_some(())
    })
    .await;
    let steps = (0_u32..).zip(&started).map(|(index, load)| {
        let seen = &seen;
        async move {
            tokio::time::sleep(APART * index).await;
            step(load, &format!("step-{index}"), seen).await
        }
    });
    let mut times = join_all(steps).await;
    operator.terminate().await;
    times.sort();
    times
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_of_the_load_is_a_new_number_of_replicas_within_three_seconds() {
    let Some(kubeconfig) = kubeconfig() else {
        return;
    };
    let client = cluster(&kubeconfig).await;
    let ns = namespace(&client, "steps").await;
    let times = measure(&kubeconfig, &client, &ns).await;
    drop_namespace(&client, &ns).await;
    let (p50, p95) = (times[STEPS / 2 - 1], times[(STEPS * 95).div_ceil(100) - 1]);
    let told = format!(
        "load step → replicas of the Deployment: p50 {p50:.2?}, p95 {p95:.2?} of {STEPS}\n"
    );
    // Past the test runner's capture: the figure is what the test is for.
    let _ = std::io::stderr().write_all(told.as_bytes());
    assert!(p95 <= ANSWERED, "p95 {p95:?} of {times:?}");
}
