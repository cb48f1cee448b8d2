//! Leader election by a Lease: 10 s lease, 7 s to renew, a try every 2 s, by who waits for it every second.
//!
//! Expiry is judged by this process's own monotonic clock, from when it last saw the Lease change: clocks of other
//! machines do not matter. A leader that cannot renew in time leaves, and the process with it.

use std::time::{Duration, Instant};

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use tokio::time::{sleep, timeout};

use super::tenure::Tenure;

/// The times of an election.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// How long a Lease holds without being renewed.
    pub lease: Duration,
    /// How long a leader tries to renew before it gives up; shorter than `lease`.
    pub renew_deadline: Duration,
    /// Time between tries.
    pub retry: Duration,
    /// Longest wait for one answer.
    pub call: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(10),
            renew_deadline: Duration::from_secs(7),
            retry: Duration::from_secs(2),
            call: Duration::from_secs(3),
        }
    }
}

/// The leadership was lost: the process must stop writing.
#[derive(Debug, thiserror::Error)]
#[error("the Lease could not be renewed in time, or another took it")]
pub struct LeadershipLost;

/// A candidate for a Lease.
pub struct Elector {
    leases: Api<Lease>,
    name: String,
    identity: String,
    timing: Timing,
    /// The Lease's holder and renewal as last seen, and when that was.
    seen: Option<(String, Option<MicroTime>, Instant)>,
    tenure: Tenure,
}

impl Elector {
    /// A candidate named `identity`.
    #[must_use]
    pub fn new(
        client: Client,
        namespace: &str,
        name: &str,
        identity: String,
        timing: Timing,
    ) -> Self {
        Self {
            leases: Api::namespaced(client, namespace),
            name: name.to_owned(),
            identity,
            timing,
            seen: None,
            tenure: Tenure::default(),
        }
    }

    /// Until when this candidate leads.
    #[must_use]
    pub fn tenure(&self) -> Tenure {
        self.tenure.clone()
    }

    /// Returns once this candidate leads.
    pub async fn acquire(&mut self) {
        loop {
            let start = Instant::now();
            match self.attempt().await {
                Ok(true) => return self.renewed(start),
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "cannot reach the Lease"),
            }
            // Twice as often as a leader renews: a Lease that was given up is found within about a second.
            sleep(self.timing.retry.mul_f64(0.4 + 0.2 * rand::random::<f64>())).await;
        }
    }

    /// Renews until it cannot.
    pub async fn hold(&mut self) -> LeadershipLost {
        let mut renewed = Instant::now();
        loop {
            sleep(self.timing.retry).await;
            // From before the write: others may see it no earlier than this.
            let start = Instant::now();
            let left = self.timing.renew_deadline.saturating_sub(renewed.elapsed());
            match timeout(left, self.attempt()).await {
                Ok(Ok(true)) => {
                    renewed = start;
                    self.renewed(start);
                }
                Ok(Ok(false)) | Err(_) => return LeadershipLost,
                Ok(Err(error)) => tracing::warn!(%error, "cannot renew the Lease"),
            }
        }
    }

    fn renewed(&self, at: Instant) {
        self.tenure.lasts_until(at + self.timing.renew_deadline);
    }

    /// Gives the Lease up, so that the next leader need not wait for it to expire.
    pub async fn release(&self) {
        let Ok(Ok(Some(mut lease))) =
            timeout(self.timing.call, self.leases.get_opt(&self.name)).await
        else {
            return;
        };
        let spec = lease.spec.get_or_insert_default();
        if spec.holder_identity.as_deref() == Some(&self.identity) {
            spec.holder_identity = Some(String::new());
            // Best effort: without it the next leader waits for the Lease to expire.
            let _ = timeout(
                self.timing.call,
                self.leases
                    .replace(&self.name, &PostParams::default(), &lease),
            )
            .await;
        }
    }

    /// One try to take or renew; false while another holds it. Who loses a race for the write gets an error, and sees
    /// at the next try who won.
    async fn attempt(&mut self) -> Result<bool, kube::Error> {
        let late = |_| kube::Error::Service("the API server did not answer in time".into());
        let found = timeout(self.timing.call, self.leases.get_opt(&self.name))
            .await
            .map_err(late)??;
        let Some(lease) = found else {
            let created = timeout(
                self.timing.call,
                self.leases
                    .create(&PostParams::default(), &self.lease(None)),
            )
            .await
            .map_err(late)?;
            return created.map(|_| true);
        };
        let spec = lease.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.clone().unwrap_or_default();
        let (last_holder, last_renewal, since) =
            self.seen
                .get_or_insert((holder.clone(), spec.renew_time.clone(), Instant::now()));
        if *last_holder != holder || *last_renewal != spec.renew_time {
            (*last_holder, *last_renewal, *since) =
                (holder.clone(), spec.renew_time.clone(), Instant::now());
        }
        let expired = since.elapsed() > self.timing.lease;
        if !holder.is_empty() && holder != self.identity && !expired {
            return Ok(false);
        }
        // The resource version makes the write fail if anyone was faster.
        let replaced = timeout(
            self.timing.call,
            self.leases.replace(
                &self.name,
                &PostParams::default(),
                &self.lease(Some(&lease)),
            ),
        )
        .await
        .map_err(late)?;
        replaced.map(|_| true)
    }

    fn lease(&self, old: Option<&Lease>) -> Lease {
        let now = MicroTime(Timestamp::now());
        let spec = old.and_then(|lease| lease.spec.clone()).unwrap_or_default();
        let ours = spec.holder_identity.as_deref() == Some(&self.identity);
        let transitions = spec.lease_transitions.unwrap_or(0);
        Lease {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                resource_version: old.and_then(|lease| lease.metadata.resource_version.clone()),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(self.identity.clone()),
                lease_duration_seconds: i32::try_from(self.timing.lease.as_secs()).ok(),
                acquire_time: if ours {
                    spec.acquire_time
                } else {
                    Some(now.clone())
                },
                renew_time: Some(now),
                lease_transitions: Some(if ours || old.is_none() {
                    transitions
                } else {
                    transitions.saturating_add(1)
                }),
                ..LeaseSpec::default()
            }),
        }
    }
}
