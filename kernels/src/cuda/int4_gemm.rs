//! Products of many rows with four-bit weights as they are, on Hopper GPUs (few ones are [`SkinnyGemm`](super::skinny::SkinnyGemm)'s).

use super::{
    CudaError, Device, Float, View,
    int4::{self, Int4View},
    modules::{Shape, arguments},
    need,
    tensor_map::{Swizzle, TensorMap},
};

/// Columns of a step.
const STEP: usize = 64;
/// Fewest steps of a block that shares a tile's columns with others.
const MIN_STEPS: usize = 8;
/// Most sums of a block.
const MAX_TILE: usize = 256 * 128;

/// `y = x · weightᵀ + bias` in IEEE halves; all row-major.
#[derive(Clone, Copy)]
pub struct Int4Gemm<'a> {
    /// `[m, k]`
    pub x: View<'a>,
    /// `[n, k]`
    pub weight: Int4View<'a>,
    /// `[n]`
    pub bias: Option<View<'a>>,
    /// `[m, n]`
    pub y: View<'a>,
    /// Rows.
    pub m: usize,
    /// Width of the output, a multiple of 8.
    pub n: usize,
    /// Width of the input, a multiple of 64.
    pub k: usize,
    /// [`Self::parts_bytes`] of scratch memory.
    pub parts: View<'a>,
    /// [`Self::arrived_bytes`], zero before and after.
    pub arrived: View<'a>,
}

/// The kernels' parameter, as in `int4_gemm_sm90a.cu`.
#[repr(C)]
struct Parameters {
    words: u64,
    cells: u64,
    bias: u64,
    y: u64,
    parts: u64,
    arrived: u64,
    m: i32,
    n: i32,
    k: i32,
    splits: i32,
    group_shift: i32,
}

impl Int4Gemm<'_> {
    /// Whether this GPU has the kernel and it knows these widths.
    #[must_use]
    pub fn takes(device: &Device, n: usize, k: usize) -> bool {
        device.is_hopper() && n > 0 && n.is_multiple_of(8) && k > 0 && k.is_multiple_of(STEP)
    }

    /// Bytes of the parts of all tiles that blocks share.
    #[must_use]
    pub fn parts_bytes(device: &Device) -> usize {
        device.multiprocessors() as usize * MAX_TILE * 4
    }

    /// Bytes of the counters of those tiles.
    #[must_use]
    pub fn arrived_bytes(device: &Device) -> usize {
        device.multiprocessors() as usize * 4
    }

    fn validate(&self, device: &Device) -> Result<(), CudaError> {
        let (op, m, n, k) = ("int4_gemm", self.m, self.n, self.k);
        need(
            Self::takes(device, n, k) && m > 0 && m < 1 << 24 && n < 1 << 28,
            op,
            || {
                format!(
                    "{m} × {n} × {k}: a Hopper GPU, n a multiple of 8 and k one of {STEP} are needed"
                )
            },
        )?;
        need(
            self.weight.fits(n, k)
                && self.x.bytes >= m * k * Float::BYTES
                && self.y.bytes >= m * n * Float::BYTES
                && self.bias.is_none_or(|bias| bias.bytes >= n * Float::BYTES)
                && self.parts.bytes >= Self::parts_bytes(device)
                && self.arrived.bytes >= Self::arrived_bytes(device),
            op,
            || format!("a view is too short for {m} × {n} × {k}"),
        )
    }

    /// Queues it.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or the driver refuses.
    pub fn launch(&self, device: &Device) -> Result<(), CudaError> {
        self.validate(device)?;
        let multiprocessors = device.multiprocessors() as usize;
        let Tiling {
            tile_m,
            tile_n,
            splits,
        } = tiling(self.m, self.n, self.k / STEP, multiprocessors);
        let n_tiles = self.n.div_ceil(tile_n);
        let m_tiles = self.m.div_ceil(tile_m);
        let x = TensorMap::new(
            Float::F16,
            self.x,
            &[self.k as u64, self.m as u64],
            &[(self.k * Float::BYTES) as u64],
            &[STEP as u32, tile_m as u32 / 2],
            Swizzle::Bytes128,
        )?;
        let parameters = Parameters {
            words: self.weight.words.address(),
            cells: self.weight.cells.address(),
            bias: self.bias.map_or(0, View::address),
            y: self.y.address(),
            parts: self.parts.address(),
            arrived: self.arrived.address(),
            m: self.m as i32,
            n: self.n as i32,
            k: self.k as i32,
            splits: splits as i32,
            group_shift: int4::group_shift(self.k, self.weight.group)
                .expect("`validate` has seen this group: this is a bug"),
        };
        let shape = Shape {
            grid: (n_tiles * splits, m_tiles),
            threads: 512,
            shared: shared_bytes(tile_m, tile_n),
        };
        let shared = if splits > 1 { "_shared" } else { "" };
        let name = format!("{}_gemm{shared}_{tile_m}x{tile_n}", self.weight.kernel());
        // SAFETY: the parameters are the kernel's own struct and a map of x, which lies in its view; all views hold what the
        // shape needs, parts and counters what `splits` allows (`validate`).
        unsafe { device.launch(&name, shape, arguments![parameters, x]) }
    }
}

/// Rows and widths of a tile, the best first where they are as good.
const TILES_M: [usize; 2] = [128, 256];
const TILES_N: [usize; 3] = [128, 112, 96];
/// What a step of a tile costs besides its sums, in sums; and what it costs that blocks share a tile, in steps. Measured on an H200.
const STEP_COST: usize = 25_600;
const SHARING: usize = 6;

/// How the work is cut.
#[derive(Debug, PartialEq)]
struct Tiling {
    /// Rows and outputs of a tile.
    tile_m: usize,
    tile_n: usize,
    /// Blocks that share a tile's columns.
    splits: usize,
}

/// Tiles that end soonest, for rows, outputs, and steps of a row.
fn tiling(m: usize, n: usize, steps: usize, multiprocessors: usize) -> Tiling {
    let of_size = |tile_m: usize, tile_n: usize| {
        let tiles = n.div_ceil(tile_n) * m.div_ceil(tile_m);
        let splits = splits(multiprocessors, tiles, steps);
        let rounds = (tiles * splits).div_ceil(multiprocessors);
        let sharing = if splits > 1 { SHARING } else { 0 };
        let cost = (rounds * steps.div_ceil(splits) + sharing) * (tile_m * tile_n + STEP_COST);
        (
            cost,
            Tiling {
                tile_m,
                tile_n,
                splits,
            },
        )
    };
    let sizes = TILES_M
        .into_iter()
        .flat_map(|m| TILES_N.map(|n| of_size(m, n)));
    let best = sizes.min_by_key(|(cost, _)| *cost);
    best.expect("there are sizes: this is a bug").1
}

/// x and weights of the steps that a block keeps in shared memory, with their barriers, and the words and cells that are copied
/// five steps ahead; as in `int4_gemm_sm90a.cu`.
fn shared_bytes(tile_m: usize, tile_n: usize) -> usize {
    let stages = if tile_m == 128 { 6 } else { 4 };
    stages * ((tile_m + tile_n) * STEP * Float::BYTES + 48) + 5 * 256 * 20
}

/// Blocks that share a tile's columns: as many as run at once, each with some steps.
fn splits(at_once: usize, tiles: usize, steps: usize) -> usize {
    let most = (at_once / tiles).min(steps / MIN_STEPS).max(1);
    // None is left without a step.
    steps.div_ceil(steps.div_ceil(most))
}

#[cfg(test)]
mod tests {
    use super::{splits, tiling};

    #[test]
    fn tiles_are_shared_by_no_more_blocks_than_run_at_once_and_none_is_idle() {
        for at_once in [1, 108, 132, 264] {
            for tiles in 1..300 {
                for steps in [1, 7, 9, 64, 128, 224, 449] {
                    let splits = splits(at_once, tiles, steps);
                    let share = steps.div_ceil(splits);
                    assert!(splits >= 1 && (splits - 1) * share < steps);
                    assert!(splits == 1 || (splits * tiles <= at_once && share >= 8));
                }
            }
        }
    }

    #[test]
    fn tiles_are_such_that_few_multiprocessors_are_without_work() {
        let size = |m, n, k: usize| {
            let tiling = tiling(m, n, k / 64, 132);
            (tiling.tile_m, tiling.tile_n, tiling.splits)
        };
        assert_eq!(size(128, 8192, 8192), (128, 128, 2));
        assert_eq!(size(256, 8192, 8192), (256, 128, 2));
        assert_eq!(size(512, 8192, 8192), (256, 128, 1));
        assert_eq!(size(256, 28672, 4096), (256, 112, 1));
        assert_eq!(size(1024, 28672, 4096), (256, 128, 1));
        assert_eq!(size(512, 6144, 4096), (256, 96, 1));
        assert_eq!(size(256, 4096, 14336), (256, 128, 4));
    }
}
