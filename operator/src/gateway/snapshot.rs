//! What the gateway knows of the cluster, as one immutable picture.
//!
//! A [`Snapshot`] is built from plain inputs by [`Snapshot::build`], swapped in whole, and never changed
//! afterwards: a request looks at one picture from beginning to end, and routing never waits for the API server.
//! Only what belongs to pods and services themselves lives on from picture to picture: counters, health, the line of
//! held requests, and what is known of prompts.

mod replica;
mod spec;
#[cfg(test)]
pub(super) mod testing;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Instant;

pub use replica::{InFlight, Replica};
use replica::{ReplicaState, numbered};
pub use spec::{Access, GatewayNames, ReplicaSpec, ServiceId, ServiceSpec};

use super::affinity::Index;
use super::hold::Line;
use super::limits::Quotas;

/// A service and its ready replicas.
#[derive(Debug)]
pub struct Service {
    /// What routing needs of the resource.
    pub spec: ServiceSpec,
    /// Ready replicas, in order of address.
    pub replicas: Vec<Arc<Replica>>,
    /// What lives on from picture to picture.
    pub state: Arc<ServiceState>,
}

/// What this gateway knows of a service, whatever the picture.
#[derive(Debug, Default)]
pub struct ServiceState {
    /// Requests that are held, in order of arrival.
    pub line: Arc<Line>,
    /// Which replicas were sent which prompts.
    pub prompts: Mutex<Index>,
    /// What clients have asked lately.
    pub quotas: Arc<Quotas>,
}

/// One immutable picture of the cluster.
#[derive(Debug)]
pub struct Snapshot {
    pub(super) names: GatewayNames,
    services: BTreeMap<String, BTreeMap<String, Arc<Service>>>,
    hosts: HashMap<String, Arc<Service>>,
    models: HashMap<String, Vec<Arc<Service>>>,
    counters: HashMap<String, Arc<ReplicaState>>,
    states: HashMap<ServiceId, Arc<ServiceState>>,
    epoch: Instant,
    /// Gateways that are ready, this one included: they share the clients' limits.
    pub gateways: usize,
}

impl Snapshot {
    /// A picture with nothing in it.
    #[must_use]
    pub fn empty(names: GatewayNames) -> Self {
        Self {
            names,
            services: BTreeMap::new(),
            hosts: HashMap::new(),
            models: HashMap::new(),
            counters: HashMap::new(),
            states: HashMap::new(),
            epoch: Instant::now(),
            gateways: 1,
        }
    }

    /// Builds the next picture; counters of pods that are in `previous` live on.
    #[must_use]
    pub fn build(
        previous: &Self,
        services: impl IntoIterator<Item = ServiceSpec>,
        replicas: impl IntoIterator<Item = ReplicaSpec>,
    ) -> Self {
        let mut next = Self {
            epoch: previous.epoch,
            gateways: previous.gateways,
            ..Self::empty(previous.names.clone())
        };
        let mut by_service: HashMap<ServiceId, Vec<Arc<Replica>>> = HashMap::new();
        for replica in replicas {
            let state = previous
                .counters
                .get(&replica.uid)
                .cloned()
                .unwrap_or_default();
            next.counters
                .insert(replica.uid.clone(), Arc::clone(&state));
            let id = numbered(&replica);
            by_service
                .entry(replica.service)
                .or_default()
                .push(Arc::new(Replica {
                    id,
                    incarnation: format!("{}@{}", replica.uid, replica.ready_since),
                    revision: replica.revision,
                    address: replica.address,
                    tls: replica.tls,
                    state,
                    epoch: next.epoch,
                }));
        }

        let mut specs: Vec<ServiceSpec> = services.into_iter().collect();
        // The oldest claim on a host wins; equal ages are settled by name, the same way on every gateway.
        specs.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
        for spec in specs {
            let mut replicas = by_service.remove(&spec.id).unwrap_or_default();
            replicas.sort_by_key(|replica| replica.address);
            let state = previous.states.get(&spec.id).cloned().unwrap_or_default();
            next.states.insert(spec.id.clone(), Arc::clone(&state));
            next.insert(Arc::new(Service {
                spec,
                replicas,
                state,
            }));
        }
        next
    }

    fn insert(&mut self, service: Arc<Service>) {
        let spec = &service.spec;
        for host in &spec.hosts {
            let host = normalize_host(host);
            if !self.is_reserved_host(&host) {
                self.hosts
                    .entry(host)
                    .or_insert_with(|| Arc::clone(&service));
            }
        }
        if matches!(spec.access, Access::Keys { .. }) {
            self.models
                .entry(spec.model.clone())
                .or_default()
                .push(Arc::clone(&service));
        }
        self.services
            .entry(spec.id.namespace.clone())
            .or_default()
            .insert(spec.id.name.clone(), service);
    }

    /// Hosts that no `endpoint.hosts` may claim, whatever the API server let in: names inside the cluster, bare
    /// names and addresses, and the gateway's own names, which every other service is reached by.
    fn is_reserved_host(&self, host: &str) -> bool {
        let names = &self.names;
        !host.contains('.')
            || host.parse::<std::net::IpAddr>().is_ok()
            || host.starts_with('[')
            || host.ends_with(".svc")
            || host == names.cluster_domain
            || host
                .strip_suffix(names.cluster_domain.as_str())
                .is_some_and(|rest| rest.ends_with('.'))
            || host
                .split_once('.')
                .is_some_and(|(name, rest)| name == names.service && rest == names.namespace)
    }

    /// The service of that namespace and name.
    #[must_use]
    pub fn service(&self, namespace: &str, name: &str) -> Option<&Arc<Service>> {
        self.services.get(namespace)?.get(name)
    }

    /// The same service in this picture.
    #[must_use]
    pub fn get(&self, id: &ServiceId) -> Option<&Arc<Service>> {
        self.service(&id.namespace, &id.name)
    }

    /// The service that owns an external host name; `host` is normalised.
    #[must_use]
    pub fn by_host(&self, host: &str) -> Option<&Arc<Service>> {
        self.hosts.get(host)
    }

    /// Services with keys that serve a model of this name, oldest first.
    #[must_use]
    pub fn by_model(&self, model: &str) -> &[Arc<Service>] {
        self.models.get(model).map_or(&[], Vec::as_slice)
    }

    /// All services, by namespace and name.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values().flat_map(BTreeMap::values)
    }
}

/// Lower case, without port and trailing dot: `Chat.Example.com.:8080` becomes `chat.example.com`.
#[must_use]
pub fn normalize_host(host: &str) -> String {
    let without_port = match host.rfind(':') {
        // A colon inside brackets, or a second one, belongs to an IPv6 address.
        Some(colon) if host.starts_with('[') => {
            if host.as_bytes().get(colon.wrapping_sub(1)) == Some(&b']') {
                &host[..colon]
            } else {
                host
            }
        }
        Some(colon) if host[..colon].contains(':') => host,
        Some(colon) => &host[..colon],
        None => host,
    };
    without_port
        .strip_suffix('.')
        .unwrap_or(without_port)
        .to_ascii_lowercase()
}

#[cfg(test)]
#[path = "tests/snapshot.rs"]
mod tests;
