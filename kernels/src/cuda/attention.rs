//! Paged attention: single rows (decode) and many rows (prefill), with the lists of work that the host makes for them.

use super::{
    CudaError, Device, Float, View,
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
/// Fewest pages in a decode item: 4 warps read one each.
const MIN_ITEM_PAGES: usize = 4;

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
        let most = if self.head_dim == 256 { 8 } else { MAX_GROUP };
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
        self.num_heads * (self.head_dim + 2) * 4
    }

    fn q_stride(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }

    fn scale(&self) -> f32 {
        std::f32::consts::LOG2_E / (self.head_dim as f32).sqrt()
    }
}

/// How decode attention is cut into items.
#[derive(Debug, Default)]
pub struct DecodePlan {
    /// (sequence, part) of each item; parts of a sequence are neighbours.
    pub items: Vec<[i32; 2]>,
    /// Pages in an item.
    pub item_pages: usize,
}

impl DecodePlan {
    /// Cuts sequences so that all items fit `max_items`, as finely as that allows, but no item below 4 pages.
    ///
    /// # Panics
    /// When there are more sequences than items.
    pub fn make(&mut self, shape: &HeadShape, context_lens: &[u32], max_items: usize) {
        assert!(
            context_lens.len() <= max_items,
            "every sequence has an item: this is a bug"
        );
        let pages = |length: u32| {
            let length = length as usize;
            let first = match shape.window {
                0 => 0,
                window => length.saturating_sub(window) / BLOCK_SIZE,
            };
            length.div_ceil(BLOCK_SIZE) - first
        };
        let longest = context_lens.iter().map(|length| pages(*length)).max();
        let items = |size: usize| -> usize {
            context_lens
                .iter()
                .map(|length| pages(*length).div_ceil(size).max(1))
                .sum()
        };
        // The smallest size whose items fit: fewer pages, more items.
        let (mut low, mut high) = (MIN_ITEM_PAGES, longest.unwrap_or(0).max(MIN_ITEM_PAGES));
        while low < high {
            let middle = usize::midpoint(low, high);
            if items(middle) <= max_items {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        self.item_pages = high;
        self.items.clear();
        for (seq, length) in context_lens.iter().enumerate() {
            for part in 0..pages(*length).div_ceil(high).max(1) {
                self.items.push([seq as i32, part as i32]);
            }
        }
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
    /// i32: number of items, pages in an item.
    pub plan: View<'a>,
    /// `[max_items]` pairs of i32 by [`DecodePlan`].
    pub items: View<'a>,
    /// Who attends.
    pub sequences: Sequences<'a>,
    /// `[max_items]` parts of [`HeadShape::part_bytes`].
    pub parts: View<'a>,
    /// `[sequences, kv_heads]` i32, zero before and after.
    pub arrived: View<'a>,
    /// Items that are launched; those behind the plan's number return at once.
    pub max_items: usize,
}

#[repr(C)]
struct DecodeParameters {
    q: u64,
    cache: u64,
    out: u64,
    plan: u64,
    items: u64,
    rows: u64,
    context_lens: u64,
    table_starts: u64,
    blocks: u64,
    parts: u64,
    arrived: u64,
    num_heads: i32,
    num_kv_heads: i32,
    q_stride: i32,
    window: i32,
    scale: f32,
}

impl DecodeAttention<'_> {
    fn validate(&self) -> Result<(), CudaError> {
        self.shape.validate()?;
        let seqs = &self.sequences;
        need(
            self.plan.bytes >= 8
                && self.items.bytes >= self.max_items * 8
                && self.parts.bytes >= self.max_items * self.shape.part_bytes()
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
        )
    }

    /// Queues it.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or the driver refuses.
    pub fn launch(&self, device: &Device) -> Result<(), CudaError> {
        self.validate()?;
        let (shape, seqs) = (&self.shape, &self.sequences);
        let parameters = DecodeParameters {
            q: self.qkv.address(),
            cache: self.cache.address(),
            out: self.out.address(),
            plan: self.plan.address(),
            items: self.items.address(),
            rows: seqs.rows.address(),
            context_lens: seqs.context_lens.address(),
            table_starts: seqs.table_starts.address(),
            blocks: seqs.blocks.address(),
            parts: self.parts.address(),
            arrived: self.arrived.address(),
            num_heads: shape.num_heads as i32,
            num_kv_heads: shape.num_kv_heads as i32,
            q_stride: shape.q_stride() as i32,
            window: shape.window as i32,
            scale: shape.scale(),
        };
        let tiles = shape.group().div_ceil(8);
        let name = format!(
            "decode_attention_{}_{tiles}_{}",
            shape.head_dim,
            shape.float.suffix()
        );
        let launch = Shape {
            grid: (self.max_items, shape.num_kv_heads),
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
