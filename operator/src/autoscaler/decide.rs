//! How many replicas: a pure function of what was seen, what is asked, and what was seen before.
//!
//! ```text
//! load     per ready replica max(KV cache ÷ target, waiting ÷ target); requests held at the gateways count as waiting.
//!          With a target for the first token, tokens that wait ÷ the rate that the replica measures ÷ what of the target
//!          a prompt itself leaves take the place of waiting ÷ target
//! demand   sum of the loads = replicas that would carry them at target; what starting replicas will take is counted,
//!          because demand is compared with all replicas wanted, not with those that are ready
//! rate     once a replica's rate is known: no less than what sustains the arrivals, with their trend until a replica asked
//!          for now is ready; a queue asks for no more than that and what clears it, those that are starting counted
//! windows  up on the mean of 4 s, or since the arrivals jumped, at once in panic (demand twice the replicas); down on the mean of 60 s, or on what will
//!          arrive when the window for scaling down ends; never within 60 s of a panic, and only if the replicas that
//!          stay could hold the load
//! behavior the user's, word for word; then minReplicas and maxReplicas
//! zero     only after `idleSeconds` without a request anywhere, every signal fresh
//! ```
//!
//! Invariants: a missing signal is never zero: too few fresh ones hold the count; time comes in as an argument; the
//! history is bounded.

use std::collections::VecDeque;

use super::behavior::{Behavior, Record};
use super::capacity::Capacity;
use super::decision::{Decision, Figures, Reason};
use super::signal::{GatewayLoad, PodLoad, Signal};

/// Demand is averaged over this many seconds before replicas are added.
const QUICK_WINDOW_SECONDS: f64 = 4.0;
/// Any two looks are further apart than this: at the look that sees a jump, its own demand alone counts.
const MOMENT_SECONDS: f64 = 0.1;
/// Once rates are known, full caches without a queue are looked at for this long: nobody waits because of them.
const CACHE_WINDOW_SECONDS: f64 = 30.0;
/// Demand is averaged over this many seconds before replicas are taken away, and a panic lasts at least so long.
const STABLE_WINDOW_SECONDS: f64 = 60.0;
/// Demand of this many times the wanted replicas is a panic: the newest figure counts, not a mean.
const PANIC_RATIO: f64 = 2.0;
/// Fewer fresh pods than this share of the ready ones, and nothing is decided.
const MIN_FRESH_SHARE: f64 = 0.5;
/// However long the prompts, this share of the target for the first token is left to wait in.
const MIN_WAITING_SHARE: f64 = 0.1;
/// Most remembered spells of one demand: one a second for the stable window, with room for a quicker clock.
const MAX_SPELLS: usize = 512;

/// What the user asks.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// Fewest replicas; 0 allows zero when idle.
    pub min: i32,
    /// Most replicas.
    pub max: i32,
    /// Share of the KV cache that one replica is meant to use.
    pub kv_target: f64,
    /// Requests that are meant to wait at one replica.
    pub waiting_target: f64,
    /// Seconds within which the first token is meant to come; then tokens count, not requests.
    pub first_token_target: Option<f64>,
    /// Quiet seconds before zero.
    pub idle_seconds: f64,
    /// HPA's `behavior`.
    pub behavior: Behavior,
}

impl Policy {
    /// Reads the resource's field.
    #[must_use]
    pub fn of(spec: &ashlar_crds::ScalingSpec) -> Self {
        Self {
            min: spec.min_replicas,
            max: spec.max_replicas.max(1),
            kv_target: spec.targets.kv_cache_utilization.max(0.01),
            waiting_target: f64::from(spec.targets.waiting_requests.max(1)),
            first_token_target: spec.targets.time_to_first_token_seconds,
            idle_seconds: f64::from(spec.idle_seconds),
            behavior: Behavior::of(spec.behavior.as_ref()),
        }
    }
}

/// A ready replica.
#[derive(Debug, Clone, Copy)]
pub struct Replica {
    /// The same for the same pod, different for another.
    pub id: u64,
    /// What it says of itself.
    pub load: Signal<PodLoad>,
    /// When it said so, on the clock of [`Observation::now`].
    pub read_at: f64,
}

/// What is seen now.
#[derive(Debug, Clone)]
pub struct Observation<'a> {
    /// Seconds on a clock that never goes back.
    pub now: f64,
    /// Replicas wanted so far.
    pub wanted: i32,
    /// Replicas that are ready.
    pub ready: &'a [Replica],
    /// All gateways together.
    pub gateways: Signal<GatewayLoad>,
}

/// Looks that one after the other saw the same demand: an idle service has one spell, however often it is looked at.
#[derive(Debug, Clone, Copy)]
struct Spell {
    first: f64,
    last: f64,
    looks: u32,
    demand: f64,
    /// The part of the demand that KV caches ask for.
    cache: f64,
}

impl Spell {
    /// How many of its looks lie within `window` seconds before `now`, as if they were evenly spaced.
    fn within(&self, now: f64, window: f64) -> f64 {
        let all = f64::from(self.looks);
        if now - self.last >= window {
            0.0
        } else if self.looks < 2 || now - self.first < window {
            all
        } else {
            let apart = (self.last - self.first) / (all - 1.0);
            ((window - (now - self.last)) / apart)
                .ceil()
                .clamp(1.0, all)
        }
    }
}

/// What earlier decisions left behind.
#[derive(Debug, Clone, Default)]
pub struct History {
    record: Record,
    demands: VecDeque<Spell>,
    /// The arrivals' last jump, and when it was seen: demands of before are of another load.
    jump: (f64, f64),
    panic_until: f64,
    idle_since: Option<f64>,
    last_seen_ended: Option<f64>,
    capacity: Capacity,
}

impl History {
    /// Of a service that has `wanted` replicas: they stand for the down window, whatever was seen before `now`.
    #[must_use]
    pub fn begin(now: f64, wanted: i32) -> Self {
        let mut history = Self::default();
        history.record.remember(now, wanted);
        history
    }

    fn remember(&mut self, now: f64, demand: f64, cache: f64) {
        match self.demands.back_mut() {
            Some(spell) if spell.demand == demand && spell.cache == cache => {
                spell.last = now;
                spell.looks = spell.looks.saturating_add(1);
            }
            _ => self.demands.push_back(Spell {
                first: now,
                last: now,
                looks: 1,
                demand,
                cache,
            }),
        }
        while self.demands.len() > MAX_SPELLS
            || self
                .demands
                .front()
                .is_some_and(|spell| now - spell.last >= STABLE_WINDOW_SECONDS)
        {
            self.demands.pop_front();
        }
    }

    /// Takes the arrivals' last jump in.
    fn jumped(&mut self, now: f64, since: f64) {
        if since > self.jump.0 {
            self.jump = (since, now);
        }
    }

    /// Mean demand of the quick window, as far as it lies behind the arrivals' last jump.
    fn quick_mean(&self, now: f64) -> f64 {
        let window = QUICK_WINDOW_SECONDS.min(now - self.jump.1 + MOMENT_SECONDS);
        self.means(now, window).0
    }

    /// Mean demand of the last `window` seconds, and of its part for KV caches.
    fn means(&self, now: f64, window: f64) -> (f64, f64) {
        let (mut all, mut cache, mut looks) = (0.0, 0.0, 0.0);
        for spell in self.demands.iter().rev() {
            let seen = spell.within(now, window);
            if seen == 0.0 {
                break;
            }
            all += seen * spell.demand;
            cache += seen * spell.cache;
            looks += seen;
        }
        (all / f64::max(looks, 1.0), cache / f64::max(looks, 1.0))
    }
}

/// Decides. `history` is of the same service and moves forward.
pub fn decide(policy: &Policy, seen: &Observation<'_>, history: &mut History) -> Decision {
    let mut figures = read(policy, seen, history);
    let blind = blindness(seen, &figures);
    let floor = policy.min.max(1);
    figures.idle = idle_seconds(seen, &figures, history);
    let enough = figures.fresh as f64 >= seen.ready.len() as f64 * MIN_FRESH_SHARE;
    let done = |applied: i32, reason: Reason, history: &mut History| {
        let to = applied.clamp(policy.min, policy.max);
        history.record.changed(seen.now, to - applied);
        let reason = match reason {
            _ if to == seen.wanted => Reason::Steady,
            Reason::Steady | Reason::MetricsUnavailable => Reason::Bounds,
            _ if !(floor..=policy.max).contains(&seen.wanted) && seen.wanted > 0 => Reason::Bounds,
            reason => reason,
        };
        Decision {
            from: seen.wanted,
            to,
            reason,
            figures,
            blind: blind.clone(),
        }
    };
    if policy.min == 0 && figures.idle >= policy.idle_seconds {
        history.record.changed(seen.now, -seen.wanted);
        return done(0, Reason::Idle, history);
    }
    if seen.wanted == 0 {
        // Nobody is there to be measured: what the gateways hold is all there is.
        let arrived = figures.held.unwrap_or(0.0) > 0.0;
        let demand = (figures.demand[0].ceil() as i32).max(1);
        let to = if arrived || policy.min > 0 { demand } else { 0 };
        let to = history
            .record
            .apply(&policy.behavior, seen.now, 0, to.min(policy.max));
        return done(to, Reason::HeldRequests, history);
    }
    if !enough {
        let mut decision = done(seen.wanted, Reason::MetricsUnavailable, history);
        if decision.to == seen.wanted {
            decision.reason = Reason::MetricsUnavailable;
        }
        return decision;
    }
    let recommended = recommend(policy, seen, &figures).clamp(floor, policy.max);
    let allowed = history
        .record
        .apply(&policy.behavior, seen.now, seen.wanted, recommended);
    // Fewer only if those that stay can hold the load of this moment.
    let holds = (allowed..seen.wanted).find(|count| could_hold(policy, &figures, *count));
    let to = if allowed < seen.wanted {
        holds.unwrap_or(seen.wanted)
    } else {
        allowed
    };
    history.record.changed(seen.now, to - allowed);
    let queue = (figures.waiting + figures.held.unwrap_or(0.0)) / policy.waiting_target;
    let cause = match to {
        more if more > seen.wanted => {
            if queue > figures.kv_cache / policy.kv_target * figures.ready as f64 {
                Reason::QueueDepth
            } else if figures.known.is_some() && figures.cache_demand <= f64::from(more - 1) {
                Reason::ArrivalRate
            } else {
                Reason::KvCacheUtilization
            }
        }
        less if less < seen.wanted => Reason::LoadDropped,
        _ => Reason::Steady,
    };
    history.record.changed(seen.now, to.max(floor) - to);
    done(to.max(floor), cause, history)
}

/// Adds up what is seen, and takes it into the history.
fn read(policy: &Policy, seen: &Observation<'_>, history: &mut History) -> Figures {
    let known: Vec<PodLoad> = seen.ready.iter().filter_map(|r| r.load.known()).collect();
    let held = seen.gateways.known().map(|gateways| gateways.held);
    let count = known.len().max(1) as f64;
    let sum = |of: fn(&PodLoad) -> f64| known.iter().map(of).sum::<f64>();
    let (waiting, running, kv_sum) = (sum(|l| l.waiting), sum(|l| l.running), sum(|l| l.kv_cache));
    let share = held.unwrap_or(0.0) / count;
    let kv_demand = kv_sum / policy.kv_target;
    let load = |l: &PodLoad| {
        let queue = waiting_load(policy, l, share);
        (l.kv_cache / policy.kv_target).max(queue)
    };
    // Requests held while nobody is there wait as much as others.
    let nobody = if known.is_empty() {
        share / policy.waiting_target
    } else {
        0.0
    };
    let asked = known.iter().map(load).sum::<f64>() + nobody;
    let queue = waiting + held.unwrap_or(0.0);
    history.capacity.follow(seen);
    let rates = history.capacity.known(policy.kv_target, seen, queue);
    let (demand, cache_demand) = match rates {
        None => (asked, kv_demand),
        Some(rates) => {
            let enough = rates.replicas_for(queue, policy.first_token_target.is_some());
            // Caches are full as long as a queue is cleared: that asks for no more than the queue does.
            let cache = if queue > 0.0 {
                kv_demand.min(enough)
            } else {
                kv_demand
            };
            (asked.min(enough).max(rates.sustaining()), cache)
        }
    };
    if let Some(rates) = rates {
        history.jumped(seen.now, rates.arrivals.since);
    }
    history.remember(seen.now, demand, cache_demand);
    if demand >= PANIC_RATIO * f64::from(seen.wanted.max(1)) {
        history.panic_until = seen.now + STABLE_WINDOW_SECONDS;
    }
    Figures {
        ready: seen.ready.len(),
        fresh: seen
            .ready
            .iter()
            .filter(|r| r.load.fresh().is_some())
            .count(),
        kv_cache: kv_sum / count,
        waiting,
        held,
        running,
        demand: [
            demand,
            history.quick_mean(seen.now),
            history.means(seen.now, STABLE_WINDOW_SECONDS).0,
        ],
        cache_demand: history.means(seen.now, CACHE_WINDOW_SECONDS).1,
        known: rates,
        panic: seen.now < history.panic_until,
        idle: 0.0,
    }
}

/// What waits at a replica, and a share of what the gateways hold, in replicas that would be at target with it.
fn waiting_load(policy: &Policy, load: &PodLoad, share: f64) -> f64 {
    let by_number = (load.waiting + share) / policy.waiting_target;
    let (Some(target), Some(tokens), Some(rate)) = (
        policy.first_token_target,
        load.waiting_tokens,
        load.prefill_rate,
    ) else {
        return by_number;
    };
    if load.waiting < 1.0 {
        // Nothing tells how long the prompts at the gateways are.
        return share / policy.waiting_target;
    }
    let prompt = tokens / load.waiting;
    // A prompt takes its own time: what is left of the target may be spent waiting.
    let left = (target - prompt / rate).max(target * MIN_WAITING_SHARE);
    (tokens + share * prompt) / rate / left
}

/// What matters and cannot be seen.
fn blindness(seen: &Observation<'_>, figures: &Figures) -> Option<String> {
    let (ready, fresh) = (figures.ready, figures.fresh);
    if (fresh as f64) < ready as f64 * MIN_FRESH_SHARE {
        return Some(format!(
            "{fresh} of {ready} ready pods have answered with their metrics in the last {} s: the number of replicas stays",
            super::signal::FRESH_SECONDS
        ));
    }
    seen.gateways.fresh().is_none().then(|| {
        "no gateway answers with its metrics: held requests are not seen, and the service is not scaled to zero".to_owned()
    })
}

/// Seconds since anything was seen to run, wait or end; 0 while something cannot be seen.
fn idle_seconds(seen: &Observation<'_>, figures: &Figures, history: &mut History) -> f64 {
    let gateways = seen.gateways.fresh();
    let quiet = gateways.is_some_and(|g| g.in_flight == 0.0 && g.held == 0.0)
        && figures.fresh == figures.ready
        && figures.waiting == 0.0
        && figures.running == 0.0;
    let pods = seen.ready.iter().filter_map(|r| r.load.known()?.finished);
    let ended = gateways.map(|g| g.ended + pods.sum::<f64>());
    let nothing_ended = ended == history.last_seen_ended;
    history.last_seen_ended = ended;
    if !(quiet && nothing_ended) {
        // A request may have come and gone between two looks: quiet begins now.
        history.idle_since = quiet.then_some(seen.now);
        return 0.0;
    }
    seen.now - *history.idle_since.get_or_insert(seen.now)
}

/// Replicas for the demand: more by the quick mean, fewer by the slow one, or by what will be needed when the window for
/// scaling down ends, if rates are known.
fn recommend(policy: &Policy, seen: &Observation<'_>, figures: &Figures) -> i32 {
    let wanted = f64::from(seen.wanted);
    let [now, quick, slow] = figures.demand;
    let cache = figures.cache_demand;
    let up = if figures.panic { now.max(quick) } else { quick };
    let over = wanted * (1.0 + policy.behavior.up_tolerance());
    // Rates have their own room for chance: no tolerance hides that they ask for more, unless the user asks for one.
    let over_rate = wanted * (1.0 + policy.behavior.asked_up_tolerance().unwrap_or(0.0));
    if figures.known.is_some() {
        if up > over_rate || cache > over {
            let cache = if cache > over { cache } else { 0.0 };
            return up.max(cache).ceil() as i32;
        }
    } else if up > over {
        return up.ceil() as i32;
    }
    // What cannot be seen may be at target: it is not taken for idle.
    let unseen = (figures.ready - figures.ready.min(known_count(seen))) as f64;
    let needed = figures.known.map_or(slow.max(quick), |known| {
        let window = policy.behavior.down_window();
        known.sustaining_after(window).max(cache)
    });
    let down = needed + unseen;
    if figures.panic || down >= wanted * (1.0 - policy.behavior.down_tolerance()) {
        return seen.wanted;
    }
    down.ceil().clamp(1.0, wanted) as i32
}

fn known_count(seen: &Observation<'_>) -> usize {
    seen.ready
        .iter()
        .filter(|r| r.load.known().is_some())
        .count()
}

/// The redistribution test: whether `count` replicas would stay within the targets, with the tolerance to spare.
fn could_hold(policy: &Policy, figures: &Figures, count: i32) -> bool {
    let spare = 1.0 - policy.behavior.down_tolerance();
    let (total, count) = (figures.ready as f64, f64::from(count.max(1)));
    let kv = figures.kv_cache * total / count <= policy.kv_target * spare;
    let queue =
        (figures.waiting + figures.held.unwrap_or(0.0)) / count <= policy.waiting_target * spare;
    let rate = figures
        .known
        .is_none_or(|known| known.sustaining() <= count);
    kv && queue && rate
}

#[cfg(test)]
#[path = "tests/decide.rs"]
mod tests;
