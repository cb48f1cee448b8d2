//! [`Backend`] on the CPU: the host kernels of `ashlar-kernels`, their thread pool and the KV cache of every layer.
//!
//! Activations are f32 rows. On one of several ranks, what all need is summed or gathered in the memory they share. Where a matrix is quantised its input is quantised to int8 once, for all its parts.

use std::sync::Mutex;

use ashlar_kernels::cpu::{
    self as kernels, AttentionArgs, BlockFormat, Int4Args, KernelError, KvLayout, LayerCache,
    PackedMatrix, QuantizedRows, ThreadPool,
    attention::{BLOCK_SIZE, paged_attention},
    elementwise,
    quantize::BLOCK,
};

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
    weights::{Fp8Matrix, GgmlType, Int4Matrix, RawTensor, Weight, cut::Span},
};

/// Rows that make a task worth handing out, where a row is a few thousand operations.
const ROWS_PER_TASK: usize = 16;

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

/// A row to work on, and what came of it.
type RowTask<'a, T> = (Option<&'a mut [f32]>, Option<T>);

/// Rows of f32 activations; grows to the largest step and stays.
#[derive(Debug)]
pub(super) struct CpuBuf {
    data: Vec<f32>,
    rows: usize,
    width: usize,
}

impl CpuBuf {
    /// An empty buffer for rows of `width` values.
    pub(super) fn new(width: usize) -> Self {
        Self {
            data: Vec::new(),
            rows: 0,
            width,
        }
    }

    /// All rows, one after another.
    pub(super) fn values(&self) -> &[f32] {
        &self.data[..self.rows * self.width]
    }

    fn values_mut(&mut self) -> &mut [f32] {
        &mut self.data[..self.rows * self.width]
    }

    /// Makes room for `rows` rows; what they hold is left over from earlier steps.
    fn with_rows(&mut self, rows: usize) -> &mut [f32] {
        self.rows = rows;
        if self.data.len() < rows * self.width {
            self.data.resize(rows * self.width, 0.0);
        }
        self.values_mut()
    }
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

/// One of several ranks.
struct Place {
    member: Member,
    /// Its rows of the embedding and the head.
    vocabulary: Span,
    /// What all ranks' results add up to.
    sum: Vec<f32>,
    /// Its part of the logits.
    logits: CpuBuf,
    /// Why the step is not to be used: the first failure.
    error: Option<RankError>,
}

impl Place {
    /// Notes a failure: operations have no result to return it in.
    fn note(&mut self, result: Result<(), RankError>) {
        if let Err(error) = result {
            self.error.get_or_insert(error);
        }
    }

    /// The sum of all ranks' `values`.
    fn sum(&mut self, values: &[f32]) -> &[f32] {
        self.sum.resize(values.len(), 0.0);
        let summed = self.member.sum(values, &mut self.sum);
        self.note(summed);
        &self.sum
    }

    /// Puts the ranks' columns of the logits side by side.
    fn gather(&mut self, out: &mut CpuBuf) {
        let (rows, padded) = (self.logits.rows, self.logits.width);
        let width = out.width;
        let all = out.with_rows(rows);
        let ranks = self.member.ranks();
        let gathered = self.member.share(self.logits.values(), |rank, share| {
            let columns = Span::of_rank(width, (rank, ranks), padded);
            let pairs = all.chunks_exact_mut(width).zip(share.chunks_exact(padded));
            for (row, part) in pairs {
                row[columns.start..][..columns.len].copy_from_slice(&part[..columns.len]);
            }
        });
        self.note(gathered);
    }
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

    /// Calls `run` with each of these rows of `buf` (all different) and its place in `rows`, on all threads.
    /// Results are in the order of `rows`; a row that is named twice or absent gets none.
    pub(super) fn map_rows<T: Send>(
        &self,
        buf: &mut CpuBuf,
        rows: impl Iterator<Item = usize>,
        run: impl Fn(usize, &mut [f32]) -> T + Sync,
    ) -> Vec<Option<T>> {
        let width = buf.width;
        let mut all: Vec<Option<&mut [f32]>> =
            buf.values_mut().chunks_exact_mut(width).map(Some).collect();
        let tasks: Vec<Mutex<RowTask<'_, T>>> = rows
            .map(|row| Mutex::new((all.get_mut(row).and_then(Option::take), None)))
            .collect();
        self.pool.run(tasks.len(), &|task, _| {
            let mut slot = tasks[task].lock().expect("a task panicked: this is a bug");
            let (row, result) = &mut *slot;
            *result = row.as_mut().map(|row| run(task, row));
        });
        let results = tasks
            .into_iter()
            .map(|task| task.into_inner().expect("a task panicked: this is a bug").1);
        results.collect()
    }

    /// Calls `run(first_row, rows)` on pieces of `data` that cover it, on all threads.
    fn for_rows(&self, data: &mut [f32], width: usize, run: impl Fn(usize, &mut [f32]) + Sync) {
        if data.len() <= ROWS_PER_TASK * width {
            run(0, data);
            return;
        }
        let pieces: Vec<Mutex<&mut [f32]>> = data
            .chunks_mut(ROWS_PER_TASK * width)
            .map(Mutex::new)
            .collect();
        self.pool.run(pieces.len(), &|task, _| {
            let mut piece = pieces[task].lock().expect("a task panicked: this is a bug");
            run(task * ROWS_PER_TASK, &mut piece);
        });
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

    /// [`Backend::linear`] with 16-bit activations: each row goes as what 8 bits hold of it and as what they leave over,
    /// two rows of one product, whose results are added. With 8 bits alone the default model's logits stray by up to
    /// 1.6e-2 (1 − cosine), enough to turn a greedy answer; with 16 by 1.4e-5.
    fn linear_in_two(
        &mut self,
        x: &CpuBuf,
        weight: &Linear<PackedMatrix, Vec<f32>>,
        y: &mut [f32],
    ) {
        let (columns, width) = (x.width, weight.out_features);
        let mut split = std::mem::take(&mut self.split);
        split.resize(2 * x.rows * columns, 0.0);
        self.for_rows(&mut split, 2 * columns, |first, pairs| {
            let rows = x.values()[first * columns..].chunks_exact(columns);
            for (pair, row) in pairs.chunks_exact_mut(2 * columns).zip(rows) {
                let (high, low) = pair.split_at_mut(columns);
                split_row(row, high, low);
            }
        });
        let mut products = std::mem::take(&mut self.products);
        products.resize(2 * x.rows * width, 0.0);
        kernels::linear(
            &self.pool,
            &weight.parts,
            None,
            &split,
            &mut self.quantized,
            &mut products,
        );
        self.for_rows(y, width, |first, rows| {
            let pairs = products[2 * first * width..].chunks_exact(2 * width);
            for (y, pair) in rows.chunks_exact_mut(width).zip(pairs) {
                for (i, y) in y.iter_mut().enumerate() {
                    *y = pair[i]
                        + pair[width + i]
                        + weight.bias.as_ref().map_or(0.0, |bias| bias[i]);
                }
            }
        });
        (self.split, self.products) = (split, products);
    }

    /// Eight-bit floats are multiplied as brain floats, which hold them and all but the last bits of their scales.
    fn pack_fp8(&self, matrix: &Fp8Matrix<'_>) -> Result<PackedMatrix, String> {
        let values = matrix.dequantize();
        let packed = if self.exact {
            PackedMatrix::from_f32(matrix.rows, matrix.columns, &values)
        } else {
            let values = values.iter();
            let bytes: Vec<u8> = values
                .flat_map(|value| half::bf16::from_f32(*value).to_le_bytes())
                .collect();
            PackedMatrix::from_rows(BlockFormat::BF16, matrix.rows, matrix.columns, &bytes)
        };
        packed.map_err(|error| error.to_string())
    }

    /// Parts of one storage type, one above the other.
    fn pack_rows(&self, parts: &[Weight<'_>]) -> Result<PackedMatrix, String> {
        let mut parts = parts.iter().filter_map(|part| match part {
            Weight::Rows(raw) => Some(raw),
            Weight::Int4(_) | Weight::Fp8(_) => None,
        });
        let mut whole = parts.next().ok_or("no part: this is a bug")?.clone();
        let kind = whole.kind;
        let format =
            block_format(kind).ok_or_else(|| format!("the CPU cannot compute with {kind:?}"))?;
        for part in parts {
            whole.rows += part.rows;
            whole.data.to_mut().extend_from_slice(&part.data);
        }
        pack(&whole, format, self.exact).map_err(|error| error.to_string())
    }

    /// Parts in four bits of one group size, one above the other.
    fn pack_int4(&self, parts: &[Weight<'_>]) -> Result<PackedMatrix, String> {
        let parts: Vec<&Int4Matrix> = parts
            .iter()
            .filter_map(|part| match part {
                Weight::Int4(matrix) => Some(matrix),
                Weight::Rows(_) | Weight::Fp8(_) => None,
            })
            .collect();
        let whole = Int4Matrix::stack(&parts);
        let packed = if self.exact {
            PackedMatrix::from_f32(whole.rows, whole.columns, &whole.dequantize())
        } else {
            PackedMatrix::from_int4(&Int4Args {
                rows: whole.rows,
                columns: whole.columns,
                group: whole.group,
                qweight: &whole.qweight,
                scales: &whole.scales,
                zeros: &whole.zeros,
            })
        };
        packed.map_err(|error| error.to_string())
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

/// `row = high + low`, where `high` is what 8 bits with a scale for each block hold of it.
fn split_row(row: &[f32], high: &mut [f32], low: &mut [f32]) {
    // Adding and taking off 1.5·2²³ rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    let blocks = row
        .chunks(BLOCK)
        .zip(high.chunks_mut(BLOCK))
        .zip(low.chunks_mut(BLOCK));
    for ((row, high), low) in blocks {
        let largest = row.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let (scale, inverse) = if largest > 1e-30 {
            (largest / 127.0, 127.0 / largest)
        } else {
            (0.0, 0.0)
        };
        for ((x, high), low) in row.iter().zip(high).zip(low) {
            *high = ((x * inverse + ROUND) - ROUND) * scale;
            *low = x - *high;
        }
    }
}

/// The kernels' name of a storage type they can read.
fn block_format(kind: GgmlType) -> Option<BlockFormat> {
    Some(match kind {
        GgmlType::F32 => BlockFormat::F32,
        GgmlType::F16 => BlockFormat::F16,
        GgmlType::BF16 => BlockFormat::BF16,
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

/// Exact mode packs f32. Otherwise formats that a product reads are packed as they are, and the others as 8 bits.
fn pack(
    raw: &RawTensor<'_>,
    format: BlockFormat,
    exact: bool,
) -> Result<PackedMatrix, KernelError> {
    let as_stored = matches!(
        format,
        BlockFormat::F32
            | BlockFormat::F16
            | BlockFormat::BF16
            | BlockFormat::Q4_0
            | BlockFormat::Q4_1
            | BlockFormat::Q8_0
    );
    if as_stored && !exact {
        return PackedMatrix::from_rows(format, raw.rows, raw.columns, &raw.data);
    }
    let mut values = vec![0.0; raw.rows * raw.columns];
    format.dequantize(&raw.data, &mut values)?;
    if exact {
        PackedMatrix::from_f32(raw.rows, raw.columns, &values)
    } else {
        PackedMatrix::quantize_q8(raw.rows, raw.columns, &values)
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

    fn silu_mul(&mut self, gate_up: &CpuBuf, out: &mut CpuBuf) {
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
