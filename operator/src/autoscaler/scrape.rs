//! Asks every pod and gateway for its metrics once a second, each at its own moment, over kept connections.
//!
//! Bounds: [`TIMEOUT`] and [`MAX_BODY`] a scrape, [`MAX_OUTSTANDING`] scrapes at one time, one of each target. What a
//! target said last is kept until the target is gone: its age is the reader's business.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::uri::PathAndQuery;
use prometheus::{Histogram, IntCounterVec};
use tokio::sync::Semaphore;
use tokio::time::MissedTickBehavior;

use super::signal::{self, GatewayLoad, PodLoad};
use crate::model_tls::Trust;
use crate::pod_http::{Client, Peer, Settings};

/// Longest scrape.
const TIMEOUT: Duration = Duration::from_millis(800);
/// Largest answer in bytes.
const MAX_BODY: usize = 1 << 20;
/// Most scrapes at one time.
const MAX_OUTSTANDING: usize = 512;
/// Targets are spread over the slots of a second.
const SLOT: Duration = Duration::from_millis(50);
const SLOTS: u64 = 20;
/// Gateways are few, and a request that they hold waits for us: they are asked four times a second.
const GATEWAY_SLOTS: u64 = 5;
/// Kept connections are used every second; after this they are of a pod that is gone.
const IDLE: Duration = Duration::from_secs(10);

/// What a gateway says, by namespace and name of the service.
pub type GatewayLoads = HashMap<(String, String), GatewayLoad>;

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A runtime pod.
    Pod,
    /// A gateway.
    Gateway,
}

impl Kind {
    fn label(self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::Gateway => "gateway",
        }
    }

    fn query(self) -> PathAndQuery {
        PathAndQuery::from_static(match self {
            Self::Pod => signal::POD_QUERY,
            Self::Gateway => signal::GATEWAY_QUERY,
        })
    }
}

/// Something to ask.
#[derive(Debug, Clone)]
pub struct Target {
    /// The same for the same process, as far as that can be told.
    pub id: u64,
    kind: Kind,
    address: SocketAddr,
    tls: Option<Arc<str>>,
}

impl Target {
    /// `name` tells this process from an earlier one at the same address; `tls` is the name that its certificate has to be
    /// for, none without TLS.
    #[must_use]
    pub fn new(kind: Kind, name: &str, address: SocketAddr, tls: Option<&str>) -> Self {
        let mut hasher = DefaultHasher::new();
        (name, address).hash(&mut hasher);
        Self {
            id: hasher.finish(),
            kind,
            address,
            tls: tls.map(Arc::from),
        }
    }
}

#[derive(Debug, Clone)]
enum Reading {
    Pod(PodLoad),
    Gateway(Arc<GatewayLoads>),
}

#[derive(Default)]
struct State {
    targets: HashMap<u64, Target>,
    readings: HashMap<u64, (Instant, Reading)>,
    outstanding: HashSet<u64>,
}

/// Counts of scrapes, by kind and result.
#[derive(Clone)]
pub struct ScrapeMetrics {
    /// `kind` and `result`: `ok`, `failed`, `unreadable` or `skipped`.
    pub scrapes: IntCounterVec,
    /// Time of one scrape.
    pub seconds: Histogram,
}

/// Asks and remembers.
pub struct Scraper {
    state: Mutex<State>,
    slots: Arc<Semaphore>,
    client: Client,
    metrics: ScrapeMetrics,
}

impl Scraper {
    /// Nothing to ask yet.
    #[must_use]
    pub fn new(metrics: ScrapeMetrics, trust: Arc<Trust>) -> Self {
        let settings = Settings {
            connect_timeout: TIMEOUT,
            idle: IDLE,
            idle_per_address: 1,
        };
        Self {
            state: Mutex::default(),
            slots: Arc::new(Semaphore::new(MAX_OUTSTANDING)),
            client: Client::new(settings, trust),
            metrics,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Readings are replaced whole, so a panic elsewhere leaves none half-written.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on these are asked; readings of others are dropped.
    pub fn set_targets(&self, targets: Vec<Target>) {
        let targets: HashMap<u64, Target> = targets.into_iter().map(|t| (t.id, t)).collect();
        let mut state = self.state();
        state.readings.retain(|id, _| targets.contains_key(id));
        state.targets = targets;
    }

    /// What a pod said last, and its age in seconds.
    #[must_use]
    pub fn pod(&self, id: u64) -> Option<(PodLoad, f64)> {
        match self.state().readings.get(&id)? {
            (at, Reading::Pod(load)) => Some((*load, at.elapsed().as_secs_f64())),
            _ => None,
        }
    }

    /// What a gateway said last, and its age in seconds.
    #[must_use]
    pub fn gateway(&self, id: u64) -> Option<(Arc<GatewayLoads>, f64)> {
        match self.state().readings.get(&id)? {
            (at, Reading::Gateway(loads)) => Some((Arc::clone(loads), at.elapsed().as_secs_f64())),
            _ => None,
        }
    }

    /// Scrapes until the future is dropped.
    pub async fn run(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(SLOT);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut slot = 0u64;
        loop {
            ticks.tick().await;
            slot += 1;
            for target in self.due(slot) {
                let Ok(permit) = Arc::clone(&self.slots).try_acquire_owned() else {
                    self.state().outstanding.remove(&target.id);
                    self.count(target.kind, "skipped");
                    continue;
                };
                let scraper = Arc::clone(&self);
                tokio::spawn(async move {
                    let _permit = permit;
                    let result = scraper.scrape(&target).await;
                    scraper.state().outstanding.remove(&target.id);
                    scraper.count(target.kind, result);
                });
            }
        }
    }

    /// Targets of this slot that are not being asked already; they count as asked from now on.
    fn due(&self, slot: u64) -> Vec<Target> {
        let mut state = self.state();
        let due: Vec<Target> = state
            .targets
            .values()
            .filter(|target| match target.kind {
                Kind::Pod => target.id % SLOTS == slot % SLOTS,
                Kind::Gateway => target.id % GATEWAY_SLOTS == slot % GATEWAY_SLOTS,
            })
            .filter(|target| !state.outstanding.contains(&target.id))
            .cloned()
            .collect();
        state.outstanding.extend(due.iter().map(|target| target.id));
        due
    }

    fn count(&self, kind: Kind, result: &str) {
        self.metrics
            .scrapes
            .with_label_values(&[kind.label(), result])
            .inc();
    }

    async fn scrape(&self, target: &Target) -> &'static str {
        let began = Instant::now();
        let text = match tokio::time::timeout(TIMEOUT, self.fetch(target)).await {
            Ok(Some(text)) => text,
            Ok(None) | Err(_) => return "failed",
        };
        self.metrics.seconds.observe(began.elapsed().as_secs_f64());
        let text = String::from_utf8_lossy(&text);
        let reading = match target.kind {
            Kind::Pod => signal::pod_load(&text).map(Reading::Pod),
            Kind::Gateway => Some(Reading::Gateway(Arc::new(signal::gateway_loads(&text)))),
        };
        let Some(reading) = reading else {
            return "unreadable";
        };
        let mut state = self.state();
        if state.targets.contains_key(&target.id) {
            state.readings.insert(target.id, (began, reading));
        }
        "ok"
    }

    async fn fetch(&self, target: &Target) -> Option<Bytes> {
        let peer = Peer {
            address: target.address,
            tls: target.tls.as_deref(),
        };
        self.client.get(peer, target.kind.query(), MAX_BODY).await
    }
}

#[cfg(test)]
#[path = "tests/scrape.rs"]
mod tests;
