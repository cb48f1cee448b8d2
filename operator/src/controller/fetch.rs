//! The only reads of a reconcile, all from caches that watches keep: a reconcile asks the API server nothing.

mod reduce;
mod rest;
mod watches;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use ashlar_crds::{
    InferenceService,
    names::{PULL_LABEL, SERVICE_LABEL},
};
use futures::Stream;
use k8s_openapi::api::{
    apps::v1::{ControllerRevision, Deployment},
    batch::v1::Job,
    core::v1::{ConfigMap, Pod, Service, ServiceAccount},
    discovery::v1::EndpointSlice,
    networking::v1::NetworkPolicy,
    policy::v1::PodDisruptionBudget,
};
use kube::{
    Api, Client,
    api::{ApiResource, ObjectMeta},
    runtime::reflector::{self, Store},
};
use serde_json::Value;
use tokio::sync::{mpsc, watch};

use super::{build::children::http_routes, index::Index, seen::Child};
use crate::autoscaler::ReadyPod;
use reduce::{Stored, StoredPod, live_child, typed};
use watches::{Triggers, spawn_children, spawn_gateway, spawn_pods, spawn_routes, spawn_services};

/// Changes that wait for the controller to look at their service; more make the watch wait.
const MAX_TRIGGERS: usize = 4096;

/// What one reconcile sees of the cluster.
#[derive(Debug, Default)]
pub struct Observed {
    /// Records of all revisions.
    pub revisions: Vec<Arc<ControllerRevision>>,
    /// Their Deployments.
    pub deployments: Vec<Arc<Deployment>>,
    /// Pods of all revisions, terminating ones included, without their `spec`.
    pub pods: Vec<Arc<Pod>>,
    /// Pods of Jobs that fill the service's claim, in the same way.
    pub pull_pods: Vec<Arc<Pod>>,
    /// The gateway's own EndpointSlices.
    pub gateway_slices: Vec<EndpointSlice>,
    /// Every child as it is, by kind and name.
    pub live: Vec<LiveChild>,
}

impl Observed {
    /// Forgets revisions and Deployments of an earlier service of the same name; `live` keeps them, as names in use.
    pub fn keep_owned_by(&mut self, uid: &str) {
        let owned = |meta: &ObjectMeta| {
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
    pub resource: ApiResource,
    /// Its name.
    pub name: String,
    /// Owner's uid, when it has a controller.
    pub owner: Option<String>,
    /// On its way out.
    pub terminating: bool,
    /// The whole object, less what the API server alone writes.
    pub value: Value,
}

/// Caches of all services, and of everything that carries the service label. Clones share them.
#[derive(Clone)]
pub struct Caches {
    services: Store<InferenceService>,
    services_filled: watch::Sender<bool>,
    children: Vec<(ApiResource, Index<Stored>)>,
    pods: Index<StoredPod>,
    pull_pods: Index<StoredPod>,
    gateway_slices: Index<Arc<EndpointSlice>>,
    /// HTTPRoutes, once the cluster has the kind.
    routes: Index<Stored>,
    has_routes: Arc<AtomicBool>,
    heard: Arc<AtomicBool>,
}

/// A service that changed, or whose child did; none for all services.
pub type Trigger = Option<reflector::ObjectRef<InferenceService>>;

impl Caches {
    /// Starts the watches. The stream yields each changed service, the service of each changed child, or `None` when all
    /// services must look.
    pub fn start(
        client: &Client,
        watched: Option<&str>,
        gateway: (&str, &str),
    ) -> (Self, impl Stream<Item = Trigger> + use<>) {
        let (send, mut receive) = mpsc::channel(MAX_TRIGGERS);
        let heard = Arc::new(AtomicBool::new(false));
        let triggers = Triggers::new(send, Arc::clone(&heard));
        let services_filled = watch::Sender::new(false);
        let services = spawn_services(client, watched, triggers.clone(), services_filled.clone());
        let kinds = [
            ApiResource::erase::<ControllerRevision>(&()),
            ApiResource::erase::<Deployment>(&()),
            ApiResource::erase::<Service>(&()),
            ApiResource::erase::<ServiceAccount>(&()),
            ApiResource::erase::<ConfigMap>(&()),
            ApiResource::erase::<Job>(&()),
            ApiResource::erase::<EndpointSlice>(&()),
            ApiResource::erase::<NetworkPolicy>(&()),
            ApiResource::erase::<PodDisruptionBudget>(&()),
        ];
        let children = kinds.map(|kind| {
            let index = Index::new();
            let api: Api<Child> = match watched {
                Some(namespace) => Api::namespaced_with(client.clone(), namespace, &kind),
                None => Api::all_with(client.clone(), &kind),
            };
            spawn_children(index.clone(), api, kind.kind.clone(), triggers.clone());
            (kind, index)
        });
        let (pods, pull_pods) = (Index::new(), Index::new());
        for (label, index) in [(SERVICE_LABEL, &pods), (PULL_LABEL, &pull_pods)] {
            spawn_pods(index.clone(), client, watched, label, triggers.clone());
        }
        let gateway_slices = Index::new();
        spawn_gateway(gateway_slices.clone(), client, gateway, triggers.clone());
        let (routes, has_routes) = (Index::new(), Arc::new(AtomicBool::new(false)));
        spawn_routes(
            routes.clone(),
            client,
            watched,
            Arc::clone(&has_routes),
            triggers,
        );
        let caches = Self {
            services,
            services_filled,
            children: children.into(),
            pods,
            pull_pods,
            gateway_slices,
            routes,
            has_routes,
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
        // The sender lives as long as `self`.
        let mut filled = self.services_filled.subscribe();
        let _ = filled.wait_for(|filled| *filled).await;
        for (_, index) in &self.children {
            index.ready().await;
        }
        self.pods.ready().await;
        self.pull_pods.ready().await;
        self.gateway_slices.ready().await;
    }

    /// All services.
    #[must_use]
    pub fn services(&self) -> Store<InferenceService> {
        self.services.clone()
    }

    /// Pods of all services that are ready.
    #[must_use]
    pub fn ready_pods(&self) -> Vec<Arc<ReadyPod>> {
        self.pods.all_of(|pod| pod.ready.clone())
    }

    /// The gateway's own EndpointSlices.
    #[must_use]
    pub fn gateway_slices(&self) -> Vec<Arc<EndpointSlice>> {
        self.gateway_slices.all_of(|slice| Some(Arc::clone(slice)))
    }

    /// Everything of one service.
    #[must_use]
    pub fn observe(&self, namespace: &str, name: &str) -> Observed {
        let mut live = Vec::new();
        for (resource, index) in &self.children {
            let stored = index.of(namespace, name);
            live.extend(stored.iter().map(|stored| live_child(resource, stored)));
        }
        let routes = self.routes.of(namespace, name);
        live.extend(
            routes
                .iter()
                .map(|stored| live_child(&http_routes(), stored)),
        );
        Observed {
            revisions: typed(&live),
            deployments: typed(&live),
            pods: unpacked(&self.pods, namespace, name),
            pull_pods: unpacked(&self.pull_pods, namespace, name),
            gateway_slices: self.gateway_slices.all_of(|slice| Some((**slice).clone())),
            live,
        }
    }

    /// Whether the cluster has HTTPRoutes.
    #[must_use]
    pub fn has_http_routes(&self) -> bool {
        self.has_routes.load(Ordering::Acquire)
    }

    /// Pods of one service, as the watch shows them now.
    #[must_use]
    pub fn pods_of(&self, namespace: &str, name: &str) -> Vec<Arc<Pod>> {
        unpacked(&self.pods, namespace, name)
    }
}

/// Pods of one service, read again.
fn unpacked(pods: &Index<StoredPod>, namespace: &str, name: &str) -> Vec<Arc<Pod>> {
    let stored = pods.of(namespace, name);
    stored.iter().map(StoredPod::pod).collect()
}
