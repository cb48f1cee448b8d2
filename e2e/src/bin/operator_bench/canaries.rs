//! Canaries under load: a good revision takes its share and is promoted, a failing one is found out by what the real gateway
//! counts and rolled back by the real operator.

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use ashlar_crds::InferenceService;
use ashlar_e2e::wait::{self, Seen};
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use crate::kubelet::{FAILING_ARGUMENT, Kubelet};
use crate::report::Report;
use crate::rollouts::{Load, NAMESPACE, serve};

const REPLICAS: i32 = 4;
const WEIGHT: i32 = 20;
/// Requests of the new revision before it may be promoted.
const LEAST: i32 = 500;
/// How far from its weight the seen share may be, in points: five standard deviations of some 2,500 draws.
const TOLERANCE: f64 = 4.0;
/// Requests after the end, none of which may fail.
const AFTERWARDS: usize = 1000;
const LONGEST: Duration = Duration::from_secs(120);

struct Trial {
    /// Share of the requests that the new revision answered, in percent.
    share: f64,
    took: Duration,
    requests: usize,
    failed: usize,
    cut: usize,
    /// Failed after the end was seen.
    failed_later: usize,
    end: String,
}

/// Both at one time.
pub(crate) async fn run(
    services: &Api<InferenceService>,
    kubelet: &Kubelet,
    report: &mut Report,
) -> Result<()> {
    let good = play(services, kubelet, "canary-good", "--max-model-len=2000");
    let bad = play(services, kubelet, "canary-bad", FAILING_ARGUMENT);
    let (good, bad) = tokio::try_join!(good, bad)?;
    report.note(
        "good canary: ended",
        format!("{} after {:.1} s", good.end, good.took.as_secs_f64()),
    );
    report.note(
        "good canary: share of the requests",
        format!("{:.1} % of {WEIGHT} %", good.share),
    );
    let off = (good.share - f64::from(WEIGHT)).abs() > TOLERANCE;
    report.count(
        "good canary: share too far from its weight",
        usize::from(off),
        0,
    );
    report.count(
        "good canary: not promoted",
        usize::from(good.end != "promoted"),
        0,
    );
    report.count(
        &format!("good canary: failed of {}", good.requests),
        good.failed,
        0,
    );
    report.count("good canary: streams cut", good.cut, 0);
    report.note(
        "failing canary: ended",
        format!("{} after {:.1} s", bad.end, bad.took.as_secs_f64()),
    );
    report.count(
        "failing canary: not rolled back",
        usize::from(bad.end != "rolled back"),
        0,
    );
    report.note(
        "failing canary: failed",
        format!("{} of {}", bad.failed, bad.requests),
    );
    report.count(
        "failing canary: failed after the rollback",
        bad.failed_later,
        0,
    );
    Ok(())
}

async fn play(
    services: &Api<InferenceService>,
    kubelet: &Kubelet,
    name: &str,
    argument: &str,
) -> Result<Trial> {
    serve(services, name, REPLICAS, json!({"device": "cpu"}), None).await?;
    let change = |spec: serde_json::Value| async move {
        let patch = Patch::Merge(json!({ "spec": spec }));
        services.patch(name, &PatchParams::default(), &patch).await
    };
    let canary = json!({"weightPercent": WEIGHT, "promote": "OnErrorRate", "maxErrorPercent": 2, "minRequests": LEAST});
    let old = change(json!({"rolloutStrategy": {"canary": canary}})).await?;
    let old = old
        .status
        .and_then(|status| status.revision)
        .context("a revision")?
        .current;
    let load = Arc::new(Load::default());
    let clients = load.start(name);
    change(json!({"runtime": {"args": [argument]}})).await?;
    let start = Instant::now();
    let prefix = format!("{NAMESPACE}/{name}-");
    let of_new = || -> usize {
        let engines = kubelet.engines(&prefix);
        let new = engines.iter().filter(|(_, engine)| engine.revision != old);
        new.map(|(_, engine)| engine.answered.load(Ordering::SeqCst))
            .sum()
    };
    // Requests in all and of the new revision, when its trial began and as it went on.
    let (mut first, mut last) = (None, (0, 0));
    let end = wait::until(&format!("the end of {name}"), LONGEST, async || {
        let status = services.get(name).await?.status.unwrap_or_default();
        let revision = status.revision.unwrap_or_default();
        let way = revision.rollout.unwrap_or_default();
        let newer = revision.current != old;
        if newer && way.contains("% of the requests") {
            last = (load.total(), of_new());
            first.get_or_insert(last);
        } else if newer && way.starts_with("Halted") {
            return Ok(Seen::Done("rolled back"));
        } else if newer && first.is_some() && !way.starts_with("Canary") {
            return Ok(Seen::Done("promoted"));
        }
        Ok(Seen::NotYet(way))
    })
    .await?;
    let took = start.elapsed();
    // The gateway hears of it by its own watch: until only one revision has engines, requests may go to the other.
    wait::until("one revision's engines to be left", LONGEST, async || {
        let engines = kubelet.engines(&prefix);
        let left: BTreeSet<&str> = engines
            .iter()
            .map(|(_, engine)| engine.revision.as_str())
            .collect();
        Ok(if left.len() == 1 {
            Seen::Done(())
        } else {
            Seen::NotYet(format!("{left:?}"))
        })
    })
    .await?;
    let (failed, asked) = (load.failed.load(Ordering::SeqCst), load.total());
    wait::until("more requests", LONGEST, async || {
        let more = load.total() - asked;
        Ok(if more >= AFTERWARDS {
            Seen::Done(())
        } else {
            Seen::NotYet(format!("{more}"))
        })
    })
    .await?;
    load.stop.store(true, Ordering::SeqCst);
    futures::future::join_all(clients).await;
    let (all, new) = first.unwrap_or_default();
    let (all, new) = (last.0.saturating_sub(all), last.1.saturating_sub(new));
    Ok(Trial {
        share: new as f64 * 100.0 / all.max(1) as f64,
        took,
        requests: load.total(),
        failed: load.failed.load(Ordering::SeqCst),
        cut: load.cut.load(Ordering::SeqCst),
        failed_later: load.failed.load(Ordering::SeqCst) - failed,
        end: end.to_owned(),
    })
}
