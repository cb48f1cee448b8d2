//! Which kernel multiplies, and its launch.

use super::{Input, Output, SkinnyGemm, Weight};
use crate::cuda::{
    CudaError, Device, View,
    eight_bit::{self, EightBit},
    int4::{Int4View, group_shift},
    int4_few::Int4Few,
    int4_skinny::Int4Skinny,
    modules::{Shape, arguments},
};

const THREADS: usize = 256;
/// Columns of a row that keeps the warps of a block busy for a while.
const LONG_ROW: usize = 2048;

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

/// A kernel that all GPUs have.
struct Plan {
    name: String,
    blocks: usize,
    /// Bytes of shared memory of a block.
    shared: usize,
}

impl Output<'_> {
    /// What names of kernels call it, and the rows of the output in a tile.
    fn kind(&self) -> (&'static str, usize) {
        match self {
            Self::Store(_) => ("store", 16),
            Self::StoreF32(_) => ("f32", 16),
            Self::AddResidual { .. } => ("add", 16),
            Self::SiluMul(_) => ("silu", 8),
        }
    }
}

impl SkinnyGemm<'_> {
    /// Queues it.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or the driver refuses.
    pub fn launch(&self, device: &Device) -> Result<(), CudaError> {
        self.validate()?;
        let mut parameters = self.parameters();
        let (kind, rows) = self.output.kind();
        if let Some(few) = self.few(device, 16 / rows) {
            let [words, cells] = few.maps()?;
            // SAFETY: the parameters are the kernel's own struct and maps of the weights, which lie in their views; all views hold
            // what the shape needs (`validate`).
            return unsafe {
                let arguments = arguments![parameters, words, cells];
                device.launch(&few.name(kind), few.shape(device), arguments)
            };
        }
        let plan = match self.weight {
            Weight::Float(weight) => self.float_plan(device, weight, &mut parameters),
            Weight::Int4(weight) => {
                parameters.weight = weight.words.address();
                parameters.cells = weight.cells.address();
                parameters.group_shift = group_shift(self.k, weight.group)
                    .expect("`validate` has seen this group: this is a bug");
                if let Some(product) = self.on_hopper(device, weight, 16 / rows) {
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
                self.int4_plan(device, weight)
            }
            Weight::EightBit(weight) => self.eight_bit_plan(weight, &mut parameters),
        };
        let shape = Shape {
            grid: (plan.blocks, 1),
            threads: THREADS,
            shared: plan.shared,
        };
        // SAFETY: the parameter is the kernel's own struct; all views hold what the shape needs (`validate`).
        unsafe { device.launch(&plan.name, shape, arguments![parameters]) }
    }

    /// What all kernels are told; the weight is still missing.
    fn parameters(&self) -> Parameters {
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
        match self.output {
            Output::Store(y) | Output::StoreF32(y) | Output::SiluMul(y) => {
                parameters.y = y.address();
            }
            Output::AddResidual { residual, sums } => {
                parameters.y = residual.address();
                parameters.sums_out = sums.address();
            }
        }
        parameters
    }

    /// Tiles of 8 rows of x, a power of two.
    fn token_tiles(&self) -> usize {
        self.m.div_ceil(8).next_power_of_two()
    }

    /// Blocks that do `row_tiles` tiles of weights each.
    fn blocks(&self, row_tiles: usize) -> usize {
        let (_, rows) = self.output.kind();
        self.n.div_ceil(rows * row_tiles)
    }

    fn float_plan(&self, device: &Device, weight: View<'_>, parameters: &mut Parameters) -> Plan {
        parameters.weight = weight.address();
        let norm = if matches!(self.input, Input::Normed { .. }) {
            "_norm"
        } else {
            ""
        };
        let (tiles, blocks) = (self.token_tiles(), self.blocks(1));
        let processors = device.multiprocessors() as usize;
        let ahead = steps_ahead(tiles, blocks, self.k, processors);
        let (kind, _) = self.output.kind();
        let suffix = self.float.suffix();
        // Blocks stay where rows are long; tiles of short ones are over before it helps. As in `skinny_gemm.cu`.
        let at_once = blocks_that_stay(tiles) * processors;
        let stay = self.k >= LONG_ROW && (tiles, ahead) != (1, 4);
        if stay && blocks > 2 * at_once {
            parameters.tickets = device.tickets();
        }
        Plan {
            name: format!("skinny_{kind}{norm}_{tiles}x{ahead}_{suffix}"),
            blocks: if stay { blocks.min(at_once) } else { blocks },
            shared: 0,
        }
    }

    fn int4_plan(&self, device: &Device, weight: Int4View<'_>) -> Plan {
        let tiles = self.token_tiles();
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
        let (kind, _) = self.output.kind();
        Plan {
            name: format!("{name}_{kind}_{tiles}x{row_tiles}"),
            blocks: self.blocks(row_tiles).min(at_once),
            shared: in_flight * 2 * row_tiles * THREADS * 20,
        }
    }

    fn eight_bit_plan(&self, weight: EightBit<'_>, parameters: &mut Parameters) -> Plan {
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
        let (kind, _) = self.output.kind();
        let (tiles, suffix) = (self.token_tiles(), self.float.suffix());
        Plan {
            name: format!("{name}_{kind}_{tiles}_{suffix}"),
            blocks: self.blocks(1),
            shared: 0,
        }
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
        // Two rows that need no norm are done sooner by the kernel for more of them.
        if self.m > 1 && matches!(self.input, Input::Plain(_)) {
            return None;
        }
        let few = Int4Few {
            weight,
            m: self.m,
            rows: self.n * parts,
            k: self.k,
            parts,
        };
        few.is_for(device).then_some(few)
    }
}
