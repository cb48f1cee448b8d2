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
    /// Type of the result; of x and weight too, unless they are e4m3.
    float: Float,
    fp8: bool,
    f32_out: bool,
    bias: bool,
    adds: bool,
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
    /// The product is added to what is in `y`, and the sum rounded once.
    pub adds: bool,
    /// Rows.
    pub m: usize,
    /// Width of the output, a multiple of 8.
    pub n: usize,
    /// Width of the input, a multiple of 8.
    pub k: usize,
}

impl Gemm<'_> {
    /// Queues it.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or cuBLASLt refuses.
    pub fn launch(&self, device: &Device) -> Result<(), CudaError> {
        self.call().launch(device)
    }

    /// Times the likeliest algorithms for this shape on this GPU and keeps the fastest for all later launches.
    /// `weights` are others of this shape, taken in turns, so that they come from memory as in a model and not from the L2.
    /// Overwrites `y`; a plan that was timed is not timed again. Returns the microseconds of the kept one.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or cuBLASLt refuses.
    pub fn tune(
        &self,
        device: &Device,
        rounds: usize,
        weights: &[View<'_>],
    ) -> Result<f32, CudaError> {
        self.call().tune(device, rounds, weights)
    }

    fn call(&self) -> Call<'_> {
        Call {
            gemm: *self,
            scales: None,
        }
    }
}

/// `y = (x · weightᵀ) · x_scales · weight_scales + bias` with x and weight in e4m3: as [`Gemm`], but for widths in multiples
/// of 16, and on GPUs where [`Self::is_available`].
#[derive(Clone, Copy)]
pub struct Fp8Gemm<'a> {
    /// Its `float` is the type of y and bias; x and weight have one byte a value.
    pub gemm: Gemm<'a>,
    /// `[bucket(m)]` f32, one for each row of x; those behind `m` may be anything.
    pub x_scales: View<'a>,
    /// `[n]` f32.
    pub weight_scales: View<'a>,
}

impl Fp8Gemm<'_> {
    /// Whether this GPU and its cuBLASLt multiply e4m3 with a scale for each row on both sides (Hopper does).
    #[must_use]
    pub fn is_available(device: &Device) -> bool {
        const SIZE: usize = 64;
        let probe = || {
            let (values, y) = (device.alloc(SIZE * SIZE)?, device.alloc(SIZE * SIZE * 2)?);
            let scales = device.alloc(SIZE * 4)?;
            device.fill(values.view(), 0)?;
            device.fill(scales.view(), 0)?;
            let gemm = Gemm {
                float: Float::Bf16,
                x: values.view(),
                weight: values.view(),
                bias: None,
                y: y.view(),
                f32_out: false,
                adds: false,
                m: SIZE,
                n: SIZE,
                k: SIZE,
            };
            let (x_scales, weight_scales) = (scales.view(), scales.view());
            Fp8Gemm {
                gemm,
                x_scales,
                weight_scales,
            }
            .launch(device)?;
            device.synchronize()
        };
        device.capability() >= 89 && probe().is_ok()
    }

    /// As [`Gemm::launch`].
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or cuBLASLt refuses.
    pub fn launch(&self, device: &Device) -> Result<(), CudaError> {
        self.call().launch(device)
    }

    /// As [`Gemm::tune`].
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or cuBLASLt refuses.
    pub fn tune(
        &self,
        device: &Device,
        rounds: usize,
        weights: &[View<'_>],
    ) -> Result<f32, CudaError> {
        self.call().tune(device, rounds, weights)
    }

    fn call(&self) -> Call<'_> {
        Call {
            gemm: self.gemm,
            scales: Some((self.x_scales, self.weight_scales)),
        }
    }
}

/// Either of the two.
struct Call<'a> {
    gemm: Gemm<'a>,
    /// Of x and of weight, which then are e4m3.
    scales: Option<(View<'a>, View<'a>)>,
}

impl Call<'_> {
    fn validate(&self) -> Result<(), CudaError> {
        let gemm = &self.gemm;
        let (m, n, k) = (bucket(gemm.m), gemm.n, gemm.k);
        let out = if gemm.f32_out { 4 } else { 2 };
        let (value, multiple) = match self.scales {
            None => (2, 8),
            Some(_) => (1, 16),
        };
        need(
            gemm.m > 0
                && n.is_multiple_of(multiple)
                && k.is_multiple_of(multiple)
                && n > 0
                && k > 0,
            "gemm",
            || format!("{m} × {n} × {k}: widths must be multiples of {multiple}"),
        )?;
        let scales_fit = self
            .scales
            .is_none_or(|(x, weight)| x.bytes >= m * 4 && weight.bytes >= n * 4);
        need(
            scales_fit
                && gemm.x.bytes >= m * k * value
                && gemm.weight.bytes >= n * k * value
                && gemm.y.bytes >= m * n * out
                && gemm.bias.is_none_or(|bias| bias.bytes >= n * 2),
            "gemm",
            || format!("a view is too short for {m} × {n} × {k}"),
        )
    }

    fn key(&self) -> Key {
        let gemm = &self.gemm;
        Key {
            float: gemm.float,
            fp8: self.scales.is_some(),
            f32_out: gemm.f32_out,
            bias: gemm.bias.is_some(),
            adds: gemm.adds,
            m: bucket(gemm.m),
            n: gemm.n,
            k: gemm.k,
        }
    }

    fn launch(&self, device: &Device) -> Result<(), CudaError> {
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

    fn tune(&self, device: &Device, rounds: usize, weights: &[View<'_>]) -> Result<f32, CudaError> {
        let with = |weight| Call {
            gemm: Gemm {
                weight,
                ..self.gemm
            },
            scales: self.scales,
        };
        self.validate()?;
        weights
            .iter()
            .try_for_each(|weight| with(*weight).validate())?;
        let mut weights = weights.iter().copied().chain([self.gemm.weight]).cycle();
        let mut cublas = lock(&device.inner.cublas);
        let workspace = cublas.workspace(device)?;
        let key = self.key();
        if cublas.plans.get(&key).is_some_and(|plan| plan.timed) {
            return Ok(0.0);
        }
        let mut timed = Vec::new();
        for plan in self.plan(&cublas, &key, CANDIDATES)? {
            // The first run loads the kernel.
            if self.run(device, cublas.handle, &plan, workspace).is_ok() {
                timed.push((0.0, plan));
            }
        }
        // In turns, so that a GPU that grows hot or gets going treats all alike.
        for _ in 0..rounds {
            let mut spans = Vec::with_capacity(timed.len());
            for ((_, plan), weight) in timed.iter().zip(&mut weights) {
                let call = with(weight);
                let start = device.record()?;
                call.run(device, cublas.handle, plan, workspace)?;
                spans.push((start, device.record()?));
            }
            device.synchronize()?;
            for ((sum, _), (start, end)) in timed.iter_mut().zip(&spans) {
                *sum += start.elapsed_ms(end)?;
            }
        }
        let best = timed.into_iter().min_by(|a, b| a.0.total_cmp(&b.0));
        let (milliseconds, plan) = best.ok_or_else(|| CudaError::Driver {
            call: "cublasLtMatmul",
            message: format!("no algorithm runs {} × {} × {}", key.m, key.n, key.k),
        })?;
        let plan = Plan {
            timed: true,
            ..plan
        };
        let microseconds = milliseconds * 1000.0 / rounds as f32;
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
        let input = if key.fp8 {
            sys::cudaDataType_t::CUDA_R_8F_E4M3
        } else {
            float
        };
        // Row-major y = x·wᵀ is column-major yᵀ = w·xᵀ: the weight comes first and transposed.
        let make = || -> Result<_, CudaError> {
            let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
            let description = result::create_matmul_desc(compute, f32_type)
                .map_err(failed("cublasLtMatmulDescCreate"))?;
            use sys::cublasLtMatmulDescAttributes_t as Attribute;
            set(description, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &1i32)?;
            if key.bias {
                let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
                set(
                    description,
                    Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE,
                    &epilogue,
                )?;
                let bias_type = Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE;
                set(description, bias_type, &float)?;
            }
            if key.fp8 {
                // One scale for each row of either side. Sums stay in the tensor cores' own precision, about 14 bits, as
                // everyone's do: what the inputs' three bits cost is far more.
                let mode =
                    sys::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
                set(
                    description,
                    Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE,
                    &mode,
                )?;
                set(
                    description,
                    Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE,
                    &mode,
                )?;
                set(
                    description,
                    Attribute::CUBLASLT_MATMUL_DESC_FAST_ACCUM,
                    &1i8,
                )?;
                self.set_scales(description)?;
            }
            let layout = failed("cublasLtMatrixLayoutCreate");
            Ok((
                description,
                result::create_matrix_layout(input, k, n, k as i64).map_err(&layout)?,
                result::create_matrix_layout(input, k, m, k as i64).map_err(&layout)?,
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

    /// Says where the scales are, in products that have them.
    fn set_scales(&self, description: sys::cublasLtMatmulDesc_t) -> Result<(), CudaError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let Some((x, weight)) = self.scales else {
            return Ok(());
        };
        let weight_pointer = Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER;
        set(description, weight_pointer, &weight.address())?;
        let x_pointer = Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER;
        set(description, x_pointer, &x.address())
    }

    fn run(
        &self,
        device: &Device,
        handle: sys::cublasLtHandle_t,
        plan: &Plan,
        workspace: u64,
    ) -> Result<(), CudaError> {
        if let Some(bias) = self.gemm.bias {
            let pointer = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            set(plan.description, pointer, &bias.address())?;
        }
        self.set_scales(plan.description)?;
        let (one, beta) = (1f32, if self.gemm.adds { 1f32 } else { 0f32 });
        let pointer = |view: View<'_>| view.address() as *mut c_void;
        // SAFETY: the layouts describe views that are long enough (`validate`); handle, plan and workspace are valid, and
        // everything that uses the workspace runs on this one stream, in turn.
        unsafe {
            result::matmul(
                handle,
                plan.description,
                (&raw const one).cast(),
                (&raw const beta).cast(),
                pointer(self.gemm.weight),
                plan.weight,
                pointer(self.gemm.x),
                plan.x,
                pointer(self.gemm.y),
                plan.y,
                pointer(self.gemm.y),
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

/// Sets an attribute whose type is `V`: each caller's is the one that the attribute has.
fn set<V: Copy>(
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
