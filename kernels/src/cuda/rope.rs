//! Rotary embedding of q and k (with the heads' norms where a model has them), and K and V into their pages.

use super::{
    CudaError, Device, Float, KvDtype, View,
    modules::{Shape, arguments},
    need,
};

/// Tokens in a page.
pub const BLOCK_SIZE: usize = 16;
/// Rows and heads in a block of threads, and threads that share a row: as in `rope.cu`.
const TILE_ROWS: usize = 16;
const TILE_HEADS: usize = 4;
const ROW_THREADS: usize = 16;

/// Cosine and sine of position · frequency for all positions, `[positions, pairs]` pairs of f32.
///
/// # Errors
/// [`CudaError`] when the table does not fit or the driver refuses.
pub fn rope_table(
    device: &Device,
    inverse_frequencies: View<'_>,
    table: View<'_>,
    pairs: usize,
    positions: usize,
) -> Result<(), CudaError> {
    need(
        inverse_frequencies.bytes >= pairs * 8 && table.bytes >= pairs * positions * 8,
        "rope_table",
        || format!("{positions} positions of {pairs} pairs do not fit"),
    )?;
    let (frequencies, out) = (inverse_frequencies.address(), table.address());
    let (pair_count, position_count) = (pairs as i32, positions as i32);
    let shape = Shape {
        grid: ((pairs * positions).div_ceil(256), 1),
        threads: 256,
        shared: 0,
    };
    // SAFETY: parameters as in `rope.cu`; sizes checked above.
    unsafe {
        device.launch(
            "rope_table",
            shape,
            arguments![frequencies, out, pair_count, position_count],
        )
    }
}

/// Rotates q and k in place and writes k and v to their pages (see `rope.cu` for a page's layout).
#[derive(Clone, Copy)]
pub struct RopeWriteKv<'a> {
    /// Type of everything but indices and pages.
    pub float: Float,
    /// What the pages hold.
    pub kv_dtype: KvDtype,
    /// What eight-bit K and V are divided by; 1 for others.
    pub kv_scales: [f32; 2],
    /// `[rows, (heads + 2 · kv_heads) · head_dim]`
    pub qkv: View<'a>,
    /// `[head_dim]` each: norms of q and of k.
    pub norms: Option<(View<'a>, View<'a>)>,
    /// `[positions, head_dim / 2]` pairs of f32 by [`rope_table`].
    pub table: View<'a>,
    /// `[rows]` u32, below the table's length.
    pub positions: View<'a>,
    /// `[rows]` i64: `page · 16 + offset`, or −1 for none.
    pub slot_mapping: View<'a>,
    /// This layer's pages.
    pub cache: View<'a>,
    /// Rows.
    pub rows: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Values in a head, a multiple of 16 up to 256.
    pub head_dim: usize,
    /// Added to the mean square in the heads' norms.
    pub eps: f32,
}

impl RopeWriteKv<'_> {
    fn validate(&self) -> Result<(), CudaError> {
        let op = "rope_write_kv";
        need(
            self.head_dim > 0 && self.head_dim.is_multiple_of(16) && self.head_dim <= 256,
            op,
            || {
                format!(
                    "heads of {} values; a multiple of 16 up to 256 is needed",
                    self.head_dim
                )
            },
        )?;
        let heads = self.num_heads + 2 * self.num_kv_heads;
        need(
            self.qkv.bytes >= self.rows * heads * self.head_dim * Float::BYTES
                && self.positions.bytes >= self.rows * 4
                && self.slot_mapping.bytes >= self.rows * 8,
            op,
            || format!("{} rows do not fit", self.rows),
        )?;
        self.kv_dtype.check_scales(op, self.kv_scales)
    }

    /// Queues it.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or the driver refuses.
    pub fn launch(&self, device: &Device) -> Result<(), CudaError> {
        self.validate()?;
        let (query_norm, key_norm) = self
            .norms
            .map_or((0, 0), |(query, key)| (query.address(), key.address()));
        let (qkv, table) = (self.qkv.address(), self.table.address());
        let (positions, slots) = (self.positions.address(), self.slot_mapping.address());
        let cache = self.cache.address();
        let (rows, heads, kv_heads) = (
            self.rows as i32,
            self.num_heads as i32,
            self.num_kv_heads as i32,
        );
        let (head_dim, block) = (self.head_dim as i32, BLOCK_SIZE as i32);
        let shape = Shape {
            grid: (
                self.rows.div_ceil(TILE_ROWS),
                (self.num_heads + 2 * self.num_kv_heads).div_ceil(TILE_HEADS),
            ),
            threads: TILE_ROWS * ROW_THREADS,
            shared: TILE_HEADS * TILE_ROWS * (self.head_dim + 8) * Float::BYTES,
        };
        let lanes = (self.head_dim / 16).next_power_of_two().max(4);
        let (float, kv) = (self.float.suffix(), self.kv_dtype.suffix());
        let name = format!("rope_write_kv_{lanes}_{float}{kv}");
        let [inverse_key, inverse_value] = self.kv_scales.map(f32::recip);
        // SAFETY: parameters as in `rope.cu`; the rows fit (`validate`); positions and cache slots are in range by the
        // uploader's check.
        unsafe {
            device.launch(
                &name,
                shape,
                arguments![
                    qkv,
                    query_norm,
                    key_norm,
                    table,
                    positions,
                    slots,
                    cache,
                    rows,
                    heads,
                    kv_heads,
                    head_dim,
                    block,
                    self.eps,
                    inverse_key,
                    inverse_value
                ],
            )
        }
    }
}
