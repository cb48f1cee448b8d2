//! `ashlar bench perplexity`: what a model's quantisation costs, on a text.

use std::{path::PathBuf, time::Instant};

use anyhow::{Context, bail};
use serde::Serialize;

use ashlar::{
    bench::perplexity::{Perplexity, perplexity},
    config::{Device, Dtype, EngineArgs, KvCacheDtype},
    hub::Progress,
    llm::ModelOnDevice,
};

/// Tokens of a window, where the model takes as many.
const WINDOW: usize = 2048;
/// Tokens in one step.
const STEP_TOKENS: u32 = 256;

/// Measure how well a model predicts a text: as it is served, and dequantised and computed exactly.
#[derive(Debug, clap::Args)]
pub(crate) struct PerplexityArgs {
    #[command(flatten)]
    engine: EngineArgs,

    /// The text, UTF-8.
    #[arg(long, value_name = "FILE")]
    file: PathBuf,

    /// Tokens that are predicted from one beginning [default: 2048, or the model's length if that is less].
    #[arg(long, value_name = "TOKENS")]
    window: Option<usize>,

    /// Use only so many tokens of the text.
    #[arg(long, value_name = "TOKENS")]
    tokens: Option<usize>,

    /// Another model to compare with, computed exactly: the one that was quantised.
    #[arg(long, value_name = "MODEL")]
    against: Option<String>,

    /// Do not compute the model exactly for comparison, which takes its time on a CPU.
    #[arg(long)]
    no_reference: bool,

    /// Fail when the model as served differs by more than this from the model computed exactly.
    #[arg(long, default_value_t = 0.5, value_name = "PERCENT")]
    max_difference: f64,
}

/// One line of the report.
#[derive(Serialize)]
struct Line<'a> {
    model: &'a str,
    computed: &'static str,
    #[serde(flatten)]
    result: Perplexity,
    seconds: f64,
    /// How much higher the perplexity of the model as served is than this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    served_above_percent: Option<f64>,
}

pub(super) fn run(mut args: PerplexityArgs) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(&args.file)
        .with_context(|| format!("cannot read {}", args.file.display()))?;
    args.engine.max_num_seqs.get_or_insert(1);
    args.engine
        .max_num_batched_tokens
        .get_or_insert(STEP_TOKENS);
    let served = args.measure(&args.engine, &text, None)?;
    let is_exact = args.engine.dtype == Dtype::Float32;
    if !args.no_reference && !is_exact {
        let reference = args.measure(&exact(&args.engine), &text, Some(&served))?;
        let difference = served.percent_above(&reference);
        if difference.is_nan() || difference.abs() > args.max_difference {
            bail!(
                "the perplexity as served differs by {difference:+.3} % from the same weights computed exactly; at \
                 most {} % is allowed (--max-difference)",
                args.max_difference
            );
        }
    }
    if let Some(other) = &args.against {
        let mut engine = exact(&args.engine);
        engine.model.clone_from(other);
        engine.quantization = ashlar::config::Quantization::Auto;
        (engine.revision, engine.tokenizer) = (None, None);
        args.measure(&engine, &text, Some(&served))?;
    }
    Ok(())
}

/// The same model, its weights dequantised, everything in 32 bits.
fn exact(args: &EngineArgs) -> EngineArgs {
    EngineArgs {
        device: Device::Cpu,
        dtype: Dtype::Float32,
        kv_cache_dtype: KvCacheDtype::Auto,
        ..args.clone()
    }
}

impl PerplexityArgs {
    /// Measures one model and prints its line.
    fn measure(
        &self,
        engine: &EngineArgs,
        text: &str,
        served: Option<&Perplexity>,
    ) -> anyhow::Result<Perplexity> {
        let ModelOnDevice {
            tokenizer,
            mut runner,
            ..
        } = ModelOnDevice::open(engine, &Progress::visible())?;
        let beginning = tokenizer.encode("", true)?;
        let mut tokens = tokenizer.encode(text, false)?;
        tokens.truncate(self.tokens.unwrap_or(usize::MAX));
        let longest = runner.limits().max_model_len as usize;
        let window = self.window.unwrap_or(WINDOW.min(longest));
        let started = Instant::now();
        let result = perplexity(runner.as_mut(), &beginning, &tokens, window)?;
        super::print(&Line {
            model: &engine.model,
            computed: match engine.dtype {
                Dtype::Float32 => "exactly, on the CPU",
                _ => "as served",
            },
            result,
            seconds: started.elapsed().as_secs_f64(),
            served_above_percent: served.map(|served| served.percent_above(&result)),
        })?;
        Ok(result)
    }
}
