//! The watches that fill the caches, and whom they wake.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use ashlar_crds::{InferenceService, names::SERVICE_LABEL};
use futures::{StreamExt as _, future::BoxFuture};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::{
    Api, Client,
    api::ObjectMeta,
    runtime::{
        WatchStreamExt as _,
        reflector::{self, Store},
        watcher,
    },
};
use tokio::sync::{mpsc, watch};

use super::{
    Trigger,
    reduce::{Stored, StoredPod, reduce_child, reduce_pod},
    rest::Packer,
};
use crate::controller::{
    build::children::{SLICE_SERVICE_LABEL, http_routes},
    index::{Index, Reduced},
    seen::{Child, Pod},
    timed,
};

/// Objects of one answer when a watch lists.
const PAGE: u32 = 100;
/// How often a cluster without an optional kind is looked at again.
const DISCOVERY: Duration = Duration::from_secs(60);

/// Where triggers go. Until somebody listens they are dropped: whoever starts to listen looks at every service first.
#[derive(Clone)]
pub(super) struct Triggers {
    send: mpsc::Sender<Trigger>,
    heard: Arc<AtomicBool>,
}

impl Triggers {
    /// Those of a channel, sent once `heard` is true.
    pub(super) fn new(send: mpsc::Sender<Trigger>, heard: Arc<AtomicBool>) -> Self {
        Self { send, heard }
    }

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

fn labelled(label: &str) -> watcher::Config {
    watcher::Config::default().labels(label).page_size(PAGE)
}

fn reference(service: String) -> Trigger {
    let (namespace, name) = service.split_once('/')?;
    Some(reflector::ObjectRef::new(name).within(namespace))
}

/// Follows the services themselves; `filled` says that the store holds them all.
pub(super) fn spawn_services(
    client: &Client,
    watched: Option<&str>,
    triggers: Triggers,
    filled: watch::Sender<bool>,
) -> Store<InferenceService> {
    let api: Api<InferenceService> = match watched {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    };
    let (store, writer) = reflector::store();
    let config = watcher::Config::default().page_size(PAGE);
    tokio::spawn(async move {
        let events = watcher(api, config).default_backoff();
        let services = events
            .modify(slim)
            .reflect(writer)
            .inspect(|event| {
                if matches!(event, Ok(watcher::Event::InitDone)) {
                    filled.send_replace(true);
                }
            })
            .touched_objects();
        let mut services = std::pin::pin!(services);
        while let Some(service) = services.next().await {
            match service {
                Ok(service) => {
                    let trigger = Some(reflector::ObjectRef::from_obj(&service));
                    if !triggers.send(trigger).await {
                        return;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "the watch of services broke and starts again")
                }
            }
        }
    });
    store
}

/// Drops what no reconcile looks at.
fn slim(service: &mut InferenceService) {
    service.metadata.managed_fields = None;
    if let Some(annotations) = &mut service.metadata.annotations {
        annotations.retain(|key, _| key.starts_with("serving.ashlar.dev/"));
    }
}

pub(super) fn spawn_children(
    index: Index<Stored>,
    api: Api<Child>,
    kind: String,
    triggers: Triggers,
) {
    tokio::spawn(async move {
        let events = watcher(api, labelled(SERVICE_LABEL)).default_backoff();
        let wake = triggers.wake(reference);
        let packer = Packer::default();
        let reduce = |child| reduce_child(child, &packer);
        index.follow(events, &kind, reduce, wake).await;
    });
}

pub(super) fn spawn_pods(
    index: Index<StoredPod>,
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
        let packer = Packer::default();
        let reduce = |pod| reduce_pod(pod, label, &packer);
        index.follow(events, "Pod", reduce, wake).await;
    });
}

/// Looks for the kind until the cluster has it, then follows it.
pub(super) fn spawn_routes(
    index: Index<Stored>,
    client: &Client,
    watched: Option<&str>,
    has_routes: Arc<AtomicBool>,
    triggers: Triggers,
) {
    let (client, kind) = (client.clone(), http_routes());
    let api: Api<Child> = match watched {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &kind),
        None => Api::all_with(client.clone(), &kind),
    };
    tokio::spawn(async move {
        loop {
            let resources = client.list_api_group_resources(&kind.api_version);
            let found = timed(resources).await;
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
pub(super) fn spawn_gateway(
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
