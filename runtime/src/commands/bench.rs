//! `ashlar bench`: measure a server, an engine in this process, pages against contiguous reservation, and quality.

mod concurrency;
mod perplexity;

use std::io::Write;

use anyhow::{Context, bail};

use ashlar::{
    bench::{
        closed_loop::{Target, measure},
        engine::EngineTarget,
        http::HttpTarget,
        trace::{SCENARIOS, Scenario, scenario},
    },
    config::EngineArgs,
    engine::request::SamplingParams,
    llm::Llm,
};

/// Measure: prints one JSON object per result on standard output.
#[derive(Debug, clap::Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Debug, clap::Subcommand)]
enum BenchCommand {
    Serve(Box<ServeArgs>),
    Throughput(Box<ThroughputArgs>),
    Concurrency(concurrency::ConcurrencyArgs),
    Perplexity(Box<perplexity::PerplexityArgs>),
    /// Show the scenarios.
    List,
}

/// Measure a running OpenAI-compatible server over HTTP.
#[derive(Debug, clap::Args)]
struct ServeArgs {
    /// Address of the server, with or without /v1.
    #[arg(long, env = "ASHLAR_BASE_URL", value_name = "URL")]
    base_url: String,

    /// Model to ask for [default: the first that the server lists].
    #[arg(long, value_name = "NAME")]
    model: Option<String>,

    /// Key to send.
    #[arg(
        long,
        env = "ASHLAR_API_KEY",
        hide_env_values = true,
        value_name = "KEY"
    )]
    api_key: Option<String>,

    #[command(flatten)]
    check: CheckArgs,

    #[command(flatten)]
    load: LoadArgs,

    /// Seed of the trace.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Measure a model in this process, without HTTP: what the engine and the device can do.
#[derive(Debug, clap::Args)]
struct ThroughputArgs {
    #[command(flatten)]
    engine: EngineArgs,

    #[command(flatten)]
    check: CheckArgs,

    #[command(flatten)]
    load: LoadArgs,
}

/// What must be answered rightly before anything is timed.
#[derive(Debug, clap::Args)]
struct CheckArgs {
    /// Text that the model must continue, greedily, before anything is timed.
    #[arg(long, value_name = "TEXT", default_value = "The capital of France is")]
    check_prompt: String,

    /// Text that the continuation must contain.
    #[arg(long, value_name = "TEXT", default_value = "Paris")]
    check_expect: String,

    /// Time it without asking (for dummy weights, which answer nothing).
    #[arg(long)]
    no_check: bool,
}

/// Which requests.
#[derive(Debug, clap::Args)]
struct LoadArgs {
    /// Scenarios, separated by commas; `ashlar bench list` shows them.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "single,chat16,prefill1k",
        value_name = "NAMES"
    )]
    scenarios: Vec<String>,

    /// Requests, instead of the scenario's own number.
    #[arg(long, value_name = "N")]
    requests: Option<usize>,

    /// Requests in flight, instead of the scenario's own number.
    #[arg(long, value_name = "N")]
    concurrency: Option<usize>,

    /// Prompt tokens, instead of the scenario's own number.
    #[arg(long, value_name = "N")]
    input: Option<usize>,

    /// Output tokens, instead of the scenario's own number.
    #[arg(long, value_name = "N")]
    output: Option<usize>,

    /// Token ids are drawn below this.
    #[arg(long, default_value_t = 30_000, value_parser = clap::value_parser!(u32).range(100..))]
    vocab: u32,

    /// Longest prompt and output together.
    #[arg(long, default_value_t = 1 << 20, value_name = "TOKENS")]
    max_len: usize,
}

impl LoadArgs {
    fn scenarios(&self) -> anyhow::Result<Vec<Scenario>> {
        self.scenarios
            .iter()
            .map(|name| self.scenario(name))
            .collect()
    }

    fn scenario(&self, name: &str) -> anyhow::Result<Scenario> {
        let Some(found) = scenario(name) else {
            let known: Vec<&str> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
            let nearest = known
                .iter()
                .max_by(|a, b| strsim::jaro(name, a).total_cmp(&strsim::jaro(name, b)));
            bail!(
                "no scenario is called {name:?}: did you mean {:?}? There are {}",
                nearest.copied().unwrap_or_default(),
                known.join(", ")
            );
        };
        let scenario = Scenario {
            requests: self.requests.unwrap_or(found.requests),
            concurrency: self.concurrency.unwrap_or(found.concurrency),
            input: self.input.unwrap_or(found.input),
            output: self.output.unwrap_or(found.output),
            ..found
        };
        if [
            scenario.requests,
            scenario.concurrency,
            scenario.input,
            scenario.output,
        ]
        .contains(&0)
        {
            bail!("--requests, --concurrency, --input and --output must be at least 1");
        }
        Ok(scenario)
    }
}

/// Runs the command.
///
/// # Errors
/// When the check fails, nothing can be measured, or any request failed.
pub(crate) fn run(args: BenchArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    match args.command {
        BenchCommand::Serve(args) => runtime.block_on(serve(*args)),
        BenchCommand::Throughput(args) => throughput(*args, &runtime),
        BenchCommand::Concurrency(args) => runtime.block_on(concurrency::run(args)),
        BenchCommand::Perplexity(args) => perplexity::run(*args),
        BenchCommand::List => list(),
    }
}

async fn serve(args: ServeArgs) -> anyhow::Result<()> {
    let scenarios = args.load.scenarios()?;
    let target = HttpTarget::connect(&args.base_url, args.model, args.api_key)
        .await
        .map_err(anyhow::Error::msg)?;
    if !args.check.no_check {
        let answer = target
            .check(&args.check.check_prompt, &args.check.check_expect)
            .await?;
        tracing::info!(answer, "the check passed");
    }
    run_scenarios(
        &target,
        &scenarios,
        args.load.vocab,
        args.load.max_len,
        args.seed,
    )
    .await
}

fn throughput(args: ThroughputArgs, runtime: &tokio::runtime::Runtime) -> anyhow::Result<()> {
    let scenarios = args.load.scenarios()?;
    let seed = args.engine.seed;
    let llm = Llm::new(args.engine)?;
    if !args.check.no_check {
        let (prompt, expect) = (args.check.check_prompt, &args.check.check_expect);
        let params = SamplingParams {
            temperature: 0.0,
            max_tokens: CHECK_TOKENS,
            ..SamplingParams::default()
        };
        let answer = llm.generate(&[prompt], &params)?.remove(0).text;
        if !answer.contains(expect) {
            bail!(
                "the model went on with {answer:?}, which does not contain {expect:?}: nothing was timed (for dummy \
                 weights: --no-check)"
            );
        }
        tracing::info!(answer, "the check passed");
    }
    let engine = &llm.model().engine;
    let vocab = args.load.vocab.min(engine.limits().vocab_size);
    let max_len = args.load.max_len.min(llm.model().max_length() as usize);
    let target = EngineTarget::new(engine.clone());
    runtime.block_on(run_scenarios(&target, &scenarios, vocab, max_len, seed))
}

/// Most tokens of the answer to the check.
const CHECK_TOKENS: u32 = 16;

/// One line of figures for each scenario.
async fn run_scenarios<T: Target>(
    target: &T,
    scenarios: &[Scenario],
    vocab: u32,
    max_len: usize,
    seed: u64,
) -> anyhow::Result<()> {
    let mut failed = 0;
    for scenario in scenarios {
        let report = measure(target, scenario, vocab, max_len, seed)
            .await
            .map_err(anyhow::Error::msg)
            .with_context(|| format!("the warm-up of {} failed", scenario.name))?;
        failed += report.errors;
        print(&report)?;
    }
    if failed > 0 {
        bail!("{failed} requests failed: the figures above are of the others");
    }
    Ok(())
}

fn list() -> anyhow::Result<()> {
    for s in SCENARIOS {
        let lengths = if s.lognormal {
            "log-normal around "
        } else {
            ""
        };
        let prefix = if s.shared_prefix > 0 {
            format!(" after {} shared", s.shared_prefix)
        } else {
            String::new()
        };
        let line = format!(
            "{:10} {:4} requests, {:4} at once, {lengths}{} → {} tokens{prefix}",
            s.name, s.requests, s.concurrency, s.input, s.output
        );
        writeln!(std::io::stdout(), "{line}")?;
    }
    Ok(())
}

fn print(report: &impl serde::Serialize) -> anyhow::Result<()> {
    let line = serde_json::to_string(report).context("cannot write a result as JSON")?;
    writeln!(std::io::stdout(), "{line}").context("cannot write to standard output")
}
