//! Host memory that the GPU copies from, in turns: a buffer is written again only once the copy out of it is done.

use std::time::Duration;

use ashlar_kernels::cuda::{CudaError, Device, Event, PinnedBuffer, View};

/// Steps in flight, and one that is being built.
const TURNS: usize = 3;
/// Longest wait for a copy; the GPU is lost behind it.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes that a buffer has from the start, unless less will do: enough for nearly all steps. Taking page-locked memory waits
/// for all that runs on the GPU, and kernels of tensor-parallel ranks that share it wait for each other.
const RESERVED: usize = 1 << 20;

pub(super) struct Staging {
    device: Device,
    /// With what the last copy out of each is followed by.
    buffers: [Option<(PinnedBuffer, Event)>; TURNS],
    next: usize,
    /// Buffers that have become too small, each half as large as its successor at most: freeing one waits as well.
    outgrown: Vec<PinnedBuffer>,
}

impl Staging {
    /// For copies of up to `most` bytes.
    pub(super) fn new(device: &Device, most: usize) -> Result<Self, CudaError> {
        let bytes = most.clamp(4096, RESERVED);
        let buffer = || Ok::<_, CudaError>((device.alloc_pinned(bytes)?, device.record()?));
        Ok(Self {
            device: device.clone(),
            buffers: [Some(buffer()?), Some(buffer()?), Some(buffer()?)],
            next: 0,
            outgrown: Vec::new(),
        })
    }

    /// Has `write` fill `bytes` bytes and queues their copy to `to`.
    pub(super) fn upload(
        &mut self,
        bytes: usize,
        to: View<'_>,
        write: impl FnOnce(&mut [u8]),
    ) -> Result<(), CudaError> {
        let turn = self.next;
        self.next = (turn + 1) % TURNS;
        let mut fitting = None;
        if let Some((buffer, copied)) = self.buffers[turn].take() {
            if !copied.wait(PATIENCE)? {
                return Err(CudaError::Driver {
                    call: "cuEventQuery",
                    message: "the GPU has not finished a step in 60 seconds".to_owned(),
                });
            }
            if buffer.bytes().len() >= bytes {
                fitting = Some(buffer);
            } else {
                self.outgrown.push(buffer);
            }
        }
        let mut buffer = match fitting {
            Some(buffer) => buffer,
            None => self.device.alloc_pinned(bytes.next_power_of_two())?,
        };
        write(buffer.bytes_mut());
        self.device.upload(&buffer, bytes, to)?;
        let copied = self.device.record()?;
        self.buffers[turn] = Some((buffer, copied));
        Ok(())
    }
}
