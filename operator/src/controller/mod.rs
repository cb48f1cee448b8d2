//! The controller: brings the cluster to what each InferenceService says, and says in its status how far that is.
//!
//! ```text
//! watch ──► reconcile:  fetch ──► validate ──► rollout ──► build ──► apply ──► status
//!           (caches)    reads     pure         pure        pure      writes    pure, then one patch
//! ```
//!
//! Invariants:
//! - a reconcile reads caches only; `apply` writes only what differs; an unchanged status is never written;
//! - caches hold what a reconcile needs and no more (`index`): memory grows with our services, not with the cluster;
//! - nodes and pods of others are known as sums only (`capacity`), and only as a hint;
//! - a replica count goes down only after the least busy pods have been marked (`victims`);
//! - a revision's template is rendered once, into its ControllerRevision: an upgrade of the operator renders nothing;
//! - workloads are applied last, after everything they need;
//! - only the leader writes, and it stops when its Lease cannot be renewed (`tenure`).

pub mod apply;
pub mod build;
mod canary;
mod capacity;
mod endpoint;
mod events;
mod failures;
pub mod fetch;
mod index;
pub mod leader;
pub mod metrics;
mod placement;
pub mod pods;
pub mod probe;
mod quantity;
mod reconcile;
mod report;
mod revisions;
pub mod rollout;
mod seen;
mod service_metrics;
pub mod status;
pub mod tenure;
pub mod validate;
mod victims;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use ashlar_crds::InferenceService;
use futures::StreamExt as _;
use kube::{
    Api, Client, Config,
    runtime::{
        Controller,
        reflector::{self, ObjectRef},
    },
};
use tokio::signal::unix::{SignalKind, signal};

use crate::autoscaler::{Autoscaler, World};
use crate::model_tls::{ModelTlsArgs, Trust, TrustError};
use build::Defaults;
use fetch::Caches;
use metrics::Metrics;

/// Longest wait for one answer of the API server.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);
/// Watches are answered slowly by design: the API server ends one after at most this long.
const WATCH_TIMEOUT: Duration = Duration::from_secs(295);
/// Services with a new number of replicas that wait for a reconcile; more make the autoscaler wait.
const MAX_RESCALED: usize = 1024;
/// Calls of reconciles that wait for the API server at one time: as many connections are made.
const MAX_CALLS: usize = 32;
/// Reconciles at once.
const CONCURRENCY: u16 = 16;
/// Services with a cluster address that are created at one time.
const NEW_ADDRESSES: usize = 8;
/// Changes within this time are looked at together.
const DEBOUNCE: Duration = Duration::from_millis(20);

/// Arguments of `ashlar-operator run`.
#[derive(Debug, Clone, clap::Args)]
pub struct ControllerArgs {
    /// Namespace of operator and gateway.
    #[arg(
        long,
        env = "ASHLAR_OPERATOR_NAMESPACE",
        default_value = "ashlar-system"
    )]
    pub namespace: String,
    /// Only this namespace's services; all without it.
    #[arg(long, env = "ASHLAR_WATCH_NAMESPACE", value_name = "NAMESPACE")]
    pub watch_namespace: Option<String>,
    /// Runtime image for services on the CPU, and for downloads.
    #[arg(long, env = "ASHLAR_RUNTIME_IMAGE", value_name = "IMAGE")]
    pub runtime_image: String,
    /// Runtime image for services on GPUs; the other one without it.
    #[arg(long, env = "ASHLAR_RUNTIME_IMAGE_CUDA", value_name = "IMAGE")]
    pub runtime_image_cuda: Option<String>,
    /// The gateway's Service.
    #[arg(
        long,
        env = "ASHLAR_GATEWAY_SERVICE_NAME",
        default_value = "ashlar-gateway"
    )]
    pub gateway_service: String,
    /// The gateway's ServiceAccount, which reads users' keys.
    #[arg(
        long,
        env = "ASHLAR_GATEWAY_SERVICE_ACCOUNT",
        default_value = "ashlar-gateway"
    )]
    pub gateway_service_account: String,
    /// The cluster's DNS domain.
    #[arg(
        long,
        env = "ASHLAR_CLUSTER_DOMAIN",
        default_value = "cluster.local",
        value_name = "DOMAIN"
    )]
    pub cluster_domain: String,
    /// Who may scrape the metrics of model pods beside the operator: NetworkPolicy peers as a JSON list.
    #[arg(
        long,
        env = "ASHLAR_METRICS_FROM",
        default_value = "[]",
        value_name = "JSON"
    )]
    pub metrics_from: Peers,
    /// Where /metrics, /healthz and /readyz are served.
    #[arg(
        long,
        env = "ASHLAR_OPERATOR_ADMIN_LISTEN",
        default_value = "0.0.0.0:8080",
        value_name = "ADDRESS"
    )]
    pub admin_listen: SocketAddr,
    /// Port of the gateways' metrics.
    #[arg(
        long,
        env = "ASHLAR_GATEWAY_METRICS_PORT",
        default_value_t = 8081,
        value_name = "PORT"
    )]
    pub gateway_metrics_port: u16,
    /// How pods with TLS are known.
    #[command(flatten)]
    pub model_tls: ModelTlsArgs,
    /// Name of the Lease by which operators agree on a leader.
    #[arg(long, env = "ASHLAR_LEASE_NAME", default_value = "ashlar-operator")]
    pub lease_name: String,
    /// This process among its peers; the pod's name.
    #[arg(long, env = "ASHLAR_POD_NAME", default_value = "ashlar-operator")]
    pub identity: String,
}

/// NetworkPolicy peers, given as a JSON list.
#[derive(Debug, Clone)]
pub struct Peers(pub Vec<k8s_openapi::api::networking::v1::NetworkPolicyPeer>);

impl std::str::FromStr for Peers {
    type Err = serde_json::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        serde_json::from_str(text).map(Self)
    }
}

/// Why the controller ended or could not start.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// No way to the API server.
    #[error(
        "no cluster to control: run inside one with a ServiceAccount, or point KUBECONFIG at one: {0}"
    )]
    Client(String),
    /// The CRD is missing or too old.
    #[error(
        "InferenceService {0}; install the CRD of this version: ashlar-operator crd | kubectl apply --server-side -f -"
    )]
    Crd(String),
    /// The address is taken.
    #[error("cannot listen on {address}: free it, or choose another with --admin-listen")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Signals cannot be received.
    #[error("cannot listen for signals")]
    Signals(#[source] std::io::Error),
    /// The CAs of model pods.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// Another leads now.
    #[error(transparent)]
    LeadershipLost(#[from] leader::LeadershipLost),
}

/// What every reconcile shares.
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) caches: Caches,
    pub(crate) defaults: Defaults,
    pub(crate) gateway_account: String,
    pub(crate) gateway_metrics_port: u16,
    pub(crate) metrics: Arc<Metrics>,
    events: events::Recorder,
    pub(crate) written: status::Written,
    pub(crate) autoscaler: Arc<Autoscaler>,
    /// All services, for what they share: host names.
    services: reflector::Store<InferenceService>,
    capacity: capacity::Capacity,
    victims: victims::Victims,
    downloads: probe::Downloads,
    key_answers: endpoint::KeyAnswers,
    failures: failures::Failures,
    /// Turns for a new Service with a cluster address.
    new_addresses: tokio::sync::Semaphore,
}

/// An answer of the API server, or an error after [`CALL_TIMEOUT`].
pub(crate) async fn timed<T>(
    call: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, kube::Error> {
    let late = || {
        let seconds = CALL_TIMEOUT.as_secs();
        kube::Error::Service(format!("the API server did not answer within {seconds} s").into())
    };
    tokio::time::timeout(CALL_TIMEOUT, call)
        .await
        .unwrap_or_else(|_| Err(late()))
}

/// Runs until SIGTERM, or until the leadership is lost.
///
/// # Errors
/// [`ControllerError`] when it cannot start, or no longer leads.
pub async fn run(args: ControllerArgs) -> Result<(), ControllerError> {
    let mut config = Config::infer()
        .await
        .map_err(|error| ControllerError::Client(error.to_string()))?;
    config.connect_timeout = Some(CALL_TIMEOUT);
    config.read_timeout = Some(WATCH_TIMEOUT);
    let client =
        Client::try_from(config).map_err(|error| ControllerError::Client(error.to_string()))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(ControllerError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ControllerError::Signals)?;
    let metrics = Arc::new(Metrics::new());
    metrics::serve(args.admin_listen, Arc::clone(&metrics))
        .await
        .map_err(|source| ControllerError::Listen {
            address: args.admin_listen,
            source,
        })?;
    check_crd(&client).await?;

    let trust = Trust::load(&args.model_tls)?;
    tokio::spawn(Arc::clone(&trust).follow());
    let watched = args.watch_namespace.as_deref();
    let (caches, triggers) =
        Caches::start(&client, watched, (&args.namespace, &args.gateway_service));
    let capacity = capacity::Capacity::start(&client);
    let mut elector = leader::Elector::new(
        client.clone(),
        &args.namespace,
        &args.lease_name,
        format!("{}-{:08x}", args.identity, rand::random::<u32>()),
        leader::Timing::default(),
    );
    // A standby keeps its caches warm, so that it acts at once when it leads. Only this task waits for them: a cache wakes
    // one waiter, and a second would leave one of the two asleep for ever.
    let (filled, warm) = (Arc::clone(&metrics), caches.clone());
    let warmed = tokio::spawn(async move {
        warm.ready().await;
        filled.set_ready();
    });
    tracing::info!("waiting for the Lease");
    tokio::select! {
        () = elector.acquire() => {}
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    }
    tracing::info!("leading");
    metrics.set_leader(true);
    let client = elector.tenure().guard(client, MAX_CALLS);
    let work = async {
        warmed
            .await
            .expect("waiting for caches does not panic: this is a bug");
        caches.listen();
        let caches = caches.clone();
        control(client, args, caches, capacity, triggers, metrics, trust).await;
    };
    let ended = tokio::select! {
        lost = elector.hold() => return Err(lost.into()),
        () = work => Ok(()),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    elector.release().await;
    ended
}

async fn control(
    client: Client,
    args: ControllerArgs,
    caches: Caches,
    capacity: capacity::Capacity,
    triggers: impl futures::Stream<Item = fetch::Trigger> + Send + 'static,
    metrics: Arc<Metrics>,
    trust: Arc<Trust>,
) {
    let store = caches.services();
    let autoscaler = Arc::new(
        Autoscaler::new(
            metrics.registry(),
            args.gateway_metrics_port,
            Arc::clone(&trust),
        )
        .expect("each name once: this is a bug"),
    );
    metrics.tell_of(service_metrics::ServiceMetrics::new(
        store.clone(),
        Arc::clone(&autoscaler),
    ));
    // Its services come by triggers, too: a standby has listed them long before it leads.
    let controller = Controller::for_stream(futures::stream::pending(), store.clone()).with_config(
        kube::runtime::controller::Config::default()
            .debounce(DEBOUNCE)
            .concurrency(CONCURRENCY),
    );
    let context = context(client, args, caches, capacity, autoscaler, metrics, trust);
    let context = Arc::new(context);
    let (scaling, rescaled) = rescaling(&context);
    let first = first_look(&store);
    // A change of the gateway's endpoints concerns every service's alias.
    let triggers = triggers.flat_map(move |service| {
        let some = match service {
            Some(service) => vec![service],
            None => all_services(&store),
        };
        futures::stream::iter(some)
    });
    let triggers = futures::stream::select(first, triggers);
    let control = controller
        .reconcile_on(futures::stream::select(triggers, rescaled))
        .run(reconcile::reconcile, reconcile::after_error, context)
        .for_each(|result| async move {
            if let Err(error) = result {
                tracing::debug!(%error, "reconcile");
            }
        });
    tokio::join!(control, scaling);
}

/// What every reconcile has at hand.
fn context(
    client: Client,
    args: ControllerArgs,
    caches: Caches,
    capacity: capacity::Capacity,
    autoscaler: Arc<Autoscaler>,
    metrics: Arc<Metrics>,
    trust: Arc<Trust>,
) -> Context {
    Context {
        events: events::Recorder::new(client.clone(), args.identity.clone()),
        services: caches.services(),
        capacity,
        victims: victims::Victims::new(trust),
        downloads: probe::Downloads::default(),
        key_answers: endpoint::KeyAnswers::default(),
        failures: failures::Failures::default(),
        new_addresses: tokio::sync::Semaphore::new(NEW_ADDRESSES),
        client,
        caches,
        defaults: Defaults {
            runtime_image_cuda: args
                .runtime_image_cuda
                .unwrap_or_else(|| args.runtime_image.clone()),
            runtime_image: args.runtime_image,
            namespace: args.namespace,
            gateway_service: args.gateway_service,
            cluster_domain: args.cluster_domain,
            metrics_from: args.metrics_from.0,
        },
        gateway_account: args.gateway_service_account,
        gateway_metrics_port: args.gateway_metrics_port,
        autoscaler,
        metrics,
        written: status::Written::default(),
    }
}

/// The autoscaler's loop, and the services whose replicas it has decided anew.
fn rescaling(
    context: &Context,
) -> (
    impl Future<Output = ()> + use<>,
    impl futures::Stream<Item = ObjectRef<InferenceService>> + Send + use<>,
) {
    let (autoscaler, caches) = (Arc::clone(&context.autoscaler), context.caches.clone());
    let services = context.services.clone();
    let look = move || World {
        services: services.state(),
        pods: caches.ready_pods(),
        gateway_slices: caches.gateway_slices(),
    };
    let (send, mut receive) = tokio::sync::mpsc::channel(MAX_RESCALED);
    let scaling = async move { autoscaler.run(look, send).await };
    let rescaled = futures::stream::poll_fn(move |context| receive.poll_recv(context));
    (scaling, rescaled)
}

/// References to all services; first those whose spec nobody has acted upon.
fn all_services(store: &reflector::Store<InferenceService>) -> Vec<ObjectRef<InferenceService>> {
    let mut services = store.state();
    services.sort_by_key(|service| {
        let status = service.status.as_ref();
        status.and_then(|status| status.observed_generation) == service.metadata.generation
    });
    let references = services.iter();
    references
        .map(|service| ObjectRef::from_obj(&**service))
        .collect()
}

/// Who begins to lead looks at every service, but not at all in one moment: what changes meanwhile does not wait for the rest.
fn first_look(
    store: &reflector::Store<InferenceService>,
) -> impl futures::Stream<Item = ObjectRef<InferenceService>> + Send + use<> {
    let services = all_services(store).into_iter().enumerate();
    futures::stream::iter(services).then(|(index, service)| async move {
        if index % usize::from(CONCURRENCY) == 0 {
            tokio::time::sleep(DEBOUNCE).await;
        }
        service
    })
}

/// Refuses to start without the CRD, or with one that lacks this version's fields.
async fn check_crd(client: &Client) -> Result<(), ControllerError> {
    use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition as Crd;
    let api: Api<Crd> = Api::all(client.clone());
    let ours = ashlar_crds::inference_service_crd();
    let name = ours.metadata.name.clone().unwrap_or_default();
    let found = timed(api.get_opt(&name))
        .await
        .map_err(|error| ControllerError::Client(error.to_string()))?;
    let found = found.ok_or_else(|| ControllerError::Crd("is not installed".into()))?;
    let fields = |crd: &Crd| {
        let versions = serde_json::to_value(&crd.spec.versions).unwrap_or_default();
        let mut fields = Vec::new();
        if let Some(schema) = versions.pointer("/0/schema/openAPIV3Schema") {
            collect_fields(schema, "", &mut fields);
        }
        fields
    };
    let (ours, installed) = (fields(&ours), fields(&found));
    match ours.into_iter().find(|field| !installed.contains(field)) {
        Some(field) => Err(ControllerError::Crd(format!("has no field {field}"))),
        None => Ok(()),
    }
}

/// Paths of all fields of a schema, such as `spec.model.uri`.
fn collect_fields(schema: &serde_json::Value, path: &str, fields: &mut Vec<String>) {
    if let Some(items) = schema.get("items") {
        collect_fields(items, path, fields);
    }
    let properties = schema.get("properties").and_then(|p| p.as_object());
    for (name, property) in properties.into_iter().flatten() {
        let path = if path.is_empty() {
            name.clone()
        } else {
            format!("{path}.{name}")
        };
        collect_fields(property, &path, fields);
        fields.push(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_leader_looks_first_at_what_nobody_has_acted_upon() {
        let (store, mut writer) = reflector::store();
        for (name, observed) in [("a", Some(2)), ("b", Some(1)), ("c", None), ("d", Some(2))] {
            let service = serde_json::json!({
                "metadata": {"name": name, "namespace": "chat", "generation": 2},
                "spec": {"model": {"uri": "oci://m"}, "endpoint": {"auth": "None"}},
                "status": {"observedGeneration": observed},
            });
            let service: InferenceService = serde_json::from_value(service).expect("a service");
            writer.apply_watcher_event(&kube::runtime::watcher::Event::Apply(service));
        }
        let names: Vec<String> = all_services(&store).into_iter().map(|s| s.name).collect();
        let mut first = names[..2].to_vec();
        first.sort();
        assert_eq!(first, ["b", "c"], "of {names:?}");
        assert_eq!(names.len(), 4);
    }
}
