//! `ashlar generate`: a file of prompts in, a file of answers out.

use std::{
    fs::File,
    io::{self, BufWriter, IsTerminal as _, Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, bail};
use ashlar::{
    batch::{self, ModelGenerator, Summary, Window},
    config::{EngineArgs, parse_u32},
    engine::NoObserver,
    hub::Progress,
    llm::LoadedModel,
    shutdown::Signals,
    telemetry::{self, LogFormat},
};
use indicatif::{ProgressBar, ProgressStyle};

/// Flags of `ashlar generate`.
#[derive(Debug, clap::Args)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    engine: EngineArgs,
    /// JSON lines with "prompt" or "messages", and sampling fields; - is standard input
    #[arg(long, value_name = "FILE")]
    prompts: PathBuf,
    /// Where the answers go, as JSON lines in the order of the prompts; - is standard output
    #[arg(long, value_name = "FILE", default_value = "-")]
    output: PathBuf,
    /// Most tokens of an answer whose line has no "max_tokens"
    #[arg(long, value_name = "N", value_parser = parse_u32, default_value = "256")]
    max_tokens: u32,
    /// Requests handed to the engine at once
    #[arg(long, value_name = "N", value_parser = parse_u32, default_value = "256")]
    in_flight: u32,
}

/// Runs `ashlar generate`; fails at the end when any line failed.
pub(crate) fn run(args: GenerateArgs) -> anyhow::Result<()> {
    telemetry::init(LogFormat::default(), "warn").map_err(anyhow::Error::msg)?;
    args.engine.validate()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("the async runtime could not start")?;
    let result = runtime.block_on(generate(args));
    // The thread that reads standard input may wait for a line that never comes.
    runtime.shutdown_background();
    let summary = result?;
    if summary.interrupted {
        bail!("interrupted after {} answers", summary.answered);
    }
    if summary.failed > 0 {
        bail!(
            "{} of {} lines failed; their output lines say why",
            summary.failed,
            summary.failed + summary.answered
        );
    }
    Ok(())
}

async fn generate(args: GenerateArgs) -> anyhow::Result<Summary> {
    let input = open_input(&args.prompts)?;
    let output = open_output(&args.output)?;
    let engine_args = args.engine.clone();
    let model = tokio::task::spawn_blocking(move || {
        LoadedModel::load(&engine_args, Arc::new(NoObserver), &Progress::visible())
    })
    .await
    .context("loading the model panicked")??;
    let engine = model.engine.clone();
    // More than the queue takes would be refused.
    let in_flight = args
        .in_flight
        .min(engine.config().max_num_queued_reqs)
        .max(1) as usize;
    let bar = progress_bar();
    let mut signals = Signals::new().context("signal handlers could not be installed")?;
    let interrupt = async move {
        signals.next().await;
    };
    let mut on_line = |summary: &Summary| {
        bar.set_position((summary.answered + summary.failed) as u64);
        bar.set_message(format!(
            "{} tokens, {} failed",
            summary.completion_tokens, summary.failed
        ));
    };
    let generator = ModelGenerator::new(model, args.max_tokens);
    let summary = batch::run(
        generator,
        Window { in_flight },
        input,
        output,
        interrupt,
        &mut on_line,
    )
    .await;
    bar.finish();
    engine.shutdown();
    Ok(summary?)
}

fn open_input(path: &Path) -> anyhow::Result<Box<dyn Read + Send>> {
    if path == Path::new("-") {
        return Ok(Box::new(io::stdin()));
    }
    let file = File::open(path)
        .with_context(|| format!("cannot read the prompts in {}", path.display()))?;
    Ok(Box::new(file))
}

fn open_output(path: &Path) -> anyhow::Result<Box<dyn Write>> {
    if path == Path::new("-") {
        return Ok(Box::new(BufWriter::new(io::stdout().lock())));
    }
    let file = File::create(path)
        .with_context(|| format!("cannot write the answers to {}", path.display()))?;
    Ok(Box::new(BufWriter::new(file)))
}

/// On a terminal's standard error; silent otherwise.
fn progress_bar() -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::no_length();
    let style =
        ProgressStyle::with_template("{spinner} {pos} answers, {per_sec}, {msg} [{elapsed}]");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
    bar
}
