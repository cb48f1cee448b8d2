//! How the kernels in `int4_few_sm90a.cu`, which multiply one or two rows with four-bit weights, are launched.

use super::{
    CudaError, Device,
    int4::Int4View,
    modules::Shape,
    tensor_map::{Element, Swizzle, TensorMap},
};

/// Columns of a step, which are those of a group; steps of a box of weights, rows of a tile, threads, and warps, each of which
/// has boxes of its own in flight.
const STEP: usize = 128;
const BOX: usize = 2;
const ROWS: usize = 16;
const THREADS: usize = 512;
const WARPS: usize = 16;
/// Most rows.
const MAX_ROWS: usize = 2;
/// Columns from which rows are long enough for one box more in flight.
const LONG_ROW: usize = 8192;
/// Most shared memory of a block on Hopper in bytes, less what the kernels take for sums.
const MOST_SHARED: usize = (227 - 8) << 10;

/// What is multiplied: `m` rows of `k` with a weight `[rows, k]`.
#[derive(Clone, Copy)]
pub(super) struct Int4Few<'a> {
    pub(super) weight: Int4View<'a>,
    pub(super) m: usize,
    pub(super) rows: usize,
    pub(super) k: usize,
    /// Parts of the rows, of which a tile takes the same: 2 for gate and up.
    pub(super) parts: usize,
}

impl Int4Few<'_> {
    /// Whether this GPU has the kernels and they know these widths.
    pub(super) fn is_for(&self, device: &Device) -> bool {
        device.is_hopper()
            && self.m <= MAX_ROWS
            && self.weight.group == STEP
            && !self.weight.affine
            && self.k.is_multiple_of(BOX * STEP)
            && self.rows.is_multiple_of(4 * self.parts)
            && self.shared() <= MOST_SHARED
    }

    /// Boxes of each warp in flight.
    fn depth(&self) -> usize {
        if self.k < LONG_ROW { 3 } else { 4 }
    }

    /// Boxes with their cells and barriers, and behind them x: two columns of bytes, and a scale and a sum for each group.
    fn shared(&self) -> usize {
        let place = BOX * ROWS * (STEP / 2 + 4) + 8;
        WARPS * self.depth() * place + self.m * (2 * (self.k + 16) + self.k / STEP * 8)
    }

    /// The kernel for an output of this kind.
    pub(super) fn name(&self, kind: &str) -> String {
        format!("int4_few_{kind}_{}", self.depth())
    }

    /// Blocks that stay, one on each multiprocessor.
    pub(super) fn shape(&self, device: &Device) -> Shape {
        let tiles = self.rows.div_ceil(ROWS);
        Shape {
            grid: (tiles.min(device.multiprocessors() as usize), 1),
            threads: THREADS,
            shared: self.shared(),
        }
    }

    /// The maps of the weight's words, by parts and boxes, and cells, by parts and steps.
    pub(super) fn maps(&self) -> Result<[TensorMap; 2], CudaError> {
        let (rows, k, parts) = (self.rows as u64, self.k as u64, self.parts as u64);
        let (rows_of_part, box_rows) = (rows / parts, (ROWS / self.parts) as u32);
        let in_box = (BOX * STEP / 8) as u64;
        let words = TensorMap::new(
            Element::U32,
            self.weight.words,
            &[in_box, rows_of_part, parts, k / (BOX * STEP) as u64],
            &[k / 2, rows_of_part * k / 2, in_box * 4],
            &[in_box as u32, box_rows, self.parts as u32, 1],
            Swizzle::Bytes128,
        )?;
        let cells = TensorMap::new(
            Element::U32,
            self.weight.cells,
            &[rows_of_part, parts, k / STEP as u64],
            &[rows_of_part * 4, rows * 4],
            &[box_rows, self.parts as u32, BOX as u32],
            Swizzle::None,
        )?;
        Ok([words, cells])
    }
}
