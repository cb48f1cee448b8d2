//! Whether nodes have room for one pod more. A hint for rollouts: the scheduler decides.
//!
//! Watches nodes, quotas and the requests of every bound pod, reduced to sums per node. Without the right to watch them,
//! or before they are listed, nothing is known, and a rollout finds out by trying.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{Node, PodSpec, ResourceQuota};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::{
    Api, Client, Resource, ResourceExt as _,
    api::ObjectMeta,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, watcher},
    },
};
use serde::Deserialize;

use super::{placement, quantity, seen};

/// A claim on room ends after this time, should its pod never be seen on a node.
const CLAIM: Duration = Duration::from_secs(30);
/// Objects of one answer when a watch lists: a pod of others may be large, and is read whole.
const PAGE: u32 = 100;

/// Resource and amount, in thousandths of the resource's unit.
pub(super) type Requests = BTreeMap<String, f64>;

/// The part of a pod that says what it takes from its node.
#[derive(Debug, Clone, Deserialize, Resource)]
#[resource(inherit = k8s_openapi::api::core::v1::Pod)]
struct BoundPod {
    #[serde(deserialize_with = "seen::meta")]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: BoundSpec,
    #[serde(default)]
    status: BoundStatus,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct BoundSpec {
    node_name: Option<String>,
    containers: Vec<BoundContainer>,
    init_containers: Vec<BoundContainer>,
    overhead: BTreeMap<String, Quantity>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct BoundContainer {
    resources: BoundResources,
    restart_policy: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct BoundResources {
    requests: BTreeMap<String, Quantity>,
    limits: BTreeMap<String, Quantity>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct BoundStatus {
    phase: Option<String>,
}

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

/// What a pod asks of a node in all: containers together, or the greediest init container, and one place for a pod.
fn bound_requests(spec: &BoundSpec) -> Requests {
    let of = |container: &BoundContainer| -> Requests {
        let BoundResources { requests, limits } = &container.resources;
        // What has a limit and no request requests its limit.
        limits
            .iter()
            .chain(requests)
            .filter_map(|(resource, amount)| {
                Some((resource.clone(), quantity::thousandths(&amount.0)?))
            })
            .collect()
    };
    let add = |sum: &mut Requests, more: &Requests| {
        for (resource, amount) in more {
            *sum.entry(resource.clone()).or_default() += amount;
        }
    };
    let mut total = Requests::new();
    for container in &spec.containers {
        add(&mut total, &of(container));
    }
    let mut sidecars = Requests::new();
    for container in &spec.init_containers {
        let mut alone = of(container);
        if container.restart_policy.as_deref() == Some("Always") {
            add(&mut sidecars, &alone);
            add(&mut total, &alone);
            continue;
        }
        add(&mut alone, &sidecars);
        for (resource, amount) in alone {
            let sum = total.entry(resource).or_default();
            *sum = sum.max(amount);
        }
    }
    for (resource, amount) in &spec.overhead {
        if let Some(amount) = quantity::thousandths(&amount.0) {
            *total.entry(resource.clone()).or_default() += amount;
        }
    }
    total.insert("pods".into(), 1e3);
    total
}

/// The same of a pod that is still to be made.
fn requests_of(pod: &PodSpec) -> Requests {
    let value = serde_json::to_value(pod).expect("a pod spec is plain data: this is a bug");
    let spec = BoundSpec::deserialize(value).unwrap_or_default();
    bound_requests(&spec)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use serde_json::json;

    use super::*;

    fn node(name: &str, gpus: i32) -> Event<Node> {
        Event::Apply(
            serde_json::from_value(json!({
                "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
                "status": {
                    "allocatable": {"cpu": "4", "memory": "8Gi", "pods": "10", "nvidia.com/gpu": gpus.to_string()},
                    "conditions": [{"type": "Ready", "status": "True"}],
                },
            }))
            .unwrap(),
        )
    }

    fn pod(uid: &str, node: Option<&str>, gpus: i32, phase: &str) -> Event<BoundPod> {
        Event::Apply(
            serde_json::from_value(json!({
                "metadata": {"uid": uid},
                "spec": {"nodeName": node, "containers": [{"resources": {"limits": {"nvidia.com/gpu": gpus.to_string()}}}]},
                "status": {"phase": phase},
            }))
            .unwrap(),
        )
    }

    fn asks(gpus: i32) -> PodSpec {
        serde_json::from_value(json!({"containers": [
            {"name": "runtime", "resources": {"requests": {"cpu": "500m"}, "limits": {"nvidia.com/gpu": gpus.to_string()}}}
        ]}))
        .unwrap()
    }

    fn known(capacity: &Capacity) {
        capacity.node(Event::InitDone);
        capacity.pod(Event::InitDone);
    }

    #[test]
    fn a_gpu_is_free_when_no_bound_living_pod_has_it() {
        let capacity = Capacity::default();
        assert_eq!(
            capacity.room("a/s", "a", &asks(1), 9),
            None,
            "not listed yet"
        );
        capacity.node(node("n1", 2));
        capacity.node(node("n2", 1));
        known(&capacity);
        assert_eq!(capacity.room("a/s", "a", &asks(1), 9), Some(3));
        assert_eq!(capacity.room("a/s", "a", &asks(1), 2), Some(2));
        // Two GPUs of two nodes are not two GPUs of one pod.
        assert_eq!(capacity.room("a/s", "a", &asks(2), 9), Some(1));
        capacity.pod(pod("p", Some("n1"), 1, "Running"));
        capacity.pod(pod("waiting", None, 1, "Pending"));
        assert_eq!(capacity.room("a/s", "a", &asks(2), 9), Some(0));
        capacity.pod(pod("p", Some("n1"), 1, "Succeeded"));
        assert_eq!(capacity.room("a/s", "a", &asks(2), 9), Some(1));
        assert_eq!(capacity.largest("nvidia.com/gpu"), Some(2.0));
    }

    #[test]
    fn claims_of_others_are_taken_and_end() {
        let capacity = Capacity::default();
        capacity.node(node("n1", 1));
        known(&capacity);
        capacity.claim("a/s", &asks(1), 1);
        assert_eq!(capacity.room("a/s", "a", &asks(1), 9), Some(1), "one's own");
        assert_eq!(capacity.room("b/t", "b", &asks(1), 9), Some(0));
        capacity.claim("a/s", &asks(1), 0);
        assert_eq!(capacity.room("b/t", "b", &asks(1), 9), Some(1));
    }

    #[test]
    fn a_quota_leaves_no_room_on_free_nodes() {
        let capacity = Capacity::default();
        capacity.node(node("n1", 8));
        known(&capacity);
        let quota = json!({
            "metadata": {"namespace": "a", "name": "q"},
            "status": {"hard": {"requests.nvidia.com/gpu": "3"}, "used": {"requests.nvidia.com/gpu": "2"}},
        });
        capacity.quota(Event::Apply(serde_json::from_value(quota).unwrap()));
        assert_eq!(capacity.room("a/s", "a", &asks(1), 9), Some(1));
        assert_eq!(capacity.room("a/s", "a", &asks(2), 9), Some(0));
        assert_eq!(capacity.room("b/s", "b", &asks(2), 9), Some(4));
    }

    #[test]
    fn a_pod_that_a_new_listing_does_not_show_is_gone() {
        let capacity = Capacity::default();
        capacity.node(node("n1", 1));
        capacity.pod(pod("p", Some("n1"), 1, "Running"));
        known(&capacity);
        assert_eq!(capacity.room("a/s", "a", &asks(1), 9), Some(0));
        capacity.pod(Event::Init);
        capacity.pod(Event::InitDone);
        assert_eq!(capacity.room("a/s", "a", &asks(1), 9), Some(1));
    }
}
