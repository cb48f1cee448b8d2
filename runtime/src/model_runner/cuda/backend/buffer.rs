//! Rows of activations, and what has been noted of them instead of being launched.

use std::sync::Arc;

use ashlar_kernels::cuda::{CudaError, Device, DeviceBuffer, View};

use super::{GpuMatrix, GpuVector};

/// What a buffer stands for.
pub(super) enum State {
    /// What lies in it.
    Ready,
    /// The norm of the residual stream, whose sums of squares are in `CudaBackend::sums`.
    Normed {
        residual: Arc<DeviceBuffer>,
        weight: GpuVector,
        num_sums: usize,
    },
    /// A product that has not been launched, to be fused with what reads it.
    Product(Product),
    /// A product with many rows that has not been launched, since it can be added to the residual stream on its way out.
    Large(Product),
}

/// A product that has not been launched.
pub(super) struct Product {
    pub(super) x: Arc<DeviceBuffer>,
    /// With the sums' number: `x` is the residual stream, normed on the way in.
    pub(super) norm: Option<(GpuVector, usize)>,
    pub(super) matrix: GpuMatrix,
    pub(super) bias: Option<GpuVector>,
}

/// Rows of activations.
pub(in super::super) struct CudaBuf {
    pub(super) data: Arc<DeviceBuffer>,
    /// A second buffer of the same size, where rows are dropped.
    pub(super) spare: Option<Arc<DeviceBuffer>>,
    pub(super) width: usize,
    pub(super) rows: usize,
    pub(super) state: State,
}

impl CudaBuf {
    /// Room for `rows` rows of `width` values of `bytes`.
    pub(in super::super) fn new(
        device: &Device,
        rows: usize,
        width: usize,
        bytes: usize,
        spare: bool,
    ) -> Result<Self, CudaError> {
        let alloc = || Ok::<_, CudaError>(Arc::new(device.alloc(rows * width * bytes)?));
        Ok(Self {
            data: alloc()?,
            spare: spare.then(alloc).transpose()?,
            width,
            rows: 0,
            state: State::Ready,
        })
    }

    /// Rows of `width` values in these two buffers, in turns.
    pub(in super::super) fn in_turns([data, spare]: [Arc<DeviceBuffer>; 2], width: usize) -> Self {
        Self {
            data,
            spare: Some(spare),
            width,
            rows: 0,
            state: State::Ready,
        }
    }

    pub(in super::super) fn view(&self) -> View<'_> {
        self.data.view()
    }

    /// The memory, to be shared.
    pub(in super::super) fn memory(&self) -> &Arc<DeviceBuffer> {
        &self.data
    }

    /// Values in a row.
    pub(in super::super) fn width(&self) -> usize {
        self.width
    }

    /// Rows that it holds.
    pub(in super::super) fn rows(&self) -> usize {
        self.rows
    }

    /// Goes on with the other buffer.
    pub(in super::super) fn turn(&mut self) {
        if let Some(spare) = &mut self.spare {
            std::mem::swap(&mut self.data, spare);
        }
    }

    pub(super) fn set(&mut self, rows: usize, state: State) {
        self.rows = rows;
        self.state = state;
    }
}
