//! `ashlar bench`: measure a server, an engine in this process, pages against contiguous reservation, and quality.

mod perplexity;

use std::io::Write;

use anyhow::{Context, bail};

use ashlar::{
    bench::{
        closed_loop::{Target, measure},
        concurrency::{TimedRunner, compare},
        engine::EngineTarget,
        http::HttpTarget,
        roofline::{Clock, Roofline, RooflineRunner},
        trace::{SCENARIOS, Scenario, Shape, jobs, scenario},
    },
    config::{EngineArgs, parse_size, parse_u32},
    engine::{EngineConfig, request::SamplingParams},
    llm::Llm,
    model_runner::{
        ModelRunner, RunnerLimits,
        cpu::{BLOCK_SIZE, CpuRunner, CpuRunnerConfig, KvCacheSize},
    },
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
    Concurrency(ConcurrencyArgs),
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

/// Serve one trace twice on the same cache bytes: reserving the model's whole length per request, and with pages.
///
/// Reports the users served at once, the time and the tokens per second of both, after checking that both gave every
/// request the same tokens.
#[derive(Debug, clap::Args)]
struct ConcurrencyArgs {
    /// Model to run on the CPU: a folder, a .gguf file, or hf://OWNER/NAME.
    #[arg(
        env = "ASHLAR_MODEL",
        value_name = "MODEL",
        required_unless_present = "fake"
    )]
    model: Option<String>,

    /// Instead of a model, a fake of a large GPU with 8 billion parameters: the engine is real, time is computed.
    #[arg(long, conflicts_with = "model")]
    fake: bool,

    /// Bytes of KV cache in both modes [default: 8 whole lengths; with --fake 20G].
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    kv_cache_memory_bytes: Option<u64>,

    /// The model's length, which contiguous reservation takes for every request [default: 2048; with --fake 8192].
    #[arg(long, value_name = "TOKENS", value_parser = parse_u32)]
    max_model_len: Option<u32>,

    /// Requests, all submitted at once [default: 96; with --fake 1000].
    #[arg(long, value_name = "N")]
    requests: Option<usize>,

    /// Median of the log-normal prompt lengths [default: 55; with --fake 220].
    #[arg(long, value_name = "TOKENS")]
    input: Option<usize>,

    /// Median of the log-normal output lengths [default: 45; with --fake 180].
    #[arg(long, value_name = "TOKENS")]
    output: Option<usize>,

    /// Seed of the trace.
    #[arg(long, default_value_t = 1)]
    seed: u64,
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
        BenchCommand::Concurrency(args) => runtime.block_on(concurrency(args)),
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

/// Bytes of KV cache per token of the faked model: 32 layers, 8 heads of 128, K and V, 2 bytes.
const FAKE_KV_BYTES_PER_TOKEN: u64 = 32 * 8 * 128 * 2 * 2;
/// Whole lengths that the CPU's cache holds unless told otherwise.
const CPU_LENGTHS: u64 = 8;
/// Most requests running on the CPU.
const CPU_MAX_NUM_SEQS: u32 = 256;

async fn concurrency(args: ConcurrencyArgs) -> anyhow::Result<()> {
    let (length, requests, input, output) = if args.fake {
        (8192, 1000, 220, 180)
    } else {
        (2048, 96, 55, 45)
    };
    let max_model_len = args.max_model_len.unwrap_or(length);
    let requests = args.requests.unwrap_or(requests).max(1);
    let shape = Shape {
        input: args.input.unwrap_or(input).max(1),
        output: args.output.unwrap_or(output).max(1),
        lognormal: true,
        shared_prefix: 0,
        max_model_len: max_model_len as usize,
    };
    let seqs = u32::try_from(requests).unwrap_or(u32::MAX);
    if args.fake {
        let limits = fake_limits(&args, max_model_len, seqs)?;
        let trace = jobs(&shape, requests, limits.vocab_size, args.seed);
        let runner = || {
            let (runner, clock) = RooflineRunner::new(limits.clone(), Roofline::LARGE_GPU_8B);
            Ok::<TimedRunner, String>((Box::new(runner), clock))
        };
        let report = compare(runner, &engine_config(&limits), &trace).await?;
        return print(
            &serde_json::json!({"device": "fake", "roofline": Roofline::LARGE_GPU_8B, "result": report}),
        );
    }
    let model = args.model.as_deref().context("MODEL is missing")?;
    let path = ashlar::hub::resolve_model(model, None, None, &ashlar::hub::Progress::visible())?;
    let mut config = CpuRunnerConfig {
        path,
        max_num_seqs: seqs.min(CPU_MAX_NUM_SEQS),
        max_model_len: Some(max_model_len),
        ..CpuRunnerConfig::default()
    };
    let probe = CpuRunner::new(&CpuRunnerConfig {
        kv_cache: KvCacheSize::Blocks(max_model_len / BLOCK_SIZE + 2),
        ..config.clone()
    })?;
    let limits = probe.limits().clone();
    drop(probe);
    let bytes = args
        .kv_cache_memory_bytes
        .unwrap_or(CPU_LENGTHS * u64::from(max_model_len) * limits.kv_bytes_per_token);
    config.kv_cache = KvCacheSize::Bytes(bytes + u64::from(BLOCK_SIZE) * limits.kv_bytes_per_token);
    let trace = jobs(&shape, requests, limits.vocab_size, args.seed);
    let runner = || {
        let runner = CpuRunner::new(&config).map_err(|error| error.to_string())?;
        Ok::<TimedRunner, String>((Box::new(runner), Clock::real()))
    };
    let report = compare(runner, &engine_config(&limits), &trace).await?;
    print(&serde_json::json!({"device": "cpu", "model": model, "result": report}))
}

fn fake_limits(
    args: &ConcurrencyArgs,
    max_model_len: u32,
    max_num_seqs: u32,
) -> anyhow::Result<RunnerLimits> {
    let bytes = args.kv_cache_memory_bytes.unwrap_or(20 << 30);
    let blocks = bytes / (u64::from(BLOCK_SIZE) * FAKE_KV_BYTES_PER_TOKEN);
    Ok(RunnerLimits {
        block_size: BLOCK_SIZE,
        // And the null block.
        num_blocks: u32::try_from(blocks + 1).context("--kv-cache-memory-bytes is too large")?,
        max_num_seqs,
        max_num_batched_tokens: 8192,
        max_logit_rows: max_num_seqs,
        max_model_len,
        vocab_size: 1024,
        kv_bytes_per_token: FAKE_KV_BYTES_PER_TOKEN,
    })
}

/// Nothing but the cache limits who runs.
fn engine_config(limits: &RunnerLimits) -> EngineConfig {
    EngineConfig {
        max_num_seqs: limits.max_num_seqs,
        max_num_batched_tokens: limits.max_num_batched_tokens,
        max_num_queued_reqs: u32::MAX,
        ..EngineConfig::default()
    }
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
