//! What one replica gets done, learnt from replicas at work; how much arrives; how long a replica takes to start. Pure.
//!
//! A queue alone tells nothing of how many replicas would end it: it grows as long as new ones take to start. Once
//! replicas have been watched, requests per second per replica are known: they say how many sustain the arrivals with
//! room for chance, and a queue asks for no more than that and what clears it.
//!
//! A step of the engine takes `fixed + each × requests in the batch`, so the time of a token is a straight line over the
//! batch: two numbers, learnt at whatever load there is, tell the tokens per second at the load that a replica is meant
//! to carry, before any replica ever carried it. Prompts are in `each`: more answers bring more of them. Rate of a
//! replica = those tokens ÷ mean tokens of a request.

use std::collections::{HashMap, HashSet, VecDeque};

use super::arrivals::{Arrivals, Rate};
use super::decide::Observation;

/// A queue is meant to be gone after this time, in seconds, as far as this share more replicas than sustain the arrivals
/// can do it.
const CLEAR_SECONDS: f64 = 30.0;
const CLEAR_SHARE: f64 = 0.22;
/// The same where the user has set a time for the first token: that asks for more replicas, for a shorter while.
const CLEAR_SHARE_URGENT: f64 = 1.0;
/// However few the arrivals, a queue is meant to be gone after this time.
const CLEAR_AT_LAST_SECONDS: f64 = 300.0;
/// Replicas are asked for by the arrivals less so many standard errors of their mean. While requests wait, each look may
/// ask for more and none for fewer, so that the highest of several counts: it is to be surer of what it saw.
const CERTAIN_ERRORS: f64 = 1.0;
const CERTAIN_ERRORS_QUEUED: f64 = 2.0;
/// Replicas carry the mean of the arrivals at their target, and so many standard deviations of ten seconds more when full.
const ROOM_FOR_CHANCE: f64 = 1.9;
/// The same for what bunches of requests add to chance. More of it keeps replicas than asks for them: noise moves nothing.
const ROOM_FOR_BUNCHES_UP: f64 = 0.6;
const ROOM_FOR_BUNCHES_DOWN: f64 = 2.5;
/// However long a start takes, a trend is not carried on beyond so many times the arrivals.
const MAX_GROWTH: f64 = 2.0;
/// A part of a replica that is kept when some go, so that those that stay are not needed back at once.
const SPARE_REPLICAS: f64 = 0.4;
/// A replica is full when its cache is used so far that it seldom lacks room for the next request, in standard deviations
/// of the use of caches between replicas; never below a share.
const ROOM_IN_CACHE: f64 = 1.0;
const MIN_USABLE: f64 = 0.3;
/// The spread between replicas is forgotten after so many seconds.
const SPREAD_SECONDS: f64 = 300.0;
/// Use of the cache below which requests that wait lack a place, not cache.
const ROOMY: f64 = 0.6;
/// Weight of a second of one replica in what is learnt: it is forgotten in some minutes of work.
const LEARN_SECONDS: f64 = 1800.0;
/// Seconds of replicas at work that must have been watched before their rate counts as known.
const MIN_WATCHED_SECONDS: f64 = 20.0;
/// Share of the load that a replica is meant to carry, from which it tells what it would do at that load.
const MIN_TELLING_SHARE: f64 = 0.15;
/// Requests that wait at a busy replica: one or two may only have come this moment.
const BUSY_WAITING: f64 = 3.0;
/// Requests that must have ended before their mean length counts as known.
const MIN_ENDED: f64 = 10.0;
/// Variance of lengths, in squares of their mean, where the pods do not tell: that of lengths without memory; and most.
const LENGTH_VARIANCE: f64 = 1.0;
const MAX_LENGTH_VARIANCE: f64 = 9.0;
/// Mean length forgets its past after so many requests.
const LENGTH_REQUESTS: f64 = 500.0;
/// A gap in the looks longer than this says nothing about rates.
const MAX_GAP_SECONDS: f64 = 5.0;
/// A start takes so long, in seconds, before one was seen; and between these bounds.
const STARTUP_SECONDS: f64 = 60.0;
const STARTUP_BOUNDS: (f64, f64) = (2.0, 900.0);
/// Most starting replicas that are followed.
const MAX_STARTING: usize = 1024;

/// Rates that are known.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Known {
    /// Requests that arrive per second.
    pub arrivals: Rate,
    /// Requests per second that one replica ends at the load it is meant to carry.
    pub per_replica: f64,
    /// The same when its cache or its places are full.
    pub per_full_replica: f64,
    /// Variance of the tokens of a request, as a share of the square of their mean.
    pub length_variance: f64,
    /// Seconds that a replica takes to start.
    pub startup: f64,
    /// Requests that will wait when a replica asked for now is ready.
    pub backlog: f64,
}

impl Known {
    /// Replicas that sustain `arrivals` per second with room to spare.
    fn for_rate(&self, arrivals: f64, bunches: f64) -> f64 {
        let Rate {
            poisson, chance, ..
        } = self.arrivals;
        // The work that comes varies with the length of requests as well as with their number.
        let alone = ROOM_FOR_CHANCE * poisson * (1.0 + self.length_variance).sqrt();
        let peaks = arrivals + alone.max(bunches * chance);
        (arrivals / self.per_replica).max(peaks / self.per_full_replica)
    }

    /// Replicas that sustain the arrivals with room to spare: now, and when a replica asked for now is ready.
    #[must_use]
    pub fn sustaining(&self) -> f64 {
        let now = self.arrivals.now;
        // What came by chance in a short time may be more than will come: the rest is asked for when it is certain.
        let certain = self.arrivals.certain(CERTAIN_ERRORS);
        let ahead = self.arrivals.ahead(self.startup).min(MAX_GROWTH * now);
        self.for_rate(certain + (ahead - now).max(0.0), ROOM_FOR_BUNCHES_UP)
    }

    /// Replicas that sustain what will arrive at the end of a window for scaling down, if the arrivals go on falling.
    #[must_use]
    pub fn sustaining_after(&self, window: f64) -> f64 {
        let falling = self.arrivals.ahead(window).min(self.arrivals.now);
        self.for_rate(falling, ROOM_FOR_BUNCHES_DOWN) + SPARE_REPLICAS
    }

    /// Replicas that sustain the arrivals and clear a queue of `waiting`, and what it grows by until they are there.
    #[must_use]
    pub fn replicas_for(&self, waiting: f64, urgent: bool) -> f64 {
        let share = if urgent {
            CLEAR_SHARE_URGENT
        } else {
            CLEAR_SHARE
        };
        let now = self.arrivals.now;
        let quickly = (self.backlog / CLEAR_SECONDS).min(share * now);
        let clear = quickly.max(waiting.min(self.backlog) / CLEAR_AT_LAST_SECONDS);
        let certain = self.arrivals.certain(CERTAIN_ERRORS_QUEUED);
        let clear = (certain + clear) / self.per_full_replica;
        // Replicas that sustain the arrivals with room to spare clear a queue with that room.
        clear.max(self.sustaining())
    }
}

/// A straight line through what was seen, fading: the time of a token over the requests in the batch.
#[derive(Debug, Clone, Copy, Default)]
struct StepTime {
    weight: f64,
    batch: f64,
    time: f64,
    batch_squared: f64,
    batch_time: f64,
    watched: f64,
}

impl StepTime {
    fn add(&mut self, batch: f64, tokens_per_second: f64, seconds: f64) {
        let keep = (-seconds / LEARN_SECONDS).exp();
        let time = batch / tokens_per_second;
        for (sum, value) in [
            (&mut self.weight, 1.0),
            (&mut self.batch, batch),
            (&mut self.time, time),
            (&mut self.batch_squared, batch * batch),
            (&mut self.batch_time, batch * time),
        ] {
            *sum = *sum * keep + value * seconds;
        }
        self.watched += seconds;
    }

    /// Tokens per second with `batch` requests, once enough was seen near enough.
    fn tokens_per_second(&self, batch: f64) -> Option<f64> {
        if self.watched < MIN_WATCHED_SECONDS {
            return None;
        }
        let (mean_batch, mean_time) = (self.batch / self.weight, self.time / self.weight);
        if mean_batch < MIN_TELLING_SHARE * batch {
            return None;
        }
        let variance = self.batch_squared / self.weight - mean_batch * mean_batch;
        let covariance = self.batch_time / self.weight - mean_batch * mean_time;
        // Neither part of a step's time is negative, whatever chance says.
        let each = if variance > 1e-6 {
            covariance / variance
        } else {
            0.0
        };
        let each = each.clamp(0.0, mean_time / mean_batch);
        let fixed = mean_time - each * mean_batch;
        Some(batch / (fixed + each * batch))
    }
}

#[derive(Debug, Clone, Copy)]
struct Counters {
    read_at: f64,
    generated: f64,
    finished: f64,
    finished_squares: Option<f64>,
    /// Requests that the replica has ever been given.
    taken: f64,
    running: f64,
    waiting: f64,
    kv_cache: f64,
}

/// What has been learnt of one service's replicas.
#[derive(Debug, Clone, Default)]
pub struct Capacity {
    counters: HashMap<u64, Counters>,
    step: StepTime,
    /// KV cache and running requests, both fading: what share of the cache one takes.
    kv_cache: f64,
    running: f64,
    /// Requests that ran while others waited for a place, fading; and the weight of that.
    full: (f64, f64),
    /// Tokens and number of ended requests, both fading.
    ended_tokens: f64,
    ended: f64,
    /// Squares of tokens, and tokens and number of the same requests; fading.
    squares: [f64; 2],
    length_known: bool,
    /// Variance of the use of caches between replicas and its weight, fading.
    spread: (f64, f64),
    looked_at: Option<f64>,
    arrivals: Arrivals,
    ready: HashSet<u64>,
    /// When the replicas that are not ready yet were first wanted, oldest first.
    starting: VecDeque<f64>,
    startup: Option<f64>,
    wanted: Option<i32>,
}

impl Capacity {
    /// Takes one look into account.
    pub fn follow(&mut self, seen: &Observation<'_>) {
        let mut now = HashMap::with_capacity(seen.ready.len());
        let known = seen.ready.iter().filter_map(|replica| replica.load.known());
        let running: f64 = known.map(|load| load.running).sum();
        let mut arrived = 0.0;
        self.follow_starts(seen);
        for replica in seen.ready {
            let before = self.counters.get(&replica.id).copied();
            let Some(load) = replica.load.fresh() else {
                now.extend(before.map(|before| (replica.id, before)));
                continue;
            };
            let (Some(generated), Some(finished)) = (load.generated, load.finished) else {
                continue;
            };
            let counters = Counters {
                read_at: replica.read_at,
                generated,
                finished,
                finished_squares: load.finished_squares,
                taken: finished + load.running + load.waiting,
                running: load.running,
                waiting: load.waiting,
                kv_cache: load.kv_cache,
            };
            now.insert(replica.id, counters);
            if let Some(before) = before {
                arrived += self.learn(&before, &counters);
            }
        }
        self.follow_spread(seen);
        self.counters = now;
        // While the first requests run, their tokens are counted and their ends are still to come.
        self.length_known |= self.ended >= MIN_ENDED.max(2.0 * running);
        let total = seen.gateways.fresh().map(|g| g.ended + g.in_flight);
        self.arrivals.look(seen.now, total, arrived);
    }

    /// Follows how unevenly requests fill the caches of replicas.
    fn follow_spread(&mut self, seen: &Observation<'_>) {
        let before = self.looked_at.replace(seen.now).unwrap_or(seen.now);
        let gap = (seen.now - before).min(MAX_GAP_SECONDS);
        let loads = seen.ready.iter().filter_map(|replica| replica.load.fresh());
        let used: Vec<f64> = loads
            .filter(|load| load.running > 0.0)
            .map(|load| load.kv_cache)
            .collect();
        if used.len() < 2 {
            return;
        }
        let mean = used.iter().sum::<f64>() / used.len() as f64;
        let squares = used.iter().map(|used| (used - mean).powi(2)).sum::<f64>();
        let (sum, weight) = self.spread;
        let keep = (-gap / SPREAD_SECONDS).exp();
        self.spread = (
            sum * keep + squares / (used.len() - 1) as f64 * gap,
            weight * keep + gap,
        );
    }

    /// Follows replicas from the moment that they are wanted to the moment that they are ready.
    fn follow_starts(&mut self, seen: &Observation<'_>) {
        let before = self.wanted.replace(seen.wanted).unwrap_or(seen.wanted);
        for _ in before..seen.wanted {
            self.starting.push_back(seen.now);
        }
        for _ in seen.wanted..before {
            self.starting.pop_back();
        }
        let ids: HashSet<u64> = seen.ready.iter().map(|replica| replica.id).collect();
        let new = ids.difference(&self.ready).count();
        self.ready = ids;
        for _ in 0..new.min(self.starting.len()) {
            let Some(since) = self.starting.pop_front() else {
                break;
            };
            let took = (seen.now - since).clamp(STARTUP_BOUNDS.0, STARTUP_BOUNDS.1);
            let known = self.startup.unwrap_or(took);
            self.startup = Some(known + (took - known) * 0.3);
        }
        let missing = (seen.wanted - i32::try_from(seen.ready.len()).unwrap_or(0)).max(0);
        let most = usize::try_from(missing).unwrap_or(0).min(MAX_STARTING);
        while self.starting.len() > most {
            self.starting.pop_front();
        }
    }

    /// Takes in what a replica did between two readings; returns how many requests came to it.
    fn learn(&mut self, before: &Counters, now: &Counters) -> f64 {
        let gap = now.read_at - before.read_at;
        if gap <= 0.0 || gap > MAX_GAP_SECONDS {
            return 0.0; // the same reading again, or one after a long silence
        }
        let tokens = now.generated - before.generated;
        let ended = now.finished - before.finished;
        if tokens < 0.0 || ended < 0.0 {
            return 0.0; // it has begun anew
        }
        let batch = f64::midpoint(before.running, now.running);
        if batch >= 1.0 && tokens > 0.0 {
            self.step.add(batch, tokens / gap, gap);
            let keep = (-gap / LEARN_SECONDS).exp();
            self.kv_cache =
                self.kv_cache * keep + f64::midpoint(before.kv_cache, now.kv_cache) * gap;
            self.running = self.running * keep + batch * gap;
            if before.waiting.min(now.waiting) >= BUSY_WAITING
                && before.kv_cache.max(now.kv_cache) < ROOMY
            {
                let (running, weight) = self.full;
                self.full = (running * keep + batch * gap, weight * keep + gap);
            }
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
        if let Some((before, now)) = before.finished_squares.zip(now.finished_squares) {
            let [squares, count] = self.squares;
            self.squares = [
                squares * keep + (now - before).max(0.0),
                count * keep + ended,
            ];
        }
        (now.taken - before.taken).max(0.0)
    }

    /// Requests in the batch of a replica whose cache is used to this share, or whose places are all taken.
    fn batch(&self, kv_cache: f64) -> Option<f64> {
        let by_cache = (self.kv_cache > 0.0).then(|| kv_cache * self.running / self.kv_cache);
        let by_places = (self.full.1 >= MIN_WATCHED_SECONDS).then(|| self.full.0 / self.full.1);
        match (by_cache, by_places) {
            (Some(cache), Some(places)) => Some(cache.min(places)),
            (one, other) => one.or(other),
        }
    }

    /// Requests that will wait once a replica asked for now is ready; those that are starting help before.
    fn backlog(
        &self,
        seen: &Observation<'_>,
        waiting: f64,
        arrivals: f64,
        per_replica: f64,
        startup: f64,
    ) -> f64 {
        let (mut backlog, mut at) = (waiting, 0.0);
        let mut working = seen.ready.len() as f64;
        let left = |since: &f64| (since + startup - seen.now).clamp(0.0, startup);
        let ready = self.starting.iter().map(left);
        for until in ready.chain([startup]) {
            backlog = (backlog + (arrivals - working * per_replica) * (until - at)).max(0.0);
            at = until;
            working += 1.0;
        }
        backlog
    }

    /// The rates, once enough has been seen; `waiting` requests wait now.
    #[must_use]
    pub fn known(&self, kv_target: f64, seen: &Observation<'_>, waiting: f64) -> Option<Known> {
        if !self.length_known {
            return None;
        }
        let tokens_per_request = (self.ended_tokens / self.ended).max(1.0);
        let [squares, count] = self.squares;
        let length_variance = if count >= MIN_ENDED {
            (squares / count / tokens_per_request.powi(2) - 1.0).clamp(0.0, MAX_LENGTH_VARIANCE)
        } else {
            LENGTH_VARIANCE
        };
        let at = |kv_cache: f64| {
            let batch = self.batch(kv_cache)?.max(1.0);
            Some(self.step.tokens_per_second(batch)? / tokens_per_request)
        };
        let (sum, weight) = self.spread;
        let spread = if weight > 0.0 {
            (sum / weight).sqrt()
        } else {
            0.0
        };
        let usable = (1.0 - ROOM_IN_CACHE * spread).max(MIN_USABLE);
        let (per_replica, per_full_replica) = (at(kv_target.min(usable))?, at(usable)?);
        let arrivals = self.arrivals.rate()?;
        let startup = self.startup.unwrap_or(STARTUP_SECONDS);
        Some(Known {
            arrivals,
            per_replica,
            per_full_replica,
            length_variance,
            startup,
            backlog: self.backlog(seen, waiting, arrivals.now, per_full_replica, startup),
        })
    }
}
