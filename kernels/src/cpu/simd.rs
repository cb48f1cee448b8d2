//! Sixteen f32 lanes and the int8 product, on AVX-512 with VNNI, AVX2, and plain Rust.
//!
//! All three give the same bits: fused multiply-adds, one order of reduction, exact integer sums.
//! Methods are `inline(always)` so that they dissolve into a caller compiled with the features.

mod scalar;
#[cfg(target_arch = "x86_64")]
#[allow(
    clippy::undocumented_unsafe_blocks,
    reason = "each is the one intrinsic that the trait's method names"
)]
mod x86;

use std::sync::OnceLock;

pub(crate) use scalar::Scalar;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

/// Instruction set that kernels run with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL and VNNI.
    Avx512,
}

impl Isa {
    /// The best this machine has.
    #[must_use]
    pub fn detect() -> Self {
        static ISA: OnceLock<Isa> = OnceLock::new();
        *ISA.get_or_init(|| {
            #[cfg(target_arch = "x86_64")]
            {
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
                    && is_x86_feature_detected!("f16c")
                {
                    return Self::Avx512;
                }
                if is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
                {
                    return Self::Avx2;
                }
            }
            Self::Scalar
        })
    }

    /// True when this machine can run it.
    #[must_use]
    pub fn is_available(self) -> bool {
        self as u8 <= Self::detect() as u8
    }

    /// All that this machine can run, for tests.
    #[must_use]
    pub fn available() -> Vec<Self> {
        match Self::detect() {
            Self::Scalar => vec![Self::Scalar],
            Self::Avx2 => vec![Self::Scalar, Self::Avx2],
            Self::Avx512 => vec![Self::Scalar, Self::Avx2, Self::Avx512],
        }
    }
}

/// Compiles `$body` for each instruction set and calls the one that `$isa` names.
///
/// `$generic::<S>(args)` must be an `inline(always)` unsafe function generic over [`Simd`].
macro_rules! dispatch {
    ($isa:expr, $generic:ident :: <$($const:literal),*> ( $($arg:ident : $ty:ty),* $(,)? )) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
        unsafe fn avx512($($arg: $ty),*) {
            // SAFETY: the caller's promise, passed on.
            unsafe { $generic::<$crate::cpu::simd::Avx512, $($const),*>($($arg),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2($($arg: $ty),*) {
            // SAFETY: the caller's promise, passed on.
            unsafe { $generic::<$crate::cpu::simd::Avx2, $($const),*>($($arg),*) }
        }
        match $isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: callers dispatch on an `Isa` that was detected or asserted to be available; the rest is the
            // promise written where the macro is used.
            $crate::cpu::Isa::Avx512 => unsafe { avx512($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            $crate::cpu::Isa::Avx2 => unsafe { avx2($($arg),*) },
            // SAFETY: plain Rust runs everywhere; the rest as above.
            _ => unsafe { $generic::<$crate::cpu::simd::Scalar, $($const),*>($($arg),*) },
        }
    }};
}
pub(crate) use dispatch;

/// Sixteen f32 lanes `F`.
///
/// # Safety
/// Every method needs the instruction set of its implementor; loads and stores need as many valid elements at the
/// pointer as they name. No alignment is needed.
pub(crate) trait Simd: Copy {
    type F: Copy;

    unsafe fn splat(x: f32) -> Self::F;
    /// 16 f32.
    unsafe fn load(p: *const f32) -> Self::F;
    /// 16 f16.
    unsafe fn load_f16(p: *const u16) -> Self::F;
    /// 16 bf16.
    unsafe fn load_bf16(p: *const u16) -> Self::F;
    unsafe fn store(p: *mut f32, x: Self::F);
    /// 16 f16, to nearest even.
    unsafe fn store_f16(p: *mut u16, x: Self::F);
    /// Hints that the cache line at `p` is read soon. `p` may point anywhere.
    #[inline(always)]
    unsafe fn prefetch(_p: *const u8) {}
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// `a·b + c`, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// To the nearest integer, ties to even.
    unsafe fn round(a: Self::F) -> Self::F;
    /// `2^n` for integral `-126 ≤ n ≤ 127`.
    unsafe fn exp2_int(n: Self::F) -> Self::F;

    /// Lanes 8 apart, then 4, 2, 1.
    #[inline(always)]
    unsafe fn reduce_add(a: Self::F) -> f32 {
        let mut x = [0f32; 16];
        // SAFETY: 16 elements.
        unsafe { Self::store(x.as_mut_ptr(), a) };
        for width in [8, 4, 2, 1] {
            for lane in 0..width {
                x[lane] += x[lane + width];
            }
        }
        x[0]
    }

    #[inline(always)]
    unsafe fn reduce_max(a: Self::F) -> f32 {
        let mut x = [0f32; 16];
        // SAFETY: 16 elements.
        unsafe { Self::store(x.as_mut_ptr(), a) };
        x.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    /// eˣ, relative error below 2·10⁻⁷ for −87 ≤ x ≤ 88; smaller x give e⁻⁸⁷ (1.6·10⁻³⁸), larger ones e⁸⁸.
    /// Cody–Waite reduction and a Taylor polynomial of degree 7 on |r| ≤ ln 2 / 2.
    #[inline(always)]
    unsafe fn exp(x: Self::F) -> Self::F {
        // SAFETY: register operations only.
        unsafe {
            // `x` second: `min` and `max` give their second operand when either is NaN, and NaN must come out.
            let x = Self::max(Self::splat(-87.0), Self::min(Self::splat(88.0), x));
            let n = Self::round(Self::mul(x, Self::splat(std::f32::consts::LOG2_E)));
            let r = Self::fma(n, Self::splat(-0.693_359_4), x);
            let r = Self::fma(n, Self::splat(2.121_944_4e-4), r);
            let mut p = Self::splat(1.0 / 5040.0);
            for c in [
                1.0 / 720.0,
                1.0 / 120.0,
                1.0 / 24.0,
                1.0 / 6.0,
                0.5,
                1.0,
                1.0,
            ] {
                p = Self::fma(p, r, Self::splat(c));
            }
            Self::mul(p, Self::exp2_int(n))
        }
    }
}

/// Sixteen i32 lanes `I` and 64 bytes `B`, on instruction sets that multiply bytes four by four (AVX2 does not: its
/// products are in `matmul::avx2`).
///
/// # Safety
/// As [`Simd`].
pub(crate) trait Int8: Simd {
    type I: Copy;
    type B: Copy;

    unsafe fn splat_i(x: i32) -> Self::I;
    unsafe fn to_f32(x: Self::I) -> Self::F;
    /// 64 bytes.
    unsafe fn load_bytes(p: *const u8) -> Self::B;
    unsafe fn low_nibbles(b: Self::B) -> Self::B;
    unsafe fn high_nibbles(b: Self::B) -> Self::B;
    /// `acc[l] + Σᵢ w[4l+i]·a[i]`, `w` unsigned bytes, `a` the four signed bytes of the word.
    unsafe fn dot(acc: Self::I, w: Self::B, a: i32) -> Self::I;
}
