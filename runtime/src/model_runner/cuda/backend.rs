//! [`Backend`] on a GPU, on 16-bit weights and activations.
//!
//! With few rows (decode) a product is bound by reading its weights, and every launch costs. There an operation that feeds
//! a product, or is fed by one, is not launched but noted in its output, and runs fused with its neighbour: the norm with
//! the product that reads it, SiLU·up and the residual sum with the product that they follow.
//!
//! With [`CudaBackendConfig::batch_invariant`] nothing is fused: every product is one kernel's for any number of rows, on weights
//! in 16 bits, and every row attends in a tile. What is left works row by row.
//!
//! Operations cannot return errors: the first one is kept, what follows is skipped, and [`CudaBackend::take_error`] is
//! asked once the step is queued.
mod attention;
mod buffer;
mod operations;
mod products;
mod weights;

use std::sync::Arc;

use ashlar_kernels::cuda::{
    CudaError, Device, DeviceBuffer, Float, KvDtype, Uploader, View, attention::HeadShape,
    decode_plan::PARTS_PER_ITEM, gemm::Fp8Gemm, int4_gemm::Int4Gemm, skinny,
};

pub(super) use self::{
    buffer::CudaBuf,
    products::{FUSED_ROWS, Target},
    weights::{block_format, upload_bytes},
};
use super::{layout::Layout, matrix::Matrix, place::Place};
use crate::models::config::ModelConfig;

pub(super) type GpuVector = Arc<DeviceBuffer>;
pub(super) type GpuMatrix = Arc<Matrix>;

/// Sizes of a [`CudaBackend`].
pub(super) struct CudaBackendConfig {
    pub(super) float: Float,
    /// What the KV cache stores.
    pub(super) kv_dtype: KvDtype,
    /// What K and V of each layer are divided by in eight bits; 1 in others.
    pub(super) kv_scales: Vec<[f32; 2]>,
    /// Layers hold integers, in four bits for the most part.
    pub(super) integers: bool,
    /// Rows may be rounded to eight bits in front of eight-bit floats.
    pub(super) rounds_rows: bool,
    /// Rows' results do not depend on each other, bit for bit.
    pub(super) batch_invariant: bool,
    /// Positions in the rotary table.
    pub(super) max_model_len: usize,
    /// Bytes that a step's arrays may take.
    pub(super) step_bytes: usize,
    /// Rows that go through the last layer, at most.
    pub(super) max_logit_rows: usize,
    /// Sequences that run at once.
    pub(super) max_num_seqs: usize,
    /// Attention items, at most.
    pub(super) max_items: usize,
}

/// A GPU with a model's constants and its KV cache.
pub(super) struct CudaBackend {
    pub(super) device: Device,
    /// Without buffers once weights are loaded.
    uploader: Uploader,
    float: Float,
    pub(super) shape: HeadShape,
    eps: f32,
    rope_table: DeviceBuffer,
    /// Pages of all layers; none before [`Self::set_cache`].
    cache: Option<DeviceBuffer>,
    layer_bytes: usize,
    kv_scales: Vec<[f32; 2]>,
    num_layers: usize,
    /// The step's arrays.
    pub(super) step: DeviceBuffer,
    layout: Layout,
    /// Whether rows were dropped: the attention that follows is the last layer's.
    kept: bool,
    /// Set when q and k are to be rotated by the attention that follows; with the heads' norms.
    rotation: Option<Option<(GpuVector, GpuVector)>>,
    /// `[slots]`
    pub(super) last_tokens: DeviceBuffer,
    sums: DeviceBuffer,
    parts: DeviceBuffer,
    arrived: DeviceBuffer,
    /// Where weights of fewer bits become 16-bit ones, one matrix after another.
    scratch: Option<DeviceBuffer>,
    /// Where rows of activations become eight-bit floats, and their scales; on GPUs that multiply such.
    fp8_rows: Option<(DeviceBuffer, DeviceBuffer)>,
    /// Parts and counters of products with four-bit weights as they are; on GPUs that have such.
    int4_parts: Option<(DeviceBuffer, DeviceBuffer)>,
    /// Whether layers hold integers, which few rows multiply as they are, and many only once they are 16-bit floats.
    integers: bool,
    /// Whether rows may be rounded to eight bits in front of eight-bit floats; else many rows meet these once they are 16-bit ones.
    rounds_rows: bool,
    /// Whether every product is one kernel's, whatever its number of rows, and every row attends in a tile.
    pub(super) batch_invariant: bool,
    error: Option<CudaError>,
    /// Among several ranks.
    pub(super) place: Option<Place>,
}

impl CudaBackend {
    pub(super) fn new(
        device: &Device,
        model: &ModelConfig,
        config: &CudaBackendConfig,
    ) -> Result<Self, CudaError> {
        let shape = HeadShape {
            float: config.float,
            kv_dtype: config.kv_dtype,
            num_heads: model.num_heads,
            num_kv_heads: model.num_kv_heads,
            head_dim: model.head_dim,
            window: model.sliding_window.unwrap_or(0),
        };
        shape.validate()?;
        let pairs = model.head_dim / 2;
        let frequencies = model.rope.inverse_frequencies(model.head_dim);
        let bytes: Vec<u8> = frequencies.iter().flat_map(|f| f.to_le_bytes()).collect();
        let frequencies = device.alloc(bytes.len())?;
        device.write(&bytes, frequencies.view())?;
        let rope_table = device.alloc(config.max_model_len * pairs * 8)?;
        ashlar_kernels::cuda::rope::rope_table(
            device,
            frequencies.view(),
            rope_table.view(),
            pairs,
            config.max_model_len,
        )?;
        let groups = config.max_num_seqs.max(config.max_logit_rows);
        let sum_rows = if config.integers {
            skinny::MAX_ROWS
        } else {
            FUSED_ROWS
        };
        let widest = model.hidden_size.div_ceil(16);
        Ok(Self {
            uploader: Uploader::new(device),
            float: config.float,
            shape,
            eps: model.rms_norm_eps,
            rope_table,
            cache: None,
            layer_bytes: 0,
            kv_scales: config.kv_scales.clone(),
            num_layers: model.num_layers,
            step: device.alloc(config.step_bytes)?,
            layout: Layout::default(),
            kept: false,
            rotation: None,
            last_tokens: device.alloc(config.max_num_seqs * 4)?,
            sums: device.alloc(widest * sum_rows * 4)?,
            parts: device.alloc(config.max_items * PARTS_PER_ITEM * shape.part_bytes())?,
            arrived: device.alloc(groups * model.num_kv_heads * 4)?,
            scratch: None,
            fp8_rows: None,
            int4_parts: None,
            integers: config.integers,
            rounds_rows: config.rounds_rows,
            batch_invariant: config.batch_invariant,
            error: None,
            place: None,
            device: device.clone(),
        })
    }

    /// Reserves what products of up to `rows` rows (a bucket) with any of the matrices need.
    pub(super) fn reserve_scratch<'a>(
        &mut self,
        matrices: impl Iterator<Item = &'a GpuMatrix> + Clone,
        rows: usize,
    ) -> Result<(), CudaError> {
        let fp8 = matrices
            .clone()
            .filter(|matrix| matrix.fp8_view().is_some());
        let widest = fp8.map(|matrix| matrix.columns).max();
        if let Some(columns) = widest
            && self.rounds_rows
            && !self.batch_invariant
            && Fp8Gemm::is_available(&self.device)
        {
            let (data, scales) = (
                self.device.alloc(rows * columns)?,
                self.device.alloc(rows * 4)?,
            );
            // Rows of padding are multiplied too.
            self.device.fill(scales.view(), 0)?;
            self.device.fill(data.view(), 0)?;
            self.fp8_rows = Some((data, scales));
        }
        let has_int4 = matrices.clone().any(|matrix| matrix.is_int4());
        if has_int4 && self.device.is_hopper() && !self.batch_invariant {
            let parts = self.device.alloc(Int4Gemm::parts_bytes(&self.device))?;
            let arrived = self.device.alloc(Int4Gemm::arrived_bytes(&self.device))?;
            self.device.fill(arrived.view(), 0)?;
            self.int4_parts = Some((parts, arrived));
        }
        let turned = matrices.filter(|matrix| self.turns(matrix));
        if let Some(bytes) = turned.map(|matrix| matrix.value_bytes()).max() {
            self.scratch = Some(self.device.alloc(bytes)?);
        }
        Ok(())
    }

    /// Whether products with many rows multiply other values than the matrix has: its values in 16 bits.
    fn turns(&self, matrix: &Matrix) -> bool {
        matrix.value_bytes() > 0 && (matrix.fp8_view().is_none() || self.fp8_rows.is_none())
    }

    /// Bytes of the values in 16 bits of these matrices, as far as products need them.
    pub(super) fn value_bytes<'a>(&self, matrices: impl Iterator<Item = &'a GpuMatrix>) -> usize {
        let turned = matrices.filter(|matrix| self.turns(matrix));
        turned.map(|matrix| matrix.value_bytes()).sum()
    }

    /// Keeps these values, so that no product turns them again; all of the matrices that scratch memory was reserved for.
    pub(super) fn keep_values<'a>(
        &mut self,
        matrices: impl Iterator<Item = &'a GpuMatrix>,
    ) -> Result<(), CudaError> {
        for matrix in matrices.filter(|matrix| self.turns(matrix)) {
            matrix.keep_values(&self.device, self.float)?;
        }
        // Nothing was computed with it yet.
        self.scratch = None;
        Ok(())
    }

    /// The matrix in 16-bit floats, for the product with many rows that is queued next.
    fn values<'a>(&'a self, matrix: &'a Matrix) -> Result<View<'a>, CudaError> {
        matrix.values(&self.device, self.float, self.scratch.as_ref())
    }

    /// Bytes of K and V of one block, all layers.
    pub(super) fn block_bytes(&self) -> usize {
        self.shape.page_bytes() * self.num_layers
    }

    /// Reserves the KV cache, in place of the one before.
    pub(super) fn set_cache(&mut self, num_blocks: usize) -> Result<(), CudaError> {
        self.cache = None;
        self.layer_bytes = num_blocks * self.shape.page_bytes();
        self.cache = Some(self.device.alloc(self.layer_bytes * self.num_layers)?);
        Ok(())
    }

    /// Says where the arrays of the step lie that the next operations belong to.
    pub(super) fn begin_step(&mut self, layout: Layout) {
        self.layout = layout;
        self.kept = false;
        self.rotation = None;
        self.error = None;
    }

    /// The first error since [`Self::begin_step`].
    pub(super) fn take_error(&mut self) -> Result<(), CudaError> {
        self.error.take().map_or(Ok(()), Err)
    }

    fn note(&mut self, result: Result<(), CudaError>) {
        if let Err(error) = result
            && self.error.is_none()
        {
            self.error = Some(error);
        }
    }

    fn at(&self, offset: usize) -> View<'_> {
        self.step.view().from(offset)
    }

    fn layer_cache(&self, layer: usize) -> Result<View<'_>, CudaError> {
        let cache = self.cache.as_ref().ok_or_else(|| CudaError::Shape {
            op: "attention",
            message: "there is no KV cache yet: this is a bug".to_owned(),
        })?;
        Ok(cache
            .view()
            .slice(layer * self.layer_bytes, self.layer_bytes))
    }
}
