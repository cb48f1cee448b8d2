//! The paged KV cache of a layer.
//!
//! A block holds, per kv head, K as `[dim][block_size]` (lanes are tokens: scores need no horizontal sums) and V as
//! `[block_size][dim]`.

use super::{
    Isa, ThreadPool,
    pool::SharedMut,
    simd::{Simd, dispatch},
};
use crate::e4m3::narrow;

/// Tokens in a block: the lanes of a vector.
pub const BLOCK_SIZE: usize = 16;

/// How K and V are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvDtype {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    F16,
    /// 1 byte, e4m3.
    F8,
}

/// Shape of a layer's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Blocks, the null block included.
    pub num_blocks: usize,
    /// Kv heads.
    pub kv_heads: usize,
    /// Values of a head, a multiple of 16.
    pub head_dim: usize,
    /// Storage.
    pub dtype: KvDtype,
}

impl KvLayout {
    /// Bytes of one block's K and V.
    #[must_use]
    pub const fn block_bytes(&self) -> usize {
        let value = match self.dtype {
            KvDtype::F32 => 4,
            KvDtype::F16 => 2,
            KvDtype::F8 => 1,
        };
        2 * self.kv_heads * self.head_dim * BLOCK_SIZE * value
    }

    pub(super) const fn head_values(&self) -> usize {
        self.head_dim * BLOCK_SIZE
    }

    pub(super) const fn block_values(&self) -> usize {
        2 * self.kv_heads * self.head_values()
    }
}

/// K and V of one layer.
#[derive(Debug)]
pub struct LayerCache {
    pub(super) layout: KvLayout,
    pub(super) data: Storage,
    /// What eight-bit K and V are multiplied with when they are read.
    pub(super) scales: [f32; 2],
}

#[derive(Debug)]
pub(super) enum Storage {
    F32(Vec<f32>),
    F16(Vec<u16>),
    F8(Vec<u8>),
}

impl LayerCache {
    /// A zeroed cache; none when it cannot be allocated, or `head_dim` is not a positive multiple of 16.
    #[must_use]
    pub fn new(layout: KvLayout) -> Option<Self> {
        if layout.head_dim == 0 || !layout.head_dim.is_multiple_of(16) || layout.kv_heads == 0 {
            return None;
        }
        let len = layout.num_blocks.checked_mul(layout.block_values())?;
        let data = match layout.dtype {
            KvDtype::F32 => Storage::F32(zeroed(len)?),
            KvDtype::F16 => Storage::F16(zeroed(len)?),
            KvDtype::F8 => Storage::F8(zeroed(len)?),
        };
        Some(Self {
            layout,
            data,
            scales: [1.0; 2],
        })
    }

    /// Stores eight-bit K and V divided by these, positive and finite ones; other types are stored as they are.
    #[must_use]
    pub fn with_scales(mut self, scales: [f32; 2]) -> Self {
        if self.layout.dtype == KvDtype::F8 {
            self.scales = scales;
        }
        self
    }

    /// Its shape.
    #[must_use]
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Writes row `i`'s k and v (`[kv_heads · head_dim]` each) to slot `slots[i]` = block · 16 + offset; a negative
    /// slot is padding. Rows are `stride` apart in `kv`, k at `k_offset`, v at `v_offset`. Heads are spread over the
    /// threads.
    ///
    /// # Panics
    /// When a slot or a row is out of range; nothing has been written then.
    pub fn write(
        &mut self,
        pool: &ThreadPool,
        slots: &[i64],
        kv: &[f32],
        stride: usize,
        k_offset: usize,
        v_offset: usize,
    ) {
        let layout = self.layout;
        let width = layout.kv_heads * layout.head_dim;
        let limit = layout.num_blocks * BLOCK_SIZE;
        for slot in slots {
            let in_range = usize::try_from(*slot).is_ok_and(|slot| slot < limit);
            assert!(
                *slot < 0 || in_range,
                "slot {slot} of {} blocks",
                layout.num_blocks
            );
        }
        if let Some(last) = slots.len().checked_sub(1) {
            let end = last * stride + k_offset.max(v_offset) + width;
            assert!(end <= kv.len(), "{} rows of k and v", slots.len());
        }
        let isa = Isa::detect();
        let data = match &mut self.data {
            Storage::F32(data) => SharedStorage::F32(SharedMut::new(data)),
            Storage::F16(data) => SharedStorage::F16(SharedMut::new(data)),
            Storage::F8(data) => SharedStorage::F8(SharedMut::new(data)),
        };
        let inverse = self.scales.map(|scale| 1.0 / scale);
        // A task is the K or the V of one head: few enough values stay on this thread.
        let tasks = 2 * layout.kv_heads;
        let write = |task: usize, _| {
            let (head, is_value) = (task / 2, task % 2 == 1);
            let offset = if is_value { v_offset } else { k_offset } + head * layout.head_dim;
            for (row, slot) in slots.iter().enumerate() {
                let Ok(slot) = usize::try_from(*slot) else {
                    continue;
                };
                let x = &kv[row * stride + offset..][..layout.head_dim];
                let half = if is_value { layout.kv_heads } else { 0 };
                let base = slot / BLOCK_SIZE * layout.block_values()
                    + (half + head) * layout.head_values();
                let token = slot % BLOCK_SIZE;
                match data {
                    SharedStorage::F32(data) => {
                        // SAFETY: slots were checked above, so the head's K or V of this block lies in the cache;
                        // this task alone touches that head's K or V, and `self` is borrowed for the call.
                        let to = unsafe { data.slice(base, layout.head_values()) };
                        place(x, to, token, is_value, 0, layout.head_dim);
                    }
                    SharedStorage::F16(data) => {
                        // SAFETY: as above.
                        let to = unsafe { data.slice(base, layout.head_values()) };
                        let mut halves = [0u16; HALVES];
                        for (part, x) in x.chunks(HALVES).enumerate() {
                            let halves = &mut halves[..x.len()];
                            // `isa` was detected; the slices have one length, a multiple of 16.
                            dispatch!(isa, to_f16::<>(x: &[f32], halves: &mut [u16]));
                            place(halves, to, token, is_value, part * HALVES, layout.head_dim);
                        }
                    }
                    SharedStorage::F8(data) => {
                        // SAFETY: as above.
                        let to = unsafe { data.slice(base, layout.head_values()) };
                        let mut bytes = [0u8; HALVES];
                        let inverse = inverse[usize::from(is_value)];
                        for (part, x) in x.chunks(HALVES).enumerate() {
                            let bytes = &mut bytes[..x.len()];
                            let places = bytes.iter_mut().zip(x);
                            places.for_each(|(byte, x)| *byte = narrow(x * inverse));
                            place(bytes, to, token, is_value, part * HALVES, layout.head_dim);
                        }
                    }
                }
            }
        };
        if slots.len() * width < SMALL_WRITE {
            (0..tasks).for_each(|task| write(task, 0));
        } else {
            pool.run(tasks, &write);
        }
    }
}

/// Values of K below which a write stays on the calling thread.
const SMALL_WRITE: usize = 4096;

/// Values converted at once.
const HALVES: usize = 128;

/// [`Storage`] while heads are written side by side.
#[derive(Clone, Copy)]
enum SharedStorage {
    F32(SharedMut<f32>),
    F16(SharedMut<u16>),
    F8(SharedMut<u8>),
}

/// Puts values `first..first + x.len()` of a head of `dim` among its block's: in a column (K) or a row (V).
fn place<T: Copy>(
    x: &[T],
    block: &mut [T],
    token: usize,
    is_value: bool,
    first: usize,
    dim: usize,
) {
    if is_value {
        block[token * dim + first..][..x.len()].copy_from_slice(x);
    } else {
        let (columns, _) = block[first * BLOCK_SIZE..].as_chunks_mut::<BLOCK_SIZE>();
        columns
            .iter_mut()
            .zip(x)
            .for_each(|(column, x)| column[token] = *x);
    }
}

/// # Safety
/// The processor has `S`; both slices have one length, a multiple of 16.
#[inline(always)]
unsafe fn to_f16<S: Simd>(x: &[f32], halves: &mut [u16]) {
    for at in (0..x.len()).step_by(16) {
        // SAFETY: 16 values from `at` by the caller's promise.
        unsafe { S::store_f16(halves.as_mut_ptr().add(at), S::load(x.as_ptr().add(at))) };
    }
}

fn zeroed<T: Clone + Default>(len: usize) -> Option<Vec<T>> {
    let mut probe = Vec::<T>::new();
    probe.try_reserve_exact(len).ok()?;
    drop(probe);
    Some(vec![T::default(); len])
}
