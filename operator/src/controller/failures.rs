//! How long a service whose reconcile failed waits for the next: doubling, up to a bound, with jitter, so that an API server
//! in trouble is not asked by all at one time.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use ashlar_crds::InferenceService;

use crate::backoff::doubled;

const FIRST: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_secs(15);
/// Most services remembered; more are treated as failing for the first time.
const MAX_SERVICES: usize = 16_384;

/// Failures in a row, by uid.
#[derive(Default)]
pub(super) struct Failures(Mutex<HashMap<String, u32>>);

impl Failures {
    /// Counts a failure and says how long to wait.
    pub(super) fn next_wait(&self, service: &InferenceService) -> Duration {
        let uid = service.metadata.uid.clone().unwrap_or_default();
        let mut failures = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if failures.len() >= MAX_SERVICES {
            failures.clear();
        }
        let count = failures.entry(uid).or_default();
        let wait = doubled(FIRST, LONGEST, *count);
        *count = count.saturating_add(1);
        wait.mul_f64(0.75 + rand::random::<f64>() / 2.0)
    }

    /// The service is well again.
    pub(super) fn forget(&self, service: &InferenceService) {
        if let Some(uid) = &service.metadata.uid {
            let mut failures = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            failures.remove(uid);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_bound_and_start_anew_after_a_success() {
        let failures = Failures::default();
        let spec = serde_json::json!({"metadata": {"uid": "u", "name": "m"}, "spec": {"model": {"uri": "oci://m"}, "endpoint": {"auth": "None"}}});
        let service: InferenceService = serde_json::from_value(spec).expect("a service");
        let waits: Vec<_> = (0..12).map(|_| failures.next_wait(&service)).collect();
        assert!(waits[0] <= FIRST.mul_f64(1.25));
        assert!(waits[11] >= LONGEST.mul_f64(0.75) && waits[11] <= LONGEST.mul_f64(1.25));
        failures.forget(&service);
        assert!(failures.next_wait(&service) <= FIRST.mul_f64(1.25));
    }
}
