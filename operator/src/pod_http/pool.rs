//! Connections that wait for their next request.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::time::Instant;

use super::Peer;
use super::stream::PodStream;

/// A connection, and since when it waits.
struct Waiting {
    stream: PodStream,
    since: Instant,
}

/// Waiting connections by address, the newest last.
pub(super) struct Pool {
    waiting: Mutex<HashMap<SocketAddr, Vec<Waiting>>>,
    idle: Duration,
    per_address: usize,
    is_kept_clean: AtomicBool,
}

impl Pool {
    /// Connections wait at most about `idle`, and at most `per_address` for one address.
    pub(super) fn new(idle: Duration, per_address: usize) -> Self {
        Self {
            waiting: Mutex::default(),
            idle,
            per_address,
            is_kept_clean: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SocketAddr, Vec<Waiting>>> {
        // Connections come and go whole, so a panic elsewhere leaves none half-kept.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection that waits for the shortest time, if one can be used. Those found closed are dropped.
    pub(super) fn take(&self, peer: Peer<'_>) -> Option<PodStream> {
        let mut all = self.lock();
        let waiting = all.get_mut(&peer.address)?;
        let mut taken = None;
        while taken.is_none() {
            let Some(at) = waiting.iter().rposition(|w| w.stream.name() == peer.tls) else {
                break;
            };
            let mut found = waiting.remove(at);
            taken = is_usable(&mut found, self.idle).then_some(found.stream);
        }
        if waiting.is_empty() {
            all.remove(&peer.address);
        }
        taken
    }

    /// Keeps a connection for the next request to the address.
    pub(super) fn put(self: &Arc<Self>, address: SocketAddr, stream: PodStream) {
        if self.per_address == 0 {
            return;
        }
        self.keep_clean();
        let mut all = self.lock();
        let waiting = all.entry(address).or_default();
        if waiting.len() >= self.per_address {
            waiting.remove(0);
        }
        waiting.push(Waiting {
            stream,
            since: Instant::now(),
        });
    }

    /// Closes connections that have waited for too long, or that the pod has closed, as long as the pool is there.
    fn keep_clean(self: &Arc<Self>) {
        if self.is_kept_clean.load(Ordering::Relaxed)
            || self.is_kept_clean.swap(true, Ordering::Relaxed)
        {
            return;
        }
        let (pool, pause) = (Arc::downgrade(self), self.idle / 4);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(pause).await;
                let Some(pool) = Weak::upgrade(&pool) else {
                    return;
                };
                pool.clean();
            }
        });
    }

    fn clean(&self) {
        self.lock().retain(|_, waiting| {
            waiting.retain_mut(|waiting| is_usable(waiting, self.idle));
            !waiting.is_empty()
        });
    }

    /// Connections that wait.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.lock().values().map(Vec::len).sum()
    }
}

fn is_usable(waiting: &mut Waiting, idle: Duration) -> bool {
    waiting.since.elapsed() < idle && waiting.stream.is_quiet()
}
