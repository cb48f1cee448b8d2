//! One of several tensor-parallel ranks: the memory that it shares with the others, and what they do together.

use std::sync::Arc;

use ashlar_kernels::cuda::{
    CudaError, Device, DeviceBuffer, Float, gemm,
    peers::{Endpoint, GatherColumns, Peers, ReduceAddNorm, Way},
};

use super::{
    CudaRunnerError,
    backend::{CudaBackend, CudaBuf, GpuMatrix, GpuVector, Target},
};
use crate::{
    model_runner::ranks::Member,
    models::decoder::{Activations, Decoder, Mlp},
};

/// One of several tensor-parallel ranks.
pub(super) struct Place {
    pub(super) peers: Peers,
    /// Every rank's rows of the embedding, in their order.
    pub(super) embeddings: Vec<GpuMatrix>,
    /// This rank's columns of the logits.
    pub(super) logits: CudaBuf,
    /// How rows are summed, where it is not the fastest way for their number.
    pub(super) way: Option<Way>,
    /// The buffers that rows to be summed lie in, in turns.
    deltas: [Arc<DeviceBuffer>; 2],
}

impl Place {
    /// Meets the other ranks and exchanges the memory that they read and write. `rows` and `logit_rows` are the largest
    /// step's, `held` the columns of the logits that this rank computes.
    pub(super) fn take(
        member: &Member,
        device: &Device,
        decoder: &Decoder<CudaBackend>,
        activations: &mut Activations<CudaBackend>,
        (rows, logit_rows): (usize, usize),
        held: usize,
    ) -> Result<Self, CudaRunnerError> {
        let width = activations.residual.width();
        let delta = || Ok::<_, CudaError>(Arc::new(device.alloc(rows * width * Float::BYTES)?));
        let deltas = [delta()?, delta()?];
        activations.delta = CudaBuf::in_turns(deltas.clone(), width);
        let gathered = Arc::clone(activations.logits.memory());
        let endpoint = Endpoint::new(device, member.ranks(), width, deltas.clone(), gathered)?;
        let embedding = Arc::clone(&decoder.embedding.parts[0]);
        let all = member.exchange((Arc::new(endpoint), embedding))?;
        let endpoints = all.iter().map(|theirs| Arc::clone(&theirs.0)).collect();
        Ok(Self {
            peers: Peers::connect(member.rank(), endpoints)?,
            embeddings: all.iter().map(|theirs| Arc::clone(&theirs.1)).collect(),
            logits: CudaBuf::new(device, logit_rows, held, 4, false)?,
            way: None,
            deltas,
        })
    }

    /// Sums the ranks' rows, and adds and norms them; the next rows to be summed go into the other buffer.
    pub(super) fn reduce(
        &self,
        float: Float,
        delta: &mut CudaBuf,
        (norm, eps): (&GpuVector, f32),
        residual: &CudaBuf,
        out: &CudaBuf,
    ) -> Result<(), CudaError> {
        let (rows, width) = (delta.rows(), residual.width());
        let fastest = Way::of(rows, width, self.peers.ranks());
        ReduceAddNorm {
            peers: &self.peers,
            slot: usize::from(!Arc::ptr_eq(delta.memory(), &self.deltas[0])),
            float,
            weight: norm.view(),
            residual: residual.view(),
            out: out.view(),
            rows,
            width,
            eps,
            way: self.way.unwrap_or(fastest),
        }
        .launch()?;
        delta.turn();
        Ok(())
    }

    /// Puts the ranks' columns of the logits side by side, on all of them.
    pub(super) fn gather(&self, rows: usize, vocab: usize) -> Result<(), CudaError> {
        GatherColumns {
            peers: &self.peers,
            from: self.logits.view(),
            rows,
            held: self.logits.width(),
            vocab,
        }
        .launch()
    }
}

/// Runs the products of every number of rows once. Loading their kernels may wait for others that run; in a step those
/// may be waiting for another rank.
pub(super) fn load_products(
    backend: &CudaBackend,
    decoder: &Decoder<CudaBackend>,
    act: &Activations<CudaBackend>,
    (max_rows, max_logit_rows): (usize, usize),
) -> Result<(), CudaError> {
    let layer = &decoder.layers[0];
    let Mlp::Dense { gate_up, down } = &layer.mlp;
    let head = decoder.head.as_ref().unwrap_or(&decoder.embedding);
    let mut rows = 1;
    while rows <= max_rows {
        rows = gemm::bucket(rows);
        for (weight, x, y) in [
            (&layer.qkv, &act.normed, &act.qkv),
            (&layer.attention_output, &act.attention, &act.delta),
            (gate_up, &act.normed, &act.gate_up),
            (down, &act.mlp, &act.delta),
        ] {
            backend.product(weight, x, Target::Store(y.view()), rows)?;
        }
        if rows <= max_logit_rows {
            let logits = Target::StoreF32(act.logits.view());
            backend.product(head, &act.normed, logits, rows)?;
        }
        rows += 1;
    }
    backend.device.synchronize()
}
