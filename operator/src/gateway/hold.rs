//! Waiting for a replica: a request for a service with none is kept, within bounds of number and time.
//!
//! A held request costs a task and its head; its body stays unread in the socket, apart from the prefix that was
//! read to find `model`.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use super::error::GatewayError;
use super::metrics::Meter;
use super::resolve::Unresolved;
use super::route;
use super::snapshot::{InFlight, Replica, ServiceId, Snapshot};

/// Bounds of holding.
pub struct Holds {
    slots: Semaphore,
    limit: Duration,
}

/// A replica and the guard that counts the request on it.
pub struct Picked {
    /// Where to send the request.
    pub replica: Arc<Replica>,
    /// Keeps it counted.
    pub in_flight: InFlight,
}

impl Holds {
    /// At most `count` requests wait at one time, each at most `limit` in all its waits.
    #[must_use]
    pub fn new(count: usize, limit: Duration) -> Self {
        Self {
            slots: Semaphore::new(count.min(Semaphore::MAX_PERMITS)),
            limit,
        }
    }

    /// When a request that begins now has waited long enough.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        Instant::now() + self.limit
    }

    /// Picks a replica of `id` outside `excluded`, waiting for one until `deadline` if there is none.
    ///
    /// # Errors
    /// Too many requests wait already, the time is over, or the service was deleted.
    pub async fn replica(
        &self,
        snapshots: &mut watch::Receiver<Arc<Snapshot>>,
        id: &ServiceId,
        excluded: &[String],
        deadline: Instant,
        meter: &Meter,
    ) -> Result<Picked, GatewayError> {
        if let Some(picked) = try_pick(snapshots, id, excluded)? {
            return Ok(picked);
        }
        let Ok(_slot) = self.slots.try_acquire() else {
            return Err(GatewayError::TooManyHeld {
                service: id.clone(),
            });
        };
        let _held = meter.hold();
        loop {
            let changed = tokio::time::timeout_at(deadline, snapshots.changed()).await;
            if !matches!(changed, Ok(Ok(()))) {
                return Err(GatewayError::NoReplica {
                    service: id.clone(),
                    held: self.limit,
                });
            }
            if let Some(picked) = try_pick(snapshots, id, excluded)? {
                return Ok(picked);
            }
        }
    }
}

fn try_pick(
    snapshots: &mut watch::Receiver<Arc<Snapshot>>,
    id: &ServiceId,
    excluded: &[String],
) -> Result<Option<Picked>, GatewayError> {
    let snapshot = Arc::clone(&snapshots.borrow_and_update());
    let service = snapshot.get(id).ok_or_else(|| Unresolved::NoSuchService {
        namespace: id.namespace.clone(),
        name: id.name.clone(),
    })?;
    let picked = route::pick(&service.replicas, excluded, &mut rand::rng());
    Ok(picked.map(|replica| Picked {
        in_flight: replica.enter(),
        replica: Arc::clone(replica),
    }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]
    use super::super::metrics::Metrics;
    use super::super::snapshot::testing::{replica, service, snapshot};
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn meter() -> (Arc<Metrics>, Meter) {
        let metrics = Arc::new(Metrics::new());
        let meter = metrics.meter(&ServiceId::new("a", "s"), std::time::Instant::now());
        (metrics, meter)
    }

    fn with(uids: &[&str]) -> Arc<Snapshot> {
        Arc::new(snapshot(
            [service("a", "s", "m")],
            uids.iter()
                .map(|uid| replica("a", "s", uid, "10.0.0.1:8000")),
        ))
    }

    async fn until_held(metrics: &Metrics, count: u32) {
        let line = format!("ashlar_gateway_held_requests{{name=\"s\",namespace=\"a\"}} {count}");
        tokio::time::timeout(LONG, async {
            while !metrics.render().contains(&line) {
                tokio::task::yield_now().await;
            }
        })
        .await
        .expect("nothing was held");
    }

    #[tokio::test]
    async fn a_held_request_goes_on_when_a_replica_comes() {
        let holds = Holds::new(1, LONG);
        let (sender, mut receiver) = watch::channel(with(&["failed"]));
        let (metrics, meter) = meter();
        let id = ServiceId::new("a", "s");
        let excluded = ["failed@t0".to_owned()];
        let waiting = holds.replica(&mut receiver, &id, &excluded, holds.deadline(), &meter);
        let arrival = async {
            until_held(&metrics, 1).await;
            sender.send(with(&["failed"])).unwrap(); // the excluded one does not count
            sender.send(with(&["failed", "fresh"])).unwrap();
        };
        let (picked, ()) = tokio::join!(waiting, arrival);
        let picked = picked.unwrap();
        assert_eq!(picked.replica.incarnation, "fresh@t0");
        assert_eq!(picked.replica.in_flight(), 1);
        until_held(&metrics, 0).await;
    }

    #[tokio::test]
    async fn number_and_time_are_bounded() {
        let holds = Holds::new(1, Duration::from_millis(20));
        let (_sender, receiver) = watch::channel(with(&[]));
        let (metrics, meter) = meter();
        let id = ServiceId::new("a", "s");
        let mut first = receiver.clone();
        let mut second = receiver.clone();
        let waiting = holds.replica(&mut first, &id, &[], holds.deadline(), &meter);
        let crowded = async {
            until_held(&metrics, 1).await;
            holds
                .replica(&mut second, &id, &[], holds.deadline(), &meter)
                .await
        };
        let (waited, crowded) = tokio::join!(waiting, crowded);
        assert!(matches!(waited, Err(GatewayError::NoReplica { .. })));
        assert!(matches!(crowded, Err(GatewayError::TooManyHeld { .. })));
        assert_eq!(holds.slots.available_permits(), 1);
    }

    #[tokio::test]
    async fn a_deleted_service_ends_the_wait() {
        let holds = Holds::new(1, LONG);
        let (sender, mut receiver) = watch::channel(with(&[]));
        let (metrics, meter) = meter();
        let id = ServiceId::new("a", "s");
        let waiting = holds.replica(&mut receiver, &id, &[], holds.deadline(), &meter);
        let deletion = async {
            until_held(&metrics, 1).await;
            sender.send(Arc::new(snapshot([], []))).unwrap();
        };
        let (outcome, ()) = tokio::join!(waiting, deletion);
        assert!(matches!(outcome, Err(GatewayError::Unresolved(_))));
    }
}
