//! Compiled grammars by the hash of their text, the least recently used one leaving first.

use std::{collections::HashMap, sync::Arc};

use super::{GrammarError, Start};

/// SHA-256 of a grammar.
pub(super) type Key = [u8; 32];

/// Most grammars that are kept.
const CAPACITY: usize = 128;

/// See the [module](self). Errors are kept too: a bad grammar costs its compilation once.
#[derive(Default)]
pub(super) struct Cache {
    entries: HashMap<Key, Entry>,
    clock: u64,
}

struct Entry {
    used: u64,
    result: Result<Arc<Start>, GrammarError>,
}

impl Cache {
    pub(super) fn get(&mut self, key: &Key) -> Option<Result<Arc<Start>, GrammarError>> {
        self.clock += 1;
        let entry = self.entries.get_mut(key)?;
        entry.used = self.clock;
        Some(entry.result.clone())
    }

    pub(super) fn put(&mut self, key: Key, result: Result<Arc<Start>, GrammarError>) {
        self.clock += 1;
        if self.entries.len() >= CAPACITY && !self.entries.contains_key(&key) {
            let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.used);
            if let Some(oldest) = oldest.map(|(key, _)| *key) {
                self.entries.remove(&oldest);
            }
        }
        let used = self.clock;
        self.entries.insert(key, Entry { used, result });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_leaves() {
        let mut cache = Cache::default();
        let key = |n: usize| {
            let mut key = [0; 32];
            key[0] = u8::try_from(n % 256).unwrap_or(0);
            key[1] = u8::try_from(n / 256).unwrap_or(0);
            key
        };
        for n in 0..CAPACITY {
            cache.put(key(n), Err(GrammarError::Busy));
        }
        assert!(cache.get(&key(0)).is_some());
        cache.put(key(CAPACITY), Err(GrammarError::Busy));
        assert_eq!(cache.entries.len(), CAPACITY);
        assert!(cache.get(&key(0)).is_some());
        assert!(cache.get(&key(1)).is_none());
    }
}
