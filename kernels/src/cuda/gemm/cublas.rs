//! The handle of cuBLASLt, its plans, and what its calls need.

use std::{collections::HashMap, ptr};

use cudarc::cublaslt::{
    result::{self, CublasError},
    sys,
};

use crate::cuda::{CudaError, Device, DeviceBuffer, Float};

/// Scratch memory for cuBLASLt, the size NVIDIA recommends for Hopper.
pub(super) const WORKSPACE: usize = 32 << 20;
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// Type of the result; of x and weight too, unless they are e4m3.
    pub(super) float: Float,
    pub(super) fp8: bool,
    pub(super) f32_out: bool,
    pub(super) bias: bool,
    pub(super) adds: bool,
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
}

pub(super) struct Plan {
    pub(super) description: sys::cublasLtMatmulDesc_t,
    pub(super) weight: sys::cublasLtMatrixLayout_t,
    pub(super) x: sys::cublasLtMatrixLayout_t,
    pub(super) y: sys::cublasLtMatrixLayout_t,
    pub(super) algorithm: sys::cublasLtMatmulAlgo_t,
    pub(super) timed: bool,
}

pub(in crate::cuda) struct CublasLt {
    pub(super) handle: sys::cublasLtHandle_t,
    pub(super) workspace: Option<DeviceBuffer>,
    pub(super) plans: HashMap<Key, Plan>,
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

pub(super) fn failed(call: &'static str) -> impl Fn(CublasError) -> CudaError {
    move |error| CudaError::Driver {
        call,
        message: format!("{error:?}"),
    }
}

impl CublasLt {
    pub(in crate::cuda) fn new() -> Result<Self, CudaError> {
        Ok(Self {
            handle: result::create_handle().map_err(failed("cublasLtCreate"))?,
            workspace: None,
            plans: HashMap::new(),
        })
    }

    pub(super) fn workspace(&mut self, device: &Device) -> Result<u64, CudaError> {
        if self.workspace.is_none() {
            self.workspace = Some(device.alloc(WORKSPACE)?);
        }
        Ok(self
            .workspace
            .as_ref()
            .map_or(0, |buffer| buffer.view().address()))
    }
}

/// Sets an attribute whose type is `V`: each caller's is the one that the attribute has.
pub(super) fn set<V: Copy>(
    description: sys::cublasLtMatmulDesc_t,
    attribute: sys::cublasLtMatmulDescAttributes_t,
    value: &V,
) -> Result<(), CudaError> {
    // SAFETY: the descriptor is valid, and so many bytes are read from `value`.
    unsafe {
        result::set_matmul_desc_attribute(
            description,
            attribute,
            ptr::from_ref(value).cast(),
            size_of::<V>(),
        )
    }
    .map_err(failed("cublasLtMatmulDescSetAttribute"))
}

type Layouts = (
    sys::cublasLtMatmulDesc_t,
    sys::cublasLtMatrixLayout_t,
    sys::cublasLtMatrixLayout_t,
    sys::cublasLtMatrixLayout_t,
);

pub(super) fn algorithms(
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
