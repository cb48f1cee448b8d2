//! Quantised tiles on AVX2: half a panel (eight outputs) and up to four rows at a time, to fit sixteen registers.
//!
//! `maddubs` adds two products in 16 bits and saturates. Four-bit weights: 8 loads × 2 · 15 · 127 = 30,480 fit, so a
//! whole block is summed in 16 bits. Eight-bit weights go as |w| · sign(a, w): 2 · 128 · 127 = 32,512 fits, and each
//! pair is widened at once. All sums are exact, so the result has the bits of the other instruction sets.

#![allow(
    clippy::needless_range_loop,
    reason = "one index runs over several register arrays"
)]

use std::arch::x86_64::*;

use super::tiles::{Int8Tile, Q4Scales, Sums};
use crate::cpu::quantize::BLOCK;

/// Rows whose sums fit the registers.
const ROWS: usize = 4;

/// # Safety
/// As [`super::tiles::Int8Tiles::q4`].
#[inline(always)]
pub(super) unsafe fn q4_tile<const T: usize, C: Q4Scales>(
    q: &[u8],
    scales: C,
    x: &Int8Tile<'_>,
    blocks: usize,
    sums: &mut Sums,
) {
    // SAFETY: the caller's promise; the two calls of a tile of 8 take its first and its last four rows.
    unsafe {
        for half in 0..2 {
            if T == 2 * ROWS {
                q4_half::<ROWS, C>(q, scales, x, blocks, half, 0, sums);
                q4_half::<ROWS, C>(q, scales, x, blocks, half, ROWS, sums);
            } else {
                q4_half::<T, C>(q, scales, x, blocks, half, 0, sums);
            }
        }
    }
}

/// # Safety
/// As [`super::tiles::Int8Tiles::q8`].
#[inline(always)]
pub(super) unsafe fn q8_tile<const T: usize>(
    q: &[u8],
    scales: &[u16],
    x: &Int8Tile<'_>,
    blocks: usize,
    sums: &mut Sums,
) {
    // SAFETY: as in `q4_tile`.
    unsafe {
        for half in 0..2 {
            if T == 2 * ROWS {
                q8_half::<ROWS>(q, scales, x, blocks, half, 0, sums);
                q8_half::<ROWS>(q, scales, x, blocks, half, ROWS, sums);
            } else {
                q8_half::<T>(q, scales, x, blocks, half, 0, sums);
            }
        }
    }
}

/// Outputs `8·half..8·half + 8` of rows `first..first + T`.
///
/// # Safety
/// As [`q4_tile`], with `half < 2` and `first + T` rows in `x` and `sums`.
#[inline(always)]
unsafe fn q4_half<const T: usize, C: Q4Scales>(
    q: &[u8],
    mut scales: C,
    x: &Int8Tile<'_>,
    blocks: usize,
    half: usize,
    first: usize,
    sums: &mut Sums,
) {
    // SAFETY: loads end at 256·blocks bytes and 32 values behind a place of `scales`; rows are below the tile's.
    unsafe {
        let (nibble, ones) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
        let mut acc = [_mm256_setzero_ps(); T];
        for block in 0..blocks {
            let mut dots = [_mm256_setzero_si256(); T];
            for j in 0..4 {
                let at = q.as_ptr().add(block * 256 + j * 64 + half * 32);
                let bytes = _mm256_loadu_si256(at.cast());
                let low = _mm256_and_si256(bytes, nibble);
                let high = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibble);
                for t in 0..T {
                    let a = _mm256_set1_epi32(x.word(first + t, block * BLOCK + 4 * j));
                    dots[t] = _mm256_add_epi16(dots[t], _mm256_maddubs_epi16(low, a));
                    let a = _mm256_set1_epi32(x.word(first + t, block * BLOCK + 16 + 4 * j));
                    dots[t] = _mm256_add_epi16(dots[t], _mm256_maddubs_epi16(high, a));
                }
            }
            let place = scales.next() + half * 8;
            let scale = |at: usize| {
                let from = scales.values().as_ptr().add(place + at);
                _mm256_cvtph_ps(_mm_loadu_si128(from.cast()))
            };
            let (d, mut m) = (scale(0), scale(16));
            if C::ZEROS {
                m = _mm256_sub_ps(_mm256_setzero_ps(), _mm256_mul_ps(m, d));
            }
            for t in 0..T {
                let at = (first + t) * blocks + block;
                let dot = _mm256_cvtepi32_ps(_mm256_madd_epi16(dots[t], ones));
                let dx = _mm256_mul_ps(d, _mm256_set1_ps(*x.scale.get_unchecked(at)));
                acc[t] = _mm256_fmadd_ps(dot, dx, acc[t]);
                let sum = _mm256_set1_ps(*x.scaled_sum.get_unchecked(at));
                acc[t] = _mm256_fmadd_ps(m, sum, acc[t]);
            }
        }
        for t in 0..T {
            _mm256_storeu_ps(sums[first + t][half * 8..][..8].as_mut_ptr(), acc[t]);
        }
    }
}

/// Outputs `8·half..8·half + 8` of rows `first..first + T`.
///
/// # Safety
/// As [`q8_tile`], with `half < 2` and `first + T` rows in `x` and `sums`.
#[inline(always)]
unsafe fn q8_half<const T: usize>(
    q: &[u8],
    scales: &[u16],
    x: &Int8Tile<'_>,
    blocks: usize,
    half: usize,
    first: usize,
    sums: &mut Sums,
) {
    // SAFETY: loads end at 512·blocks bytes and 16·blocks scales; rows are below the tile's.
    unsafe {
        let (sign, ones) = (_mm256_set1_epi8(-128), _mm256_set1_epi16(1));
        let mut acc = [_mm256_setzero_ps(); T];
        for block in 0..blocks {
            let mut dots = [_mm256_setzero_si256(); T];
            for j in 0..8 {
                let at = q.as_ptr().add(block * 512 + j * 64 + half * 32);
                // Stored as w + 128.
                let w = _mm256_xor_si256(_mm256_loadu_si256(at.cast()), sign);
                let magnitude = _mm256_abs_epi8(w);
                for t in 0..T {
                    let a = _mm256_set1_epi32(x.word(first + t, block * BLOCK + 4 * j));
                    let pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(a, w));
                    dots[t] = _mm256_add_epi32(dots[t], _mm256_madd_epi16(pairs, ones));
                }
            }
            let at = scales.as_ptr().add(block * 16 + half * 8);
            let d = _mm256_cvtph_ps(_mm_loadu_si128(at.cast()));
            for t in 0..T {
                let at = (first + t) * blocks + block;
                let dx = _mm256_mul_ps(d, _mm256_set1_ps(*x.scale.get_unchecked(at)));
                acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[t]), dx, acc[t]);
            }
        }
        for t in 0..T {
            _mm256_storeu_ps(sums[first + t][half * 8..][..8].as_mut_ptr(), acc[t]);
        }
    }
}
