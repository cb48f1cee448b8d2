//! A gateway on a free port, replicas that do what a test says, and a client without connection reuse.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ashlar_operator::gateway::hold::Holds;
use ashlar_operator::gateway::keys::{KeyPolicy, KeyStore, ReadError, SecretSource};
use ashlar_operator::gateway::limits::Limits;
use ashlar_operator::gateway::metrics::Metrics;
use ashlar_operator::gateway::proxy::{Proxy, ProxyLimits};
use ashlar_operator::gateway::request_body::{BodyLimits, BoxError};
use ashlar_operator::gateway::server::{Admin, Phase, Server};
use ashlar_operator::gateway::snapshot::{
    Access, GatewayNames, ReplicaSpec, ServiceId, ServiceSpec, Snapshot,
};
use ashlar_operator::model_tls::Trust;
use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use sha2::{Digest as _, Sha256};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

/// Longest wait for anything in these tests.
pub(crate) const LONG: Duration = Duration::from_secs(30);

pub(crate) type TestBody = UnsyncBoxBody<Bytes, BoxError>;

pub(crate) fn full(text: impl Into<Bytes>) -> TestBody {
    Full::new(text.into())
        .map_err(|never| match never {})
        .boxed_unsync()
}

/// A body that the test feeds chunk by chunk; dropping the sender ends it, an error breaks it.
pub(crate) fn fed() -> (
    mpsc::UnboundedSender<Result<&'static str, BoxError>>,
    TestBody,
) {
    let (sender, mut receiver) = mpsc::unbounded_channel::<Result<&'static str, BoxError>>();
    let stream = futures::stream::poll_fn(move |cx| receiver.poll_recv(cx));
    let frames = futures::StreamExt::map(stream, |chunk| {
        chunk.map(|text| Frame::data(Bytes::from_static(text.as_bytes())))
    });
    (sender, StreamBody::new(frames).boxed_unsync())
}

/// Fails a test instead of letting it hang.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, future)
        .await
        .unwrap_or_else(|_| panic!("waited {LONG:?} for {what}"))
}

/// A stub replica; dropping it closes its port and all its connections.
pub(crate) struct Replica {
    pub(crate) address: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Starts a replica that answers with `handler`; an `Err` closes the connection without an answer.
pub(crate) async fn replica<F, R>(handler: F) -> Replica
where
    F: Fn(Request<Incoming>) -> R + Clone + Send + 'static,
    R: Future<Output = Result<Response<TestBody>, BoxError>> + Send + 'static,
{
    replica_with(None, handler).await
}

/// The same, speaking TLS if it is given any.
pub(crate) async fn replica_with<F, R>(tls: Option<TlsAcceptor>, handler: F) -> Replica
where
    F: Fn(Request<Incoming>) -> R + Clone + Send + 'static,
    R: Future<Output = Result<Response<TestBody>, BoxError>> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    replica_at(listener, tls, handler)
}

/// The same, on a socket that is there already.
pub(crate) fn replica_at<F, R>(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    handler: F,
) -> Replica
where
    F: Fn(Request<Incoming>) -> R + Clone + Send + 'static,
    R: Future<Output = Result<Response<TestBody>, BoxError>> + Send + 'static,
{
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service = service_fn(handler.clone());
            let tls = tls.clone();
            connections.spawn(async move {
                let server = hyper::server::conn::http1::Builder::new();
                let _ = match tls {
                    None => server.serve_connection(TokioIo::new(stream), service).await,
                    Some(tls) => match tls.accept(stream).await {
                        Ok(stream) => server.serve_connection(TokioIo::new(stream), service).await,
                        Err(_) => Ok(()),
                    },
                };
            });
        }
    });
    Replica { address, task }
}

/// A replica that answers with its name and what it was sent, as JSON.
pub(crate) async fn echo(name: &'static str) -> Replica {
    replica(move |request| async move {
        let (parts, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        let headers: BTreeMap<&str, &str> = parts
            .headers
            .iter()
            .map(|(k, v)| (k.as_str(), v.to_str().unwrap_or("?")))
            .collect();
        let answer = serde_json::json!({
            "replica": name,
            "method": parts.method.as_str(),
            "path": parts.uri.to_string(),
            "headers": headers,
            "body": String::from_utf8_lossy(&body),
        });
        Ok(Response::new(full(answer.to_string())))
    })
    .await
}

/// An address where nothing listens.
pub(crate) async fn nobody() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap()
}

/// Secrets by `NAMESPACE/NAME`.
#[derive(Default)]
pub(crate) struct Secrets(Mutex<HashMap<String, BTreeMap<String, Vec<u8>>>>);

impl Secrets {
    pub(crate) fn set(&self, secret: &str, keys: &[(&str, &str)]) {
        let data = keys
            .iter()
            .map(|(client, key)| {
                let digest = hex::encode(Sha256::digest(key.as_bytes()));
                (
                    (*client).to_owned(),
                    format!("sha256:{digest}").into_bytes(),
                )
            })
            .collect();
        self.0.lock().unwrap().insert(secret.to_owned(), data);
    }
}

impl SecretSource for Secrets {
    fn read<'a>(
        &'a self,
        namespace: &'a str,
        name: &'a str,
    ) -> BoxFuture<'a, Result<BTreeMap<String, Vec<u8>>, ReadError>> {
        let found = self
            .0
            .lock()
            .unwrap()
            .get(&format!("{namespace}/{name}"))
            .cloned();
        Box::pin(async move { found.ok_or(ReadError::Forbidden) })
    }
}

pub(crate) fn open_service(id: &str, model: &str) -> ServiceSpec {
    let (namespace, name) = id.split_once('/').unwrap();
    ServiceSpec {
        id: ServiceId::new(namespace, name),
        model: model.to_owned(),
        access: Access::Open,
        limits: Limits::default(),
        hosts: Vec::new(),
        alias: true,
        created: 1,
        canary: None,
    }
}

/// A service whose keys are in the Secret `keys` of its namespace.
pub(crate) fn keyed_service(id: &str, model: &str) -> ServiceSpec {
    let access = Access::Keys {
        secret: "keys".to_owned(),
    };
    ServiceSpec {
        access,
        ..open_service(id, model)
    }
}

/// How a test's gateway differs from the default.
pub(crate) struct Setting {
    pub(crate) tls: Option<TlsAcceptor>,
    pub(crate) body: BodyLimits,
    pub(crate) hold: Duration,
    pub(crate) drain: Duration,
    /// Whose pods it believes, and the name that all of them have to have.
    pub(crate) trust: Arc<Trust>,
    pub(crate) tls_name: Option<&'static str>,
}

impl Default for Setting {
    fn default() -> Self {
        Self {
            tls: None,
            body: BodyLimits {
                total: 1 << 20,
                replay: 64 << 10,
                idle: LONG,
            },
            hold: LONG,
            drain: LONG,
            trust: Trust::none(),
            tls_name: None,
        }
    }
}

pub(crate) struct Gateway {
    pub(crate) address: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) secrets: Arc<Secrets>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) phase: watch::Sender<Phase>,
    pub(crate) synced: watch::Sender<bool>,
    served: tokio::sync::Mutex<JoinHandle<usize>>,
    snapshots: watch::Sender<Arc<Snapshot>>,
    client: Client<HttpConnector, TestBody>,
    tls_name: Option<&'static str>,
}

impl Gateway {
    pub(crate) async fn start() -> Self {
        Self::with(Setting::default()).await
    }

    pub(crate) async fn with(setting: Setting) -> Self {
        let names = GatewayNames {
            service: "ashlar-gateway".to_owned(),
            namespace: "ashlar-system".to_owned(),
            cluster_domain: "cluster.local".to_owned(),
        };
        let (snapshots, snapshots_seen) = watch::channel(Arc::new(Snapshot::empty(names)));
        let (synced, synced_seen) = watch::channel(true);
        let (phase, phase_seen) = watch::channel(Phase::Serving);
        let metrics = Arc::new(Metrics::new());
        let secrets = Arc::new(Secrets::default());
        let source = Arc::clone(&secrets) as Arc<dyn SecretSource>;
        let policy = KeyPolicy {
            miss_interval: Duration::ZERO,
            ..KeyPolicy::default()
        };
        let proxy = Arc::new(Proxy::new(
            snapshots_seen,
            synced_seen.clone(),
            Arc::new(KeyStore::new(source, policy)),
            Holds::new(100, 1 << 20, setting.hold),
            Arc::clone(&metrics),
            ProxyLimits {
                body: setting.body,
                connect_timeout: LONG,
                request_timeout: LONG,
            },
            setting.trust,
        ));
        let traffic = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let admin = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, admin_address) = (traffic.local_addr().unwrap(), admin.local_addr().unwrap());
        let server = Server {
            proxy,
            metrics: Arc::clone(&metrics),
            phase: phase_seen.clone(),
            max_connections: 4096,
            drain_timeout: setting.drain,
            tls: setting.tls,
        };
        let probes = Admin {
            metrics: Arc::clone(&metrics),
            synced: synced_seen,
            phase: phase_seen,
        };
        tokio::spawn(async move { axum::serve(admin, probes.router()).await });
        Self {
            address,
            admin: admin_address,
            secrets,
            metrics,
            phase,
            synced,
            served: tokio::spawn(server.serve(traffic)).into(),
            snapshots,
            tls_name: setting.tls_name,
            client: Client::builder(TokioExecutor::new())
                .pool_max_idle_per_host(0)
                .build_http(),
        }
    }

    /// Publishes services, each with its replicas' addresses.
    pub(crate) fn publish(&self, services: &[(ServiceSpec, &[SocketAddr])]) {
        let replicas = services.iter().flat_map(|(spec, addresses)| {
            addresses.iter().map(|address| ReplicaSpec {
                service: spec.id.clone(),
                revision: String::new(),
                uid: address.to_string(),
                ready_since: "t0".to_owned(),
                address: *address,
                tls: self.tls_name.map(str::to_owned),
            })
        });
        let specs = services.iter().map(|(spec, _)| spec.clone());
        let previous = Arc::clone(&self.snapshots.borrow());
        let next = Arc::new(Snapshot::build(&previous, specs, replicas));
        self.metrics.follow(&next);
        self.snapshots.send_replace(next);
    }

    pub(crate) async fn send(&self, request: Request<TestBody>) -> Response<Incoming> {
        let sent = self.client.request(request);
        soon("the head of a response", sent).await.unwrap()
    }

    pub(crate) fn request(&self, path: &str) -> http::request::Builder {
        Request::post(format!("http://{}{path}", self.address))
    }

    /// Posts and reads the whole answer as JSON.
    pub(crate) async fn post(
        &self,
        path: &str,
        key: Option<&str>,
        body: &str,
    ) -> (u16, serde_json::Value) {
        let mut request = self.request(path);
        if let Some(key) = key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let body = full(body.to_owned());
        self.json(request.body(body).unwrap()).await
    }

    pub(crate) async fn get(&self, path: &str, key: Option<&str>) -> (u16, serde_json::Value) {
        let mut request = Request::get(format!("http://{}{path}", self.address));
        if let Some(key) = key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        self.json(request.body(full("")).unwrap()).await
    }

    pub(crate) async fn json(&self, request: Request<TestBody>) -> (u16, serde_json::Value) {
        let response = self.send(request).await;
        let status = response.status().as_u16();
        let body = soon("a whole body", response.collect())
            .await
            .unwrap()
            .to_bytes();
        let value = serde_json::from_slice(&body)
            .unwrap_or_else(|_| panic!("not JSON: {}", String::from_utf8_lossy(&body)));
        (status, value)
    }

    /// Waits for the end of the drain; how many connections it cut.
    pub(crate) async fn drained(&self) -> usize {
        let mut served = self.served.lock().await;
        soon("the end of the drain", &mut *served).await.unwrap()
    }

    /// Waits until the metrics contain this line.
    pub(crate) async fn metric(&self, line: &str) {
        soon(line, async {
            while !self.metrics.render().lines().any(|l| l == line) {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}

/// The next chunk of a body as text; `None` at its end.
pub(crate) async fn chunk(body: &mut Incoming) -> Option<Result<String, hyper::Error>> {
    let frame = soon("the next chunk", body.frame()).await?;
    Some(frame.map(|frame| {
        let data = frame.into_data().unwrap_or_default();
        String::from_utf8(data.to_vec()).unwrap()
    }))
}
