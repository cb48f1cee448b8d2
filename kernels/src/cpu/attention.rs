//! The paged KV cache of a layer, and attention that reads it through block tables.
//!
//! A block holds, per kv head, K as `[dim][block_size]` (lanes are tokens: scores need no horizontal sums) and V as
//! `[block_size][dim]`. A row's scores, softmax and sum run over absolute positions in order, so its result does not
//! depend on how its prompt was cut, on the batch, or on the threads.

#![allow(
    clippy::needless_range_loop,
    reason = "one index runs over several register arrays"
)]

use std::cell::RefCell;

use super::{
    Isa, ThreadPool,
    pool::SharedMut,
    simd::{Simd, dispatch},
};
use crate::e4m3::narrow;

/// Tokens in a block: the lanes of a vector.
pub const BLOCK_SIZE: usize = 16;

/// Query tokens that share one pass over K.
const TILE: usize = 4;

/// Most rows (query heads of one kv head × tokens) whose scores are kept in registers at once.
const MAX_ROWS: usize = 8;

/// How K and V are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvDtype {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    F16,
    /// 1 byte, e4m3.
    F8,
}

/// Shape of a layer's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Blocks, the null block included.
    pub num_blocks: usize,
    /// Kv heads.
    pub kv_heads: usize,
    /// Values of a head, a multiple of 16.
    pub head_dim: usize,
    /// Storage.
    pub dtype: KvDtype,
}

impl KvLayout {
    /// Bytes of one block's K and V.
    #[must_use]
    pub const fn block_bytes(&self) -> usize {
        let value = match self.dtype {
            KvDtype::F32 => 4,
            KvDtype::F16 => 2,
            KvDtype::F8 => 1,
        };
        2 * self.kv_heads * self.head_dim * BLOCK_SIZE * value
    }

    const fn head_values(&self) -> usize {
        self.head_dim * BLOCK_SIZE
    }

    const fn block_values(&self) -> usize {
        2 * self.kv_heads * self.head_values()
    }
}

/// K and V of one layer.
#[derive(Debug)]
pub struct LayerCache {
    layout: KvLayout,
    data: Storage,
    /// What eight-bit K and V are multiplied with when they are read.
    scales: [f32; 2],
}

#[derive(Debug)]
enum Storage {
    F32(Vec<f32>),
    F16(Vec<u16>),
    F8(Vec<u8>),
}

impl LayerCache {
    /// A zeroed cache; none when it cannot be allocated, or `head_dim` is not a positive multiple of 16.
    #[must_use]
    pub fn new(layout: KvLayout) -> Option<Self> {
        if layout.head_dim == 0 || !layout.head_dim.is_multiple_of(16) || layout.kv_heads == 0 {
            return None;
        }
        let len = layout.num_blocks.checked_mul(layout.block_values())?;
        let data = match layout.dtype {
            KvDtype::F32 => Storage::F32(zeroed(len)?),
            KvDtype::F16 => Storage::F16(zeroed(len)?),
            KvDtype::F8 => Storage::F8(zeroed(len)?),
        };
        Some(Self {
            layout,
            data,
            scales: [1.0; 2],
        })
    }

    /// Stores eight-bit K and V divided by these, positive and finite ones; other types are stored as they are.
    #[must_use]
    pub fn with_scales(mut self, scales: [f32; 2]) -> Self {
        if self.layout.dtype == KvDtype::F8 {
            self.scales = scales;
        }
        self
    }

    /// Its shape.
    #[must_use]
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Writes row `i`'s k and v (`[kv_heads · head_dim]` each) to slot `slots[i]` = block · 16 + offset; a negative
    /// slot is padding. Rows are `stride` apart in `kv`, k at `k_offset`, v at `v_offset`. Heads are spread over the
    /// threads.
    ///
    /// # Panics
    /// When a slot or a row is out of range; nothing has been written then.
    pub fn write(
        &mut self,
        pool: &ThreadPool,
        slots: &[i64],
        kv: &[f32],
        stride: usize,
        k_offset: usize,
        v_offset: usize,
    ) {
        let layout = self.layout;
        let width = layout.kv_heads * layout.head_dim;
        let limit = layout.num_blocks * BLOCK_SIZE;
        for slot in slots {
            let in_range = usize::try_from(*slot).is_ok_and(|slot| slot < limit);
            assert!(
                *slot < 0 || in_range,
                "slot {slot} of {} blocks",
                layout.num_blocks
            );
        }
        if let Some(last) = slots.len().checked_sub(1) {
            let end = last * stride + k_offset.max(v_offset) + width;
            assert!(end <= kv.len(), "{} rows of k and v", slots.len());
        }
        let isa = Isa::detect();
        let data = match &mut self.data {
            Storage::F32(data) => SharedStorage::F32(SharedMut::new(data)),
            Storage::F16(data) => SharedStorage::F16(SharedMut::new(data)),
            Storage::F8(data) => SharedStorage::F8(SharedMut::new(data)),
        };
        let inverse = self.scales.map(|scale| 1.0 / scale);
        // A task is the K or the V of one head: few enough values stay on this thread.
        let tasks = 2 * layout.kv_heads;
        let write = |task: usize, _| {
            let (head, is_value) = (task / 2, task % 2 == 1);
            let offset = if is_value { v_offset } else { k_offset } + head * layout.head_dim;
            for (row, slot) in slots.iter().enumerate() {
                let Ok(slot) = usize::try_from(*slot) else {
                    continue;
                };
                let x = &kv[row * stride + offset..][..layout.head_dim];
                let half = if is_value { layout.kv_heads } else { 0 };
                let base = slot / BLOCK_SIZE * layout.block_values()
                    + (half + head) * layout.head_values();
                let token = slot % BLOCK_SIZE;
                match data {
                    SharedStorage::F32(data) => {
                        // SAFETY: slots were checked above, so the head's K or V of this block lies in the cache;
                        // this task alone touches that head's K or V, and `self` is borrowed for the call.
                        let to = unsafe { data.slice(base, layout.head_values()) };
                        place(x, to, token, is_value, 0, layout.head_dim);
                    }
                    SharedStorage::F16(data) => {
                        // SAFETY: as above.
                        let to = unsafe { data.slice(base, layout.head_values()) };
                        let mut halves = [0u16; HALVES];
                        for (part, x) in x.chunks(HALVES).enumerate() {
                            let halves = &mut halves[..x.len()];
                            // `isa` was detected; the slices have one length, a multiple of 16.
                            dispatch!(isa, to_f16::<>(x: &[f32], halves: &mut [u16]));
                            place(halves, to, token, is_value, part * HALVES, layout.head_dim);
                        }
                    }
                    SharedStorage::F8(data) => {
                        // SAFETY: as above.
                        let to = unsafe { data.slice(base, layout.head_values()) };
                        let mut bytes = [0u8; HALVES];
                        let inverse = inverse[usize::from(is_value)];
                        for (part, x) in x.chunks(HALVES).enumerate() {
                            let bytes = &mut bytes[..x.len()];
                            let places = bytes.iter_mut().zip(x);
                            places.for_each(|(byte, x)| *byte = narrow(x * inverse));
                            place(bytes, to, token, is_value, part * HALVES, layout.head_dim);
                        }
                    }
                }
            }
        };
        if slots.len() * width < SMALL_WRITE {
            (0..tasks).for_each(|task| write(task, 0));
        } else {
            pool.run(tasks, &write);
        }
    }
}

/// Values of K below which a write stays on the calling thread.
const SMALL_WRITE: usize = 4096;

/// Values converted at once.
const HALVES: usize = 128;

/// [`Storage`] while heads are written side by side.
#[derive(Clone, Copy)]
enum SharedStorage {
    F32(SharedMut<f32>),
    F16(SharedMut<u16>),
    F8(SharedMut<u8>),
}

/// Puts values `first..first + x.len()` of a head of `dim` among its block's: in a column (K) or a row (V).
fn place<T: Copy>(
    x: &[T],
    block: &mut [T],
    token: usize,
    is_value: bool,
    first: usize,
    dim: usize,
) {
    if is_value {
        block[token * dim + first..][..x.len()].copy_from_slice(x);
    } else {
        let (columns, _) = block[first * BLOCK_SIZE..].as_chunks_mut::<BLOCK_SIZE>();
        columns
            .iter_mut()
            .zip(x)
            .for_each(|(column, x)| column[token] = *x);
    }
}

/// # Safety
/// The processor has `S`; both slices have one length, a multiple of 16.
#[inline(always)]
unsafe fn to_f16<S: Simd>(x: &[f32], halves: &mut [u16]) {
    for at in (0..x.len()).step_by(16) {
        // SAFETY: 16 values from `at` by the caller's promise.
        unsafe { S::store_f16(halves.as_mut_ptr().add(at), S::load(x.as_ptr().add(at))) };
    }
}

fn zeroed<T: Clone + Default>(len: usize) -> Option<Vec<T>> {
    let mut probe = Vec::<T>::new();
    probe.try_reserve_exact(len).ok()?;
    drop(probe);
    Some(vec![T::default(); len])
}

/// Adjacent query rows of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct AttentionSeq<'a> {
    /// First row.
    pub query_start: usize,
    /// Rows.
    pub query_len: usize,
    /// Tokens up to and including the last row: row `i` sees the first `context_len − query_len + i + 1`.
    pub context_len: usize,
    /// Logical → physical blocks.
    pub block_table: &'a [u32],
}

/// What [`paged_attention`] works on.
#[derive(Clone, Copy)]
pub struct AttentionArgs<'a> {
    /// `q[row · q_stride + head · head_dim ..]`
    pub q: &'a [f32],
    /// Distance of rows in `q`.
    pub q_stride: usize,
    /// Query heads, a multiple of the kv heads.
    pub heads: usize,
    /// Multiplies the scores, `1/√head_dim`.
    pub scale: f32,
    /// Each row sees at most this many last tokens.
    pub window: Option<usize>,
    /// The sequences.
    pub seqs: &'a [AttentionSeq<'a>],
}

#[derive(Clone, Copy)]
struct Item {
    seq: usize,
    kv_head: usize,
    first: usize,
    count: usize,
}

/// `out = softmax(scale · q · kᵀ) · v`, causal, through the block tables; `out` is `[rows, heads · head_dim]`.
///
/// # Panics
/// When shapes do not fit, or a block table is too short or names a block out of range.
pub fn paged_attention(
    pool: &ThreadPool,
    cache: &LayerCache,
    args: &AttentionArgs<'_>,
    out: &mut [f32],
) {
    paged_attention_with(Isa::detect(), pool, cache, args, out);
}

/// [`paged_attention`] on a given instruction set, for tests; `isa` must be one of [`Isa::available`].
///
/// # Panics
/// As [`paged_attention`], and when this machine lacks `isa`.
pub fn paged_attention_with(
    isa: Isa,
    pool: &ThreadPool,
    cache: &LayerCache,
    args: &AttentionArgs<'_>,
    out: &mut [f32],
) {
    let layout = cache.layout;
    let (dim, width) = (layout.head_dim, args.heads * layout.head_dim);
    let args = &AttentionArgs {
        scale: args.scale * cache.scales[0],
        ..*args
    };
    assert!(
        Isa::available().contains(&isa),
        "this machine has no {isa:?}"
    );
    assert!(
        args.heads > 0 && args.heads.is_multiple_of(layout.kv_heads),
        "{} heads on {} kv heads",
        args.heads,
        layout.kv_heads
    );
    let mut items = Vec::new();
    for (index, seq) in args.seqs.iter().enumerate() {
        let end = seq.query_start + seq.query_len;
        assert!(
            seq.query_len <= seq.context_len && end * width <= out.len(),
            "rows of sequence {index}"
        );
        assert!(
            end == 0 || (end - 1) * args.q_stride + width <= args.q.len(),
            "queries of sequence {index}"
        );
        let blocks = seq.context_len.div_ceil(BLOCK_SIZE);
        assert!(
            blocks <= seq.block_table.len()
                && seq.block_table[..blocks]
                    .iter()
                    .all(|b| (*b as usize) < layout.num_blocks),
            "block table of sequence {index}"
        );
        for kv_head in 0..layout.kv_heads {
            items.extend((0..seq.query_len).step_by(TILE).map(|first| Item {
                seq: index,
                kv_head,
                first,
                count: TILE.min(seq.query_len - first),
            }));
        }
    }
    // The longest first, so that no thread starts one when the others are done.
    items.sort_by_key(|item| {
        let seq = &args.seqs[item.seq];
        std::cmp::Reverse((seq.context_len - seq.query_len + item.first + item.count) * item.count)
    });
    let out = SharedMut::new(out);
    let group = args.heads / layout.kv_heads;
    let per_task = (items.len() / (pool.threads() * 16)).max(1);
    pool.run(items.len().div_ceil(per_task), &|task, _| {
        thread_local!(static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) });
        SCORES.with_borrow_mut(|scores| {
            for item in &items[task * per_task..((task + 1) * per_task).min(items.len())] {
                let seq = &args.seqs[item.seq];
                for i in item.first..item.first + item.count {
                    let row = seq.query_start + i;
                    // SAFETY: an item alone writes its rows' part that belongs to its kv head.
                    unsafe { out.slice(row * width + item.kv_head * group * dim, group * dim) }.fill(0.0);
                }
                // SAFETY: `isa` is available (asserted). Rows, queries and block tables of every sequence were
                // asserted above, the cache has `num_blocks` blocks by construction, and items write disjoint outputs.
                match &cache.data {
                    Storage::F32(data) => {
                        let data: &[f32] = data;
                        dispatch!(isa, attend_f32::<>(data: &[f32], layout: KvLayout, args: &AttentionArgs<'_>, item: &Item, scores: &mut Vec<f32>, out: SharedMut<f32>));
                    }
                    Storage::F16(data) => {
                        let data: &[u16] = data;
                        dispatch!(isa, attend_f16::<>(data: &[u16], layout: KvLayout, args: &AttentionArgs<'_>, item: &Item, scores: &mut Vec<f32>, out: SharedMut<f32>));
                    }
                    Storage::F8(data) => {
                        let data: &[u8] = data;
                        dispatch!(isa, attend_f8::<>(data: &[u8], layout: KvLayout, args: &AttentionArgs<'_>, item: &Item, scores: &mut Vec<f32>, out: SharedMut<f32>));
                        for i in item.first..item.first + item.count {
                            let row = seq.query_start + i;
                            // SAFETY: as above: this item's own part.
                            let values = unsafe { out.slice(row * width + item.kv_head * group * dim, group * dim) };
                            values.iter_mut().for_each(|value| *value *= cache.scales[1]);
                        }
                    }
                }
            }
        });
    });
}

/// # Safety
/// As [`attend`].
#[inline(always)]
unsafe fn attend_f32<S: Simd>(
    data: &[f32],
    layout: KvLayout,
    args: &AttentionArgs<'_>,
    item: &Item,
    scores: &mut Vec<f32>,
    out: SharedMut<f32>,
) {
    // SAFETY: passed on; `at` is only called with 16 values left in `data`.
    unsafe {
        attend::<S>(
            |at| S::load(data.as_ptr().add(at)),
            layout,
            args,
            item,
            scores,
            out,
        )
    }
}

/// # Safety
/// As [`attend`].
#[inline(always)]
unsafe fn attend_f16<S: Simd>(
    data: &[u16],
    layout: KvLayout,
    args: &AttentionArgs<'_>,
    item: &Item,
    scores: &mut Vec<f32>,
    out: SharedMut<f32>,
) {
    // SAFETY: passed on; `at` is only called with 16 values left in `data`.
    unsafe {
        attend::<S>(
            |at| S::load_f16(data.as_ptr().add(at)),
            layout,
            args,
            item,
            scores,
            out,
        )
    }
}

/// # Safety
/// As [`attend`].
#[inline(always)]
unsafe fn attend_f8<S: Simd>(
    data: &[u8],
    layout: KvLayout,
    args: &AttentionArgs<'_>,
    item: &Item,
    scores: &mut Vec<f32>,
    out: SharedMut<f32>,
) {
    // SAFETY: passed on; `at` is only called with 16 values left in `data`, and so many halves are loaded.
    unsafe {
        attend::<S>(
            |at| {
                // Moved to where a half has its exponent they lack the difference of the two biases, 8.
                let mut halves = [0u16; 16];
                for (i, half) in halves.iter_mut().enumerate() {
                    let byte = u16::from(*data.get_unchecked(at + i));
                    *half = (byte & 0x80) << 8 | (byte & 0x7f) << 7;
                }
                S::mul(S::load_f16(halves.as_ptr()), S::splat(256.0))
            },
            layout,
            args,
            item,
            scores,
            out,
        )
    }
}

/// One item: scores of all its rows, their softmax, their sums over V.
///
/// # Safety
/// The processor has `S`; `load(at)` reads 16 values at `at`, in bounds for `at + 16 ≤ num_blocks · block_values`;
/// the item's rows and blocks were checked by `paged_attention_with`; no one else writes the item's outputs.
#[inline(always)]
unsafe fn attend<S: Simd>(
    load: impl Fn(usize) -> S::F + Copy,
    layout: KvLayout,
    args: &AttentionArgs<'_>,
    item: &Item,
    scores: &mut Vec<f32>,
    out: SharedMut<f32>,
) {
    let seq = &args.seqs[item.seq];
    let (dim, group) = (layout.head_dim, args.heads / layout.kv_heads);
    let rows = group * item.count;
    let before = seq.context_len - seq.query_len;
    // Row r is query token `first + r / group`, head `kv_head · group + r % group`.
    let limit = |row: usize| before + item.first + row / group + 1;
    let start = |row: usize| {
        args.window
            .map_or(0, |window| limit(row).saturating_sub(window))
    };
    let q_of = |row: usize| {
        (seq.query_start + item.first + row / group) * args.q_stride
            + (item.kv_head * group + row % group) * dim
    };
    let blocks = limit(rows - 1).div_ceil(BLOCK_SIZE);
    let first_block = start(0) / BLOCK_SIZE;
    let width = blocks * BLOCK_SIZE;
    if scores.len() < rows * width {
        scores.resize(rows * width, 0.0);
    }
    let key_base = |block: usize| {
        seq.block_table[block] as usize * layout.block_values()
            + item.kv_head * layout.head_values()
    };
    // SAFETY: `scores` holds `rows · width` values; queries and blocks are in bounds by the caller's promise.
    unsafe {
        for block in first_block..blocks {
            let base = key_base(block);
            let mut row = 0;
            while row < rows {
                let at = scores.as_mut_ptr().add(row * width + block * BLOCK_SIZE);
                let q = |i: usize| args.q.as_ptr().add(q_of(row + i));
                row += match rows - row {
                    MAX_ROWS.. => {
                        score_block::<S, MAX_ROWS>(load, base, dim, q, at, width, args.scale)
                    }
                    6.. => score_block::<S, 6>(load, base, dim, q, at, width, args.scale),
                    4.. => score_block::<S, 4>(load, base, dim, q, at, width, args.scale),
                    3 => score_block::<S, 3>(load, base, dim, q, at, width, args.scale),
                    2 => score_block::<S, 2>(load, base, dim, q, at, width, args.scale),
                    _ => score_block::<S, 1>(load, base, dim, q, at, width, args.scale),
                };
            }
        }
        for token in 0..item.count {
            let (limit, start) = (limit(token * group), start(token * group));
            for head in 0..group {
                let row = token * group + head;
                softmax::<S>(
                    &mut scores[row * width..][..limit.div_ceil(BLOCK_SIZE) * BLOCK_SIZE],
                    start,
                    limit,
                );
            }
            let value_base =
                |block: usize| key_base(block) + layout.kv_heads * layout.head_values();
            let to = (seq.query_start + item.first + token) * args.heads * dim
                + item.kv_head * group * dim;
            let out = out.slice(to, group * dim);
            let weights = &scores[token * group * width..][..group * width];
            let mut head = 0;
            while head < group {
                let weights = &weights[head * width..];
                let out = &mut out[head * dim..];
                head += match group - head {
                    4.. => {
                        sum_values::<S, 4>(load, value_base, dim, weights, width, start, limit, out)
                    }
                    3 => {
                        sum_values::<S, 3>(load, value_base, dim, weights, width, start, limit, out)
                    }
                    2 => {
                        sum_values::<S, 2>(load, value_base, dim, weights, width, start, limit, out)
                    }
                    _ => {
                        sum_values::<S, 1>(load, value_base, dim, weights, width, start, limit, out)
                    }
                };
            }
        }
    }
}

/// Scores of `R` rows against the 16 keys of a block; returns `R`.
///
/// # Safety
/// The processor has `S`; `load` takes `base + 16·d` for `d < dim`; `q(i)` points at `dim` values for `i < R`;
/// `at + i·width` at 16 writable ones.
#[inline(always)]
unsafe fn score_block<S: Simd, const R: usize>(
    load: impl Fn(usize) -> S::F,
    base: usize,
    dim: usize,
    q: impl Fn(usize) -> *const f32,
    at: *mut f32,
    width: usize,
    scale: f32,
) -> usize {
    // SAFETY: the caller's promise.
    unsafe {
        let q: [*const f32; R] = std::array::from_fn(q);
        let mut acc = [S::splat(0.0); R];
        for d in 0..dim {
            let k = load(base + d * BLOCK_SIZE);
            for r in 0..R {
                acc[r] = S::fma(k, S::splat(*q[r].add(d)), acc[r]);
            }
        }
        for r in 0..R {
            S::store(at.add(r * width), S::mul(acc[r], S::splat(scale)));
        }
    }
    R
}

/// Softmax over positions `start..limit` of a row of scores, whole blocks long; the others become 0.
///
/// # Safety
/// The processor has `S`.
#[inline(always)]
unsafe fn softmax<S: Simd>(scores: &mut [f32], start: usize, limit: usize) {
    let first = start / BLOCK_SIZE * BLOCK_SIZE;
    scores[first..start].fill(f32::NEG_INFINITY);
    scores[limit..].fill(f32::NEG_INFINITY);
    // SAFETY: steps of 16 within `scores`, whose length is a multiple of 16.
    unsafe {
        let mut largest = S::splat(f32::NEG_INFINITY);
        for i in (first..scores.len()).step_by(16) {
            largest = S::max(S::load(scores.as_ptr().add(i)), largest);
        }
        let largest = S::splat(S::reduce_max(largest));
        let mut sum = S::splat(0.0);
        for i in (first..scores.len()).step_by(16) {
            let e = S::exp(S::sub(S::load(scores.as_ptr().add(i)), largest));
            S::store(scores.as_mut_ptr().add(i), e);
            sum = S::add(sum, e);
        }
        // exp of −∞ is e⁻⁸⁷ here: below half an ulp of any sum, which is at least 1, and cleared for the products.
        let inverse = S::splat(1.0 / S::reduce_add(sum));
        for i in (first..scores.len()).step_by(16) {
            S::store(
                scores.as_mut_ptr().add(i),
                S::mul(S::load(scores.as_ptr().add(i)), inverse),
            );
        }
    }
    scores[first..start].fill(0.0);
    scores[limit..].fill(0.0);
}

/// `out[r] = Σ weights[r][t] · v[t]` over positions `start..limit` in order; returns `R`.
///
/// # Safety
/// The processor has `S`; `load` takes `value_base(block) + token·dim + d` for the blocks of `start..limit`;
/// `weights` holds `R` rows `width` apart and `out` `R` rows of `dim`.
#[inline(always)]
#[allow(
    clippy::too_many_arguments,
    reason = "inner loop: everything stays in registers"
)]
unsafe fn sum_values<S: Simd, const R: usize>(
    load: impl Fn(usize) -> S::F,
    value_base: impl Fn(usize) -> usize,
    dim: usize,
    weights: &[f32],
    width: usize,
    start: usize,
    limit: usize,
    out: &mut [f32],
) -> usize {
    let mut d = 0;
    // SAFETY: the caller's promise; `dim` is a multiple of 16, and the wide step is taken only with 64 values left.
    unsafe {
        while d < dim {
            d += if dim - d >= 64 {
                sum_lanes::<S, R, 4>(
                    &load,
                    &value_base,
                    dim,
                    d,
                    weights,
                    width,
                    start,
                    limit,
                    out,
                )
            } else {
                sum_lanes::<S, R, 1>(
                    &load,
                    &value_base,
                    dim,
                    d,
                    weights,
                    width,
                    start,
                    limit,
                    out,
                )
            };
        }
    }
    R
}

/// Lanes `d..d + 16·N` of [`sum_values`]; returns `16·N`.
///
/// # Safety
/// As [`sum_values`], with `d + 16·N ≤ dim`.
#[inline(always)]
#[allow(
    clippy::too_many_arguments,
    reason = "inner loop: everything stays in registers"
)]
unsafe fn sum_lanes<S: Simd, const R: usize, const N: usize>(
    load: &impl Fn(usize) -> S::F,
    value_base: &impl Fn(usize) -> usize,
    dim: usize,
    d: usize,
    weights: &[f32],
    width: usize,
    start: usize,
    limit: usize,
    out: &mut [f32],
) -> usize {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[S::splat(0.0); N]; R];
        for block in start / BLOCK_SIZE..limit.div_ceil(BLOCK_SIZE) {
            let base = value_base(block) + d;
            let from = start.max(block * BLOCK_SIZE);
            let to = limit.min((block + 1) * BLOCK_SIZE);
            for position in from..to {
                let at = base + (position % BLOCK_SIZE) * dim;
                let v: [S::F; N] = std::array::from_fn(|n| load(at + 16 * n));
                for r in 0..R {
                    let weight = S::splat(*weights.get_unchecked(r * width + position));
                    for n in 0..N {
                        acc[r][n] = S::fma(weight, v[n], acc[r][n]);
                    }
                }
            }
        }
        for r in 0..R {
            for n in 0..N {
                S::store(out[r * dim + d + 16 * n..][..16].as_mut_ptr(), acc[r][n]);
            }
        }
    }
    16 * N
}
