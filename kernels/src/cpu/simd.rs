//! Sixteen f32 lanes and the int8 product, on AVX-512 with VNNI, AVX2, and plain Rust.
//!
//! All three give the same bits: fused multiply-adds, one order of reduction, exact integer sums.
//! Methods are `inline(always)` so that they dissolve into a caller compiled with the features.

use std::sync::OnceLock;

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

/// Plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

#[inline(always)]
fn map(f: impl Fn(usize) -> f32) -> [f32; 16] {
    std::array::from_fn(f)
}

#[allow(
    clippy::undocumented_unsafe_blocks,
    reason = "loads and stores pass on the trait's promise"
)]
impl Simd for Scalar {
    type F = [f32; 16];

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        [x; 16]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        unsafe { p.cast::<[f32; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::F {
        map(|i| half::f16::from_bits(unsafe { p.add(i).read_unaligned() }).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::F {
        map(|i| f32::from_bits(u32::from(unsafe { p.add(i).read_unaligned() }) << 16))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: Self::F) {
        unsafe { p.cast::<[f32; 16]>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, x: Self::F) {
        let bits = x.map(|x| half::f16::from_f32(x).to_bits());
        unsafe { p.cast::<[u16; 16]>().write_unaligned(bits) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        map(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        map(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        map(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        map(|i| a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        // The second operand when either is NaN, as the vector instructions do.
        map(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        map(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        map(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn round(a: Self::F) -> Self::F {
        map(|i| a[i].round_ties_even())
    }
    #[inline(always)]
    unsafe fn exp2_int(n: Self::F) -> Self::F {
        map(|i| f32::from_bits(((n[i] as i32 + 127) as u32) << 23))
    }
}

#[allow(
    clippy::undocumented_unsafe_blocks,
    reason = "loads pass on the trait's promise"
)]
impl Int8 for Scalar {
    type I = [i32; 16];
    type B = [u8; 64];

    #[inline(always)]
    unsafe fn splat_i(x: i32) -> Self::I {
        [x; 16]
    }
    #[inline(always)]
    unsafe fn to_f32(x: Self::I) -> Self::F {
        map(|i| x[i] as f32)
    }
    #[inline(always)]
    unsafe fn load_bytes(p: *const u8) -> Self::B {
        unsafe { p.cast::<[u8; 64]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn low_nibbles(b: Self::B) -> Self::B {
        b.map(|b| b & 15)
    }
    #[inline(always)]
    unsafe fn high_nibbles(b: Self::B) -> Self::B {
        b.map(|b| b >> 4)
    }
    #[inline(always)]
    unsafe fn dot(mut acc: Self::I, w: Self::B, a: i32) -> Self::I {
        let a = a.to_le_bytes().map(|b| i32::from(b.cast_signed()));
        for (lane, acc) in acc.iter_mut().enumerate() {
            for i in 0..4 {
                *acc += i32::from(w[4 * lane + i]) * a[i];
            }
        }
        acc
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
#[allow(
    clippy::undocumented_unsafe_blocks,
    reason = "each is the one intrinsic that the trait's method names"
)]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Int8, Simd};

    /// AVX-512 F, BW, VL, VNNI.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512;

    impl Simd for Avx512 {
        type F = __m512;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::F {
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self::F {
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const u16) -> Self::F {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const u16) -> Self::F {
            unsafe {
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(
                    _mm256_loadu_si256(p.cast()),
                )))
            }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, x: Self::F) {
            unsafe { _mm512_storeu_ps(p, x) }
        }
        #[inline(always)]
        unsafe fn store_f16(p: *mut u16, x: Self::F) {
            unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<0>(x)) }
        }
        #[inline(always)]
        unsafe fn prefetch(p: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
        #[inline(always)]
        unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
            unsafe { _mm512_div_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
            unsafe { _mm512_min_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn round(a: Self::F) -> Self::F {
            unsafe { _mm512_roundscale_ps::<0x08>(a) }
        }
        #[inline(always)]
        unsafe fn exp2_int(n: Self::F) -> Self::F {
            unsafe {
                _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(
                    _mm512_cvtps_epi32(n),
                    _mm512_set1_epi32(127),
                )))
            }
        }
    }

    impl Int8 for Avx512 {
        type I = __m512i;
        type B = __m512i;

        #[inline(always)]
        unsafe fn splat_i(x: i32) -> Self::I {
            unsafe { _mm512_set1_epi32(x) }
        }
        #[inline(always)]
        unsafe fn to_f32(x: Self::I) -> Self::F {
            unsafe { _mm512_cvtepi32_ps(x) }
        }
        #[inline(always)]
        unsafe fn load_bytes(p: *const u8) -> Self::B {
            unsafe { _mm512_loadu_si512(p.cast()) }
        }
        #[inline(always)]
        unsafe fn low_nibbles(b: Self::B) -> Self::B {
            unsafe { _mm512_and_si512(b, _mm512_set1_epi8(15)) }
        }
        #[inline(always)]
        unsafe fn high_nibbles(b: Self::B) -> Self::B {
            unsafe { _mm512_and_si512(_mm512_srli_epi16::<4>(b), _mm512_set1_epi8(15)) }
        }
        #[inline(always)]
        unsafe fn dot(acc: Self::I, w: Self::B, a: i32) -> Self::I {
            unsafe { _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(a)) }
        }
    }

    /// AVX2, FMA, F16C: two halves.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2;

    macro_rules! both {
        ($f:ident, $($x:expr),*) => { [$f($($x[0]),*), $f($($x[1]),*)] };
    }

    impl Simd for Avx2 {
        type F = [__m256; 2];

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::F {
            unsafe { [_mm256_set1_ps(x); 2] }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self::F {
            unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const u16) -> Self::F {
            unsafe {
                [
                    _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                    _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())),
                ]
            }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const u16) -> Self::F {
            let widen = |p: *const u16| unsafe {
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(
                    _mm_loadu_si128(p.cast()),
                )))
            };
            unsafe { [widen(p), widen(p.add(8))] }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, x: Self::F) {
            unsafe {
                _mm256_storeu_ps(p, x[0]);
                _mm256_storeu_ps(p.add(8), x[1]);
            }
        }
        #[inline(always)]
        unsafe fn store_f16(p: *mut u16, x: Self::F) {
            unsafe {
                _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<0>(x[0]));
                _mm_storeu_si128(p.add(8).cast(), _mm256_cvtps_ph::<0>(x[1]));
            }
        }
        #[inline(always)]
        unsafe fn prefetch(p: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
        #[inline(always)]
        unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
            unsafe { both!(_mm256_add_ps, a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
            unsafe { both!(_mm256_sub_ps, a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
            unsafe { both!(_mm256_mul_ps, a, b) }
        }
        #[inline(always)]
        unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
            unsafe { both!(_mm256_div_ps, a, b) }
        }
        #[inline(always)]
        unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
            unsafe { both!(_mm256_max_ps, a, b) }
        }
        #[inline(always)]
        unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
            unsafe { both!(_mm256_min_ps, a, b) }
        }
        #[inline(always)]
        unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
            unsafe { both!(_mm256_fmadd_ps, a, b, c) }
        }
        #[inline(always)]
        unsafe fn round(a: Self::F) -> Self::F {
            unsafe { [_mm256_round_ps::<0x08>(a[0]), _mm256_round_ps::<0x08>(a[1])] }
        }
        #[inline(always)]
        unsafe fn exp2_int(n: Self::F) -> Self::F {
            let half = |n: __m256| unsafe {
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(
                    _mm256_cvtps_epi32(n),
                    _mm256_set1_epi32(127),
                )))
            };
            [half(n[0]), half(n[1])]
        }
    }
}
