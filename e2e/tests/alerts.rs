//! Alerts fire when their fault is caused, on a real Prometheus with the chart's own rules in time-lapse. One fault after the
//! other where it concerns every service.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "alerts/engine.rs"]
mod engine;
#[path = "alerts/models.rs"]
mod models;
#[path = "alerts/replicas.rs"]
mod replicas;
#[path = "alerts/system.rs"]
mod system;

use std::time::Duration;

use anyhow::{Result, ensure};
use ashlar_e2e::prometheus::Prometheus;
use ashlar_e2e::wait::{self, Seen};
use ashlar_e2e::{Namespace, cluster, dashboards, with_namespace};

use engine::*;
use models::*;
use replicas::*;
use system::*;

/// An alert of the chart's slowest rule here fires within this.
const FIRES: Duration = Duration::from_secs(120);

#[tokio::test]
async fn alerts_fire_when_their_fault_is_caused() -> Result<()> {
    with_namespace("alerts", async |ns| {
        let prometheus = Prometheus::start(&ns.cluster).await?;
        let ns = &ns;
        let prometheus = &prometheus;
        tokio::try_join!(
            pods_that_do_not_start(ns, prometheus),
            a_revision_that_does_not_start(ns, prometheus),
            a_model_that_is_not_to_be_had(ns, prometheus),
            a_hub_that_goes_silent(ns, prometheus),
            a_model_that_is_downloaded(ns),
            more_requests_than_one_replica_takes(ns, prometheus),
        )?;
        tokio::try_join!(
            requests_that_fill_the_cache(ns, prometheus),
            a_rollout_that_waits_for_long_answers(ns, prometheus),
            replicas_that_die(ns, prometheus),
            replicas_that_crash(ns, prometheus),
            an_engine_that_hangs(ns, prometheus),
            an_idle_engine_that_hangs(ns, prometheus),
        )?;
        panels_of_faults_have_data(ns, prometheus).await?;
        models_that_are_not_scraped(prometheus).await?;
        without_gateway(ns, prometheus).await?;
        // From here on nobody reconciles as he should; installing again mends it.
        let outcome = an_operator_that_may_not_write(ns, prometheus).await;
        let outcome = outcome.and(without_leader(ns, prometheus).await);
        let outcome = outcome.and(without_operator(ns, prometheus).await);
        cluster::install().await.and(outcome)
    })
    .await
}

/// Panels that are empty when all is well, after all those faults.
async fn panels_of_faults_have_data(ns: &Namespace, prometheus: &Prometheus) -> Result<()> {
    let queries = dashboards::queries(&ns.name, ".+")?;
    let of_faults: Vec<_> = queries.iter().filter(|one| one.is_of_faults()).collect();
    ensure!(
        of_faults.len() >= dashboards::OF_FAULTS.len(),
        "{of_faults:?}"
    );
    wait::until("data in the panels of faults", FIRES, async || {
        for query in &of_faults {
            if !query.has_data(prometheus).await? {
                return Ok(Seen::NotYet(format!("no data in {query:?}")));
            }
        }
        Ok(Seen::Done(()))
    })
    .await
}
