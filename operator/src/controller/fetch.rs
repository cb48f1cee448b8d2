//! The only reads of a reconcile, all from caches that watches keep: a reconcile asks the API server nothing.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use ashlar_crds::{
    InferenceService,
    names::{FIELD_MANAGER, PULL_LABEL, SERVICE_LABEL},
};
use futures::{Stream, future::BoxFuture};
use k8s_openapi::api::{
    apps::v1::{ControllerRevision, Deployment},
    batch::v1::Job,
    core::v1::{ConfigMap, Pod, Service, ServiceAccount},
    discovery::v1::EndpointSlice,
    networking::v1::NetworkPolicy,
    policy::v1::PodDisruptionBudget,
};
use kube::{
    Api, Client, Resource, ResourceExt as _,
    api::{ApiResource, DynamicObject, ObjectMeta},
    runtime::{WatchStreamExt as _, reflector, watcher},
};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::mpsc;

use super::{
    build::children::{SLICE_MANAGER_LABEL, SLICE_SERVICE_LABEL, http_routes},
    index::{Index, Reduced},
    victims::DELETION_COST,
};

/// Changes that wait for the controller to look at their service; more make the watch wait.
const MAX_TRIGGERS: usize = 4096;
/// Objects of one answer when a watch lists.
const PAGE: u32 = 250;
/// How often a cluster without an optional kind is looked at again.
const DISCOVERY: Duration = Duration::from_secs(60);

/// Conditions of children that a reconcile looks at.
const TELLING: [&str; 2] = ["ReplicaFailure", "Complete"];

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

/// A child at rest: its text, to be read when its service is looked at.
#[derive(Debug, Clone, PartialEq)]
struct Stored(Arc<str>);

/// Caches of everything that carries the service label. Clones share them.
#[derive(Clone)]
pub struct Caches {
    children: Vec<(ApiResource, Index<Stored>)>,
    pods: Index<Arc<Pod>>,
    pull_pods: Index<Arc<Pod>>,
    gateway_slices: Index<Arc<EndpointSlice>>,
    /// HTTPRoutes, once the cluster has the kind.
    routes: Index<Stored>,
    has_routes: Arc<AtomicBool>,
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

impl Triggers {
    /// Sends one; false once nobody will ever listen.
    async fn send(&self, trigger: Trigger) -> bool {
        !self.heard.load(Ordering::Acquire) || self.send.send(trigger).await.is_ok()
    }

    /// What a cache calls with each service that looks different.
    fn wake(
        self,
        trigger: impl Fn(String) -> Trigger,
    ) -> impl Fn(String) -> BoxFuture<'static, bool> {
        move |service| {
            let (triggers, trigger) = (self.clone(), trigger(service));
            Box::pin(async move { triggers.send(trigger).await })
        }
    }
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
        let triggers = Triggers {
            send,
            heard: Arc::clone(&heard),
        };
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
            let api: Api<DynamicObject> = match watched {
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
        for (_, index) in &self.children {
            index.ready().await;
        }
        self.pods.ready().await;
        self.pull_pods.ready().await;
        self.gateway_slices.ready().await;
    }

    /// Pods of all services.
    #[must_use]
    pub fn pods(&self) -> Vec<Arc<Pod>> {
        self.pods.all()
    }

    /// The gateway's own EndpointSlices.
    #[must_use]
    pub fn gateway_slices(&self) -> Vec<Arc<EndpointSlice>> {
        self.gateway_slices.all()
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
            pods: self.pods.of(namespace, name),
            pull_pods: self.pull_pods.of(namespace, name),
            gateway_slices: self
                .gateway_slices
                .all()
                .iter()
                .map(|slice| (**slice).clone())
                .collect(),
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
        self.pods.of(namespace, name)
    }
}

/// The children of kind `K`, read whole; one that someone has damaged is as good as absent.
fn typed<K>(live: &[LiveChild]) -> Vec<Arc<K>>
where
    K: Resource<DynamicType = ()> + DeserializeOwned,
{
    let kind = K::kind(&());
    live.iter()
        .filter(|child| child.resource.kind == kind)
        .filter_map(|child| K::deserialize(&child.value).ok().map(Arc::new))
        .collect()
}

fn live_child(resource: &ApiResource, stored: &Stored) -> LiveChild {
    let mut value: Value =
        serde_json::from_str(&stored.0).expect("text that we wrote: this is a bug");
    value["apiVersion"] = resource.api_version.clone().into();
    value["kind"] = resource.kind.clone().into();
    let text = |pointer: &str| {
        value
            .pointer(pointer)
            .and_then(Value::as_str)
            .map(str::to_owned)
    };
    let owners = value.pointer("/metadata/ownerReferences");
    let owner = owners.and_then(Value::as_array).and_then(|owners| {
        let controller = owners.iter().find(|owner| owner["controller"] == true)?;
        Some(controller["uid"].as_str()?.to_owned())
    });
    LiveChild {
        resource: resource.clone(),
        name: text("/metadata/name").unwrap_or_default(),
        owner,
        terminating: text("/metadata/deletionTimestamp").is_some(),
        value,
    }
}

/// Children: all that somebody could have edited, nothing that only the cluster writes.
fn reduce_child(mut object: DynamicObject) -> Option<Reduced<Stored>> {
    let service = service_of(&object.metadata, SERVICE_LABEL)?;
    // The cluster's own controller copies our labels to the slices of the headless Service: those are not ours.
    let manager = object.labels().get(SLICE_MANAGER_LABEL);
    if manager.is_some_and(|manager| manager != FIELD_MANAGER) {
        return None;
    }
    let meta = &mut object.metadata;
    meta.managed_fields = None;
    meta.resource_version = None;
    meta.creation_timestamp = None;
    let name = meta.name.clone()?;
    let mut data = object.data;
    data["metadata"] = serde_json::to_value(meta).expect("metadata is plain data: this is a bug");
    if let Some(fields) = data.as_object_mut() {
        let telling = fields.remove("status").and_then(telling_conditions);
        if let Some(telling) = telling {
            fields.insert("status".into(), telling);
        }
    }
    Some(Reduced {
        service,
        name,
        value: Stored(data.to_string().into()),
    })
}

/// The part of a status that says why a Deployment's pods are not created, or that a Job is over.
fn telling_conditions(mut status: Value) -> Option<Value> {
    let conditions = status.get_mut("conditions")?.as_array_mut()?;
    let telling = |c: &Value| TELLING.iter().any(|kind| c["type"] == *kind);
    conditions.retain(|c| telling(c) && c["status"] == "True");
    for condition in conditions.iter_mut().filter_map(Value::as_object_mut) {
        condition.remove("lastUpdateTime");
        condition.remove("lastProbeTime");
    }
    let any = !conditions.is_empty();
    any.then(|| serde_json::json!({ "conditions": status["conditions"] }))
}

/// Pods: identity, labels and state.
fn reduce_pod(mut pod: Pod, label: &str) -> Option<Reduced<Arc<Pod>>> {
    let service = service_of(&pod.metadata, label)?;
    let meta = std::mem::take(&mut pod.metadata);
    let name = meta.name.clone()?;
    pod.spec = None;
    if let Some(status) = pod.status.as_mut() {
        for container in status
            .init_container_statuses
            .iter_mut()
            .chain(status.container_statuses.iter_mut())
            .flatten()
        {
            container.container_id = None;
            container.image_id = String::new();
            container.allocated_resources = None;
            container.resources = None;
            container.volume_mounts = None;
            container.user = None;
        }
        status.pod_ips = None;
        status.host_ips = None;
        status.host_ip = None;
        status.resource_claim_statuses = None;
    }
    pod.metadata = ObjectMeta {
        annotations: meta.annotations.and_then(|mut annotations| {
            annotations.retain(|key, _| key == DELETION_COST);
            (!annotations.is_empty()).then_some(annotations)
        }),
        name: meta.name,
        namespace: meta.namespace,
        uid: meta.uid,
        labels: meta.labels.map(|mut labels| {
            labels.retain(|key, _| key.starts_with("serving.ashlar.dev/"));
            labels
        }),
        creation_timestamp: meta.creation_timestamp,
        deletion_timestamp: meta.deletion_timestamp,
        ..ObjectMeta::default()
    };
    Some(Reduced {
        service,
        name,
        value: Arc::new(pod),
    })
}

fn service_of(meta: &ObjectMeta, label: &str) -> Option<String> {
    let service = meta.labels.as_ref()?.get(label)?;
    Some(format!("{}/{service}", meta.namespace.as_deref()?))
}

fn labelled(label: &str) -> watcher::Config {
    watcher::Config::default().labels(label).page_size(PAGE)
}

fn reference(service: String) -> Trigger {
    let (namespace, name) = service.split_once('/')?;
    Some(reflector::ObjectRef::new(name).within(namespace))
}

fn spawn_children(index: Index<Stored>, api: Api<DynamicObject>, kind: String, triggers: Triggers) {
    tokio::spawn(async move {
        let events = watcher(api, labelled(SERVICE_LABEL)).default_backoff();
        let wake = triggers.wake(reference);
        index.follow(events, &kind, reduce_child, wake).await;
    });
}

fn spawn_pods(
    index: Index<Arc<Pod>>,
    client: &Client,
    watched: Option<&str>,
    label: &'static str,
    triggers: Triggers,
) {
    let api: Api<Pod> = match watched {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    };
    tokio::spawn(async move {
        let events = watcher(api, labelled(label)).default_backoff();
        let wake = triggers.wake(reference);
        let reduce = |pod| reduce_pod(pod, label);
        index.follow(events, "Pod", reduce, wake).await;
    });
}

/// Looks for the kind until the cluster has it, then follows it.
fn spawn_routes(
    index: Index<Stored>,
    client: &Client,
    watched: Option<&str>,
    has_routes: Arc<AtomicBool>,
    triggers: Triggers,
) {
    let (client, kind) = (client.clone(), http_routes());
    let api: Api<DynamicObject> = match watched {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &kind),
        None => Api::all_with(client.clone(), &kind),
    };
    tokio::spawn(async move {
        loop {
            let resources = client.list_api_group_resources(&kind.api_version);
            let found = super::timed(resources).await;
            if found.is_ok_and(|all| all.resources.iter().any(|r| r.name == kind.plural)) {
                break;
            }
            tokio::time::sleep(DISCOVERY).await;
        }
        has_routes.store(true, Ordering::Release);
        if triggers.send(None).await {
            spawn_children(index, api, kind.kind, triggers);
        }
    });
}

/// A change of the gateway's endpoints concerns every service's alias.
fn spawn_gateway(
    index: Index<Arc<EndpointSlice>>,
    client: &Client,
    (namespace, service): (&str, &str),
    triggers: Triggers,
) {
    let api: Api<EndpointSlice> = Api::namespaced(client.clone(), namespace);
    let selector = format!("{SLICE_SERVICE_LABEL}={service},!{SERVICE_LABEL}");
    let config = watcher::Config::default().labels(&selector);
    let reduce = |mut slice: EndpointSlice| {
        let name = slice.metadata.name.take()?;
        slice.metadata = ObjectMeta {
            name: Some(name.clone()),
            ..ObjectMeta::default()
        };
        Some(Reduced {
            service: String::new(),
            name,
            value: Arc::new(slice),
        })
    };
    tokio::spawn(async move {
        let events = watcher(api, config).default_backoff();
        let wake = triggers.wake(|_| None);
        index.follow(events, "EndpointSlice", reduce, wake).await;
    });
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use serde_json::json;

    use super::*;
    use crate::controller::apply::is_current;

    fn through_the_cache(mut stored: Value) -> LiveChild {
        let resource = ApiResource::erase::<Service>(&());
        // As in a list: kind and version are said once for all.
        for field in ["apiVersion", "kind"] {
            stored.as_object_mut().unwrap().remove(field);
        }
        let reduced = reduce_child(serde_json::from_value(stored).unwrap()).unwrap();
        assert_eq!(
            (reduced.service.as_str(), reduced.name.as_str()),
            ("chat/m", "m-pods")
        );
        live_child(&resource, &reduced.value)
    }

    #[test]
    fn a_child_as_applied_is_current_when_the_watch_shows_it() {
        let applied = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {
                "name": "m-pods", "namespace": "chat", "labels": {(SERVICE_LABEL): "m"},
                "annotations": {"serving.ashlar.dev/applied": "0123"},
                "ownerReferences": [{"apiVersion": "a/v1", "kind": "K", "name": "m", "uid": "u", "controller": true, "blockOwnerDeletion": true}],
            },
            "spec": {"clusterIP": "None", "ports": [{"port": 8000}]},
        });
        let mut stored = applied.clone();
        stored["metadata"]["resourceVersion"] = "7".into();
        stored["metadata"]["managedFields"] = json!([{"manager": "ashlar-operator"}]);
        stored["status"] = json!({"loadBalancer": {}});
        let live = through_the_cache(stored.clone());
        assert!(is_current(&applied, &live.value), "{}", live.value);
        assert_eq!(
            (live.owner.as_deref(), live.terminating),
            (Some("u"), false)
        );
        assert_eq!(live.value.get("status"), None);
        stored["spec"]["ports"][0]["port"] = 1.into();
        assert!(!is_current(&applied, &through_the_cache(stored).value));
    }

    #[test]
    fn of_a_status_only_a_refusal_and_an_end_are_kept() {
        let refusal = json!({"type": "ReplicaFailure", "status": "True", "message": "quota", "lastUpdateTime": "t"});
        let other = json!({"type": "Available", "status": "True"});
        let kept =
            telling_conditions(json!({"replicas": 3, "conditions": [other, refusal]})).unwrap();
        assert_eq!(
            kept,
            json!({"conditions": [{"type": "ReplicaFailure", "status": "True", "message": "quota"}]})
        );
        assert_eq!(telling_conditions(json!({"conditions": [other]})), None);
        let complete = json!({"type": "Complete", "status": "True", "lastProbeTime": "t"});
        assert_eq!(
            telling_conditions(json!({"succeeded": 1, "conditions": [complete]})).unwrap(),
            json!({"conditions": [{"type": "Complete", "status": "True"}]})
        );
    }
}
