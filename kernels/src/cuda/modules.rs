//! The compiled kernels, loaded once per process, and how one is launched.

use std::{
    collections::HashMap,
    ffi::{CString, c_void},
    sync::Mutex,
};

use cudarc::driver::{result, sys};

use super::{
    CudaError, Device,
    device::{driver_error, lock},
};

macro_rules! fatbin {
    ($name:literal) => {
        (
            $name,
            include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin")).as_slice(),
        )
    };
}

/// Every file of `kernels/cuda`.
const IMAGES: &[(&str, &[u8])] = &[
    fatbin!("elementwise"),
    fatbin!("rope"),
    fatbin!("skinny_gemm"),
    fatbin!("int4"),
    fatbin!("int4_few_sm90a"),
    fatbin!("int4_gemm_sm90a"),
    fatbin!("int4_skinny_sm90a"),
    fatbin!("eight_bit"),
    fatbin!("invariant_gemm"),
    fatbin!("decode_attention"),
    fatbin!("prefill_attention"),
    fatbin!("prefill_attention_sm90a"),
    fatbin!("sampling"),
    fatbin!("peers"),
];

/// A kernel's handle. Modules are never unloaded, so it stays valid.
#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: a function handle is an opaque id of the driver, which may be used from every thread.
unsafe impl Send for Function {}

/// A loaded file.
struct Module(sys::CUmodule);

// SAFETY: as for `Function`.
unsafe impl Send for Module {}
// SAFETY: as for `Function`; lookups in a module take no exclusive access.
unsafe impl Sync for Module {}

pub(super) struct Modules {
    modules: Vec<Module>,
    /// With the dynamic shared memory that each may take.
    functions: Mutex<HashMap<String, (Function, usize)>>,
    /// Clusters of a kernel that run at once, by their size.
    clusters: Mutex<HashMap<(String, usize), usize>>,
}

/// Blocks, threads and shared memory of a launch.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) grid: (usize, usize),
    pub(super) threads: usize,
    /// Dynamic shared memory in bytes.
    pub(super) shared: usize,
}

impl Modules {
    pub(super) fn load(capability: u32) -> Result<Self, CudaError> {
        let mut modules = Vec::new();
        for (name, image) in IMAGES {
            if name.ends_with("_sm90a") && capability != 90 {
                continue;
            }
            // SAFETY: the image is a whole fatbin, made by nvcc.
            let module = unsafe { result::module::load_data(image.as_ptr().cast::<c_void>()) }
                .map_err(|error| CudaError::Driver {
                    call: "cuModuleLoadData",
                    message: format!(
                        "{}: the kernels need compute capability 8.0 or later and a driver for CUDA 13, and this GPU has {}.{}",
                        driver_error(name)(error), capability / 10, capability % 10
                    ),
                })?;
            modules.push(Module(module));
        }
        Ok(Self {
            modules,
            functions: Mutex::new(HashMap::new()),
            clusters: Mutex::new(HashMap::new()),
        })
    }

    /// Loads every kernel now instead of at its first launch: loading may wait for kernels that run, and those of
    /// tensor-parallel ranks wait for each other.
    pub(super) fn preload(&self) -> Result<(), CudaError> {
        for module in &self.modules {
            let mut count = 0;
            // SAFETY: the module is loaded, and `count` lives through the call.
            unsafe { sys::cuModuleGetFunctionCount(&raw mut count, module.0) }
                .result()
                .map_err(driver_error("cuModuleGetFunctionCount"))?;
            let mut functions = vec![std::ptr::null_mut(); count as usize];
            // SAFETY: there is room for `count` handles.
            unsafe { sys::cuModuleEnumerateFunctions(functions.as_mut_ptr(), count, module.0) }
                .result()
                .map_err(driver_error("cuModuleEnumerateFunctions"))?;
            for function in functions {
                // SAFETY: the handle has just been handed out.
                unsafe { sys::cuFuncLoad(function) }
                    .result()
                    .map_err(driver_error("cuFuncLoad"))?;
            }
        }
        Ok(())
    }

    fn function(&self, name: &str, shared: usize) -> Result<Function, CudaError> {
        let mut functions = lock(&self.functions);
        let (function, most) = match functions.get(name) {
            Some((function, most)) if shared <= *most => return Ok(*function),
            Some(known) => *known,
            None => (self.find(name)?, 0),
        };
        // More than 48 KiB, what a kernel always has included, must be asked for.
        if shared > most {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = i32::try_from(shared).expect("shared memory fits: this is a bug");
            // SAFETY: the function is valid; a size that the GPU lacks is refused.
            unsafe { result::function::set_function_attribute(function.0, attribute, bytes) }
                .map_err(driver_error("cuFuncSetAttribute"))?;
        }
        functions.insert(name.to_owned(), (function, shared));
        Ok(function)
    }

    fn find(&self, name: &str) -> Result<Function, CudaError> {
        let c_name = CString::new(name).expect("kernel names have no zero byte: this is a bug");
        let found = self.modules.iter().find_map(|module| {
            // SAFETY: the module is loaded.
            unsafe { result::module::get_function(module.0, c_name.clone()) }.ok()
        });
        found.map(Function).ok_or_else(|| CudaError::Driver {
            call: "cuModuleGetFunction",
            message: format!("there is no kernel {name}: this is a bug"),
        })
    }
}

impl Device {
    /// Launches a kernel behind what is queued; it may start early and waits itself (see `common.cuh`).
    ///
    /// # Safety
    /// `arguments` point to values of exactly the kernel's parameter types, and whatever addresses are in them are valid
    /// for all that the kernel does with them at this shape.
    pub(super) unsafe fn launch(
        &self,
        name: &str,
        shape: Shape,
        arguments: &mut [*mut c_void],
    ) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_clusters(name, shape, 1, arguments) }
    }

    /// Clusters of `cluster` blocks of this kernel that run at once: parts of the GPU hold a whole number of them.
    pub(super) fn clusters_at_once(
        &self,
        name: &str,
        shape: Shape,
        cluster: usize,
    ) -> Result<usize, CudaError> {
        let key = (name.to_owned(), cluster);
        if let Some(count) = lock(&self.inner.modules.clusters).get(&key) {
            return Ok(*count);
        }
        let function = self.inner.modules.function(name, shape.shared)?;
        let mut attributes = launch_attributes(cluster, false);
        let grid = (shape.grid.0.next_multiple_of(cluster), 1);
        let shape = Shape { grid, ..shape };
        let config = launch_config(shape, self.inner.stream.cu_stream(), &mut attributes);
        let mut count = 0;
        // SAFETY: the function is valid, and count, configuration and attributes live through the call.
        unsafe { sys::cuOccupancyMaxActiveClusters(&raw mut count, function.0, &raw const config) }
            .result()
            .map_err(driver_error("cuOccupancyMaxActiveClusters"))?;
        let count = usize::try_from(count).unwrap_or(0).max(1);
        lock(&self.inner.modules.clusters).insert(key, count);
        Ok(count)
    }

    /// [`Self::launch`] of blocks that run together by `cluster` and reach each other's shared memory (Hopper).
    ///
    /// # Safety
    /// As for [`Self::launch`].
    pub(super) unsafe fn launch_clusters(
        &self,
        name: &str,
        shape: Shape,
        cluster: usize,
        arguments: &mut [*mut c_void],
    ) -> Result<(), CudaError> {
        let function = self.inner.modules.function(name, shape.shared)?;
        if shape.grid.0 == 0 || shape.grid.1 == 0 {
            return Ok(());
        }
        let mut attributes = launch_attributes(cluster, self.starts_early());
        let config = launch_config(shape, self.inner.stream.cu_stream(), &mut attributes);
        // SAFETY: the function and the stream are valid; the arguments are the caller's promise.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                function.0,
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .map_err(driver_error("cuLaunchKernelEx"))
    }
}

type Attributes = Vec<sys::CUlaunchAttribute>;

fn launch_attributes(cluster: usize, starts_early: bool) -> Attributes {
    // SAFETY: all-zero bytes are a valid value of this plain C struct.
    let none: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    let mut attributes = Vec::new();
    if cluster > 1 {
        let mut attribute = none;
        attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        attribute.value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 {
            x: size(cluster),
            y: 1,
            z: 1,
        };
        attributes.push(attribute);
    }
    if starts_early {
        let mut attribute = none;
        attribute.id =
            sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
        attributes.push(attribute);
    }
    attributes
}

/// What a launch says, with attributes that must outlive it.
fn launch_config(
    shape: Shape,
    stream: sys::CUstream,
    attributes: &mut Attributes,
) -> sys::CUlaunchConfig {
    sys::CUlaunchConfig {
        gridDimX: size(shape.grid.0),
        gridDimY: size(shape.grid.1),
        gridDimZ: 1,
        blockDimX: size(shape.threads),
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: size(shape.shared),
        hStream: stream,
        attrs: attributes.as_mut_ptr(),
        numAttrs: size(attributes.len()),
    }
}

fn size(value: usize) -> u32 {
    u32::try_from(value).expect("a launch fits: this is a bug")
}

/// The array of argument addresses for [`Device::launch`].
macro_rules! arguments {
    ($($argument:expr),+ $(,)?) => {
        &mut [$((&raw const $argument).cast_mut().cast::<std::ffi::c_void>()),+]
    };
}
pub(super) use arguments;
