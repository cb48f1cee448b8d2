//! The cluster under test, with the chart installed once for all tests.

use std::net::IpAddr;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, ListParams};
use kube::{Client, Config};
use tokio::sync::OnceCell;

/// The namespace and the release of the chart.
pub const SYSTEM_NAMESPACE: &str = "ashlar-system";
/// The release's name.
pub const RELEASE: &str = "ashlar";

/// The runtime's image under the name that the last release's chart is given.
pub const PREVIOUS_RUNTIME: &str = "ashlar.local/ashlar:previous";

/// One installation per test process; `helm upgrade --install` with the same values changes nothing in the next.
static INSTALLED: OnceCell<()> = OnceCell::const_new();

/// A connection to a cluster on which Ashlar is installed.
#[derive(Clone)]
pub struct Cluster {
    /// The API server, as administrator.
    pub client: Client,
}

impl Cluster {
    /// Connects to the cluster that `KUBECONFIG` names, and installs the chart when this process has not yet.
    ///
    /// # Errors
    /// When there is no cluster, or the chart does not install; the message says what to set.
    pub async fn connect() -> Result<Self> {
        let cluster = Self {
            client: client().await?,
        };
        INSTALLED.get_or_try_init(install).await?;
        Ok(cluster)
    }

    /// Where pods reach the cluster's first node, which is this machine when the cluster is.
    ///
    /// # Errors
    /// When the API server does not answer, or no node has an address.
    pub async fn node_address(&self) -> Result<IpAddr> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let nodes = nodes.list(&ListParams::default()).await?.items.into_iter();
        let addresses = nodes.filter_map(|node| node.status?.addresses).flatten();
        let internal = addresses
            .into_iter()
            .find(|address| address.type_ == "InternalIP");
        Ok(internal
            .context("no node has an address")?
            .address
            .parse()?)
    }

    /// The pods of a chart component (`operator`, `gateway`) that are not on their way out.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub async fn component_pods(&self, component: &str) -> Result<Vec<Pod>> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), SYSTEM_NAMESPACE);
        let listed = pods
            .list(
                &ListParams::default().labels(&format!("app.kubernetes.io/component={component}")),
            )
            .await?;
        Ok(listed
            .items
            .into_iter()
            .filter(|pod| pod.metadata.deletion_timestamp.is_none())
            .collect())
    }
}

async fn client() -> Result<Client> {
    ensure!(
        std::env::var_os("KUBECONFIG").is_some(),
        "KUBECONFIG is not set: run `make e2e`, which starts a cluster, or name one of your own"
    );
    // A second call finds the provider installed, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let config = Config::infer().await.context("reading KUBECONFIG")?;
    Client::try_from(config).context("making a client from KUBECONFIG")
}

/// Installs the chart as a user does, and waits until its Deployments are available.
///
/// # Errors
/// When helm fails; the error holds its output.
pub async fn install() -> Result<()> {
    install_with(&[]).await
}

/// The same with more values of the chart, each `path=value`.
///
/// # Errors
/// When helm fails; the error holds its output.
pub async fn install_with(more: &[&str]) -> Result<()> {
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/ashlar");
    let images = [
        image("ASHLAR_E2E_OPERATOR_IMAGE")?,
        image("ASHLAR_E2E_RUNTIME_IMAGE")?,
    ];
    install_chart(chart, &images, more).await
}

/// Installs the last release's chart with its own operator, and another name for the runtime's image; false when the
/// environment does not name them.
///
/// # Errors
/// When helm fails; the error holds its output.
pub async fn install_previous() -> Result<bool> {
    let (Ok(chart), Ok(operator)) = (
        std::env::var("ASHLAR_E2E_PREVIOUS_CHART"),
        std::env::var("ASHLAR_E2E_PREVIOUS_OPERATOR_IMAGE"),
    ) else {
        return Ok(false);
    };
    install_chart(&chart, &[operator, PREVIOUS_RUNTIME.to_owned()], &[]).await?;
    Ok(true)
}

/// An image that the tests need.
///
/// # Errors
/// When the environment does not name it.
pub fn image(variable: &str) -> Result<String> {
    std::env::var(variable).with_context(|| format!("{variable} is not set: run `make e2e`"))
}

async fn install_chart(chart: &str, images: &[String; 2], more: &[&str]) -> Result<()> {
    let values = [
        format!("operator.image={}", images[0]),
        format!("runtime.image={}", images[1]),
    ];
    let mut arguments = vec![
        "upgrade",
        "--install",
        RELEASE,
        chart,
        "--namespace",
        SYSTEM_NAMESPACE,
        "--create-namespace",
    ];
    for value in values
        .iter()
        .map(String::as_str)
        .chain(more.iter().copied())
    {
        arguments.extend(["--set", value]);
    }
    arguments.extend(["--wait", "--timeout", "120s"]);
    run("helm", &arguments).await.map(drop)
}

/// Runs a command and returns what it printed.
///
/// # Errors
/// When it fails; the error holds its output.
pub async fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(arguments);
    let shown = format!("{program} {}", arguments.join(" "));
    let output = tokio::task::spawn_blocking(move || command.output())
        .await
        .context("waiting for a command: this is a bug")?
        .with_context(|| format!("starting {shown}"))?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!(
            "{shown}: {}\n{printed}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(printed)
}
