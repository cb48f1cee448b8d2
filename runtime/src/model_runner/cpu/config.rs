//! What a [`CpuRunner`](super::CpuRunner) is built from, and why it could not be.

use std::path::PathBuf;

use crate::{model_runner::ranks::RankError, models::loader::LoadFormat, weights::WeightsError};

/// What weights and arithmetic are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dtype {
    /// The checkpoint's own: quantised weights are multiplied as they are, activations as int8 blocks.
    #[default]
    Auto,
    /// Exact mode: weights are dequantised exactly to f32, and everything is computed in f32.
    Float32,
}

/// What K and V are stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvDtype {
    /// f16, or f32 in exact mode.
    #[default]
    Auto,
    /// 2 bytes a value.
    Float16,
    /// 4 bytes a value.
    Float32,
    /// 1 byte a value, e4m3.
    Fp8,
}

/// How large the KV cache is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvCacheSize {
    /// Every slot at the longest length, or a quarter of the memory (the container's, where it has a limit) if that is
    /// less. Pages that are never used take no memory.
    #[default]
    Auto,
    /// This many bytes.
    Bytes(u64),
    /// This many blocks, the null block included.
    Blocks(u32),
}

/// What a [`CpuRunner`] is built from.
#[derive(Debug, Clone)]
pub struct CpuRunnerConfig {
    /// A `.gguf` file or a Hugging Face folder.
    pub path: PathBuf,
    /// Where the weights come from.
    pub load_format: LoadFormat,
    /// Weights and arithmetic.
    pub dtype: Dtype,
    /// Rounds 16-bit weights to eight-bit floats as they are loaded.
    pub quantize_fp8: bool,
    /// K and V.
    pub kv_dtype: KvDtype,
    /// Size of the KV cache.
    pub kv_cache: KvCacheSize,
    /// Sequences that run at once.
    pub max_num_seqs: u32,
    /// Rows in one step.
    pub max_num_batched_tokens: u32,
    /// Longest sequence; `None` takes the model's, lowered to what the KV cache holds.
    pub max_model_len: Option<u32>,
    /// Threads, of all ranks together; 0 takes every core that this process may use.
    pub threads: usize,
}

impl Default for CpuRunnerConfig {
    fn default() -> Self {
        Self {
            path: PathBuf::new(),
            load_format: LoadFormat::Auto,
            dtype: Dtype::Auto,
            quantize_fp8: false,
            kv_dtype: KvDtype::Auto,
            kv_cache: KvCacheSize::Auto,
            max_num_seqs: 64,
            max_num_batched_tokens: 2048,
            max_model_len: None,
            threads: 0,
        }
    }
}

/// Why a runner could not be built.
#[derive(Debug, thiserror::Error)]
pub enum CpuRunnerError {
    /// The checkpoint cannot be used.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A size is zero.
    #[error("{name} must be at least 1")]
    Zero {
        /// The setting.
        name: &'static str,
    },
    /// The asked length is more than the model was made for.
    #[error("--max-model-len is {asked}, and the model was made for {model} tokens; lower it")]
    TooLong {
        /// What was asked.
        asked: u32,
        /// What the model allows.
        model: u32,
    },
    /// One sequence of the longest length does not fit.
    #[error(
        "the KV cache of {bytes} bytes holds {tokens} tokens, and --max-model-len is {max_model_len}; raise the cache or lower the length"
    )]
    CacheTooSmall {
        /// Bytes of the cache.
        bytes: u64,
        /// Tokens it holds.
        tokens: u64,
        /// What was asked.
        max_model_len: u32,
    },
    /// A tensor-parallel rank failed.
    #[error(transparent)]
    Rank(#[from] RankError),
    /// The KV cache cannot be allocated.
    #[error("a KV cache of {bytes} bytes cannot be allocated; lower --kv-cache-memory-bytes")]
    CacheTooLarge {
        /// Bytes of the cache.
        bytes: u64,
    },
}
