//! [`Backend`] on the CPU: the host kernels of `ashlar-kernels`, their thread pool and the KV cache of every layer.
//!
//! Activations are f32 rows. Where a matrix is quantised its input is quantised to int8 once, for all its parts.

mod pack;
mod place;
mod rows;
mod split;

use ashlar_kernels::cpu::{
    self as kernels, AttentionArgs, BlockFormat, KvLayout, LayerCache, PackedMatrix, QuantizedRows,
    ThreadPool,
    attention::{BLOCK_SIZE, paged_attention},
    elementwise,
};

pub(super) use self::rows::CpuBuf;
use self::{pack::pack, place::Place};
use super::{
    cpu::KvDtype,
    ranks::{Member, RankError},
};
use crate::{
    engine::request::TokenId,
    models::{
        backend::{AdapterRows, AttentionSeq, Backend, HeadNorms, Linear, RopeArgs},
        config::ModelConfig,
    },
    sampler::philox4x32,
    weights::{GgmlType, RawTensor, Weight, cut::Span},
};

/// Sizes of a [`CpuBackend`].
#[derive(Debug, Clone)]
pub(super) struct CpuBackendConfig {
    /// Weights are dequantised exactly to f32.
    pub(super) exact: bool,
    /// K and V; [`KvDtype::Auto`] has been resolved.
    pub(super) kv_dtype: KvDtype,
    /// Of each layer's K and V where they are eight-bit floats; none means 1.
    pub(super) kv_scales: Vec<[f32; 2]>,
    /// Blocks in the pool.
    pub(super) num_blocks: u32,
    /// Threads, the engine's own included.
    pub(super) threads: usize,
}

/// The CPU as a device.
pub(super) struct CpuBackend {
    pool: ThreadPool,
    exact: bool,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    eps: f32,
    window: Option<usize>,
    /// Angular frequencies, `[head_dim / 2]`.
    frequencies: Vec<f64>,
    /// Cosines and sines of the step's rows, `[rows, head_dim / 2]`, computed in its first layer.
    cos: Vec<f32>,
    sin: Vec<f32>,
    caches: Vec<LayerCache>,
    quantized: QuantizedRows,
    /// Rows of [`Self::linear_in_two`], `[2 · rows, columns]`, and their products.
    split: Vec<f32>,
    products: Vec<f32>,
    /// Among several ranks.
    place: Option<Place>,
}

/// The kernels' name of a K and V type.
fn kernel_dtype(dtype: KvDtype) -> kernels::KvDtype {
    match dtype {
        KvDtype::Auto | KvDtype::Float16 => kernels::KvDtype::F16,
        KvDtype::Float32 => kernels::KvDtype::F32,
        KvDtype::Fp8 => kernels::KvDtype::F8,
    }
}

fn layout(model: &ModelConfig, dtype: KvDtype, num_blocks: u32) -> KvLayout {
    KvLayout {
        num_blocks: num_blocks as usize,
        kv_heads: model.num_kv_heads,
        head_dim: model.head_dim,
        dtype: kernel_dtype(dtype),
    }
}

impl CpuBackend {
    /// Bytes of K and V of one token, all layers.
    pub(super) fn kv_bytes_per_token(model: &ModelConfig, dtype: KvDtype) -> u64 {
        (layout(model, dtype, 1).block_bytes() / BLOCK_SIZE * model.num_layers) as u64
    }

    /// Starts the threads and reserves the KV cache; `None` when that cannot be allocated. `model` has a rank's own sizes,
    /// `place` says which, of several, and what of the vocabulary it holds.
    pub(super) fn new(
        model: &ModelConfig,
        config: &CpuBackendConfig,
        place: Option<(Member, Span)>,
    ) -> Option<Self> {
        let layout = layout(model, config.kv_dtype, config.num_blocks);
        Some(Self {
            pool: ThreadPool::new(config.threads),
            exact: config.exact,
            heads: model.num_heads,
            kv_heads: model.num_kv_heads,
            head_dim: model.head_dim,
            eps: model.rms_norm_eps,
            window: model.sliding_window,
            frequencies: model.rope.inverse_frequencies(model.head_dim),
            cos: Vec::new(),
            sin: Vec::new(),
            caches: (0..model.num_layers)
                .map(|layer| {
                    let scales = config.kv_scales.get(layer).copied().unwrap_or([1.0; 2]);
                    LayerCache::new(layout).map(|cache| cache.with_scales(scales))
                })
                .collect::<Option<_>>()?,
            quantized: QuantizedRows::default(),
            split: Vec::new(),
            products: Vec::new(),
            place: place.map(|(member, vocabulary)| Place {
                member,
                vocabulary,
                sum: Vec::new(),
                logits: CpuBuf::new(vocabulary.padded),
                error: None,
            }),
        })
    }

    /// Why the step that has run cannot be used.
    pub(super) fn take_error(&mut self) -> Result<(), RankError> {
        let place = self.place.as_mut();
        place
            .and_then(|place| place.error.take())
            .map_or(Ok(()), Err)
    }

    fn compute_angles(&mut self, positions: &[u32]) {
        self.cos.clear();
        self.sin.clear();
        for position in positions {
            for frequency in &self.frequencies {
                let (sin, cos) = (f64::from(*position) * frequency).sin_cos();
                self.cos.push(cos as f32);
                self.sin.push(sin as f32);
            }
        }
    }

    /// Norms and rotates the q and k heads of one row.
    fn rotate_row(&self, row: usize, qk: &mut [f32], norms: Option<&HeadNorms<Vec<f32>>>) {
        let half = self.head_dim / 2;
        let (cos, sin) = (
            &self.cos[row * half..][..half],
            &self.sin[row * half..][..half],
        );
        for (index, head) in qk.chunks_exact_mut(self.head_dim).enumerate() {
            if let Some(norms) = norms {
                let weight = if index < self.heads {
                    &norms.query
                } else {
                    &norms.key
                };
                elementwise::head_norm(head, weight, self.eps);
            }
            elementwise::rope(head, cos, sin);
        }
    }
}

impl Backend for CpuBackend {
    type Buf = CpuBuf;
    type Matrix = PackedMatrix;
    type Vector = Vec<f32>;

    fn pack(&self, stacked: &[Weight<'_>]) -> Result<Vec<PackedMatrix>, String> {
        let of_one_type = stacked.chunk_by(|a, b| match (a, b) {
            (Weight::Rows(a), Weight::Rows(b)) => a.kind == b.kind,
            (Weight::Int4(a), Weight::Int4(b)) => a.group == b.group,
            _ => false,
        });
        let packed = of_one_type.map(|parts| match &parts[0] {
            Weight::Rows(_) => self.pack_rows(parts),
            Weight::Int4(_) => self.pack_int4(parts),
            Weight::Fp8(matrix) => self.pack_fp8(matrix),
        });
        packed.collect()
    }

    fn vector(&self, values: Vec<f32>) -> Result<Vec<f32>, String> {
        Ok(values)
    }

    fn random(&self, rows: usize, columns: usize, seed: u64) -> Result<PackedMatrix, String> {
        let scale = 1.0 / (columns as f32).sqrt();
        let data = (0..(rows * columns) as u64).flat_map(|index| {
            let [word, ..] = philox4x32(
                [index as u32, (index >> 32) as u32, 0, 0],
                [seed as u32, (seed >> 32) as u32],
            );
            half::bf16::from_f32((word as f32 / 2_147_483_648.0 - 1.0) * scale).to_le_bytes()
        });
        let raw = RawTensor {
            kind: GgmlType::BF16,
            rows,
            columns,
            data: data.collect::<Vec<u8>>().into(),
        };
        pack(&raw, BlockFormat::BF16, self.exact).map_err(|error| error.to_string())
    }

    fn embed_norm(
        &mut self,
        tokens: &[TokenId],
        embedding: &PackedMatrix,
        norm: &Vec<f32>,
        residual: &mut CpuBuf,
        out: &mut CpuBuf,
    ) {
        let width = residual.width;
        let held = self.place.as_ref().map(|place| place.vocabulary);
        let held = held.unwrap_or(Span::whole(embedding.rows()));
        self.for_rows(residual.with_rows(tokens.len()), width, |first, rows| {
            for (row, token) in rows.chunks_exact_mut(width).zip(&tokens[first..]) {
                match (*token as usize).checked_sub(held.start) {
                    Some(index) if index < held.len => embedding.dequantize_row(index, row),
                    _ => row.fill(0.0),
                }
            }
        });
        if let Some(place) = &mut self.place {
            let sum = place.sum(residual.values());
            residual.values_mut().copy_from_slice(sum);
        }
        elementwise::rms_norm(
            &self.pool,
            residual.values(),
            norm,
            self.eps,
            out.with_rows(tokens.len()),
        );
    }

    fn linear(
        &mut self,
        x: &CpuBuf,
        weight: &Linear<PackedMatrix, Vec<f32>>,
        _adapters: AdapterRows,
        out: &mut CpuBuf,
    ) {
        let (parts, bias) = (&weight.parts, weight.bias.as_deref());
        let y = out.with_rows(x.rows);
        if parts.iter().any(PackedMatrix::is_quantized) {
            self.linear_in_two(x, weight, y);
        } else {
            kernels::linear(&self.pool, parts, bias, x.values(), &mut self.quantized, y);
        }
    }

    fn rope_write_kv(&mut self, qkv: &mut CpuBuf, args: &RopeArgs<'_, Vec<f32>>) {
        if args.layer == 0 {
            self.compute_angles(args.positions);
        }
        let (q_size, kv_size) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let width = qkv.width;
        self.for_rows(qkv.values_mut(), width, |first, rows| {
            for (index, row) in rows.chunks_exact_mut(width).enumerate() {
                self.rotate_row(first + index, &mut row[..q_size + kv_size], args.norms);
            }
        });
        self.caches[args.layer].write(
            &self.pool,
            args.slot_mapping,
            qkv.values(),
            width,
            q_size,
            q_size + kv_size,
        );
    }

    fn attention(
        &mut self,
        layer: usize,
        qkv: &CpuBuf,
        seqs: &[AttentionSeq<'_>],
        out: &mut CpuBuf,
    ) {
        let seqs: Vec<kernels::AttentionSeq<'_>> = seqs
            .iter()
            .map(|seq| kernels::AttentionSeq {
                query_start: seq.query_start,
                query_len: seq.query_len,
                context_len: seq.context_len,
                block_table: seq.block_table,
            })
            .collect();
        let args = AttentionArgs {
            q: qkv.values(),
            q_stride: qkv.width,
            heads: self.heads,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            window: self.window,
            seqs: &seqs,
        };
        paged_attention(
            &self.pool,
            &self.caches[layer],
            &args,
            out.with_rows(qkv.rows),
        );
    }

    fn silu_mul(&mut self, gate_up: &mut CpuBuf, out: &mut CpuBuf) {
        let width = out.width;
        elementwise::silu_mul(
            &self.pool,
            gate_up.values(),
            width,
            out.with_rows(gate_up.rows),
        );
    }

    fn reduce_add_norm(
        &mut self,
        delta: &mut CpuBuf,
        norm: &Vec<f32>,
        residual: &mut CpuBuf,
        out: &mut CpuBuf,
    ) {
        let out = out.with_rows(delta.rows);
        let delta = match &mut self.place {
            Some(place) => place.sum(delta.values()),
            None => delta.values(),
        };
        elementwise::add_rms_norm(
            &self.pool,
            delta,
            norm,
            self.eps,
            residual.values_mut(),
            out,
        );
    }

    fn keep_rows(&mut self, rows: &[u32], buf: &mut CpuBuf) {
        let width = buf.width;
        for (to, from) in rows.iter().enumerate() {
            let from = *from as usize * width;
            buf.data.copy_within(from..from + width, to * width);
        }
        buf.rows = rows.len();
    }

    fn logits(&mut self, x: &CpuBuf, head: &Linear<PackedMatrix, Vec<f32>>, out: &mut CpuBuf) {
        let Some(mut place) = self.place.take() else {
            self.linear(x, head, AdapterRows, out);
            return;
        };
        self.linear(x, head, AdapterRows, &mut place.logits);
        place.gather(out);
        self.place = Some(place);
    }
}
