//! The seam between the decoder and a device, at the fusion level of a GPU: one call is one launch there.
//!
//! Every operation works on whole batches of rows. Two rules hold on every backend:
//! - the result of a row depends on that row's inputs and its sequence's K and V alone, bit for bit, whatever else is
//!   in the batch;
//! - [`Backend::rope_write_kv`] of a layer has written all rows' K and V when [`Backend::attention`] of that layer
//!   starts, so a row may attend to blocks that another row of the same step has written.

use super::registry::Shard;
use crate::{
    engine::request::TokenId,
    weights::{Scheme, Weight},
};

/// A matrix `[out, in]` made of stacked parts (one per storage type), with its bias.
#[derive(Debug)]
pub struct Linear<M, V> {
    /// Stacked along the output.
    pub parts: Vec<M>,
    /// `[out]`
    pub bias: Option<V>,
    /// How it was cut.
    pub shard: Shard,
    /// Rows of all parts.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
}

/// Which adapter each row runs. No adapter can be loaded yet: every row runs the base model.
#[derive(Debug, Clone, Copy, Default)]
pub struct AdapterRows;

/// Adjacent rows of one sequence that attend together.
#[derive(Debug, Clone, Copy)]
pub struct AttentionSeq<'a> {
    /// First of its rows.
    pub query_start: usize,
    /// Number of its rows.
    pub query_len: usize,
    /// Tokens up to and including its last row: row `i` sees the first `context_len − query_len + i + 1`.
    pub context_len: usize,
    /// Logical → physical blocks.
    pub block_table: &'a [u32],
}

/// RMS norms of each head's q and k, `[head_dim]` each.
#[derive(Debug)]
pub struct HeadNorms<V> {
    /// For q.
    pub query: V,
    /// For k.
    pub key: V,
}

/// Where [`Backend::rope_write_kv`] works.
#[derive(Debug)]
pub struct RopeArgs<'a, V> {
    /// The layer whose cache is written.
    pub layer: usize,
    /// Norms applied before the rotation, in models that have them.
    pub norms: Option<&'a HeadNorms<V>>,
    /// `[rows]` absolute positions.
    pub positions: &'a [u32],
    /// `[rows]` cache slots, or [`PADDING`](crate::model_runner::PADDING).
    pub slot_mapping: &'a [i64],
}

/// Computes the decoder's operations on one device. Shapes are `[rows, width]`; outputs take the rows of the input.
pub trait Backend: Sync {
    /// Activations of a step.
    type Buf;
    /// A packed weight matrix.
    type Matrix: Send + Sync;
    /// A norm's weights.
    type Vector: Send + Sync;

    /// Repacks matrices of one width, stacked along their rows, for the device: one result for each storage type that the
    /// device keeps apart.
    ///
    /// # Errors
    /// What about a storage type or shape cannot be computed with.
    fn pack(&self, stacked: &[Weight<'_>]) -> Result<Vec<Self::Matrix>, String>;

    /// [`Self::pack`] of the embedding or the head.
    ///
    /// # Errors
    /// What about a storage type or shape cannot be computed with.
    fn pack_vocabulary(&self, stacked: &[Weight<'_>]) -> Result<Vec<Self::Matrix>, String> {
        self.pack(stacked)
    }

    /// Takes a norm's weights or a bias.
    ///
    /// # Errors
    /// Why the device cannot hold it.
    fn vector(&self, values: Vec<f32>) -> Result<Self::Vector, String>;

    /// A matrix of random values that depend on the seed alone, for models without weights.
    ///
    /// # Errors
    /// Why the device cannot hold it.
    fn random(&self, rows: usize, columns: usize, seed: u64) -> Result<Self::Matrix, String>;

    /// The same, stored as a scheme says.
    ///
    /// # Errors
    /// Why the device cannot hold it.
    fn random_quantized(
        &self,
        scheme: &Scheme,
        shape: (usize, usize),
        seed: u64,
    ) -> Result<Vec<Self::Matrix>, String> {
        self.pack(&[scheme.random(shape, seed)?])
    }

    /// Called once all weights were handed over: waits until the device has them, and frees what loading needed.
    ///
    /// # Errors
    /// Why the device could not take them.
    fn finish_loading(&self) -> Result<(), String> {
        Ok(())
    }

    /// `residual = embedding[tokens]`, `out = norm(residual)`; a rank that does not hold a token's row gets it from the one
    /// that does.
    fn embed_norm(
        &mut self,
        tokens: &[TokenId],
        embedding: &Self::Matrix,
        norm: &Self::Vector,
        residual: &mut Self::Buf,
        out: &mut Self::Buf,
    );

    /// `out = x · weightᵀ + bias`
    fn linear(
        &mut self,
        x: &Self::Buf,
        weight: &Linear<Self::Matrix, Self::Vector>,
        adapters: AdapterRows,
        out: &mut Self::Buf,
    );

    /// Norms (where the model has them) and rotates q and k in place, and writes k and v to the cache.
    fn rope_write_kv(&mut self, qkv: &mut Self::Buf, args: &RopeArgs<'_, Self::Vector>);

    /// `out = softmax(q · kᵀ / √head_dim) · v` over the cache, causal, within the model's window.
    fn attention(
        &mut self,
        layer: usize,
        qkv: &Self::Buf,
        seqs: &[AttentionSeq<'_>],
        out: &mut Self::Buf,
    );

    /// `out = silu(gate) · up` where `gate_up` holds both halves of a row.
    fn silu_mul(&mut self, gate_up: &mut Self::Buf, out: &mut Self::Buf);

    /// Sums `delta` across ranks, adds it to `residual`, `out = norm(residual)`. `delta` is used up.
    fn reduce_add_norm(
        &mut self,
        delta: &mut Self::Buf,
        norm: &Self::Vector,
        residual: &mut Self::Buf,
        out: &mut Self::Buf,
    );

    /// Keeps these rows (ascending) of `buf` and drops the others.
    fn keep_rows(&mut self, rows: &[u32], buf: &mut Self::Buf);

    /// `out = x · headᵀ`, in f32, `[rows, vocab]`: the whole vocabulary, on every rank.
    fn logits(
        &mut self,
        x: &Self::Buf,
        head: &Linear<Self::Matrix, Self::Vector>,
        out: &mut Self::Buf,
    );
}
