//! How weights get to the GPU: read piece by piece into page-locked memory, from where the GPU copies while the next piece is
//! read.
//!
//! ```text
//! file or host memory ──read──► a buffer of the pool ──copy, queued──► device memory
//! ```
//!
//! Invariant: a buffer is in the pool, or one thread's. Who takes it waits for the copy that was queued out of it, and puts it
//! back with the mark behind the next; so nothing is written that the GPU still reads, and the pool bounds what is locked.

use std::{
    collections::VecDeque,
    io::Read,
    sync::{Condvar, Mutex, PoisonError},
    time::Duration,
};

use super::{CudaError, Device, DeviceBuffer, Event, PinnedBuffer, View, device::lock};

/// Longest wait for a copy; the GPU is lost behind it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Copies host bytes to one GPU, for any number of threads at once. Buffers are made as they are needed.
pub struct Uploader {
    device: Device,
    pool: Mutex<Pool>,
    /// Told when a buffer comes back, or may be made again.
    returned: Condvar,
}

#[derive(Default)]
struct Pool {
    /// In the order in which their copies were queued.
    waiting: VecDeque<Staged>,
    /// Buffers there are, those of threads included.
    made: usize,
}

struct Staged {
    buffer: PinnedBuffer,
    /// Behind the last copy out of it.
    copied: Option<Event>,
}

impl Staged {
    /// Whether it may be written.
    fn is_free(&self, wait: Duration) -> Result<bool, CudaError> {
        self.copied
            .as_ref()
            .map_or(Ok(true), |copied| copied.wait(wait))
    }
}

impl Uploader {
    /// Bytes of a buffer: copies of so many take as long as their bytes do.
    pub const PIECE: usize = 4 << 20;
    /// Page-locked bytes, at most.
    pub const MAX_BYTES: usize = 128 << 20;

    /// Makes no buffer yet.
    #[must_use]
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            pool: Mutex::default(),
            returned: Condvar::new(),
        }
    }

    /// Where bytes go.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Copies `bytes` into new device memory of the same length, as [`Self::upload`] does.
    ///
    /// # Errors
    /// As [`Device::alloc`] and [`Self::upload`].
    pub fn store(&self, bytes: &[u8]) -> Result<DeviceBuffer, CudaError> {
        let buffer = self.device.alloc(bytes.len())?;
        self.upload(bytes, buffer.view())?;
        Ok(buffer)
    }

    /// Fills `to` from `from`. When it returns all is read; copies are queued on the device's stream, and in place after
    /// [`Self::finish`].
    ///
    /// # Errors
    /// [`CudaError::Source`] when `from` fails or ends too early; [`CudaError::Driver`].
    pub fn upload(&self, mut from: impl Read, to: View<'_>) -> Result<(), CudaError> {
        self.device.bind()?;
        let mut at = 0;
        while at < to.len() {
            let piece = to.slice(at, Self::PIECE.min(to.len() - at));
            let mut staged = self.take()?;
            let sent = self.send(&mut from, &mut staged, piece);
            // A buffer that failed is freed, which waits for the GPU.
            self.put(sent.is_ok().then_some(staged));
            sent?;
            at += piece.len();
        }
        Ok(())
    }

    /// Waits until all that was uploaded is in place, and frees the buffers.
    ///
    /// # Errors
    /// [`CudaError::Driver`], also when a copy failed.
    pub fn finish(&self) -> Result<(), CudaError> {
        self.device.bind()?;
        let done = self.device.synchronize();
        let mut pool = lock(&self.pool);
        pool.made -= pool.waiting.len();
        pool.waiting.clear();
        done
    }

    fn send(
        &self,
        from: &mut impl Read,
        staged: &mut Staged,
        to: View<'_>,
    ) -> Result<(), CudaError> {
        if !staged.is_free(PATIENCE)? {
            return Err(CudaError::Driver {
                call: "cuEventQuery",
                message: format!("the GPU has copied nothing in {} s", PATIENCE.as_secs()),
            });
        }
        let bytes = &mut staged.buffer.bytes_mut()[..to.len()];
        from.read_exact(bytes).map_err(|error| CudaError::Source {
            message: error.to_string(),
        })?;
        self.device.upload(&staged.buffer, to.len(), to)?;
        staged.copied = Some(self.device.record()?);
        Ok(())
    }

    /// A buffer that is free, else a new one, else the one that will be free first.
    fn take(&self) -> Result<Staged, CudaError> {
        let mut pool = lock(&self.pool);
        loop {
            let may_make = pool.made < Self::MAX_BYTES / Self::PIECE;
            let first = pool.waiting.front();
            let is_free = first.map_or(Ok(false), |staged| staged.is_free(Duration::ZERO))?;
            if (is_free || !may_make)
                && let Some(staged) = pool.waiting.pop_front()
            {
                return Ok(staged);
            }
            if may_make {
                pool.made += 1;
                break;
            }
            pool = self
                .returned
                .wait(pool)
                .unwrap_or_else(PoisonError::into_inner);
        }
        drop(pool);
        let buffer = self.device.alloc_pinned(Self::PIECE);
        let staged = buffer.map(|buffer| Staged {
            buffer,
            copied: None,
        });
        staged.inspect_err(|_| self.put(None))
    }

    /// Puts a buffer back, or says that it is no more.
    fn put(&self, staged: Option<Staged>) {
        let mut pool = lock(&self.pool);
        match staged {
            Some(staged) => pool.waiting.push_back(staged),
            None => pool.made -= 1,
        }
        drop(pool);
        self.returned.notify_one();
    }
}
