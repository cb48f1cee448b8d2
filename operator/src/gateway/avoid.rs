//! Replicas that failed a request, and for how long it goes elsewhere.
//!
//! One that drains is not asked again. One whose connection could not be opened, or broke, is, after a pause that grows with
//! each failure: what keeps a gateway from a replica often ends within a second (network policies that do not know a new
//! gateway's pod yet, a socket that is not open yet, a kept connection that the replica just closed), and there may be no other
//! replica to go to.

use std::time::Duration;

use rand::{Rng, RngExt as _};
use tokio::time::Instant;

use crate::backoff::doubled;

/// Pause before a replica that failed is asked again; each further failure of the request doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(4);

/// What one request stays away from.
#[derive(Debug, Default)]
pub struct Avoided {
    /// Incarnations, each with the end of its pause if it has one.
    replicas: Vec<(String, Option<Instant>)>,
    pauses: u32,
}

impl Avoided {
    /// The request does not go there again.
    pub fn for_good(&mut self, incarnation: &str) {
        self.set(incarnation, None);
    }

    /// The request goes there again after a pause. Half of the pause is by lot, so that requests that failed together do not
    /// come back together.
    pub fn for_a_while(&mut self, incarnation: &str) {
        self.pause(incarnation, Instant::now(), &mut rand::rng());
    }

    fn pause(&mut self, incarnation: &str, now: Instant, rng: &mut impl Rng) {
        let pause = doubled(FIRST_PAUSE, LONGEST_PAUSE, self.pauses);
        self.pauses += 1;
        let pause = pause.mul_f64(rng.random_range(0.5..=1.0));
        self.set(incarnation, Some(now + pause));
    }

    fn set(&mut self, incarnation: &str, until: Option<Instant>) {
        self.replicas.retain(|(other, _)| other != incarnation);
        self.replicas.push((incarnation.to_owned(), until));
    }

    /// Whether this one has failed the request.
    #[must_use]
    pub fn contains(&self, incarnation: &str) -> bool {
        self.replicas.iter().any(|(other, _)| other == incarnation)
    }

    /// Whether nothing has failed the request yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.replicas.is_empty()
    }

    /// Incarnations that it does not go to at `now`.
    #[must_use]
    pub fn at(&self, now: Instant) -> Vec<&str> {
        let avoided = self.replicas.iter();
        avoided
            .filter(|(_, until)| until.is_none_or(|until| until > now))
            .map(|(incarnation, _)| incarnation.as_str())
            .collect()
    }

    /// When the next pause is over that lasts at `now`.
    #[must_use]
    pub fn next(&self, now: Instant) -> Option<Instant> {
        let ends = self.replicas.iter().filter_map(|(_, until)| *until);
        ends.filter(|until| *until > now).min()
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;

    #[test]
    fn what_failed_is_asked_again_later_each_time() {
        let mut rng = StdRng::seed_from_u64(7);
        let (mut avoided, mut now) = (Avoided::default(), Instant::now());
        assert!(avoided.is_empty());
        let mut longest = FIRST_PAUSE;
        for _ in 0..40 {
            avoided.pause("a@t0", now, &mut rng);
            assert_eq!(avoided.at(now), ["a@t0"]);
            let end = avoided.next(now).unwrap_or(now);
            assert!(
                (longest / 2..=longest).contains(&(end - now)),
                "{longest:?}"
            );
            assert_eq!(avoided.at(end - Duration::from_millis(1)), ["a@t0"]);
            assert!(avoided.at(end).is_empty());
            assert_eq!(avoided.next(end), None);
            assert!(avoided.contains("a@t0"), "what failed is remembered");
            now = end;
            longest = (longest * 2).min(LONGEST_PAUSE);
        }
    }

    #[test]
    fn the_first_pause_to_end_is_told_and_what_drains_stays_away() {
        let mut rng = StdRng::seed_from_u64(7);
        let (mut avoided, now) = (Avoided::default(), Instant::now());
        avoided.for_good("drains@t0");
        assert_eq!(avoided.next(now), None);
        avoided.pause("first@t0", now, &mut rng);
        avoided.pause("second@t0", now + FIRST_PAUSE / 2, &mut rng);
        let end = avoided.next(now).unwrap_or(now);
        assert!(end <= now + FIRST_PAUSE);
        assert_eq!(avoided.at(now), ["drains@t0", "first@t0", "second@t0"]);
        assert_eq!(avoided.at(now + LONGEST_PAUSE), ["drains@t0"]);
    }
}
