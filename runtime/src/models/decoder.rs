//! The decoder of the Llama family, once, for every model and every device.
//!
//! A step runs all its rows, prefill and decode together, through the layers. In the last layer only the rows whose
//! logits are wanted go on after their K and V are written: a prompt of 1,000 tokens runs one row through the last
//! attention, MLP and head. That changes no result, because rows do not influence each other (see
//! [`super::backend`]).

use std::borrow::Cow;

use super::backend::{AdapterRows, AttentionSeq, Backend, HeadNorms, Linear, RopeArgs};
use crate::model_runner::ModelInput;

/// The feed-forward part of a layer.
#[derive(Debug)]
pub enum Mlp<M, V> {
    /// `down(silu(gate(x)) · up(x))`
    Dense {
        /// gate and up, stacked.
        gate_up: Linear<M, V>,
        /// down.
        down: Linear<M, V>,
    },
}

/// One layer's weights.
pub struct Layer<B: Backend> {
    /// Before attention.
    pub input_norm: B::Vector,
    /// q, k and v, stacked.
    pub qkv: Linear<B::Matrix, B::Vector>,
    /// Per-head norms of q and k.
    pub head_norms: Option<HeadNorms<B::Vector>>,
    /// After attention.
    pub attention_output: Linear<B::Matrix, B::Vector>,
    /// Before the MLP.
    pub post_attention_norm: B::Vector,
    /// The MLP.
    pub mlp: Mlp<B::Matrix, B::Vector>,
}

/// A whole model's weights.
pub struct Decoder<B: Backend> {
    /// `[vocab, hidden]`, one part.
    pub embedding: Linear<B::Matrix, B::Vector>,
    /// At least one.
    pub layers: Vec<Layer<B>>,
    /// Before the head.
    pub final_norm: B::Vector,
    /// The head, unless it is the embedding.
    pub head: Option<Linear<B::Matrix, B::Vector>>,
}

/// Activations of a step, reused from step to step.
pub struct Activations<B: Backend> {
    /// The residual stream, `[rows, hidden]`.
    pub residual: B::Buf,
    /// What a matrix reads, `[rows, hidden]`.
    pub normed: B::Buf,
    /// `[rows, qkv]`
    pub qkv: B::Buf,
    /// `[rows, heads · head_dim]`
    pub attention: B::Buf,
    /// What a block adds to the residual stream, `[rows, hidden]`.
    pub delta: B::Buf,
    /// `[rows, 2 · intermediate]`
    pub gate_up: B::Buf,
    /// `[rows, intermediate]`
    pub mlp: B::Buf,
    /// `[logit_rows, vocab]`
    pub logits: B::Buf,
    /// All block tables of the step, one after another.
    pub blocks: Vec<u32>,
}

impl<B: Backend> Decoder<B> {
    /// Runs a step without hidden rows; afterwards `act.logits` holds one row for each of `input.logit_rows` (unchanged
    /// if there is none).
    ///
    /// The caller has checked the input: rows, block tables and slots are within the backend's sizes.
    pub fn forward(&self, backend: &mut B, input: &ModelInput, act: &mut Activations<B>) {
        self.hidden(backend, input, act);
        if !input.logit_rows.is_empty() {
            self.logits(backend, act);
        }
    }

    /// Runs a step up to the head; afterwards `act.normed` holds the final hidden states of `input.logit_rows` and
    /// `input.hidden_rows` together, in row order (unchanged if there is none).
    ///
    /// The caller has checked the input, as for [`forward`](Self::forward).
    pub fn hidden(&self, backend: &mut B, input: &ModelInput, act: &mut Activations<B>) {
        let mut blocks = std::mem::take(&mut act.blocks);
        blocks.clear();
        blocks.extend(
            input
                .seqs
                .iter()
                .flat_map(|seq| seq.block_table.iter().map(|block| block.0)),
        );
        self.run(backend, input, &blocks, act);
        act.blocks = blocks;
    }

    /// Computes `act.logits` from `act.normed`.
    pub fn logits(&self, backend: &mut B, act: &mut Activations<B>) {
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        backend.logits(&act.normed, head, &mut act.logits);
    }

    fn run(&self, backend: &mut B, input: &ModelInput, blocks: &[u32], act: &mut Activations<B>) {
        let all = attention_seqs(input, blocks);
        let last_layer = self.layers.len() - 1;
        let first_norm = &self.layers[0].input_norm;
        backend.embed_norm(
            &input.token_ids,
            &self.embedding.parts[0],
            first_norm,
            &mut act.residual,
            &mut act.normed,
        );
        for (index, layer) in self.layers.iter().enumerate() {
            backend.linear(&act.normed, &layer.qkv, AdapterRows, &mut act.qkv);
            let args = RopeArgs {
                layer: index,
                norms: layer.head_norms.as_ref(),
                positions: &input.positions,
                slot_mapping: &input.slot_mapping,
            };
            backend.rope_write_kv(&mut act.qkv, &args);
            if index < last_layer {
                backend.attention(index, &act.qkv, &all, &mut act.attention);
                self.finish_layer(backend, layer, &self.layers[index + 1].input_norm, act);
                continue;
            }
            let rows = wanted_rows(input);
            if rows.is_empty() {
                return;
            }
            let wanted = wanted_seqs(&rows, &all);
            if rows.len() < input.token_ids.len() {
                backend.keep_rows(&rows, &mut act.qkv);
                backend.keep_rows(&rows, &mut act.residual);
            }
            backend.attention(index, &act.qkv, &wanted, &mut act.attention);
            self.finish_layer(backend, layer, &self.final_norm, act);
        }
    }

    /// From the attention's result to the next norm's.
    fn finish_layer(
        &self,
        backend: &mut B,
        layer: &Layer<B>,
        next_norm: &B::Vector,
        act: &mut Activations<B>,
    ) {
        backend.linear(
            &act.attention,
            &layer.attention_output,
            AdapterRows,
            &mut act.delta,
        );
        backend.reduce_add_norm(
            &mut act.delta,
            &layer.post_attention_norm,
            &mut act.residual,
            &mut act.normed,
        );
        match &layer.mlp {
            Mlp::Dense { gate_up, down } => {
                backend.linear(&act.normed, gate_up, AdapterRows, &mut act.gate_up);
                backend.silu_mul(&mut act.gate_up, &mut act.mlp);
                backend.linear(&act.mlp, down, AdapterRows, &mut act.delta);
            }
        }
        backend.reduce_add_norm(
            &mut act.delta,
            next_norm,
            &mut act.residual,
            &mut act.normed,
        );
    }
}

/// Every row of the step.
fn attention_seqs<'a>(input: &ModelInput, blocks: &'a [u32]) -> Vec<AttentionSeq<'a>> {
    let mut rest = blocks;
    let whole = input.seqs.iter().map(|seq| {
        let (block_table, after) = rest.split_at(seq.block_table.len());
        rest = after;
        AttentionSeq {
            query_start: seq.query_start as usize,
            query_len: seq.query_len as usize,
            context_len: seq.context_len as usize,
            block_table,
        }
    });
    whole.collect()
}

/// Rows whose result is wanted, as logits or as hidden states, ascending.
fn wanted_rows(input: &ModelInput) -> Cow<'_, [u32]> {
    if input.hidden_rows.is_empty() {
        return Cow::Borrowed(&input.logit_rows);
    }
    let mut rows = [input.logit_rows.as_slice(), &input.hidden_rows].concat();
    rows.sort_unstable();
    Cow::Owned(rows)
}

/// These rows, numbered as they stand after all others have been dropped: one entry per run of adjacent rows of a
/// sequence, ending where its last row ends.
fn wanted_seqs<'a>(rows: &[u32], seqs: &[AttentionSeq<'a>]) -> Vec<AttentionSeq<'a>> {
    let row_at = |index: usize| rows.get(index).map(|row| *row as usize);
    let mut wanted = Vec::with_capacity(seqs.len());
    let mut next = 0;
    for seq in seqs {
        let end = seq.query_start + seq.query_len;
        while let Some(first) = row_at(next).filter(|row| *row < end) {
            let run_start = next;
            while row_at(next).is_some_and(|row| row < end && row - first == next - run_start) {
                next += 1;
            }
            let last = first + (next - run_start) - 1;
            wanted.push(AttentionSeq {
                query_start: run_start,
                query_len: next - run_start,
                context_len: seq.context_len - (end - 1 - last),
                block_table: seq.block_table,
            });
        }
    }
    wanted
}

#[cfg(test)]
mod tests;
