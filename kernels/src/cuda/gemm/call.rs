//! A product of either kind: checked, planned, timed, launched.

use std::ffi::c_void;

use cudarc::cublaslt::{result, sys};

use super::{
    Gemm, bucket,
    cublas::{CublasLt, Key, Plan, WORKSPACE, algorithms, failed, set},
};
use crate::cuda::{CudaError, Device, Float, View, device::lock, need};

/// Algorithms that are timed for a plan.
const CANDIDATES: usize = 8;

/// Either of the two.
pub(super) struct Call<'a> {
    pub(super) gemm: Gemm<'a>,
    /// Of x and of weight, which then are e4m3.
    pub(super) scales: Option<(View<'a>, View<'a>)>,
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

    pub(super) fn launch(&self, device: &Device) -> Result<(), CudaError> {
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

    pub(super) fn tune(
        &self,
        device: &Device,
        rounds: usize,
        weights: &[View<'_>],
    ) -> Result<(), CudaError> {
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
            return Ok(());
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
        let (_, plan) = best.ok_or_else(|| CudaError::Driver {
            call: "cublasLtMatmul",
            message: format!("no algorithm runs {} × {} × {}", key.m, key.n, key.k),
        })?;
        let plan = Plan {
            timed: true,
            ..plan
        };
        cublas.plans.insert(key, plan);
        Ok(())
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
