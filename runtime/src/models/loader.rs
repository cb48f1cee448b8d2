//! From a checkpoint to a [`Decoder`]: check shapes, take the rank's part, undo permutations, fuse parts, repack; layers in
//! parallel, and beside them the embedding and the head, the largest matrices.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Instant,
};

use super::{
    backend::{Backend, HeadNorms, Linear},
    config::ModelConfig,
    decoder::{Decoder, Layer, Mlp},
    registry::{GGUF_WEIGHTS, HF_WEIGHTS, MatrixEntry, Part, Role, Shard, WeightMap},
    shard::Partition,
};
use crate::weights::{
    Checkpoint, Fp8Matrix, Fp8Scheme, RawTensor, Scheme, Weight, WeightsError,
    cut::{Cut, Span},
};

/// Where weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoadFormat {
    /// The checkpoint.
    #[default]
    Auto,
    /// Nowhere: random values in the shapes of the configuration, to measure speed without the weights.
    Dummy,
}

/// Loads the rank's part of all weights of `checkpoint`, layers on `threads` threads. `config` describes the whole model.
///
/// # Errors
/// [`WeightsError`] when a tensor is absent, has another shape than the configuration says, or cannot be used or cut.
pub fn load<B: Backend>(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    partition: &Partition,
    backend: &B,
    format: LoadFormat,
    threads: usize,
) -> Result<Decoder<B>, WeightsError> {
    let started = Instant::now();
    checkpoint.will_read_all();
    let loader = Loader {
        checkpoint,
        config,
        partition,
        backend,
        format,
        names: match checkpoint {
            Checkpoint::Gguf(_) => &GGUF_WEIGHTS,
            Checkpoint::Safetensors(_) => &HF_WEIGHTS,
        },
        bytes: AtomicUsize::new(0),
    };
    let decoder = loader.decoder(threads.max(1))?;
    backend
        .finish_loading()
        .map_err(|reason| checkpoint.unsupported(reason))?;
    let (bytes, seconds) = (loader.bytes.into_inner(), started.elapsed().as_secs_f64());
    tracing::info!(
        architecture = config.architecture.name,
        layers = config.num_layers,
        rank = partition.rank,
        threads,
        bytes,
        seconds,
        gigabytes_per_second = bytes as f64 / 1e9 / seconds,
        "weights loaded"
    );
    Ok(decoder)
}

struct Loader<'a, B> {
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    partition: &'a Partition,
    backend: &'a B,
    format: LoadFormat,
    names: &'static WeightMap,
    /// Of the matrices so far, as the checkpoint holds them.
    bytes: AtomicUsize,
}

impl<B: Backend> Loader<'_, B> {
    fn decoder(&self, threads: usize) -> Result<Decoder<B>, WeightsError> {
        thread::scope(|scope| {
            let embedding = scope.spawn(|| self.linear(&self.names.embedding, 0));
            let head = (!self.config.tie_embeddings)
                .then(|| scope.spawn(|| self.linear(&self.names.head, 0)));
            let layers = self.layers(threads)?;
            Ok(Decoder {
                embedding: joined(embedding)?,
                layers,
                final_norm: self.norm(self.names.final_norm, 0, self.config.hidden_size)?,
                head: head.map(joined).transpose()?,
            })
        })
    }

    fn layers(&self, threads: usize) -> Result<Vec<Layer<B>>, WeightsError> {
        let count = self.config.num_layers;
        let next = Mutex::new(0usize);
        let run = || {
            let mut mine = Vec::new();
            loop {
                let index = {
                    let mut next = next
                        .lock()
                        .expect("no loader thread panics holding this: this is a bug");
                    *next += 1;
                    *next - 1
                };
                if index >= count {
                    return Ok(mine);
                }
                mine.push((index, self.layer(index)?));
                if (index + 1).is_multiple_of(count.div_ceil(10)) {
                    tracing::info!(layer = index + 1, layers = count, "loading weights");
                }
            }
        };
        let mut layers: Vec<(usize, Layer<B>)> = thread::scope(|scope| {
            let handles: Vec<_> = (0..threads.min(count)).map(|_| scope.spawn(run)).collect();
            let results = handles.into_iter().map(joined);
            results
                .collect::<Result<Vec<_>, WeightsError>>()
                .map(|parts| parts.into_iter().flatten().collect())
        })?;
        layers.sort_unstable_by_key(|(index, _)| *index);
        Ok(layers.into_iter().map(|(_, layer)| layer).collect())
    }

    fn layer(&self, index: usize) -> Result<Layer<B>, WeightsError> {
        let (config, names) = (self.config, self.names);
        let head_norms = if config.architecture.qk_norm {
            Some(HeadNorms {
                query: self.norm(names.query_norm, index, config.head_dim)?,
                key: self.norm(names.key_norm, index, config.head_dim)?,
            })
        } else {
            None
        };
        let qkv = self.linear(&names.qkv, index)?;
        if config.qkv_bias && qkv.bias.is_none() {
            return Err(self
                .checkpoint
                .mismatch(format!("layer {index} lacks the bias of q, k and v")));
        }
        Ok(Layer {
            input_norm: self.norm(names.input_norm, index, config.hidden_size)?,
            qkv,
            head_norms,
            attention_output: self.linear(&names.attention_output, index)?,
            post_attention_norm: self.norm(names.post_attention_norm, index, config.hidden_size)?,
            mlp: Mlp::Dense {
                gate_up: self.linear(&names.gate_up, index)?,
                down: self.linear(&names.down, index)?,
            },
        })
    }

    fn vector(&self, name: &str, values: Vec<f32>) -> Result<B::Vector, WeightsError> {
        self.backend
            .vector(values)
            .map_err(|reason| self.checkpoint.unsupported(format!("{name}: {reason}")))
    }

    fn norm(&self, template: &str, layer: usize, len: usize) -> Result<B::Vector, WeightsError> {
        let name = template.replace("{}", &layer.to_string());
        if self.format == LoadFormat::Dummy {
            return self.vector(&name, vec![1.0; len]);
        }
        let raw = self.checkpoint.tensor(&name)?;
        let raw = raw.ok_or_else(|| {
            self.checkpoint
                .mismatch(format!("the tensor {name} is missing"))
        })?;
        self.vector(&name, self.plain_values(&name, &raw, len)?)
    }

    fn plain_values(
        &self,
        name: &str,
        raw: &RawTensor<'_>,
        len: usize,
    ) -> Result<Vec<f32>, WeightsError> {
        if (raw.rows, raw.columns) != (1, len) {
            let message = format!(
                "{name} is {} × {}, and 1 × {len} is expected",
                raw.rows, raw.columns
            );
            return Err(self.checkpoint.mismatch(message));
        }
        raw.to_f32().ok_or_else(|| {
            self.checkpoint
                .unsupported(format!("{name} is stored as {:?}", raw.kind))
        })
    }

    fn linear(
        &self,
        entry: &MatrixEntry,
        layer: usize,
    ) -> Result<Linear<B::Matrix, B::Vector>, WeightsError> {
        if self.format == LoadFormat::Dummy {
            return self.random(entry, layer);
        }
        let mut stacked: Vec<Weight<'_>> = Vec::with_capacity(entry.parts.len());
        let (mut out_features, mut in_features) = (0, 0);
        let mut bias: Option<Vec<f32>> = None;
        for part in entry.parts {
            let weight = self.part(entry.shard, part, layer)?;
            if let Some(values) = self.bias(entry.shard, part, layer)? {
                let bias = bias.get_or_insert_with(Vec::new);
                bias.resize(out_features, 0.0);
                bias.extend(values);
            }
            out_features += weight.rows();
            in_features = weight.columns();
            self.bytes.fetch_add(weight.num_bytes(), Ordering::Relaxed);
            stacked.push(weight);
        }
        let name = entry.parts[0].name.replace("{}", &layer.to_string());
        if let Some(bias) = &mut bias {
            bias.resize(out_features, 0.0);
        }
        let bias = bias.map(|values| self.vector(&name, values)).transpose()?;
        let packed = if entry.parts[0].role == Role::Vocabulary {
            self.backend.pack_vocabulary(&stacked)
        } else {
            self.backend.pack(&stacked)
        };
        let parts =
            packed.map_err(|reason| self.checkpoint.unsupported(format!("{name}: {reason}")))?;
        Ok(Linear {
            parts,
            bias,
            shard: entry.shard,
            out_features,
            in_features,
        })
    }

    /// Random values of the right shape.
    fn random(
        &self,
        entry: &MatrixEntry,
        layer: usize,
    ) -> Result<Linear<B::Matrix, B::Vector>, WeightsError> {
        let name = entry.parts[0].name.replace("{}", &layer.to_string());
        let refused = |reason| self.checkpoint.unsupported(format!("{name}: {reason}"));
        let local = |part: &Part| self.local_shape(entry.shard, part.role);
        let out_features = entry.parts.iter().map(|part| local(part).0).sum();
        let in_features = local(&entry.parts[0]).1;
        let seed = name.bytes().fold(self.partition.rank as u64, |hash, byte| {
            hash.wrapping_mul(31).wrapping_add(u64::from(byte))
        });
        let biased = self.config.qkv_bias && entry.parts[0].role == Role::Query;
        let bias = biased
            .then(|| self.vector(&name, vec![0.0; out_features]))
            .transpose()?;
        let parts = match self.config.quantization {
            Some(scheme) if entry.parts[0].role != Role::Vocabulary => {
                let shape = (out_features, in_features);
                self.backend.random_quantized(&scheme, shape, seed)
            }
            _ => {
                let matrix = self.backend.random(out_features, in_features, seed);
                matrix.map(|matrix| vec![matrix])
            }
        };
        Ok(Linear {
            parts: parts.map_err(refused)?,
            bias,
            shard: entry.shard,
            out_features,
            in_features,
        })
    }

    /// The rank's part of a part's matrix, its rows in the order that half-split RoPE needs.
    fn part(&self, shard: Shard, part: &Part, layer: usize) -> Result<Weight<'_>, WeightsError> {
        let mut weight = self.stored(part, layer)?;
        if let Some(cut) = self.partition.cut(shard, part.role) {
            weight = weight.cut(cut).map_err(|reason| {
                let name = part.name.replace("{}", &layer.to_string());
                self.checkpoint.unsupported(format!("{name}: {reason}"))
            })?;
        }
        match weight {
            Weight::Rows(raw) if self.permuted(part.role) => {
                let data = unpermute(&raw.data, raw.row_bytes(), self.config.head_dim);
                Ok(Weight::Rows(RawTensor {
                    data: data.into(),
                    ..raw
                }))
            }
            other => Ok(other),
        }
    }

    /// A part's whole matrix, its shape checked.
    fn stored(&self, part: &Part, layer: usize) -> Result<Weight<'_>, WeightsError> {
        let name = part.name.replace("{}", &layer.to_string());
        let (rows, columns) = self.shape(part.role);
        if let Some(scheme) = &self.config.quantization
            && part.role != Role::Vocabulary
            && let Some(weight) = self.checkpoint.quantized(scheme, &name, (rows, columns))?
        {
            return Ok(weight);
        }
        let name = format!("{name}.weight");
        let raw = self.checkpoint.tensor(&name)?;
        let raw = raw.ok_or_else(|| {
            self.checkpoint
                .mismatch(format!("the tensor {name} is missing"))
        })?;
        if (raw.rows, raw.columns) != (rows, columns) {
            let message = format!(
                "{name} is {} × {}, and {rows} × {columns} is expected",
                raw.rows, raw.columns
            );
            return Err(self.checkpoint.mismatch(message));
        }
        if self.config.quantization == Some(Scheme::Fp8(Fp8Scheme::ONLINE))
            && part.role != Role::Vocabulary
            && let Some(matrix) = Fp8Matrix::quantize(&raw)
        {
            return Ok(Weight::Fp8(matrix));
        }
        Ok(Weight::Rows(raw))
    }

    fn bias(
        &self,
        shard: Shard,
        part: &Part,
        layer: usize,
    ) -> Result<Option<Vec<f32>>, WeightsError> {
        let len = self.shape(part.role).0;
        let name = format!("{}.bias", part.name.replace("{}", &layer.to_string()));
        let Some(raw) = self.checkpoint.tensor(&name)? else {
            return Ok(None);
        };
        let mut values = self.plain_values(&name, &raw, len)?;
        match self.partition.cut(shard, part.role) {
            None => {}
            Some(Cut::Rows(span)) => values = span.take(&values),
            // The ranks' results are summed: one of them brings the bias.
            Some(Cut::Columns(_)) if self.partition.rank == 0 => {}
            Some(Cut::Columns(_)) => return Ok(None),
        }
        if !self.permuted(part.role) {
            return Ok(Some(values));
        }
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        let bytes = unpermute(&bytes, 4, self.config.head_dim);
        Ok(Some(
            bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|word| f32::from_le_bytes(*word))
                .collect(),
        ))
    }

    fn permuted(&self, role: Role) -> bool {
        matches!(self.checkpoint, Checkpoint::Gguf(_))
            && self.config.architecture.gguf_permuted
            && matches!(role, Role::Query | Role::Key)
    }

    /// `(rows, columns)` of the rank's part of a part.
    fn local_shape(&self, shard: Shard, role: Role) -> (usize, usize) {
        let (rows, columns) = self.shape(role);
        match self.partition.cut(shard, role) {
            None => (rows, columns),
            Some(Cut::Rows(Span { padded, .. })) => (padded, columns),
            Some(Cut::Columns(Span { padded, .. })) => (rows, padded),
        }
    }

    /// `(rows, columns)` of a part.
    fn shape(&self, role: Role) -> (usize, usize) {
        let config = self.config;
        let kv_size = config.num_kv_heads * config.head_dim;
        match role {
            Role::Query => (config.attention_size(), config.hidden_size),
            Role::Key | Role::Value => (kv_size, config.hidden_size),
            Role::AttentionOutput => (config.hidden_size, config.attention_size()),
            Role::Gate | Role::Up => (config.intermediate_size, config.hidden_size),
            Role::Down => (config.hidden_size, config.intermediate_size),
            Role::Vocabulary => (config.vocab_size, config.hidden_size),
        }
    }
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    thread
        .join()
        .expect("a loader thread panicked: this is a bug")
}

/// Undoes GGUF's row order for interleaved RoPE: within each head, stored row `2i + half` is row `half·dim/2 + i`.
/// Whole rows move, so quantised blocks stay exact.
fn unpermute(stored: &[u8], row_bytes: usize, head_dim: usize) -> Vec<u8> {
    let mut rows = Vec::with_capacity(stored.len());
    for head in stored.chunks_exact(row_bytes * head_dim) {
        for half in 0..2 {
            for i in 0..head_dim / 2 {
                let row = 2 * i + half;
                rows.extend_from_slice(&head[row * row_bytes..(row + 1) * row_bytes]);
            }
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::unpermute;

    #[test]
    fn unpermute_splits_each_head_into_halves() {
        // Two heads of four rows, two bytes a row; stored order interleaves the halves.
        let stored = [0, 0, 2, 2, 1, 1, 3, 3, 4, 4, 6, 6, 5, 5, 7, 7];
        assert_eq!(
            unpermute(&stored, 2, 4),
            [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
        );
    }
}
