//! What one replica gets done, learnt from replicas at work, and how much arrives. Pure.
//!
//! A queue alone tells nothing of how many replicas would end it: it grows as long as new ones take to start. Once
//! replicas have been watched, requests per second per replica are known: they say how many sustain the arrivals with
//! room for chance, and a queue asks for no more than that and what clears it.
//!
//! Rate of a replica = tokens per second while it is busy ÷ mean tokens of a request. Tokens are counted as they are
//! generated, so the figure is there within seconds, however long requests run. Before any replica was busy, what a
//! half-full one does is taken in proportion: the most it could be.

use std::collections::{HashMap, VecDeque};

use super::decide::Observation;

/// A queue is meant to be gone after this time, in seconds, as far as this share more replicas than sustain the arrivals
/// can do it.
const CLEAR_SECONDS: f64 = 30.0;
const CLEAR_SHARE: f64 = 0.25;
/// However long the queue, it is meant to be gone after this time.
const CLEAR_AT_LAST_SECONDS: f64 = 120.0;
/// Room for chance: so many standard deviations of the arrivals within so many seconds. A small fleet needs more of it.
const ROOM_FOR_CHANCE: f64 = 3.0;
const CHANCE_SECONDS: f64 = 5.0;
/// Arrivals are looked at over these many seconds: the short times see a crowd come, the long one is steady.
const ARRIVAL_SECONDS: [f64; 3] = [2.0, 5.0, 60.0];
/// A crowd is this many times the rate of the long time, and as many standard deviations of chance more: less is noise,
/// which the room for chance takes.
const CROWD_RATIO: f64 = 1.25;
const BEYOND_CHANCE: f64 = 4.0;
/// Weight of a second of one busy replica in the learnt rate: it is forgotten in about a minute and a half of work.
const LEARN_SECONDS: f64 = 90.0;
/// Seconds of replicas that must have been watched before the rate counts as known.
const MIN_WATCHED_SECONDS: f64 = 5.0;
/// Requests that wait at a busy replica: one or two may only have come this moment.
const BUSY_WAITING: f64 = 3.0;
/// KV-cache use from which a replica that is not busy tells what it would do when it is.
const MIN_TELLING_USE: f64 = 0.15;
/// Requests that must have ended before their mean length counts as known.
const MIN_ENDED: f64 = 10.0;
/// Mean length forgets its past after so many requests.
const LENGTH_REQUESTS: f64 = 500.0;
/// Most remembered moments of arrivals.
const MAX_MOMENTS: usize = 256;
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
    /// Replicas that sustain the arrivals with room to spare.
    #[must_use]
    pub fn sustaining(&self) -> f64 {
        let chance = ROOM_FOR_CHANCE * (self.arrivals / CHANCE_SECONDS).sqrt();
        (self.arrivals + chance) / self.per_replica
    }

    /// Replicas that sustain the arrivals and clear a queue of `waiting`.
    #[must_use]
    pub fn replicas_for(&self, waiting: f64) -> f64 {
        let quickly = (waiting / CLEAR_SECONDS).min(CLEAR_SHARE * self.arrivals);
        let clear = quickly.max(waiting / CLEAR_AT_LAST_SECONDS);
        let clear = (self.arrivals + clear) / self.per_replica;
        // Replicas that sustain the arrivals with room to spare clear a queue with that room.
        clear.max(self.sustaining())
    }
}

/// Tokens over time, fading.
#[derive(Debug, Clone, Copy, Default)]
struct Rate {
    tokens: f64,
    seconds: f64,
    watched: f64,
}

impl Rate {
    fn add(&mut self, tokens: f64, seconds: f64) {
        let keep = (-seconds / LEARN_SECONDS).exp();
        self.tokens = self.tokens * keep + tokens;
        self.seconds = self.seconds * keep + seconds;
        self.watched += seconds;
    }

    fn per_second(&self) -> Option<f64> {
        (self.watched >= MIN_WATCHED_SECONDS && self.tokens > 0.0)
            .then(|| self.tokens / self.seconds)
    }
}

#[derive(Debug, Clone, Copy)]
struct Counters {
    read_at: f64,
    generated: f64,
    finished: f64,
    /// Requests that the replica has ever been given.
    taken: f64,
    running: f64,
    busy: bool,
    kv_cache: f64,
}

/// What has been learnt of one service's replicas.
#[derive(Debug, Clone, Default)]
pub struct Capacity {
    counters: HashMap<u64, Counters>,
    /// Replicas that are busy, and what the others would do if they were.
    busy: Rate,
    likely: Rate,
    /// Tokens and number of ended requests, both fading.
    ended_tokens: f64,
    ended: f64,
    length_known: bool,
    /// Requests that came, by the gateways' count and by the replicas'.
    arrived: [f64; 2],
    /// Both counts in time.
    moments: VecDeque<(f64, [f64; 2])>,
    gateway: Option<f64>,
}

impl Capacity {
    /// Takes one look into account.
    pub fn follow(&mut self, kv_target: f64, seen: &Observation<'_>) {
        let mut now = HashMap::with_capacity(seen.ready.len());
        let known = seen.ready.iter().filter_map(|replica| replica.load.known());
        let running: f64 = known.map(|load| load.running).sum();
        for replica in seen.ready {
            let before = self.counters.get(&replica.id).copied();
            let Some(load) = replica.load.fresh() else {
                now.extend(before.map(|before| (replica.id, before)));
                continue;
            };
            let (Some(generated), Some(finished)) = (load.generated, load.finished) else {
                continue;
            };
            let busy = load.waiting >= BUSY_WAITING || load.kv_cache >= kv_target;
            let counters = Counters {
                read_at: replica.read_at,
                generated,
                finished,
                taken: finished + load.running + load.waiting,
                running: load.running,
                busy,
                kv_cache: load.kv_cache,
            };
            now.insert(replica.id, counters);
            if let Some(before) = before {
                self.learn(kv_target, &before, &counters);
            }
        }
        self.counters = now;
        // While the first requests run, their tokens are counted and their ends are still to come.
        self.length_known |= self.ended >= MIN_ENDED.max(2.0 * running);
        self.count_arrivals(seen);
    }

    fn learn(&mut self, kv_target: f64, before: &Counters, now: &Counters) {
        let gap = now.read_at - before.read_at;
        if gap <= 0.0 || gap > MAX_GAP_SECONDS {
            return; // the same reading again, or one after a long silence
        }
        let tokens = now.generated - before.generated;
        let ended = now.finished - before.finished;
        if tokens < 0.0 || ended < 0.0 {
            return; // it has begun anew
        }
        self.arrived[1] += (now.taken - before.taken).max(0.0);
        if before.busy && now.busy {
            self.busy.add(tokens, gap);
        } else if before.kv_cache.min(now.kv_cache) >= MIN_TELLING_USE {
            // Twice the requests get less than twice the tokens: this is the most that it could be.
            let share = f64::midpoint(before.kv_cache, now.kv_cache) / kv_target;
            self.likely.add(tokens / share.min(1.0), gap);
        }
        // Requests that began and have not ended took tokens too: half of a request's each, on average.
        let open = if self.length_known {
            (now.running - before.running) * self.ended_tokens / self.ended / 2.0
        } else {
            0.0
        };
        let keep = (-ended / LENGTH_REQUESTS).exp();
        self.ended_tokens = (self.ended_tokens * keep + tokens - open).max(1.0);
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
                .is_some_and(|(at, _)| seen.now - at >= ARRIVAL_SECONDS[2])
        {
            self.moments.pop_front();
        }
    }

    /// Requests per second of the last seconds, and the seconds that were really seen.
    fn arrivals_over(&self, source: usize, seconds: f64) -> Option<(f64, f64)> {
        let last = self.moments.back()?;
        let first = self
            .moments
            .iter()
            .rev()
            .take_while(|(at, _)| last.0 - at <= seconds);
        let first = first.last()?;
        let span = last.0 - first.0;
        let arrived = last.1[source] - first.1[source];
        (span > 0.0).then(|| (arrived / span, span))
    }

    /// Arrivals over the long time, unless the newest are more than chance makes of it.
    fn arrivals(&self) -> Option<f64> {
        let [_, _, long] = ARRIVAL_SECONDS;
        let (steady, _) = self.arrivals_over(0, long)?;
        // Replicas are not all read at the same moment: their count is good over the long time only.
        let (direct, _) = self.arrivals_over(1, long)?;
        let steady = steady.max(direct);
        let crowd = ARRIVAL_SECONDS[..2].iter().filter_map(|seconds| {
            let (rate, span) = self.arrivals_over(0, *seconds)?;
            let chance = (steady.max(1.0 / span) / span).sqrt();
            (rate > CROWD_RATIO * steady + BEYOND_CHANCE * chance).then_some(rate)
        });
        Some(crowd.fold(steady, f64::max))
    }

    /// The rates, once enough has been seen.
    #[must_use]
    pub fn known(&self) -> Option<Known> {
        if !self.length_known {
            return None;
        }
        let tokens_per_second = self
            .busy
            .per_second()
            .or_else(|| self.likely.per_second())?;
        let tokens_per_request = (self.ended_tokens / self.ended).max(1.0);
        Some(Known {
            arrivals: self.arrivals()?,
            per_replica: tokens_per_second / tokens_per_request,
        })
    }
}
