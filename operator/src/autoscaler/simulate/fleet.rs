//! The modelled fleet: replicas with an engine of their own, a gateway that holds and routes, scrapes that age.
//!
//! A replica's engine admits requests in order while places and KV cache last, computes prompts, and moves all running
//! requests one token a step; a step takes longer the more run. Prompts get half of the time while others decode, as
//! with chunked prefill. Time moves in pieces of [`TICK`]; scalers are asked once a second.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::trace::{Arrival, Curve, Trace};
use crate::autoscaler::signal::{GatewayLoad, PodLoad};

/// A piece of time in seconds.
pub const TICK: f64 = 0.1;
/// Pieces in a second.
const TICKS: u64 = 10;
/// Share of the time that prompts may take while others decode.
const PREFILL_SHARE: f64 = 0.5;
/// A replica on its way out gets this long, in seconds, to finish.
const DRAIN_SECONDS: f64 = 120.0;

/// Seconds at the beginning that no figure counts: the fleet fills, and scalers see their first loads.
pub const WARM_UP: f64 = 300.0;

/// One reading of a replica, with the second it was made.
#[derive(Debug, Clone, Copy)]
pub struct Reading {
    /// When.
    pub at: f64,
    /// What.
    pub load: PodLoad,
}

/// What a scaler may look at.
pub struct View<'a> {
    /// Second.
    pub now: f64,
    /// Replicas wanted so far.
    pub wanted: i32,
    /// Ready replicas by id, with what the last scrape of each brought.
    pub ready: &'a [(u64, Option<Reading>)],
    /// The gateway.
    pub gateway: GatewayLoad,
}

/// Decides how many replicas a modelled fleet gets; asked once a second.
pub trait Scaler {
    /// Replicas wanted now.
    fn wanted(&mut self, view: &View<'_>) -> i32;
}

/// What became of a run, second by second and in all.
#[derive(Debug, Clone, Default)]
pub struct Run {
    /// Requests per second that came.
    pub arrived: Vec<f64>,
    /// Replicas wanted.
    pub wanted: Vec<i32>,
    /// Replicas ready.
    pub ready: Vec<i32>,
    /// Requests held and waiting.
    pub waiting: Vec<f64>,
    /// Requests after the warm-up.
    pub requests: usize,
    /// Those whose first token came within the SLO.
    pub served_well: usize,
    /// Replicas × hours, starting and draining ones included.
    pub replica_hours: f64,
}

impl Run {
    /// Share of requests served within the SLO.
    #[must_use]
    pub fn attainment(&self) -> f64 {
        self.served_well as f64 / self.requests.max(1) as f64
    }

    /// Replicas wanted, second by second, after the warm-up.
    #[must_use]
    pub fn wanted_warm(&self) -> &[i32] {
        &self.wanted[(WARM_UP as usize).min(self.wanted.len())..]
    }

    /// Mean of replicas wanted after the warm-up.
    #[must_use]
    pub fn mean_wanted(&self) -> f64 {
        let counted = self.wanted_warm();
        counted.iter().copied().map(f64::from).sum::<f64>() / counted.len().max(1) as f64
    }

    /// Times that a rise was followed by a fall or the other way round.
    #[must_use]
    pub fn reversals(&self) -> usize {
        let steps = self
            .wanted_warm()
            .windows(2)
            .map(|w| (w[1] - w[0]).signum());
        let steps: Vec<i32> = steps.filter(|step| *step != 0).collect();
        steps.windows(2).filter(|w| w[0] != w[1]).count()
    }
}

struct Replica {
    id: u64,
    ready_at: f64,
    leaves_at: Option<f64>,
    queue: VecDeque<usize>,
    prefill: VecDeque<(usize, f64)>,
    /// Requests by the step at which they end, in thousandths of a token.
    running: BinaryHeap<Reverse<(u64, usize)>>,
    /// Tokens that a request would have got if it had run from the beginning.
    steps: f64,
    kv: f64,
    generated: f64,
    finished: f64,
    finished_squares: f64,
    queue_tokens: f64,
    reading: Option<Reading>,
}

impl Replica {
    fn new(id: u64, ready_at: f64) -> Self {
        Self {
            id,
            ready_at,
            leaves_at: None,
            queue: VecDeque::new(),
            prefill: VecDeque::new(),
            running: BinaryHeap::new(),
            steps: 0.0,
            kv: 0.0,
            generated: 0.0,
            finished: 0.0,
            finished_squares: 0.0,
            queue_tokens: 0.0,
            reading: None,
        }
    }

    fn in_flight(&self) -> usize {
        self.queue.len() + self.prefill.len() + self.running.len()
    }

    fn load(&self, curve: &Curve) -> PodLoad {
        PodLoad {
            waiting: self.queue.len() as f64,
            running: (self.prefill.len() + self.running.len()) as f64,
            kv_cache: (self.kv / curve.kv_tokens).min(1.0),
            generated: Some(self.generated),
            finished: Some(self.finished),
            finished_squares: Some(self.finished_squares),
            waiting_tokens: Some(self.queue_tokens),
            prefill_rate: Some(curve.prefill_tokens_per_second * PREFILL_SHARE),
        }
    }

    /// Works for one tick; `first_token` hears of requests that got theirs, `ended` of those that are done.
    fn work(
        &mut self,
        curve: &Curve,
        arrivals: &[Arrival],
        mut first_token: impl FnMut(usize),
        mut ended: impl FnMut(),
    ) {
        while let Some(&next) = self.queue.front() {
            let places = self.prefill.len() + self.running.len() < curve.max_requests;
            let alone = self.prefill.is_empty() && self.running.is_empty();
            if !(places && self.kv + arrivals[next].prompt <= curve.kv_tokens || alone) {
                break;
            }
            self.queue.pop_front();
            self.queue_tokens -= arrivals[next].prompt;
            self.kv += arrivals[next].prompt;
            self.prefill.push_back((next, arrivals[next].prompt));
        }
        let share = if self.running.is_empty() {
            1.0
        } else {
            PREFILL_SHARE
        };
        let mut budget = TICK * share * curve.prefill_tokens_per_second;
        let mut used = 0.0;
        while let Some((request, left)) = self.prefill.front_mut() {
            let done = left.min(budget);
            *left -= done;
            budget -= done;
            used += done;
            if *left > 0.0 {
                break;
            }
            let ends = ((self.steps + arrivals[*request].answer) * 1000.0) as u64;
            first_token(*request);
            self.running.push(Reverse((ends, *request)));
            self.prefill.pop_front();
        }
        let batch = self.running.len() as f64;
        let step = (curve.step_ms + curve.step_ms_per_request * batch) / 1000.0;
        let tokens = (TICK - used / curve.prefill_tokens_per_second).max(0.0) / step;
        self.steps += tokens;
        self.kv += tokens * batch;
        self.generated += tokens * batch;
        let now = (self.steps * 1000.0) as u64;
        while let Some(Reverse((ends, request))) = self.running.peek().copied() {
            if ends > now {
                break;
            }
            self.running.pop();
            self.finished += 1.0;
            self.finished_squares += arrivals[request].answer.powi(2);
            // It ended within the tick: what it would have got for the rest of it was never made.
            let past = self.steps - ends as f64 / 1000.0;
            let held = arrivals[request].prompt + arrivals[request].answer + past;
            self.kv = (self.kv - held).max(0.0);
            self.generated -= past;
            ended();
        }
    }
}

/// The whole model, at one moment.
struct Fleet<'a> {
    trace: &'a Trace,
    arrivals: &'a [Arrival],
    replicas: Vec<Replica>,
    held: VecDeque<usize>,
    next_id: u64,
    rng: StdRng,
    ended: f64,
    in_flight: f64,
    well: Vec<bool>,
}

/// Plays a trace with a scaler.
#[must_use]
pub fn play(trace: &Trace, arrivals: &[Arrival], scaler: &mut dyn Scaler) -> Run {
    let mut fleet = Fleet {
        trace,
        arrivals,
        replicas: Vec::new(),
        held: VecDeque::new(),
        next_id: 0,
        rng: StdRng::seed_from_u64(trace.seed ^ 0x5ca1e),
        ended: 0.0,
        in_flight: 0.0,
        well: vec![false; arrivals.len()],
    };
    let mut run = Run::default();
    let mut wanted = trace.replicas;
    fleet.resize(0.0, wanted, true);
    let (mut next, mut deaths) = (0, trace.deaths.iter().copied().peekable());
    let ticks = (trace.seconds * TICKS as f64) as u64;
    for tick in 0..ticks {
        let now = tick as f64 * TICK;
        let first = next;
        while arrivals.get(next).is_some_and(|a| a.at < now + TICK) {
            fleet.held.push_back(next);
            fleet.in_flight += 1.0;
            next += 1;
        }
        if tick % TICKS == 0 {
            run.arrived.push(0.0);
        }
        if let Some(last) = run.arrived.last_mut() {
            *last += (next - first) as f64;
        }
        while deaths.next_if(|at| *at <= now).is_some() {
            fleet.kill(now);
        }
        fleet.route(now);
        fleet.work(now);
        if tick % TICKS == TICKS - 1 {
            fleet.scrape(now);
            let ready = fleet.readings(now);
            let gateway = GatewayLoad {
                held: fleet.held.len() as f64,
                in_flight: fleet.in_flight,
                ended: fleet.ended,
            };
            let view = View {
                now,
                wanted,
                ready: &ready,
                gateway,
            };
            wanted = scaler.wanted(&view);
            fleet.resize(now, wanted, false);
            let queued: usize = fleet.replicas.iter().map(|r| r.queue.len()).sum();
            run.wanted.push(wanted);
            run.ready
                .push(i32::try_from(ready.len()).unwrap_or(i32::MAX));
            run.waiting.push((fleet.held.len() + queued) as f64);
        }
        if now < WARM_UP {
            continue;
        }
        run.replica_hours += fleet.replicas.len() as f64 * TICK / 3600.0;
    }
    let warm = arrivals.partition_point(|arrival| arrival.at < WARM_UP);
    run.requests = arrivals.len() - warm;
    run.served_well = fleet.well[warm..].iter().filter(|well| **well).count();
    run
}

impl Fleet<'_> {
    /// Sends what is held to the ready replicas with the fewest requests.
    fn route(&mut self, now: f64) {
        while let Some(&request) = self.held.front() {
            let ready = self.replicas.iter_mut();
            let ready = ready.filter(|r| r.ready_at <= now && r.leaves_at.is_none());
            let Some(replica) = ready.min_by_key(|r| r.in_flight()) else {
                return;
            };
            replica.queue.push_back(request);
            replica.queue_tokens += self.arrivals[request].prompt;
            self.held.pop_front();
        }
    }

    fn work(&mut self, now: f64) {
        let (arrivals, well, slo) = (self.arrivals, &mut self.well, self.trace.slo_seconds);
        let (ended, in_flight) = (&mut self.ended, &mut self.in_flight);
        for replica in self.replicas.iter_mut().filter(|r| r.ready_at <= now) {
            replica.work(
                &self.trace.curve,
                arrivals,
                |request| well[request] = now + TICK - arrivals[request].at <= slo,
                || {
                    *ended += 1.0;
                    *in_flight -= 1.0;
                },
            );
        }
        self.replicas
            .retain(|r| r.leaves_at.is_none_or(|at| now < at && r.in_flight() > 0));
    }

    /// A ready replica is gone: what had no token yet goes to others, the rest is lost.
    fn kill(&mut self, now: f64) {
        let Some(index) = self
            .replicas
            .iter()
            .position(|r| r.ready_at <= now && r.leaves_at.is_none())
        else {
            return;
        };
        let dead = self.replicas.remove(index);
        for Reverse((_, request)) in dead.running {
            self.well[request] = false;
            self.ended += 1.0;
            self.in_flight -= 1.0;
        }
        let again = dead.prefill.into_iter().map(|(request, _)| request);
        for request in dead.queue.into_iter().rev().chain(again) {
            self.held.push_front(request);
        }
        // The Deployment makes another one.
        self.start(now, false);
    }

    fn start(&mut self, now: f64, at_once: bool) {
        let startup = if at_once {
            0.0
        } else {
            self.trace.curve.startup_seconds
        };
        self.replicas
            .push(Replica::new(self.next_id, now + startup));
        self.next_id += 1;
    }

    fn resize(&mut self, now: f64, wanted: i32, at_once: bool) {
        let wanted = usize::try_from(wanted).unwrap_or(0);
        let staying = |r: &Replica| r.leaves_at.is_none();
        let mut count = self.replicas.iter().filter(|r| staying(r)).count();
        while count < wanted {
            self.start(now, at_once);
            count += 1;
        }
        while count > wanted {
            // One that is not ready first, then the one with the fewest requests.
            let going = self.replicas.iter_mut().filter(|r| r.leaves_at.is_none());
            if let Some(going) = going.min_by_key(|r| (r.ready_at <= now, r.in_flight())) {
                going.leaves_at = Some(now + DRAIN_SECONDS);
                let queue = std::mem::take(&mut going.queue);
                going.queue_tokens = 0.0;
                self.held.extend(queue);
            }
            count -= 1;
        }
    }

    fn scrape(&mut self, now: f64) {
        let lost = self.trace.lost_at(now);
        for replica in self.replicas.iter_mut().filter(|r| r.ready_at <= now) {
            if self.rng.random::<f64>() >= lost {
                replica.reading = Some(Reading {
                    at: now,
                    load: replica.load(&self.trace.curve),
                });
            }
        }
    }

    fn readings(&self, now: f64) -> Vec<(u64, Option<Reading>)> {
        let ready = self.replicas.iter();
        ready
            .filter(|r| r.ready_at <= now && r.leaves_at.is_none())
            .map(|r| (r.id, r.reading))
            .collect()
    }
}
