//! What the gateway knows of the cluster, as one immutable picture.
//!
//! A [`Snapshot`] is built from plain inputs by [`Snapshot::build`], swapped in whole, and never changed
//! afterwards: a request looks at one picture from beginning to end, and routing never waits for the API server.
//! Only what belongs to pods and services themselves lives on from picture to picture: counters, health, the line of
//! held requests, and what is known of prompts.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::affinity::Index;
use super::canary::Canary;
use super::health::Health;
use super::hold::Line;
use super::limits::{Limits, Quotas};

/// Namespace and name of an `InferenceService`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceId {
    /// The namespace, which is also the tenant.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
}

impl ServiceId {
    /// Names a service.
    #[must_use]
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for ServiceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Who may call a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// Anyone who reaches the gateway (`endpoint.auth: None`).
    Open,
    /// Holders of a key whose digest is in this Secret of the service's namespace.
    Keys {
        /// The Secret's name.
        secret: String,
    },
    /// The spec asks for keys and names no Secret: nobody can be let in.
    Unusable,
}

/// The part of an `InferenceService` that routing needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceSpec {
    /// Namespace and name.
    pub id: ServiceId,
    /// The model name that the runtime serves.
    pub model: String,
    /// Who may call.
    pub access: Access,
    /// What one client may ask.
    pub limits: Limits,
    /// `endpoint.hosts`.
    pub hosts: Vec<String>,
    /// Whether `NAME.NAMESPACE.svc` leads here.
    pub alias: bool,
    /// `creationTimestamp` in seconds of the Unix epoch: the oldest claim on a host wins.
    pub created: i64,
    /// The revision on trial, if there is one.
    pub canary: Option<Canary>,
}

/// A runtime pod that can take requests: Ready, with an address, and not being deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaSpec {
    /// The service whose label the pod carries, in the pod's own namespace.
    pub service: ServiceId,
    /// Hash of its revision.
    pub revision: String,
    /// The pod's uid.
    pub uid: String,
    /// When the pod last became Ready: a pod that restarted in place is a new incarnation.
    pub ready_since: String,
    /// Where its runtime listens.
    pub address: SocketAddr,
    /// The name that its certificate has to be for; none without TLS.
    pub tls: Option<String>,
}

/// A ready replica, with the number of requests this gateway has open on it.
#[derive(Debug)]
pub struct Replica {
    /// Pod uid and the time it last became Ready: what a failed attempt excludes.
    pub incarnation: String,
    /// The incarnation as a number that is not 0, the same on every gateway.
    pub id: u32,
    /// Hash of its revision.
    pub revision: String,
    /// Where its runtime listens.
    pub address: SocketAddr,
    /// The name that its certificate has to be for; none without TLS.
    pub tls: Option<String>,
    state: Arc<ReplicaState>,
    epoch: Instant,
}

/// What this gateway knows of a pod, whatever the picture.
#[derive(Debug, Default)]
struct ReplicaState {
    in_flight: AtomicUsize,
    health: Health,
}

impl Replica {
    /// Requests of this gateway that are open on the pod now.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.state.in_flight.load(Ordering::Relaxed)
    }

    /// Whether it is left out for its failures.
    #[must_use]
    pub fn is_ejected(&self) -> bool {
        self.state.health.is_ejected(self.epoch.elapsed())
    }

    /// It has answered.
    pub fn succeeded(&self) {
        self.state.health.succeeded();
    }

    /// It has failed; true if that ejects it.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.state.health.failed(self.epoch.elapsed())
    }

    /// Counts one more request until the guard is dropped.
    #[must_use]
    pub fn enter(&self) -> InFlight {
        self.state.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(Arc::clone(&self.state))
    }
}

/// One open request on a replica; dropped when the response body ends or the client leaves.
#[derive(Debug)]
pub struct InFlight(Arc<ReplicaState>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

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

/// The names under which the gateway itself is reached, which no service may claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayNames {
    /// Name of the gateway's Service.
    pub service: String,
    /// Namespace of the operator.
    pub namespace: String,
    /// The cluster's DNS domain, such as `cluster.local`.
    pub cluster_domain: String,
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

/// The incarnation as a number that is not 0.
fn numbered(replica: &ReplicaSpec) -> u32 {
    let mut hasher = DefaultHasher::new();
    (&replica.uid, &replica.ready_since).hash(&mut hasher);
    (hasher.finish() as u32).max(1)
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
pub(super) mod testing {
    //! Small builders for the tests of this module's users.

    use super::{Access, GatewayNames, ReplicaSpec, ServiceId, ServiceSpec, Snapshot};

    pub(crate) fn names() -> GatewayNames {
        GatewayNames {
            service: "ashlar-gateway".to_owned(),
            namespace: "ashlar-system".to_owned(),
            cluster_domain: "cluster.local".to_owned(),
        }
    }

    /// A service with keys in the Secret `keys`, an alias and no hosts.
    pub(crate) fn service(namespace: &str, name: &str, model: &str) -> ServiceSpec {
        ServiceSpec {
            id: ServiceId::new(namespace, name),
            model: model.to_owned(),
            access: Access::Keys {
                secret: "keys".to_owned(),
            },
            limits: super::Limits::default(),
            hosts: Vec::new(),
            alias: true,
            created: 100,
            canary: None,
        }
    }

    pub(crate) fn replica(namespace: &str, name: &str, uid: &str, address: &str) -> ReplicaSpec {
        ReplicaSpec {
            service: ServiceId::new(namespace, name),
            revision: "r".to_owned(),
            uid: uid.to_owned(),
            ready_since: "t0".to_owned(),
            address: address.parse().expect("a socket address"),
            tls: None,
        }
    }

    pub(crate) fn snapshot(
        services: impl IntoIterator<Item = ServiceSpec>,
        replicas: impl IntoIterator<Item = ReplicaSpec>,
    ) -> Snapshot {
        Snapshot::build(&Snapshot::empty(names()), services, replicas)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]
    use super::testing::{names, replica, service, snapshot};
    use super::*;

    #[test]
    fn hosts_are_normalised() {
        for (raw, expected) in [
            ("Chat.Example.com", "chat.example.com"),
            ("chat.example.com.", "chat.example.com"),
            ("chat.example.com:8080", "chat.example.com"),
            ("chat.example.com.:80", "chat.example.com"),
            ("[::1]:8080", "[::1]"),
            ("[::1]", "[::1]"),
            ("::1", "::1"),
            ("", ""),
        ] {
            assert_eq!(normalize_host(raw), expected, "{raw}");
        }
    }

    #[test]
    fn the_oldest_claim_on_a_host_wins() {
        let mut young = service("a", "young", "m");
        young.hosts = vec!["Chat.Example.com".to_owned()];
        young.created = 200;
        let mut old = service("z", "old", "m");
        old.hosts = vec!["chat.example.com".to_owned()];
        old.created = 100;
        for order in [
            vec![young.clone(), old.clone()],
            vec![old.clone(), young.clone()],
        ] {
            let snapshot = snapshot(order, []);
            assert_eq!(
                snapshot.by_host("chat.example.com").unwrap().spec.id,
                old.id
            );
        }
    }

    #[test]
    fn names_inside_the_cluster_cannot_be_claimed() {
        let mut thief = service("thief", "t", "m");
        thief.hosts = [
            "ashlar-gateway",
            "ashlar-gateway.ashlar-system",
            "ashlar-gateway.ashlar-system.svc",
            "victim.tenant.svc",
            "victim.tenant.svc.cluster.local",
            "cluster.local",
            "10.0.0.1",
            "[::1]",
            "localhost",
            "good.example.com",
        ]
        .map(str::to_owned)
        .to_vec();
        let snapshot = snapshot([thief.clone()], []);
        for host in &thief.hosts {
            assert_eq!(
                snapshot.by_host(host).is_some(),
                host == "good.example.com",
                "{host}"
            );
        }
    }

    #[test]
    fn open_services_are_not_found_by_model() {
        let mut open = service("a", "open", "m");
        open.access = Access::Open;
        let snapshot = snapshot([open, service("b", "keyed", "m")], []);
        let found: Vec<_> = snapshot
            .by_model("m")
            .iter()
            .map(|s| s.spec.id.to_string())
            .collect();
        assert_eq!(found, ["b/keyed"]);
    }

    #[test]
    fn counters_survive_a_rebuild_and_belong_to_the_pod() {
        let first = snapshot(
            [service("a", "s", "m")],
            [replica("a", "s", "u1", "10.0.0.1:8000")],
        );
        let guard = first.service("a", "s").unwrap().replicas[0].enter();
        let second = Snapshot::build(
            &first,
            [service("a", "s", "m")],
            [
                replica("a", "s", "u1", "10.0.0.1:8000"),
                replica("a", "s", "u2", "10.0.0.2:8000"),
            ],
        );
        let loads = |s: &Snapshot| -> Vec<usize> {
            s.service("a", "s")
                .unwrap()
                .replicas
                .iter()
                .map(|r| r.in_flight())
                .collect()
        };
        assert_eq!(loads(&second), [1, 0]);
        drop(guard);
        assert_eq!(loads(&second), [0, 0]);
    }

    #[test]
    fn replicas_stay_in_their_own_namespace() {
        let snapshot = Snapshot::build(
            &Snapshot::empty(names()),
            [service("a", "s", "m"), service("b", "s", "m")],
            [replica("a", "s", "u1", "10.0.0.1:8000")],
        );
        assert_eq!(snapshot.service("a", "s").unwrap().replicas.len(), 1);
        assert!(snapshot.service("b", "s").unwrap().replicas.is_empty());
    }
}
