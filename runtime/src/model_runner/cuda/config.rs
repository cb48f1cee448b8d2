//! What a [`CudaRunner`](super::CudaRunner) is started with, and why it may not start.

use std::path::PathBuf;

use super::{CudaError, Float, KvDtype};
use crate::{model_runner::ranks::RankError, models::loader::LoadFormat, weights::WeightsError};

/// What a [`CudaRunner`] is built from.
#[derive(Debug, Clone)]
pub struct CudaRunnerConfig {
    /// A `.gguf` file or a Hugging Face folder.
    pub path: PathBuf,
    /// Where the weights come from.
    pub load_format: LoadFormat,
    /// Type of weights and activations; `None` takes the checkpoint's.
    pub dtype: Option<Float>,
    /// Rounds 16-bit weights to eight-bit floats as they are loaded.
    pub quantize_fp8: bool,
    /// What the KV cache stores.
    pub kv_dtype: KvDtype,
    /// Which GPU.
    pub ordinal: usize,
    /// Share of the GPU's memory to use.
    pub gpu_memory_utilization: f64,
    /// Bytes of the KV cache, instead of what is left of the share.
    pub kv_cache_memory_bytes: Option<u64>,
    /// Sequences that run at once.
    pub max_num_seqs: u32,
    /// Rows in one step.
    pub max_num_batched_tokens: u32,
    /// Longest sequence; `None` takes the model's, lowered to what the KV cache holds.
    pub max_model_len: Option<u32>,
    /// Keep no 16-bit values of quantised layers, of which products with many rows have copies where these take little of the
    /// KV cache's memory.
    pub quantized_weights_only: bool,
    /// Queue every kernel by itself instead of as graphs.
    pub enforce_eager: bool,
    /// A sequence's logits have the same bits whatever else is in its steps, however its prompt is cut, and with graphs or
    /// without: one kernel for every product and one for all attention, which is slower.
    pub batch_invariant: bool,
}

/// Why a runner could not be built.
#[derive(Debug, thiserror::Error)]
pub enum CudaRunnerError {
    /// The checkpoint cannot be used.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The GPU cannot.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The asked length is more than the model was made for.
    #[error("--max-model-len is {asked}, and the model was made for {model} tokens; lower it")]
    TooLong {
        /// What was asked.
        asked: u32,
        /// What the model allows.
        model: u32,
    },
    /// Fewer GPUs than ranks.
    #[error(
        "--tensor-parallel-size {asked} needs {asked} GPUs, and this machine shows {found}; give the container more GPUs or lower it"
    )]
    TooFewGpus {
        /// Ranks.
        asked: usize,
        /// GPUs.
        found: usize,
    },
    /// A tensor-parallel rank failed.
    #[error(transparent)]
    Rank(#[from] RankError),
    /// One sequence does not fit.
    #[error(
        "{bytes} bytes of GPU memory are left for the KV cache and hold {tokens} tokens, and {needed} are needed; raise --gpu-memory-utilization or lower --max-model-len"
    )]
    CacheTooSmall {
        /// Bytes of the cache.
        bytes: u64,
        /// Tokens it holds.
        tokens: u64,
        /// Tokens needed.
        needed: u64,
    },
}
