//! Leaders that end, and those that take over.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::Result;
use ashlar_e2e::wait::{self, Seen};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use serde_json::json;
use tokio::sync::mpsc;

use super::Bench;
use crate::processes::{Operator, PATIENCE};
use crate::report::Report;

/// By which operators agree on a leader.
const LEASE: &str = "ashlar-operator";

/// Seconds by which the candidates' clocks are wrong, in both directions.
const SKEW: i64 = 600;

impl Bench {
    /// Leaders that end in one way or another, and the time until the next one acts.
    pub(crate) async fn failover(&self, first: Operator, report: &mut Report) -> Result<()> {
        let start_of = |user: &str, port: u16, skew: i64| {
            Operator::start_at(&self.args.operator, &self.args.state, user, port, skew)
        };
        let mut seen = self.deployments().await?;
        let second = start_of("operator-b", 9082, SKEW)?;
        second.is_warm().await?;
        self.renewed(2).await?;
        let mut next = 0_usize;
        let mut acts = async |seen: &mut mpsc::UnboundedReceiver<(Deployment, Instant)>| {
            next += 1;
            let argument = format!("--max-model-len={}", 3000 + next);
            let spec = json!({"runtime": {"args": [argument]}});
            let is_it = |d: &Deployment| {
                let spec = d.spec.as_ref().and_then(|s| s.template.spec.as_ref());
                spec.and_then(|s| s.containers.first()?.args.clone())
                    .unwrap_or_default()
                    .contains(&argument)
            };
            self.change(next, spec, seen, is_it).await
        };
        let start = Instant::now();
        let from = self.audited()?.len();
        first.kill()?;
        acts(&mut seen).await?;
        report.time(
            "leader SIGKILL → next acts",
            start.elapsed(),
            Duration::from_secs(15),
        );
        self.never_both("killed", from, "operator-a", report)?;

        let third = start_of("operator-a", 9083, -SKEW)?;
        third.is_warm().await?;
        self.renewed(2).await?;
        let start = Instant::now();
        second.terminate().await?;
        acts(&mut seen).await?;
        report.time(
            "leader SIGTERM → next acts",
            start.elapsed(),
            Duration::from_secs(2),
        );

        let fourth = start_of("operator-b", 9084, SKEW)?;
        fourth.is_warm().await?;
        self.renewed(2).await?;
        let from = self.audited()?.len();
        third.signal("STOP")?;
        acts(&mut seen).await?;
        // It wakes up in the belief that it leads, to a change that the other has yet to carry out.
        third.signal("CONT")?;
        acts(&mut seen).await?;
        third.ended().await?;
        self.never_both("stopped and woken", from, "operator-a", report)?;
        fourth.terminate().await?;

        let start = Instant::now();
        let fifth = start_of("operator-b", 9085, 0)?;
        acts(&mut seen).await?;
        let what = format!("start at {} services → acts", self.args.services);
        report.time(&what, start.elapsed(), Duration::from_secs(10));
        fifth.terminate().await
    }

    /// Waits until the leader has renewed its Lease so often, by when another candidate has seen it.
    async fn renewed(&self, times: usize) -> Result<()> {
        let leases: Api<Lease> = Api::namespaced(self.client.clone(), "ashlar-system");
        let mut seen = BTreeSet::new();
        wait::until("the Lease to be renewed", PATIENCE, async || {
            let spec = leases.get(LEASE).await?.spec.unwrap_or_default();
            seen.insert(spec.renew_time.map(|time| time.0));
            Ok(if seen.len() > times {
                Seen::Done(())
            } else {
                Seen::NotYet(format!("{seen:?}"))
            })
        })
        .await
    }

    /// By the audit log: once the new leader has written, the `old` one never does.
    fn never_both(&self, how: &str, from: usize, old: &str, report: &mut Report) -> Result<()> {
        let audited = self.audited()?;
        let is_old =
            |event: &&BTreeMap<String, String>| event.get("user").is_some_and(|user| user == old);
        let mut since = audited[from.min(audited.len())..].iter().peekable();
        while since.next_if(is_old).is_some() {}
        let what = format!("writes of a leader that was {how}, after the next one's first");
        report.count(&what, since.filter(is_old).count(), 0);
        Ok(())
    }
}
