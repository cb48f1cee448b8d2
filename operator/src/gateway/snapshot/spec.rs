//! What a picture is built from: the parts of resources and pods that routing needs.

use std::fmt;
use std::net::SocketAddr;

use crate::gateway::canary::Canary;
use crate::gateway::limits::Limits;

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
