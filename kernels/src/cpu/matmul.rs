//! `y = x · wᵀ (+ bias)` for any number of rows.
//!
//! One order of summation per output, whatever the number of rows or threads: blocks of 32 inputs in order for
//! quantised weights (integer dot products inside a block are exact), single inputs in order for float weights.
//!
//! Work is cut into (rows × panels) rectangles, all panels of some rows first, so that the rows stay in a core's cache
//! while weights stream by. Few rows: bound by memory, every weight is read once. Many: bound by the products.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod tiles;

use super::{
    Isa, PackedMatrix, QuantizedRows, ThreadPool,
    packed::{Data, PANEL},
    pool::SharedMut,
    quantize::BLOCK,
    simd::dispatch,
};
use tiles::{Activations, MAX_TILE, Panel, tile_product};

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

/// Where the parts' columns go in `y`: `y[row · stride + offset + n]`.
#[derive(Clone, Copy)]
struct Output<'a> {
    y: SharedMut<f32>,
    stride: usize,
    offset: usize,
    bias: Option<&'a [f32]>,
}

/// Multiplies-and-adds that make a task worth handing out.
const TASK_MACS: usize = 1 << 17;

/// Bytes of activations that a task keeps in its core's cache.
const TASK_INPUT_BYTES: usize = 128 * 1024;

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
    assert!(
        offset + w.rows <= stride && y.len() == input.rows * stride,
        "output of {} rows of {stride}",
        input.rows
    );
    let out = Output {
        y: SharedMut::new(y),
        stride,
        offset,
        bias: None,
    };
    multiply(isa, pool, std::slice::from_ref(w), input, out);
}

/// `y = x · [parts stacked]ᵀ + bias`, `y` `[rows, Σ parts' rows]`: one parallel loop however many parts there are, so
/// q, k and v, or gate and up, cost one. `scratch` takes the quantised rows when a part needs them.
///
/// # Panics
/// When the shapes do not fit.
pub fn linear(
    pool: &ThreadPool,
    parts: &[PackedMatrix],
    bias: Option<&[f32]>,
    x: &[f32],
    scratch: &mut QuantizedRows,
    y: &mut [f32],
) {
    let Some(first) = parts.first() else {
        assert!(y.is_empty(), "output of a linear layer without parts");
        return;
    };
    assert!(
        x.len().is_multiple_of(first.columns),
        "{} values are not rows of {}",
        x.len(),
        first.columns
    );
    let rows = x.len() / first.columns;
    let width: usize = parts.iter().map(|part| part.rows).sum();
    assert_eq!(y.len(), rows * width, "output of {rows} rows of {width}");
    assert!(
        bias.is_none_or(|bias| bias.len() == width),
        "bias of an output of {width}"
    );
    let quantized = parts.iter().any(PackedMatrix::is_quantized);
    if quantized {
        scratch.quantize(pool, x, first.columns);
    }
    let input = MatmulInput {
        x,
        quantized: quantized.then_some(&*scratch),
        rows,
    };
    let out = Output {
        y: SharedMut::new(y),
        stride: width,
        offset: 0,
        bias,
    };
    multiply(Isa::detect(), pool, parts, input, out);
}

/// The parts' products, side by side from `out.offset`. The caller has checked that they fit `out`.
fn multiply(
    isa: Isa,
    pool: &ThreadPool,
    parts: &[PackedMatrix],
    input: MatmulInput<'_>,
    out: Output<'_>,
) {
    assert!(isa.is_available(), "this machine has no {isa:?}");
    let columns = parts[0].columns;
    for part in parts {
        check_input(part, columns, input);
    }
    let panels: usize = parts.iter().map(|part| part.rows.div_ceil(PANEL)).sum();
    let rows = input.rows;
    if rows == 0 {
        return;
    }
    let value = if input.quantized.is_some() { 1 } else { 4 };
    let chunk = (TASK_INPUT_BYTES / (columns * value)).max(MAX_TILE) / MAX_TILE * MAX_TILE;
    let row_chunks = rows.div_ceil(chunk);
    // Equal chunks: 300 rows go as 2 × 152, not as 224 + 76.
    let chunk = rows.div_ceil(row_chunks).next_multiple_of(MAX_TILE);
    let per_task =
        (TASK_MACS / (PANEL * columns * chunk.min(rows))).clamp(1, panels.div_ceil(pool.threads()));
    let panel_tasks = panels.div_ceil(per_task);
    pool.run(row_chunks * panel_tasks, &|task, _| {
        let first_row = task / panel_tasks * chunk;
        let task_rows = first_row..(first_row + chunk).min(rows);
        let first = task % panel_tasks * per_task;
        let mut wanted = first..(first + per_task).min(panels);
        let (mut before, mut offset) = (0, out.offset);
        for part in parts {
            let end = before + part.rows.div_ceil(PANEL);
            while wanted.start < end.min(wanted.end) {
                let job = Job {
                    isa,
                    part,
                    panel: wanted.start - before,
                    offset,
                };
                run_panel(&job, input, task_rows.clone(), out);
                wanted.start += 1;
            }
            before = end;
            offset += part.rows;
        }
    });
}

/// What a part needs of the input.
fn check_input(part: &PackedMatrix, columns: usize, input: MatmulInput<'_>) {
    assert_eq!(part.columns, columns, "columns of the parts of one layer");
    assert_eq!(
        Some(input.x.len()),
        input.rows.checked_mul(columns),
        "input of {} rows of {columns}",
        input.rows
    );
    if part.is_quantized() {
        let quantized = input
            .quantized
            .expect("quantised weights need quantised rows");
        assert!(
            quantized.rows == input.rows && quantized.columns == columns,
            "the quantised rows are of another input"
        );
    }
}

/// One panel of one part.
struct Job<'a> {
    isa: Isa,
    part: &'a PackedMatrix,
    panel: usize,
    /// Column of the part's first output.
    offset: usize,
}

/// Some rows against one panel, in tiles of 8, 4, 2, 1 rows.
fn run_panel(job: &Job<'_>, input: MatmulInput<'_>, rows: std::ops::Range<usize>, out: Output<'_>) {
    let (isa, panel, columns) = (job.isa, job.panel, job.part.columns);
    let (data, x) = match (&job.part.data, input.quantized) {
        (Data::Q4 { q, scales }, Some(x)) => (Panel::Q4(q, scales), Activations::Int8(x)),
        (Data::W4 { q, scales, group }, Some(x)) => {
            (Panel::W4(q, scales, group / BLOCK), Activations::Int8(x))
        }
        (Data::Q8 { q, scales }, Some(x)) => (Panel::Q8(q, scales), Activations::Int8(x)),
        (Data::F32(values), _) => (Panel::F32(values), Activations::Float(input.x)),
        (Data::F16(values), _) => (Panel::F16(values), Activations::Float(input.x)),
        (Data::BF16(values), _) => (Panel::BF16(values), Activations::Float(input.x)),
        _ => unreachable!("quantised weights have quantised rows: asserted in check_input"),
    };
    let mut row = rows.start;
    while row < rows.end {
        let tile = match rows.end - row {
            8.. => 8,
            4.. => 4,
            2.. => 2,
            _ => 1,
        };
        let mut sums = [[0f32; PANEL]; MAX_TILE];
        let sums_ref = &mut sums;
        // SAFETY: `isa` is available by `multiply`'s assertion. `tile` rows from `row` exist in the input by the
        // loop's bound and `check_input`, and `panel` is below the panels that the matrix was packed with; the tiles
        // slice one panel and `tile` rows with bounds checks before they take pointers.
        match tile {
            8 => {
                dispatch!(isa, tile_product::<8>(data: Panel<'_>, panel: usize, columns: usize, x: Activations<'_>, row: usize, sums_ref: &mut [[f32; PANEL]; MAX_TILE]))
            }
            4 => {
                dispatch!(isa, tile_product::<4>(data: Panel<'_>, panel: usize, columns: usize, x: Activations<'_>, row: usize, sums_ref: &mut [[f32; PANEL]; MAX_TILE]))
            }
            2 => {
                dispatch!(isa, tile_product::<2>(data: Panel<'_>, panel: usize, columns: usize, x: Activations<'_>, row: usize, sums_ref: &mut [[f32; PANEL]; MAX_TILE]))
            }
            _ => {
                dispatch!(isa, tile_product::<1>(data: Panel<'_>, panel: usize, columns: usize, x: Activations<'_>, row: usize, sums_ref: &mut [[f32; PANEL]; MAX_TILE]))
            }
        }
        let first = job.offset + panel * PANEL;
        let lanes = PANEL.min(job.part.rows - panel * PANEL);
        for (i, sums) in sums.iter_mut().take(tile).enumerate() {
            if let Some(bias) = out.bias {
                let bias = &bias[first - out.offset..][..lanes];
                sums.iter_mut().zip(bias).for_each(|(sum, b)| *sum += b);
            }
            // SAFETY: this task alone writes this panel's columns of these rows; `y` outlives the loop.
            let y = unsafe { out.y.slice((row + i) * out.stride + first, lanes) };
            y.copy_from_slice(&sums[..lanes]);
        }
        row += tile;
    }
}
