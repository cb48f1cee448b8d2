//! Waiting for a replica: a request for a service with none is kept, within bounds of number, bytes and time, and goes
//! on in the order of arrival.
//!
//! A held request costs a task and its head; its body stays unread in the socket, apart from the prefix that was
//! read to find `model` or the prompt. Requests of a service form one line: the first takes the first replica, and the
//! next one follows when the first has left for it ([`crate::pod_http`]), so that replicas see them in order too. Who comes
//! while others wait goes behind them. Only a request that is tried again waits beside the line: what it may not use others may.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Mutex, OwnedMutexGuard, Semaphore, watch};
use tokio::time::Instant;

use super::affinity::Prefix;
use super::avoid::Avoided;
use super::error::GatewayError;
use super::metrics::Meter;
use super::resolve::Unresolved;
use super::route::{self, Choice};
use super::snapshot::{InFlight, Replica, Service, ServiceId, Snapshot};

/// Bytes in one unit of the bound on held bytes.
const UNIT: usize = 1024;

/// Bounds of holding.
pub struct Holds {
    slots: Semaphore,
    units: Semaphore,
    limit: Duration,
}

/// The held requests of one service, in order of arrival.
#[derive(Debug, Default)]
pub struct Line {
    /// Its waiters are served in the order in which they came.
    first: Arc<Mutex<()>>,
    waiting: AtomicUsize,
}

/// A place in a line; the next one moves up when it is dropped.
#[derive(Debug)]
pub struct Turn {
    line: Arc<Line>,
    first: Option<OwnedMutexGuard<()>>,
}

impl Turn {
    fn join(line: &Arc<Line>) -> Self {
        line.waiting.fetch_add(1, Ordering::AcqRel);
        Self {
            line: Arc::clone(line),
            first: None,
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.line.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A replica and the guard that counts the request on it.
pub struct Picked {
    /// Where to send the request.
    pub replica: Arc<Replica>,
    /// Keeps it counted.
    pub in_flight: InFlight,
    /// Its place in the line, to be given up when it has left for the replica.
    pub turn: Option<Turn>,
}

/// What a request asks for.
pub struct Ask<'a> {
    /// The service.
    pub id: &'a ServiceId,
    /// What failed it.
    pub avoided: &'a Avoided,
    /// Its prompt.
    pub prefix: Option<&'a Prefix>,
    /// Bytes of its body that the gateway keeps.
    pub bytes: usize,
    /// Until when it may wait.
    pub deadline: Instant,
}

impl Holds {
    /// At most `count` requests with `bytes` kept in all wait at one time, each at most `limit` in all its waits.
    #[must_use]
    pub fn new(count: usize, bytes: usize, limit: Duration) -> Self {
        Self {
            slots: Semaphore::new(count.min(Semaphore::MAX_PERMITS)),
            units: Semaphore::new((bytes / UNIT).min(Semaphore::MAX_PERMITS)),
            limit,
        }
    }

    /// When a request that begins now has waited long enough.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        Instant::now() + self.limit
    }

    /// Picks a replica for a request, waiting for one until its deadline if there is none.
    ///
    /// # Errors
    /// Too many requests wait already, the time is over, or the service was deleted.
    pub async fn replica(
        &self,
        snapshots: &mut watch::Receiver<Arc<Snapshot>>,
        ask: &Ask<'_>,
        meter: &Meter,
    ) -> Result<Picked, GatewayError> {
        let again = !ask.avoided.is_empty();
        let service = current(snapshots, ask.id)?;
        let line = &service.state.line;
        if (again || line.waiting.load(Ordering::Acquire) == 0)
            && let Some(picked) = pick(&service, ask)
        {
            return Ok(picked);
        }
        let crowded = || GatewayError::TooManyHeld {
            service: ask.id.clone(),
        };
        let units = u32::try_from(ask.bytes.div_ceil(UNIT)).map_err(|_| crowded())?;
        let _slot = self.slots.try_acquire().map_err(|_| crowded())?;
        let _units = self.units.try_acquire_many(units).map_err(|_| crowded())?;
        let late = || GatewayError::NoReplica {
            service: ask.id.clone(),
            held: self.limit,
            failed: None,
        };
        let _held = meter.hold();
        let mut turn = (!again).then(|| Turn::join(line));
        if let Some(turn) = &mut turn {
            let first = Arc::clone(&line.first).lock_owned();
            let first = tokio::time::timeout_at(ask.deadline, first).await;
            turn.first = Some(first.map_err(|_| late())?);
        }
        loop {
            let service = current(snapshots, ask.id)?;
            if let Some(picked) = pick(&service, ask) {
                return Ok(Picked { turn, ..picked });
            }
            let now = Instant::now();
            if now >= ask.deadline {
                return Err(late());
            }
            // Woken by another picture of the cluster, or by a replica that may be asked again.
            let next = ask.avoided.next(now);
            let end = next.map_or(ask.deadline, |next| next.min(ask.deadline));
            if let Ok(Err(_)) = tokio::time::timeout_at(end, snapshots.changed()).await {
                return Err(late());
            }
        }
    }
}

/// The service in the newest picture.
fn current(
    snapshots: &mut watch::Receiver<Arc<Snapshot>>,
    id: &ServiceId,
) -> Result<Arc<Service>, GatewayError> {
    let snapshot = Arc::clone(&snapshots.borrow_and_update());
    let service = snapshot.get(id).ok_or_else(|| Unresolved::NoSuchService {
        namespace: id.namespace.clone(),
        name: id.name.clone(),
    })?;
    Ok(Arc::clone(service))
}

fn pick(service: &Service, ask: &Ask<'_>) -> Option<Picked> {
    let excluded = ask.avoided.at(Instant::now());
    let choice = Choice {
        excluded: &excluded,
        prefix: ask.prefix,
    };
    // What is remembered is replaced whole, so a panic elsewhere leaves nothing half-written.
    let prompts = service.state.prompts.lock();
    let mut prompts = prompts.unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut rng = rand::rng();
    let canary = service.spec.canary.as_ref();
    let side = canary.map(|canary| canary.side(&service.replicas, &excluded, &mut rng));
    let replicas = side.as_deref().unwrap_or(&service.replicas);
    let replica = route::pick(replicas, &choice, &prompts, &mut rng)?;
    if let Some(prefix) = ask.prefix {
        prompts.sent(prefix, replica.id);
    }
    Some(Picked {
        in_flight: replica.enter(),
        replica: Arc::clone(replica),
        turn: None,
    })
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

    fn ask<'a>(holds: &Holds, id: &'a ServiceId, avoided: &'a Avoided) -> Ask<'a> {
        Ask {
            id,
            avoided,
            prefix: None,
            bytes: 0,
            deadline: holds.deadline(),
        }
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
        let holds = Holds::new(1, 1 << 20, LONG);
        let (sender, mut receiver) = watch::channel(with(&["failed"]));
        let (metrics, meter) = meter();
        let id = ServiceId::new("a", "s");
        let mut avoided = Avoided::default();
        avoided.for_good("failed@t0");
        let ask = ask(&holds, &id, &avoided);
        let waiting = holds.replica(&mut receiver, &ask, &meter);
        let arrival = async {
            until_held(&metrics, 1).await;
            sender.send(with(&["failed"])).unwrap(); // the one that failed does not count
            sender.send(with(&["failed", "fresh"])).unwrap();
        };
        let (picked, ()) = tokio::join!(waiting, arrival);
        let picked = picked.unwrap();
        assert_eq!(picked.replica.incarnation, "fresh@t0");
        assert_eq!(picked.replica.in_flight(), 1);
        until_held(&metrics, 0).await;
    }

    #[tokio::test]
    async fn a_replica_that_could_not_be_reached_is_asked_again_when_its_pause_is_over() {
        let holds = Holds::new(1, 1 << 20, LONG);
        let (_sender, mut receiver) = watch::channel(with(&["failed"]));
        let (_, meter) = meter();
        let id = ServiceId::new("a", "s");
        let (began, mut avoided) = (Instant::now(), Avoided::default());
        avoided.for_a_while("failed@t0");
        let over = avoided.next(began).unwrap();
        let ask = ask(&holds, &id, &avoided);
        let picked = holds.replica(&mut receiver, &ask, &meter).await.unwrap();
        assert_eq!(picked.replica.incarnation, "failed@t0");
        assert!(Instant::now() >= over && over > began);
        // A pause does not outlast the request's time.
        avoided.for_a_while("failed@t0");
        let deadline = Instant::now() + Duration::from_millis(1);
        let ask = Ask {
            deadline,
            ..self::ask(&holds, &id, &avoided)
        };
        assert!(avoided.next(deadline).is_some(), "it lasts longer");
        let late = holds.replica(&mut receiver, &ask, &meter).await;
        assert!(matches!(late, Err(GatewayError::NoReplica { .. })));
        assert!(Instant::now() < deadline + LONG);
    }

    #[tokio::test]
    async fn number_and_time_are_bounded() {
        let holds = Holds::new(1, 1 << 20, Duration::from_millis(20));
        let (_sender, receiver) = watch::channel(with(&[]));
        let (metrics, meter) = meter();
        let id = ServiceId::new("a", "s");
        let mut first = receiver.clone();
        let mut second = receiver.clone();
        let none = Avoided::default();
        let ask = ask(&holds, &id, &none);
        let waiting = holds.replica(&mut first, &ask, &meter);
        let crowded = async {
            until_held(&metrics, 1).await;
            holds.replica(&mut second, &ask, &meter).await
        };
        let (waited, crowded) = tokio::join!(waiting, crowded);
        assert!(matches!(waited, Err(GatewayError::NoReplica { .. })));
        assert!(matches!(crowded, Err(GatewayError::TooManyHeld { .. })));
        assert_eq!(holds.slots.available_permits(), 1);
    }

    #[tokio::test]
    async fn a_deleted_service_ends_the_wait() {
        let holds = Holds::new(1, 1 << 20, LONG);
        let (sender, mut receiver) = watch::channel(with(&[]));
        let (metrics, meter) = meter();
        let id = ServiceId::new("a", "s");
        let none = Avoided::default();
        let ask = ask(&holds, &id, &none);
        let waiting = holds.replica(&mut receiver, &ask, &meter);
        let deletion = async {
            until_held(&metrics, 1).await;
            sender.send(Arc::new(snapshot([], []))).unwrap();
        };
        let (outcome, ()) = tokio::join!(waiting, deletion);
        assert!(matches!(outcome, Err(GatewayError::Unresolved(_))));
    }

    #[tokio::test]
    async fn held_requests_go_on_in_the_order_of_arrival() {
        let holds = Holds::new(100, 1 << 20, LONG);
        let asleep = with(&[]);
        let (sender, receiver) = watch::channel(Arc::clone(&asleep));
        let (metrics, _) = meter();
        let id = ServiceId::new("a", "s");
        let order = std::sync::Mutex::new(Vec::new());
        let none = Avoided::default();
        let one = |number: u32| {
            let (holds, id, order, none) = (&holds, &id, &order, &none);
            let mut receiver = receiver.clone();
            let meter = metrics.meter(id, std::time::Instant::now());
            async move {
                let picked = holds
                    .replica(&mut receiver, &ask(holds, id, none), &meter)
                    .await;
                order.lock().unwrap().push(number);
                // The next one waits until this one has left, however long that takes.
                for _ in 0..number % 3 {
                    tokio::task::yield_now().await;
                }
                drop(picked.unwrap().turn);
            }
        };
        let waiting = futures::future::join_all((0..50).map(one));
        let arrival = async {
            until_held(&metrics, 50).await;
            let fresh = replica("a", "s", "fresh", "10.0.0.1:8000");
            let awake = Snapshot::build(&asleep, [service("a", "s", "m")], [fresh]);
            sender.send(Arc::new(awake)).unwrap();
            // Who comes now goes behind them.
            one(50).await;
        };
        tokio::join!(waiting, arrival);
        assert_eq!(*order.lock().unwrap(), (0..=50).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn kept_bytes_are_bounded() {
        let holds = Holds::new(10, 4 * UNIT, LONG);
        let (_sender, mut receiver) = watch::channel(with(&[]));
        let (_, meter) = meter();
        let id = ServiceId::new("a", "s");
        let none = Avoided::default();
        let ask = Ask {
            bytes: 4 * UNIT + 1,
            ..ask(&holds, &id, &none)
        };
        let refused = holds.replica(&mut receiver, &ask, &meter).await;
        assert!(matches!(refused, Err(GatewayError::TooManyHeld { .. })));
    }
}
