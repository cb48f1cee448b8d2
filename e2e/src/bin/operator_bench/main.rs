//! `make operator-bench`: the operator against a real API server with simulated nodes, at the size of a large cluster.
//!
//! Prints a line a measure: what, the figure, and the bar it has to meet. Ends with status 1 if a bar is not met.

#![forbid(unsafe_code)]

mod canaries;
mod faults;
mod kubelet;
mod measure;
mod processes;
mod report;
mod rollouts;
mod simulate;

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Parser;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use measure::Bench;
use processes::Operator;
use report::Report;

/// Arguments, given by e2e/bench/operator.sh.
#[derive(Debug, Clone, Parser)]
pub(crate) struct Args {
    /// Folder with kubeconfigs and the audit log.
    #[arg(long)]
    state: PathBuf,
    /// The operator's binary.
    #[arg(long)]
    operator: PathBuf,
    /// InferenceServices, each of two pods.
    #[arg(long, default_value_t = 1000)]
    services: usize,
    /// Pods, Secrets and ConfigMaps of others: so many of each.
    #[arg(long, default_value_t = 10_000)]
    foreign: usize,
    /// Seconds at rest during which every write is counted.
    #[arg(long, default_value_t = 600)]
    rest: u64,
    /// Services patched one after the other for the times of a change.
    #[arg(long, default_value_t = 200)]
    patches: usize,
    /// Instead of the sizes: rollouts and scale-downs under load.
    #[arg(long)]
    rollouts: bool,
    /// Instead of the sizes: an API server that misbehaves.
    #[arg(long)]
    faults: bool,
    /// Let every pod be scraped every second, as scaled services are.
    #[arg(long)]
    scaled: bool,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    // It fails only if one is installed already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let kubeconfig = Kubeconfig::read_from(args.state.join("admin.kubeconfig"))?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    let client = Client::try_from(config).context("a client")?;
    let mut report = Report::default();
    let passed = if args.rollouts {
        rollouts::run(&args, client, &mut report).await
    } else if args.faults {
        faults::run(&args, client, &mut report).await
    } else {
        run(&args, client, &mut report).await
    };
    report.print()?;
    passed?;
    anyhow::ensure!(report.all_met(), "a bar is not met");
    Ok(())
}

async fn run(args: &Args, client: Client, report: &mut Report) -> Result<()> {
    let bench = Bench::prepare(args, client).await?;
    let operator = Operator::start(&args.operator, &args.state, "operator-a", 9081)?;
    operator.leads().await?;
    operator.is_warm().await?;

    bench.burst(&operator, report).await?;
    bench.settle(&operator).await?;
    bench.rest(&operator, report).await?;
    bench.changes(report).await?;
    bench.drift(report).await?;
    let (peak, now) = operator.memory()?;
    let bar = if args.services > 1000 { 256 } else { 96 };
    report.mib(
        &format!("leader's peak memory at {} services", args.services),
        peak,
        bar,
    );
    report.note(
        "leader's memory now",
        format!("{:.1} MiB", now as f64 / 1_048_576.0),
    );
    bench.deletion(report).await?;
    bench.settle(&operator).await?;
    bench.failover(operator, report).await
}
