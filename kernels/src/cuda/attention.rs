//! Paged attention: single rows (decode) and many rows (prefill), with the lists of work that the host makes for them.

pub use super::prefill::{PrefillAttention, TILE_ROWS, prefill_items};
use super::{
    CudaError, Device, Float, KvDtype, View,
    decode_plan::{Cut, ITEM_WORDS, PARTS_PER_ITEM},
    modules::{Shape, arguments},
    need,
    rope::BLOCK_SIZE,
};

/// Query heads that share a kv head, at most; 8 where a head has 256 values.
pub const MAX_GROUP: usize = 16;
/// Threads of a block of decode attention that shares its multiprocessor, and of one that does not; columns of the latter.
const THREADS: usize = 128;
const WIDE_THREADS: usize = 512;
const WIDE_COLUMNS: usize = 8;
/// Widths of a head that there are kernels for.
pub const HEAD_DIMS: [usize; 4] = [64, 96, 128, 256];

/// Sizes of attention in a model.
#[derive(Debug, Clone, Copy)]
pub struct HeadShape {
    /// Type of q, new k and v, and the result.
    pub float: Float,
    /// What the pages hold.
    pub kv_dtype: KvDtype,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Values in a head.
    pub head_dim: usize,
    /// Tokens a row sees, its own included; 0 for all.
    pub window: usize,
}

impl HeadShape {
    /// Whether there are kernels for it.
    ///
    /// # Errors
    /// [`CudaError::Shape`] saying what there are kernels for.
    pub fn validate(&self) -> Result<(), CudaError> {
        let op = "attention";
        need(HEAD_DIMS.contains(&self.head_dim), op, || {
            format!(
                "heads of {} values; the GPU kernels know 64, 96, 128 and 256",
                self.head_dim
            )
        })?;
        let most = self.columns();
        need(
            self.num_kv_heads > 0
                && self.num_heads.is_multiple_of(self.num_kv_heads)
                && self.group() <= most,
            op,
            || {
                format!(
                    "{} heads on {} kv heads; at most {most} heads may share one",
                    self.num_heads, self.num_kv_heads
                )
            },
        )
    }

    /// Rows that a decode item can work for.
    #[must_use]
    pub fn rows_per_item(&self) -> usize {
        (self.columns() / self.group()).max(1)
    }

    /// Whether decode attention may have [wide](Cut::wide) blocks.
    #[must_use]
    pub fn has_wide(&self) -> bool {
        [64, 128].contains(&self.head_dim) && self.group() <= WIDE_COLUMNS
    }

    /// Columns of a decode item's products: rows times query heads.
    fn columns(&self) -> usize {
        if self.head_dim == 256 { 8 } else { MAX_GROUP }
    }

    fn group(&self) -> usize {
        self.num_heads / self.num_kv_heads.max(1)
    }

    /// Bytes of one layer's page, K and V.
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        2 * self.num_kv_heads * BLOCK_SIZE * self.head_dim * self.kv_dtype.bytes()
    }

    /// Bytes of one item's part of a result that is cut.
    #[must_use]
    pub fn part_bytes(&self) -> usize {
        self.num_heads * (self.head_dim + 4) * 4
    }

    pub(super) fn q_stride(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }

    /// What turns products of q and the pages' K into exponents of 2.
    pub(super) fn scale(&self, [key_scale, _]: [f32; 2]) -> f32 {
        std::f32::consts::LOG2_E / (self.head_dim as f32).sqrt() * key_scale
    }

    /// The end of a kernel's name.
    pub(super) fn suffix(&self) -> String {
        format!("{}{}", self.float.suffix(), self.kv_dtype.suffix())
    }
}

/// Tables of the sequences that attend; i32 each, `[sequences]`.
#[derive(Clone, Copy)]
pub struct Sequences<'a> {
    /// First query row.
    pub rows: View<'a>,
    /// Tokens up to and including the last query row.
    pub context_lens: View<'a>,
    /// First entry in `blocks`.
    pub table_starts: View<'a>,
    /// Block tables, one after another.
    pub blocks: View<'a>,
    /// Sequences.
    pub count: usize,
}

/// A [`DecodePlan`](super::decode_plan::DecodePlan) on the GPU, i32 each.
#[derive(Clone, Copy)]
pub struct PlanView<'a> {
    /// Items.
    pub num_items: View<'a>,
    /// `[max_items, `[`ITEM_WORDS`]`]`
    pub items: View<'a>,
    /// `[≤ 2 · sequences]`
    pub members: View<'a>,
    /// `[sequences, 2]`
    pub row_parts: View<'a>,
    /// `[≤ `[`PARTS_PER_ITEM`]` · max_items]`
    pub slots: View<'a>,
}

/// What rotates q and k on their way into decode attention; heads of 64, 128 or 256 values.
#[derive(Clone, Copy)]
pub struct DecodeRope<'a> {
    /// `[positions, head_dim / 2]` pairs of f32 by [`rope_table`](super::rope::rope_table).
    pub table: View<'a>,
    /// Norms of q and k heads, `[head_dim]` each.
    pub norms: Option<(View<'a>, View<'a>)>,
    /// Added to the mean square.
    pub eps: f32,
}

/// Attention of one row per sequence.
#[derive(Clone, Copy)]
pub struct DecodeAttention<'a> {
    /// The model's sizes.
    pub shape: HeadShape,
    /// `[rows, (heads + 2 · kv_heads) · head_dim]`
    pub qkv: View<'a>,
    /// This layer's pages.
    pub cache: View<'a>,
    /// What eight-bit K and V were divided by; 1 for others.
    pub kv_scales: [f32; 2],
    /// `[rows, heads · head_dim]`
    pub out: View<'a>,
    /// The work.
    pub plan: PlanView<'a>,
    /// Who attends.
    pub sequences: Sequences<'a>,
    /// `[`[`PARTS_PER_ITEM`]` · max_items]` parts of [`HeadShape::part_bytes`].
    pub parts: View<'a>,
    /// `[sequences, kv_heads]` i32, zero before and after.
    pub arrived: View<'a>,
    /// With it q, k and v are taken as the product made them: rotated on the way, and the cache is written.
    pub rope: Option<DecodeRope<'a>>,
    /// Whether items may work for several rows.
    pub shares: bool,
    /// What the plan was made for. As many items as it has room for are launched; those behind the plan's number return at once.
    pub cut: Cut,
}

#[repr(C)]
struct DecodeParameters {
    q: u64,
    cache: u64,
    out: u64,
    num_items: u64,
    items: u64,
    members: u64,
    row_parts: u64,
    slots: u64,
    rows: u64,
    context_lens: u64,
    table_starts: u64,
    blocks: u64,
    parts: u64,
    arrived: u64,
    rope: u64,
    query_norm: u64,
    key_norm: u64,
    num_heads: i32,
    num_kv_heads: i32,
    q_stride: i32,
    window: i32,
    scale: f32,
    eps: f32,
    value_scale: f32,
    inverse_key_scale: f32,
    inverse_value_scale: f32,
}

/// Whether so many blocks run faster four on a multiprocessor, with fewer registers each, than three: not when three of them
/// take all in one round, and not when rows are so few that they are cut.
fn fits_four(blocks: usize, multiprocessors: usize) -> bool {
    let rows_per_processor = blocks as f64 / multiprocessors as f64;
    rows_per_processor > 3.0 || (1.5..=2.0).contains(&rows_per_processor)
}

impl DecodeAttention<'_> {
    fn validate(&self) -> Result<(), CudaError> {
        self.shape.validate()?;
        let (op, seqs) = ("decode_attention", &self.sequences);
        let max_items = self.cut.max_items;
        self.shape.kv_dtype.check_scales(op, self.kv_scales)?;
        need(
            self.plan.num_items.bytes >= 4
                && self.plan.items.bytes >= max_items * ITEM_WORDS * 4
                && self.plan.members.bytes >= seqs.count * 4
                && self.plan.row_parts.bytes >= seqs.count * 8
                && self.parts.bytes >= max_items * PARTS_PER_ITEM * self.shape.part_bytes()
                && self.arrived.bytes >= seqs.count * self.shape.num_kv_heads * 4
                && [seqs.rows, seqs.context_lens, seqs.table_starts]
                    .iter()
                    .all(|view| view.bytes >= seqs.count * 4),
            op,
            || format!("{} sequences, {max_items} items do not fit", seqs.count),
        )?;
        need(
            !self.cut.wide || self.shape.has_wide() && !self.shares,
            op,
            || "wide blocks take heads of 64 or 128 values, 8 on a kv head, and one row".to_owned(),
        )?;
        let dim = self.shape.head_dim;
        let norms = |rope: &DecodeRope<'_>| {
            rope.norms
                .is_none_or(|(query, key)| query.bytes >= dim * 2 && key.bytes >= dim * 2)
        };
        need(
            self.rope
                .is_none_or(|rope| Self::rotates(dim) && norms(&rope)),
            op,
            || format!("heads of {dim} values cannot be rotated on the way"),
        )
    }

    /// Whether heads of so many values can be rotated on their way in.
    #[must_use]
    pub fn rotates(head_dim: usize) -> bool {
        head_dim.is_multiple_of(64)
    }

    /// Queues it.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or the driver refuses.
    pub fn launch(&self, device: &Device) -> Result<(), CudaError> {
        self.validate()?;
        let (shape, seqs) = (&self.shape, &self.sequences);
        let norms = self.rope.and_then(|rope| rope.norms);
        let parameters = DecodeParameters {
            q: self.qkv.address(),
            cache: self.cache.address(),
            out: self.out.address(),
            num_items: self.plan.num_items.address(),
            items: self.plan.items.address(),
            members: self.plan.members.address(),
            row_parts: self.plan.row_parts.address(),
            slots: self.plan.slots.address(),
            rows: seqs.rows.address(),
            context_lens: seqs.context_lens.address(),
            table_starts: seqs.table_starts.address(),
            blocks: seqs.blocks.address(),
            parts: self.parts.address(),
            arrived: self.arrived.address(),
            rope: self.rope.map_or(0, |rope| rope.table.address()),
            query_norm: norms.map_or(0, |(query, _)| query.address()),
            key_norm: norms.map_or(0, |(_, key)| key.address()),
            num_heads: shape.num_heads as i32,
            num_kv_heads: shape.num_kv_heads as i32,
            q_stride: shape.q_stride() as i32,
            window: shape.window as i32,
            scale: shape.scale(self.kv_scales),
            eps: self.rope.map_or(0.0, |rope| rope.eps),
            value_scale: self.kv_scales[1],
            inverse_key_scale: self.kv_scales[0].recip(),
            inverse_value_scale: self.kv_scales[1].recip(),
        };
        let columns = if self.shares {
            shape.rows_per_item() * shape.group()
        } else {
            shape.group()
        };
        let tiles = columns.div_ceil(8);
        let blocks = seqs.count * shape.num_kv_heads;
        let processors = device.multiprocessors() as usize;
        let (blocks_are, threads, shared) = if self.cut.wide {
            let merged = WIDE_THREADS / 32 * WIDE_COLUMNS * (shape.head_dim + 4) * 4;
            ("wide_", WIDE_THREADS, merged)
        } else if tiles == 1 && shape.head_dim == 128 && fits_four(blocks, processors) {
            ("four_", THREADS, 0)
        } else {
            ("", THREADS, 0)
        };
        let name = format!(
            "decode_attention_{blocks_are}{}_{tiles}_{}",
            shape.head_dim,
            shape.suffix()
        );
        let launch = Shape {
            grid: (shape.num_kv_heads, self.cut.max_items),
            threads,
            shared,
        };
        // SAFETY: the parameter is the kernel's own struct; work lists and parts fit (`validate`); rows, pages and items
        // are in range by the uploader's check.
        unsafe { device.launch(&name, launch, arguments![parameters]) }
    }
}
