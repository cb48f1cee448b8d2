//! `ashlar bench concurrency`: what pages gain, on the CPU, on a GPU, or in computed time.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use ashlar::{
    bench::{
        concurrency::{Answers, ConcurrencyError, ConcurrencyReport, TimedRunner, compare},
        roofline::{Clock, Roofline, RooflineRunner},
        trace::{Shape, jobs},
    },
    config::{Device, LoadFormat, parse_size, parse_u32},
    engine::EngineConfig,
    hub::{Progress, resolve_model},
    model_runner::{
        ModelRunner, RunnerLimits,
        cpu::{BLOCK_SIZE, CpuRunner, CpuRunnerConfig, KvCacheSize},
    },
};

use super::print;

/// Serve one trace twice on the same cache bytes: reserving the model's whole length per request, and with pages.
///
/// Reports the users served at once, the time and the tokens per second of both. On the CPU and with --fake both must give every
/// request the same tokens; on a GPU, where a product's last bits depend on the batch, the report says how many are the same.
#[derive(Debug, clap::Args)]
pub(super) struct ConcurrencyArgs {
    /// Model to run: a folder, a .gguf file, or hf://OWNER/NAME.
    #[arg(
        env = "ASHLAR_MODEL",
        value_name = "MODEL",
        required_unless_present = "fake"
    )]
    model: Option<String>,

    /// Where to compute.
    #[arg(long, default_value = "cpu")]
    device: Device,

    /// Where the weights come from; dummy needs a GPU.
    #[arg(long, default_value = "auto")]
    load_format: LoadFormat,

    /// Instead of a model, a fake of a large GPU with 8 billion parameters: the engine is real, time is computed.
    #[arg(long, conflicts_with_all = ["model", "device", "load_format"])]
    fake: bool,

    /// Bytes of KV cache in both modes [default: 8 whole lengths on the CPU, else 20G].
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    kv_cache_memory_bytes: Option<u64>,

    /// The model's length, which contiguous reservation takes for every request [default: 2048 on the CPU, else 8192].
    #[arg(long, value_name = "TOKENS", value_parser = parse_u32)]
    max_model_len: Option<u32>,

    /// Requests, all submitted at once [default: 96 on the CPU, else 1000].
    #[arg(long, value_name = "N")]
    requests: Option<usize>,

    /// Median of the log-normal prompt lengths [default: 55 on the CPU, else 220].
    #[arg(long, value_name = "TOKENS")]
    input: Option<usize>,

    /// Median of the log-normal output lengths [default: 45 on the CPU, else 180].
    #[arg(long, value_name = "TOKENS")]
    output: Option<usize>,

    /// Seed of the trace.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Bytes of KV cache per token of the faked model: 32 layers, 8 heads of 128, K and V, 2 bytes.
const FAKE_KV_BYTES_PER_TOKEN: u64 = 32 * 8 * 128 * 2 * 2;
/// Bytes of KV cache on a GPU, real or faked, unless told otherwise.
const GPU_KV_CACHE_BYTES: u64 = 20 << 30;
/// Whole lengths that the CPU's cache holds unless told otherwise.
const CPU_LENGTHS: u64 = 8;
/// Most requests running on the CPU.
const CPU_MAX_NUM_SEQS: u32 = 256;

/// The trace's sizes, with what is asked or the device's defaults.
struct Sizes {
    max_model_len: u32,
    max_num_seqs: u32,
    requests: usize,
    seed: u64,
    shape: Shape,
}

impl Sizes {
    fn new(args: &ConcurrencyArgs) -> Self {
        let (length, requests, input, output) = if args.fake || args.device == Device::Cuda {
            (8192, 1000, 220, 180)
        } else {
            (2048, 96, 55, 45)
        };
        let max_model_len = args.max_model_len.unwrap_or(length);
        let requests = args.requests.unwrap_or(requests).max(1);
        Self {
            max_model_len,
            max_num_seqs: u32::try_from(requests).unwrap_or(u32::MAX),
            requests,
            seed: args.seed,
            shape: Shape {
                input: args.input.unwrap_or(input).max(1),
                output: args.output.unwrap_or(output).max(1),
                lognormal: true,
                shared_prefix: 0,
                max_model_len: max_model_len as usize,
            },
        }
    }

    /// Runs the trace both ways on what `runner` makes, which has these limits.
    async fn measure(
        &self,
        limits: &RunnerLimits,
        runner: impl FnMut() -> Result<TimedRunner, String>,
        answers: Answers,
    ) -> Result<ConcurrencyReport, ConcurrencyError> {
        let trace = jobs(&self.shape, self.requests, limits.vocab_size, self.seed);
        compare(runner, &engine_config(limits), &trace, answers).await
    }
}

/// Runs the command.
///
/// # Errors
/// When a model cannot be loaded, a request fails, or the two ways answer differently where they must not.
pub(super) async fn run(mut args: ConcurrencyArgs) -> anyhow::Result<()> {
    if args.device == Device::Auto {
        args.device = best_device();
    }
    let sizes = Sizes::new(&args);
    match args.device {
        _ if args.fake => on_fake(&args, &sizes).await,
        Device::Cuda => on_gpu(&args, &sizes).await,
        Device::Auto | Device::Cpu => on_cpu(&args, &sizes).await,
    }
}

#[cfg(feature = "cuda")]
fn best_device() -> Device {
    match ashlar::model_runner::cuda::probe() {
        Ok(_) => Device::Cuda,
        Err(error) => {
            tracing::info!(%error, "the model runs on the CPU");
            Device::Cpu
        }
    }
}

#[cfg(not(feature = "cuda"))]
fn best_device() -> Device {
    Device::Cpu
}

async fn on_fake(args: &ConcurrencyArgs, sizes: &Sizes) -> anyhow::Result<()> {
    let limits = fake_limits(args, sizes.max_model_len, sizes.max_num_seqs)?;
    let runner = || {
        let (runner, clock) = RooflineRunner::new(limits.clone(), Roofline::LARGE_GPU_8B);
        Ok::<TimedRunner, String>((Box::new(runner), clock))
    };
    let report = sizes.measure(&limits, runner, Answers::Same).await?;
    print(
        &serde_json::json!({"device": "fake", "roofline": Roofline::LARGE_GPU_8B, "result": report}),
    )
}

fn find(args: &ConcurrencyArgs) -> anyhow::Result<(&str, PathBuf)> {
    let model = args.model.as_deref().context("MODEL is missing")?;
    let path = resolve_model(model, None, None, &Progress::visible())?;
    Ok((model, path))
}

async fn on_cpu(args: &ConcurrencyArgs, sizes: &Sizes) -> anyhow::Result<()> {
    let (model, path) = find(args)?;
    if args.load_format == LoadFormat::Dummy {
        bail!("--load-format dummy is for GPUs: add --device cuda, or leave it out");
    }
    let max_model_len = sizes.max_model_len;
    let mut config = CpuRunnerConfig {
        path,
        max_num_seqs: sizes.max_num_seqs.min(CPU_MAX_NUM_SEQS),
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
    let runner = || {
        let runner = CpuRunner::new(&config).map_err(|error| error.to_string())?;
        Ok::<TimedRunner, String>((Box::new(runner), Clock::real()))
    };
    let report = sizes.measure(&limits, runner, Answers::Same).await?;
    print(&serde_json::json!({"device": "cpu", "model": model, "result": report}))
}

#[cfg(feature = "cuda")]
async fn on_gpu(args: &ConcurrencyArgs, sizes: &Sizes) -> anyhow::Result<()> {
    use ashlar::model_runner::cuda::{CudaRunner, CudaRunnerConfig, KvDtype};

    let (model, path) = find(args)?;
    let config = CudaRunnerConfig {
        path,
        load_format: args.load_format.into(),
        dtype: None,
        quantize_fp8: false,
        kv_dtype: KvDtype::Float,
        ordinal: 0,
        gpu_memory_utilization: GPU_MEMORY_UTILIZATION,
        kv_cache_memory_bytes: Some(args.kv_cache_memory_bytes.unwrap_or(GPU_KV_CACHE_BYTES)),
        max_num_seqs: sizes.max_num_seqs.min(GPU_MAX_NUM_SEQS),
        max_num_batched_tokens: GPU_MAX_NUM_BATCHED_TOKENS,
        max_model_len: Some(sizes.max_model_len),
        quantized_weights_only: false,
        enforce_eager: false,
        batch_invariant: false,
    };
    let limits = CudaRunner::new(&config)?.limits().clone();
    let runner = || {
        let runner = CudaRunner::new(&config).map_err(|error| error.to_string())?;
        Ok::<TimedRunner, String>((Box::new(runner), Clock::real()))
    };
    let report = sizes.measure(&limits, runner, Answers::Counted).await?;
    print(&serde_json::json!({"device": "cuda", "model": model, "result": report}))
}

/// Share of the GPU's memory that weights, cache and work may take together.
#[cfg(feature = "cuda")]
const GPU_MEMORY_UTILIZATION: f64 = 0.9;
/// Most requests running on a GPU.
#[cfg(feature = "cuda")]
const GPU_MAX_NUM_SEQS: u32 = 1024;
/// Tokens in one step on a GPU.
#[cfg(feature = "cuda")]
const GPU_MAX_NUM_BATCHED_TOKENS: u32 = 8192;

#[cfg(not(feature = "cuda"))]
async fn on_gpu(_: &ConcurrencyArgs, _: &Sizes) -> anyhow::Result<()> {
    bail!("this build has no GPU support: use one with the feature cuda, or --device cpu")
}

fn fake_limits(
    args: &ConcurrencyArgs,
    max_model_len: u32,
    max_num_seqs: u32,
) -> anyhow::Result<RunnerLimits> {
    let bytes = args.kv_cache_memory_bytes.unwrap_or(GPU_KV_CACHE_BYTES);
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
