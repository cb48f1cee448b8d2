//! Attention over the paged KV cache of a layer: cuts a step into items and spreads them over the threads.
//!
//! A row's scores, softmax and sum run over absolute positions in order, so its result does not depend on how its
//! prompt was cut, on the batch, or on the threads.

mod item;

use std::cell::RefCell;

use self::item::{attend_f8, attend_f16, attend_f32};
pub use super::kv_cache::{BLOCK_SIZE, KvDtype, KvLayout, LayerCache};
use super::{Isa, ThreadPool, kv_cache::Storage, pool::SharedMut, simd::dispatch};

/// Query tokens that share one pass over K.
const TILE: usize = 4;

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
