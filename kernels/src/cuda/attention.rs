//! Paged attention: single rows (decode) and many rows (prefill), with the lists of work that the host makes for them.

use super::{
    CudaError, Device, Float, View,
    decode_plan::{ITEM_WORDS, PARTS_PER_ITEM},
    modules::{Shape, arguments},
    need,
    rope::BLOCK_SIZE,
    tensor_map::{Swizzle, TensorMap},
};

/// Query heads that share a kv head, at most; 8 where a head has 256 values.
pub const MAX_GROUP: usize = 16;
/// Widths of a head that there are kernels for.
pub const HEAD_DIMS: [usize; 4] = [64, 96, 128, 256];
/// Widths of a head that Hopper's prefill kernel knows.
const HOPPER_DIMS: [usize; 2] = [64, 128];
/// Query rows of a prefill item.
pub const TILE_ROWS: usize = 128;

/// Sizes of attention in a model.
#[derive(Debug, Clone, Copy)]
pub struct HeadShape {
    /// Type of q, K, V and the result.
    pub float: Float,
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
        2 * self.num_kv_heads * BLOCK_SIZE * self.head_dim * Float::BYTES
    }

    /// Bytes of one item's part of a result that is cut.
    #[must_use]
    pub fn part_bytes(&self) -> usize {
        self.num_heads * (self.head_dim + 4) * 4
    }

    fn q_stride(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }

    fn scale(&self) -> f32 {
        std::f32::consts::LOG2_E / (self.head_dim as f32).sqrt()
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
    /// Items that are launched; those behind the plan's number return at once.
    pub max_items: usize,
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
        let seqs = &self.sequences;
        need(
            self.plan.num_items.bytes >= 4
                && self.plan.items.bytes >= self.max_items * ITEM_WORDS * 4
                && self.plan.members.bytes >= seqs.count * 4
                && self.plan.row_parts.bytes >= seqs.count * 8
                && self.parts.bytes >= self.max_items * PARTS_PER_ITEM * self.shape.part_bytes()
                && self.arrived.bytes >= seqs.count * self.shape.num_kv_heads * 4
                && [seqs.rows, seqs.context_lens, seqs.table_starts]
                    .iter()
                    .all(|view| view.bytes >= seqs.count * 4),
            "decode_attention",
            || {
                format!(
                    "{} sequences, {} items do not fit",
                    seqs.count, self.max_items
                )
            },
        )?;
        let dim = self.shape.head_dim;
        let norms = |rope: &DecodeRope<'_>| {
            rope.norms
                .is_none_or(|(query, key)| query.bytes >= dim * 2 && key.bytes >= dim * 2)
        };
        need(
            self.rope
                .is_none_or(|rope| Self::rotates(dim) && norms(&rope)),
            "decode_attention",
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
            scale: shape.scale(),
            eps: self.rope.map_or(0.0, |rope| rope.eps),
        };
        let columns = if self.shares {
            shape.rows_per_item() * shape.group()
        } else {
            shape.group()
        };
        let tiles = columns.div_ceil(8);
        let blocks = seqs.count * shape.num_kv_heads;
        let processors = device.multiprocessors() as usize;
        let four = if tiles == 1 && shape.head_dim == 128 && fits_four(blocks, processors) {
            "four_"
        } else {
            ""
        };
        let name = format!(
            "decode_attention_{four}{}_{tiles}_{}",
            shape.head_dim,
            shape.float.suffix()
        );
        let launch = Shape {
            grid: (shape.num_kv_heads, self.max_items),
            threads: 128,
            shared: 0,
        };
        // SAFETY: the parameter is the kernel's own struct; work lists and parts fit (`validate`); rows, pages and items
        // are in range by the uploader's check.
        unsafe { device.launch(&name, launch, arguments![parameters]) }
    }
}

/// Items of prefill attention, longest first: (sequence, tile of [`TILE_ROWS`] rows).
pub fn prefill_items(sequences: impl Iterator<Item = (u32, u32)>, items: &mut Vec<[i32; 2]>) {
    let mut sized: Vec<(u32, [i32; 2])> = Vec::new();
    for (seq, (query_len, context_len)) in sequences.enumerate() {
        let tiles = (query_len as usize).div_ceil(TILE_ROWS);
        for tile in 0..tiles {
            let last = (query_len as usize).min((tile + 1) * TILE_ROWS) as u32;
            let visible = context_len - query_len + last;
            sized.push((visible, [seq as i32, tile as i32]));
        }
    }
    sized.sort_by_key(|(visible, _)| std::cmp::Reverse(*visible));
    items.clear();
    items.extend(sized.into_iter().map(|(_, item)| item));
}

/// Causal attention of many rows per sequence.
#[derive(Clone, Copy)]
pub struct PrefillAttention<'a> {
    /// The model's sizes.
    pub shape: HeadShape,
    /// `[rows, (heads + 2 · kv_heads) · head_dim]`
    pub qkv: View<'a>,
    /// This layer's pages.
    pub cache: View<'a>,
    /// `[rows, heads · head_dim]`
    pub out: View<'a>,
    /// `[num_items]` pairs of i32 by [`prefill_items`].
    pub items: View<'a>,
    /// Who attends.
    pub sequences: Sequences<'a>,
    /// `[sequences]` i32.
    pub query_lens: View<'a>,
    /// Items.
    pub num_items: usize,
    /// Takes the kernel for every architecture where there is one for this GPU alone, to compare the two.
    pub portable: bool,
}

#[repr(C)]
struct PrefillParameters {
    q: u64,
    cache: u64,
    out: u64,
    items: u64,
    rows: u64,
    query_lens: u64,
    context_lens: u64,
    table_starts: u64,
    blocks: u64,
    num_heads: i32,
    num_kv_heads: i32,
    q_stride: i32,
    window: i32,
    scale: f32,
    num_items: i32,
}

impl PrefillAttention<'_> {
    fn validate(&self) -> Result<(), CudaError> {
        self.shape.validate()?;
        let seqs = &self.sequences;
        need(
            self.items.bytes >= self.num_items * 8
                && [
                    seqs.rows,
                    seqs.context_lens,
                    seqs.table_starts,
                    self.query_lens,
                ]
                .iter()
                .all(|view| view.bytes >= seqs.count * 4),
            "prefill_attention",
            || {
                format!(
                    "{} sequences, {} items do not fit",
                    seqs.count, self.num_items
                )
            },
        )
    }

    /// Queues it.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or the driver refuses.
    pub fn launch(&self, device: &Device) -> Result<(), CudaError> {
        self.validate()?;
        let (shape, seqs) = (&self.shape, &self.sequences);
        let parameters = PrefillParameters {
            q: self.qkv.address(),
            cache: self.cache.address(),
            out: self.out.address(),
            items: self.items.address(),
            rows: seqs.rows.address(),
            query_lens: self.query_lens.address(),
            context_lens: seqs.context_lens.address(),
            table_starts: seqs.table_starts.address(),
            blocks: seqs.blocks.address(),
            num_heads: shape.num_heads as i32,
            num_kv_heads: shape.num_kv_heads as i32,
            q_stride: shape.q_stride() as i32,
            window: shape.window as i32,
            scale: shape.scale(),
            num_items: self.num_items as i32,
        };
        if device.is_hopper() && HOPPER_DIMS.contains(&shape.head_dim) && !self.portable {
            return self.launch_hopper(device, &parameters);
        }
        let stored = if shape.head_dim == 96 {
            128
        } else {
            shape.head_dim
        };
        let name = format!(
            "prefill_attention_{}_{}",
            shape.head_dim,
            shape.float.suffix()
        );
        // Q, and two stages of 64 tokens of K and V.
        let shared = TILE_ROWS * stored * 2 + 2 * 64 * (stored + shape.head_dim) * 2;
        let launch = Shape {
            grid: (self.num_items, shape.num_heads),
            threads: 128,
            shared,
        };
        // SAFETY: the parameter is the kernel's own struct; work lists fit (`validate`); rows, pages and items are in
        // range by the uploader's check.
        unsafe { device.launch(&name, launch, arguments![parameters]) }
    }

    /// The kernel for compute capability 9.0: its copies go by maps of q, K and V.
    fn launch_hopper(
        &self,
        device: &Device,
        parameters: &PrefillParameters,
    ) -> Result<(), CudaError> {
        let shape = &self.shape;
        let (dim, kv_heads) = (shape.head_dim as u64, shape.num_kv_heads as u64);
        let (float, row) = (Float::BYTES as u64, shape.q_stride() as u64);
        let page = shape.page_bytes() as u64;
        let head = dim * BLOCK_SIZE as u64 * float;
        let pages = self.cache.bytes as u64 / page;
        let q = TensorMap::new(
            shape.float,
            self.qkv,
            &[row, self.qkv.bytes as u64 / (row * float)],
            &[row * float],
            &[64, TILE_ROWS as u32],
            Swizzle::Bytes128,
        )?;
        let k = TensorMap::new(
            shape.float,
            self.cache,
            &[dim, BLOCK_SIZE as u64, kv_heads, pages],
            &[dim * float, head, page],
            &[64, BLOCK_SIZE as u32, 1, 1],
            Swizzle::Bytes128,
        )?;
        let values = (kv_heads * head) as usize;
        let v = TensorMap::new(
            shape.float,
            self.cache.slice(values, self.cache.bytes - values),
            &[BLOCK_SIZE as u64, dim, kv_heads, pages],
            &[BLOCK_SIZE as u64 * float, head, page],
            &[BLOCK_SIZE as u32, dim as u32, 1, 1],
            Swizzle::Bytes32,
        )?;
        let name = format!(
            "prefill_attention_hopper_{}_{}",
            shape.head_dim,
            shape.float.suffix()
        );
        let units = self.num_items * shape.num_heads;
        let launch = Shape {
            grid: (units.min(device.multiprocessors() as usize), 1),
            threads: 384,
            // Q, two stages of 128 tokens of K and V, and barriers.
            shared: (TILE_ROWS + 2 * 2 * 128) * shape.head_dim * Float::BYTES + 128,
        };
        // SAFETY: the parameters are the kernel's own struct and three maps of tensors that lie inside their views; work
        // lists fit (`validate`); rows, pages and items are in range by the uploader's check.
        unsafe { device.launch(&name, launch, arguments![*parameters, q, k, v]) }
    }
}
