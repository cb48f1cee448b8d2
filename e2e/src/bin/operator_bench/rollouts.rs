//! Rollouts and scale-downs under load: real scheduler, ReplicaSet controller, gateway and operator, fake engines.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use ashlar_crds::InferenceService;
use ashlar_e2e::wait::{self, Seen};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::{Client as Http, connect::HttpConnector};
use hyper_util::rt::TokioExecutor;
use k8s_openapi::api::core::v1::{Namespace, Node};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::kubelet::{BAD_ARGUMENT, Kubelet, START};
use crate::processes::{Operator, until};
use crate::report::Report;
use crate::{Args, canaries, measure, simulate};

pub(crate) const NAMESPACE: &str = "rollouts";
const GATEWAY: &str = "127.0.0.1:8080";
/// Requests of each scenario, half of them streams.
const REQUESTS: usize = 10_000;
/// Clients of each scenario, each with one request at a time.
const CLIENTS: usize = 50;
/// Pieces of a stream, at most: a second and a half, far less than the time to drain.
const PIECES: u64 = 30;
/// Services and rounds of the scale-downs.
const SCALED: usize = 10;
const ROUNDS: usize = 10;
/// Longest wait for the end of a rollout.
const LONGEST: Duration = Duration::from_secs(120);

/// A process that ends with this one.
struct Gateway(Child);

impl Drop for Gateway {
    fn drop(&mut self) {
        // Both fail when it has ended already, which is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start_gateway(args: &Args) -> Result<Gateway> {
    let log = std::fs::File::create(args.state.join("gateway.log"))?;
    let process = Command::new(&args.operator)
        .args(["--log", "warn", "gateway", "--admin-listen=0.0.0.0:8081"])
        .arg(format!("--listen={GATEWAY}"))
        .env(
            "KUBECONFIG",
            Path::new(&args.state).join("admin.kubeconfig"),
        )
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .context("starting the gateway")?;
    Ok(Gateway(process))
}

/// What clients saw.
#[derive(Default)]
pub(crate) struct Load {
    pub(crate) stop: AtomicBool,
    answered: AtomicUsize,
    pub(crate) failed: AtomicUsize,
    pub(crate) cut: AtomicUsize,
    slowest_ms: AtomicU64,
}

impl Load {
    /// Starts all clients.
    pub(crate) fn start(self: &Arc<Self>, service: &str) -> Vec<tokio::task::JoinHandle<()>> {
        let http: Http<HttpConnector, Full<Bytes>> =
            Http::builder(TokioExecutor::new()).build_http();
        let url = format!("http://{GATEWAY}/{NAMESPACE}/{service}/v1/chat/completions");
        let client = |n: usize| {
            let (load, http, url) = (Arc::clone(self), http.clone(), url.clone());
            tokio::spawn(async move {
                let mut turn = n;
                while !load.stop.load(Ordering::SeqCst) {
                    let stream = turn.is_multiple_of(2);
                    load.request(&http, &url, stream, 1 + turn as u64 % PIECES)
                        .await;
                    turn += 1;
                }
            })
        };
        (0..CLIENTS).map(client).collect()
    }

    async fn request(
        &self,
        http: &Http<HttpConnector, Full<Bytes>>,
        url: &str,
        stream: bool,
        pieces: u64,
    ) {
        let body = json!({"model": "m", "messages": [], "stream": stream, "max_tokens": pieces})
            .to_string();
        let request = http::Request::post(url)
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)));
        let Ok(request) = request else { return };
        let start = Instant::now();
        let answered = match http.request(request).await {
            Ok(response) if response.status().is_success() => response,
            _ => {
                self.failed.fetch_add(1, Ordering::SeqCst);
                return;
            }
        };
        let headed = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.slowest_ms.fetch_max(headed, Ordering::SeqCst);
        let text = answered
            .into_body()
            .collect()
            .await
            .map(|body| body.to_bytes());
        let whole = text.is_ok_and(|text| {
            let text = String::from_utf8_lossy(&text).into_owned();
            !stream
                || (text.ends_with("data: [DONE]\n\n")
                    && text.matches("\"piece\"").count() as u64 == pieces)
        });
        let counter = if whole { &self.answered } else { &self.cut };
        counter.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn total(&self) -> usize {
        [&self.answered, &self.failed, &self.cut]
            .map(|n| n.load(Ordering::SeqCst))
            .iter()
            .sum()
    }
}

#[derive(Clone, Copy)]
struct Scenario {
    name: &'static str,
    what: &'static str,
    replicas: i32,
    gpus: i32,
    bad: bool,
    way: &'static str,
}

const SCENARIOS: [Scenario; 4] = [
    Scenario {
        name: "spare",
        what: "2 replicas, a spare GPU",
        replicas: 2,
        gpus: 3,
        bad: false,
        way: "Surge",
    },
    Scenario {
        name: "tight",
        what: "2 replicas, no spare GPU",
        replicas: 2,
        gpus: 2,
        bad: false,
        way: "InPlace",
    },
    Scenario {
        name: "single",
        what: "1 replica, no spare GPU",
        replicas: 1,
        gpus: 1,
        bad: false,
        way: "InPlace",
    },
    Scenario {
        name: "broken",
        what: "1 replica, no spare GPU, a bad revision",
        replicas: 1,
        gpus: 1,
        bad: true,
        way: "Halted",
    },
];

/// Runs all scenarios at one time, then the scale-downs.
pub(crate) async fn run(args: &Args, client: Client, report: &mut Report) -> Result<()> {
    measure::install(&client).await?;
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let namespace = serde_json::from_value(json!({"metadata": {"name": NAMESPACE}}))?;
    namespaces
        .create(&PostParams::default(), &namespace)
        .await?;
    node(&client).await?;
    // The address of operator.sh: endpoints may not be on the loopback.
    simulate::gateway(&client, "10.255.255.1").await?;
    let kubelet = Kubelet::start(client.clone());
    let operator = Operator::start(&args.operator, &args.state, "operator-a", 9081)?;
    let _gateway = start_gateway(args)?;
    operator.leads().await?;
    let services: Api<InferenceService> = Api::namespaced(client, NAMESPACE);
    let played = SCENARIOS.map(|scenario| play(scenario, &services, &kubelet));
    for (scenario, outcome) in SCENARIOS
        .iter()
        .zip(futures::future::join_all(played).await)
    {
        outcome
            .with_context(|| scenario.what)?
            .tell(scenario, report);
    }
    scale_downs(&services, &kubelet, report).await?;
    canaries::run(&services, &kubelet, report).await
}

async fn node(client: &Client) -> Result<()> {
    let nodes: Api<Node> = Api::all(client.clone());
    let node = serde_json::from_value(json!({"metadata": {"name": "node-0"}}))?;
    nodes.create(&PostParams::default(), &node).await?;
    let mut room = json!({"cpu": "1000", "memory": "4000Gi", "pods": "1000"});
    for scenario in SCENARIOS {
        room[format!("bench.example/gpu-{}", scenario.name)] = scenario.gpus.to_string().into();
    }
    let status = Patch::Merge(json!({"status": {
        "capacity": room, "allocatable": room,
        "conditions": [{"type": "Ready", "status": "True", "reason": "Simulated", "message": ""}],
    }}));
    nodes
        .patch_status("node-0", &PatchParams::default(), &status)
        .await?;
    // The API server's admission marks a new node as not ready, which a controller takes back.
    let ready = Patch::Merge(json!({"spec": {"taints": null}}));
    nodes
        .patch("node-0", &PatchParams::default(), &ready)
        .await?;
    Ok(())
}

pub(crate) async fn serve(
    services: &Api<InferenceService>,
    name: &str,
    replicas: i32,
    runtime: Value,
    gpu: Option<String>,
) -> Result<()> {
    let mut spec = json!({
        "model": {"uri": "oci://registry.example/m:1"}, "runtime": runtime, "replicas": replicas,
        "rolloutStrategy": {"drainTimeoutSeconds": 30}, "endpoint": {"auth": "None"},
    });
    if let Some(resource) = gpu {
        spec["parallelism"] = json!({"resourceName": resource});
    }
    let object = json!({
        "apiVersion": "serving.ashlar.dev/v1alpha1", "kind": "InferenceService", "metadata": {"name": name}, "spec": spec,
    });
    services
        .create(&PostParams::default(), &serde_json::from_value(object)?)
        .await?;
    rolled_out(services, name, replicas).await
}

/// Waits until all replicas of the newest spec are ready.
async fn rolled_out(services: &Api<InferenceService>, name: &str, replicas: i32) -> Result<()> {
    until(&format!("{name} is rolled out"), || async {
        let Ok(service) = services.get(name).await else {
            return false;
        };
        let generation = service.metadata.generation;
        service.status.is_some_and(|status| {
            let done = status
                .conditions
                .iter()
                .any(|c| c.type_ == "WorkloadsReady" && c.status == "True");
            status.observed_generation == generation
                && done
                && status.ready_replicas == replicas
                && status.replicas == replicas
        })
    })
    .await
}

struct Outcome {
    failed: usize,
    cut: usize,
    requests: usize,
    rollout: Duration,
    slowest: Duration,
    ways: Vec<String>,
    again: Option<Duration>,
}

impl Outcome {
    fn tell(&self, scenario: &Scenario, report: &mut Report) {
        let what = scenario.what;
        report.count(
            &format!("{what}: failed of {}", self.requests),
            self.failed,
            0,
        );
        report.count(&format!("{what}: streams cut"), self.cut, 0);
        let other = self
            .ways
            .iter()
            .filter(|way| !way.starts_with(scenario.way))
            .count();
        report.note(
            &format!("{what}: rollout took"),
            format!("{:.1} s", self.rollout.as_secs_f64()),
        );
        report.note(&format!("{what}: status said"), format!("{:?}", self.ways));
        if !scenario.bad {
            report.count(
                &format!("{what}: steps that were not {}", scenario.way),
                other,
                0,
            );
        }
        let held = format!("{what}: slowest first byte");
        if scenario.replicas == 1 && !scenario.bad {
            // A stream of up to a second and a half that runs on the old pod is part of the wait: it is not cut.
            report.time(&held, self.slowest, START + Duration::from_secs(2));
        } else {
            report.note(&held, format!("{:.1} s", self.slowest.as_secs_f64()));
        }
        if let Some(again) = self.again {
            report.time(
                &format!("{what}: crash → old revision serves"),
                again,
                START + Duration::from_secs(10),
            );
        }
    }
}

async fn play(
    scenario: Scenario,
    services: &Api<InferenceService>,
    kubelet: &Kubelet,
) -> Result<Outcome> {
    let name = scenario.name;
    let gpu = format!("bench.example/gpu-{name}");
    serve(
        services,
        name,
        scenario.replicas,
        json!({"args": ["--max-model-len=1000"]}),
        Some(gpu),
    )
    .await?;
    let load = Arc::new(Load::default());
    let clients = load.start(name);
    until("the load has begun", || async { load.total() > 500 }).await?;
    let argument = if scenario.bad {
        BAD_ARGUMENT
    } else {
        "--max-model-len=2000"
    };
    let patch = Patch::Merge(json!({"spec": {"runtime": {"args": [argument]}}}));
    services
        .patch(name, &PatchParams::default(), &patch)
        .await?;
    let start = Instant::now();
    let mut ways: Vec<String> = Vec::new();
    let over = format!("the end of {name}'s rollout");
    let again = wait::until(&over, LONGEST, async || {
        let service = services.get(name).await?;
        let status = service.status.clone().unwrap_or_default();
        let way = status.revision.and_then(|r| r.rollout).unwrap_or_default();
        if !way.is_empty() && ways.last() != Some(&way) {
            ways.push(way.clone());
        }
        if scenario.bad && way.starts_with("Halted") && status.ready_replicas > 0 {
            let crashed = *kubelet
                .crashed
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            return Ok(Seen::Done(crashed.map(|at| at.elapsed())));
        }
        let mut conditions = status.conditions.iter();
        let ready = conditions.any(|c| c.type_ == "WorkloadsReady" && c.status == "True");
        let observed = status.observed_generation == service.metadata.generation;
        Ok(if !scenario.bad && observed && ready {
            Seen::Done(None)
        } else {
            Seen::NotYet(way)
        })
    })
    .await?;
    let rollout = start.elapsed();
    until("all requests are sent", || async {
        load.total() >= REQUESTS
    })
    .await?;
    load.stop.store(true, Ordering::SeqCst);
    futures::future::join_all(clients).await;
    Ok(Outcome {
        failed: load.failed.load(Ordering::SeqCst),
        cut: load.cut.load(Ordering::SeqCst),
        requests: load.total(),
        rollout,
        slowest: Duration::from_millis(load.slowest_ms.load(Ordering::SeqCst)),
        ways,
        again,
    })
}

/// Services scaled from three to two, again and again: who went, and who was the least busy?
async fn scale_downs(
    services: &Api<InferenceService>,
    kubelet: &Kubelet,
    report: &mut Report,
) -> Result<()> {
    let scaled = (0..SCALED).map(|n| async move {
        let name = format!("scaled-{n}");
        serve(services, &name, 3, json!({"device": "cpu"}), None).await?;
        let mut wrong = 0;
        for round in 0..ROUNDS {
            let engines = kubelet.engines(&format!("{NAMESPACE}/{name}-"));
            anyhow::ensure!(engines.len() == 3, "{} engines of {name}", engines.len());
            for (index, (_, engine)) in engines.iter().enumerate() {
                engine
                    .pretended
                    .store(1 + (index + round) % 3, Ordering::SeqCst);
            }
            let scale = |replicas: i32| Patch::Merge(json!({"spec": {"replicas": replicas}}));
            services
                .patch(&name, &PatchParams::default(), &scale(2))
                .await?;
            let gone = || {
                engines
                    .iter()
                    .filter(|(_, engine)| engine.ending.load(Ordering::SeqCst))
            };
            until("a pod ends", || async { gone().count() > 0 }).await?;
            let right = gone().all(|(_, engine)| engine.pretended.load(Ordering::SeqCst) == 1);
            wrong += usize::from(!right);
            rolled_out(services, &name, 2).await?;
            services
                .patch(&name, &PatchParams::default(), &scale(3))
                .await?;
            rolled_out(services, &name, 3).await?;
        }
        anyhow::Ok(wrong)
    });
    let wrong: usize = futures::future::try_join_all(scaled).await?.iter().sum();
    let what = format!(
        "scale-downs of {} whose victim was not the least busy",
        SCALED * ROUNDS
    );
    report.count(&what, wrong, SCALED * ROUNDS / 100);
    Ok(())
}
