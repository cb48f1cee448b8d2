//! Makes a real AWQ checkpoint from an unquantised or GGUF model of the Llama family, for tests without a GPU:
//! `make_awq MODEL FOLDER --evaluate TEXT`.
//!
//! ```text
//! record: the model's own decoder on calibration text ──► inputs of every linear layer
//! search: for each input the scales that lose least, after quantisation ──► four bits, zeros, scales
//! write:  config.json, model.safetensors in AWQ's GEMM layout, the tokenizer
//! ```
//!
//! The report, one JSON object on standard output, has the perplexity of a text before and after, and of plain rounding,
//! which the scales must beat.

mod record;
mod search;
mod write;

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use ashlar::{
    bench::perplexity::{Perplexity, perplexity},
    model_runner::{CpuRunner, CpuRunnerConfig, Dtype, KvCacheSize},
    models::{
        config::ModelConfig,
        loader::{self, LoadFormat},
        shard::Partition,
    },
    tokenizer::Tokenizer,
    weights::Checkpoint,
};
use clap::Parser;

use record::Recorder;

/// Tokens of calibration text, at most.
const CALIBRATION_TOKENS: usize = 1024;

/// Makes an AWQ checkpoint.
#[derive(Debug, Parser)]
struct Args {
    /// The model: a folder or a .gguf file.
    model: PathBuf,
    /// Where the checkpoint goes; made if absent.
    folder: PathBuf,
    /// Inputs that share a scale.
    #[arg(long, default_value_t = 64)]
    group: usize,
    /// Text to calibrate with, instead of the built-in one.
    #[arg(long)]
    calibration: Option<PathBuf>,
    /// Text to measure the perplexity of; must not be the calibration text.
    #[arg(long)]
    evaluate: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let text = match &args.calibration {
        Some(file) => std::fs::read_to_string(file).context("cannot read the calibration text")?,
        None => include_str!("calibration.txt").to_owned(),
    };
    let evaluated = std::fs::read_to_string(&args.evaluate).context("cannot read the text")?;
    let checkpoint = Checkpoint::open(&args.model)?;
    let tokenizer = Tokenizer::from_checkpoint(&checkpoint)?;
    let config = ModelConfig::from_checkpoint(&checkpoint)?;
    for width in [
        config.hidden_size,
        config.attention_size(),
        config.intermediate_size,
    ] {
        ensure!(
            width.is_multiple_of(args.group),
            "{width} inputs are not groups of {}",
            args.group
        );
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut recorder = Recorder::new(&config, threads);
    let decoder = loader::load(
        &checkpoint,
        &config,
        &Partition::whole(&config),
        &recorder,
        LoadFormat::Auto,
        threads,
    )?;
    let mut tokens = tokenizer.encode(&text, true)?;
    tokens.truncate(CALIBRATION_TOKENS);
    recorder.run(&decoder, &config, &tokens);

    let rounded = tempfile::tempdir()?;
    let mut losses = Vec::new();
    for (folder, scaled) in [(rounded.path(), false), (args.folder.as_path(), true)] {
        let model = search::quantize(&recorder, &decoder, &config, args.group, scaled);
        losses.push(model.loss);
        write::checkpoint(folder, &model, &decoder, &config, &tokenizer, args.group)?;
    }
    let tokens_evaluated = tokenizer.encode(&evaluated, false)?;
    let measure = |path: &Path, dtype| measure(path, dtype, &tokens_evaluated);
    let before = measure(&args.model, Dtype::Float32)?;
    let plain = measure(rounded.path(), Dtype::Float32)?;
    let after = measure(&args.folder, Dtype::Float32)?;
    let served = measure(&args.folder, Dtype::Auto)?;
    let report = serde_json::json!({
        "calibration_tokens": tokens.len(),
        "evaluated_tokens": before.tokens,
        "group_size": args.group,
        "squared_error_of_scaled_over_rounded": losses[1] / losses[0],
        "perplexity": {
            "before": before.perplexity,
            "rounded_without_scales": plain.perplexity,
            "after": after.perplexity,
            "after_as_served": served.perplexity,
        },
        "percent_above_before": {
            "rounded_without_scales": plain.percent_above(&before),
            "after": after.percent_above(&before),
        },
        "percent_served_above_exact": served.percent_above(&after),
    });
    let text = serde_json::to_string_pretty(&report)?;
    std::fs::write(args.folder.join("report.json"), format!("{text}\n"))?;
    writeln!(std::io::stdout(), "{text}")?;
    ensure!(
        after.mean_nll < plain.mean_nll,
        "the scales did not help: something is wrong"
    );
    Ok(())
}

fn measure(path: &Path, dtype: Dtype, tokens: &[u32]) -> anyhow::Result<Perplexity> {
    let mut runner = CpuRunner::new(&CpuRunnerConfig {
        path: path.to_owned(),
        dtype,
        kv_cache: KvCacheSize::Blocks(130),
        max_num_seqs: 1,
        max_num_batched_tokens: 256,
        max_model_len: Some(2048),
        ..CpuRunnerConfig::default()
    })?;
    Ok(perplexity(&mut runner, &[], tokens, 2048)?)
}
