//! An API server that misbehaves: a proxy between operator and API server that answers errors, loses and slows watches, and
//! goes away, while services change. Afterwards everything has to be as the specs say, at the price of few writes.

use std::{
    convert::Infallible,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use ashlar_crds::InferenceService;
use ashlar_e2e::wait::{self, Seen};
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use http::{Request, Response};
use http_body_util::{BodyDataStream, BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::apps::v1::Deployment;
use kube::api::{ListParams, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config, ResourceExt as _};
use serde_json::json;

use crate::Args;
use crate::measure::{Bench, place};
use crate::processes::{Operator, PATIENCE, until};
use crate::report::Report;

const ADDRESS: &str = "127.0.0.1:7443";
/// How long each fault lasts. Longer than the Lease's renew deadline, so that a partition costs the leadership.
const LASTS: Duration = Duration::from_secs(12);
/// Time between two changes.
const PACE: Duration = Duration::from_millis(400);
/// Of requests that may fail, one in so many does.
const ONE_IN: usize = 3;
/// What a watch is held back for each piece.
const SLOW: Duration = Duration::from_secs(2);
/// Writes of the operator for one change of a spec, its status and retries included, that are no storm.
const WRITES_A_CHANGE: usize = 30;

type Body = UnsyncBoxBody<Bytes, Infallible>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Fault {
    None,
    Unavailable,
    Conflict,
    TooMany,
    SlowWatch,
    LostWatch,
    ExpiredWatch,
    Partition,
    EtcdKilled,
    KubeletsStopped,
}

const FAULTS: [Fault; 9] = [
    Fault::Unavailable,
    Fault::Conflict,
    Fault::TooMany,
    Fault::SlowWatch,
    Fault::LostWatch,
    Fault::ExpiredWatch,
    Fault::Partition,
    Fault::EtcdKilled,
    Fault::KubeletsStopped,
];

struct Proxy {
    client: Client,
    fault: AtomicU8,
    requests: AtomicUsize,
    injected: AtomicUsize,
}

impl Proxy {
    fn is(&self, fault: Fault) -> bool {
        self.fault.load(Ordering::SeqCst) == fault as u8
    }

    /// What to answer instead of the API server.
    fn instead(&self, watch: bool, write: bool) -> Option<Response<Body>> {
        let number = self.requests.fetch_add(1, Ordering::SeqCst);
        let unlucky = number.is_multiple_of(ONE_IN);
        let code = match () {
            () if self.is(Fault::Unavailable) && unlucky => 503,
            () if self.is(Fault::Conflict) && unlucky && write => 409,
            () if self.is(Fault::TooMany) && unlucky => 429,
            () if self.is(Fault::ExpiredWatch) && watch => 410,
            () => return None,
        };
        self.injected.fetch_add(1, Ordering::SeqCst);
        let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": "Injected", "message": "injected"});
        let (code, body) = if code == 410 {
            (
                200,
                format!("{}\n", json!({"type": "ERROR", "object": status})),
            )
        } else {
            (code, status.to_string())
        };
        let body = Full::new(Bytes::from(body)).boxed_unsync();
        let answer = Response::builder()
            .status(code)
            .header("content-type", "application/json");
        answer.header("retry-after", "1").body(body).ok()
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Result<Response<Body>> {
        let watch = request
            .uri()
            .query()
            .is_some_and(|query| query.contains("watch=true"));
        let write = !request.method().is_safe();
        // A closed connection, as when the network is gone.
        anyhow::ensure!(!self.is(Fault::Partition), "partitioned");
        if let Some(answer) = self.instead(watch, write) {
            return Ok(answer);
        }
        let (parts, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        let mut forwarded = Request::builder()
            .method(parts.method)
            .uri(parts.uri.path_and_query().context("a path")?.as_str());
        for name in ["content-type", "accept"] {
            if let Some(value) = parts.headers.get(name) {
                forwarded = forwarded.header(name, value);
            }
        }
        let answer = self
            .client
            .send(forwarded.body(kube::client::Body::from(body.to_vec()))?)
            .await?;
        let (parts, body) = answer.into_parts();
        let proxy = Arc::clone(&self);
        let began = Instant::now();
        let pieces = BodyDataStream::new(body).take_while(move |piece| {
            let lost =
                watch && proxy.is(Fault::LostWatch) && began.elapsed() > Duration::from_secs(1);
            let gone = proxy.is(Fault::Partition);
            futures::future::ready(piece.is_ok() && !lost && !gone)
        });
        let pieces = pieces.filter_map(move |piece| {
            let proxy = Arc::clone(&self);
            async move {
                if watch && proxy.is(Fault::SlowWatch) {
                    tokio::time::sleep(SLOW).await;
                }
                piece.ok().map(|piece| Ok(Frame::data(piece)))
            }
        });
        let mut built = Response::builder().status(parts.status);
        if let Some(kind) = parts.headers.get("content-type") {
            built = built.header("content-type", kind);
        }
        Ok(built.body(BodyExt::boxed_unsync(StreamBody::new(pieces)))?)
    }
}

async fn start_proxy(args: &Args) -> Result<Arc<Proxy>> {
    let kubeconfig = Kubeconfig::read_from(args.state.join("operator-a.kubeconfig"))?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    let proxy = Arc::new(Proxy {
        client: Client::try_from(config)?,
        fault: AtomicU8::new(Fault::None as u8),
        requests: AtomicUsize::new(0),
        injected: AtomicUsize::new(0),
    });
    let text = std::fs::read_to_string(args.state.join("operator-a.kubeconfig"))?;
    let through = text.replace("https://127.0.0.1:6443", &format!("http://{ADDRESS}"));
    std::fs::write(args.state.join("through-proxy.kubeconfig"), through)?;
    let listener = tokio::net::TcpListener::bind(ADDRESS).await?;
    let serving = Arc::clone(&proxy);
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let proxy = Arc::clone(&serving);
            tokio::spawn(async move {
                let service = hyper::service::service_fn(move |request| {
                    let proxy = Arc::clone(&proxy);
                    async move {
                        proxy
                            .answer(request)
                            .await
                            .map_err(|error| error.to_string())
                    }
                });
                // A broken connection is what this is for.
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(socket), service)
                    .await;
            });
        }
    });
    Ok(proxy)
}

/// An operator that is started again when it ends, as a kubelet does.
struct Supervised {
    operator: Option<Operator>,
    starts: usize,
}

impl Supervised {
    fn look(&mut self, args: &Args) -> Result<()> {
        let ended = self.operator.as_mut().is_none_or(Operator::has_ended);
        if ended {
            self.starts += 1;
            self.operator = Some(Operator::start(
                &args.operator,
                &args.state,
                "through-proxy",
                9081,
            )?);
        }
        Ok(())
    }

    /// Starts it as often as it takes until it leads.
    async fn lead(&mut self, args: &Args) -> Result<()> {
        wait::until("an operator to lead", PATIENCE, async || {
            self.look(args)?;
            let operator = self.operator.as_ref().context("started")?;
            let leads = operator.metric("ashlar_operator_leader", "").await?;
            Ok(if leads > 0.0 {
                Seen::Done(())
            } else {
                Seen::NotYet("it waits for the Lease".to_owned())
            })
        })
        .await
    }
}

/// Changes services under every fault, and then looks whether all is as it should be.
pub(crate) async fn run(args: &Args, client: Client, report: &mut Report) -> Result<()> {
    let bench = Bench::prepare(args, client.clone()).await?;
    let proxy = start_proxy(args).await?;
    let mut operator = Supervised {
        operator: None,
        starts: 0,
    };
    operator.look(args)?;
    let first = operator.operator.as_ref().context("started")?;
    first.leads().await?;
    bench.burst(first, report).await?;
    bench.settle(first).await?;
    let before = bench.audited()?.len();
    let mut changes = 0;
    for fault in FAULTS {
        proxy.fault.store(fault as u8, Ordering::SeqCst);
        // It fails only when nobody listens.
        let _ = bench.kubelets.send(fault != Fault::KubeletsStopped);
        if fault == Fault::EtcdKilled {
            kill_etcd(args)?;
        }
        let start = Instant::now();
        let mut turn = tokio::time::interval(PACE);
        while start.elapsed() < LASTS {
            turn.tick().await;
            operator.look(args)?;
            change(&client, changes, args.services).await?;
            changes += 1;
        }
    }
    // The last of them is over.
    let _ = bench.kubelets.send(true);
    proxy.fault.store(Fault::None as u8, Ordering::SeqCst);
    let start = Instant::now();
    operator.lead(args).await?;
    let last = operator.operator.as_ref().context("started")?;
    until("every Deployment is as its spec says", || async {
        as_specified(&client).await.unwrap_or(false)
    })
    .await?;
    report.time(
        "faults: from the last one to every spec carried out",
        start.elapsed(),
        Duration::from_secs(60),
    );
    bench.settle(last).await?;
    let writes = bench.audited()?.len() - before;
    report.note(
        "faults: requests answered wrongly, operator starts",
        format!(
            "{}, {}",
            proxy.injected.load(Ordering::SeqCst),
            operator.starts
        ),
    );
    report.count(
        &format!("faults: writes for {changes} changes"),
        writes,
        changes * WRITES_A_CHANGE,
    );
    bench.rest(last, report).await
}

/// SIGKILL; operator.sh starts it again.
fn kill_etcd(args: &Args) -> Result<()> {
    let pid = std::fs::read_to_string(args.state.join("etcd.pid"))?;
    let killed = Command::new("kill").args(["-9", pid.trim()]).status()?;
    anyhow::ensure!(killed.success(), "no etcd to kill");
    Ok(())
}

/// A new revision for one of the services, by a user who tries again when the API server cannot.
async fn change(client: &Client, number: usize, services: usize) -> Result<()> {
    let (namespace, name) = place(number % services);
    let api: Api<InferenceService> = Api::namespaced(client.clone(), &namespace);
    let spec =
        json!({"spec": {"runtime": {"args": [format!("--max-model-len={}", 5000 + number)]}}});
    let patch = Patch::Merge(spec);
    wait::until("a change to be taken", PATIENCE, async || {
        api.patch(&name, &PatchParams::default(), &patch).await?;
        Ok(Seen::Done(()))
    })
    .await
}

/// Every service's newest Deployment has its arguments and its replicas, and no other has any.
async fn as_specified(client: &Client) -> Result<bool> {
    let services: Api<InferenceService> = Api::all(client.clone());
    let deployments: Api<Deployment> = Api::all(client.clone());
    let all = deployments.list(&ListParams::default()).await?.items;
    let services = services.list(&ListParams::default()).await?.items;
    let checked = futures::stream::iter(services).map(|service| {
        let ours = all.iter().filter(|d| {
            d.namespace() == service.namespace()
                && d.labels().get(ashlar_crds::names::SERVICE_LABEL) == Some(&service.name_any())
        });
        let wanted = service
            .spec
            .runtime
            .args
            .first()
            .cloned()
            .unwrap_or_default();
        let replicas = |d: &Deployment| d.spec.as_ref().and_then(|s| s.replicas).unwrap_or(0);
        let carries = |d: &Deployment| {
            let spec = d.spec.as_ref().and_then(|s| s.template.spec.as_ref());
            spec.and_then(|s| s.containers.first()?.args.clone())
                .unwrap_or_default()
                .contains(&wanted)
        };
        let right =
            |d: &Deployment| replicas(d) == if carries(d) { service.spec.replicas } else { 0 };
        let mut ours = ours.peekable();
        anyhow::Ok(ours.peek().is_some() && ours.all(right))
    });
    checked
        .try_fold(true, |all, one| futures::future::ready(Ok(all && one)))
        .await
}
