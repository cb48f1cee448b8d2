//! The only reads of a reconcile, all from caches that watches keep: a reconcile asks the API server nothing.

use std::{
    hash::Hash,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use ashlar_crds::{InferenceService, names::SERVICE_LABEL};
use futures::{Stream, StreamExt as _};
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::{ControllerRevision, Deployment},
        core::v1::{Pod, Service, ServiceAccount},
        discovery::v1::EndpointSlice,
        networking::v1::NetworkPolicy,
        policy::v1::PodDisruptionBudget,
    },
};
use kube::{
    Api, Client, Resource, ResourceExt as _,
    runtime::{WatchStreamExt as _, reflector, reflector::Store, watcher},
};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::mpsc;

use super::build::children::SLICE_SERVICE_LABEL;

/// Changes that wait for the controller to look at their service; more make the watch wait.
const MAX_TRIGGERS: usize = 4096;

/// What one reconcile sees of the cluster.
#[derive(Debug, Default)]
pub struct Observed {
    /// Records of all revisions.
    pub revisions: Vec<Arc<ControllerRevision>>,
    /// Their Deployments.
    pub deployments: Vec<Arc<Deployment>>,
    /// Pods of all revisions, terminating ones included.
    pub pods: Vec<Arc<Pod>>,
    /// The gateway's own EndpointSlices.
    pub gateway_slices: Vec<EndpointSlice>,
    /// Every child as it is, by kind and name.
    pub live: Vec<LiveChild>,
}

impl Observed {
    /// Forgets revisions and Deployments of an earlier service of the same name; `live` keeps them, as names in use.
    pub fn keep_owned_by(&mut self, uid: &str) {
        let owned = |meta: &kube::api::ObjectMeta| {
            let mut owners = meta.owner_references.iter().flatten();
            owners.any(|owner| owner.uid == uid)
        };
        self.revisions.retain(|r| owned(&r.metadata));
        self.deployments.retain(|d| owned(&d.metadata));
    }
}

/// A child as it is in the cluster.
#[derive(Debug, Clone)]
pub struct LiveChild {
    /// Its kind.
    pub resource: kube::api::ApiResource,
    /// Its name.
    pub name: String,
    /// Owner's uid, when it has a controller.
    pub owner: Option<String>,
    /// On its way out.
    pub terminating: bool,
    /// The whole object.
    pub value: Value,
}

/// Caches of everything that carries the service label. Clones share them.
#[derive(Clone)]
pub struct Caches {
    revisions: Store<ControllerRevision>,
    deployments: Store<Deployment>,
    pods: Store<Pod>,
    services: Store<Service>,
    accounts: Store<ServiceAccount>,
    slices: Store<EndpointSlice>,
    policies: Store<NetworkPolicy>,
    budgets: Store<PodDisruptionBudget>,
    gateway_slices: Store<EndpointSlice>,
    heard: Arc<AtomicBool>,
}

/// The service whose child changed, or none for all services.
pub type Trigger = Option<reflector::ObjectRef<InferenceService>>;

/// Where triggers go. Until somebody listens they are dropped: whoever starts to listen looks at every service first.
#[derive(Clone)]
struct Triggers {
    send: mpsc::Sender<Trigger>,
    heard: Arc<AtomicBool>,
}

impl Caches {
    /// Starts the watches. The stream yields the service of each changed child, or `None` when all services must look.
    pub fn start(
        client: &Client,
        watched: Option<&str>,
        gateway: (&str, &str),
    ) -> (Self, impl Stream<Item = Trigger> + use<>) {
        let (send, mut receive) = mpsc::channel(MAX_TRIGGERS);
        let heard = Arc::new(AtomicBool::new(false));
        let send = Triggers {
            send,
            heard: Arc::clone(&heard),
        };
        let ours = watcher::Config::default().labels(SERVICE_LABEL);
        let caches = Self {
            revisions: cache(client, watched, ours.clone(), send.clone()),
            deployments: cache(client, watched, ours.clone(), send.clone()),
            pods: cache(client, watched, ours.clone(), send.clone()),
            services: cache(client, watched, ours.clone(), send.clone()),
            accounts: cache(client, watched, ours.clone(), send.clone()),
            slices: cache(client, watched, ours.clone(), send.clone()),
            policies: cache(client, watched, ours.clone(), send.clone()),
            budgets: cache(client, watched, ours, send.clone()),
            gateway_slices: cache(
                client,
                Some(gateway.0),
                watcher::Config::default().labels(&format!(
                    "{SLICE_SERVICE_LABEL}={},!{SERVICE_LABEL}",
                    gateway.1
                )),
                send,
            ),
            heard,
        };
        (
            caches,
            futures::stream::poll_fn(move |context| receive.poll_recv(context)),
        )
    }

    /// From now on the stream of triggers is read, and a full one makes the watches wait.
    pub fn listen(&self) {
        self.heard.store(true, Ordering::Release);
    }

    /// Waits until every cache has been filled once.
    pub async fn ready(&self) {
        // An error means that the watch's task has ended, which happens only when the process does.
        let _ = tokio::join!(
            self.revisions.wait_until_ready(),
            self.deployments.wait_until_ready(),
            self.pods.wait_until_ready(),
            self.services.wait_until_ready(),
            self.accounts.wait_until_ready(),
            self.slices.wait_until_ready(),
            self.policies.wait_until_ready(),
            self.budgets.wait_until_ready(),
            self.gateway_slices.wait_until_ready(),
        );
    }

    /// Pods of all services.
    #[must_use]
    pub fn pods(&self) -> Vec<Arc<Pod>> {
        self.pods.state()
    }

    /// The gateway's own EndpointSlices.
    #[must_use]
    pub fn gateway_slices(&self) -> Vec<Arc<EndpointSlice>> {
        self.gateway_slices.state()
    }

    /// Everything of one service.
    #[must_use]
    pub fn observe(&self, namespace: &str, name: &str) -> Observed {
        let revisions = of(&self.revisions, namespace, name);
        let deployments = of(&self.deployments, namespace, name);
        let mut live = Vec::new();
        add_live(&mut live, &revisions);
        add_live(&mut live, &deployments);
        add_live(&mut live, &of(&self.services, namespace, name));
        add_live(&mut live, &of(&self.accounts, namespace, name));
        // The cluster's own controller copies our labels to the slices of the headless Service: those are not ours.
        let mut slices = of(&self.slices, namespace, name);
        slices.retain(|slice| {
            slice
                .labels()
                .get(super::build::children::SLICE_MANAGER_LABEL)
                .is_some_and(|m| m == ashlar_crds::names::FIELD_MANAGER)
        });
        add_live(&mut live, &slices);
        add_live(&mut live, &of(&self.policies, namespace, name));
        add_live(&mut live, &of(&self.budgets, namespace, name));
        Observed {
            revisions,
            deployments,
            pods: of(&self.pods, namespace, name),
            gateway_slices: self
                .gateway_slices
                .state()
                .iter()
                .map(|slice| (**slice).clone())
                .collect(),
            live,
        }
    }
}

fn of<K>(store: &Store<K>, namespace: &str, name: &str) -> Vec<Arc<K>>
where
    K: Resource + Clone + 'static,
    K::DynamicType: Hash + Eq + Clone,
{
    store.state_filter(|object: &K| {
        object.meta().namespace.as_deref() == Some(namespace)
            && object
                .meta()
                .labels
                .as_ref()
                .and_then(|labels| labels.get(SERVICE_LABEL))
                .is_some_and(|n| n == name)
    })
}

fn add_live<K>(live: &mut Vec<LiveChild>, objects: &[Arc<K>])
where
    K: Resource<DynamicType = ()> + serde::Serialize,
{
    live.extend(objects.iter().map(|object| {
        LiveChild {
            resource: kube::api::ApiResource::erase::<K>(&()),
            name: object.meta().name.clone().unwrap_or_default(),
            owner: object
                .meta()
                .owner_references
                .iter()
                .flatten()
                .find(|o| o.controller == Some(true))
                .map(|o| o.uid.clone()),
            terminating: object.meta().deletion_timestamp.is_some(),
            value: serde_json::to_value(&**object)
                .expect("Kubernetes objects are plain data: this is a bug"),
        }
    }));
}

fn cache<K>(
    client: &Client,
    namespace: Option<&str>,
    config: watcher::Config,
    triggers: Triggers,
) -> Store<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + std::fmt::Debug
        + Send
        + Sync
        + 'static,
{
    let api: Api<K> = match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    };
    let (reader, writer) = reflector::store();
    let stream = watcher(api, config)
        .default_backoff()
        .modify(|object| object.meta_mut().managed_fields = None)
        .reflect(writer)
        .touched_objects();
    tokio::spawn(async move {
        let mut stream = std::pin::pin!(stream);
        while let Some(event) = stream.next().await {
            match event {
                Ok(_) if !triggers.heard.load(Ordering::Acquire) => {}
                Ok(object) => {
                    let service = object
                        .meta()
                        .labels
                        .as_ref()
                        .and_then(|labels| labels.get(SERVICE_LABEL))
                        .cloned();
                    let namespace = object.meta().namespace.clone().unwrap_or_default();
                    let trigger =
                        service.map(|name| reflector::ObjectRef::new(&name).within(&namespace));
                    if triggers.send.send(trigger).await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    tracing::warn!(kind = %K::kind(&()), %error, "a watch broke and starts again")
                }
            }
        }
    });
    reader
}
