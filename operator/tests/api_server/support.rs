//! What the tests against a real API server share: a client, a namespace, waiting, and the operator as a process.

use std::{
    future::Future,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, UdpSocket},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use ashlar_crds::inference_service_crd;
use k8s_openapi::{
    api::core::v1::Namespace,
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, Config, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Longest wait for anything that is not measured.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub fn kubeconfig() -> Option<PathBuf> {
    let path = std::env::var_os("ASHLAR_TEST_KUBECONFIG").map(PathBuf::from);
    if path.is_none() {
        // Past the test runner's capture: a test that did not run must be seen.
        let _ =
            std::io::stderr().write_all(b"skipped: ASHLAR_TEST_KUBECONFIG names no API server\n");
    }
    path
}

/// A client, with the definition installed.
pub async fn cluster(kubeconfig: &Path) -> Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let kubeconfig = Kubeconfig::read_from(kubeconfig).unwrap();
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .unwrap();
    let client = Client::try_from(config).unwrap();
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let crd = inference_service_crd();
    let params = PatchParams::apply("api-server-test").force();
    api.patch(&crd.name_any(), &params, &Patch::Apply(&crd))
        .await
        .unwrap();
    until("the definition is established", PATIENCE, || async {
        let conditions = api.get(&crd.name_any()).await.ok()?.status?.conditions?;
        conditions
            .iter()
            .any(|c| c.type_ == "Established" && c.status == "True")
            .then_some(())
    })
    .await;
    client
}

/// Looks again and again until there is something; panics with `what` after `limit`.
pub async fn until<T, F: Future<Output = Option<T>>>(
    what: &str,
    limit: Duration,
    look: impl Fn() -> F,
) -> T {
    let start = Instant::now();
    loop {
        if let Some(seen) = look().await {
            return seen;
        }
        assert!(start.elapsed() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// An address of this machine that is not the loopback's: the API takes no other in an EndpointSlice.
pub fn outer_address() -> IpAddr {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    // Nothing is sent: it only asks the routes which of our addresses would be used.
    socket.connect((Ipv4Addr::new(10, 96, 0, 1), 443)).unwrap();
    socket.local_addr().unwrap().ip()
}

/// A namespace of its own for a test.
pub async fn namespace(client: &Client, purpose: &str) -> String {
    let name = format!("{purpose}-{:08x}", rand::random::<u32>());
    let api: Api<Namespace> = Api::all(client.clone());
    let object = serde_json::from_value(json!({"metadata": {"name": name}})).unwrap();
    api.create(&PostParams::default(), &object).await.unwrap();
    name
}

pub async fn drop_namespace(client: &Client, name: &str) {
    let api: Api<Namespace> = Api::all(client.clone());
    api.delete(name, &DeleteParams::background()).await.unwrap();
}

pub fn service(name: &str) -> Value {
    json!({
        "apiVersion": "serving.ashlar.dev/v1alpha1", "kind": "InferenceService",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": "oci://ashlar.invalid/model:1"},
            "runtime": {"device": "cpu", "args": ["--max-model-len=512"]},
            "resources": {"requests": {"cpu": "0.5", "memory": "1024Mi"}},
            "endpoint": {"auth": "None"},
        },
    })
}

/// The operator as a process of its own, for one namespace.
pub struct Operator {
    process: std::process::Child,
    port: u16,
}

impl Operator {
    pub fn start(kubeconfig: &Path, namespace: &str) -> Self {
        Self::start_with(kubeconfig, namespace, &[])
    }

    /// The same with more arguments.
    pub fn start_with(kubeconfig: &Path, namespace: &str, more: &[String]) -> Self {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let process = std::process::Command::new(env!("CARGO_BIN_EXE_ashlar-operator"))
            .args([
                "--log",
                "warn",
                "run",
                "--runtime-image=ashlar.invalid/runtime:1",
            ])
            .arg(format!("--namespace={namespace}"))
            .arg(format!("--watch-namespace={namespace}"))
            .arg(format!("--admin-listen=127.0.0.1:{port}"))
            .args(more)
            .env("KUBECONFIG", kubeconfig)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { process, port }
    }

    pub async fn metrics(&self) -> Option<String> {
        let address = ("127.0.0.1", self.port);
        let mut socket = tokio::net::TcpStream::connect(address).await.ok()?;
        socket
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: operator\r\nConnection: close\r\n\r\n")
            .await
            .ok()?;
        let mut text = String::new();
        socket.read_to_string(&mut text).await.ok()?;
        Some(text)
    }

    /// Sum of all series of a metric.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        let text = self.metrics().await?;
        let values = text.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let value = rest.rsplit(' ').next()?;
            (rest.starts_with('{') || rest.starts_with(' ')).then(|| value.parse::<f64>().ok())?
        });
        Some(values.sum())
    }

    pub async fn leads(&self) {
        until("the operator leads", PATIENCE, || async {
            (self.metric("ashlar_operator_leader").await? > 0.0).then_some(())
        })
        .await;
    }

    /// Asks it to end, as Kubernetes does.
    pub async fn terminate(mut self) {
        let id = self.process.id().to_string();
        let asked = std::process::Command::new("kill").arg(&id).status();
        assert!(asked.unwrap().success());
        let start = Instant::now();
        let ended = loop {
            if let Some(ended) = self.process.try_wait().unwrap() {
                break ended;
            }
            assert!(start.elapsed() < PATIENCE, "the operator does not end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        assert!(ended.success(), "SIGTERM is a clean end, not {ended}");
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        // Both fail when it has ended already, which is as good.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
