//! What one replica gets done, learnt from replicas that are busy, and how much arrives. Pure.
//!
//! A queue alone tells nothing of how many replicas would end it: it grows as long as new ones take to start. Once
//! a busy replica has been watched, requests per second per replica are known, and a queue asks for no more replicas
//! than sustain the arrivals and clear it in [`CLEAR_SECONDS`].
//!
//! Rate of a replica = tokens per second while it is busy ÷ mean tokens of a request. Tokens are counted as they are
//! generated, so the figure is there within seconds, however long requests run.

use std::collections::{HashMap, VecDeque};

use super::decide::Observation;

/// A queue is meant to be gone after this time, in seconds, by replicas beyond those that sustain the arrivals.
const CLEAR_SECONDS: f64 = 60.0;
/// Share of a busy replica's rate that one replica is meant to carry for long.
const SUSTAINED_SHARE: f64 = 0.9;
/// Arrivals are averaged over this many seconds.
const ARRIVAL_SECONDS: f64 = 10.0;
/// Weight of a second of one busy replica in the learnt rate: half of it is forgotten in about a minute of work.
const LEARN_SECONDS: f64 = 90.0;
/// Busy seconds of replicas that must have been watched before the rate counts as known.
const MIN_WATCHED_SECONDS: f64 = 5.0;
/// Requests that must have ended before their mean length counts as known.
const MIN_ENDED: f64 = 10.0;
/// Mean length forgets half of its past after so many requests.
const LENGTH_REQUESTS: f64 = 500.0;
/// Most remembered moments of arrivals.
const MAX_MOMENTS: usize = 128;
/// A gap in the looks longer than this says nothing about rates.
const MAX_GAP_SECONDS: f64 = 5.0;

/// Rates that are known.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Known {
    /// Requests that arrive per second.
    pub arrivals: f64,
    /// Requests per second that one busy replica ends.
    pub per_replica: f64,
}

impl Known {
    /// Replicas that sustain the arrivals and clear a queue of `waiting`.
    #[must_use]
    pub fn replicas_for(&self, waiting: f64) -> f64 {
        let clear = waiting / CLEAR_SECONDS;
        let sustain = self.arrivals / SUSTAINED_SHARE;
        // Replicas that sustain the arrivals with room to spare clear a queue with that room.
        sustain.max(self.arrivals + clear) / self.per_replica
    }

    /// Whether `count` replicas sustain the arrivals.
    #[must_use]
    pub fn sustained_by(&self, count: f64) -> bool {
        self.arrivals <= SUSTAINED_SHARE * self.per_replica * count
    }
}

#[derive(Debug, Clone, Copy)]
struct Counters {
    generated: f64,
    finished: f64,
    /// Requests that the replica has ever been given.
    taken: f64,
    busy: bool,
}

/// What has been learnt of one service's replicas.
#[derive(Debug, Clone, Default)]
pub struct Capacity {
    at: Option<f64>,
    counters: HashMap<u64, Counters>,
    /// Tokens of busy replicas and the seconds they took, both fading.
    busy_tokens: f64,
    busy_seconds: f64,
    watched: f64,
    /// Tokens and number of ended requests, both fading.
    ended_tokens: f64,
    ended: f64,
    /// Requests that came, by the gateways' count and by the replicas'.
    arrived: [f64; 2],
    /// Both counts in time.
    moments: VecDeque<(f64, [f64; 2])>,
    gateway: Option<f64>,
}

impl Capacity {
    /// Takes one look into account.
    pub fn follow(&mut self, kv_target: f64, seen: &Observation<'_>) {
        let gap = self.at.map(|at| seen.now - at);
        self.at = Some(seen.now);
        let gap = gap.filter(|gap| *gap > 0.0 && *gap <= MAX_GAP_SECONDS);
        let mut now = HashMap::with_capacity(seen.ready.len());
        for replica in seen.ready {
            let before = self.counters.get(&replica.id).copied();
            let Some(load) = replica.load.fresh() else {
                now.extend(before.map(|before| (replica.id, before)));
                continue;
            };
            let (Some(generated), Some(finished)) = (load.generated, load.finished) else {
                continue;
            };
            let busy = load.waiting > 0.0 || load.kv_cache >= kv_target;
            let counters = Counters {
                generated,
                finished,
                taken: finished + load.running + load.waiting,
                busy,
            };
            now.insert(replica.id, counters);
            if let (Some(gap), Some(before)) = (gap, before) {
                self.learn(gap, &before, &counters);
            }
        }
        self.counters = now;
        self.count_arrivals(seen);
    }

    fn learn(&mut self, gap: f64, before: &Counters, now: &Counters) {
        let tokens = now.generated - before.generated;
        let ended = now.finished - before.finished;
        if tokens < 0.0 || ended < 0.0 {
            return; // it has begun anew
        }
        self.arrived[1] += (now.taken - before.taken).max(0.0);
        if before.busy && now.busy {
            let keep = (-gap / LEARN_SECONDS).exp();
            self.busy_tokens = self.busy_tokens * keep + tokens;
            self.busy_seconds = self.busy_seconds * keep + gap;
            self.watched += gap;
        }
        let keep = (-ended / LENGTH_REQUESTS).exp();
        self.ended_tokens = self.ended_tokens * keep + tokens;
        self.ended = self.ended * keep + ended;
    }

    /// Arrivals are what the gateways have taken, ended or still open; or what the replicas have, when more: some
    /// clients reach them directly.
    fn count_arrivals(&mut self, seen: &Observation<'_>) {
        let total = seen.gateways.fresh().map(|g| g.ended + g.in_flight);
        if let (Some(before), Some(total)) = (std::mem::replace(&mut self.gateway, total), total) {
            // Less than before: a gateway has ended and took its count along.
            self.arrived[0] += (total - before).max(0.0);
        }
        self.moments.push_back((seen.now, self.arrived));
        while self.moments.len() > MAX_MOMENTS
            || self
                .moments
                .get(1)
                .is_some_and(|(at, _)| seen.now - at >= ARRIVAL_SECONDS)
        {
            self.moments.pop_front();
        }
    }

    /// The rates, once enough has been seen.
    #[must_use]
    pub fn known(&self) -> Option<Known> {
        if self.watched < MIN_WATCHED_SECONDS || self.ended < MIN_ENDED || self.busy_tokens <= 0.0 {
            return None;
        }
        let (first, last) = (self.moments.front()?, self.moments.back()?);
        let span = last.0 - first.0;
        if span <= 0.0 {
            return None;
        }
        let tokens_per_request = (self.ended_tokens / self.ended).max(1.0);
        let arrived = |source: usize| last.1[source] - first.1[source];
        Some(Known {
            arrivals: arrived(0).max(arrived(1)) / span,
            per_replica: self.busy_tokens / self.busy_seconds / tokens_per_request,
        })
    }
}
