//! [`Backend`] on a GPU, on 16-bit weights and activations.
//!
//! With few rows (decode) a product is bound by reading its weights, and every launch costs. There an operation that feeds
//! a product, or is fed by one, is not launched but noted in its output, and runs fused with its neighbour: the norm with
//! the product that reads it, SiLU·up and the residual sum with the product that they follow.
//!
//! Operations cannot return errors: the first one is kept, what follows is skipped, and [`CudaBackend::take_error`] is
//! asked once the step is queued.

use std::{borrow::Cow, sync::Arc};

use ashlar_kernels::{
    cpu::BlockFormat,
    cuda::{
        CudaError, Device, DeviceBuffer, Float, View,
        attention::{
            DecodeAttention, DecodeRope, HeadShape, PlanView, PrefillAttention, Sequences,
        },
        decode_plan::PARTS_PER_ITEM,
        eight_bit::{self, QuantizeRows},
        elementwise::{AddNorm, EmbedNorm, GatherRows, SiluMul, fill_random},
        gemm::{Fp8Gemm, Gemm},
        int4,
        int4_gemm::Int4Gemm,
        rope::RopeWriteKv,
        skinny::{self, Input, Output, SkinnyGemm},
    },
};
use half::{bf16, f16};

use super::{
    integers,
    matrix::Matrix,
    place::Place,
    step::{DecodeSection, Layout},
};
use crate::{
    engine::request::TokenId,
    models::{
        backend::{AdapterRows, AttentionSeq, Backend, HeadNorms, Linear, RopeArgs},
        config::ModelConfig,
    },
    weights::{Fp8Scales, GgmlType, Int4Matrix, RawTensor, Scheme, Weight},
};

/// Products with at most so many rows run as skinny ones, fused with their neighbours; wide ones with half as many, where
/// cuBLASLt reads weights faster.
pub(super) const FUSED_ROWS: usize = 16;

/// Products with at most so many rows read four-bit weights as they are where the GPU can; with more it is faster to turn them
/// into 16 bits first.
const INT4_GEMM_ROWS: usize = 2048;

/// From this width on rows are wide: products run as skinny ones with half as many, and a norm that cannot be had for one
/// multiplication a value is a kernel of its own, because every block of a product would repeat it.
const WIDE: usize = 2048;

pub(super) type GpuVector = Arc<DeviceBuffer>;
pub(super) type GpuMatrix = Arc<Matrix>;

/// What a buffer stands for.
enum State {
    /// What lies in it.
    Ready,
    /// The norm of the residual stream, whose sums of squares are in `CudaBackend::sums`.
    Normed {
        residual: Arc<DeviceBuffer>,
        weight: GpuVector,
        num_sums: usize,
    },
    /// A product that has not been launched.
    Product(Product),
}

/// A product that has not been launched.
struct Product {
    x: Arc<DeviceBuffer>,
    /// With the sums' number: `x` is the residual stream, normed on the way in.
    norm: Option<(GpuVector, usize)>,
    matrix: GpuMatrix,
    bias: Option<GpuVector>,
}

/// A product with many rows, by what is multiplied.
enum LargeProduct<'a> {
    Float(Gemm<'a>),
    Fp8(Fp8Gemm<'a>),
    Int4(Int4Gemm<'a>),
}

/// Rows of activations.
pub(super) struct CudaBuf {
    data: Arc<DeviceBuffer>,
    /// A second buffer of the same size, where rows are dropped.
    spare: Option<Arc<DeviceBuffer>>,
    width: usize,
    rows: usize,
    state: State,
}

impl CudaBuf {
    /// Room for `rows` rows of `width` values of `bytes`.
    pub(super) fn new(
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
    pub(super) fn in_turns([data, spare]: [Arc<DeviceBuffer>; 2], width: usize) -> Self {
        Self {
            data,
            spare: Some(spare),
            width,
            rows: 0,
            state: State::Ready,
        }
    }

    pub(super) fn view(&self) -> View<'_> {
        self.data.view()
    }

    /// The memory, to be shared.
    pub(super) fn memory(&self) -> &Arc<DeviceBuffer> {
        &self.data
    }

    /// Values in a row.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Rows that it holds.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Goes on with the other buffer.
    pub(super) fn turn(&mut self) {
        if let Some(spare) = &mut self.spare {
            std::mem::swap(&mut self.data, spare);
        }
    }

    fn set(&mut self, rows: usize, state: State) {
        self.rows = rows;
        self.state = state;
    }
}

/// Sizes of a [`CudaBackend`].
pub(super) struct CudaBackendConfig {
    pub(super) float: Float,
    /// Layers hold integers, in four bits for the most part.
    pub(super) integers: bool,
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
    float: Float,
    pub(super) shape: HeadShape,
    eps: f32,
    rope_table: DeviceBuffer,
    /// Pages of all layers; none before [`Self::set_cache`].
    cache: Option<DeviceBuffer>,
    layer_bytes: usize,
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
            float: config.float,
            shape,
            eps: model.rms_norm_eps,
            rope_table,
            cache: None,
            layer_bytes: 0,
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
        if self.device.is_hopper() && matrices.clone().any(|matrix| matrix.is_int4()) {
            let parts = self.device.alloc(Int4Gemm::parts_bytes(&self.device))?;
            let arrived = self.device.alloc(Int4Gemm::arrived_bytes(&self.device))?;
            self.device.fill(arrived.view(), 0)?;
            self.int4_parts = Some((parts, arrived));
        }
        let bytes = matrices
            .filter(|matrix| matrix.fp8_view().is_none() || self.fp8_rows.is_none())
            .map(|matrix| matrix.scratch_bytes())
            .max();
        if let Some(bytes) = bytes.filter(|bytes| *bytes > 0) {
            self.scratch = Some(self.device.alloc(bytes)?);
        }
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

    /// Most rows of a layer's product that is left to its neighbours.
    pub(super) fn fused_rows(&self) -> usize {
        if self.integers {
            skinny::MAX_INT4_ROWS
        } else {
            FUSED_ROWS
        }
    }

    /// Whether a layer's product of these rows with this matrix is left to its neighbours.
    fn fuses(&self, rows: usize, matrix: &Matrix) -> bool {
        if rows > self.fused_rows() {
            // All alike: what reads a fused norm must be fused too.
            false
        } else if matrix.is_int4() {
            SkinnyGemm::takes_int4(rows, matrix.columns)
        } else if self.int4_parts.is_some() && rows > FUSED_ROWS {
            // Where four bits go further alone.
            false
        } else if matrix.is_eight_bit() || self.integers {
            // As many as a norm is fused with below.
            SkinnyGemm::takes(rows, matrix.columns)
        } else {
            Self::is_skinny(rows, matrix.columns)
        }
    }

    fn is_skinny(rows: usize, width: usize) -> bool {
        let most = if width < WIDE {
            FUSED_ROWS
        } else {
            FUSED_ROWS / 2
        };
        rows <= most && SkinnyGemm::takes(rows, width)
    }

    /// Whether the norm behind a noted product is left to the products that read it.
    fn norms_on_the_way(&self, product: &Product, rows: usize, width: usize) -> bool {
        if width < WIDE {
            let most = if self.int4_parts.is_some() {
                FUSED_ROWS
            } else {
                skinny::MAX_ROWS
            };
            rows <= most
        } else {
            let matrix = &product.matrix;
            let is_float = !matrix.is_int4() && !matrix.is_eight_bit();
            rows <= FUSED_ROWS / 2 && self.float == Float::Bf16 && is_float && !self.integers
        }
    }

    /// Launches a noted product into `output`.
    fn run_product(
        &self,
        product: &Product,
        rows: usize,
        n: usize,
        output: Output<'_>,
    ) -> Result<(), CudaError> {
        let input = match &product.norm {
            None => Input::Plain(product.x.view()),
            Some((weight, num_sums)) => Input::Normed {
                residual: product.x.view(),
                weight: weight.view(),
                sums: self.sums.view(),
                num_sums: *num_sums,
                eps: self.eps,
            },
        };
        SkinnyGemm {
            float: self.float,
            input,
            weight: product.matrix.weight(),
            bias: product.bias.as_ref().map(|bias| bias.view()),
            output,
            m: rows,
            n,
            k: product.matrix.columns,
        }
        .launch(&self.device)
    }

    /// Makes a buffer hold what it stands for.
    fn settle(&self, buf: &mut CudaBuf) -> Result<(), CudaError> {
        match std::mem::replace(&mut buf.state, State::Ready) {
            State::Ready => Ok(()),
            State::Product(product) => {
                self.run_product(&product, buf.rows, buf.width, Output::Store(buf.view()))
            }
            State::Normed { .. } => Err(CudaError::Shape {
                op: "norm",
                message: "a fused norm is only read by products: this is a bug".to_owned(),
            }),
        }
    }

    fn product_of(x: &CudaBuf, matrix: &GpuMatrix, bias: Option<&GpuVector>) -> Product {
        let (source, norm) = match &x.state {
            State::Normed {
                residual,
                weight,
                num_sums,
            } => (residual, Some((Arc::clone(weight), *num_sums))),
            State::Ready | State::Product(_) => (&x.data, None),
        };
        Product {
            x: Arc::clone(source),
            norm,
            matrix: Arc::clone(matrix),
            bias: bias.map(Arc::clone),
        }
    }

    /// A product with many rows, launched or timed by `run`.
    fn gemm<T>(
        &self,
        x: &CudaBuf,
        (matrix, bias): (&GpuMatrix, Option<&GpuVector>),
        (y, f32_out): (View<'_>, bool),
        rows: usize,
        run: impl Fn(&LargeProduct<'_>) -> Result<T, CudaError>,
    ) -> Result<T, CudaError> {
        let (n, k) = (matrix.rows, matrix.columns);
        if let (Some(weight), Some((parts, arrived))) = (matrix.int4_view(), &self.int4_parts)
            && rows <= INT4_GEMM_ROWS
            && Int4Gemm::takes(&self.device, n, k)
        {
            return run(&LargeProduct::Int4(Int4Gemm {
                x: x.view(),
                weight,
                bias: bias.map(|bias| bias.view()),
                y,
                m: rows,
                n,
                k,
                parts: parts.view(),
                arrived: arrived.view(),
            }));
        }
        let gemm = |x, weight| Gemm {
            float: self.float,
            x,
            weight,
            bias: bias.map(|bias| bias.view()),
            y,
            f32_out,
            m: rows,
            n,
            k,
        };
        let (Some(weight), Some((data, scales))) = (matrix.fp8_view(), &self.fp8_rows) else {
            return run(&LargeProduct::Float(gemm(x.view(), self.values(matrix)?)));
        };
        QuantizeRows {
            float: self.float,
            x: x.view(),
            out: data.view(),
            scales: scales.view(),
            m: rows,
            k: matrix.columns,
        }
        .launch(&self.device)?;
        run(&LargeProduct::Fp8(Fp8Gemm {
            gemm: gemm(data.view(), weight.data),
            x_scales: scales.view(),
            weight_scales: weight.scales,
        }))
    }

    /// The head's product, of the columns that `out` holds.
    fn head(
        &self,
        x: &CudaBuf,
        head: &Linear<GpuMatrix, GpuVector>,
        out: &CudaBuf,
    ) -> Result<(), CudaError> {
        let (matrix, bias) = (&head.parts[0], head.bias.as_ref());
        let is_normed = matches!(x.state, State::Normed { .. });
        if is_normed || Self::is_skinny(x.rows, matrix.columns) {
            let product = Self::product_of(x, matrix, bias);
            let output = Output::StoreF32(out.view());
            self.run_product(&product, x.rows, out.width, output)
        } else {
            self.launch_gemm(x, (matrix, bias), (out.view(), true))
        }
    }

    /// Finds the fastest plans for products of `rows` rows with this matrix.
    pub(super) fn tune(
        &self,
        matrix: &GpuMatrix,
        x: &CudaBuf,
        y: &CudaBuf,
        f32_out: bool,
        rows: usize,
    ) -> Result<f32, CudaError> {
        let target = (y.view(), f32_out);
        self.gemm(x, (matrix, None), target, rows, |product| match product {
            LargeProduct::Float(gemm) => gemm.tune(&self.device, 3),
            LargeProduct::Fp8(gemm) => gemm.tune(&self.device, 3),
            LargeProduct::Int4(_) => Ok(0.0),
        })
    }

    fn launch_gemm(
        &self,
        x: &CudaBuf,
        operands: (&GpuMatrix, Option<&GpuVector>),
        target: (View<'_>, bool),
    ) -> Result<(), CudaError> {
        self.gemm(x, operands, target, x.rows, |product| {
            self.launch_large(product)
        })
    }

    fn launch_large(&self, product: &LargeProduct<'_>) -> Result<(), CudaError> {
        match product {
            LargeProduct::Float(gemm) => gemm.launch(&self.device),
            LargeProduct::Fp8(gemm) => gemm.launch(&self.device),
            LargeProduct::Int4(gemm) => gemm.launch(&self.device),
        }
    }

    /// A product of `rows` rows of whatever lies in `x`.
    pub(super) fn product(
        &self,
        weight: &Linear<GpuMatrix, GpuVector>,
        x: &CudaBuf,
        y: &CudaBuf,
        f32_out: bool,
        rows: usize,
    ) -> Result<(), CudaError> {
        let operands = (&weight.parts[0], weight.bias.as_ref());
        self.gemm(x, operands, (y.view(), f32_out), rows, |product| {
            self.launch_large(product)
        })
    }

    fn rows_attention(
        &self,
        layer: usize,
        qkv: &CudaBuf,
        section: &DecodeSection,
        (count, max_items, shares): (usize, usize, bool),
        out: &CudaBuf,
    ) -> Result<(), CudaError> {
        if count == 0 {
            return Ok(());
        }
        let rope = self.rotation.as_ref().map(|norms| DecodeRope {
            table: self.rope_table.view(),
            norms: norms
                .as_ref()
                .map(|(query, key)| (query.view(), key.view())),
            eps: self.eps,
        });
        DecodeAttention {
            shape: self.shape,
            qkv: qkv.view(),
            cache: self.layer_cache(layer)?,
            out: out.view(),
            plan: PlanView {
                num_items: self.at(section.num_items),
                items: self.at(section.items),
                members: self.at(section.members),
                row_parts: self.at(section.row_parts),
                slots: self.at(section.slots),
            },
            sequences: Sequences {
                rows: self.at(section.rows),
                context_lens: self.at(section.context_lens),
                table_starts: self.at(section.table_starts),
                blocks: self.at(self.layout.blocks),
                count,
            },
            parts: self.parts.view(),
            arrived: self.arrived.view(),
            rope,
            shares,
            max_items,
        }
        .launch(&self.device)
    }

    fn attend(&self, layer: usize, qkv: &CudaBuf, out: &CudaBuf) -> Result<(), CudaError> {
        let (layout, counts) = (&self.layout, &self.layout.counts);
        if self.kept {
            let sizes = (counts.kept, counts.kept_items, false);
            return self.rows_attention(layer, qkv, &layout.kept, sizes, out);
        }
        let sizes = (counts.decodes, counts.decode_items, counts.shares);
        self.rows_attention(layer, qkv, &layout.decode, sizes, out)?;
        if counts.prefills == 0 {
            return Ok(());
        }
        PrefillAttention {
            shape: self.shape,
            qkv: qkv.view(),
            cache: self.layer_cache(layer)?,
            out: out.view(),
            items: self.at(layout.prefill_items),
            sequences: Sequences {
                rows: self.at(layout.prefill_rows),
                context_lens: self.at(layout.prefill_context_lens),
                table_starts: self.at(layout.prefill_table_starts),
                blocks: self.at(layout.blocks),
                count: counts.prefills,
            },
            query_lens: self.at(layout.prefill_query_lens),
            num_items: counts.prefill_items,
            portable: false,
        }
        .launch(&self.device)
    }

    /// 16-bit bytes of a tensor of any storage type.
    fn convert(&self, raw: &RawTensor<'_>) -> Result<Vec<u8>, String> {
        let values = match raw.to_f32() {
            Some(values) => values,
            None => {
                let format = block_format(raw.kind)
                    .ok_or_else(|| format!("the GPU cannot compute with {:?}", raw.kind))?;
                let mut values = vec![0.0; raw.rows * raw.columns];
                format
                    .dequantize(&raw.data, &mut values)
                    .map_err(|error| error.to_string())?;
                values
            }
        };
        Ok(self.to_bytes(&values))
    }

    fn to_bytes(&self, values: &[f32]) -> Vec<u8> {
        let values = values.iter();
        match self.float {
            Float::Bf16 => values
                .flat_map(|value| bf16::from_f32(*value).to_le_bytes())
                .collect(),
            Float::F16 => values
                .flat_map(|value| f16::from_f32(*value).to_le_bytes())
                .collect(),
        }
    }

    /// The parts, where all are in four bits and can stay so together; their scales are IEEE halves.
    fn four_bit_parts<'a>(&self, stacked: &'a [Weight<'_>]) -> Option<Vec<&'a Int4Matrix>> {
        let parts: Option<Vec<&Int4Matrix>> = stacked
            .iter()
            .map(|part| match part {
                Weight::Int4(matrix) => Some(matrix),
                Weight::Rows(_) | Weight::Fp8(_) => None,
            })
            .collect();
        parts.filter(|parts| {
            self.integers
                && parts.iter().all(|part| part.group == parts[0].group)
                && int4::takes(parts[0].columns, parts[0].group)
        })
    }

    /// The parts' values and scales, where all are eight-bit floats with scales of rows, and of a shape that the products
    /// take.
    fn fp8_parts<'a>(stacked: &'a [Weight<'_>]) -> Option<Vec<(&'a [u8], &'a [f32])>> {
        let parts: Option<Vec<_>> = stacked
            .iter()
            .map(|part| match part {
                Weight::Fp8(matrix) => match &matrix.scales {
                    Fp8Scales::Rows(scales) => Some((&*matrix.data, scales.as_slice())),
                    Fp8Scales::Blocks { .. } => None,
                },
                Weight::Rows(_) | Weight::Int4(_) => None,
            })
            .collect();
        let rows: usize = stacked.iter().map(Weight::rows).sum();
        parts.filter(|_| rows.is_multiple_of(16) && eight_bit::takes(stacked[0].columns()))
    }

    fn is_native(&self, kind: GgmlType) -> bool {
        matches!(
            (kind, self.float),
            (GgmlType::BF16, Float::Bf16) | (GgmlType::F16, Float::F16)
        )
    }
}

/// GGUF's formats of quantised blocks.
pub(super) fn block_format(kind: GgmlType) -> Option<BlockFormat> {
    Some(match kind {
        GgmlType::Q4_0 => BlockFormat::Q4_0,
        GgmlType::Q4_1 => BlockFormat::Q4_1,
        GgmlType::Q5_0 => BlockFormat::Q5_0,
        GgmlType::Q5_1 => BlockFormat::Q5_1,
        GgmlType::Q8_0 => BlockFormat::Q8_0,
        GgmlType::Q4K => BlockFormat::Q4K,
        GgmlType::Q5K => BlockFormat::Q5K,
        GgmlType::Q6K => BlockFormat::Q6K,
        _ => return None,
    })
}

impl Backend for CudaBackend {
    type Buf = CudaBuf;
    type Matrix = GpuMatrix;
    type Vector = GpuVector;

    fn pack(&self, stacked: &[Weight<'_>]) -> Result<Vec<GpuMatrix>, String> {
        let columns = stacked[0].columns();
        let text = |error: CudaError| error.to_string();
        if let Some(parts) = self.four_bit_parts(stacked) {
            let whole = Int4Matrix::stack(&parts);
            let matrix = Matrix::int4(&self.device, &whole).map_err(text)?;
            return Ok(vec![Arc::new(matrix)]);
        }
        if self.integers
            && int4::takes(columns, 32)
            && let Some(whole) = integers::of_blocks(stacked)
        {
            let matrix = Matrix::integers(&self.device, &whole).map_err(text)?;
            return Ok(vec![Arc::new(matrix)]);
        }
        if let Some(parts) = Self::fp8_parts(stacked) {
            let matrix = Matrix::fp8(&self.device, &parts, columns).map_err(text)?;
            return Ok(vec![Arc::new(matrix)]);
        }
        self.pack_vocabulary(stacked)
    }

    /// In 16 bits: rows are looked up in it, and logits need all of its precision.
    fn pack_vocabulary(&self, stacked: &[Weight<'_>]) -> Result<Vec<GpuMatrix>, String> {
        let rows = stacked.iter().map(Weight::rows).sum();
        let columns = stacked[0].columns();
        let text = |error: CudaError| error.to_string();
        let data = self
            .device
            .alloc(rows * columns * Float::BYTES)
            .map_err(text)?;
        let mut offset = 0;
        for part in stacked {
            let bytes = part.rows() * columns * Float::BYTES;
            let place = data.view().slice(offset, bytes);
            let values: Cow<'_, [u8]> = match part {
                Weight::Rows(raw) if self.is_native(raw.kind) => Cow::Borrowed(&raw.data),
                Weight::Rows(raw) => Cow::Owned(self.convert(raw)?),
                Weight::Int4(matrix) => Cow::Owned(self.to_bytes(&matrix.dequantize())),
                Weight::Fp8(matrix) => Cow::Owned(self.to_bytes(&matrix.dequantize())),
            };
            self.device.write(&values, place).map_err(text)?;
            offset += bytes;
        }
        Ok(vec![Arc::new(Matrix::float(data, rows, columns))])
    }

    fn vector(&self, values: Vec<f32>) -> Result<GpuVector, String> {
        let bytes = self.to_bytes(&values);
        let store = || {
            let data = self.device.alloc(bytes.len())?;
            self.device.write(&bytes, data.view())?;
            Ok(Arc::new(data))
        };
        store().map_err(|error: CudaError| error.to_string())
    }

    fn random(&self, rows: usize, columns: usize, seed: u64) -> Result<GpuMatrix, String> {
        let store = || {
            self.device.bind()?;
            let data = self.device.alloc(rows * columns * Float::BYTES)?;
            let scale = 1.0 / (columns as f32).sqrt();
            fill_random(&self.device, self.float, data.view(), seed, scale)?;
            Ok(Arc::new(Matrix::float(data, rows, columns)))
        };
        store().map_err(|error: CudaError| error.to_string())
    }

    fn random_quantized(
        &self,
        scheme: &Scheme,
        shape: (usize, usize),
        seed: u64,
    ) -> Result<Vec<GpuMatrix>, String> {
        let matrix = match scheme {
            Scheme::Int4(scheme)
                if self.integers && int4::takes(shape.1, scheme.group_of(shape.1)) =>
            {
                let group = scheme.group_of(shape.1);
                Matrix::random_int4(&self.device, shape, group, seed)
            }
            Scheme::Fp8(_) if shape.0.is_multiple_of(16) && eight_bit::takes(shape.1) => {
                Matrix::random_fp8(&self.device, self.float, shape, seed)
            }
            _ => return self.pack(&[scheme.random(shape, seed)?]),
        };
        let matrix = matrix.map_err(|error| error.to_string())?;
        Ok(vec![Arc::new(matrix)])
    }

    fn embed_norm(
        &mut self,
        _tokens: &[TokenId],
        embedding: &GpuMatrix,
        norm: &GpuVector,
        residual: &mut CudaBuf,
        out: &mut CudaBuf,
    ) {
        let rows = self.layout.counts.rows;
        let pieces = match &self.place {
            Some(place) => &place.embeddings[..],
            None => std::slice::from_ref(embedding),
        };
        let launch = || {
            let tables = pieces.iter().map(|piece| self.values(piece));
            let tables: Vec<View<'_>> = tables.collect::<Result<_, CudaError>>()?;
            EmbedNorm {
                float: self.float,
                tokens: self.at(self.layout.tokens),
                row_slots: self.at(self.layout.row_slots),
                last_tokens: self.last_tokens.view(),
                tables: &tables,
                table_rows: embedding.rows,
                weight: norm.view(),
                residual: residual.view(),
                out: out.view(),
                sums: None,
                rows,
                width: residual.width,
                eps: self.eps,
            }
            .launch(&self.device)
        };
        let result = launch();
        self.note(result);
        residual.set(rows, State::Ready);
        out.set(rows, State::Ready);
    }

    fn linear(
        &mut self,
        x: &CudaBuf,
        weight: &Linear<GpuMatrix, GpuVector>,
        _adapters: AdapterRows,
        out: &mut CudaBuf,
    ) {
        let (matrix, bias) = (&weight.parts[0], weight.bias.as_ref());
        if self.fuses(x.rows, matrix) {
            let product = Self::product_of(x, matrix, bias);
            out.set(x.rows, State::Product(product));
            return;
        }
        let result = self.launch_gemm(x, (matrix, bias), (out.view(), false));
        self.note(result);
        out.set(x.rows, State::Ready);
    }

    fn rope_write_kv(&mut self, qkv: &mut CudaBuf, args: &RopeArgs<'_, GpuVector>) {
        if self.layout.counts.rotates && DecodeAttention::rotates(self.shape.head_dim) {
            let result = self.settle(qkv);
            self.note(result);
            let both =
                |norms: &HeadNorms<GpuVector>| (Arc::clone(&norms.query), Arc::clone(&norms.key));
            self.rotation = Some(args.norms.map(both));
            return;
        }
        let result = self.settle(qkv).and_then(|()| {
            RopeWriteKv {
                float: self.float,
                qkv: qkv.view(),
                norms: args
                    .norms
                    .map(|norms| (norms.query.view(), norms.key.view())),
                table: self.rope_table.view(),
                positions: self.at(self.layout.positions),
                slot_mapping: self.at(self.layout.slot_mapping),
                cache: self.layer_cache(args.layer)?,
                rows: qkv.rows,
                num_heads: self.shape.num_heads,
                num_kv_heads: self.shape.num_kv_heads,
                head_dim: self.shape.head_dim,
                eps: self.eps,
            }
            .launch(&self.device)
        });
        self.note(result);
    }

    fn attention(
        &mut self,
        layer: usize,
        qkv: &CudaBuf,
        _seqs: &[AttentionSeq<'_>],
        out: &mut CudaBuf,
    ) {
        let result = self.attend(layer, qkv, out);
        self.rotation = None;
        self.note(result);
        out.set(qkv.rows, State::Ready);
    }

    fn silu_mul(&mut self, gate_up: &CudaBuf, out: &mut CudaBuf) {
        let (rows, width) = (gate_up.rows, out.width);
        let result = match &gate_up.state {
            State::Product(product) => {
                self.run_product(product, rows, width, Output::SiluMul(out.view()))
            }
            State::Ready | State::Normed { .. } => SiluMul {
                float: self.float,
                gate_up: gate_up.view(),
                out: out.view(),
                rows,
                width,
            }
            .launch(&self.device),
        };
        self.note(result);
        out.set(rows, State::Ready);
    }

    fn reduce_add_norm(
        &mut self,
        delta: &mut CudaBuf,
        norm: &GpuVector,
        residual: &mut CudaBuf,
        out: &mut CudaBuf,
    ) {
        let (rows, width) = (delta.rows, residual.width);
        if let Some(place) = &self.place {
            let result = self
                .settle(delta)
                .and_then(|()| place.reduce(self.float, delta, (norm, self.eps), residual, out));
            self.note(result);
            out.set(rows, State::Ready);
            return;
        }
        if let State::Product(product) = &delta.state
            && !self.norms_on_the_way(product, rows, width)
        {
            let result = self.run_product(product, rows, width, Output::Store(delta.view()));
            self.note(result);
        } else if let State::Product(product) = &delta.state {
            let output = Output::AddResidual {
                residual: residual.view(),
                sums: self.sums.view(),
            };
            let result = self.run_product(product, rows, width, output);
            self.note(result);
            let normed = State::Normed {
                residual: Arc::clone(&residual.data),
                weight: Arc::clone(norm),
                num_sums: width.div_ceil(16),
            };
            if SkinnyGemm::takes(rows, width) {
                out.set(rows, normed);
                return;
            }
            self.note(Err(CudaError::Shape {
                op: "norm",
                message: format!("rows of {width} values do not fuse; a multiple of 32 is needed"),
            }));
            return;
        }
        let result = AddNorm {
            float: self.float,
            delta: delta.view(),
            weight: norm.view(),
            residual: residual.view(),
            out: out.view(),
            rows,
            width,
            eps: self.eps,
        }
        .launch(&self.device);
        self.note(result);
        out.set(rows, State::Ready);
    }

    fn keep_rows(&mut self, rows: &[u32], buf: &mut CudaBuf) {
        self.kept = true;
        let Some(spare) = buf.spare.take() else {
            self.note(Err(CudaError::Shape {
                op: "gather_rows",
                message: "this buffer has no second one: this is a bug".to_owned(),
            }));
            return;
        };
        let result = GatherRows {
            input: buf.view(),
            rows: self.at(self.layout.gather),
            out: spare.view(),
            count: rows.len(),
            width: buf.width,
        }
        .launch(&self.device);
        self.note(result);
        buf.spare = Some(std::mem::replace(&mut buf.data, spare));
        buf.set(rows.len(), State::Ready);
    }

    fn logits(&mut self, x: &CudaBuf, head: &Linear<GpuMatrix, GpuVector>, out: &mut CudaBuf) {
        let result = match &self.place {
            None => self.head(x, head, out),
            Some(place) => self
                .head(x, head, &place.logits)
                .and_then(|()| place.gather(x.rows, out.width)),
        };
        self.note(result);
        out.set(x.rows, State::Ready);
    }
}
