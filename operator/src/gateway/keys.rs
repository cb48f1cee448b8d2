//! The cache of users' keys: one [`KeyRing`] per Secret, read by name when first needed and again while it is used.
//!
//! Invariants: a new key works at its first use, within [`KeyPolicy::miss_interval`]; a revoked one stops working
//! within [`KeyPolicy::max_age`]; while the API server is away the last ring stands; a flood of wrong keys costs the
//! API server at most one read a second per Secret and [`KeyPolicy::misses_per_second`] in all; readers of one Secret share one read.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use tokio::sync::Semaphore;

use super::auth::{KeyDigest, KeyRing};
use super::snapshot::{Access, Service, ServiceId, Snapshot};

/// Why a Secret could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The gateway has no Role for it.
    #[error("the gateway may not read the Secret")]
    Forbidden,
    /// There is no such Secret.
    #[error("the Secret does not exist")]
    NotFound,
    /// The API server did not answer, or not usefully.
    #[error("the API server did not answer: {0}")]
    Unavailable(String),
}

impl ReadError {
    fn reason(&self) -> &'static str {
        match self {
            Self::Forbidden => "the gateway may not read the Secret",
            Self::NotFound => "the Secret does not exist",
            Self::Unavailable(_) => "the API server did not answer",
        }
    }
}

/// Reads one Secret by name.
pub trait SecretSource: Send + Sync + 'static {
    /// The Secret's data, decoded.
    ///
    /// # Errors
    /// [`ReadError`] when it cannot be read.
    fn read<'a>(
        &'a self,
        namespace: &'a str,
        name: &'a str,
    ) -> BoxFuture<'a, Result<BTreeMap<String, Vec<u8>>, ReadError>>;
}

/// When Secrets are read again.
#[derive(Debug, Clone, Copy)]
pub struct KeyPolicy {
    /// Older rings are read again in the background when used.
    pub refresh: Duration,
    /// Older rings are read again before they let anybody in.
    pub max_age: Duration,
    /// Because of keys that are not in the ring, read again at most this often per Secret; such a key waits so long.
    pub miss_interval: Duration,
    /// Reads because of such keys, per second, over all Secrets.
    pub misses_per_second: u64,
    /// Longest wait for one read.
    pub timeout: Duration,
}

impl Default for KeyPolicy {
    fn default() -> Self {
        Self {
            refresh: Duration::from_secs(10),
            max_age: Duration::from_secs(30),
            miss_interval: Duration::from_secs(1),
            misses_per_second: 20,
            timeout: Duration::from_secs(2),
        }
    }
}

/// Reads of Secrets that run at one time.
const CONCURRENT_READS: usize = 16;

/// What to do about a key that is not in the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnMiss {
    /// It may be new: read the Secret again, within the policy's bounds.
    ReadAgain,
    /// Take the ring's word.
    Reject,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The key belongs to this client.
    Client(String),
    /// The key is not in the Secret.
    Rejected,
    /// There is no ring to look into, for this reason.
    Unreadable(&'static str),
}

#[derive(Debug, Default, Clone)]
struct State {
    ring: Option<Arc<KeyRing>>,
    problem: Option<&'static str>,
    malformed: Vec<String>,
    fetched: Option<Instant>,
    attempted: Option<Instant>,
}

#[derive(Debug, Default)]
struct Entry {
    state: Mutex<State>,
    /// Held while reading, so that one read serves all who wait.
    reading: tokio::sync::Mutex<()>,
}

impl Entry {
    fn state(&self) -> State {
        lock(&self.state).clone()
    }
}

/// The cache.
pub struct KeyStore {
    source: Arc<dyn SecretSource>,
    policy: KeyPolicy,
    entries: Mutex<HashMap<(String, String), Arc<Entry>>>,
    reads: Arc<Semaphore>,
    started: Instant,
    /// Second since `started` in the upper half, reads of that second in the lower.
    misses: AtomicU64,
}

impl KeyStore {
    /// An empty cache.
    #[must_use]
    pub fn new(source: Arc<dyn SecretSource>, policy: KeyPolicy) -> Self {
        Self {
            source,
            policy,
            entries: Mutex::default(),
            reads: Arc::new(Semaphore::new(CONCURRENT_READS)),
            started: Instant::now(),
            misses: AtomicU64::new(0),
        }
    }

    /// Whose key this is at `service`. Open services are not asked about.
    ///
    /// With `on_miss` a key that is not in the ring may cause one more read: right for a request that names its
    /// service, wrong for a question over all of them.
    pub async fn check(
        self: &Arc<Self>,
        service: &Service,
        key: &KeyDigest,
        on_miss: OnMiss,
    ) -> Verdict {
        let Access::Keys { secret } = &service.spec.access else {
            return Verdict::Unreadable("the service names no Secret");
        };
        let arrival = Instant::now();
        let id = &service.spec.id;
        let entry = self.entry(&id.namespace, secret);
        let mut state = entry.state();
        let since = |at: Option<Instant>| at.map_or(Duration::MAX, |at| at.elapsed());

        if since(state.attempted) > self.policy.refresh {
            if since(state.fetched) > self.policy.max_age {
                self.refresh(&entry, id, secret, state.attempted).await;
                state = entry.state();
            } else {
                let (store, entry) = (Arc::clone(self), Arc::clone(&entry));
                let (id, secret, seen) = (id.clone(), secret.clone(), state.attempted);
                tokio::spawn(async move { store.refresh(&entry, &id, &secret, seen).await });
            }
        }
        if let Some(client) = state.ring.as_ref().and_then(|ring| ring.client(key)) {
            return Verdict::Client(client.to_owned());
        }
        let read_since = state.attempted.is_some_and(|at| at >= arrival);
        if on_miss == OnMiss::ReadAgain && !read_since && self.may_miss() {
            // The key may be newer than the ring. A wrong one pays with the wait, and all who wait share one read.
            let pause = self.policy.miss_interval;
            tokio::time::sleep(pause.saturating_sub(since(state.attempted))).await;
            self.refresh(&entry, id, secret, state.attempted).await;
            state = entry.state();
        }
        match &state.ring {
            Some(ring) => ring.client(key).map_or(Verdict::Rejected, |client| {
                Verdict::Client(client.to_owned())
            }),
            None => Verdict::Unreadable(state.problem.unwrap_or("they were not read yet")),
        }
    }

    /// Drops the rings that no service names any more.
    pub fn retain(&self, snapshot: &Snapshot) {
        let named: std::collections::HashSet<(&str, &str)> = snapshot
            .services()
            .filter_map(|service| match &service.spec.access {
                Access::Keys { secret } => {
                    Some((service.spec.id.namespace.as_str(), secret.as_str()))
                }
                Access::Open | Access::Unusable => None,
            })
            .collect();
        lock(&self.entries).retain(|(namespace, secret), _| {
            named.contains(&(namespace.as_str(), secret.as_str()))
        });
    }

    fn entry(&self, namespace: &str, secret: &str) -> Arc<Entry> {
        let mut entries = lock(&self.entries);
        let key = (namespace.to_owned(), secret.to_owned());
        Arc::clone(entries.entry(key).or_default())
    }

    /// Reads the Secret, unless somebody else did since the caller looked.
    async fn refresh(&self, entry: &Entry, id: &ServiceId, secret: &str, seen: Option<Instant>) {
        let _reading = entry.reading.lock().await;
        if lock(&entry.state).attempted != seen {
            return;
        }
        let read = async {
            let _permit = self.reads.acquire().await;
            self.source.read(&id.namespace, secret).await
        };
        let result = tokio::time::timeout(self.policy.timeout, read)
            .await
            .unwrap_or_else(|_| {
                Err(ReadError::Unavailable(format!(
                    "no answer within {:?}",
                    self.policy.timeout
                )))
            });
        let now = Instant::now();
        let mut state = lock(&entry.state);
        state.attempted = Some(now);
        match result {
            Ok(data) => {
                let (ring, malformed) = KeyRing::parse(&data);
                if malformed != state.malformed && !malformed.is_empty() {
                    tracing::warn!(namespace = %id.namespace, secret, entries = ?malformed,
                        "entries are not `sha256:HEX` and let nobody in");
                }
                state.malformed = malformed;
                state.ring = Some(Arc::new(ring));
                state.problem = None;
                state.fetched = Some(now);
            }
            Err(error) => {
                let problem = error.reason();
                if state.problem != Some(problem) {
                    tracing::warn!(namespace = %id.namespace, secret, service = %id, %error, "keys cannot be read");
                }
                state.problem = Some(problem);
                // A Secret that is gone or withdrawn lets nobody in; an API server that is away changes nothing.
                if !matches!(error, ReadError::Unavailable(_)) {
                    state.ring = None;
                    state.fetched = None;
                }
            }
        }
    }

    /// Takes one of this second's reads because of unknown keys.
    fn may_miss(&self) -> bool {
        let second = self.started.elapsed().as_secs() & 0xffff_ffff;
        self.misses
            .try_update(Ordering::Relaxed, Ordering::Relaxed, |packed| {
                let used = if packed >> 32 == second {
                    packed & 0xffff_ffff
                } else {
                    0
                };
                (used < self.policy.misses_per_second).then_some(second << 32 | (used + 1))
            })
            .is_ok()
    }
}

/// A poisoned lock only means that another request panicked; the data are whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "tests/keys.rs"]
mod tests;
