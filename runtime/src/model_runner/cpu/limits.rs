//! Sizes of a [`CpuRunner`](super::CpuRunner): its KV cache, and the longest sequence that fits.

use super::{CpuBackend, CpuRunnerConfig, CpuRunnerError, KvCacheSize, KvDtype};
use crate::{
    model_runner::{RunnerLimits, max_logit_rows, memory},
    models::config::ModelConfig,
};

/// Tokens in a block.
pub const BLOCK_SIZE: u32 = ashlar_kernels::cpu::attention::BLOCK_SIZE as u32;
/// Share of the memory that [`KvCacheSize::Auto`] may take: 1 / this.
const AUTO_MEMORY_SHARE: u64 = 4;

/// The one formula for the KV pool, shared by start-up and admission through [`RunnerLimits`]. `model` is one rank's; the
/// pool and its bytes are those of all ranks.
pub(super) fn limits(
    config: &CpuRunnerConfig,
    model: &ModelConfig,
    kv_dtype: KvDtype,
    ranks: usize,
) -> Result<RunnerLimits, CpuRunnerError> {
    for (name, value) in [
        ("--max-num-seqs", config.max_num_seqs),
        ("--max-num-batched-tokens", config.max_num_batched_tokens),
    ] {
        if value == 0 {
            return Err(CpuRunnerError::Zero { name });
        }
    }
    let model_len = u32::try_from(model.max_position).unwrap_or(u32::MAX);
    let wanted = match config.max_model_len {
        Some(0) => {
            return Err(CpuRunnerError::Zero {
                name: "--max-model-len",
            });
        }
        Some(asked) if asked > model_len => {
            return Err(CpuRunnerError::TooLong {
                asked,
                model: model_len,
            });
        }
        Some(asked) => asked,
        None => model_len,
    };
    let kv_bytes_per_token = CpuBackend::kv_bytes_per_token(model, kv_dtype) * ranks as u64;
    let block_bytes = kv_bytes_per_token * u64::from(BLOCK_SIZE);
    // One more than the sequences need: block 0 holds nothing.
    let full = u64::from(config.max_num_seqs) * u64::from(wanted.div_ceil(BLOCK_SIZE)) + 1;
    let num_blocks = match config.kv_cache {
        KvCacheSize::Blocks(blocks) => u64::from(blocks),
        KvCacheSize::Bytes(bytes) => bytes / block_bytes,
        KvCacheSize::Auto => full.min(memory::limit_bytes() / AUTO_MEMORY_SHARE / block_bytes),
    };
    let num_blocks = u32::try_from(num_blocks).unwrap_or(u32::MAX);
    let tokens = u64::from(num_blocks.saturating_sub(1)) * u64::from(BLOCK_SIZE);
    let fits = u64::from(wanted) <= tokens;
    if tokens == 0 || (!fits && config.max_model_len.is_some()) {
        let bytes = u64::from(num_blocks) * block_bytes;
        return Err(CpuRunnerError::CacheTooSmall {
            bytes,
            tokens,
            max_model_len: wanted,
        });
    }
    Ok(RunnerLimits {
        block_size: BLOCK_SIZE,
        num_blocks,
        max_num_seqs: config.max_num_seqs,
        max_num_batched_tokens: config.max_num_batched_tokens,
        max_logit_rows: max_logit_rows(config.max_num_seqs),
        max_model_len: if fits {
            wanted
        } else {
            u32::try_from(tokens).unwrap_or(wanted)
        },
        vocab_size: u32::try_from(model.vocab_size)
            .expect("the configuration bounds sizes: this is a bug"),
        kv_bytes_per_token,
    })
}
