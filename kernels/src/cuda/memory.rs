//! Memory of a GPU, parts of it, and the host's that the GPU copies from and to. [`Device`](super::Device) hands both out.

use std::{ffi::c_void, marker::PhantomData, sync::Arc};

use cudarc::driver::{CudaContext, result, sys};

/// Device memory; freed when dropped, after everything queued has run.
pub struct DeviceBuffer {
    pub(super) ptr: sys::CUdeviceptr,
    pub(super) bytes: usize,
    pub(super) context: Arc<CudaContext>,
}

impl DeviceBuffer {
    /// All of it.
    #[must_use]
    pub fn view(&self) -> View<'_> {
        View {
            ptr: self.ptr,
            bytes: self.bytes,
            memory: PhantomData,
        }
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// No byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        // SAFETY: the pointer came from cuMemAlloc and is freed once; cuMemFree waits for the device.
        let _ = unsafe { result::free_sync(self.ptr) };
    }
}

/// A part of a [`DeviceBuffer`]. Kernels may write through it: it is an address, never a Rust reference to memory.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    pub(super) ptr: sys::CUdeviceptr,
    pub(super) bytes: usize,
    memory: PhantomData<&'a DeviceBuffer>,
}

impl<'a> View<'a> {
    /// `bytes` from `offset`.
    ///
    /// # Panics
    /// When that is outside.
    #[must_use]
    pub fn slice(self, offset: usize, bytes: usize) -> View<'a> {
        assert!(
            offset
                .checked_add(bytes)
                .is_some_and(|end| end <= self.bytes),
            "{bytes} bytes from {offset} of {}: this is a bug",
            self.bytes
        );
        View {
            ptr: self.ptr + offset as u64,
            bytes,
            memory: PhantomData,
        }
    }

    /// From `offset` to the end.
    ///
    /// # Panics
    /// When `offset` is behind the end.
    #[must_use]
    pub fn from(self, offset: usize) -> View<'a> {
        self.slice(offset, self.bytes - offset)
    }

    /// Bytes.
    #[must_use]
    pub fn len(self) -> usize {
        self.bytes
    }

    /// No byte.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.bytes == 0
    }

    pub(super) fn address(self) -> u64 {
        self.ptr
    }
}

/// Page-locked host memory.
pub struct PinnedBuffer {
    pub(super) ptr: *mut u8,
    pub(super) bytes: usize,
    pub(super) context: Arc<CudaContext>,
}

// SAFETY: the memory belongs to this value alone and has no ties to a thread.
unsafe impl Send for PinnedBuffer {}
// SAFETY: shared references only read.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the allocation has so many bytes, all written; the device writes to it only between `download` (which
        // borrows it mutably) and an event for which the owner waits before reading.
        unsafe { std::slice::from_raw_parts(self.ptr, self.bytes) }
    }

    /// The first four bytes, which the device may be writing.
    pub(super) fn word(&self) -> u32 {
        // SAFETY: allocations have 16 bytes at least, aligned by the driver; a torn read of an aligned word is impossible.
        unsafe { self.ptr.cast::<u32>().read_volatile() }
    }

    /// Where the device sees it: page-locked memory has one address for all.
    pub(super) fn address(&self) -> u64 {
        self.ptr as u64
    }

    /// The bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.bytes) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        // A copy may still be under way.
        let _ = self.context.synchronize();
        // SAFETY: the pointer came from cuMemHostAlloc and is freed once, with nothing under way.
        let _ = unsafe { result::free_host(self.ptr.cast::<c_void>()) };
    }
}
