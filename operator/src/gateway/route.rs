//! Which replica takes the next request. Pure.
//!
//! Without a prompt to go by: the one with the fewest open requests, ties by lot. With one: the replica that was sent
//! most of the prompt before, as long as its load stays within [`LOAD_FACTOR`] of the mean (bounded load); else, by
//! the prompt's rank of the replicas, the first whose load does. Replicas that fail again and again are left out for a
//! while ([`super::health`]), but never all of them.

use std::sync::Arc;

use rand::Rng;

use super::affinity::{Index, Prefix};
use super::snapshot::Replica;

/// A replica that knows the prompt may have this many times the mean load: with less, chance alone sends chats away from
/// what is cached of them (at 1.25 a tenth of the hits is lost).
const LOAD_FACTOR: f64 = 1.5;

/// What there is to go by.
pub struct Choice<'a> {
    /// Incarnations that the request does not go to now.
    pub excluded: &'a [&'a str],
    /// The prompt, if the request has one.
    pub prefix: Option<&'a Prefix>,
}

/// Picks a replica that is not excluded. `None` means that none is left.
pub fn pick<'a>(
    replicas: &'a [Arc<Replica>],
    choice: &Choice<'_>,
    index: &Index,
    rng: &mut impl Rng,
) -> Option<&'a Arc<Replica>> {
    let allowed =
        |replica: &&Arc<Replica>| !choice.excluded.contains(&replica.incarnation.as_str());
    let healthy: Vec<_> = replicas
        .iter()
        .filter(|replica| allowed(replica) && !replica.is_ejected())
        .collect();
    // When most are ejected the fault is elsewhere: all are asked.
    let candidates = if healthy.len() * 2 >= replicas.len() && !healthy.is_empty() {
        healthy
    } else {
        replicas.iter().filter(allowed).collect()
    };
    let known = choice
        .prefix
        .and_then(|prefix| by_prompt(&candidates, prefix, index));
    known.or_else(|| least_loaded(&candidates, rng))
}

fn by_prompt<'a>(
    candidates: &[&'a Arc<Replica>],
    prefix: &Prefix,
    index: &Index,
) -> Option<&'a Arc<Replica>> {
    let total: usize = candidates.iter().map(|replica| replica.in_flight()).sum();
    let bound = ((total + 1) as f64 * LOAD_FACTOR / candidates.len() as f64).ceil() as usize;
    let has_room = |replica: &Replica| replica.in_flight() < bound;
    for block in prefix.blocks().iter().rev() {
        let knowing = index.replicas(*block);
        let knowing = knowing.filter_map(|id| candidates.iter().find(|r| r.id == id).copied());
        let best = knowing
            .filter(|replica| has_room(replica))
            .min_by_key(|replica| replica.in_flight());
        if best.is_some() {
            return best;
        }
    }
    let ranked = candidates.iter().filter(|replica| has_room(replica));
    ranked
        .max_by_key(|replica| prefix.rank(replica.id))
        .copied()
}

fn least_loaded<'a>(
    candidates: &[&'a Arc<Replica>],
    rng: &mut impl Rng,
) -> Option<&'a Arc<Replica>> {
    use rand::RngExt as _;

    let mut best: Option<&Arc<Replica>> = None;
    let mut best_load = usize::MAX;
    let mut ties: u32 = 0;
    for &replica in candidates {
        let load = replica.in_flight();
        if load < best_load || best.is_none() {
            (best, best_load, ties) = (Some(replica), load, 1);
        } else if load == best_load {
            // Reservoir of one: the n-th equal replaces the holder with probability 1/n.
            ties += 1;
            if rng.random_range(0..ties) == 0 {
                best = Some(replica);
            }
        }
    }
    best
}

#[cfg(test)]
#[path = "tests/route.rs"]
mod tests;
