//! Maps of tensors for Hopper's copy engine.

use std::ffi::c_void;

use cudarc::driver::sys;

use super::{CudaError, Float, View, device::driver_error, need};

/// How the copy engine permutes the 16-byte pieces of a box's rows in shared memory; also the longest row in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Swizzle {
    /// None, and rows of any length.
    None,
    /// Rows of 32 bytes.
    Bytes32,
    /// Rows of 128 bytes.
    Bytes128,
}

/// What a tensor holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Element {
    Float(Float),
    U32,
}

impl Element {
    const fn bytes(self) -> u64 {
        match self {
            Self::Float(_) => Float::BYTES as u64,
            Self::U32 => 4,
        }
    }
}

impl From<Float> for Element {
    fn from(float: Float) -> Self {
        Self::Float(float)
    }
}

/// A tensor and the box of it that one copy brings; passed to a kernel by value.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct TensorMap(sys::CUtensorMap);

impl TensorMap {
    /// A tensor at the view's beginning: its sizes in values with the innermost first, the strides of all
    /// but the innermost in bytes, and a box's sizes. What a copy asks for outside of the tensor reads as zero.
    ///
    /// # Errors
    /// [`CudaError`] when the tensor reaches out of the view or the driver refuses its sizes.
    pub(super) fn new(
        element: impl Into<Element>,
        view: View<'_>,
        sizes: &[u64],
        strides: &[u64],
        box_sizes: &[u32],
        swizzle: Swizzle,
    ) -> Result<Self, CudaError> {
        let element = element.into();
        let last: u64 = (sizes[1..].iter().zip(strides))
            .map(|(size, stride)| size.saturating_sub(1) * stride)
            .sum();
        need(
            sizes.len() == strides.len() + 1
                && sizes.len() == box_sizes.len()
                && !sizes.contains(&0)
                && last + sizes[0] * element.bytes() <= view.bytes as u64,
            "tensor map",
            || format!("{sizes:?} with strides {strides:?} in {} bytes", view.bytes),
        )?;
        let kind = match element {
            Element::Float(Float::Bf16) => {
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
            }
            Element::Float(Float::F16) => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            Element::U32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT32,
        };
        let swizzle = match swizzle {
            Swizzle::None => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            Swizzle::Bytes32 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
            Swizzle::Bytes128 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let ones = vec![1u32; sizes.len()];
        // SAFETY: all-zero bytes are a valid value of this plain C struct.
        let mut map = Self(unsafe { std::mem::zeroed() });
        // SAFETY: every array has as many entries as the rank says, the map is aligned to 64 bytes, and the call only
        // writes the map; the tensor lies inside the view, so that no copy reads beside it.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map.0,
                kind,
                sizes.len() as u32,
                view.address() as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                box_sizes.as_ptr(),
                ones.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(driver_error("cuTensorMapEncodeTiled"))?;
        Ok(map)
    }
}
