//! Some rows against one panel: the inner loops of a product.

#![allow(
    clippy::needless_range_loop,
    reason = "one index runs over several register arrays"
)]

#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::{Avx2, Avx512};
use crate::cpu::{
    QuantizedRows,
    packed::PANEL,
    quantize::BLOCK,
    simd::{Int8, Scalar, Simd},
};

/// Most rows of a tile.
pub(super) const MAX_TILE: usize = 8;

/// How far ahead weights are asked for, in bytes: rows of a tile hide part of the memory's delay, this the rest.
const PREFETCH: usize = 4096;

/// Sums of a tile.
pub(super) type Sums = [[f32; PANEL]; MAX_TILE];

/// All panels of a matrix.
#[derive(Clone, Copy)]
pub(super) enum Panel<'a> {
    Q4(&'a [u8], &'a [u16]),
    /// With the blocks of a group.
    W4(&'a [u8], &'a [u16], usize),
    Q8(&'a [u8], &'a [u16]),
    F32(&'a [f32]),
    F16(&'a [u16]),
    BF16(&'a [u16]),
}

/// All rows of the input.
#[derive(Clone, Copy)]
pub(super) enum Activations<'a> {
    Int8(&'a QuantizedRows),
    Float(&'a [f32]),
}

/// Where the scales of a panel's four-bit blocks are, block after block: `w = d·q + m`.
pub(super) trait Q4Scales: Copy {
    /// The second sixteen values are zeros `z`, with `m = −z·d`, and not `m` itself.
    const ZEROS: bool;

    /// Sixteen `d` then sixteen `m` or `z`, f16, from each of the places that [`Self::next`] gives.
    fn values(&self) -> &[u16];

    /// Where the next block's are.
    fn next(&mut self) -> usize;
}

/// Each block has its own.
#[derive(Clone, Copy)]
pub(super) struct ByBlock<'a> {
    values: &'a [u16],
    next: usize,
}

impl Q4Scales for ByBlock<'_> {
    const ZEROS: bool = false;

    #[inline(always)]
    fn values(&self) -> &[u16] {
        self.values
    }

    #[inline(always)]
    fn next(&mut self) -> usize {
        self.next += 32;
        self.next - 32
    }
}

/// `per_group` adjacent blocks share them.
#[derive(Clone, Copy)]
pub(super) struct ByGroup<'a> {
    values: &'a [u16],
    per_group: usize,
    at: usize,
    left: usize,
}

impl<'a> ByGroup<'a> {
    #[inline(always)]
    fn new(values: &'a [u16], per_group: usize) -> Self {
        Self {
            values,
            per_group,
            at: 0,
            left: per_group,
        }
    }
}

impl Q4Scales for ByGroup<'_> {
    const ZEROS: bool = true;

    #[inline(always)]
    fn values(&self) -> &[u16] {
        self.values
    }

    #[inline(always)]
    fn next(&mut self) -> usize {
        if self.left == 0 {
            self.at += 32;
            self.left = self.per_group;
        }
        self.left -= 1;
        self.at
    }
}

/// Tiles of quantised weights, as each instruction set's dot products and registers want them.
pub(super) trait Int8Tiles: Simd {
    /// # Safety
    /// The processor has `Self`; `q` is `256·blocks` bytes, `scales` gives `blocks` places with 32 values behind each, `x`
    /// is `T ≤ 8` rows of `32·blocks`.
    unsafe fn q4<const T: usize, C: Q4Scales>(
        q: &[u8],
        scales: C,
        x: &Int8Tile<'_>,
        blocks: usize,
        sums: &mut Sums,
    );

    /// # Safety
    /// The processor has `Self`; `q` is `512·blocks` bytes, `scales` `16·blocks`, `x` `T ≤ 8` rows of `32·blocks`.
    unsafe fn q8<const T: usize>(
        q: &[u8],
        scales: &[u16],
        x: &Int8Tile<'_>,
        blocks: usize,
        sums: &mut Sums,
    );
}

/// Implements [`Int8Tiles`] for a type by two functions.
macro_rules! int8_tiles {
    ($isa:ty, $q4:expr, $q8:expr) => {
        impl Int8Tiles for $isa {
            #[inline(always)]
            unsafe fn q4<const T: usize, C: Q4Scales>(
                q: &[u8],
                scales: C,
                x: &Int8Tile<'_>,
                blocks: usize,
                sums: &mut Sums,
            ) {
                // SAFETY: the caller's promise, passed on.
                unsafe { $q4(q, scales, x, blocks, sums) }
            }

            #[inline(always)]
            unsafe fn q8<const T: usize>(
                q: &[u8],
                scales: &[u16],
                x: &Int8Tile<'_>,
                blocks: usize,
                sums: &mut Sums,
            ) {
                // SAFETY: the caller's promise, passed on.
                unsafe { $q8(q, scales, x, blocks, sums) }
            }
        }
    };
}

int8_tiles!(Scalar, q4_tile::<Self, T, C>, q8_tile::<Self, T>);
#[cfg(target_arch = "x86_64")]
int8_tiles!(Avx512, q4_tile::<Self, T, C>, q8_tile::<Self, T>);
#[cfg(target_arch = "x86_64")]
int8_tiles!(
    Avx2,
    super::avx2::q4_tile::<T, C>,
    super::avx2::q8_tile::<T>
);

/// `T` rows from `row` against one panel.
///
/// # Safety
/// The processor has `S`'s instruction set.
#[inline(always)]
pub(super) unsafe fn tile_product<S: Int8Tiles, const T: usize>(
    data: Panel<'_>,
    panel: usize,
    columns: usize,
    x: Activations<'_>,
    row: usize,
    sums: &mut Sums,
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
                let scales = ByBlock {
                    values: scales,
                    next: 0,
                };
                S::q4::<T, _>(q, scales, &Int8Tile::new(x, row, T), blocks, sums);
            }
            (Panel::W4(q, scales, per_group), Activations::Int8(x)) => {
                let groups = blocks / per_group;
                let (q, scales) = (
                    &q[panel * blocks * 256..][..blocks * 256],
                    &scales[panel * groups * 32..][..groups * 32],
                );
                let scales = ByGroup::new(scales, per_group);
                S::q4::<T, _>(q, scales, &Int8Tile::new(x, row, T), blocks, sums);
            }
            (Panel::Q8(q, scales), Activations::Int8(x)) => {
                let (q, scales) = (
                    &q[panel * blocks * 512..][..blocks * 512],
                    &scales[panel * blocks * 16..][..blocks * 16],
                );
                S::q8::<T>(q, scales, &Int8Tile::new(x, row, T), blocks, sums);
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
pub(super) struct Int8Tile<'a> {
    pub(super) q: &'a [i8],
    pub(super) scale: &'a [f32],
    pub(super) scaled_sum: &'a [f32],
    pub(super) offset: &'a [i32],
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
            offset: &x.offset[row * blocks..][..rows * blocks],
            columns,
        }
    }

    /// Four activations of row `t` from `column`, as a word.
    ///
    /// # Safety
    /// `t` below the tile's rows and `column + 4 ≤ columns`.
    #[inline(always)]
    pub(super) unsafe fn word(&self, t: usize, column: usize) -> i32 {
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
/// As [`Int8Tiles::q4`], with `S` for `Self`.
#[inline(always)]
unsafe fn q4_tile<S: Int8, const T: usize, C: Q4Scales>(
    q: &[u8],
    mut scales: C,
    x: &Int8Tile<'_>,
    blocks: usize,
    sums: &mut Sums,
) {
    // SAFETY: offsets stay within the lengths of the promise; `sums` holds 8 ≥ T rows of 16.
    unsafe {
        let mut acc = [S::splat(0.0); T];
        for block in 0..blocks {
            let mut dots = [S::splat_i(0); T];
            for j in 0..4 {
                let at = q.as_ptr().add(block * 256 + j * 64);
                S::prefetch(at.wrapping_add(PREFETCH));
                let bytes = S::load_bytes(at);
                let (low, high) = (S::low_nibbles(bytes), S::high_nibbles(bytes));
                for t in 0..T {
                    dots[t] = S::dot(dots[t], low, x.word(t, block * BLOCK + 4 * j));
                    dots[t] = S::dot(dots[t], high, x.word(t, block * BLOCK + 16 + 4 * j));
                }
            }
            let place = scales.next();
            let d = S::load_f16(scales.values().as_ptr().add(place));
            let mut m = S::load_f16(scales.values().as_ptr().add(place + 16));
            if C::ZEROS {
                // Exact: four bits times eleven.
                m = S::sub(S::splat(0.0), S::mul(m, d));
            }
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
unsafe fn q8_tile<S: Int8, const T: usize>(
    q: &[u8],
    scales: &[u16],
    x: &Int8Tile<'_>,
    blocks: usize,
    sums: &mut Sums,
) {
    // SAFETY: offsets stay within the lengths of the promise; `sums` holds 8 ≥ T rows of 16.
    unsafe {
        let mut acc = [S::splat(0.0); T];
        for block in 0..blocks {
            let mut dots = [S::splat_i(0); T];
            for t in 0..T {
                // Stored bytes are q + 128: take 128·Σa off again.
                dots[t] = S::splat_i(*x.offset.get_unchecked(t * blocks + block));
            }
            for j in 0..8 {
                let at = q.as_ptr().add(block * 512 + j * 64);
                S::prefetch(at.wrapping_add(PREFETCH));
                let bytes = S::load_bytes(at);
                for t in 0..T {
                    dots[t] = S::dot(dots[t], bytes, x.word(t, block * BLOCK + 4 * j));
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
    sums: &mut Sums,
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
