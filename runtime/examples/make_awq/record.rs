//! The decoder on plain 32-bit floats, one sequence at a time, that keeps what every linear layer reads.

use std::sync::Arc;

use ashlar::{
    engine::request::TokenId,
    kv_cache::BlockId,
    model_runner::{ModelInput, SeqInput, Slot},
    models::{
        backend::{AdapterRows, AttentionSeq, Backend, Linear, RopeArgs},
        config::ModelConfig,
        decoder::{Activations, Decoder},
    },
    weights::{GgmlType, RawTensor, Weight},
};
use ashlar_kernels::cpu::{
    self as kernels, BlockFormat, PackedMatrix, QuantizedRows, ThreadPool, elementwise,
};

/// Rows of activations.
#[derive(Debug, Default)]
pub(crate) struct Rows {
    data: Vec<f32>,
    width: usize,
}

impl Rows {
    fn new(width: usize) -> Self {
        Self {
            data: Vec::new(),
            width,
        }
    }

    fn count(&self) -> usize {
        self.data.len() / self.width
    }

    fn resize(&mut self, rows: usize) -> &mut [f32] {
        self.data.resize(rows * self.width, 0.0);
        &mut self.data
    }
}

/// A linear layer's inputs, `[rows, width]`.
#[derive(Debug)]
pub(crate) struct Inputs {
    pub(crate) values: Vec<f32>,
    pub(crate) width: usize,
}

/// Computes and keeps.
pub(crate) struct Recorder {
    pub(crate) pool: ThreadPool,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    eps: f32,
    frequencies: Vec<f64>,
    scratch: QuantizedRows,
    /// Of q, k, v; of the attention's output; of gate and up; of down; layer after layer.
    pub(crate) inputs: Vec<Inputs>,
}

impl Recorder {
    pub(crate) fn new(config: &ModelConfig, threads: usize) -> Self {
        Self {
            pool: ThreadPool::new(threads),
            heads: config.num_heads,
            kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            eps: config.rms_norm_eps,
            frequencies: config.rope.inverse_frequencies(config.head_dim),
            scratch: QuantizedRows::default(),
            inputs: Vec::new(),
        }
    }

    /// Runs one sequence through all layers.
    pub(crate) fn run(
        &mut self,
        decoder: &Decoder<Self>,
        config: &ModelConfig,
        tokens: &[TokenId],
    ) {
        let rows = tokens.len() as u32;
        let input = ModelInput {
            token_ids: tokens.to_vec(),
            positions: (0..rows).collect(),
            slot_mapping: (0..i64::from(rows)).collect(),
            seqs: vec![SeqInput {
                slot: Slot(0),
                query_start: 0,
                query_len: rows,
                context_len: rows,
                block_table: vec![BlockId(0)],
            }],
            // All rows go through the last layer.
            logit_rows: (0..rows).collect(),
            ..ModelInput::default()
        };
        let mut activations = Activations {
            residual: Rows::new(config.hidden_size),
            normed: Rows::new(config.hidden_size),
            qkv: Rows::new(config.qkv_size()),
            attention: Rows::new(config.attention_size()),
            delta: Rows::new(config.hidden_size),
            gate_up: Rows::new(2 * config.intermediate_size),
            mlp: Rows::new(config.intermediate_size),
            logits: Rows::new(config.vocab_size),
            blocks: Vec::new(),
        };
        decoder.forward(self, &input, &mut activations);
    }

    /// One query head of one row over all rows before it.
    fn attend(&self, qkv: &Rows, row: usize, head: usize, out: &mut [f32]) {
        let dim = self.head_dim;
        let (width, kv) = (qkv.width, head / (self.heads / self.kv_heads));
        let at = |row: usize, offset: usize| &qkv.data[row * width + offset * dim..][..dim];
        let query = at(row, head);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let scores: Vec<f32> = (0..=row)
            .map(|past| dot(query, at(past, self.heads + kv)) / (dim as f32).sqrt())
            .collect();
        let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let total: f32 = scores.iter().map(|score| (score - largest).exp()).sum();
        out.fill(0.0);
        for (past, score) in scores.iter().enumerate() {
            let share = (score - largest).exp() / total;
            let value = at(past, self.heads + self.kv_heads + kv);
            out.iter_mut()
                .zip(value)
                .for_each(|(out, value)| *out += share * value);
        }
    }
}

/// All values of a tensor, in 32 bits.
fn values(raw: &RawTensor<'_>) -> Result<Vec<f32>, String> {
    if let Some(values) = raw.to_f32() {
        return Ok(values);
    }
    let format = match raw.kind {
        GgmlType::Q4_0 => BlockFormat::Q4_0,
        GgmlType::Q4_1 => BlockFormat::Q4_1,
        GgmlType::Q8_0 => BlockFormat::Q8_0,
        other => return Err(format!("this tool does not read {other:?}")),
    };
    let mut values = vec![0.0; raw.rows * raw.columns];
    let result = format.dequantize(&raw.data, &mut values);
    result.map(|()| values).map_err(|error| error.to_string())
}

impl Backend for Recorder {
    type Buf = Rows;
    type Matrix = Arc<PackedMatrix>;
    type Vector = Vec<f32>;

    fn pack(&self, stacked: &[Weight<'_>]) -> Result<Vec<Self::Matrix>, String> {
        let (rows, columns) = (stacked.iter().map(Weight::rows).sum(), stacked[0].columns());
        let mut all = Vec::with_capacity(rows * columns);
        for part in stacked {
            all.extend(match part {
                Weight::Rows(raw) => values(raw)?,
                Weight::Int4(_) | Weight::Fp8(_) => {
                    return Err("the model is quantised already".to_owned());
                }
            });
        }
        let packed = PackedMatrix::from_f32(rows, columns, &all);
        Ok(vec![Arc::new(packed.map_err(|error| error.to_string())?)])
    }

    fn vector(&self, values: Vec<f32>) -> Result<Vec<f32>, String> {
        Ok(values)
    }

    fn random(&self, _: usize, _: usize, _: u64) -> Result<Self::Matrix, String> {
        Err("random weights are of no use here".to_owned())
    }

    fn embed_norm(
        &mut self,
        tokens: &[TokenId],
        embedding: &Self::Matrix,
        norm: &Vec<f32>,
        residual: &mut Rows,
        out: &mut Rows,
    ) {
        let width = residual.width;
        let rows = residual.resize(tokens.len()).chunks_exact_mut(width);
        for (row, token) in rows.zip(tokens) {
            embedding.dequantize_row(*token as usize, row);
        }
        let out = out.resize(tokens.len());
        elementwise::rms_norm(&self.pool, &residual.data, norm, self.eps, out);
    }

    fn linear(
        &mut self,
        x: &Rows,
        weight: &Linear<Self::Matrix, Vec<f32>>,
        _: AdapterRows,
        out: &mut Rows,
    ) {
        self.inputs.push(Inputs {
            values: x.data.clone(),
            width: x.width,
        });
        let part = std::slice::from_ref(&*weight.parts[0]);
        let (bias, y) = (weight.bias.as_deref(), out.resize(x.count()));
        kernels::linear(&self.pool, part, bias, &x.data, &mut self.scratch, y);
    }

    fn rope_write_kv(&mut self, qkv: &mut Rows, args: &RopeArgs<'_, Vec<f32>>) {
        let width = qkv.width;
        for (row, position) in qkv.data.chunks_exact_mut(width).zip(args.positions) {
            let angles = self.frequencies.iter().map(|f| f64::from(*position) * f);
            let (sin, cos): (Vec<f32>, Vec<f32>) = angles
                .map(|angle| (angle.sin() as f32, angle.cos() as f32))
                .unzip();
            let rotated = (self.heads + self.kv_heads) * self.head_dim;
            let heads = row[..rotated].chunks_exact_mut(self.head_dim);
            for (index, head) in heads.enumerate() {
                if let Some(norms) = args.norms {
                    let query = index < self.heads;
                    let weight = if query { &norms.query } else { &norms.key };
                    elementwise::head_norm(head, weight, self.eps);
                }
                elementwise::rope(head, &cos, &sin);
            }
        }
    }

    fn attention(&mut self, _: usize, qkv: &Rows, _: &[AttentionSeq<'_>], out: &mut Rows) {
        let (count, width, threads) = (qkv.count(), out.width, self.pool.threads());
        let rows: Vec<(usize, &mut [f32])> = out
            .resize(count)
            .chunks_exact_mut(width)
            .enumerate()
            .collect();
        // Dealt out like cards: later rows look at more.
        let mut hands: Vec<Vec<(usize, &mut [f32])>> = (0..threads).map(|_| Vec::new()).collect();
        for (index, row) in rows {
            hands[index % threads].push((index, row));
        }
        let this = &*self;
        std::thread::scope(|scope| {
            for hand in hands {
                scope.spawn(move || {
                    for (row, out) in hand {
                        for (head, out) in out.chunks_exact_mut(this.head_dim).enumerate() {
                            this.attend(qkv, row, head, out);
                        }
                    }
                });
            }
        });
    }

    fn silu_mul(&mut self, gate_up: &mut Rows, out: &mut Rows) {
        let width = out.width;
        let out = out.resize(gate_up.count());
        elementwise::silu_mul(&self.pool, &gate_up.data, width, out);
    }

    fn reduce_add_norm(
        &mut self,
        delta: &mut Rows,
        norm: &Vec<f32>,
        residual: &mut Rows,
        out: &mut Rows,
    ) {
        let out = out.resize(delta.count());
        elementwise::add_rms_norm(
            &self.pool,
            &delta.data,
            norm,
            self.eps,
            &mut residual.data,
            out,
        );
    }

    fn keep_rows(&mut self, _: &[u32], _: &mut Rows) {
        unreachable!("logits of all rows are asked for");
    }

    /// Nothing reads them.
    fn logits(&mut self, _: &Rows, _: &Linear<Self::Matrix, Vec<f32>>, _: &mut Rows) {}
}
