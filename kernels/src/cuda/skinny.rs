//! Products with few rows (decode), bound by reading the weights once; what stands before and after them is fused in.

use super::{
    CudaError, Device, Float, View,
    eight_bit::{self, EightBit},
    int4::{Int4View, group_shift},
    int4_few::Int4Few,
    int4_skinny::Int4Skinny,
    modules::{Shape, arguments},
    need,
};

/// Most rows.
pub const MAX_ROWS: usize = 32;
/// Most rows with four-bit weights: they are worth more work, since the alternative writes and reads them as 16-bit ones.
pub const MAX_INT4_ROWS: usize = 64;
const THREADS: usize = 256;
/// Columns of a row that keeps the warps of a block busy for a while.
const LONG_ROW: usize = 2048;

/// What is multiplied.
#[derive(Clone, Copy)]
pub enum Input<'a> {
    /// `[m, k]` as it is.
    Plain(View<'a>),
    /// The residual stream, RMS-normed on the way in.
    Normed {
        /// `[m, k]`
        residual: View<'a>,
        /// `[k]`
        weight: View<'a>,
        /// `[parts, m]` f32: parts of the rows' sums of squares.
        sums: View<'a>,
        /// Parts.
        num_sums: usize,
        /// Added to the mean square.
        eps: f32,
    },
}

/// What it is multiplied with.
#[derive(Clone, Copy)]
pub enum Weight<'a> {
    /// Of the type of everything else.
    Float(View<'a>),
    /// Four bits; everything else is IEEE halves, and logits are not made.
    Int4(Int4View<'a>),
    /// Eight bits; integers take and give IEEE halves, and logits are not made.
    EightBit(EightBit<'a>),
}

/// What becomes of the product.
#[derive(Clone, Copy)]
pub enum Output<'a> {
    /// `[m, n]`
    Store(View<'a>),
    /// `[m, n]` in f32.
    StoreF32(View<'a>),
    /// Added to the residual stream `[m, n]`, whose sums of squares go to `sums`, `[⌈n/16⌉, m]` f32.
    AddResidual {
        /// The stream.
        residual: View<'a>,
        /// Parts of its rows' sums of squares.
        sums: View<'a>,
    },
    /// The matrix holds gate and up, `[2·n, k]`: `silu(gate) · up`, `[m, n]`.
    SiluMul(View<'a>),
}

/// `x · weightᵀ + bias` for at most [`MAX_ROWS`] rows, or [`MAX_INT4_ROWS`].
#[derive(Clone, Copy)]
pub struct SkinnyGemm<'a> {
    /// Type of everything but sums and logits.
    pub float: Float,
    /// Rows.
    pub input: Input<'a>,
    /// `[n, k]`, or `[2·n, k]` for [`Output::SiluMul`].
    pub weight: Weight<'a>,
    /// One for each row of `weight`.
    pub bias: Option<View<'a>>,
    /// Where it goes.
    pub output: Output<'a>,
    /// Rows of x.
    pub m: usize,
    /// Width of the output.
    pub n: usize,
    /// Width of the input, a multiple of 32.
    pub k: usize,
}

/// The kernels' parameter, as in `skinny.cuh`.
#[repr(C)]
struct Parameters {
    x: u64,
    weight: u64,
    bias: u64,
    norm: u64,
    sums: u64,
    y: u64,
    sums_out: u64,
    cells: u64,
    row_scales: u64,
    tickets: u64,
    m: i32,
    n: i32,
    k: i32,
    num_sums: i32,
    eps: f32,
    group_shift: i32,
}

/// Steps of 32 columns that a warp asks for ahead: 8 with two blocks on each of the multiprocessors, or 4 with three. The
/// latter where that saves a second round of blocks, or where rows are too short for 8.
fn steps_ahead(token_tiles: usize, blocks: usize, k: usize, multiprocessors: usize) -> usize {
    let second_round = 2 * multiprocessors < blocks && blocks <= 3 * multiprocessors;
    if token_tiles > 1 || second_round || k < LONG_ROW {
        4
    } else {
        8
    }
}

/// Blocks that stay on a multiprocessor, as `skinny_gemm.cu` has it.
fn blocks_that_stay(token_tiles: usize) -> usize {
    if token_tiles > 2 { 1 } else { 2 }
}

impl SkinnyGemm<'_> {
    /// Whether a product of this shape can run here.
    #[must_use]
    pub fn takes(m: usize, k: usize) -> bool {
        (1..=MAX_ROWS).contains(&m) && k > 0 && k.is_multiple_of(32)
    }

    /// [`Self::takes`] with four-bit weights, if their groups are taken.
    #[must_use]
    pub fn takes_int4(m: usize, k: usize) -> bool {
        (1..=MAX_INT4_ROWS).contains(&m) && k > 0 && k.is_multiple_of(32)
    }

    /// Whether the norm in front of a product with weights like this one costs next to nothing on the product's way.
    #[must_use]
    pub fn norms_int4(device: &Device, weight: Int4View<'_>, m: usize, k: usize) -> bool {
        let few = Int4Few {
            weight,
            m,
            rows: k,
            k,
            parts: 1,
        };
        few.is_for(device)
    }

    fn validate(&self) -> Result<(), CudaError> {
        let op = "skinny_gemm";
        let (m, n, k) = (self.m, self.n, self.k);
        let (takes, most) = match self.weight {
            Weight::Float(_) | Weight::EightBit(_) => (Self::takes(m, k), MAX_ROWS),
            Weight::Int4(_) => (Self::takes_int4(m, k), MAX_INT4_ROWS),
        };
        need(takes && n > 0 && n < 1 << 28, op, || {
            format!("{m} × {n} × {k}: at most {most} rows, and k a multiple of 32, are needed")
        })?;
        let mut weight_rows = n;
        let out_fits = match self.output {
            Output::Store(y) => y.bytes >= m * n * 2,
            Output::StoreF32(y) => y.bytes >= m * n * 4,
            Output::AddResidual { residual, sums } => {
                residual.bytes >= m * n * 2 && sums.bytes >= n.div_ceil(16) * m * 4
            }
            Output::SiluMul(y) => {
                weight_rows = 2 * n;
                y.bytes >= m * n * 2
            }
        };
        let in_fits = match self.input {
            Input::Plain(x) => x.bytes >= m * k * 2,
            Input::Normed {
                residual,
                weight,
                sums,
                num_sums,
                ..
            } => {
                residual.bytes >= m * k * 2
                    && weight.bytes >= k * 2
                    && sums.bytes >= num_sums * m * 4
            }
        };
        let is_logits = matches!(self.output, Output::StoreF32(_));
        let weight_fits = match self.weight {
            Weight::Float(view) => view.bytes >= weight_rows * k * 2,
            Weight::Int4(view) => {
                need(self.float == Float::F16 && !is_logits, op, || {
                    "four-bit weights are multiplied with halves and give halves".to_owned()
                })?;
                view.fits(weight_rows, k)
            }
            Weight::EightBit(weight) => {
                let halves = matches!(weight, EightBit::Fp8(_)) || self.float == Float::F16;
                need(halves && !is_logits, op, || {
                    "eight-bit weights give 16 bits, and integers are multiplied with halves"
                        .to_owned()
                })?;
                match weight {
                    EightBit::Fp8(view) => view.fits(weight_rows, k),
                    EightBit::Int8(view) => view.fits(weight_rows, k),
                }
            }
        };
        let weights_fit = weight_fits && self.bias.is_none_or(|bias| bias.bytes >= weight_rows * 2);
        need(out_fits && in_fits && weights_fit, op, || {
            format!("a view is too short for {m} × {n} × {k}")
        })
    }

    /// The product by Hopper's kernels, where they know and are worth it; `parts` of the weight's rows go into an output.
    fn on_hopper<'a>(
        &'a self,
        device: &Device,
        weight: Int4View<'a>,
        parts: usize,
    ) -> Option<Int4Skinny<'a>> {
        let Input::Plain(x) = self.input else {
            return None;
        };
        let product = Int4Skinny {
            x,
            weight,
            m: self.m,
            rows: self.n * parts,
            k: self.k,
            parts,
        };
        product.is_for(device).then_some(product)
    }

    /// The product by Hopper's kernels for the fewest rows, where they know it; `parts` of the weight's rows go into an output.
    fn few<'a>(&'a self, device: &Device, parts: usize) -> Option<Int4Few<'a>> {
        let Weight::Int4(weight) = self.weight else {
            return None;
        };
        let few = Int4Few {
            weight,
            m: self.m,
            rows: self.n * parts,
            k: self.k,
            parts,
        };
        few.is_for(device).then_some(few)
    }

    /// Queues it.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or the driver refuses.
    pub fn launch(&self, device: &Device) -> Result<(), CudaError> {
        self.validate()?;
        let mut parameters = Parameters {
            x: 0,
            weight: 0,
            bias: self.bias.map_or(0, View::address),
            norm: 0,
            sums: 0,
            y: 0,
            sums_out: 0,
            cells: 0,
            row_scales: 0,
            tickets: 0,
            m: self.m as i32,
            n: self.n as i32,
            k: self.k as i32,
            num_sums: 0,
            eps: 0.0,
            group_shift: 0,
        };
        match self.input {
            Input::Plain(x) => parameters.x = x.address(),
            Input::Normed {
                residual,
                weight,
                sums,
                num_sums,
                eps,
            } => {
                parameters.x = residual.address();
                parameters.norm = weight.address();
                parameters.sums = sums.address();
                parameters.num_sums = num_sums as i32;
                parameters.eps = eps;
            }
        }
        let (kind, rows) = match self.output {
            Output::Store(y) => {
                parameters.y = y.address();
                ("store", 16)
            }
            Output::StoreF32(y) => {
                parameters.y = y.address();
                ("f32", 16)
            }
            Output::AddResidual { residual, sums } => {
                parameters.y = residual.address();
                parameters.sums_out = sums.address();
                ("add", 16)
            }
            Output::SiluMul(y) => {
                parameters.y = y.address();
                ("silu", 8)
            }
        };
        if let Some(few) = self.few(device, 16 / rows) {
            let [words, cells] = few.maps()?;
            // SAFETY: the parameters are the kernel's own struct and maps of the weights, which lie in their views; all views hold
            // what the shape needs (`validate`).
            return unsafe {
                let arguments = arguments![parameters, words, cells];
                device.launch(&few.name(kind), few.shape(device), arguments)
            };
        }
        let tiles = self.m.div_ceil(8).next_power_of_two();
        let tile_count = |row_tiles: usize| self.n.div_ceil(rows * row_tiles);
        let (name, blocks, shared) = match self.weight {
            Weight::Float(weight) => {
                parameters.weight = weight.address();
                let norm = if matches!(self.input, Input::Normed { .. }) {
                    "_norm"
                } else {
                    ""
                };
                let blocks = tile_count(1);
                let processors = device.multiprocessors() as usize;
                let ahead = steps_ahead(tiles, blocks, self.k, processors);
                let suffix = self.float.suffix();
                // Blocks stay where rows are long; tiles of short ones are over before it helps. As in `skinny_gemm.cu`.
                let at_once = blocks_that_stay(tiles) * processors;
                let stay = self.k >= LONG_ROW && (tiles, ahead) != (1, 4);
                if stay && blocks > 2 * at_once {
                    parameters.tickets = device.tickets();
                }
                (
                    format!("skinny_{kind}{norm}_{tiles}x{ahead}_{suffix}"),
                    if stay { blocks.min(at_once) } else { blocks },
                    0,
                )
            }
            Weight::Int4(weight) => {
                parameters.weight = weight.words.address();
                parameters.cells = weight.cells.address();
                parameters.group_shift = group_shift(self.k, weight.group)
                    .expect("`validate` has seen this group: this is a bug");
                let product = self.on_hopper(device, weight, 16 / rows);
                if let Some(product) = product {
                    let name = product.name(kind);
                    let (shape, splits) = product.shape(device, &name)?;
                    let [words, cells, x] = product.maps()?;
                    // SAFETY: the parameters are the kernel's own struct and maps of x and weights, which lie in their views;
                    // all views hold what the shape needs (`validate`).
                    return unsafe {
                        let arguments = arguments![parameters, words, cells, x];
                        device.launch_clusters(&name, shape, splits, arguments)
                    };
                }
                // With few tokens more blocks; with more tokens fewer, each of which reads them all.
                let row_tiles = if self.m <= 4 { 1 } else { 2 };
                // As in `int4.cu`: blocks stay and walk over tiles, and a thread has some steps' words and cells in flight.
                let (at_once, in_flight) = match (tiles, row_tiles) {
                    (_, 1) => (3, 6),
                    (..=4, _) => (2, 4),
                    _ => (1, 2),
                };
                let at_once = at_once * device.multiprocessors() as usize;
                let name = if weight.group == 128 && !weight.affine && tiles <= 2 {
                    "int4_128"
                } else {
                    weight.kernel()
                };
                (
                    format!("{name}_{kind}_{tiles}x{row_tiles}"),
                    tile_count(row_tiles).min(at_once),
                    in_flight * 2 * row_tiles * THREADS * 20,
                )
            }
            Weight::EightBit(weight) => {
                let name = match weight {
                    EightBit::Fp8(view) => {
                        parameters.weight = view.data.address();
                        parameters.row_scales = view.scales.address();
                        "fp8"
                    }
                    EightBit::Int8(view) => {
                        parameters.weight = view.data.address();
                        parameters.cells = view.cells.address();
                        parameters.group_shift = eight_bit::group_shift(self.k, view.group)
                            .expect("`validate` has seen this group: this is a bug");
                        "int8"
                    }
                };
                let suffix = self.float.suffix();
                (format!("{name}_{kind}_{tiles}_{suffix}"), tile_count(1), 0)
            }
        };
        let shape = Shape {
            grid: (blocks, 1),
            threads: THREADS,
            shared,
        };
        // SAFETY: the parameter is the kernel's own struct; all views hold what the shape needs (`validate`).
        unsafe { device.launch(&name, shape, arguments![parameters]) }
    }
}
