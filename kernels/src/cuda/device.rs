//! One GPU: its context, its stream, copies, events and graphs.

use std::{
    ptr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use cudarc::driver::{
    CudaContext, CudaEvent, CudaGraph, CudaSlice, CudaStream, DevicePtr, DriverError, result,
    sys::{self, CUdevice_attribute as Attribute},
};

use super::{CudaError, DeviceBuffer, PinnedBuffer, View, gemm::CublasLt, modules::Modules};

/// How long an event is asked without a pause before the thread sleeps between questions.
const SPIN: Duration = Duration::from_micros(30);
/// Pause between questions.
const NAP: Duration = Duration::from_micros(20);

/// One GPU. Cheap to clone; all clones share the stream.
#[derive(Clone)]
pub struct Device {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) context: Arc<CudaContext>,
    pub(super) stream: Arc<CudaStream>,
    pub(super) modules: Modules,
    pub(super) cublas: Mutex<CublasLt>,
    /// Compute capability, 90 for 9.0.
    pub(super) capability: u32,
    /// Multiprocessors.
    pub(super) multiprocessors: u32,
    /// A counter that is zero between kernels.
    tickets: CudaSlice<u32>,
    /// Whether kernels may start before the one before them has ended.
    starts_early: AtomicBool,
}

impl Device {
    /// Whether there are a driver, cuBLASLt, and a GPU.
    ///
    /// # Errors
    /// [`CudaError::NoDevice`] saying what is missing.
    pub fn probe() -> Result<(), CudaError> {
        // SAFETY: these calls only try to load the libraries.
        let (driver, cublas) = unsafe {
            (
                sys::is_culib_present(),
                cudarc::cublaslt::sys::is_culib_present(),
            )
        };
        let missing = |what: &str| {
            Err(CudaError::NoDevice {
                message: what.to_owned(),
            })
        };
        if !driver {
            return missing(
                "libcuda.so cannot be loaded; install the NVIDIA driver and run the container with GPU access",
            );
        }
        if !cublas {
            return missing(
                "libcublasLt.so (CUDA 13) cannot be loaded; use the CUDA image, or put its folder on LD_LIBRARY_PATH",
            );
        }
        match CudaContext::device_count() {
            Ok(0) => missing("the driver shows no GPU"),
            Ok(_) => Ok(()),
            Err(error) => missing(&driver_error("cuInit")(error).to_string()),
        }
    }

    /// GPUs that the driver shows.
    ///
    /// # Errors
    /// [`CudaError::NoDevice`] saying what is missing.
    pub fn count() -> Result<usize, CudaError> {
        Self::probe()?;
        let count = CudaContext::device_count().map_err(driver_error("cuDeviceGetCount"))?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// Opens a GPU and loads the kernels.
    ///
    /// # Errors
    /// [`CudaError::NoDevice`] without a driver, cuBLASLt or such a GPU; [`CudaError::Driver`] when it is too old for the kernels.
    pub fn open(ordinal: usize) -> Result<Self, CudaError> {
        let count = Self::count()?;
        if ordinal >= count {
            return Err(CudaError::NoDevice {
                message: format!("GPU {ordinal} was asked for and {count} are there"),
            });
        }
        let context =
            CudaContext::new(ordinal).map_err(driver_error("cuDevicePrimaryCtxRetain"))?;
        // SAFETY: all memory is used on one stream, so no events between streams are needed.
        unsafe { context.disable_event_tracking() };
        let stream = context
            .new_stream()
            .map_err(driver_error("cuStreamCreate"))?;
        let (major, minor) = context
            .compute_capability()
            .map_err(driver_error("cuDeviceGetAttribute"))?;
        let multiprocessors = context
            .attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(driver_error("cuDeviceGetAttribute"))?;
        let capability = (major * 10 + minor).unsigned_abs();
        let modules = Modules::load(capability)?;
        let cublas = CublasLt::new()?;
        let tickets = stream.alloc_zeros(1).map_err(driver_error("cuMemAlloc"))?;
        Ok(Self {
            inner: Arc::new(Inner {
                context,
                stream,
                modules,
                cublas: Mutex::new(cublas),
                capability,
                multiprocessors: multiprocessors.unsigned_abs(),
                tickets,
                // Dependent launch came with 9.0.
                starts_early: AtomicBool::new(capability >= 90),
            }),
        })
    }

    /// From now on no kernel starts before the one before it has ended.
    pub(super) fn start_in_turn(&self) {
        self.inner.starts_early.store(false, Ordering::Relaxed);
    }

    /// Whether kernels may start before the one before them has ended.
    pub(super) fn starts_early(&self) -> bool {
        self.inner.starts_early.load(Ordering::Relaxed)
    }

    /// Address of a counter, 4 bytes, which every kernel that counts with it leaves at zero: kernels run one after another.
    pub(super) fn tickets(&self) -> u64 {
        let (address, _guard) = self.inner.tickets.device_ptr(&self.inner.stream);
        address
    }

    /// The GPU's name.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn name(&self) -> Result<String, CudaError> {
        self.inner
            .context
            .name()
            .map_err(driver_error("cuDeviceGetName"))
    }

    /// Compute capability, 90 for 9.0.
    #[must_use]
    pub fn capability(&self) -> u32 {
        self.inner.capability
    }

    /// Whether it has compute capability 9.0, for which some kernels exist alone.
    #[must_use]
    pub fn is_hopper(&self) -> bool {
        self.inner.capability == 90
    }

    /// Multiprocessors.
    #[must_use]
    pub fn multiprocessors(&self) -> u32 {
        self.inner.multiprocessors
    }

    /// Free and total memory in bytes.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        self.inner
            .context
            .mem_get_info()
            .map_err(driver_error("cuMemGetInfo"))
    }

    /// Makes this GPU the calling thread's.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn bind(&self) -> Result<(), CudaError> {
        self.inner
            .context
            .bind_to_thread()
            .map_err(driver_error("cuCtxSetCurrent"))
    }

    /// Device memory of `bytes` zeros.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub fn alloc(&self, bytes: usize) -> Result<DeviceBuffer, CudaError> {
        self.bind()?;
        // SAFETY: a context is current; zero bytes are not asked for.
        let ptr = unsafe { result::malloc_sync(bytes.max(16)) }.map_err(|error| {
            if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                let free = self.memory().map_or(0, |(free, _)| free);
                CudaError::OutOfMemory { bytes, free }
            } else {
                driver_error("cuMemAlloc")(error)
            }
        })?;
        let buffer = DeviceBuffer {
            ptr,
            bytes,
            context: Arc::clone(&self.inner.context),
        };
        // SAFETY: the allocation has so many bytes.
        unsafe { result::memset_d8_async(ptr, 0, bytes, self.inner.stream.cu_stream()) }
            .map_err(driver_error("cuMemsetD8Async"))?;
        Ok(buffer)
    }

    /// Page-locked host memory of `bytes`.
    ///
    /// # Errors
    /// [`CudaError::Driver`] when the host has not so much.
    pub fn alloc_pinned(&self, bytes: usize) -> Result<PinnedBuffer, CudaError> {
        self.bind()?;
        // SAFETY: a context is current.
        let ptr = unsafe { result::malloc_host(bytes.max(16), 0) }
            .map_err(driver_error("cuMemHostAlloc"))?;
        // SAFETY: the allocation has so many bytes.
        unsafe { ptr::write_bytes(ptr.cast::<u8>(), 0, bytes) };
        Ok(PinnedBuffer {
            ptr: ptr.cast(),
            bytes,
            context: Arc::clone(&self.inner.context),
        })
    }

    /// Queues a copy of the first `bytes` of `from`. The buffer must not be written before an event recorded after this
    /// call is done; [`PinnedBuffer`]'s owner sees to that.
    ///
    /// # Errors
    /// [`CudaError::Shape`] when it does not fit; [`CudaError::Driver`].
    pub fn upload(&self, from: &PinnedBuffer, bytes: usize, to: View<'_>) -> Result<(), CudaError> {
        super::need(bytes <= from.bytes && bytes <= to.bytes, "upload", || {
            format!("{bytes} bytes of {} into {}", from.bytes, to.bytes)
        })?;
        // SAFETY: both sides have so many bytes, checked above; pinned memory is freed by a call that waits for copies.
        unsafe {
            sys::cuMemcpyHtoDAsync_v2(
                to.ptr,
                from.ptr.cast(),
                bytes,
                self.inner.stream.cu_stream(),
            )
        }
        .result()
        .map_err(driver_error("cuMemcpyHtoDAsync"))
    }

    /// Queues a copy of `from` into the beginning of `to`, which may be read once an event recorded after this is done.
    ///
    /// # Errors
    /// [`CudaError::Shape`] when it does not fit; [`CudaError::Driver`].
    pub fn download(&self, from: View<'_>, to: &mut PinnedBuffer) -> Result<(), CudaError> {
        super::need(from.bytes <= to.bytes, "download", || {
            format!("{} bytes into {}", from.bytes, to.bytes)
        })?;
        // SAFETY: as in `upload`.
        unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                to.ptr.cast(),
                from.ptr,
                from.bytes,
                self.inner.stream.cu_stream(),
            )
        }
        .result()
        .map_err(driver_error("cuMemcpyDtoHAsync"))
    }

    /// Copies host bytes into device memory and waits. For loading; not for steps.
    ///
    /// # Errors
    /// [`CudaError::Shape`] when it does not fit; [`CudaError::Driver`].
    pub fn write(&self, from: &[u8], to: View<'_>) -> Result<(), CudaError> {
        super::need(from.len() <= to.bytes, "write", || {
            format!("{} bytes into {}", from.len(), to.bytes)
        })?;
        self.bind()?;
        // On the kernels' stream: what is queued may still use the memory's former content. cuMemcpyHtoD would not do, it
        // returns when the bytes are staged, and kernels read their weights before they wait for what is queued.
        // SAFETY: both sides have so many bytes, and the host's live until the copy is done.
        unsafe { result::memcpy_htod_async(to.ptr, from, self.inner.stream.cu_stream()) }
            .map_err(driver_error("cuMemcpyHtoDAsync"))?;
        self.synchronize()
    }

    /// Copies device memory to the host and waits.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn read(&self, from: View<'_>) -> Result<Vec<u8>, CudaError> {
        self.synchronize()?;
        let mut bytes = vec![0; from.bytes];
        // SAFETY: both sides have so many bytes.
        unsafe { result::memcpy_dtoh_sync(&mut bytes, from.ptr) }
            .map_err(driver_error("cuMemcpyDtoH"))?;
        Ok(bytes)
    }

    /// Queues a fill with one byte.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn fill(&self, view: View<'_>, byte: u8) -> Result<(), CudaError> {
        // SAFETY: the view has so many bytes.
        unsafe {
            result::memset_d8_async(view.ptr, byte, view.bytes, self.inner.stream.cu_stream())
        }
        .map_err(driver_error("cuMemsetD8Async"))
    }

    /// Waits for everything queued.
    ///
    /// # Errors
    /// [`CudaError::Driver`], also when an earlier kernel failed.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.inner
            .stream
            .synchronize()
            .map_err(driver_error("cuStreamSynchronize"))
    }

    /// A mark behind everything queued so far.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn record(&self) -> Result<Event, CudaError> {
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let event = self
            .inner
            .stream
            .record_event(flags)
            .map_err(driver_error("cuEventRecord"))?;
        Ok(Event { event })
    }

    /// Records what `body` queues and makes a graph of it. Nothing of it runs.
    ///
    /// # Errors
    /// The error of `body`, or [`CudaError::Driver`].
    pub fn capture<E: From<CudaError>>(
        &self,
        body: impl FnOnce() -> Result<(), E>,
    ) -> Result<Graph, E> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.inner
            .stream
            .begin_capture(mode)
            .map_err(driver_error("cuStreamBeginCapture"))?;
        let done = body();
        let flags = sys::CUgraphInstantiate_flags(0);
        let graph = self.inner.stream.end_capture(flags);
        done?;
        let graph = graph.map_err(driver_error("cuStreamEndCapture"))?;
        let graph = graph.ok_or_else(|| CudaError::Driver {
            call: "cuStreamEndCapture",
            message: "nothing was captured".to_owned(),
        })?;
        graph.upload().map_err(driver_error("cuGraphUpload"))?;
        Ok(Graph { graph })
    }
}

pub(super) fn driver_error(call: &'static str) -> impl Fn(DriverError) -> CudaError {
    move |error| CudaError::Driver {
        call,
        message: error.error_string().map_or_else(
            |_| format!("{error:?}"),
            |text| text.to_string_lossy().into_owned(),
        ),
    }
}

/// A mark in the stream.
pub struct Event {
    event: CudaEvent,
}

impl Event {
    /// Whether everything before it has run, waiting for at most `wait`.
    ///
    /// # Errors
    /// [`CudaError::Driver`] when something before it failed.
    pub fn wait(&self, wait: Duration) -> Result<bool, CudaError> {
        let started = Instant::now();
        loop {
            if self
                .event
                .try_is_complete()
                .map_err(driver_error("cuEventQuery"))?
            {
                return Ok(true);
            }
            let waited = started.elapsed();
            if waited >= wait {
                return Ok(false);
            }
            if waited > SPIN {
                std::thread::sleep(NAP);
            } else {
                std::hint::spin_loop();
            }
        }
    }

    /// Milliseconds from here to `end`; both must be done.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn elapsed_ms(&self, end: &Self) -> Result<f32, CudaError> {
        self.event
            .elapsed_ms(&end.event)
            .map_err(driver_error("cuEventElapsedTime"))
    }
}

/// Recorded work.
pub struct Graph {
    graph: CudaGraph,
}

// SAFETY: a graph has no ties to a thread; it is not `Sync`, and calls on it take turns.
unsafe impl Send for Graph {}

impl Graph {
    /// Queues it.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn launch(&self) -> Result<(), CudaError> {
        self.graph.launch().map_err(driver_error("cuGraphLaunch"))
    }
}

/// Locks without regard to panics elsewhere: the value is replaced as a whole or not at all.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
