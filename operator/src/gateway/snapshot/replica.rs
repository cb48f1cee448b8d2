//! A ready replica and what this gateway knows of its pod.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::ReplicaSpec;
use crate::gateway::health::Health;

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
    pub(super) state: Arc<ReplicaState>,
    pub(super) epoch: Instant,
}

/// What this gateway knows of a pod, whatever the picture.
#[derive(Debug, Default)]
pub(super) struct ReplicaState {
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

/// The incarnation as a number that is not 0.
pub(super) fn numbered(replica: &ReplicaSpec) -> u32 {
    let mut hasher = DefaultHasher::new();
    (&replica.uid, &replica.ready_since).hash(&mut hasher);
    (hasher.finish() as u32).max(1)
}
