//! `y = x · wᵀ` for any number of rows.
//!
//! One order of summation per output, whatever the number of rows or threads: blocks of 32 inputs in order for
//! quantised weights (integer dot products inside a block are exact), single inputs in order for float weights.

use super::{
    Isa, PackedMatrix, QuantizedRows, ThreadPool,
    packed::{Data, PANEL},
    pool::SharedMut,
    quantize::BLOCK,
    simd::{Simd, dispatch},
};

/// The left operand: rows in f32, and the same rows in int8 for quantised weights.
#[derive(Clone, Copy)]
pub struct MatmulInput<'a> {
    /// `[rows, columns]`
    pub x: &'a [f32],
    /// The same, quantised; needed when [`PackedMatrix::is_quantized`].
    pub quantized: Option<&'a QuantizedRows>,
    /// Rows.
    pub rows: usize,
}

/// Where a part's columns go in `y`: `y[row · stride + offset + n]`.
#[derive(Clone, Copy)]
struct Output {
    y: SharedMut<f32>,
    stride: usize,
    offset: usize,
}

/// Multiplies-and-adds that make a task worth handing out.
const TASK_MACS: usize = 1 << 17;

/// Writes `x · wᵀ` to columns `offset..offset + w.rows()` of `y`, `[rows, stride]`.
///
/// # Panics
/// When the shapes do not fit, or quantised weights get no quantised rows.
pub fn matmul(
    pool: &ThreadPool,
    w: &PackedMatrix,
    input: MatmulInput<'_>,
    y: &mut [f32],
    stride: usize,
    offset: usize,
) {
    matmul_with(Isa::detect(), pool, w, input, y, stride, offset);
}

/// [`matmul`] on a given instruction set, for tests and benchmarks; `isa` must be one of [`Isa::available`].
///
/// # Panics
/// As [`matmul`], and when this machine lacks `isa`.
#[allow(
    clippy::too_many_arguments,
    reason = "matmul's arguments and the instruction set"
)]
pub fn matmul_with(
    isa: Isa,
    pool: &ThreadPool,
    w: &PackedMatrix,
    input: MatmulInput<'_>,
    y: &mut [f32],
    stride: usize,
    offset: usize,
) {
    let rows = input.rows;
    assert!(
        Isa::available().contains(&isa),
        "this machine has no {isa:?}"
    );
    assert_eq!(
        input.x.len(),
        rows * w.columns,
        "input of {rows} rows of {}",
        w.columns
    );
    assert!(
        offset + w.rows <= stride && y.len() == rows * stride,
        "output of {rows} rows of {stride}"
    );
    if rows == 0 {
        return;
    }
    let out = Output {
        y: SharedMut::new(y),
        stride,
        offset,
    };
    let panels = w.rows.div_ceil(PANEL);
    let per_task =
        (TASK_MACS / (PANEL * w.columns * rows)).clamp(1, panels.div_ceil(pool.threads()));
    let quantized = w.is_quantized().then(|| {
        let quantized = input
            .quantized
            .expect("quantised weights need quantised rows");
        assert!(
            quantized.rows == rows && quantized.columns == w.columns,
            "the quantised rows are of another input"
        );
        quantized
    });
    pool.run(panels.div_ceil(per_task), &|task, _| {
        for panel in task * per_task..((task + 1) * per_task).min(panels) {
            match (&w.data, quantized) {
                (Data::Q4 { q, scales }, Some(x)) => {
                    run_panel(
                        isa,
                        Panel::Q4(q, scales),
                        panel,
                        w,
                        Activations::Int8(x),
                        rows,
                        out,
                    );
                }
                (Data::Q8 { q, scales }, Some(x)) => {
                    run_panel(
                        isa,
                        Panel::Q8(q, scales),
                        panel,
                        w,
                        Activations::Int8(x),
                        rows,
                        out,
                    );
                }
                (Data::F32(values), _) => run_panel(
                    isa,
                    Panel::F32(values),
                    panel,
                    w,
                    Activations::Float(input.x),
                    rows,
                    out,
                ),
                (Data::F16(values), _) => run_panel(
                    isa,
                    Panel::F16(values),
                    panel,
                    w,
                    Activations::Float(input.x),
                    rows,
                    out,
                ),
                (Data::BF16(values), _) => run_panel(
                    isa,
                    Panel::BF16(values),
                    panel,
                    w,
                    Activations::Float(input.x),
                    rows,
                    out,
                ),
                _ => unreachable!("quantised weights have quantised rows: asserted above"),
            }
        }
    });
}

#[derive(Clone, Copy)]
enum Panel<'a> {
    Q4(&'a [u8], &'a [u16]),
    Q8(&'a [u8], &'a [u16]),
    F32(&'a [f32]),
    F16(&'a [u16]),
    BF16(&'a [u16]),
}

#[derive(Clone, Copy)]
enum Activations<'a> {
    Int8(&'a QuantizedRows),
    Float(&'a [f32]),
}

/// All rows against one panel, in tiles of 8, 4, 2, 1 rows.
fn run_panel(
    isa: Isa,
    data: Panel<'_>,
    panel: usize,
    w: &PackedMatrix,
    x: Activations<'_>,
    rows: usize,
    out: Output,
) {
    let mut row = 0;
    while row < rows {
        let tile = match rows - row {
            8.. => 8,
            4.. => 4,
            2.. => 2,
            _ => 1,
        };
        let mut sums = [[0f32; PANEL]; 8];
        let sums_ref = &mut sums;
        let columns = w.columns;
        // SAFETY: `isa` is available by `matmul_with`'s assertion. `tile` rows from `row` exist in the input by the
        // loop's bound, `panel` is below the panels that the matrix was packed with, and every buffer's length was
        // asserted from rows, columns and panels; the kernels slice with bounds checks before they take pointers.
        match tile {
            8 => {
                dispatch!(isa, tile_product::<8>(data: Panel<'_>, panel: usize, columns: usize, x: Activations<'_>, row: usize, sums_ref: &mut [[f32; PANEL]; 8]))
            }
            4 => {
                dispatch!(isa, tile_product::<4>(data: Panel<'_>, panel: usize, columns: usize, x: Activations<'_>, row: usize, sums_ref: &mut [[f32; PANEL]; 8]))
            }
            2 => {
                dispatch!(isa, tile_product::<2>(data: Panel<'_>, panel: usize, columns: usize, x: Activations<'_>, row: usize, sums_ref: &mut [[f32; PANEL]; 8]))
            }
            _ => {
                dispatch!(isa, tile_product::<1>(data: Panel<'_>, panel: usize, columns: usize, x: Activations<'_>, row: usize, sums_ref: &mut [[f32; PANEL]; 8]))
            }
        }
        let first = panel * PANEL;
        let lanes = PANEL.min(w.rows - first);
        for (i, sums) in sums.iter().take(tile).enumerate() {
            // SAFETY: this task alone writes this panel's columns, of every row; `y` outlives the loop.
            let y = unsafe {
                out.y
                    .slice((row + i) * out.stride + out.offset + first, lanes)
            };
            y.copy_from_slice(&sums[..lanes]);
        }
        row += tile;
    }
}

/// `T` rows from `row` against one panel.
///
/// # Safety
/// The processor has `S`'s instruction set.
#[inline(always)]
unsafe fn tile_product<S: Simd, const T: usize>(
    data: Panel<'_>,
    panel: usize,
    columns: usize,
    x: Activations<'_>,
    row: usize,
    sums: &mut [[f32; PANEL]; 8],
) {
    let blocks = columns / BLOCK;
    // SAFETY: the instruction set is the caller's promise; the slices passed on are exactly one panel and `T` rows.
    unsafe {
        match (data, x) {
            (Panel::Q4(q, scales), Activations::Int8(x)) => {
                let (q, scales) = (
                    &q[panel * blocks * 256..][..blocks * 256],
                    &scales[panel * blocks * 32..][..blocks * 32],
                );
                q4_tile::<S, T>(q, scales, &Int8Tile::new(x, row, T), blocks, sums);
            }
            (Panel::Q8(q, scales), Activations::Int8(x)) => {
                let (q, scales) = (
                    &q[panel * blocks * 512..][..blocks * 512],
                    &scales[panel * blocks * 16..][..blocks * 16],
                );
                q8_tile::<S, T>(q, scales, &Int8Tile::new(x, row, T), blocks, sums);
            }
            (Panel::F32(values), Activations::Float(x)) => {
                let panel = &values[panel * columns * PANEL..][..columns * PANEL];
                float_tile::<S, T>(columns, &x[row * columns..][..T * columns], sums, |c| {
                    S::load(panel.as_ptr().add(c * PANEL))
                });
            }
            (Panel::F16(values), Activations::Float(x)) => {
                let panel = &values[panel * columns * PANEL..][..columns * PANEL];
                float_tile::<S, T>(columns, &x[row * columns..][..T * columns], sums, |c| {
                    S::load_f16(panel.as_ptr().add(c * PANEL))
                });
            }
            (Panel::BF16(values), Activations::Float(x)) => {
                let panel = &values[panel * columns * PANEL..][..columns * PANEL];
                float_tile::<S, T>(columns, &x[row * columns..][..T * columns], sums, |c| {
                    S::load_bf16(panel.as_ptr().add(c * PANEL))
                });
            }
            _ => unreachable!("run_panel pairs weights with their activations"),
        }
    }
}

/// `T` rows of int8 activations.
struct Int8Tile<'a> {
    q: &'a [i8],
    scale: &'a [f32],
    scaled_sum: &'a [f32],
    sum: &'a [i32],
    columns: usize,
}

impl<'a> Int8Tile<'a> {
    #[inline(always)]
    fn new(x: &'a QuantizedRows, row: usize, rows: usize) -> Self {
        let (columns, blocks) = (x.columns, x.columns / BLOCK);
        Self {
            q: &x.q[row * columns..][..rows * columns],
            scale: &x.scale[row * blocks..][..rows * blocks],
            scaled_sum: &x.scaled_sum[row * blocks..][..rows * blocks],
            sum: &x.sum[row * blocks..][..rows * blocks],
            columns,
        }
    }

    /// Four activations of row `t` from `column`, as a word.
    ///
    /// # Safety
    /// `t` below the tile's rows and `column + 4 ≤ columns`.
    #[inline(always)]
    unsafe fn word(&self, t: usize, column: usize) -> i32 {
        // SAFETY: in bounds by the caller's promise.
        unsafe {
            self.q
                .as_ptr()
                .add(t * self.columns + column)
                .cast::<i32>()
                .read_unaligned()
        }
    }
}

/// # Safety
/// The processor has `S`; `q` is `256·blocks` bytes, `scales` `32·blocks`, `x` `T` rows of `32·blocks`.
#[inline(always)]
unsafe fn q4_tile<S: Simd, const T: usize>(
    q: &[u8],
    scales: &[u16],
    x: &Int8Tile<'_>,
    blocks: usize,
    sums: &mut [[f32; PANEL]; 8],
) {
    // SAFETY: offsets stay within the lengths of the promise; `sums` holds 8 ≥ T rows of 16.
    unsafe {
        let mut acc = [S::splat(0.0); T];
        for block in 0..blocks {
            let mut dots = [S::zero_i(); T];
            for j in 0..4 {
                let bytes = S::load_bytes(q.as_ptr().add(block * 256 + j * 64));
                let (low, high) = (S::low_nibbles(bytes), S::high_nibbles(bytes));
                for t in 0..T {
                    dots[t] = S::dot_u4(dots[t], low, x.word(t, block * BLOCK + 4 * j));
                    dots[t] = S::dot_u4(dots[t], high, x.word(t, block * BLOCK + 16 + 4 * j));
                }
            }
            let d = S::load_f16(scales.as_ptr().add(block * 32));
            let m = S::load_f16(scales.as_ptr().add(block * 32 + 16));
            for t in 0..T {
                let at = t * blocks + block;
                let scale = S::mul(d, S::splat(*x.scale.get_unchecked(at)));
                acc[t] = S::fma(S::to_f32(dots[t]), scale, acc[t]);
                acc[t] = S::fma(m, S::splat(*x.scaled_sum.get_unchecked(at)), acc[t]);
            }
        }
        for t in 0..T {
            S::store(sums[t].as_mut_ptr(), acc[t]);
        }
    }
}

/// # Safety
/// The processor has `S`; `q` is `512·blocks` bytes, `scales` `16·blocks`, `x` `T` rows of `32·blocks`.
#[inline(always)]
unsafe fn q8_tile<S: Simd, const T: usize>(
    q: &[u8],
    scales: &[u16],
    x: &Int8Tile<'_>,
    blocks: usize,
    sums: &mut [[f32; PANEL]; 8],
) {
    // SAFETY: offsets stay within the lengths of the promise; `sums` holds 8 ≥ T rows of 16.
    unsafe {
        let mut acc = [S::splat(0.0); T];
        for block in 0..blocks {
            let mut dots = [S::zero_i(); T];
            for t in 0..T {
                // Stored bytes are q + 128: take 128·Σa off again.
                dots[t] = S::splat_i(-128 * *x.sum.get_unchecked(t * blocks + block));
            }
            for j in 0..8 {
                let bytes = S::load_bytes(q.as_ptr().add(block * 512 + j * 64));
                for t in 0..T {
                    dots[t] = S::dot_u8(dots[t], bytes, x.word(t, block * BLOCK + 4 * j));
                }
            }
            let d = S::load_f16(scales.as_ptr().add(block * 16));
            for t in 0..T {
                let scale = S::mul(d, S::splat(*x.scale.get_unchecked(t * blocks + block)));
                acc[t] = S::fma(S::to_f32(dots[t]), scale, acc[t]);
            }
        }
        for t in 0..T {
            S::store(sums[t].as_mut_ptr(), acc[t]);
        }
    }
}

/// # Safety
/// The processor has `S`; `x` is `T` rows of `columns`; `weights(c)` may be called for `c < columns`.
#[inline(always)]
unsafe fn float_tile<S: Simd, const T: usize>(
    columns: usize,
    x: &[f32],
    sums: &mut [[f32; PANEL]; 8],
    weights: impl Fn(usize) -> S::F,
) {
    // SAFETY: `t·columns + c < T·columns = x.len()`; `sums` holds 8 ≥ T rows of 16.
    unsafe {
        let mut acc = [S::splat(0.0); T];
        for c in 0..columns {
            let w = weights(c);
            for t in 0..T {
                acc[t] = S::fma(w, S::splat(*x.get_unchecked(t * columns + c)), acc[t]);
            }
        }
        for t in 0..T {
            S::store(sums[t].as_mut_ptr(), acc[t]);
        }
    }
}
