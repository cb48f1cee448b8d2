//! Paged attention of many rows (prefill).

use super::{
    CudaError, Device, Float, KvDtype, View,
    attention::{HeadShape, Sequences},
    modules::{Shape, arguments},
    need,
    rope::BLOCK_SIZE,
    tensor_map::{Swizzle, TensorMap},
};

/// Widths of a head that Hopper's kernel knows.
const HOPPER_DIMS: [usize; 2] = [64, 128];
/// Query rows of an item.
pub const TILE_ROWS: usize = 128;
/// Tokens that the portable kernel copies at once.
const TILE_TOKENS: usize = 64;

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
    /// What eight-bit K and V were divided by; 1 for others.
    pub kv_scales: [f32; 2],
    /// `[rows, heads · head_dim]`
    pub out: View<'a>,
    /// `[num_items]` pairs of i32 by [`prefill_items`]; with `portable`, also (sequence without rows, 0), which does nothing.
    pub items: View<'a>,
    /// Who attends.
    pub sequences: Sequences<'a>,
    /// `[sequences]` i32.
    pub query_lens: View<'a>,
    /// Items.
    pub num_items: usize,
    /// Takes the kernel for every architecture where there is one for this GPU alone. A row's result then depends on the row and
    /// its tokens alone, bit for bit, however many other rows its sequence has.
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
    value_scale: f32,
}

impl PrefillAttention<'_> {
    fn validate(&self) -> Result<(), CudaError> {
        self.shape.validate()?;
        let (op, seqs) = ("prefill_attention", &self.sequences);
        self.shape.kv_dtype.check_scales(op, self.kv_scales)?;
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
            op,
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
            scale: shape.scale(self.kv_scales),
            num_items: self.num_items as i32,
            value_scale: self.kv_scales[1],
        };
        if device.is_hopper() && HOPPER_DIMS.contains(&shape.head_dim) && !self.portable {
            return self.launch_hopper(device, &parameters);
        }
        let stored = if shape.head_dim == 96 {
            128
        } else {
            shape.head_dim
        };
        let name = format!("prefill_attention_{}_{}", shape.head_dim, shape.suffix());
        let stage = TILE_TOKENS * (stored + shape.head_dim) * Float::BYTES;
        let stages = match shape.kv_dtype {
            KvDtype::Float => 2 * stage,
            // One, and the next tile as it is stored.
            KvDtype::Fp8 => stage + 2 * TILE_TOKENS * shape.head_dim,
        };
        let shared = TILE_ROWS * stored * Float::BYTES + stages;
        let launch = Shape {
            grid: (self.num_items * shape.num_heads, 1),
            threads: 128,
            shared,
        };
        // SAFETY: the parameter is the kernel's own struct; work lists fit (`validate`); rows, pages and items are in
        // range by the uploader's check.
        unsafe { device.launch(&name, launch, arguments![parameters]) }
    }

    /// The kernel for compute capability 9.0: its copies go by maps of q, K and V; eight-bit pages are copied as they are.
    fn launch_hopper(
        &self,
        device: &Device,
        parameters: &PrefillParameters,
    ) -> Result<(), CudaError> {
        let shape = &self.shape;
        let (dim, kv_heads) = (shape.head_dim as u64, shape.num_kv_heads as u64);
        let (float, row) = (Float::BYTES as u64, shape.q_stride() as u64);
        let units = self.num_items * shape.num_heads;
        let name = format!(
            "prefill_attention_hopper_{}_{}",
            shape.head_dim,
            shape.suffix()
        );
        // Q, two stages of 128 tokens of K and V, and barriers; then four eight-bit tiles of K or V.
        let (threads, eight_bit) = match shape.kv_dtype {
            KvDtype::Float => (384, 0),
            KvDtype::Fp8 => (512, 4 * 128 * shape.head_dim),
        };
        let launch = Shape {
            grid: (units.min(device.multiprocessors() as usize), 1),
            threads,
            shared: (TILE_ROWS + 2 * 2 * 128) * shape.head_dim * Float::BYTES + 256 + eight_bit,
        };
        let q = TensorMap::new(
            shape.float,
            self.qkv,
            &[row, self.qkv.bytes as u64 / (row * float)],
            &[row * float],
            &[64, TILE_ROWS as u32],
            Swizzle::Bytes128,
        )?;
        if shape.kv_dtype == KvDtype::Fp8 {
            // SAFETY: as below, but for the maps of K and V: pages are in range by the uploader's check.
            return unsafe { device.launch(&name, launch, arguments![*parameters, q]) };
        }
        let page = shape.page_bytes() as u64;
        let head = dim * BLOCK_SIZE as u64 * float;
        let pages = self.cache.bytes as u64 / page;
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
        // SAFETY: the first parameter is the kernel's own struct, the others are maps of tensors that lie inside their views; work
        // lists fit (`validate`); rows, pages and items are in range by the uploader's check.
        unsafe { device.launch(&name, launch, arguments![*parameters, q, k, v]) }
    }
}
