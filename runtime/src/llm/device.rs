//! Which device a model runs on, and how: the engine's arguments as a runner's configuration.

use std::path::Path;

use super::LoadError;
#[cfg(feature = "cuda")]
use crate::{
    config::Device,
    model_runner::cuda::{self, CudaError, CudaRunner, CudaRunnerConfig, CudaRunnerError, Float},
};
use crate::{
    config::{Dtype, EngineArgs, KvCacheDtype, Quantization},
    engine::request::TokenId,
    model_runner::{
        ModelRunner,
        cpu::{self, CpuRunner, CpuRunnerConfig, KvCacheSize, KvDtype},
    },
};

/// Default of `--max-num-seqs`.
const MAX_NUM_SEQS: u32 = 256;
/// Default of `--max-num-batched-tokens` on the CPU: a step of so many prompt tokens delays running outputs by a
/// fraction of a second on a small machine, and is large enough for the weights to be read once for many rows.
const CPU_MAX_NUM_BATCHED_TOKENS: u32 = 512;

/// Default of `--max-num-seqs` on a GPU.
#[cfg(feature = "cuda")]
const GPU_MAX_NUM_SEQS: u32 = 1024;
/// Default of `--max-num-batched-tokens` on a GPU: enough rows to reach its full rate.
#[cfg(feature = "cuda")]
const GPU_MAX_NUM_BATCHED_TOKENS: u32 = 8192;

/// A model on a device.
pub(super) struct Loaded {
    pub(super) runner: Box<dyn ModelRunner>,
    pub(super) eos_token_ids: Vec<TokenId>,
}

/// On the device that was asked for; `auto` is a GPU where this build and this machine have one.
pub(super) fn load_runner(args: &EngineArgs, path: &Path) -> Result<Loaded, LoadError> {
    #[cfg(feature = "cuda")]
    if args.device != Device::Cpu {
        match load_on_gpu(args, path) {
            Err(LoadError::GpuRunner(CudaRunnerError::Cuda(
                error @ CudaError::NoDevice { .. },
            ))) if args.device == Device::Auto => {
                tracing::info!(%error, "the model runs on the CPU");
            }
            result => return result,
        }
    }
    args.validate_for_cpu()?;
    load_on_cpu(args, path)
}

fn load_on_cpu(args: &EngineArgs, path: &Path) -> Result<Loaded, LoadError> {
    let max_num_batched_tokens = args
        .max_num_batched_tokens
        .unwrap_or(CPU_MAX_NUM_BATCHED_TOKENS);
    let config = CpuRunnerConfig {
        path: path.to_owned(),
        load_format: args.load_format.into(),
        dtype: match args.dtype {
            Dtype::Float32 => cpu::Dtype::Float32,
            Dtype::Auto | Dtype::Float16 | Dtype::Bfloat16 => cpu::Dtype::Auto,
        },
        quantize_fp8: args.quantization == Quantization::Fp8,
        kv_dtype: match args.kv_cache_dtype {
            KvCacheDtype::Auto => KvDtype::Auto,
            KvCacheDtype::Fp8 => KvDtype::Fp8,
        },
        kv_cache: args
            .kv_cache_memory_bytes
            .map_or(KvCacheSize::Auto, KvCacheSize::Bytes),
        max_num_seqs: args
            .max_num_seqs
            .unwrap_or(MAX_NUM_SEQS.min(max_num_batched_tokens)),
        max_num_batched_tokens,
        max_model_len: args.max_model_len,
        ..CpuRunnerConfig::default()
    };
    if args.tensor_parallel_size > 1 {
        let runner = CpuRunner::on_ranks(&config, args.tensor_parallel_size as usize)?;
        return Ok(Loaded {
            eos_token_ids: runner.leader().model_config().eos_token_ids.clone(),
            runner: Box::new(runner),
        });
    }
    let runner = CpuRunner::new(&config)?;
    Ok(Loaded {
        eos_token_ids: runner.model_config().eos_token_ids.clone(),
        runner: Box::new(runner),
    })
}

#[cfg(feature = "cuda")]
fn load_on_gpu(args: &EngineArgs, path: &Path) -> Result<Loaded, LoadError> {
    // Before the flags: without a GPU, `auto` goes on with the CPU's.
    cuda::probe()?;
    args.validate_for_gpu()?;
    let max_num_batched_tokens = args
        .max_num_batched_tokens
        .unwrap_or(GPU_MAX_NUM_BATCHED_TOKENS);
    let config = CudaRunnerConfig {
        path: path.to_owned(),
        load_format: args.load_format.into(),
        dtype: match args.dtype {
            Dtype::Float16 => Some(Float::F16),
            Dtype::Bfloat16 => Some(Float::Bf16),
            Dtype::Auto | Dtype::Float32 => None,
        },
        quantize_fp8: args.quantization == Quantization::Fp8,
        kv_dtype: match args.kv_cache_dtype {
            KvCacheDtype::Auto => cuda::KvDtype::Float,
            KvCacheDtype::Fp8 => cuda::KvDtype::Fp8,
        },
        ordinal: 0,
        gpu_memory_utilization: args.gpu_memory_utilization,
        kv_cache_memory_bytes: args.kv_cache_memory_bytes,
        max_num_seqs: args
            .max_num_seqs
            .unwrap_or(GPU_MAX_NUM_SEQS.min(max_num_batched_tokens)),
        max_num_batched_tokens,
        max_model_len: args.max_model_len,
        quantized_weights_only: args.quantized_weights_only,
        enforce_eager: args.enforce_eager,
        batch_invariant: args.batch_invariant,
    };
    let ranks = args.tensor_parallel_size as usize;
    if ranks > 1 {
        let runner = CudaRunner::on_ranks(&config, &(0..ranks).collect::<Vec<_>>())?;
        return Ok(Loaded {
            eos_token_ids: runner.leader().model_config().eos_token_ids.clone(),
            runner: Box::new(runner),
        });
    }
    let runner = CudaRunner::new(&config)?;
    Ok(Loaded {
        eos_token_ids: runner.model_config().eos_token_ids.clone(),
        runner: Box::new(runner),
    })
}
