//! What is settled when a model starts: types, sizes, limits, plans of products.

use std::{ops::RangeInclusive, thread};

use ashlar_kernels::cuda::{CudaError, Device, Float, decode_plan::Cut, gemm};

use super::{
    BLOCK_SIZE, CudaRunnerConfig, CudaRunnerError,
    backend::{
        CudaBackend, CudaBackendConfig, CudaBuf, GpuMatrix, GpuVector, Target, block_format,
    },
    layout::{Counts, Layout},
};
use crate::{
    model_runner::{RunnerLimits, max_logit_rows},
    models::{
        backend::Linear,
        config::ModelConfig,
        decoder::{Activations, Decoder, Layer, Mlp},
    },
    weights::{Checkpoint, GgmlType, Scheme, WeightsError},
};

/// Memory left to the driver: graphs, modules loaded late.
const RESERVE_BYTES: usize = 512 << 20;
/// What 16-bit values of quantised layers may take of the KV cache's memory at most: an eighth.
const KEPT_SHARE: usize = 8;
/// Rows whose plans are timed at start: some of those that steps of running outputs have, and a prompt's largest pieces.
const TUNED_ROWS: &[usize] = &[
    32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 2048, 4096, 8192,
];
/// Threads that load layers: few CPUs still wait for several reads at once, and each thread holds the matrices in host memory
/// that it repacks.
const LOAD_THREADS: RangeInclusive<usize> = 4..=8;

/// Threads that load a rank's layers: its share of the CPUs, within bounds.
pub(super) fn load_threads(ranks: usize) -> usize {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    (cpus / ranks).clamp(*LOAD_THREADS.start(), *LOAD_THREADS.end())
}

/// What the kernels need of a model's widths.
pub(super) fn check_widths(
    checkpoint: &Checkpoint,
    model: &ModelConfig,
) -> Result<(), WeightsError> {
    for (name, width, multiple) in [
        ("hidden_size", model.hidden_size, 32),
        ("intermediate_size", model.intermediate_size, 32),
        ("vocab_size", model.vocab_size, 8),
    ] {
        if !width.is_multiple_of(multiple) {
            let message = format!(
                "{name} is {width}, and the GPU kernels need a multiple of {multiple}; use --device cpu"
            );
            return Err(checkpoint.unsupported(message));
        }
    }
    Ok(())
}

/// Whether the layers' matrices are integers: four bits, or GGUF's blocks.
pub(super) fn has_integers(checkpoint: &Checkpoint, model: &ModelConfig) -> bool {
    let is_blocks = |name: &str| {
        let tensor = checkpoint.tensor(name).ok().flatten();
        tensor.is_some_and(|tensor| block_format(tensor.kind).is_some())
    };
    match checkpoint {
        Checkpoint::Gguf(_) => is_blocks("blk.0.attn_q.weight") || is_blocks("blk.0.ffn_up.weight"),
        Checkpoint::Safetensors(_) => matches!(model.quantization, Some(Scheme::Int4(_))),
    }
}

/// IEEE floats for integers, whose scales are such; the checkpoint's own 16-bit type; brain floats for everything else.
pub(super) fn float_of(checkpoint: &Checkpoint, model: &ModelConfig) -> Float {
    if has_integers(checkpoint, model) {
        return Float::F16;
    }
    let is_half = match checkpoint {
        Checkpoint::Gguf(_) => checkpoint
            .tensor("token_embd.weight")
            .ok()
            .flatten()
            .is_some_and(|tensor| tensor.kind == GgmlType::F16),
        Checkpoint::Safetensors(folder) => {
            let config = folder.config();
            let name = config.get("torch_dtype").or_else(|| config.get("dtype"));
            name.and_then(|name| name.as_str()) == Some("float16")
        }
    };
    if is_half { Float::F16 } else { Float::Bf16 }
}

/// The matrices of all layers.
pub(super) fn layer_matrices(
    decoder: &Decoder<CudaBackend>,
) -> impl Iterator<Item = &GpuMatrix> + Clone {
    let layers = decoder.layers.iter().flat_map(|layer| {
        let Mlp::Dense { gate_up, down } = &layer.mlp;
        [&layer.qkv, &layer.attention_output, gate_up, down]
    });
    layers.flat_map(|linear| &linear.parts)
}

pub(super) fn model_len(
    config: &CudaRunnerConfig,
    model: &ModelConfig,
) -> Result<u32, CudaRunnerError> {
    let model_len = u32::try_from(model.max_position).unwrap_or(u32::MAX);
    match config.max_model_len {
        Some(asked) if asked > model_len => Err(CudaRunnerError::TooLong {
            asked,
            model: model_len,
        }),
        asked => Ok(asked.unwrap_or(model_len)),
    }
}

pub(super) fn backend_config(
    device: &Device,
    config: &CudaRunnerConfig,
    model: &ModelConfig,
    float: Float,
    max_model_len: u32,
    kv_scales: Vec<[f32; 2]>,
) -> CudaBackendConfig {
    let max_num_seqs = config.max_num_seqs as usize;
    let max_logit_rows = max_logit_rows(config.max_num_seqs) as usize;
    let rows = config.max_num_batched_tokens as usize;
    let shape = ashlar_kernels::cuda::attention::HeadShape {
        float,
        kv_dtype: config.kv_dtype,
        num_heads: model.num_heads,
        num_kv_heads: model.num_kv_heads,
        head_dim: model.head_dim,
        window: 0,
    };
    // There is room for what is shared, which is cut the finest.
    let cut = Cut::shared(&shape, max_logit_rows, device.multiprocessors());
    let largest = Layout::new(Counts {
        rows,
        decodes: max_num_seqs,
        decode_cut: cut,
        prefills: max_num_seqs,
        prefill_items: max_num_seqs + rows,
        tiles_only: config.batch_invariant,
        kept: max_logit_rows,
        kept_cut: cut,
        blocks: max_num_seqs * max_model_len.div_ceil(BLOCK_SIZE) as usize,
        ..Counts::default()
    });
    CudaBackendConfig {
        float,
        kv_dtype: config.kv_dtype,
        kv_scales,
        integers: false,
        rounds_rows: match model.quantization {
            Some(Scheme::Fp8(scheme)) => scheme.rounds_rows,
            Some(Scheme::Int4(_)) | None => false,
        },
        batch_invariant: config.batch_invariant,
        max_model_len: max_model_len as usize,
        step_bytes: largest.bytes,
        max_logit_rows,
        max_num_seqs,
        max_items: cut.max_items,
    }
}

pub(super) fn activations(
    device: &Device,
    model: &ModelConfig,
    rows: usize,
    logit_rows: usize,
) -> Result<Activations<CudaBackend>, CudaError> {
    let buffer = |width: usize, spare: bool| CudaBuf::new(device, rows, width, Float::BYTES, spare);
    Ok(Activations {
        residual: buffer(model.hidden_size, true)?,
        normed: buffer(model.hidden_size, false)?,
        qkv: buffer(model.qkv_size(), true)?,
        attention: buffer(model.attention_size(), false)?,
        delta: buffer(model.hidden_size, false)?,
        gate_up: buffer(2 * model.intermediate_size, false)?,
        mlp: buffer(model.intermediate_size, false)?,
        logits: CudaBuf::new(device, gemm::bucket(logit_rows), model.vocab_size, 4, false)?,
        blocks: Vec::new(),
    })
}

/// Times the plans of the large products on this GPU, on the layers' own matrices.
pub(super) fn tune(
    backend: &CudaBackend,
    decoder: &Decoder<CudaBackend>,
    act: &Activations<CudaBackend>,
    (max_rows, max_logit_rows): (usize, usize),
) -> Result<(), CudaError> {
    if backend.batch_invariant {
        // One kernel makes all products.
        return Ok(());
    }
    let linears = |pick: fn(&Layer<CudaBackend>) -> &Linear<GpuMatrix, GpuVector>| {
        // A product with a bias has a plan of its own.
        let plain = decoder
            .layers
            .iter()
            .map(pick)
            .filter(|linear| linear.bias.is_none());
        plain.map(|linear| &linear.parts[0]).collect::<Vec<_>>()
    };
    let (gate_up, down) = (
        linears(|layer| {
            let Mlp::Dense { gate_up, .. } = &layer.mlp;
            gate_up
        }),
        linears(|layer| {
            let Mlp::Dense { down, .. } = &layer.mlp;
            down
        }),
    );
    let delta = if backend.place.is_none() {
        Target::Add(act.residual.view())
    } else {
        Target::Store(act.delta.view())
    };
    let (qkv, gated) = (act.qkv.view(), act.gate_up.view());
    let kinds = [
        (linears(|layer| &layer.qkv), &act.normed, Target::Store(qkv)),
        (
            linears(|layer| &layer.attention_output),
            &act.attention,
            delta,
        ),
        (gate_up, &act.normed, Target::Store(gated)),
        (down, &act.mlp, delta),
    ];
    for rows in TUNED_ROWS {
        if *rows <= max_rows {
            for (matrices, x, target) in &kinds {
                if !matrices.is_empty() {
                    backend.tune(matrices, x, *target, *rows)?;
                }
            }
        }
        if *rows <= max_logit_rows {
            let head = decoder.head.as_ref().unwrap_or(&decoder.embedding);
            let logits = Target::StoreF32(act.logits.view());
            backend.tune(&[&head.parts[0]], &act.normed, logits, *rows)?;
        }
    }
    Ok(())
}

/// Bytes of the share of the GPU's memory that nothing uses, once weights and the buffers of the largest step are there.
fn memory_left(config: &CudaRunnerConfig, device: &Device) -> Result<usize, CudaError> {
    let (free, total) = device.memory()?;
    let share = (total as f64 * config.gpu_memory_utilization) as usize;
    Ok(share.saturating_sub(total - free + RESERVE_BYTES))
}

/// Keeps the 16-bit values of quantised layers beside their fewer bits, for products with many rows, where they take no more
/// than a [`KEPT_SHARE`]th of the memory that the KV cache would have, or than what the size asked for it leaves. Without them
/// every step with prompts makes them again. The bytes that they take.
pub(super) fn keep_values(
    config: &CudaRunnerConfig,
    backend: &mut CudaBackend,
    decoder: &Decoder<CudaBackend>,
) -> Result<usize, CudaError> {
    let bytes = backend.value_bytes(layer_matrices(decoder));
    if bytes == 0 || config.quantized_weights_only {
        return Ok(0);
    }
    let left = memory_left(config, &backend.device)?;
    let spare = match config.kv_cache_memory_bytes {
        Some(cache) => left.saturating_sub(usize::try_from(cache).unwrap_or(usize::MAX)),
        None => left / KEPT_SHARE,
    };
    if bytes > spare {
        return Ok(0);
    }
    backend.keep_values(layer_matrices(decoder))?;
    Ok(bytes)
}

/// The one formula for the KV pool: all of the memory that is left. Start-up and admission share it through [`RunnerLimits`].
pub(super) fn limits(
    config: &CudaRunnerConfig,
    model: &ModelConfig,
    backend: &CudaBackend,
    max_model_len: u32,
    ranks: usize,
) -> Result<RunnerLimits, CudaRunnerError> {
    let left = memory_left(config, &backend.device)?;
    let bytes = config
        .kv_cache_memory_bytes
        .map_or(left, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
    let num_blocks = u32::try_from(bytes / backend.block_bytes()).unwrap_or(u32::MAX);
    let tokens = u64::from(num_blocks.saturating_sub(1)) * u64::from(BLOCK_SIZE);
    let needed = u64::from(config.max_model_len.unwrap_or(BLOCK_SIZE));
    if tokens < needed {
        return Err(CudaRunnerError::CacheTooSmall {
            bytes: bytes as u64,
            tokens,
            needed,
        });
    }
    Ok(RunnerLimits {
        block_size: BLOCK_SIZE,
        num_blocks,
        max_num_seqs: config.max_num_seqs,
        max_num_batched_tokens: config.max_num_batched_tokens,
        max_logit_rows: max_logit_rows(config.max_num_seqs),
        max_model_len: max_model_len.min(u32::try_from(tokens).unwrap_or(max_model_len)),
        vocab_size: u32::try_from(model.vocab_size)
            .expect("the configuration bounds sizes: this is a bug"),
        kv_bytes_per_token: (ranks * backend.block_bytes() / BLOCK_SIZE as usize) as u64,
    })
}

/// Row counts with a graph of their own: close together where steps are short, further apart where they are long.
pub(super) fn buckets(max: usize) -> Vec<usize> {
    let mut buckets = vec![1, 2, 4, 8];
    buckets.extend((16..=64).step_by(8));
    buckets.extend((80..=256).step_by(16));
    buckets.extend((320..=max.max(320)).step_by(64));
    buckets.retain(|rows| *rows < max);
    buckets.push(max);
    buckets
}

#[cfg(test)]
#[allow(clippy::unwrap_used, missing_docs)] // Tests fail by panicking.
mod tests {
    use super::buckets;

    #[test]
    fn buckets_ascend_and_end_at_the_limit() {
        for max in [1, 2, 5, 16, 100, 256, 300, 1024] {
            let buckets = buckets(max);
            assert!(buckets.is_sorted_by(|a, b| a < b), "{buckets:?}");
            assert_eq!(buckets.last(), Some(&max));
        }
        assert!(buckets(1024).len() < 50);
    }
}
