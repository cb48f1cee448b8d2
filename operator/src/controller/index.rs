//! A cache of one kind by service: what a watch shows, reduced to what a reconcile needs.
//!
//! Kubernetes objects are large and mostly defaults. A reducer keeps what matters, as compact text where possible, so that
//! thousands of services fit into a small process; and a change that the reducer drops wakes nobody. A new listing (after a
//! watch expired) is merged into the old one, so that it never stands in memory twice.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

use futures::{Stream, StreamExt as _, future::BoxFuture};
use kube::runtime::watcher::{self, Event};
use tokio::sync::watch;

/// The part of an object that a cache keeps, and where it belongs.
pub(super) struct Reduced<V> {
    /// Namespace and service: `NAMESPACE/NAME`.
    pub(super) service: String,
    /// The object's name.
    pub(super) name: String,
    /// What is kept.
    pub(super) value: V,
}

struct Entry<V> {
    name: Box<str>,
    /// The listing that showed it last.
    listing: u32,
    value: V,
}

struct State<V> {
    services: HashMap<Box<str>, Vec<Entry<V>>>,
    listing: u32,
}

/// A cache of one kind. Clones share it.
pub(super) struct Index<V> {
    state: Arc<RwLock<State<V>>>,
    filled: watch::Sender<bool>,
}

impl<V> Clone for Index<V> {
    fn clone(&self) -> Self {
        Self {
            state: Arc::clone(&self.state),
            filled: self.filled.clone(),
        }
    }
}

impl<V: Clone + PartialEq> Index<V> {
    pub(super) fn new() -> Self {
        Self {
            state: Arc::new(RwLock::new(State {
                services: HashMap::new(),
                listing: 0,
            })),
            filled: watch::Sender::new(false),
        }
    }

    /// Everything of one service.
    pub(super) fn of(&self, namespace: &str, name: &str) -> Vec<V> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let entries = state.services.get(format!("{namespace}/{name}").as_str());
        entries
            .map(|entries| entries.iter().map(|e| e.value.clone()).collect())
            .unwrap_or_default()
    }

    /// What `part` says of everything of every service.
    pub(super) fn all_of<T>(&self, part: impl Fn(&V) -> Option<T>) -> Vec<T> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let entries = state.services.values().flatten();
        entries.filter_map(|entry| part(&entry.value)).collect()
    }

    /// Returns once the first listing is whole.
    pub(super) async fn ready(&self) {
        // The sender lives as long as `self`.
        let _ = self.filled.subscribe().wait_for(|filled| *filled).await;
    }

    /// Keeps the cache in step with a watch, for ever; `changed` is told of each service of which something has changed.
    pub(super) async fn follow<K>(
        self,
        events: impl Stream<Item = Result<Event<K>, watcher::Error>>,
        kind: &str,
        reduce: impl Fn(K) -> Option<Reduced<V>>,
        changed: impl Fn(String) -> BoxFuture<'static, bool>,
    ) {
        let mut events = std::pin::pin!(events);
        while let Some(event) = events.next().await {
            let touched = match event {
                Ok(event) => self.take(event, &reduce),
                Err(error) => {
                    tracing::warn!(kind, %error, "a watch broke and starts again");
                    continue;
                }
            };
            for service in touched {
                if !changed(service).await {
                    return;
                }
            }
        }
    }

    /// Takes an event in, and says which services look different now.
    fn take<K>(&self, event: Event<K>, reduce: impl Fn(K) -> Option<Reduced<V>>) -> Vec<String> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Init => {
                state.listing = state.listing.wrapping_add(1);
                Vec::new()
            }
            Event::InitApply(object) | Event::Apply(object) => reduce(object)
                .and_then(|reduced| state.insert(reduced))
                .into_iter()
                .collect(),
            Event::Delete(object) => reduce(object)
                .and_then(|reduced| state.remove(reduced))
                .into_iter()
                .collect(),
            Event::InitDone => {
                let gone = state.sweep();
                drop(state);
                self.filled.send_replace(true);
                gone
            }
        }
    }
}

impl<V: PartialEq> State<V> {
    fn insert(&mut self, reduced: Reduced<V>) -> Option<String> {
        let listing = self.listing;
        let Reduced {
            service,
            name,
            value,
        } = reduced;
        let entries = match self.services.get_mut(service.as_str()) {
            Some(entries) => entries,
            None => self.services.entry(service.as_str().into()).or_default(),
        };
        match entries.iter_mut().find(|entry| *entry.name == *name) {
            Some(entry) => {
                entry.listing = listing;
                if entry.value == value {
                    return None;
                }
                entry.value = value;
            }
            None => {
                // Few things of a kind belong to one service, and most of them are there from the beginning.
                entries.reserve_exact(1);
                entries.push(Entry {
                    name: name.into(),
                    listing,
                    value,
                });
            }
        }
        Some(service)
    }

    fn remove(&mut self, reduced: Reduced<V>) -> Option<String> {
        let entries = self.services.get_mut(reduced.service.as_str())?;
        let before = entries.len();
        entries.retain(|entry| *entry.name != *reduced.name);
        let removed = entries.len() < before;
        if entries.is_empty() {
            self.services.remove(reduced.service.as_str());
        }
        removed.then_some(reduced.service)
    }

    /// Drops what the newest listing did not show.
    fn sweep(&mut self) -> Vec<String> {
        let listing = self.listing;
        let mut gone = Vec::new();
        self.services.retain(|service, entries| {
            let before = entries.len();
            entries.retain(|entry| entry.listing == listing);
            if entries.len() < before {
                gone.push(service.to_string());
            }
            !entries.is_empty()
        });
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reduced(service: &str, name: &str, value: u32) -> Option<Reduced<u32>> {
        Some(Reduced {
            service: service.into(),
            name: name.into(),
            value,
        })
    }

    type Object = (&'static str, &'static str, u32);

    fn play(index: &Index<u32>, events: impl IntoIterator<Item = Event<Object>>) -> Vec<String> {
        events
            .into_iter()
            .flat_map(|event| {
                index.take(event, |(service, name, value)| {
                    reduced(service, name, value)
                })
            })
            .collect()
    }

    #[test]
    fn a_change_that_is_kept_wakes_its_service_and_another_does_not() {
        let index = Index::new();
        assert_eq!(play(&index, [Event::Apply(("a/s", "x", 1))]), ["a/s"]);
        assert!(play(&index, [Event::Apply(("a/s", "x", 1))]).is_empty());
        assert_eq!(play(&index, [Event::Apply(("a/s", "x", 2))]), ["a/s"]);
        assert_eq!(index.of("a", "s"), [2]);
        assert_eq!(play(&index, [Event::Delete(("a/s", "x", 2))]), ["a/s"]);
        assert!(play(&index, [Event::Delete(("a/s", "x", 2))]).is_empty());
        assert!(index.all_of(|value| Some(*value)).is_empty());
    }

    #[test]
    fn what_a_new_listing_does_not_show_is_gone_and_the_rest_stays_all_along() {
        let index = Index::new();
        play(
            &index,
            [
                Event::Init,
                Event::InitApply(("a/s", "x", 1)),
                Event::InitApply(("a/t", "y", 1)),
                Event::InitDone,
            ],
        );
        let during = play(&index, [Event::Init, Event::InitApply(("a/s", "x", 1))]);
        assert!(during.is_empty());
        assert_eq!(index.of("a", "t"), [1]);
        assert_eq!(play(&index, [Event::InitDone]), ["a/t"]);
        assert_eq!((index.of("a", "s"), index.of("a", "t")), (vec![1], vec![]));
    }
}
