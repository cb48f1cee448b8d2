//! Whether nodes have room for one pod more. A hint for rollouts: the scheduler decides.
//!
//! Watches nodes, quotas and the requests of every bound pod, reduced to sums per node. Without the right to watch them,
//! or before they are listed, nothing is known, and a rollout finds out by trying.

mod requests;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{Node, PodSpec, ResourceQuota};
use kube::{
    Api, Client, ResourceExt as _,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, watcher},
    },
};
pub(super) use requests::Requests;
use requests::{BoundPod, bound_requests, requests_of};

use super::placement;

/// A claim on room ends after this time, should its pod never be seen on a node.
const CLAIM: Duration = Duration::from_secs(30);
/// Objects of one answer when a watch lists: a pod of others may be large, and is read whole.
const PAGE: u32 = 100;

/// A node that takes pods.
#[derive(Debug, Clone)]
pub(super) struct NodeRoom {
    pub(super) node: Arc<Node>,
    pub(super) allocatable: Requests,
}

/// What a pod takes. Clusters have many: names are shared.
struct Taken {
    node: Arc<str>,
    requests: Box<[(Arc<str>, f64)]>,
    listing: u32,
}

struct Claim {
    service: String,
    request: Requests,
    pods: i32,
    until: Instant,
}

#[derive(Default)]
struct State {
    nodes: BTreeMap<String, NodeRoom>,
    nodes_known: bool,
    /// By [`number_of`] the pod.
    taken: HashMap<u64, Taken>,
    sums: HashMap<Arc<str>, Requests>,
    /// Every resource that any pod has asked for.
    resources: HashSet<Arc<str>>,
    pods_known: bool,
    listing: u32,
    quotas: HashMap<(String, String), ResourceQuota>,
    claims: Vec<Claim>,
}

/// What nodes have left. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Capacity(Arc<Mutex<State>>);

impl Capacity {
    /// Starts the watches.
    pub(super) fn start(client: &Client) -> Self {
        let capacity = Self::default();
        let config = || watcher::Config::default().page_size(PAGE);
        let nodes = watcher(Api::<Node>::all(client.clone()), config());
        let pods = watcher(Api::<BoundPod>::all(client.clone()), config());
        let quotas = watcher(Api::<ResourceQuota>::all(client.clone()), config());
        let (a, b, c) = (capacity.clone(), capacity.clone(), capacity.clone());
        tokio::spawn(follow(nodes.default_backoff(), "Node", move |event| {
            a.node(event)
        }));
        tokio::spawn(follow(pods.default_backoff(), "Pod", move |event| {
            b.pod(event)
        }));
        tokio::spawn(follow(
            quotas.default_backoff(),
            "ResourceQuota",
            move |event| {
                c.quota(event);
            },
        ));
        capacity
    }

    /// How many more pods like this one fit, up to `most`; none when nothing is known. Room that other services have
    /// claimed for their own surge counts as taken.
    pub(super) fn room(
        &self,
        service: &str,
        namespace: &str,
        pod: &PodSpec,
        most: i32,
    ) -> Option<i32> {
        let mut state = self.lock();
        if !state.nodes_known || !state.pods_known {
            return None;
        }
        state.claims.retain(|claim| claim.until > Instant::now());
        let mut free: Vec<(Arc<Node>, Requests)> = state
            .nodes
            .values()
            .map(|room| (Arc::clone(&room.node), state.left_on(room)))
            .collect();
        for claim in state.claims.iter().filter(|claim| claim.service != service) {
            for _ in 0..claim.pods {
                placement::take_first(&mut free, &claim.request);
            }
        }
        let request = requests_of(pod);
        let mut fits = 0;
        for (node, left) in &mut free {
            if !placement::admits(node, pod) {
                continue;
            }
            while fits < most && placement::take(left, &request) {
                fits += 1;
            }
        }
        let quotas = state.quotas.iter().filter(|((ns, _), _)| ns == namespace);
        let allowed = quotas
            .map(|(_, quota)| placement::quota_room(quota, pod, &request))
            .min();
        Some(fits.min(allowed.unwrap_or(i32::MAX)))
    }

    /// Claims room for pods that are about to be created, until they are on nodes.
    pub(super) fn claim(&self, service: &str, pod: &PodSpec, pods: i32) {
        let mut state = self.lock();
        state.claims.retain(|claim| claim.service != service);
        if pods > 0 {
            state.claims.push(Claim {
                service: service.to_owned(),
                request: requests_of(pod),
                pods,
                until: Instant::now() + CLAIM,
            });
        }
    }

    /// The most of a resource that any node has in all; none when nothing is known.
    pub(super) fn largest(&self, resource: &str) -> Option<f64> {
        let state = self.lock();
        let of = |room: &NodeRoom| room.allocatable.get(resource).copied().unwrap_or(0.0) / 1e3;
        let most = state.nodes.values().map(of).fold(0.0, f64::max);
        state.nodes_known.then_some(most)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn node(&self, event: Event<Node>) {
        let mut state = self.lock();
        match event {
            Event::Init => state.nodes.clear(),
            Event::InitApply(node) | Event::Apply(node) => {
                let room = placement::node_room(node);
                state.nodes.insert(room.node.name_any(), room);
            }
            Event::Delete(node) => {
                state.nodes.remove(&node.name_any());
            }
            Event::InitDone => state.nodes_known = true,
        }
    }

    fn pod(&self, event: Event<BoundPod>) {
        let mut state = self.lock();
        match event {
            Event::Init => state.listing = state.listing.wrapping_add(1),
            Event::InitApply(pod) | Event::Apply(pod) => state.bind(&pod),
            Event::Delete(pod) => state.unbind(number_of(&pod)),
            Event::InitDone => {
                let listing = state.listing;
                let taken = state.taken.iter();
                let gone = taken.filter(|(_, taken)| taken.listing != listing);
                let gone: Vec<u64> = gone.map(|(number, _)| *number).collect();
                for number in gone {
                    state.unbind(number);
                }
                state.pods_known = true;
            }
        }
    }

    fn quota(&self, event: Event<ResourceQuota>) {
        let mut state = self.lock();
        let key = |quota: &ResourceQuota| (quota.namespace().unwrap_or_default(), quota.name_any());
        match event {
            Event::Init => state.quotas.clear(),
            Event::InitApply(quota) | Event::Apply(quota) => {
                state.quotas.insert(key(&quota), quota);
            }
            Event::Delete(quota) => {
                state.quotas.remove(&key(&quota));
            }
            Event::InitDone => {}
        }
    }
}

impl State {
    fn bind(&mut self, pod: &BoundPod) {
        let number = number_of(pod);
        let over = matches!(pod.status.phase.as_deref(), Some("Succeeded" | "Failed"));
        let Some(node) = pod.spec.node_name.as_deref().filter(|_| !over) else {
            return self.unbind(number);
        };
        if let Some(known) = self.taken.get_mut(&number)
            && *known.node == *node
        {
            // Requests of a bound pod change only by an in-place resize, which pods of ours do not get.
            known.listing = self.listing;
            return;
        }
        self.unbind(number);
        let requests: Box<[_]> = bound_requests(&pod.spec)
            .into_iter()
            .map(|(resource, amount)| (self.shared(&resource), amount))
            .collect();
        let known = self.sums.get_key_value(node);
        let node: Arc<str> = known.map_or_else(|| node.into(), |(node, _)| Arc::clone(node));
        let sums = self.sums.entry(Arc::clone(&node)).or_default();
        for (resource, amount) in &requests {
            *sums.entry(resource.to_string()).or_default() += amount;
        }
        let taken = Taken {
            node,
            requests,
            listing: self.listing,
        };
        self.taken.insert(number, taken);
    }

    /// The one copy of a resource's name.
    fn shared(&mut self, resource: &str) -> Arc<str> {
        if let Some(known) = self.resources.get(resource) {
            return Arc::clone(known);
        }
        let name: Arc<str> = resource.into();
        self.resources.insert(Arc::clone(&name));
        name
    }

    fn unbind(&mut self, number: u64) {
        let Some(taken) = self.taken.remove(&number) else {
            return;
        };
        if let Some(sums) = self.sums.get_mut(&taken.node) {
            for (resource, amount) in &taken.requests {
                if let Some(sum) = sums.get_mut(&**resource) {
                    *sum -= amount;
                }
            }
        }
    }

    fn left_on(&self, room: &NodeRoom) -> Requests {
        let mut left = room.allocatable.clone();
        if let Some(sums) = self.sums.get(room.node.name_any().as_str()) {
            for (resource, amount) in sums {
                if let Some(left) = left.get_mut(resource) {
                    *left -= amount;
                }
            }
        }
        left
    }
}

/// A pod's uid in eight bytes; that two pods of a cluster have the same is less likely than one in a billion.
fn number_of(pod: &BoundPod) -> u64 {
    let mut hasher = DefaultHasher::new();
    pod.metadata.uid.hash(&mut hasher);
    hasher.finish()
}

async fn follow<K>(
    events: impl futures::Stream<Item = Result<Event<K>, watcher::Error>>,
    kind: &str,
    take: impl Fn(Event<K>),
) {
    let mut events = std::pin::pin!(events);
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => take(event),
            Err(error) => tracing::debug!(kind, %error, "a watch of what nodes have left broke"),
        }
    }
}

#[cfg(test)]
mod tests;
