//! How much one client may ask of one service: requests a minute, and requests open at one time.
//!
//! Gateways share nothing, so each enforces its part: the limit ÷ the gateways that are ready. What counts as a client is
//! the holder of a key; at an open service all callers together are one.
//!
//! The clients of a service are the entries of its Secret, so the map is bounded by a Secret's size; who has nothing open
//! and a full bucket is forgotten when there are many.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A client that was quiet may send so many seconds' worth of requests at once.
const BURST_SECONDS: f64 = 10.0;
/// Clients of one service beyond which idle ones are forgotten.
const MANY_CLIENTS: usize = 1024;

/// `spec.endpoint.limits`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Requests that one client may send in a minute.
    pub requests_per_minute: Option<u32>,
    /// Requests that one client may have open.
    pub concurrent_requests: Option<u32>,
}

/// Why a request may not go on now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Too many in a minute; another one may come after this time.
    Rate {
        /// How long to wait.
        retry_after: Duration,
    },
    /// Too many open.
    Concurrency,
}

#[derive(Debug)]
struct Client {
    /// Requests that it may send now, and when that was true.
    tokens: f64,
    at: Instant,
    open: u32,
}

/// The clients of one service, as this gateway met them.
#[derive(Debug, Default)]
pub struct Quotas(Mutex<HashMap<Arc<str>, Client>>);

/// Counts a request as open until it is dropped.
#[derive(Debug)]
pub struct Permit {
    quotas: Arc<Quotas>,
    client: Arc<str>,
}

impl Quotas {
    /// Lets a request of `client` in, or not; `gateways` share the limits.
    ///
    /// # Errors
    /// [`Refusal`] when the client has sent too many, or has too many open.
    pub fn admit(
        self: &Arc<Self>,
        limits: &Limits,
        client: &str,
        gateways: usize,
        now: Instant,
    ) -> Result<Option<Permit>, Refusal> {
        if *limits == Limits::default() {
            return Ok(None);
        }
        let share = |limit: u32| f64::from(limit) / gateways.max(1) as f64;
        let per_second = limits.requests_per_minute.map(|limit| share(limit) / 60.0);
        // One request is always possible, however many gateways there are.
        let full = per_second.map_or(0.0, |rate| (rate * BURST_SECONDS).max(1.0));
        let mut clients = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if clients.len() >= MANY_CLIENTS {
            clients.retain(|_, known| {
                let rate = per_second.unwrap_or(0.0);
                known.open > 0
                    || known.tokens + rate * now.duration_since(known.at).as_secs_f64() < full
            });
        }
        let (name, known) = match clients.get_key_value(client) {
            Some((name, _)) => (Arc::clone(name), clients.get_mut(client)),
            None => {
                let name: Arc<str> = client.into();
                let new = Client {
                    tokens: full,
                    at: now,
                    open: 0,
                };
                clients.insert(Arc::clone(&name), new);
                (name, clients.get_mut(client))
            }
        };
        let known = known.expect("the client was put there: this is a bug");
        if let Some(limit) = limits.concurrent_requests
            && f64::from(known.open) >= share(limit).max(1.0).floor()
        {
            return Err(Refusal::Concurrency);
        }
        if let Some(rate) = per_second {
            let since = now.saturating_duration_since(known.at).as_secs_f64();
            known.tokens = (known.tokens + rate * since).min(full);
            known.at = now;
            if known.tokens < 1.0 {
                let seconds = ((1.0 - known.tokens) / rate).min(3600.0);
                return Err(Refusal::Rate {
                    retry_after: Duration::from_secs_f64(seconds),
                });
            }
            known.tokens -= 1.0;
        }
        known.open += 1;
        Ok(Some(Permit {
            quotas: Arc::clone(self),
            client: name,
        }))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut clients = self.quotas.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get_mut(&self.client) {
            client.open = client.open.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]
    use super::*;
    use proptest::prelude::*;

    fn per_minute(limit: u32) -> Limits {
        Limits {
            requests_per_minute: Some(limit),
            concurrent_requests: None,
        }
    }

    #[test]
    fn a_burst_of_ten_seconds_then_the_rate() {
        let (quotas, begin) = (Arc::new(Quotas::default()), Instant::now());
        let admit = |second: f64, client: &str| {
            let now = begin + Duration::from_secs_f64(second);
            quotas.admit(&per_minute(60), client, 1, now).map(drop)
        };
        for _ in 0..10 {
            admit(0.0, "alice").unwrap();
        }
        let Err(Refusal::Rate { retry_after }) = admit(0.0, "alice") else {
            panic!("the eleventh must wait");
        };
        assert_eq!(retry_after, Duration::from_secs(1));
        admit(0.0, "bob").unwrap();
        assert!(admit(0.9, "alice").is_err());
        admit(1.01, "alice").unwrap();
        assert!(admit(1.02, "alice").is_err());
    }

    #[test]
    fn open_requests_are_counted_until_they_end() {
        let (quotas, now) = (Arc::new(Quotas::default()), Instant::now());
        let limits = Limits {
            requests_per_minute: None,
            concurrent_requests: Some(4),
        };
        // Two gateways: each lets two in.
        let admit = || quotas.admit(&limits, "alice", 2, now);
        let (one, _two) = (admit().unwrap(), admit().unwrap());
        assert_eq!(admit().unwrap_err(), Refusal::Concurrency);
        drop(one);
        let _three = admit().unwrap();
        assert!(admit().is_err());
        // More gateways than requests: one each, or nobody could ever ask.
        let many = Arc::new(Quotas::default());
        assert!(many.admit(&limits, "alice", 9, now).is_ok());
    }

    #[test]
    fn without_limits_nothing_is_kept() {
        let quotas = Arc::new(Quotas::default());
        let permit = quotas.admit(&Limits::default(), "a", 1, Instant::now());
        assert!(permit.unwrap().is_none() && quotas.0.lock().unwrap().is_empty());
    }

    #[test]
    fn idle_clients_are_forgotten_when_there_are_many() {
        let (quotas, begin) = (Arc::new(Quotas::default()), Instant::now());
        let later = begin + Duration::from_secs(60);
        for client in 0..3 * MANY_CLIENTS {
            let at = if client < MANY_CLIENTS { begin } else { later };
            let permit = quotas.admit(&per_minute(60), &client.to_string(), 1, at);
            drop(permit.unwrap());
        }
        let left = quotas.0.lock().unwrap().len();
        assert!(
            (MANY_CLIENTS..=2 * MANY_CLIENTS + 1).contains(&left),
            "{left}"
        );
    }

    proptest! {
        /// Over any minute and any gateways a client gets no more than its limit and a burst.
        #[test]
        fn the_limit_holds(limit in 1..600u32, gateways in 1..4usize, gaps in prop::collection::vec(0.0..2.0f64, 1..400)) {
            let each: Vec<_> = (0..gateways).map(|_| Arc::new(Quotas::default())).collect();
            let (begin, mut at, mut passed) = (Instant::now(), 0.0, 0usize);
            for (number, gap) in gaps.iter().enumerate() {
                at += gap;
                let now = begin + Duration::from_secs_f64(at);
                let quotas = &each[number % gateways];
                passed += usize::from(quotas.admit(&per_minute(limit), "a", gateways, now).is_ok());
            }
            let rate = f64::from(limit) / 60.0;
            let most = rate * at + (rate * BURST_SECONDS).max(gateways as f64) + gateways as f64;
            prop_assert!(passed as f64 <= most, "{} of {}", passed, most);
        }
    }
}
