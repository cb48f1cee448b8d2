//! The accounting of one request.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use prometheus::IntGauge;

use super::super::limits::Permit;
use super::super::snapshot::ServiceId;
use super::{Cause, CutBy, Metrics};

/// The status counted for a client that left before it had an answer.
const CLIENT_LEFT: u16 = 499;

/// One request's accounting, from resolution to the last byte; dropped early it counts the client as gone.
pub struct Meter {
    pub(super) metrics: Arc<Metrics>,
    pub(super) service: ServiceId,
    pub(super) started: Instant,
    pub(super) code: Option<u16>,
    pub(super) first_byte: bool,
    pub(super) in_flight: IntGauge,
    /// Counts the request for its client's limits as long as it lasts.
    pub(super) permit: Option<Permit>,
    pub(super) counts: bool,
}

impl Meter {
    /// Keeps the client's permit until the request ends.
    pub fn keep(&mut self, permit: Option<Permit>) {
        self.permit = permit;
    }

    /// Ends the accounting without counting the request.
    pub fn forget(mut self) {
        self.counts = false;
    }

    /// The response's head is known.
    pub fn head(&mut self, code: u16) {
        self.code = Some(code);
    }

    /// A byte of the response's body is on its way.
    pub fn byte(&mut self) {
        if !self.first_byte {
            self.first_byte = true;
            self.metrics
                .first_byte
                .with_label_values(&self.labels())
                .observe(self.started.elapsed().as_secs_f64());
        }
    }

    /// The request is tried again.
    pub fn retry(&self, cause: Cause) {
        let [namespace, name] = self.labels();
        self.metrics
            .retries
            .with_label_values(&[namespace, name, cause.label()])
            .inc();
    }

    /// The response ends before its last byte.
    pub fn cut(&mut self, by: CutBy) {
        let [namespace, name] = self.labels();
        self.metrics
            .cut
            .with_label_values(&[namespace, name, by.label()])
            .inc();
    }

    /// The request waits for a replica until the guard is dropped.
    #[must_use]
    pub fn hold(&self) -> Held {
        let gauge = self.metrics.held.with_label_values(&self.labels());
        gauge.inc();
        Held(gauge)
    }

    /// Time since the request's head arrived.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    fn labels(&self) -> [&str; 2] {
        [&self.service.namespace, &self.service.name]
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.in_flight.dec();
        if !self.counts {
            return;
        }
        let code = self.code.unwrap_or(CLIENT_LEFT);
        let [namespace, name] = self.labels();
        self.metrics
            .requests
            .with_label_values(&[namespace, name, &code.to_string()])
            .inc();
        self.metrics
            .duration
            .with_label_values(&[namespace, name])
            .observe(self.started.elapsed().as_secs_f64());
        let mut seen = self
            .metrics
            .seen
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        seen.codes.insert(code);
        if !seen.services.contains(&self.service) {
            seen.services.insert(self.service.clone());
        }
    }
}

/// A request that waits for a replica.
pub struct Held(IntGauge);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.dec();
    }
}
