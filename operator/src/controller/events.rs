//! Events: what has turned, told to users. The same again within some minutes is counted on the first one, so that a service
//! that turns back and forth does not fill the cluster's list.
//!
//! Of what was said only a number, a name and a count are remembered, and no more than [`MAX_SAID`] of them.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use k8s_openapi::{
    api::{
        core::v1::ObjectReference,
        events::v1::{Event as StoredEvent, EventSeries},
    },
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
};

/// Whose events these are.
const CONTROLLER: &str = "ashlar-operator";
/// The same within this time is counted, not said anew.
const SAME: Duration = Duration::from_secs(360);
/// Most events remembered at one time; past that the oldest are said anew.
const MAX_SAID: usize = 4096;

/// Something that has turned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Event {
    /// Whether it is as it should be; a warning otherwise.
    pub(super) normal: bool,
    /// CamelCase.
    pub(super) reason: String,
    /// In words, at most 1024 bytes.
    pub(super) note: String,
    /// What was being done.
    pub(super) action: &'static str,
}

impl Event {
    fn kind(&self) -> &'static str {
        if self.normal { "Normal" } else { "Warning" }
    }

    /// The same for events that are counted together: notes may differ by a figure.
    fn key(&self, about: &ObjectReference) -> u64 {
        let mut hasher = DefaultHasher::new();
        (&about.uid, &about.namespace, &about.name).hash(&mut hasher);
        (self.normal, &self.reason, self.action).hash(&mut hasher);
        hasher.finish()
    }
}

/// An event that was said.
#[derive(Debug, Clone, Copy)]
struct Said {
    /// By which its name differs from the names of others about the same object.
    number: i128,
    count: i32,
    at: Instant,
}

/// What was said lately.
#[derive(Debug, Default)]
struct Lately(HashMap<u64, Said>);

impl Lately {
    /// The event that this one is counted on, with the new count; none when it is to be said anew.
    fn before(&mut self, key: u64, now: Instant) -> Option<Said> {
        let said = self.0.get(&key).copied();
        let said = said.filter(|said| now.saturating_duration_since(said.at) < SAME)?;
        let count = said.count.saturating_add(1);
        Some(Said {
            count,
            at: now,
            ..said
        })
    }

    fn remember(&mut self, key: u64, said: Said) {
        if self.0.len() >= MAX_SAID && !self.0.contains_key(&key) {
            self.0
                .retain(|_, old| said.at.saturating_duration_since(old.at) < SAME);
        }
        if self.0.len() >= MAX_SAID && !self.0.contains_key(&key) {
            let mut times: Vec<Instant> = self.0.values().map(|said| said.at).collect();
            let (_, middle, _) = times.select_nth_unstable(MAX_SAID / 2);
            let middle = *middle;
            self.0.retain(|_, old| old.at > middle);
        }
        self.0.insert(key, said);
    }
}

/// Says what has turned.
pub(super) struct Recorder {
    client: Client,
    instance: String,
    lately: Mutex<Lately>,
}

impl Recorder {
    /// Says it as `instance`.
    pub(super) fn new(client: Client, instance: String) -> Self {
        Self {
            client,
            instance,
            lately: Mutex::default(),
        }
    }

    /// Writes an event about an object, or counts it on the one that said the same.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub(super) async fn publish(
        &self,
        event: &Event,
        about: &ObjectReference,
    ) -> Result<(), kube::Error> {
        let (key, now, time) = (event.key(about), Instant::now(), Timestamp::now());
        let api: Api<StoredEvent> = Api::namespaced(
            self.client.clone(),
            about.namespace.as_deref().unwrap_or("default"),
        );
        let name = |number: i128| {
            let of = about.name.as_deref().unwrap_or(CONTROLLER);
            format!("{of}.{number:x}")
        };
        let before = self.lately().before(key, now);
        let counted = match before {
            Some(said) => self.count(&api, &name(said.number), said, time).await?,
            None => None,
        };
        let said = match counted {
            Some(said) => said,
            None => {
                let said = Said {
                    number: time.as_nanosecond(),
                    count: 1,
                    at: now,
                };
                let stored = self.stored(event, about, name(said.number), time);
                api.create(&PostParams::default(), &stored).await?;
                said
            }
        };
        self.lately().remember(key, said);
        Ok(())
    }

    /// Counts on an event; none when it is no longer there.
    async fn count(
        &self,
        api: &Api<StoredEvent>,
        name: &str,
        said: Said,
        time: Timestamp,
    ) -> Result<Option<Said>, kube::Error> {
        let series = EventSeries {
            count: said.count,
            last_observed_time: MicroTime(time),
        };
        let patch = Patch::Merge(serde_json::json!({ "series": series }));
        match api.patch(name, &PatchParams::default(), &patch).await {
            Ok(_) => Ok(Some(said)),
            Err(kube::Error::Api(error)) if error.code == 404 => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn stored(
        &self,
        event: &Event,
        about: &ObjectReference,
        name: String,
        time: Timestamp,
    ) -> StoredEvent {
        StoredEvent {
            action: Some(event.action.to_owned()),
            reason: Some(event.reason.clone()),
            event_time: Some(MicroTime(time)),
            regarding: Some(about.clone()),
            note: Some(event.note.clone()),
            metadata: ObjectMeta {
                namespace: about.namespace.clone(),
                name: Some(name),
                ..ObjectMeta::default()
            },
            reporting_controller: Some(CONTROLLER.to_owned()),
            reporting_instance: Some(self.instance.clone()),
            type_: Some(event.kind().to_owned()),
            ..StoredEvent::default()
        }
    }

    fn lately(&self) -> std::sync::MutexGuard<'_, Lately> {
        self.lately.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[path = "tests/events.rs"]
mod tests;
