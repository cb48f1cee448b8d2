//! Products: which run fused with their neighbours, and how the others are launched.

use std::sync::Arc;

use ashlar_kernels::cuda::{
    CudaError, DeviceBuffer, Float, View,
    eight_bit::QuantizeRows,
    gemm::{Fp8Gemm, Gemm},
    int4::Int4View,
    int4_gemm::Int4Gemm,
    invariant_gemm::InvariantGemm,
    skinny::{self, Input, Output, SkinnyGemm},
};

use super::{
    CudaBackend, CudaBuf, GpuMatrix, GpuVector,
    buffer::{Product, State},
};
use crate::{model_runner::cuda::matrix::Matrix, models::backend::Linear};

/// Products with at most so many rows run as skinny ones, fused with their neighbours; wide ones with half as many, where
/// cuBLASLt reads weights faster.
pub(in super::super) const FUSED_ROWS: usize = 16;

/// Products with at most so many rows read four-bit weights as they are where the GPU can; with more it is faster to turn them
/// into 16 bits first.
const INT4_GEMM_ROWS: usize = 512;

/// From this width on rows are wide: products run as skinny ones with half as many, and a norm that cannot be had for one
/// multiplication a value is a kernel of its own, because every block of a product would repeat it.
const WIDE: usize = 2048;
/// Rounds in which plans are timed: more where a product takes no longer than it takes to read the weight, and a moment's noise
/// would decide.
const ROUNDS: usize = 3;
const FEW_ROWS: usize = 256;
const FEW_ROUNDS: usize = 8;

/// What becomes of a product with many rows.
#[derive(Clone, Copy)]
pub(in super::super) enum Target<'a> {
    /// Rows of 16-bit floats.
    Store(View<'a>),
    /// Rows of f32.
    StoreF32(View<'a>),
    /// Added to rows of 16-bit floats, where [`CudaBackend::adds`].
    Add(View<'a>),
}

/// Four-bit weights, and the scratch memory of their kernel.
type FourBits<'a> = (Int4View<'a>, &'a DeviceBuffer, &'a DeviceBuffer);

/// A product with many rows, by what is multiplied.
enum LargeProduct<'a> {
    Float(Gemm<'a>),
    Fp8(Fp8Gemm<'a>),
    Int4(Int4Gemm<'a>),
    Invariant(InvariantGemm<'a>),
}

impl CudaBackend {
    /// Most rows of a layer's product that is left to its neighbours.
    pub(in super::super) fn fused_rows(&self) -> usize {
        if self.integers {
            skinny::MAX_INT4_ROWS
        } else {
            FUSED_ROWS
        }
    }

    /// Whether a layer's product of these rows with this matrix is left to its neighbours.
    pub(super) fn fuses(&self, rows: usize, matrix: &Matrix) -> bool {
        if self.batch_invariant || rows > self.fused_rows() {
            // All alike: what reads a fused norm must be fused too.
            false
        } else if matrix.is_int4() {
            SkinnyGemm::takes_int4(rows, matrix.columns)
        } else if self.int4_parts.is_some() && rows > FUSED_ROWS {
            // Where four bits go further alone.
            false
        } else if matrix.is_eight_bit() || self.integers {
            // As many as a norm is fused with below.
            SkinnyGemm::takes(rows, matrix.columns)
        } else {
            self.is_skinny(rows, matrix.columns)
        }
    }

    fn is_skinny(&self, rows: usize, width: usize) -> bool {
        let most = if width < WIDE {
            FUSED_ROWS
        } else {
            FUSED_ROWS / 2
        };
        !self.batch_invariant && rows <= most && SkinnyGemm::takes(rows, width)
    }

    /// Whether the norm behind a noted product is left to the products that read it.
    pub(super) fn norms_on_the_way(&self, product: &Product, rows: usize, width: usize) -> bool {
        if width < WIDE {
            let most = if self.int4_parts.is_some() {
                FUSED_ROWS
            } else {
                skinny::MAX_ROWS
            };
            rows <= most
        } else {
            let matrix = &product.matrix;
            if let Some(weight) = matrix.int4_view() {
                return SkinnyGemm::norms_int4(&self.device, weight, rows, width);
            }
            let is_float = !matrix.is_eight_bit();
            rows <= FUSED_ROWS / 2 && self.float == Float::Bf16 && is_float && !self.integers
        }
    }

    /// Launches a noted product into `output`.
    pub(super) fn run_product(
        &self,
        product: &Product,
        rows: usize,
        n: usize,
        output: Output<'_>,
    ) -> Result<(), CudaError> {
        let input = match &product.norm {
            None => Input::Plain(product.x.view()),
            Some((weight, num_sums)) => Input::Normed {
                residual: product.x.view(),
                weight: weight.view(),
                sums: self.sums.view(),
                num_sums: *num_sums,
                eps: self.eps,
            },
        };
        SkinnyGemm {
            float: self.float,
            input,
            weight: product.matrix.weight(),
            bias: product.bias.as_ref().map(|bias| bias.view()),
            output,
            m: rows,
            n,
            k: product.matrix.columns,
        }
        .launch(&self.device)
    }

    /// Makes a buffer hold what it stands for.
    pub(super) fn settle(&self, buf: &mut CudaBuf) -> Result<(), CudaError> {
        match std::mem::replace(&mut buf.state, State::Ready) {
            State::Ready => Ok(()),
            State::Product(product) => {
                self.run_product(&product, buf.rows, buf.width, Output::Store(buf.view()))
            }
            State::Large(product) => {
                self.launch_gemm(&product, Target::Store(buf.view()), buf.rows)
            }
            State::Normed { .. } => Err(CudaError::Shape {
                op: "norm",
                message: "a fused norm is only read by products: this is a bug".to_owned(),
            }),
        }
    }

    pub(super) fn product_of(x: &CudaBuf, matrix: &GpuMatrix, bias: Option<&GpuVector>) -> Product {
        let (source, norm) = match &x.state {
            State::Normed {
                residual,
                weight,
                num_sums,
            } => (residual, Some((Arc::clone(weight), *num_sums))),
            State::Ready | State::Product(_) | State::Large(_) => (&x.data, None),
        };
        Product {
            x: Arc::clone(source),
            norm,
            matrix: Arc::clone(matrix),
            bias: bias.map(Arc::clone),
        }
    }

    /// The kernel for four-bit weights as they are, where a product of so many rows with this matrix is its.
    fn four_bits<'a>(&'a self, matrix: &'a GpuMatrix, rows: usize) -> Option<FourBits<'a>> {
        let (weight, (parts, arrived)) = (matrix.int4_view()?, self.int4_parts.as_ref()?);
        let takes = rows <= INT4_GEMM_ROWS
            && matrix.float_view().is_none()
            && Int4Gemm::takes(&self.device, matrix.rows, matrix.columns);
        takes.then_some((weight, parts, arrived))
    }

    /// Whether a product of so many rows with this matrix can be added to the residual stream on its way out.
    pub(super) fn adds(&self, matrix: &GpuMatrix, rows: usize) -> bool {
        self.place.is_none() && !self.batch_invariant && self.four_bits(matrix, rows).is_none()
    }

    /// A product with many rows, launched or timed by `run`.
    fn gemm<T>(
        &self,
        x: View<'_>,
        (matrix, bias): (&GpuMatrix, Option<&GpuVector>),
        target: Target<'_>,
        rows: usize,
        run: impl Fn(&LargeProduct<'_>) -> Result<T, CudaError>,
    ) -> Result<T, CudaError> {
        let (n, k) = (matrix.rows, matrix.columns);
        let (Target::Store(y) | Target::StoreF32(y) | Target::Add(y)) = target;
        let f32_out = matches!(target, Target::StoreF32(_));
        if self.batch_invariant {
            return run(&LargeProduct::Invariant(InvariantGemm {
                float: self.float,
                x,
                weight: self.values(matrix)?,
                bias: bias.map(|bias| bias.view()),
                y,
                f32_out,
                m: rows,
                n,
                k,
            }));
        }
        if let Some((weight, parts, arrived)) = self.four_bits(matrix, rows) {
            return run(&LargeProduct::Int4(Int4Gemm {
                x,
                weight,
                bias: bias.map(|bias| bias.view()),
                y,
                m: rows,
                n,
                k,
                parts: parts.view(),
                arrived: arrived.view(),
            }));
        }
        let gemm = |x, weight| Gemm {
            float: self.float,
            x,
            weight,
            bias: bias.map(|bias| bias.view()),
            y,
            f32_out,
            adds: matches!(target, Target::Add(_)),
            m: rows,
            n,
            k,
        };
        let (Some(weight), Some((data, scales))) = (matrix.fp8_view(), &self.fp8_rows) else {
            return run(&LargeProduct::Float(gemm(x, self.values(matrix)?)));
        };
        QuantizeRows {
            float: self.float,
            x,
            out: data.view(),
            scales: scales.view(),
            m: rows,
            k: matrix.columns,
        }
        .launch(&self.device)?;
        run(&LargeProduct::Fp8(Fp8Gemm {
            gemm: gemm(data.view(), weight.data),
            x_scales: scales.view(),
            weight_scales: weight.scales,
        }))
    }

    /// The head's product, of the columns that `out` holds.
    pub(super) fn head(
        &self,
        x: &CudaBuf,
        head: &Linear<GpuMatrix, GpuVector>,
        out: &CudaBuf,
    ) -> Result<(), CudaError> {
        let (matrix, bias) = (&head.parts[0], head.bias.as_ref());
        let is_normed = matches!(x.state, State::Normed { .. });
        if is_normed || self.is_skinny(x.rows, matrix.columns) {
            let product = Self::product_of(x, matrix, bias);
            let output = Output::StoreF32(out.view());
            self.run_product(&product, x.rows, out.width, output)
        } else {
            let product = Self::product_of(x, matrix, bias);
            self.launch_gemm(&product, Target::StoreF32(out.view()), x.rows)
        }
    }

    /// Finds the fastest plans for products of `rows` rows with these matrices, which have one shape.
    pub(in super::super) fn tune(
        &self,
        matrices: &[&GpuMatrix],
        x: &CudaBuf,
        target: Target<'_>,
        rows: usize,
    ) -> Result<(), CudaError> {
        let rounds = if rows <= FEW_ROWS { FEW_ROUNDS } else { ROUNDS };
        let operands = (matrices[0], None);
        self.gemm(x.view(), operands, target, rows, |product| match product {
            LargeProduct::Float(gemm) => {
                let floats = matrices[1..]
                    .iter()
                    .filter_map(|matrix| matrix.float_view());
                gemm.tune(&self.device, rounds, &floats.collect::<Vec<_>>())
            }
            LargeProduct::Fp8(gemm) => {
                let views = matrices[1..].iter().filter_map(|matrix| matrix.fp8_view());
                let bytes = views.map(|view| view.data);
                gemm.tune(&self.device, rounds, &bytes.collect::<Vec<_>>())
            }
            LargeProduct::Int4(_) | LargeProduct::Invariant(_) => Ok(()),
        })
    }

    pub(super) fn launch_gemm(
        &self,
        product: &Product,
        target: Target<'_>,
        rows: usize,
    ) -> Result<(), CudaError> {
        let operands = (&product.matrix, product.bias.as_ref());
        self.gemm(product.x.view(), operands, target, rows, |product| {
            self.launch_large(product)
        })
    }

    fn launch_large(&self, product: &LargeProduct<'_>) -> Result<(), CudaError> {
        match product {
            LargeProduct::Float(gemm) => gemm.launch(&self.device),
            LargeProduct::Fp8(gemm) => gemm.launch(&self.device),
            LargeProduct::Int4(gemm) => gemm.launch(&self.device),
            LargeProduct::Invariant(gemm) => gemm.launch(&self.device),
        }
    }

    /// A product of `rows` rows of whatever lies in `x`.
    pub(in super::super) fn product(
        &self,
        weight: &Linear<GpuMatrix, GpuVector>,
        x: &CudaBuf,
        target: Target<'_>,
        rows: usize,
    ) -> Result<(), CudaError> {
        let operands = (&weight.parts[0], weight.bias.as_ref());
        self.gemm(x.view(), operands, target, rows, |product| {
            self.launch_large(product)
        })
    }
}
