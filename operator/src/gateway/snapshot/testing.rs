//! Small builders for the tests of the snapshot's users.

use super::{Access, GatewayNames, ReplicaSpec, ServiceId, ServiceSpec, Snapshot};
use crate::gateway::limits::Limits;

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
        limits: Limits::default(),
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
