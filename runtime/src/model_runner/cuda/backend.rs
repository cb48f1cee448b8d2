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
        attention::{DecodeAttention, HeadShape, PrefillAttention, Sequences},
        elementwise::{AddNorm, EmbedNorm, GatherRows, SiluMul, fill_random},
        gemm::Gemm,
        int4,
        rope::RopeWriteKv,
        skinny::{self, Input, Output, SkinnyGemm},
    },
};
use half::{bf16, f16};

use super::{
    matrix::Matrix,
    step::{DecodeSection, Layout},
};
use crate::{
    engine::request::TokenId,
    models::{
        backend::{AdapterRows, AttentionSeq, Backend, Linear, RopeArgs},
        config::ModelConfig,
    },
    weights::{GgmlType, Int4Matrix, RawTensor, Weight},
};

/// Products with at most so many rows run as skinny ones, fused with their neighbours; wide ones with half as many, where
/// cuBLASLt reads weights faster.
pub(super) const FUSED_ROWS: usize = 16;

/// From this width on a norm is a kernel of its own: inside a product every block would repeat it (on an H200 at 4,096 columns
/// 32 µs in each layer, against 6 for two small kernels).
const SEPARATE_NORM_WIDTH: usize = 2048;

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

    pub(super) fn view(&self) -> View<'_> {
        self.data.view()
    }

    fn set(&mut self, rows: usize, state: State) {
        self.rows = rows;
        self.state = state;
    }
}

/// Sizes of a [`CudaBackend`].
pub(super) struct CudaBackendConfig {
    pub(super) float: Float,
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
    /// `[slots]`
    pub(super) last_tokens: DeviceBuffer,
    sums: DeviceBuffer,
    parts: DeviceBuffer,
    arrived: DeviceBuffer,
    /// Where four-bit weights become 16-bit ones, one matrix after another.
    scratch: Option<DeviceBuffer>,
    /// Whether layers hold four-bit weights, which few rows multiply as they are, and many only once they are 16-bit ones.
    int4: bool,
    error: Option<CudaError>,
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
        let int4 = model.quantization.is_some() && config.float == Float::F16;
        let sum_rows = if int4 { skinny::MAX_ROWS } else { FUSED_ROWS };
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
            last_tokens: device.alloc(config.max_num_seqs * 4)?,
            sums: device.alloc(widest * sum_rows * 4)?,
            parts: device.alloc(config.max_items * shape.part_bytes())?,
            arrived: device.alloc(groups * model.num_kv_heads * 4)?,
            scratch: None,
            int4,
            error: None,
            device: device.clone(),
        })
    }

    /// Reserves what the largest of the matrices needs; those that take none need not be called for.
    pub(super) fn reserve_scratch(&mut self, bytes: usize) -> Result<(), CudaError> {
        if bytes > 0 {
            self.scratch = Some(self.device.alloc(bytes)?);
        }
        Ok(())
    }

    /// The matrix in 16-bit floats, for the product with many rows that is queued next.
    fn values<'a>(&'a self, matrix: &'a Matrix) -> Result<View<'a>, CudaError> {
        matrix.values(&self.device, self.scratch.as_ref())
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
        if self.int4 {
            skinny::MAX_INT4_ROWS
        } else {
            FUSED_ROWS
        }
    }

    /// Whether a layer's product of these rows with this matrix is left to its neighbours.
    fn fuses(&self, rows: usize, matrix: &Matrix) -> bool {
        if matrix.is_int4() {
            SkinnyGemm::takes_int4(rows, matrix.columns)
        } else if self.int4 {
            // As many as a norm is fused with below: what reads it must read it so.
            SkinnyGemm::takes(rows, matrix.columns)
        } else {
            Self::is_skinny(rows, matrix.columns)
        }
    }

    fn is_skinny(rows: usize, width: usize) -> bool {
        let most = if width < SEPARATE_NORM_WIDTH {
            FUSED_ROWS
        } else {
            FUSED_ROWS / 2
        };
        rows <= most && SkinnyGemm::takes(rows, width)
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

    fn gemm(
        &self,
        x: &CudaBuf,
        (matrix, bias): (&GpuMatrix, Option<&GpuVector>),
        y: View<'_>,
        f32_out: bool,
    ) -> Result<(), CudaError> {
        Gemm {
            float: self.float,
            x: x.view(),
            weight: self.values(matrix)?,
            bias: bias.map(|bias| bias.view()),
            y,
            f32_out,
            m: x.rows,
            n: matrix.rows,
            k: matrix.columns,
        }
        .launch(&self.device)
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
        Gemm {
            float: self.float,
            x: x.view(),
            weight: self.values(matrix)?,
            bias: None,
            y: y.view(),
            f32_out,
            m: rows,
            n: matrix.rows,
            k: matrix.columns,
        }
        .tune(&self.device, 3)
    }

    fn rows_attention(
        &self,
        layer: usize,
        qkv: &CudaBuf,
        section: &DecodeSection,
        (count, max_items): (usize, usize),
        out: &CudaBuf,
    ) -> Result<(), CudaError> {
        if count == 0 {
            return Ok(());
        }
        DecodeAttention {
            shape: self.shape,
            qkv: qkv.view(),
            cache: self.layer_cache(layer)?,
            out: out.view(),
            plan: self.at(section.plan),
            items: self.at(section.items),
            sequences: Sequences {
                rows: self.at(section.rows),
                context_lens: self.at(section.context_lens),
                table_starts: self.at(section.table_starts),
                blocks: self.at(self.layout.blocks),
                count,
            },
            parts: self.parts.view(),
            arrived: self.arrived.view(),
            max_items,
        }
        .launch(&self.device)
    }

    fn attend(&self, layer: usize, qkv: &CudaBuf, out: &CudaBuf) -> Result<(), CudaError> {
        let (layout, counts) = (&self.layout, &self.layout.counts);
        if self.kept {
            let sizes = (counts.kept, counts.kept_items);
            return self.rows_attention(layer, qkv, &layout.kept, sizes, out);
        }
        let sizes = (counts.decodes, counts.decode_items);
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
    fn int4_parts<'a>(&self, stacked: &'a [Weight<'_>]) -> Option<Vec<&'a Int4Matrix>> {
        let parts: Option<Vec<&Int4Matrix>> = stacked
            .iter()
            .map(|part| match part {
                Weight::Int4(matrix) => Some(matrix),
                Weight::Rows(_) => None,
            })
            .collect();
        parts.filter(|parts| {
            self.int4
                && parts.iter().all(|part| part.group == parts[0].group)
                && int4::takes(parts[0].columns, parts[0].group)
        })
    }

    fn is_native(&self, kind: GgmlType) -> bool {
        matches!(
            (kind, self.float),
            (GgmlType::BF16, Float::Bf16) | (GgmlType::F16, Float::F16)
        )
    }
}

/// Formats that are dequantised at load.
fn block_format(kind: GgmlType) -> Option<BlockFormat> {
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
        let rows = stacked.iter().map(Weight::rows).sum();
        let columns = stacked[0].columns();
        let text = |error: CudaError| error.to_string();
        if let Some(parts) = self.int4_parts(stacked) {
            let whole = Int4Matrix::stack(&parts);
            let matrix = Matrix::int4(&self.device, &whole).map_err(text)?;
            return Ok(vec![Arc::new(matrix)]);
        }
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

    fn embed_norm(
        &mut self,
        _tokens: &[TokenId],
        embedding: &GpuMatrix,
        norm: &GpuVector,
        residual: &mut CudaBuf,
        out: &mut CudaBuf,
    ) {
        let rows = self.layout.counts.rows;
        let table = self.values(embedding);
        let embed = |table| EmbedNorm {
            float: self.float,
            tokens: self.at(self.layout.tokens),
            row_slots: self.at(self.layout.row_slots),
            last_tokens: self.last_tokens.view(),
            table,
            weight: norm.view(),
            residual: residual.view(),
            out: out.view(),
            sums: None,
            rows,
            width: residual.width,
            eps: self.eps,
        };
        let result = table.and_then(|table| embed(table).launch(&self.device));
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
        let result = self.gemm(x, (matrix, bias), out.view(), false);
        self.note(result);
        out.set(x.rows, State::Ready);
    }

    fn rope_write_kv(&mut self, qkv: &mut CudaBuf, args: &RopeArgs<'_, GpuVector>) {
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
        delta: &CudaBuf,
        norm: &GpuVector,
        residual: &mut CudaBuf,
        out: &mut CudaBuf,
    ) {
        let (rows, width) = (delta.rows, residual.width);
        if let State::Product(product) = &delta.state
            && (width >= SEPARATE_NORM_WIDTH || rows > skinny::MAX_ROWS)
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
        let (matrix, bias) = (&head.parts[0], head.bias.as_ref());
        let is_normed = matches!(x.state, State::Normed { .. });
        let result = if is_normed || Self::is_skinny(x.rows, matrix.columns) {
            let product = Self::product_of(x, matrix, bias);
            let output = Output::StoreF32(out.view());
            self.run_product(&product, x.rows, out.width, output)
        } else {
            self.gemm(x, (matrix, bias), out.view(), true)
        };
        self.note(result);
        out.set(x.rows, State::Ready);
    }
}
