//! A kubelet whose pods are HTTP servers in this process: they start after a while, answer like a runtime with a fake engine,
//! and drain like one. Everything else (scheduler, ReplicaSet controller, gateway, operator) is the real thing.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Result;
use ashlar_crds::names::REVISION_LABEL;
use bytes::Bytes;
use futures::StreamExt as _;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};
use tokio::sync::watch;

/// From a pod on a node to an engine that answers.
pub(crate) const START: Duration = Duration::from_secs(2);
/// After SIGTERM requests are still taken for so many seconds, as by the runtime, when this variable does not say otherwise.
const DRAIN_DELAY_SECONDS: u64 = 5;
const DRAIN_DELAY_VARIABLE: &str = "ASHLAR_DRAIN_DELAY";
/// Time between two pieces of a stream.
const PIECE: Duration = Duration::from_millis(50);
/// An argument that no engine understands: its pod crashes.
pub(crate) const BAD_ARGUMENT: &str = "--no-such-flag";
/// An argument with which every answer is a 500.
pub(crate) const FAILING_ARGUMENT: &str = "--every-answer-fails";

type Body = BoxBody<Bytes, Infallible>;

/// One pod's engine.
#[derive(Default)]
pub(crate) struct Engine {
    in_flight: AtomicUsize,
    /// Requests that it only says it has.
    pub(crate) pretended: AtomicUsize,
    refusing: AtomicBool,
    failing: AtomicBool,
    pub(crate) ending: AtomicBool,
    /// Hash of its pod's revision.
    pub(crate) revision: String,
    /// Requests that it has taken.
    pub(crate) answered: AtomicUsize,
}

struct Running(Arc<Engine>);

impl Running {
    fn new(engine: &Arc<Engine>) -> Self {
        engine.in_flight.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(engine))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A pod's engine, and how it is told to end.
type Place = (Arc<Engine>, watch::Sender<bool>);

/// All pods of the node.
#[derive(Clone)]
pub(crate) struct Kubelet {
    client: Client,
    pods: Arc<Mutex<HashMap<String, Place>>>,
    addresses: Arc<AtomicU32>,
    /// When a pod last crashed for good.
    pub(crate) crashed: Arc<Mutex<Option<Instant>>>,
}

impl Kubelet {
    pub(crate) fn start(client: Client) -> Self {
        let kubelet = Self {
            client,
            pods: Arc::default(),
            addresses: Arc::default(),
            crashed: Arc::default(),
        };
        tokio::spawn(kubelet.clone().follow());
        kubelet
    }

    /// The engines of a service that are not ending, by pod.
    pub(crate) fn engines(&self, prefix: &str) -> Vec<(String, Arc<Engine>)> {
        let pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        let ours = pods.iter().filter(|(name, (engine, _))| {
            name.starts_with(prefix) && !engine.ending.load(Ordering::SeqCst)
        });
        ours.map(|(name, (engine, _))| (name.clone(), Arc::clone(engine)))
            .collect()
    }

    async fn follow(self) {
        let config = watcher::Config::default().labels(ashlar_crds::names::SERVICE_LABEL);
        let events = watcher(Api::<Pod>::all(self.client.clone()), config).default_backoff();
        let mut events = std::pin::pin!(events.applied_objects());
        while let Some(event) = events.next().await {
            let Ok(pod) = event else { continue };
            let on_node = pod
                .spec
                .as_ref()
                .is_some_and(|spec| spec.node_name.is_some());
            let ending = pod.metadata.deletion_timestamp.is_some();
            let key = format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any());
            let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
            match pods.get(&key) {
                Some((engine, end)) if ending => {
                    engine.ending.store(true, Ordering::SeqCst);
                    end.send_replace(true);
                }
                None if on_node && !ending => {
                    let revision = pod.labels().get(REVISION_LABEL).cloned();
                    let engine = Arc::new(Engine {
                        revision: revision.unwrap_or_default(),
                        ..Engine::default()
                    });
                    let (end, ended) = watch::channel(false);
                    pods.insert(key.clone(), (Arc::clone(&engine), end));
                    let kubelet = self.clone();
                    tokio::spawn(async move {
                        // What fails here shows as a pod that never gets ready.
                        let _ = kubelet.life(&pod, &engine, ended).await;
                        let mut pods = kubelet.pods.lock().unwrap_or_else(PoisonError::into_inner);
                        pods.remove(&key);
                    });
                }
                _ => {}
            }
        }
    }

    async fn life(
        &self,
        pod: &Pod,
        engine: &Arc<Engine>,
        mut ended: watch::Receiver<bool>,
    ) -> Result<()> {
        let api: Api<Pod> =
            Api::namespaced(self.client.clone(), &pod.namespace().unwrap_or_default());
        let name = pod.name_any();
        let number = self.addresses.fetch_add(1, Ordering::SeqCst);
        let part = |n: u32| u8::try_from(n % 250).unwrap_or(0) + 1;
        let address = Ipv4Addr::new(127, 10, part(number / 250), part(number));
        let container = pod.spec.as_ref().and_then(|spec| spec.containers.first());
        let arguments = container.and_then(|c| c.args.clone()).unwrap_or_default();
        let failing = arguments.iter().any(|a| a == FAILING_ARGUMENT);
        engine.failing.store(failing, Ordering::SeqCst);
        let variables = container.and_then(|c| c.env.as_ref()).into_iter().flatten();
        let delay = variables
            .filter(|variable| variable.name == DRAIN_DELAY_VARIABLE)
            .find_map(|variable| variable.value.as_ref()?.parse().ok());
        let delay = Duration::from_secs(delay.unwrap_or(DRAIN_DELAY_SECONDS));
        let running =
            json!({"running": {"startedAt": k8s_openapi::jiff::Timestamp::now().to_string()}});
        report(&api, &name, address, false, 0, running.clone(), json!({})).await?;
        let early = tokio::time::timeout(START, ended.wait_for(|end| *end))
            .await
            .is_ok();
        if !early && arguments.iter().any(|a| a == BAD_ARGUMENT) {
            let waiting = json!({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}});
            let last = json!({"terminated": {"exitCode": 2, "reason": "Error", "message": "unknown flag"}});
            report(&api, &name, address, false, 3, waiting, last).await?;
            *self.crashed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
            ended.wait_for(|end| *end).await?;
        } else if !early {
            let serving =
                tokio::spawn(serve(SocketAddr::from((address, 8000)), Arc::clone(engine)));
            report(&api, &name, address, true, 0, running.clone(), json!({})).await?;
            ended.wait_for(|end| *end).await?;
            report(&api, &name, address, false, 0, running, json!({})).await?;
            tokio::time::sleep(delay).await;
            engine.refusing.store(true, Ordering::SeqCst);
            let grace = pod
                .spec
                .as_ref()
                .and_then(|s| s.termination_grace_period_seconds)
                .unwrap_or(30);
            let deadline =
                Instant::now() + Duration::from_secs(u64::try_from(grace)?).saturating_sub(delay);
            while engine.in_flight.load(Ordering::SeqCst) > 0 && Instant::now() < deadline {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            serving.abort();
        }
        api.delete(&name, &DeleteParams::default().grace_period(0))
            .await?;
        Ok(())
    }
}

async fn report(
    api: &Api<Pod>,
    name: &str,
    address: Ipv4Addr,
    ready: bool,
    restarts: i32,
    state: Value,
    last_state: Value,
) -> Result<()> {
    let now = k8s_openapi::jiff::Timestamp::now().to_string();
    let word = if ready { "True" } else { "False" };
    let condition = |kind: &str| json!({"type": kind, "status": word, "lastTransitionTime": now});
    let status = json!({"status": {
        "phase": "Running", "podIP": address.to_string(), "startTime": now,
        "conditions": [condition("Ready"), condition("ContainersReady")],
        "containerStatuses": [{
            "name": "runtime", "image": "runtime", "imageID": "runtime", "ready": ready, "started": ready,
            "restartCount": restarts, "state": state, "lastState": last_state,
        }],
    }});
    api.patch_status(name, &PatchParams::default(), &Patch::Strategic(status))
        .await?;
    Ok(())
}

async fn serve(address: SocketAddr, engine: Arc<Engine>) -> Result<()> {
    let listener = tokio::net::TcpListener::bind(address).await?;
    // Connections end with the server, as a process takes its own with it.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let (socket, _) = listener.accept().await?;
        let engine = Arc::clone(&engine);
        connections.spawn(async move {
            let service =
                hyper::service::service_fn(move |request| answer(request, Arc::clone(&engine)));
            hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(socket), service)
                .await
        });
        while connections.try_join_next().is_some() {}
    }
}

fn whole(text: impl Into<Bytes>) -> Body {
    Full::new(text.into()).boxed()
}

async fn answer(
    request: Request<Incoming>,
    engine: Arc<Engine>,
) -> Result<Response<Body>, http::Error> {
    if request.uri().path() == "/metrics" {
        let running =
            engine.in_flight.load(Ordering::SeqCst) + engine.pretended.load(Ordering::SeqCst);
        let text = format!(
            "vllm:num_requests_running{{model_name=\"m\"}} {running}\nvllm:num_requests_waiting{{model_name=\"m\"}} 0\n"
        );
        return Response::builder().body(whole(text));
    }
    if engine.refusing.load(Ordering::SeqCst) {
        return Response::builder()
            .status(503)
            .header("x-ashlar-draining", "1")
            .body(whole("draining"));
    }
    let running = Running::new(&engine);
    engine.answered.fetch_add(1, Ordering::SeqCst);
    if engine.failing.load(Ordering::SeqCst) {
        return Response::builder().status(500).body(whole("told to fail"));
    }
    let body = request
        .into_body()
        .collect()
        .await
        .map(|b| b.to_bytes())
        .unwrap_or_default();
    let asked: Value = serde_json::from_slice(&body).unwrap_or_default();
    let pieces = asked["max_tokens"].as_u64().unwrap_or(1);
    if asked["stream"] != true {
        tokio::time::sleep(PIECE).await;
        return Response::builder()
            .header("content-type", "application/json")
            .body(whole(json!({"pieces": pieces}).to_string()));
    }
    let stream = futures::stream::unfold((0, running), move |(sent, running)| async move {
        if sent > pieces {
            return None;
        }
        tokio::time::sleep(PIECE).await;
        let text = if sent == pieces {
            "data: [DONE]\n\n".to_owned()
        } else {
            format!("data: {{\"piece\": {sent}}}\n\n")
        };
        Some((Ok(Frame::data(Bytes::from(text))), (sent + 1, running)))
    });
    Response::builder()
        .header("content-type", "text/event-stream")
        .body(BodyExt::boxed(StreamBody::new(SyncStream(
            std::sync::Mutex::new(Box::pin(stream)),
        ))))
}

/// A stream that several threads may hold, though only one ever polls it.
struct SyncStream<S>(std::sync::Mutex<std::pin::Pin<Box<S>>>);

impl<S: futures::Stream> futures::Stream for SyncStream<S> {
    type Item = S::Item;

    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<S::Item>> {
        let mut stream = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        stream.as_mut().poll_next(context)
    }
}
