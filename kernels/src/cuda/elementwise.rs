//! Embedding, RMS norms, SiLU·up, gathering rows, random weights. Each is one pass over memory.

use super::{
    CudaError, Device, Float, View,
    modules::{Shape, arguments},
    need,
    peers::MAX_RANKS,
};

/// Widest row: 4 vectors of 8 values in each of 1,024 threads.
pub const MAX_WIDTH: usize = 32 << 10;
const THREADS: usize = 256;

/// Threads for a row of `width` values, 8 a vector.
fn row_threads(width: usize) -> usize {
    (width / 8)
        .div_ceil(4)
        .max(width.div_ceil(8).min(256))
        .div_ceil(32)
        * 32
}

pub(super) fn check_width(op: &'static str, width: usize) -> Result<(), CudaError> {
    need(
        width > 0 && width.is_multiple_of(8) && width <= MAX_WIDTH,
        op,
        || format!("rows of {width} values; a multiple of 8 up to {MAX_WIDTH} is needed"),
    )
}

fn check_len(op: &'static str, what: &str, view: View<'_>, bytes: usize) -> Result<(), CudaError> {
    need(view.bytes >= bytes, op, || {
        format!("{what} has {} bytes of {bytes}", view.bytes)
    })
}

/// `residual[r] = table[token[r]]`, the table in one piece or in one for each tensor-parallel rank, `out[r] = residual[r] / rms(residual[r]) · weight`.
#[derive(Clone, Copy)]
pub struct EmbedNorm<'a> {
    /// Type of everything but tokens.
    pub float: Float,
    /// `[rows]` u32; `u32::MAX` takes the row's slot's last token.
    pub tokens: View<'a>,
    /// `[rows]` i32.
    pub row_slots: View<'a>,
    /// `[slots]` u32.
    pub last_tokens: View<'a>,
    /// `[table_rows, width]` each, one after another; on other GPUs too, whose memory this one can reach.
    pub tables: &'a [View<'a>],
    /// Rows of a table.
    pub table_rows: usize,
    /// `[width]`
    pub weight: View<'a>,
    /// `[rows, width]`
    pub residual: View<'a>,
    /// `[rows, width]`
    pub out: View<'a>,
    /// `[rows]` f32: sums of squares.
    pub sums: Option<View<'a>>,
    /// Rows.
    pub rows: usize,
    /// Values in a row.
    pub width: usize,
    /// Added to the mean square.
    pub eps: f32,
}

impl EmbedNorm<'_> {
    fn validate(&self) -> Result<(), CudaError> {
        let op = "embed_norm";
        check_width(op, self.width)?;
        let (rows, row) = (self.rows, self.width * Float::BYTES);
        check_len(op, "tokens", self.tokens, rows * 4)?;
        check_len(op, "row_slots", self.row_slots, rows * 4)?;
        check_len(op, "weight", self.weight, row)?;
        check_len(op, "residual", self.residual, rows * row)?;
        check_len(op, "out", self.out, rows * row)?;
        need(
            (1..=MAX_RANKS).contains(&self.tables.len()) && self.table_rows > 0,
            op,
            || format!("{} tables of {} rows", self.tables.len(), self.table_rows),
        )?;
        for table in self.tables {
            check_len(op, "table", *table, self.table_rows * row)?;
        }
        self.sums
            .map_or(Ok(()), |sums| check_len(op, "sums", sums, rows * 4))
    }

    /// Queues it.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or the driver refuses.
    pub fn launch(&self, device: &Device) -> Result<(), CudaError> {
        self.validate()?;
        let (tokens, slots, last) = (
            self.tokens.address(),
            self.row_slots.address(),
            self.last_tokens.address(),
        );
        let mut tables = [0u64; MAX_RANKS];
        for (at, table) in tables.iter_mut().zip(self.tables) {
            *at = table.address();
        }
        let (table_rows, weight) = (self.table_rows as u32, self.weight.address());
        let (residual, out) = (self.residual.address(), self.out.address());
        let sums = self.sums.map_or(0, View::address);
        let width = self.width as i32;
        let shape = Shape {
            grid: (self.rows, 1),
            threads: row_threads(self.width),
            shared: 0,
        };
        let name = format!("embed_norm_{}", self.float.suffix());
        // SAFETY: parameters as in `elementwise.cu`; every view holds its rows (`validate`); tokens and slots are in
        // range by the uploader's check.
        unsafe {
            device.launch(
                &name,
                shape,
                arguments![
                    tokens, slots, last, tables, table_rows, weight, residual, out, sums, width,
                    self.eps
                ],
            )
        }
    }
}

/// `residual += delta` where there is one, `out = residual / rms(residual) · weight`, row by row.
#[derive(Clone, Copy)]
pub struct AddNorm<'a> {
    /// Type of everything.
    pub float: Float,
    /// `[rows, width]`, or none where it has been added.
    pub delta: Option<View<'a>>,
    /// `[width]`
    pub weight: View<'a>,
    /// `[rows, width]`
    pub residual: View<'a>,
    /// `[rows, width]`
    pub out: View<'a>,
    /// Rows.
    pub rows: usize,
    /// Values in a row.
    pub width: usize,
    /// Added to the mean square.
    pub eps: f32,
}

impl AddNorm<'_> {
    fn validate(&self) -> Result<(), CudaError> {
        let op = "add_norm";
        check_width(op, self.width)?;
        let row = self.width * Float::BYTES;
        check_len(op, "weight", self.weight, row)?;
        check_len(op, "residual", self.residual, self.rows * row)?;
        check_len(op, "out", self.out, self.rows * row)?;
        self.delta.map_or(Ok(()), |delta| {
            check_len(op, "delta", delta, self.rows * row)
        })
    }

    /// Queues it.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or the driver refuses.
    pub fn launch(&self, device: &Device) -> Result<(), CudaError> {
        self.validate()?;
        let (weight, residual) = (self.weight.address(), self.residual.address());
        let out = self.out.address();
        let width = self.width as i32;
        let shape = Shape {
            grid: (self.rows, 1),
            threads: row_threads(self.width),
            shared: 0,
        };
        let suffix = self.float.suffix();
        // SAFETY: parameters as in `elementwise.cu`; every view holds its rows (`validate`).
        unsafe {
            match self.delta.map(View::address) {
                Some(delta) => {
                    let arguments = arguments![delta, weight, residual, out, width, self.eps];
                    device.launch(&format!("add_norm_{suffix}"), shape, arguments)
                }
                None => {
                    let arguments = arguments![weight, residual, out, width, self.eps];
                    device.launch(&format!("norm_{suffix}"), shape, arguments)
                }
            }
        }
    }
}

/// `out = silu(gate) · up`; a row of `gate_up` holds both halves.
#[derive(Clone, Copy)]
pub struct SiluMul<'a> {
    /// Type of everything.
    pub float: Float,
    /// `[rows, 2 · width]`
    pub gate_up: View<'a>,
    /// `[rows, width]`
    pub out: View<'a>,
    /// Rows.
    pub rows: usize,
    /// Values in a row of `out`.
    pub width: usize,
}

impl SiluMul<'_> {
    /// Queues it.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or the driver refuses.
    pub fn launch(&self, device: &Device) -> Result<(), CudaError> {
        let op = "silu_mul";
        need(
            self.width > 0 && self.width.is_multiple_of(8) && self.rows < 1 << 24,
            op,
            || {
                format!(
                    "{} rows of {} values; a multiple of 8 is needed",
                    self.rows, self.width
                )
            },
        )?;
        let bytes = self.rows * self.width * Float::BYTES;
        check_len(op, "gate_up", self.gate_up, 2 * bytes)?;
        check_len(op, "out", self.out, bytes)?;
        let (gate_up, out) = (self.gate_up.address(), self.out.address());
        let (width, rows) = (self.width as i32, self.rows as i32);
        let shape = Shape {
            grid: ((self.rows * self.width / 8).div_ceil(THREADS), 1),
            threads: THREADS,
            shared: 0,
        };
        let name = format!("silu_mul_{}", self.float.suffix());
        // SAFETY: parameters as in `elementwise.cu`; both views hold their rows, checked above.
        unsafe { device.launch(&name, shape, arguments![gate_up, out, width, rows]) }
    }
}

/// `out[i] = input[rows[i]]`; the two must not overlap.
#[derive(Clone, Copy)]
pub struct GatherRows<'a> {
    /// `[at least max(rows) + 1, width]`
    pub input: View<'a>,
    /// `[count]` i32.
    pub rows: View<'a>,
    /// `[count, width]`
    pub out: View<'a>,
    /// Rows to take.
    pub count: usize,
    /// 16-bit values in a row, a multiple of 8.
    pub width: usize,
}

impl GatherRows<'_> {
    /// Queues it.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or the driver refuses.
    pub fn launch(&self, device: &Device) -> Result<(), CudaError> {
        let op = "gather_rows";
        check_width(op, self.width.min(MAX_WIDTH))?;
        need(self.width.is_multiple_of(8), op, || {
            format!("rows of {} values; a multiple of 8 is needed", self.width)
        })?;
        check_len(op, "rows", self.rows, self.count * 4)?;
        check_len(op, "out", self.out, self.count * self.width * 2)?;
        let (input, rows, out) = (
            self.input.address(),
            self.rows.address(),
            self.out.address(),
        );
        let vectors = (self.width / 8) as i32;
        let shape = Shape {
            grid: (self.count, 1),
            threads: THREADS,
            shared: 0,
        };
        // SAFETY: parameters as in `elementwise.cu`; `out` and `rows` hold `count` rows, and the rows named are rows of
        // `input` by the uploader's check.
        unsafe { device.launch("gather_rows", shape, arguments![input, rows, out, vectors]) }
    }
}

/// Fills `out` with uniform numbers in ±`scale` that depend on the seed alone: weights of a model without weights.
///
/// # Errors
/// [`CudaError::Driver`].
pub fn fill_random(
    device: &Device,
    float: Float,
    out: View<'_>,
    seed: u64,
    scale: f32,
) -> Result<(), CudaError> {
    let count = (out.bytes / Float::BYTES) as i64;
    let address = out.address();
    let shape = Shape {
        grid: (device.multiprocessors() as usize * 8, 1),
        threads: THREADS,
        shared: 0,
    };
    let name = format!("fill_random_{}", float.suffix());
    // SAFETY: parameters as in `elementwise.cu`; `count` values lie in the view.
    unsafe { device.launch(&name, shape, arguments![address, count, seed, scale]) }
}
