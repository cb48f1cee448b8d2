//! Keeps the [`Snapshot`] in step with the API server, and reads Secrets by name.
//!
//! Watches of InferenceServices, runtime pods and the gateways' own endpoints feed plain maps; a changed map makes a new
//! snapshot within [`SETTLE`]. A watch that breaks is begun again while the last snapshot stands, so the gateway keeps serving
//! when the API server is away. Only the fields that routing needs are read from a resource, leniently: one that
//! this version does not understand closes that service alone.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use ashlar_crds::names::{REVISION_LABEL, SERVICE_LABEL};
use futures::StreamExt as _;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{Pod, Secret};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, ResourceExt as _};
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::Instant;

use super::canary::Canary;
use super::keys::{ReadError, SecretSource};
use super::limits::Limits;
use super::snapshot::{Access, ReplicaSpec, ServiceId, ServiceSpec, Snapshot};
use crate::model_tls::server_name_of;

/// Changes that come within this time make one snapshot.
const SETTLE: Duration = Duration::from_millis(5);

/// The API of InferenceServices, untyped.
#[must_use]
pub fn inference_services() -> ApiResource {
    let kind = GroupVersionKind::gvk("serving.ashlar.dev", "v1alpha1", "InferenceService");
    ApiResource::from_gvk_with_plural(&kind, "inferenceservices")
}

/// The part of the spec that routing reads.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct SpecView {
    model: ModelView,
    endpoint: EndpointView,
}

/// The part of the status that routing reads.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct StatusView {
    revision: RevisionView,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RevisionView {
    current: String,
    canary: Option<CanaryView>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct CanaryView {
    weight_percent: u32,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ModelView {
    name: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct EndpointView {
    auth: Option<String>,
    api_key_secret_ref: Option<SecretRef>,
    limits: LimitsView,
    hosts: Vec<String>,
    alias: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct LimitsView {
    requests_per_minute: Option<u32>,
    concurrent_requests: Option<u32>,
}

#[derive(Debug, Deserialize)]
struct SecretRef {
    name: String,
}

/// Reads a resource; one that cannot be understood is known, and closed to everybody.
#[must_use]
pub fn service_spec(object: &DynamicObject) -> Option<ServiceSpec> {
    let id = ServiceId::new(object.namespace()?, object.name_any());
    let spec = object.data.get("spec").cloned().unwrap_or_default();
    let view = SpecView::deserialize(spec).unwrap_or_else(|error| {
        tracing::warn!(service = %id, %error, "this gateway does not understand the spec: the service is closed");
        SpecView::default()
    });
    let access = match (
        view.endpoint.auth.as_deref(),
        view.endpoint.api_key_secret_ref,
    ) {
        (Some("None"), _) => Access::Open,
        (Some("Keys"), Some(secret)) => Access::Keys {
            secret: secret.name,
        },
        _ => Access::Unusable,
    };
    let created = object.metadata.creation_timestamp.as_ref();
    let status = object.data.get("status").cloned().unwrap_or_default();
    let revision = StatusView::deserialize(status).unwrap_or_default().revision;
    Some(ServiceSpec {
        canary: revision.canary.map(|canary| Canary {
            revision: revision.current,
            percent: canary.weight_percent,
        }),
        model: view.model.name.unwrap_or_else(|| id.name.clone()),
        access,
        limits: Limits {
            requests_per_minute: view.endpoint.limits.requests_per_minute,
            concurrent_requests: view.endpoint.limits.concurrent_requests,
        },
        hosts: view.endpoint.hosts,
        alias: view.endpoint.alias.unwrap_or(true),
        created: created.map_or(i64::MAX, |time| time.0.as_second()),
        id,
    })
}

/// The pod as a replica, if requests may go to it now.
#[must_use]
pub fn replica_spec(pod: &Pod, port: u16) -> Option<ReplicaSpec> {
    if pod.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let service = pod.metadata.labels.as_ref()?.get(SERVICE_LABEL)?;
    let status = pod.status.as_ref()?;
    let ready = status
        .conditions
        .iter()
        .flatten()
        .find(|condition| condition.type_ == "Ready" && condition.status == "True")?;
    let address: IpAddr = status.pod_ip.as_ref()?.parse().ok()?;
    let ready_since = ready.last_transition_time.as_ref();
    Some(ReplicaSpec {
        service: ServiceId::new(pod.metadata.namespace.as_ref()?, service),
        revision: pod
            .labels()
            .get(REVISION_LABEL)
            .cloned()
            .unwrap_or_default(),
        uid: pod.metadata.uid.clone()?,
        ready_since: ready_since.map_or_else(String::new, |time| time.0.to_string()),
        address: SocketAddr::new(address, port),
        tls: server_name_of(pod),
    })
}

/// Objects of one watch, reduced to what is needed. A new listing replaces the old one when it is complete.
#[derive(Debug)]
struct Store<V> {
    live: HashMap<(String, String), V>,
    listing: HashMap<(String, String), V>,
    synced: bool,
}

impl<V: PartialEq> Store<V> {
    fn new() -> Self {
        Self {
            live: HashMap::new(),
            listing: HashMap::new(),
            synced: false,
        }
    }

    /// Takes an event in; true if what routing sees has changed.
    fn apply<K: kube::Resource>(
        &mut self,
        event: Event<K>,
        reduce: impl Fn(&K) -> Option<V>,
    ) -> bool {
        match event {
            Event::Init => {
                self.listing.clear();
                false
            }
            Event::InitApply(object) => {
                if let Some(value) = reduce(&object) {
                    self.listing.insert(key(&object), value);
                }
                false
            }
            Event::InitDone => {
                let listed = std::mem::take(&mut self.listing);
                let changed = !self.synced || listed != self.live;
                self.live = listed;
                self.synced = true;
                changed
            }
            Event::Apply(object) => match reduce(&object) {
                Some(value) => {
                    let changed = self.live.get(&key(&object)) != Some(&value);
                    self.live.insert(key(&object), value);
                    changed
                }
                None => self.live.remove(&key(&object)).is_some(),
            },
            Event::Delete(object) => self.live.remove(&key(&object)).is_some(),
        }
    }
}

fn key<K: kube::Resource>(object: &K) -> (String, String) {
    let meta = object.meta();
    (
        meta.namespace.clone().unwrap_or_default(),
        meta.name.clone().unwrap_or_default(),
    )
}

/// Where new pictures of the cluster go.
pub struct Publish {
    /// The newest snapshot.
    pub snapshots: watch::Sender<Arc<Snapshot>>,
    /// True from the first whole snapshot on.
    pub synced: watch::Sender<bool>,
}

/// Watches until the process ends; `port` is where runtimes listen, `published` is told of each new snapshot.
pub async fn run(client: Client, port: u16, publish: Publish, published: impl Fn(&Snapshot)) {
    let resources = Api::<DynamicObject>::all_with(client.clone(), &inference_services());
    let mut services = pin!(watcher(resources, watcher::Config::default()).default_backoff());
    let config = watcher::Config::default().labels(SERVICE_LABEL);
    let mut pods = pin!(watcher(Api::<Pod>::all(client.clone()), config).default_backoff());
    let names = publish.snapshots.borrow().names.clone();
    let config =
        watcher::Config::default().labels(&format!("kubernetes.io/service-name={}", names.service));
    let slices = Api::<EndpointSlice>::namespaced(client, &names.namespace);
    let mut slices = pin!(watcher(slices, config).default_backoff());

    let mut service_store = Store::<ServiceSpec>::new();
    let mut pod_store = Store::<ReplicaSpec>::new();
    let mut slice_store = Store::<usize>::new();
    let mut due: Option<Instant> = None;
    loop {
        let changed = tokio::select! {
            event = services.next() => match event {
                Some(Ok(event)) => service_store.apply(event, service_spec),
                Some(Err(error)) => report("InferenceServices", &error),
                None => return,
            },
            event = pods.next() => match event {
                Some(Ok(event)) => pod_store.apply(event, |pod| replica_spec(pod, port)),
                Some(Err(error)) => report("runtime pods", &error),
                None => return,
            },
            event = slices.next() => match event {
                Some(Ok(event)) => slice_store.apply(event, |slice| Some(ready_endpoints(slice))),
                // Without them the clients' limits are this gateway's alone: nothing else needs them.
                Some(Err(error)) => report("the gateways' endpoints", &error),
                None => return,
            },
            () = until(due) => {
                due = None;
                let previous = Arc::clone(&publish.snapshots.borrow());
                let mut next = Snapshot::build(
                    &previous,
                    service_store.live.values().cloned(),
                    pod_store.live.values().cloned(),
                );
                next.gateways = slice_store.live.values().sum::<usize>().max(1);
                published(&next);
                publish.snapshots.send_replace(Arc::new(next));
                publish.synced.send_replace(true);
                false
            }
        };
        if changed && due.is_none() {
            due = Some(Instant::now() + SETTLE);
        }
        if !(service_store.synced && pod_store.synced) {
            due = None; // half a picture would answer 404 for what exists
        } else if due.is_none() && !*publish.synced.borrow() {
            due = Some(Instant::now());
        }
    }
}

/// Gateways of a slice that are ready; an address has one entry.
fn ready_endpoints(slice: &EndpointSlice) -> usize {
    let endpoints = slice.endpoints.iter().flatten();
    let ready = endpoints.filter(|endpoint| {
        let conditions = endpoint.conditions.as_ref();
        conditions.is_none_or(|conditions| conditions.ready.unwrap_or(true))
    });
    ready.count()
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

fn report(what: &str, error: &watcher::Error) -> bool {
    tracing::warn!(%error, "the watch of {what} broke and begins again; the last picture stands");
    false
}

/// Reads Secrets from the API server.
pub struct KubeSecrets(
    /// The gateway's own client.
    pub Client,
);

impl SecretSource for KubeSecrets {
    fn read<'a>(
        &'a self,
        namespace: &'a str,
        name: &'a str,
    ) -> BoxFuture<'a, Result<BTreeMap<String, Vec<u8>>, ReadError>> {
        Box::pin(async move {
            let secrets = Api::<Secret>::namespaced(self.0.clone(), namespace);
            match secrets.get(name).await {
                Ok(secret) => {
                    let data = secret.data.unwrap_or_default();
                    Ok(data.into_iter().map(|(k, v)| (k, v.0)).collect())
                }
                Err(kube::Error::Api(status)) if status.code == 403 => Err(ReadError::Forbidden),
                Err(kube::Error::Api(status)) if status.code == 404 => Err(ReadError::NotFound),
                Err(error) => Err(ReadError::Unavailable(error.to_string())),
            }
        })
    }
}

#[cfg(test)]
#[path = "tests/watch.rs"]
mod tests;
