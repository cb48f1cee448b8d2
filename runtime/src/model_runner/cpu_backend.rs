//! [`Backend`] on the CPU.

use crate::{
    engine::request::TokenId,
    models::{
        backend::{AdapterRows, AttentionSeq, Backend, Linear, RopeArgs},
        config::ModelConfig,
    },
    weights::{GgmlType, RawTensor, WeightsError},
};

use super::cpu::KvDtype;

/// Sizes of a [`CpuBackend`].
#[derive(Debug, Clone)]
#[allow(dead_code)] // The int8 and threaded paths read the rest.
pub(super) struct CpuBackendConfig {
    /// f32 weights and arithmetic.
    pub(super) exact: bool,
    /// K and V.
    pub(super) kv_dtype: KvDtype,
    /// Blocks in the pool.
    pub(super) num_blocks: usize,
    /// Tokens in a block.
    pub(super) block_size: usize,
    /// Longest sequence.
    pub(super) max_model_len: usize,
    /// Threads.
    pub(super) threads: usize,
}

/// Rows of f32 activations; grows to the largest step and stays.
#[derive(Debug, Default)]
pub(super) struct CpuBuf {
    data: Vec<f32>,
    rows: usize,
    width: usize,
}

impl CpuBuf {
    /// An empty buffer for rows of `width` values.
    #[must_use]
    pub(super) fn new(width: usize) -> Self {
        Self {
            data: Vec::new(),
            rows: 0,
            width,
        }
    }

    /// All rows, one after another.
    #[must_use]
    pub(super) fn rows(&self) -> &[f32] {
        &self.data[..self.rows * self.width]
    }

    fn set_rows(&mut self, rows: usize) -> &mut [f32] {
        self.rows = rows;
        if self.data.len() < rows * self.width {
            self.data.resize(rows * self.width, 0.0);
        }
        &mut self.data[..rows * self.width]
    }
}

/// Plain f32.
pub(super) struct CpuBackend {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    hidden: usize,
    eps: f32,
    window: usize,
    block_size: usize,
    freqs: Vec<f64>,
    /// Per layer: K then V, `[slots][kv_heads·dim]`.
    kv: Vec<(Vec<f32>, Vec<f32>)>,
}

impl CpuBackend {
    /// Bytes of K and V of one token, all layers.
    #[must_use]
    pub(super) fn kv_bytes_per_token(model: &ModelConfig, _dtype: KvDtype) -> u64 {
        (model.num_layers * 2 * model.num_kv_heads * model.head_dim * 4) as u64
    }

    /// Reserves the KV cache; `None` when it cannot be allocated.
    #[must_use]
    pub(super) fn new(model: &ModelConfig, config: &CpuBackendConfig) -> Option<Self> {
        let len = config.num_blocks * config.block_size * model.num_kv_heads * model.head_dim;
        Some(Self {
            heads: model.num_heads,
            kv_heads: model.num_kv_heads,
            dim: model.head_dim,
            hidden: model.hidden_size,
            eps: model.rms_norm_eps,
            window: model.sliding_window.unwrap_or(usize::MAX),
            block_size: config.block_size,
            freqs: model.rope.inverse_frequencies(model.head_dim),
            kv: (0..model.num_layers)
                .map(|_| (vec![0.0; len], vec![0.0; len]))
                .collect(),
        })
    }

    /// Calls `run` for each of these rows with its index and the row.
    pub(super) fn map_rows<T>(
        &self,
        buf: &mut CpuBuf,
        rows: impl Iterator<Item = usize>,
        run: impl Fn(usize, &mut [f32]) -> T,
    ) -> Vec<T> {
        let width = buf.width;
        rows.enumerate()
            .map(|(index, row)| run(index, &mut buf.data[row * width..(row + 1) * width]))
            .collect()
    }

    fn norm(&self, x: &[f32], weight: &[f32], out: &mut [f32]) {
        let width = weight.len();
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let mean = dot(x, x) / width as f32;
            let scale = 1.0 / (mean + self.eps).sqrt();
            for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
                *out = x * scale * w;
            }
        }
    }
}

/// A plain matrix.
pub(super) struct PlainMatrix {
    values: Vec<f32>,
    columns: usize,
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 32];
    let (a, a_rest) = a.as_chunks::<32>();
    let (b, b_rest) = b.as_chunks::<32>();
    for (a, b) in a.iter().zip(b) {
        for i in 0..32 {
            sums[i] += a[i] * b[i];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

fn dequantise(raw: &RawTensor<'_>) -> Option<Vec<f32>> {
    let f16 = |bytes: &[u8]| half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
    let blocks = raw.data.chunks_exact(raw.kind.block_bytes());
    let mut values = Vec::with_capacity(raw.rows * raw.columns);
    match raw.kind {
        GgmlType::Q4_1 => {
            for block in blocks {
                let (d, m) = (f16(block), f16(&block[2..]));
                values.extend(block[4..].iter().map(|q| f32::from(q & 15) * d + m));
                values.extend(block[4..].iter().map(|q| f32::from(q >> 4) * d + m));
            }
        }
        GgmlType::Q8_0 => {
            for block in blocks {
                let d = f16(block);
                values.extend(block[2..].iter().map(|q| f32::from(*q as i8) * d));
            }
        }
        _ => return raw.to_f32(),
    }
    Some(values)
}

impl Backend for CpuBackend {
    type Buf = CpuBuf;
    type Matrix = PlainMatrix;
    type Vector = Vec<f32>;

    fn pack(&self, matrix: &RawTensor<'_>) -> Result<PlainMatrix, WeightsError> {
        let values = dequantise(matrix).ok_or_else(|| WeightsError::Unsupported {
            path: "the model".to_owned(),
            message: format!("storage type {:?} is not supported", matrix.kind),
        })?;
        Ok(PlainMatrix {
            values,
            columns: matrix.columns,
        })
    }

    fn vector(&self, values: Vec<f32>) -> Vec<f32> {
        values
    }

    fn embed_norm(
        &mut self,
        tokens: &[TokenId],
        embedding: &PlainMatrix,
        norm: &Vec<f32>,
        residual: &mut CpuBuf,
        out: &mut CpuBuf,
    ) {
        let width = self.hidden;
        let rows = residual.set_rows(tokens.len());
        for (row, token) in rows.chunks_exact_mut(width).zip(tokens) {
            row.copy_from_slice(&embedding.values[*token as usize * width..][..width]);
        }
        self.norm(residual.rows(), norm, out.set_rows(tokens.len()));
    }

    fn linear(
        &mut self,
        x: &CpuBuf,
        weight: &Linear<PlainMatrix>,
        _adapters: AdapterRows,
        out: &mut CpuBuf,
    ) {
        out.set_rows(x.rows);
        let mut first = 0;
        for part in &weight.parts {
            for (index, w) in part.values.chunks_exact(part.columns).enumerate() {
                for (row, x) in x.rows().chunks_exact(part.columns).enumerate() {
                    out.data[row * weight.out_features + first + index] = dot(x, w);
                }
            }
            first += part.values.len() / part.columns;
        }
        if let Some(bias) = &weight.bias {
            for row in out.data[..out.rows * out.width].chunks_exact_mut(bias.len()) {
                row.iter_mut()
                    .zip(bias)
                    .for_each(|(out, bias)| *out += bias);
            }
        }
    }

    fn rope_write_kv(&mut self, qkv: &mut CpuBuf, args: &RopeArgs<'_, Vec<f32>>) {
        let (dim, half) = (self.dim, self.dim / 2);
        let kv_size = self.kv_heads * dim;
        for (index, row) in qkv.data[..qkv.rows * qkv.width]
            .chunks_exact_mut(qkv.width)
            .enumerate()
        {
            for head in 0..self.heads + self.kv_heads {
                let head_row = &mut row[head * dim..][..dim];
                if let Some(norms) = args.norms {
                    let input = head_row.to_vec();
                    self.norm(
                        &input,
                        if head < self.heads {
                            &norms.query
                        } else {
                            &norms.key
                        },
                        head_row,
                    );
                }
                for i in 0..half {
                    let (sin, cos) = (f64::from(args.positions[index]) * self.freqs[i]).sin_cos();
                    let (sin, cos) = (sin as f32, cos as f32);
                    let (a, b) = (head_row[i], head_row[i + half]);
                    head_row[i] = a * cos - b * sin;
                    head_row[i + half] = b * cos + a * sin;
                }
            }
            if let Ok(slot) = usize::try_from(args.slot_mapping[index]) {
                let (keys, values) = &mut self.kv[args.layer];
                let start = self.heads * dim;
                keys[slot * kv_size..][..kv_size].copy_from_slice(&row[start..start + kv_size]);
                values[slot * kv_size..][..kv_size].copy_from_slice(&row[start + kv_size..]);
            }
        }
    }

    fn attention(
        &mut self,
        layer: usize,
        qkv: &CpuBuf,
        seqs: &[AttentionSeq<'_>],
        out: &mut CpuBuf,
    ) {
        let (dim, group, kv_size) = (
            self.dim,
            self.heads / self.kv_heads,
            self.kv_heads * self.dim,
        );
        let (keys, values) = &self.kv[layer];
        out.set_rows(qkv.rows);
        let mut scores = Vec::new();
        for seq in seqs {
            for i in 0..seq.query_len {
                let end = seq.context_len - seq.query_len + i + 1;
                let start = end.saturating_sub(self.window);
                let slot = |position: usize| {
                    seq.block_table[position / self.block_size].0 as usize * self.block_size
                        + position % self.block_size
                };
                for head in 0..self.heads {
                    let row = seq.query_start + i;
                    let q = &qkv.data[row * qkv.width + head * dim..][..dim];
                    let at = |position| slot(position) * kv_size + head / group * dim;
                    scores.clear();
                    scores.extend(
                        (start..end).map(|p| dot(q, &keys[at(p)..][..dim]) / (dim as f32).sqrt()),
                    );
                    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    scores
                        .iter_mut()
                        .for_each(|score| *score = (*score - max).exp());
                    let sum: f32 = scores.iter().sum();
                    let out = &mut out.data[row * out.width + head * dim..][..dim];
                    out.fill(0.0);
                    for (score, p) in scores.iter().zip(start..end) {
                        out.iter_mut()
                            .zip(&values[at(p)..][..dim])
                            .for_each(|(out, v)| *out += score / sum * v);
                    }
                }
            }
        }
    }

    fn silu_mul(&mut self, gate_up: &CpuBuf, out: &mut CpuBuf) {
        let width = out.width;
        let rows = out.set_rows(gate_up.rows);
        for (row, out) in gate_up
            .rows()
            .chunks_exact(2 * width)
            .zip(rows.chunks_exact_mut(width))
        {
            for i in 0..width {
                out[i] = row[i] / (1.0 + (-row[i]).exp()) * row[width + i];
            }
        }
    }

    fn reduce_add_norm(
        &mut self,
        delta: &CpuBuf,
        norm: &Vec<f32>,
        residual: &mut CpuBuf,
        out: &mut CpuBuf,
    ) {
        residual
            .data
            .iter_mut()
            .zip(delta.rows())
            .for_each(|(residual, delta)| *residual += delta);
        self.norm(residual.rows(), norm, out.set_rows(residual.rows));
    }

    fn keep_rows(&mut self, rows: &[u32], buf: &mut CpuBuf) {
        for (to, from) in rows.iter().enumerate() {
            let from = *from as usize * buf.width;
            buf.data.copy_within(from..from + buf.width, to * buf.width);
        }
        buf.rows = rows.len();
    }

    fn logits(&mut self, x: &CpuBuf, head: &Linear<PlainMatrix>, out: &mut CpuBuf) {
        self.linear(x, head, AdapterRows, out);
    }
}
