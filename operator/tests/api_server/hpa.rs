//! Without `spec.scaling` a HorizontalPodAutoscaler scales a service through `/scale`, by an external metric: the real
//! controller's, beside the rule that `ashlar-operator simulate` plays for HPA.
//!
//! It needs a controller manager, and an API server with the flags of the aggregation layer that can reach this machine.

use std::{
    convert::Infallible,
    io::Write as _,
    net::SocketAddr,
    path::Path,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use ashlar_crds::{InferenceService, names::SERVICE_LABEL};
use ashlar_operator::autoscaler::{
    signal::GatewayLoad,
    simulate::{
        fleet::{Scaler as _, View},
        scalers::{Hpa, Metric},
    },
};
use bytes::Bytes;
use futures::StreamExt as _;
use http::{Request, Response};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use k8s_openapi::{
    api::{
        apps::v1::Deployment,
        autoscaling::v2::HorizontalPodAutoscaler,
        core::v1::{Service, ServiceAccount},
        discovery::v1::EndpointSlice,
    },
    kube_aggregator::pkg::apis::apiregistration::v1::APIService,
};
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams, PostParams},
    runtime::{WatchStreamExt as _, watcher},
};
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tokio_rustls::TlsAcceptor;

use crate::support::{
    Operator, PATIENCE, cluster, drop_namespace, kubeconfig, namespace, outer_address, service,
    until,
};

const GROUP: &str = "external.metrics.k8s.io";
const METRIC: &str = "requests_in_flight";
/// Requests in flight that one replica is meant to have.
const TARGET: f64 = 20.0;
/// Seconds that the highest recommendation stands.
const DOWN_WINDOW_SECONDS: i32 = 20;
/// HPA looks every 15 s; its first look comes within this.
const FIRST_LOOK: Duration = Duration::from_secs(60);
/// Seconds that are compared, from HPA's first look on.
const SECONDS: usize = 95;
/// Simulated and real replicas differ by no more than this share, over all seconds.
const APART: f64 = 0.15;

/// The metric so many seconds after HPA's first look. It changes between looks, and its steps show each part of the rule:
/// two replicas, a limit on the way up, a load within the tolerance, and a fall that waits for the window.
fn in_flight(seconds: f64) -> f64 {
    match seconds {
        ..20.0 => 40.0,
        20.0..35.0 => 220.0,
        35.0..50.0 => 126.0,
        _ => 50.0,
    }
}

/// An aggregated API server of one metric.
struct Metrics {
    address: SocketAddr,
    certificate: String,
    /// When HPA first asked.
    began: Arc<OnceLock<Instant>>,
}

impl Metrics {
    async fn serve(host: &str) -> Self {
        let made = rcgen::generate_simple_self_signed([host.to_owned()]).unwrap();
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind((outer_address(), 0)).await.unwrap();
        let metrics = Self {
            address: listener.local_addr().unwrap(),
            certificate: made.cert.pem(),
            began: Arc::default(),
        };
        let began = Arc::clone(&metrics.began);
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (acceptor, began) = (acceptor.clone(), Arc::clone(&began));
                tokio::spawn(async move {
                    let socket = acceptor.accept(socket).await.ok()?;
                    let service = service_fn(move |request| {
                        let response = answer(&request, &began);
                        async move { Ok::<_, Infallible>(response) }
                    });
                    let server = hyper::server::conn::http1::Builder::new();
                    server
                        .serve_connection(TokioIo::new(socket), service)
                        .await
                        .ok()
                });
            }
        });
        metrics
    }
}

fn answer(request: &Request<Incoming>, began: &OnceLock<Instant>) -> Response<Full<Bytes>> {
    let version = format!("{GROUP}/v1beta1");
    let path = request.uri().path();
    let body = if path == format!("/apis/{version}") {
        json!({
            "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version,
            "resources": [{"name": METRIC, "singularName": "", "namespaced": true, "kind": "ExternalMetricValueList", "verbs": ["get"]}],
        })
    } else if path.ends_with(&format!("/{METRIC}")) {
        let began = began.get_or_init(Instant::now);
        let value = in_flight(began.elapsed().as_secs_f64());
        json!({
            "kind": "ExternalMetricValueList", "apiVersion": version, "metadata": {},
            "items": [{
                "metricName": METRIC, "metricLabels": {}, "value": value.to_string(),
                "timestamp": k8s_openapi::jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            }],
        })
    } else {
        let mut none = Response::default();
        *none.status_mut() = http::StatusCode::NOT_FOUND;
        return none;
    };
    let response = Response::builder().header("content-type", "application/json");
    response.body(Full::from(body.to_string())).unwrap()
}

async fn create<K>(api: &Api<K>, object: Value)
where
    K: Clone + std::fmt::Debug + serde::Serialize + serde::de::DeserializeOwned,
{
    let object = serde_json::from_value(object).unwrap();
    api.create(&PostParams::default(), &object).await.unwrap();
}

fn api_services(client: &Client) -> Api<APIService> {
    Api::all(client.clone())
}

/// Tells the API server where the metric is, and waits until it has found it there.
async fn register(client: &Client, ns: &str, metrics: &Metrics) {
    let services: Api<Service> = Api::namespaced(client.clone(), ns);
    let port = json!({"name": "https", "port": 443, "protocol": "TCP"});
    create(
        &services,
        json!({"metadata": {"name": "metrics"}, "spec": {"ports": [port]}}),
    )
    .await;
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), ns);
    create(&slices, json!({
        "metadata": {"name": "metrics-1", "labels": {"kubernetes.io/service-name": "metrics"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [metrics.address.ip().to_string()], "conditions": {"ready": true}}],
        "ports": [{"name": "https", "port": metrics.address.port(), "protocol": "TCP"}],
    }))
    .await;
    let bundle = k8s_openapi::ByteString(metrics.certificate.clone().into_bytes());
    let name = format!("v1beta1.{GROUP}");
    create(&api_services(client), json!({
        "metadata": {"name": name},
        "spec": {
            "group": GROUP, "version": "v1beta1", "groupPriorityMinimum": 100, "versionPriority": 100,
            "service": {"namespace": ns, "name": "metrics", "port": 443}, "caBundle": bundle,
        },
    }))
    .await;
    until("the metric's API is available", PATIENCE, || async {
        let found = api_services(client).get(&name).await.ok()?;
        let conditions = found.status?.conditions?;
        conditions
            .iter()
            .any(|c| c.type_ == "Available" && c.status == "True")
            .then_some(())
    })
    .await;
}

/// A service that HPA may scale; its pods find no node, because HPA needs none of them for this metric.
async fn scaled_from_outside(client: &Client, ns: &str) {
    let services: Api<InferenceService> = Api::namespaced(client.clone(), ns);
    let mut object = service("m");
    object["spec"]["nodeSelector"] = json!({"ashlar.invalid/node": "none"});
    create(&services, object).await;
    until("one replica and a selector in /scale", PATIENCE, || async {
        let status = services.get_scale("m").await.ok()?.status?;
        (status.replicas == 1 && status.selector.is_some()).then_some(())
    })
    .await;
    let autoscalers: Api<HorizontalPodAutoscaler> = Api::namespaced(client.clone(), ns);
    create(&autoscalers, json!({
        "metadata": {"name": "m"},
        "spec": {
            "scaleTargetRef": {"apiVersion": "serving.ashlar.dev/v1alpha1", "kind": "InferenceService", "name": "m"},
            "minReplicas": 1, "maxReplicas": 100,
            "metrics": [{"type": "External", "external": {
                "metric": {"name": METRIC}, "target": {"type": "AverageValue", "averageValue": TARGET.to_string()},
            }}],
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": DOWN_WINDOW_SECONDS}},
        },
    }))
    .await;
}

/// `spec.replicas` as a watch shows it, from now on.
fn follow(client: &Client, ns: &str) -> (watch::Receiver<i32>, JoinHandle<()>) {
    let (send, receive) = watch::channel(1);
    let api: Api<InferenceService> = Api::namespaced(client.clone(), ns);
    let follow = async move {
        let events = watcher(api, watcher::Config::default()).default_backoff();
        let mut events = std::pin::pin!(events.applied_objects());
        while let Some(event) = events.next().await {
            if let Ok(service) = event {
                send.send_replace(service.spec.replicas);
            }
        }
    };
    (receive, tokio::spawn(follow))
}

/// What the simulator's HPA makes of the metric, second by second.
fn simulated() -> Vec<i32> {
    let mut hpa = Hpa::new(Metric::InFlight, TARGET, DOWN_WINDOW_SECONDS, None);
    let mut wanted = 1;
    let seconds = (0..SECONDS).map(|second| {
        let now = second as f64;
        let gateway = GatewayLoad {
            held: in_flight(now),
            ..GatewayLoad::default()
        };
        wanted = hpa.wanted(&View {
            now,
            wanted,
            ready: &[],
            gateway,
        });
        wanted
    });
    seconds.collect()
}

async fn play(kubeconfig: &Path, client: &Client, ns: &str) {
    let operator = Operator::start(kubeconfig, ns);
    operator.leads().await;
    let metrics = Metrics::serve(&format!("metrics.{ns}.svc")).await;
    register(client, ns, &metrics).await;
    scaled_from_outside(client, ns).await;
    let (replicas, following) = follow(client, ns);
    let began = until("HPA's first look", FIRST_LOOK, || async {
        metrics.began.get().copied()
    })
    .await;
    let mut real = Vec::new();
    for second in 0..SECONDS {
        // The middle of each second: a write of the first second has come through by then.
        let at = began + Duration::from_secs_f64(second as f64 + 0.5);
        tokio::time::sleep_until(at.into()).await;
        real.push(*replicas.borrow());
    }
    following.abort();
    let simulated = simulated();
    let steps = |counts: &[i32]| {
        let mut steps = counts.to_vec();
        steps.dedup();
        steps
    };
    assert_eq!(steps(&real), steps(&simulated), "{real:?} {simulated:?}");
    let pairs = real.iter().zip(&simulated);
    let off: i32 = pairs
        .map(|(real, simulated)| (real - simulated).abs())
        .sum();
    let share = f64::from(off) / f64::from(simulated.iter().sum::<i32>());
    assert!(share <= APART, "{share:.3}: {real:?} {simulated:?}");

    let deployments: Api<Deployment> = Api::namespaced(client.clone(), ns);
    let ours = ListParams::default().labels(SERVICE_LABEL);
    until("as many replicas of the Deployment", PATIENCE, || async {
        let deployment = deployments.list(&ours).await.ok()?.items.pop()?;
        (deployment.spec?.replicas == real.last().copied()).then_some(())
    })
    .await;
    operator.terminate().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_hpa_scales_a_service_as_the_simulators_does() {
    let Some(kubeconfig) = kubeconfig() else {
        return;
    };
    let client = cluster(&kubeconfig).await;
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), "kube-system");
    if accounts
        .get_opt("horizontal-pod-autoscaler")
        .await
        .unwrap()
        .is_none()
    {
        // Past the test runner's capture, as for a test without an API server.
        let _ = std::io::stderr().write_all(b"skipped: no controller manager runs an HPA\n");
        return;
    }
    let ns = namespace(&client, "hpa").await;
    let played = {
        let (client, ns) = (client.clone(), ns.clone());
        tokio::spawn(async move { play(&kubeconfig, &client, &ns).await }).await
    };
    // An API whose server is gone would keep every namespace from ending: it goes whatever happened.
    let name = format!("v1beta1.{GROUP}");
    let removed = api_services(&client)
        .delete(&name, &DeleteParams::default())
        .await;
    drop_namespace(&client, &ns).await;
    if let Err(error) = played {
        std::panic::resume_unwind(error.into_panic());
    }
    removed.unwrap();
}
