//! Outlier ejection: a replica whose answers fail one after another gets no new requests for a while. Pure but for atomics.
//!
//! A failure is a connection that cannot be opened or breaks before the answer's end, or a 500 or 502 of the replica's own.
//! Other codes, 503 and 429 included, are answers of a replica that works. While it is left out its failures count no more:
//! a hundred answers that break off at once are one event.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// Failures in a row that eject a replica.
pub const FAILURES: u32 = 5;
/// First ejection; each further one without a success in between is longer by as much.
pub const EJECTED_FOR: Duration = Duration::from_secs(10);
/// Longest ejection.
pub const EJECTED_AT_MOST: Duration = Duration::from_secs(60);

/// Health of one pod, as this gateway met it.
#[derive(Debug, Default)]
pub struct Health {
    failures: AtomicU32,
    ejections: AtomicU32,
    /// Milliseconds on the gateway's clock until which it is left out.
    until_ms: AtomicU64,
}

impl Health {
    /// Whether it is left out at `now`, time since the gateway started.
    #[must_use]
    pub fn is_ejected(&self, now: Duration) -> bool {
        self.until_ms.load(Ordering::Relaxed) > millis(now)
    }

    /// It has answered.
    pub fn succeeded(&self) {
        // Mostly nothing to do: writing each time would make every core fetch the line again.
        if self.failures.load(Ordering::Relaxed) != 0 {
            self.failures.store(0, Ordering::Relaxed);
        }
        if self.ejections.load(Ordering::Relaxed) != 0 {
            self.ejections.store(0, Ordering::Relaxed);
        }
    }

    /// It has failed; true if that ejects it.
    pub fn failed(&self, now: Duration) -> bool {
        if self.is_ejected(now) {
            return false;
        }
        let failures = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
        if failures < FAILURES {
            return false;
        }
        self.failures.store(0, Ordering::Relaxed);
        let ejections = self.ejections.fetch_add(1, Ordering::Relaxed) + 1;
        let time = EJECTED_FOR.saturating_mul(ejections).min(EJECTED_AT_MOST);
        self.until_ms.store(millis(now + time), Ordering::Relaxed);
        true
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_in_a_row_eject_for_longer_each_time() {
        let health = Health::default();
        let mut now = Duration::from_secs(100);
        for round in 1..=8u32 {
            assert!(!health.is_ejected(now));
            for _ in 1..FAILURES {
                assert!(!health.failed(now));
            }
            assert!(health.failed(now));
            let time = (EJECTED_FOR * round).min(EJECTED_AT_MOST);
            assert!(health.is_ejected(now + time - Duration::from_millis(1)));
            assert!(!health.is_ejected(now + time));
            now += time;
        }
    }

    #[test]
    fn many_failures_at_once_eject_as_few_do() {
        let (health, now) = (Health::default(), Duration::ZERO);
        let ejections = (0..100).filter(|_| health.failed(now)).count();
        assert_eq!(ejections, 1);
        assert!(!health.is_ejected(now + EJECTED_FOR));
        assert!(!health.failed(now + EJECTED_FOR), "it starts anew");
    }

    #[test]
    fn a_success_forgives() {
        let (health, now) = (Health::default(), Duration::ZERO);
        for _ in 0..3 * FAILURES {
            assert!(!health.failed(now));
            health.succeeded();
        }
        assert!(!health.is_ejected(now));
    }
}
