//! How the kernels in `int4_skinny_sm90a.cu`, which multiply few rows with four-bit weights, are launched.

use super::{
    CudaError, Device, Float, View,
    int4::{Int4View, group_shift},
    modules::Shape,
    tensor_map::{Element, Swizzle, TensorMap},
};

/// Columns of a step, rows of weights of a tile, and threads of a block.
const STEP: usize = 128;
const ROWS: usize = 128;
const THREADS: usize = 288;
/// Blocks that stay on a multiprocessor.
const BLOCKS: usize = 2;
/// Rows up to which only weights of at least so many values are multiplied here.
const FEW: usize = 4;
const LARGE: usize = 50_000_000;
/// Most blocks of a cluster that every Hopper GPU runs.
const MAX_SPLITS: usize = 8;
/// What a round of blocks costs besides its steps, in steps, with few and with many tokens; and what each of the blocks of a
/// cluster costs, in half steps. Measured on an H200.
const ROUND: [usize; 2] = [16, 8];
const SHARING: usize = 3;

/// What is multiplied: `m` rows of `k` with a weight `[rows, k]`.
#[derive(Clone, Copy)]
pub(super) struct Int4Skinny<'a> {
    /// `[m, k]` halves.
    pub(super) x: View<'a>,
    pub(super) weight: Int4View<'a>,
    pub(super) m: usize,
    pub(super) rows: usize,
    pub(super) k: usize,
    /// Parts of the rows, of which a tile takes the same: 2 for gate and up.
    pub(super) parts: usize,
}

impl Int4Skinny<'_> {
    /// Whether this GPU has the kernels, they know these widths, and are faster here than the common ones: with few rows their
    /// start, which waits for the blocks of a cluster, is only worth it for large weights.
    pub(super) fn is_for(&self, device: &Device) -> bool {
        device.is_hopper()
            && self.rows.is_multiple_of(8 * self.parts)
            && (self.m > FEW || self.rows * self.k >= LARGE)
    }

    /// Tokens that are computed, with zeros behind the given ones.
    fn tokens(&self) -> usize {
        self.m.next_multiple_of(8).next_power_of_two()
    }

    /// The kernel for an output of this kind.
    pub(super) fn name(&self, kind: &str) -> String {
        format!("{}_hopper_{kind}_{}", self.scheme(), self.tokens())
    }

    fn scheme(&self) -> &'static str {
        if self.weight.group == STEP && !self.weight.affine {
            "int4_128"
        } else {
            self.weight.kernel()
        }
    }

    /// The launch, and how many blocks share a tile: what takes the least rounds and steps.
    pub(super) fn shape(&self, device: &Device, name: &str) -> Result<(Shape, usize), CudaError> {
        let (tiles, pairs) = (self.rows.div_ceil(ROWS), self.k.div_ceil(2 * STEP));
        let tokens = self.tokens();
        let cells = if self.scheme() == "int4_128" { 4 } else { 16 };
        let shape = |splits: usize| Shape {
            grid: (tiles * splits, 1),
            threads: THREADS,
            shared: shared_bytes(tokens, cells),
        };
        let round = ROUND[usize::from(tokens > 16)];
        let mut best = (usize::MAX, 1);
        for splits in 1..=MAX_SPLITS.min(pairs) {
            let (at_once, sharing) = if splits == 1 {
                (BLOCKS * device.multiprocessors() as usize, 0)
            } else {
                let at_once = device.clusters_at_once(name, shape(splits), splits)?;
                (at_once, SHARING * splits)
            };
            // A multiprocessor's two blocks need not begin together: it may have a part of a round less to do.
            let parts = (BLOCKS * tiles).div_ceil(at_once).max(BLOCKS);
            let cost = parts * (2 * pairs.div_ceil(splits) + round) + sharing;
            best = best.min((cost, splits));
        }
        Ok((shape(best.1), best.1))
    }

    /// The maps of the weight's words and cells, by pairs of steps, and of x.
    pub(super) fn maps(&self) -> Result<[TensorMap; 3], CudaError> {
        let (rows, k) = (self.rows as u64, self.k as u64);
        let tile_rows = (ROWS / self.parts) as u32;
        let shift = group_shift(self.k, self.weight.group)
            .expect("`validate` has seen this group: this is a bug");
        let words = TensorMap::new(
            Element::U32,
            self.weight.words,
            &[k / 8, rows],
            &[k / 2],
            &[2 * STEP as u32 / 8, tile_rows],
            Swizzle::Bytes128,
        )?;
        let cells = TensorMap::new(
            Element::U32,
            self.weight.cells,
            &[rows, k / self.weight.group as u64],
            &[rows * 4],
            &[tile_rows, (8 >> shift.min(3)).max(1)],
            Swizzle::None,
        )?;
        let x = TensorMap::new(
            Float::F16,
            self.x,
            &[k, self.m as u64],
            &[k * Float::BYTES as u64],
            &[STEP as u32 / 2, self.tokens() as u32],
            Swizzle::Bytes128,
        )?;
        Ok([words, cells, x])
    }
}

/// Words and cells of the steps in flight, x, and their barriers, as in `int4_skinny_sm90a.cu`; `cells` bytes of cells belong to a
/// row's step.
fn shared_bytes(tokens: usize, cells: usize) -> usize {
    // Steps in flight, of weights and of x.
    let (depth, x_depth) = if tokens <= 16 {
        (8, 8)
    } else if tokens <= 32 {
        (8, 4)
    } else {
        (6, 3)
    };
    x_depth * tokens * STEP * Float::BYTES
        + depth * ROWS * (STEP / 2 + cells)
        + (2 * x_depth + depth / 2) * 8
}

#[cfg(test)]
mod tests {
    use super::{BLOCKS, shared_bytes};

    #[test]
    fn as_many_blocks_as_are_to_stay_have_room_on_a_multiprocessor() {
        // Of Hopper's 228 KiB each block costs 1 KiB more than it asks for.
        let room = (228 << 10) / BLOCKS - (1 << 10);
        for tokens in [8, 16, 32, 64] {
            for cells in [4, 16] {
                assert!(shared_bytes(tokens, cells) <= room);
            }
        }
    }
}
