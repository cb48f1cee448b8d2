//! Products with few rows (decode), bound by reading the weights once; what stands before and after them is fused in.

mod launch;

use super::{
    CudaError, Device, Float, View, eight_bit::EightBit, int4::Int4View, int4_few::Int4Few, need,
};

/// Most rows.
pub const MAX_ROWS: usize = 32;
/// Most rows with four-bit weights: they are worth more work, since the alternative writes and reads them as 16-bit ones.
pub const MAX_INT4_ROWS: usize = 64;

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
}
