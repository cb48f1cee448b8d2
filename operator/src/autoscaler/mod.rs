//! The autoscaler: how many replicas each InferenceService with `scaling` gets.
//!
//! ```text
//! pods, gateways ── scrape ──▶ signal ──▶ decide (behavior, capacity) ──▶ Outcome ──▶ controller: replicas, status, event
//! ```
//!
//! - `signal`, `decide`, `decision`, `behavior`, `capacity`, `arrivals`: pure. `scrape`: HTTP. `metrics`: Prometheus. This
//!   module: the leader's loop.
//! - `simulate`: the same decisions on a modelled fleet.
//!
//! Invariants: only the leader scrapes and decides; nothing between a pod's metrics and a decision (no Prometheus); a
//! missing figure is never zero; after a change of leader nothing is scaled down within the down window; a service's
//! history lives as long as the service.

pub mod arrivals;
pub mod behavior;
pub mod capacity;
pub mod decide;
pub mod decision;
mod metrics;
pub mod scrape;
pub mod signal;
pub mod simulate;

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ashlar_crds::names::{RUNTIME_PORT, SERVICE_LABEL};
use ashlar_crds::{InferenceService, ScalingDecision};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use kube::runtime::reflector::ObjectRef;
use prometheus::Registry;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use crate::controller::pods;
use crate::model_tls::{Trust, server_name_of};
use decide::{History, Observation, Policy, Replica};
use decision::Decision;
use metrics::Metrics;
pub(crate) use metrics::{FAMILIES, Figures};
use scrape::{GatewayLoads, Kind, Scraper, Target};
use signal::{GatewayLoad, Signal};

/// How often every service is decided on.
pub const PERIOD: Duration = Duration::from_millis(250);

/// Nobody can have answered when a service is first looked at: until so many seconds later nothing counts as missing.
const FIRST_LOOK_SECONDS: f64 = 5.0;

/// Namespace and name of a service.
type Key = (String, String);

/// What the controller and status see of a service's scaling.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Replicas wanted.
    pub desired: i32,
    /// The last decision that changed it since this process leads.
    pub last: Option<ScalingDecision>,
    /// That decision in a sentence.
    pub explanation: Option<String>,
    /// What cannot be seen, if anything that matters.
    pub blind: Option<String>,
}

/// What is seen of the cluster each time.
pub struct World {
    /// All services.
    pub services: Vec<Arc<InferenceService>>,
    /// Pods of all services that are ready.
    pub pods: Vec<Arc<ReadyPod>>,
    /// The gateway's own EndpointSlices.
    pub gateway_slices: Vec<Arc<EndpointSlice>>,
}

/// A pod that answers: whose it is, and where it is asked.
#[derive(Debug)]
pub struct ReadyPod {
    service: Key,
    target: Target,
}

impl ReadyPod {
    /// What is needed of a pod; none while it is not ready, or not of a service.
    #[must_use]
    pub fn of(pod: &Pod) -> Option<Self> {
        if !pods::is_ready(pod) {
            return None;
        }
        let service = pod.labels().get(SERVICE_LABEL)?;
        Some(Self {
            service: (pod.namespace()?, service.clone()),
            target: pod_target(pod)?,
        })
    }
}

struct Tracked {
    uid: String,
    /// When it was first looked at.
    since: f64,
    history: History,
    outcome: Outcome,
    figures: Figures,
}

/// The leader's autoscaler.
pub struct Autoscaler {
    services: Mutex<HashMap<Key, Tracked>>,
    scraper: Arc<Scraper>,
    metrics: Metrics,
    gateway_port: u16,
    began: Instant,
}

/// Replicas that a scaled service has before anything is decided: what its status says it was scaled to, else as many
/// as it takes to answer.
#[must_use]
pub fn initial(service: &InferenceService) -> i32 {
    let Some(scaling) = &service.spec.scaling else {
        return service.spec.replicas;
    };
    let before = service.status.as_ref().and_then(|s| s.scaling.as_ref());
    before.map_or(scaling.min_replicas.max(1), |before| {
        before
            .desired_replicas
            .clamp(scaling.min_replicas, scaling.max_replicas.max(1))
    })
}

impl Autoscaler {
    /// Registers its metrics; `gateway_port` is where gateways serve theirs, `trust` knows pods with TLS.
    ///
    /// # Errors
    /// When a name is registered already.
    pub fn new(
        registry: &Registry,
        gateway_port: u16,
        trust: Arc<Trust>,
    ) -> prometheus::Result<Self> {
        let (metrics, scrapes) = Metrics::new(registry)?;
        Ok(Self {
            services: Mutex::default(),
            scraper: Arc::new(Scraper::new(scrapes, trust)),
            metrics,
            gateway_port,
            began: Instant::now(),
        })
    }

    fn services(&self) -> MutexGuard<'_, HashMap<Key, Tracked>> {
        // An outcome is replaced whole, so a panic elsewhere leaves none half-written.
        self.services.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was decided for a service last; none without `scaling`, or before the first decision.
    #[must_use]
    pub fn outcome(&self, service: &InferenceService) -> Option<Outcome> {
        service.spec.scaling.as_ref()?;
        let key = (service.namespace()?, service.name_any());
        let services = self.services();
        let tracked = services.get(&key)?;
        (Some(&tracked.uid) == service.metadata.uid.as_ref()).then(|| tracked.outcome.clone())
    }

    /// What Prometheus is told of a service; none without `scaling`, or before the first decision.
    pub(crate) fn figures(&self, service: &InferenceService) -> Option<Figures> {
        service.spec.scaling.as_ref()?;
        let key = (service.namespace()?, service.name_any());
        Some(self.services().get(&key)?.figures)
    }

    /// Scrapes and decides until the future is dropped; a service whose outcome changes is sent to `changed`.
    pub async fn run(
        &self,
        look: impl Fn() -> World,
        changed: mpsc::Sender<ObjectRef<InferenceService>>,
    ) {
        let decide = async {
            let mut ticks = tokio::time::interval(PERIOD);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                for service in self.tick(&look()) {
                    if changed.send(service).await.is_err() {
                        return;
                    }
                }
            }
        };
        tokio::select! {
            () = Arc::clone(&self.scraper).run() => {}
            () = decide => {}
        }
    }

    /// Decides on every service, and says which ones have a new outcome.
    fn tick(&self, world: &World) -> Vec<ObjectRef<InferenceService>> {
        let began = Instant::now();
        let gateways = self.gateway_targets(&world.gateway_slices);
        let mut ready: HashMap<&Key, Vec<&Target>> = HashMap::with_capacity(world.services.len());
        for pod in &world.pods {
            ready.entry(&pod.service).or_default().push(&pod.target);
        }
        let targets = ready.values().flatten().copied();
        let targets = targets.chain(&gateways).cloned();
        self.scraper.set_targets(targets.collect());

        let readings: Vec<_> = gateways
            .iter()
            .map(|gateway| self.scraper.gateway(gateway.id))
            .collect();
        let now = self.began.elapsed().as_secs_f64();
        let mut services = self.services();
        let mut changed = Vec::new();
        let mut seen: HashSet<Key> = HashSet::with_capacity(world.services.len());
        for service in &world.services {
            let Some(spec) = service.spec.scaling.as_ref() else {
                continue;
            };
            let key = (service.namespace().unwrap_or_default(), service.name_any());
            seen.insert(key.clone());
            let replicas: Vec<Replica> = ready
                .get(&key)
                .into_iter()
                .flatten()
                .map(|target| {
                    let reading = self.scraper.pod(target.id);
                    let age = reading.map_or(0.0, |(_, age)| age);
                    Replica {
                        id: target.id,
                        load: reading
                            .map_or(Signal::Absent, |(load, age)| Signal::of_age(load, age)),
                        read_at: now - age,
                    }
                })
                .collect();
            let uid = service.uid().unwrap_or_default();
            let tracked = services
                .entry(key.clone())
                .and_modify(|tracked| {
                    if tracked.uid != uid {
                        *tracked = Tracked::new(uid.clone(), service, now);
                    }
                })
                .or_insert_with(|| Tracked::new(uid.clone(), service, now));
            let decision = decide::decide(
                &Policy::of(spec),
                &Observation {
                    now,
                    wanted: tracked.outcome.desired,
                    ready: &replicas,
                    gateways: together(&readings, &key),
                },
                &mut tracked.history,
            );
            tracked.figures.decided(&decision);
            if tracked.take(&decision, now) {
                changed.push(ObjectRef::new(&key.1).within(&key.0));
            }
        }
        services.retain(|key, _| seen.contains(key));
        self.metrics.round.observe(began.elapsed().as_secs_f64());
        changed
    }

    fn gateway_targets(&self, slices: &[Arc<EndpointSlice>]) -> Vec<Target> {
        let endpoints = slices
            .iter()
            .flat_map(|slice| slice.endpoints.iter().flatten());
        let mut targets: Vec<Target> = endpoints
            // A gateway that leaves still holds requests: it is asked as long as it serves.
            .filter(|endpoint| {
                let conditions = endpoint.conditions.as_ref();
                conditions.is_none_or(|c| c.serving.or(c.ready).unwrap_or(true))
            })
            .flat_map(|endpoint| {
                let name = endpoint.target_ref.as_ref().and_then(|r| r.uid.clone());
                let name = name.unwrap_or_default();
                endpoint
                    .addresses
                    .iter()
                    .filter_map(|address| address.parse::<IpAddr>().ok())
                    .map(|address| SocketAddr::new(address, self.gateway_port))
                    .map(|address| Target::new(Kind::Gateway, &name, address, None))
                    .collect::<Vec<_>>()
            })
            .collect();
        targets.sort_by_key(|target| target.id);
        targets.dedup_by_key(|target| target.id);
        targets
    }
}

impl Tracked {
    fn new(uid: String, service: &InferenceService, now: f64) -> Self {
        let desired = initial(service);
        let before = service.status.as_ref().and_then(|s| s.scaling.as_ref());
        Self {
            uid,
            since: now,
            history: History::begin(now, desired),
            outcome: Outcome {
                desired,
                last: before.and_then(|scaling| scaling.last_decision.clone()),
                explanation: None,
                blind: None,
            },
            figures: Figures::default(),
        }
    }

    /// Takes a decision over; true if the outcome has changed.
    fn take(&mut self, decision: &Decision, now: f64) -> bool {
        let outcome = &mut self.outcome;
        let changed = decision.to != outcome.desired;
        if changed {
            outcome.desired = decision.to;
            outcome.last = Some(ScalingDecision {
                time: Timestamp::now().to_string(),
                from: decision.from,
                to: decision.to,
                reason: decision.reason.as_str().to_owned(),
                inputs: decision.inputs(),
            });
            outcome.explanation = Some(decision.explain());
        }
        // The words change with every lost pod; being blind or not is what matters.
        let settled = now - self.since >= FIRST_LOOK_SECONDS;
        let turned = settled && decision.blind.is_some() != outcome.blind.is_some();
        if turned || changed {
            outcome.blind.clone_from(&decision.blind);
        }
        changed || turned
    }
}

fn pod_target(pod: &Pod) -> Option<Target> {
    let address = pod.status.as_ref()?.pod_ip.as_ref()?.parse().ok()?;
    let port = u16::try_from(RUNTIME_PORT).ok()?;
    // A container that restarted counts from zero again: that shows in the counters, which never go back otherwise.
    Some(Target::new(
        Kind::Pod,
        pod.metadata.uid.as_deref()?,
        SocketAddr::new(address, port),
        server_name_of(pod).as_deref(),
    ))
}

/// What all gateways together know of a service: as old as the oldest. While some are silent, what the others say is
/// good enough to wake a service, and not to put it to sleep.
fn together(readings: &[Option<(Arc<GatewayLoads>, f64)>], key: &Key) -> Signal<GatewayLoad> {
    let mut sum = GatewayLoad::default();
    let mut oldest = 0.0_f64;
    let mut heard = 0;
    for (loads, age) in readings.iter().flatten() {
        if Signal::of_age((), *age) == Signal::Absent {
            continue;
        }
        heard += 1;
        oldest = oldest.max(*age);
        if let Some(load) = loads.get(key) {
            sum.held += load.held;
            sum.in_flight += load.in_flight;
            sum.ended += load.ended;
        }
    }
    match Signal::of_age(sum, oldest) {
        _ if heard == 0 => Signal::Absent,
        Signal::Fresh(sum) if heard < readings.len() => Signal::Stale(sum),
        signal => signal,
    }
}

#[cfg(test)]
#[path = "tests/mod.rs"]
mod tests;
