//! `ashlar-operator`: the controller, the gateway and their helpers behind one command line.

use std::{io::Write as _, process::ExitCode};

use anyhow::Context as _;
use ashlar_operator::{autoscaler, check, controller, gateway, node_cache};
use clap::{Parser, Subcommand, ValueEnum};
use tracing_subscriber::EnvFilter;

/// Listings and bursts come and go: this one gives their memory back.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Serves large language models on Kubernetes: controller and gateway.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Cli {
    /// What to log, such as `info` or `ashlar_operator=debug,info`.
    #[arg(
        long,
        global = true,
        env = "ASHLAR_LOG",
        default_value = "info",
        value_name = "FILTER"
    )]
    log: String,
    /// How log lines look.
    #[arg(
        long,
        global = true,
        env = "ASHLAR_LOG_FORMAT",
        default_value = "text",
        value_name = "FORMAT"
    )]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the controller, which turns InferenceServices into pods.
    Run(controller::ControllerArgs),
    /// Run the gateway, the front door of all services.
    Gateway(gateway::GatewayArgs),
    /// Print the Role and RoleBinding that let the gateway read a service's keys.
    Grant(gateway::grant::GrantArgs),
    /// Ask an installed gateway whether it answers; `helm test` does.
    Check(check::CheckArgs),
    /// Play a trace of load against the autoscaler's decisions and a modelled fleet.
    Simulate(autoscaler::simulate::SimulateArgs),
    /// Make the folders in which a node keeps models (`spec.cache.hostPath`).
    NodeCache(node_cache::NodeCacheArgs),
    /// Print the CustomResourceDefinition.
    Crd,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = start(cli);
    if let Err(error) = &outcome {
        eprintln!("ashlar-operator: {error:#}");
    }
    ExitCode::from(u8::from(outcome.is_err()))
}

#[tokio::main]
async fn start(cli: Cli) -> anyhow::Result<()> {
    log_to_stderr(&cli)?;
    // It fails only if one is installed already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    match cli.command {
        Command::Run(args) => controller::run(args).await?,
        Command::Gateway(args) => gateway::run(args).await?,
        Command::Grant(args) => gateway::grant::run(&args).await?,
        Command::Check(args) => check::run(&args).await?,
        Command::Simulate(args) => autoscaler::simulate::run(&args)?,
        Command::NodeCache(args) => node_cache::run(&args).await?,
        Command::Crd => {
            std::io::stdout().write_all(ashlar_crds::inference_service_crd_yaml().as_bytes())?
        }
    }
    Ok(())
}

fn log_to_stderr(cli: &Cli) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&cli.log)
        .with_context(|| format!("--log {:?} is not a filter: try `info`", cli.log))?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match cli.log_format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().init(),
    }
    Ok(())
}
