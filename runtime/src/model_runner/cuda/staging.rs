//! Host memory that the GPU copies from, in turns: a buffer is written again only once the copy out of it is done.

use std::time::Duration;

use ashlar_kernels::cuda::{CudaError, Device, Event, PinnedBuffer, View};

/// Steps in flight, and one that is being built.
const TURNS: usize = 3;
/// Longest wait for a copy; the GPU is lost behind it.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) struct Staging {
    device: Device,
    buffers: [Option<(PinnedBuffer, Event)>; TURNS],
    next: usize,
    /// Buffers that have become too small, each half as large as its successor at most. Freeing one waits for all that runs
    /// on the GPU, and kernels of tensor-parallel ranks that share it wait for each other.
    outgrown: Vec<PinnedBuffer>,
}

impl Staging {
    pub(super) fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            buffers: [const { None }; TURNS],
            next: 0,
            outgrown: Vec::new(),
        }
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
            None => self
                .device
                .alloc_pinned(bytes.next_power_of_two().max(4096))?,
        };
        write(buffer.bytes_mut());
        self.device.upload(&buffer, bytes, to)?;
        let copied = self.device.record()?;
        self.buffers[turn] = Some((buffer, copied));
        Ok(())
    }
}
