//! One attempt at a replica, from the choice of the replica to the end of its answer. What became of it is told once: to the
//! replica's health, and to the trial of its revision if it is on trial.
//!
//! What says nothing about the replica is told to nobody: a client that left before the answer began, a body of the client's
//! that failed, a replica that drains, a deadline.

use std::sync::Arc;

use http::StatusCode;

use super::metrics::{Metrics, Outcome, Trial};
use super::snapshot::{InFlight, Replica, Service};

/// Counts the request on the replica as long as it is there.
pub struct Attempt {
    metrics: Arc<Metrics>,
    service: Arc<Service>,
    replica: Arc<Replica>,
    _in_flight: InFlight,
    progress: Progress,
}

enum Progress {
    /// There is no answer yet.
    Asked,
    /// The answer has begun; it counts for the trial when it has ended.
    Answering(Option<Trial>),
    /// All is told.
    Ended,
}

impl Attempt {
    /// The service's request goes to the replica.
    #[must_use]
    pub fn new(
        metrics: &Arc<Metrics>,
        service: &Arc<Service>,
        replica: Arc<Replica>,
        in_flight: InFlight,
    ) -> Self {
        Self {
            metrics: Arc::clone(metrics),
            service: Arc::clone(service),
            replica,
            _in_flight: in_flight,
            progress: Progress::Asked,
        }
    }

    /// Where the request goes.
    #[must_use]
    pub fn replica(&self) -> &Replica {
        &self.replica
    }

    /// The answer has begun; one that is an error has told all there is to tell.
    pub fn head(&mut self, status: StatusCode) {
        let trial = self.trial();
        if !status.is_server_error() {
            self.progress = Progress::Answering(trial);
            return;
        }
        self.progress = Progress::Ended;
        count(trial, Outcome::Failed);
        self.judge(!is_fault(status));
    }

    /// There was no answer, or it broke off.
    pub fn failed(&mut self) {
        match std::mem::replace(&mut self.progress, Progress::Ended) {
            Progress::Asked => count(self.trial(), Outcome::Failed),
            Progress::Answering(trial) => count(trial, Outcome::Failed),
            Progress::Ended => return,
        }
        self.judge(false);
    }

    /// The replica failed the request that it has failed before: one request fails a trial once.
    pub fn failed_again(&mut self) {
        self.progress = Progress::Ended;
        self.judge(false);
    }

    fn trial(&self) -> Option<Trial> {
        self.metrics.trial(&self.service, &self.replica.revision)
    }

    /// Takes the attempt into the replica's record.
    fn judge(&self, good: bool) {
        if good {
            self.replica.succeeded();
        } else if self.replica.failed() {
            let service = &self.service.spec.id;
            tracing::warn!(%service, replica = %self.replica.address, "ejected: its answers fail one after another");
            self.metrics.ejected(service);
        }
    }
}

impl Drop for Attempt {
    /// An answer that had begun and did not fail has ended, or the client has left.
    fn drop(&mut self) {
        if let Progress::Answering(trial) = std::mem::replace(&mut self.progress, Progress::Ended) {
            count(trial, Outcome::Answered);
            self.judge(true);
        }
    }
}

fn count(trial: Option<Trial>, outcome: Outcome) {
    if let Some(trial) = trial {
        trial.end(outcome);
    }
}

/// Answers that speak against the replica, not against the request.
fn is_fault(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::INTERNAL_SERVER_ERROR | StatusCode::BAD_GATEWAY
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]
    use super::super::canary::Canary;
    use super::super::health::FAILURES;
    use super::super::snapshot::Snapshot;
    use super::super::snapshot::testing::{replica, service, snapshot};
    use super::*;

    struct World {
        metrics: Arc<Metrics>,
        snapshot: Snapshot,
    }

    impl World {
        /// A service whose only replica is of the revision on trial.
        fn new() -> Self {
            let mut spec = service("a", "s", "m");
            spec.canary = Some(Canary {
                revision: "r".into(),
                percent: 10,
            });
            Self {
                metrics: Arc::new(Metrics::new()),
                snapshot: snapshot([spec], [replica("a", "s", "u", "10.0.0.1:8000")]),
            }
        }

        fn replica(&self) -> &Arc<Replica> {
            &self.snapshot.service("a", "s").unwrap().replicas[0]
        }

        fn attempt(&self) -> Attempt {
            let service = self.snapshot.service("a", "s").unwrap();
            let replica = Arc::clone(self.replica());
            let in_flight = replica.enter();
            Attempt::new(&self.metrics, service, replica, in_flight)
        }

        /// Attempts that the trial counts as answered and as failed.
        fn trial(&self) -> [u32; 2] {
            let text = self
                .metrics
                .render_only(&["ashlar_gateway_canary_requests_total"]);
            ["answered", "failed"].map(|outcome| {
                let mut lines = text.lines();
                let line = lines.find(|line| line.contains(&format!("\"{outcome}\"")));
                line.map_or(0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
            })
        }

        /// Makes it fail as often as it may without being left out.
        fn fail_nearly(&self) {
            for _ in 1..FAILURES {
                self.attempt().failed();
            }
            assert!(!self.replica().is_ejected());
        }
    }

    #[test]
    fn answers_that_break_off_one_after_another_eject() {
        let world = World::new();
        for number in 1..=FAILURES {
            assert!(!world.replica().is_ejected(), "after {number}");
            let mut attempt = world.attempt();
            attempt.head(StatusCode::OK);
            attempt.failed();
            attempt.failed(); // told once
        }
        assert!(world.replica().is_ejected());
        assert_eq!(world.trial(), [0, FAILURES]);
        assert_eq!(world.replica().in_flight(), 0);
    }

    #[test]
    fn an_answer_forgives_when_it_has_ended_and_not_before() {
        let world = World::new();
        world.fail_nearly();
        let mut attempt = world.attempt();
        attempt.head(StatusCode::OK);
        drop(attempt);
        assert_eq!(world.trial(), [1, FAILURES - 1]);
        world.fail_nearly();
        let mut open = world.attempt();
        open.head(StatusCode::OK);
        world.attempt().failed();
        assert!(world.replica().is_ejected());
    }

    #[test]
    fn a_request_that_fails_again_fails_the_trial_once() {
        let world = World::new();
        world.attempt().failed();
        for _ in 1..FAILURES {
            world.attempt().failed_again();
        }
        assert!(world.replica().is_ejected());
        assert_eq!(world.trial(), [0, 1]);
    }

    #[test]
    fn what_ends_before_an_answer_tells_nothing() {
        let world = World::new();
        world.fail_nearly();
        drop(world.attempt());
        assert_eq!(world.trial(), [0, FAILURES - 1]);
        world.attempt().failed();
        assert!(world.replica().is_ejected());
    }

    #[test]
    fn errors_fail_the_trial_and_only_faults_speak_against_the_replica() {
        for (status, ejects) in [(500, true), (502, true), (503, false), (429, false)] {
            let world = World::new();
            world.fail_nearly();
            world.attempt().head(StatusCode::from_u16(status).unwrap());
            assert_eq!(world.replica().is_ejected(), ejects, "{status}");
            let failed = u32::from(status >= 500);
            assert_eq!(world.trial(), [1 - failed, FAILURES - 1 + failed]);
        }
    }
}
