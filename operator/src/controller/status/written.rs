//! Statuses that the watch has yet to show.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use ashlar_crds::{InferenceService, InferenceServiceStatus};

/// Statuses written but not yet seen again by the watch, so that a reconcile in between starts from the newest.
#[derive(Default)]
pub struct Written(Mutex<HashMap<(String, String), (u64, InferenceServiceStatus)>>);

impl Written {
    /// The service with the newest status that is known.
    #[must_use]
    pub fn newest(&self, service: &Arc<InferenceService>) -> Arc<InferenceService> {
        let mut written = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = key(service);
        match written.get(&key) {
            Some((version, status)) if version_of(service) < *version => {
                let mut newest = (**service).clone();
                newest.status = Some(status.clone());
                Arc::new(newest)
            }
            Some(_) => {
                written.remove(&key);
                Arc::clone(service)
            }
            None => Arc::clone(service),
        }
    }

    /// Remembers what the API server has just stored.
    pub fn remember(&self, stored: &InferenceService) {
        let Some(status) = stored.status.clone() else {
            return;
        };
        let mut written = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Only services that were deleted before the watch showed the write stay behind.
        if written.len() >= MAX_WRITTEN {
            written.clear();
        }
        written.insert(key(stored), (version_of(stored), status));
    }
}

/// Most statuses remembered at one time.
const MAX_WRITTEN: usize = 16_384;

fn key(service: &InferenceService) -> (String, String) {
    let meta = &service.metadata;
    (
        meta.uid.clone().unwrap_or_default(),
        meta.name.clone().unwrap_or_default(),
    )
}

fn version_of(service: &InferenceService) -> u64 {
    let version = service.metadata.resource_version.as_deref();
    version.and_then(|v| v.parse().ok()).unwrap_or(0)
}
