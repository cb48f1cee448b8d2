//! Products with many rows: cuBLASLt with a plan per shape. Row counts are rounded up to buckets, so that a plan is found
//! (and, where asked, timed) once and a row's result does not depend on how many rows were really there.

use std::{collections::HashMap, ffi::c_void, ptr};

use cudarc::cublaslt::{
    result::{self, CublasError},
    sys,
};

use super::{CudaError, Device, DeviceBuffer, Float, View, device::lock, need};

/// Scratch memory for cuBLASLt, the size NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;
/// Algorithms that are timed for a plan.
const CANDIDATES: usize = 8;

/// Rows that a product of `m` rows really computes: a few shapes instead of thousands.
#[must_use]
pub fn bucket(m: usize) -> usize {
    match m {
        0..=16 => m.next_multiple_of(8),
        17..=256 => m.next_multiple_of(16),
        257..=2048 => m.next_multiple_of(64),
        _ => m.next_multiple_of(128),
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    float: Float,
    f32_out: bool,
    bias: bool,
    m: usize,
    n: usize,
    k: usize,
}

struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
    timed: bool,
}

pub(super) struct CublasLt {
    handle: sys::cublasLtHandle_t,
    workspace: Option<DeviceBuffer>,
    plans: HashMap<Key, Plan>,
}

// SAFETY: the handle and the descriptors may be used from any thread, one at a time: they live behind a mutex.
unsafe impl Send for CublasLt {}

impl Drop for CublasLt {
    fn drop(&mut self) {
        for plan in self.plans.values() {
            // SAFETY: each was created once and is destroyed once.
            unsafe {
                let _ = result::destroy_matmul_desc(plan.description);
                for layout in [plan.weight, plan.x, plan.y] {
                    let _ = result::destroy_matrix_layout(layout);
                }
            }
        }
        // SAFETY: created once, destroyed once.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn failed(call: &'static str) -> impl Fn(CublasError) -> CudaError {
    move |error| CudaError::Driver {
        call,
        message: format!("{error:?}"),
    }
}

impl CublasLt {
    pub(super) fn new() -> Result<Self, CudaError> {
        Ok(Self {
            handle: result::create_handle().map_err(failed("cublasLtCreate"))?,
            workspace: None,
            plans: HashMap::new(),
        })
    }

    fn workspace(&mut self, device: &Device) -> Result<u64, CudaError> {
        if self.workspace.is_none() {
            self.workspace = Some(device.alloc(WORKSPACE)?);
        }
        Ok(self
            .workspace
            .as_ref()
            .map_or(0, |buffer| buffer.view().address()))
    }
}

/// `y = x · weightᵀ + bias`; all row-major. `x` and `y` have room for [`bucket`]`(m)` rows, of which those behind `m` are
/// computed from whatever `x` holds.
#[derive(Clone, Copy)]
pub struct Gemm<'a> {
    /// Type of x, weight and bias.
    pub float: Float,
    /// `[bucket(m), k]`
    pub x: View<'a>,
    /// `[n, k]`
    pub weight: View<'a>,
    /// `[n]`
    pub bias: Option<View<'a>>,
    /// `[bucket(m), n]`
    pub y: View<'a>,
    /// `y` is f32.
    pub f32_out: bool,
    /// Rows.
    pub m: usize,
    /// Width of the output, a multiple of 8.
    pub n: usize,
    /// Width of the input, a multiple of 8.
    pub k: usize,
}

impl Gemm<'_> {
    fn validate(&self) -> Result<(), CudaError> {
        let (m, n, k) = (bucket(self.m), self.n, self.k);
        let out = if self.f32_out { 4 } else { 2 };
        need(
            self.m > 0 && n.is_multiple_of(8) && k.is_multiple_of(8) && n > 0 && k > 0,
            "gemm",
            || format!("{m} × {n} × {k}: widths must be multiples of 8"),
        )?;
        need(
            self.x.bytes >= m * k * 2
                && self.weight.bytes >= n * k * 2
                && self.y.bytes >= m * n * out
                && self.bias.is_none_or(|bias| bias.bytes >= n * 2),
            "gemm",
            || format!("a view is too short for {m} × {n} × {k}"),
        )
    }

    fn key(&self) -> Key {
        Key {
            float: self.float,
            f32_out: self.f32_out,
            bias: self.bias.is_some(),
            m: bucket(self.m),
            n: self.n,
            k: self.k,
        }
    }

    /// Queues it.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or cuBLASLt refuses.
    pub fn launch(&self, device: &Device) -> Result<(), CudaError> {
        self.validate()?;
        let mut cublas = lock(&device.inner.cublas);
        let workspace = cublas.workspace(device)?;
        let key = self.key();
        if !cublas.plans.contains_key(&key) {
            let plan = self.plan(&cublas, &key, 1)?.swap_remove(0);
            cublas.plans.insert(key, plan);
        }
        let plan = &cublas.plans[&key];
        self.run(device, cublas.handle, plan, workspace)
    }

    /// Times the likeliest algorithms for this shape on this GPU and keeps the fastest for all later launches.
    /// Overwrites `y`; a plan that was timed is not timed again. Returns the microseconds of the kept one.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or cuBLASLt refuses.
    pub fn tune(&self, device: &Device, rounds: usize) -> Result<f32, CudaError> {
        self.validate()?;
        let mut cublas = lock(&device.inner.cublas);
        let workspace = cublas.workspace(device)?;
        let key = self.key();
        if cublas.plans.get(&key).is_some_and(|plan| plan.timed) {
            return Ok(0.0);
        }
        let mut best: Option<(f32, Plan)> = None;
        for mut plan in self.plan(&cublas, &key, CANDIDATES)? {
            // The first run loads the kernel.
            if self.run(device, cublas.handle, &plan, workspace).is_err() {
                continue;
            }
            let start = device.record()?;
            for _ in 0..rounds {
                self.run(device, cublas.handle, &plan, workspace)?;
            }
            let end = device.record()?;
            device.synchronize()?;
            let microseconds = start.elapsed_ms(&end)? * 1000.0 / rounds as f32;
            if best.as_ref().is_none_or(|(least, _)| microseconds < *least) {
                plan.timed = true;
                best = Some((microseconds, plan));
            }
        }
        let (microseconds, plan) = best.ok_or_else(|| CudaError::Driver {
            call: "cublasLtMatmul",
            message: format!("no algorithm runs {} × {} × {}", key.m, key.n, key.k),
        })?;
        cublas.plans.insert(key, plan);
        Ok(microseconds)
    }

    /// Up to `count` plans, the likeliest first; at least one.
    fn plan(&self, cublas: &CublasLt, key: &Key, count: usize) -> Result<Vec<Plan>, CudaError> {
        let float = match key.float {
            Float::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
            Float::F16 => sys::cudaDataType_t::CUDA_R_16F,
        };
        let out = if key.f32_out {
            sys::cudaDataType_t::CUDA_R_32F
        } else {
            float
        };
        let f32_type = sys::cudaDataType_t::CUDA_R_32F;
        let (m, n, k) = (key.m as u64, key.n as u64, key.k as u64);
        let set = failed("cublasLtMatmulDescSetAttribute");
        // Row-major y = x·wᵀ is column-major yᵀ = w·xᵀ: the weight comes first and transposed.
        let make = || -> Result<_, CudaError> {
            let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
            let description = result::create_matmul_desc(compute, f32_type)
                .map_err(failed("cublasLtMatmulDescCreate"))?;
            let transposed = 1i32;
            // SAFETY: the attribute is an i32 and the descriptor is valid.
            unsafe {
                result::set_matmul_desc_attribute(
                    description,
                    sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                    (&raw const transposed).cast(),
                    size_of::<i32>(),
                )
            }
            .map_err(&set)?;
            if key.bias {
                let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
                // SAFETY: the attribute is this enum and the descriptor is valid.
                unsafe {
                    result::set_matmul_desc_attribute(
                        description,
                        sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_EPILOGUE,
                        (&raw const epilogue).cast(),
                        size_of::<sys::cublasLtEpilogue_t>(),
                    )
                }
                .map_err(&set)?;
                // SAFETY: as above.
                unsafe {
                    result::set_matmul_desc_attribute(
                        description,
                        sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE,
                        (&raw const float).cast(),
                        size_of::<sys::cudaDataType_t>(),
                    )
                }
                .map_err(&set)?;
            }
            let layout = failed("cublasLtMatrixLayoutCreate");
            Ok((
                description,
                result::create_matrix_layout(float, k, n, k as i64).map_err(&layout)?,
                result::create_matrix_layout(float, k, m, k as i64).map_err(&layout)?,
                result::create_matrix_layout(out, n, m, n as i64).map_err(&layout)?,
            ))
        };
        let (description, weight, x, y) = make()?;
        let algorithms = algorithms(cublas.handle, (description, weight, x, y), count)?;
        let mut plans = Vec::with_capacity(algorithms.len());
        let mut first = Some((description, weight, x, y));
        for algorithm in algorithms {
            let (description, weight, x, y) = match first.take() {
                Some(made) => made,
                None => make()?,
            };
            plans.push(Plan {
                description,
                weight,
                x,
                y,
                algorithm,
                timed: false,
            });
        }
        Ok(plans)
    }

    fn run(
        &self,
        device: &Device,
        handle: sys::cublasLtHandle_t,
        plan: &Plan,
        workspace: u64,
    ) -> Result<(), CudaError> {
        if let Some(bias) = self.bias {
            let address = bias.address();
            // SAFETY: the attribute is a device pointer and the descriptor is valid.
            unsafe {
                result::set_matmul_desc_attribute(
                    plan.description,
                    sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                    (&raw const address).cast(),
                    size_of::<u64>(),
                )
            }
            .map_err(failed("cublasLtMatmulDescSetAttribute"))?;
        }
        let (one, zero) = (1f32, 0f32);
        let pointer = |view: View<'_>| view.address() as *mut c_void;
        // SAFETY: the layouts describe views that are long enough (`validate`); handle, plan and workspace are valid, and
        // everything that uses the workspace runs on this one stream, in turn.
        unsafe {
            result::matmul(
                handle,
                plan.description,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                pointer(self.weight),
                plan.weight,
                pointer(self.x),
                plan.x,
                pointer(self.y),
                plan.y,
                pointer(self.y),
                plan.y,
                &raw const plan.algorithm,
                workspace as *mut c_void,
                WORKSPACE,
                device.inner.stream.cu_stream().cast(),
            )
        }
        .map_err(failed("cublasLtMatmul"))
    }
}

type Layouts = (
    sys::cublasLtMatmulDesc_t,
    sys::cublasLtMatrixLayout_t,
    sys::cublasLtMatrixLayout_t,
    sys::cublasLtMatrixLayout_t,
);

fn algorithms(
    handle: sys::cublasLtHandle_t,
    (description, weight, x, y): Layouts,
    count: usize,
) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, CudaError> {
    let preference =
        result::create_matmul_pref().map_err(failed("cublasLtMatmulPreferenceCreate"))?;
    let bytes = WORKSPACE as u64;
    // SAFETY: all-zero bytes are a valid value of this plain C struct, an enum of which has a zero.
    let mut found: Vec<sys::cublasLtMatmulHeuristicResult_t> =
        vec![unsafe { std::mem::zeroed() }; count];
    let mut num_found = 0;
    // SAFETY: all descriptors are valid and `found` has room for `count` results; the preference is freed once.
    let status = unsafe {
        let set = result::set_matmul_pref_attribute(
            preference,
            sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            (&raw const bytes).cast(),
            size_of::<u64>(),
        );
        let status = set.and_then(|()| {
            sys::cublasLtMatmulAlgoGetHeuristic(
                handle,
                description,
                weight,
                x,
                y,
                y,
                preference,
                i32::try_from(count).expect("a few: this is a bug"),
                found.as_mut_ptr(),
                ptr::from_mut(&mut num_found),
            )
            .result()
        });
        let _ = result::destroy_matmul_pref(preference);
        status
    };
    status.map_err(failed("cublasLtMatmulAlgoGetHeuristic"))?;
    found.truncate(usize::try_from(num_found).unwrap_or(0));
    found.retain(|candidate| candidate.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
    if found.is_empty() {
        return Err(CudaError::Driver {
            call: "cublasLtMatmulAlgoGetHeuristic",
            message: "there is no algorithm for this shape".to_owned(),
        });
    }
    Ok(found.into_iter().map(|candidate| candidate.algo).collect())
}
