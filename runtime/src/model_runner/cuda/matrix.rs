//! Weight matrices on the GPU: 16-bit floats, or fewer bits as the checkpoint has them.

use std::sync::OnceLock;

use ashlar_kernels::cuda::{
    CudaError, Device, DeviceBuffer, Float, Uploader, View,
    eight_bit::{self, DequantizeEightBit, EightBit, Fp8View, Int8View, QuantizeRows},
    elementwise::fill_random,
    int4::{self, DequantizeInt4, Int4View},
    skinny::Weight,
};

use super::{backend::upload_bytes, integers::Integers};
use crate::weights::{Bytes, Int4Matrix};

/// A matrix `[rows, columns]` on the GPU.
pub(super) struct Matrix {
    data: Data,
    /// Its values in 16 bits, where they are kept beside fewer bits; see [`Self::keep_values`].
    copy: OnceLock<DeviceBuffer>,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

enum Data {
    /// `[rows, columns]` of the backend's type.
    Float(DeviceBuffer),
    /// Beside IEEE halves.
    Int4 {
        words: DeviceBuffer,
        cells: DeviceBuffer,
        group: usize,
        /// Cells hold offsets instead of zeros.
        affine: bool,
    },
    /// Beside IEEE halves.
    Int8 {
        data: DeviceBuffer,
        cells: DeviceBuffer,
        group: usize,
    },
    /// e4m3, a scale for each row.
    Fp8 {
        data: DeviceBuffer,
        scales: DeviceBuffer,
    },
}

impl Matrix {
    fn new(data: Data, rows: usize, columns: usize) -> Self {
        Self {
            data,
            copy: OnceLock::new(),
            rows,
            columns,
        }
    }

    pub(super) fn float(data: DeviceBuffer, rows: usize, columns: usize) -> Self {
        Self::new(Data::Float(data), rows, columns)
    }

    /// Copies a matrix of groups that the kernels take to the GPU.
    pub(super) fn int4(uploader: &Uploader, matrix: &Int4Matrix) -> Result<Self, CudaError> {
        let data = Data::Int4 {
            words: uploader.store(&int4::words(&matrix.qweight))?,
            cells: uploader.store(&int4::cells(&matrix.scales, &matrix.zeros))?,
            group: matrix.group,
            affine: false,
        };
        Ok(Self::new(data, matrix.rows, matrix.columns))
    }

    /// Random values that depend on the seed alone, made on the GPU.
    pub(super) fn random_int4(
        device: &Device,
        (rows, columns): (usize, usize),
        group: usize,
        seed: u64,
    ) -> Result<Self, CudaError> {
        device.bind()?;
        let words = device.alloc(rows * columns / 2)?;
        let cells = device.alloc(columns / group * rows * 4)?;
        let cell = (Int4Matrix::random_scale(columns), 8);
        int4::fill_random(device, (words.view(), cells.view()), cell, seed)?;
        let data = Data::Int4 {
            words,
            cells,
            group,
            affine: false,
        };
        Ok(Self::new(data, rows, columns))
    }

    /// Copies integers that the kernels take to the GPU.
    pub(super) fn integers(uploader: &Uploader, whole: &Integers) -> Result<Self, CudaError> {
        let cells = uploader.store(&eight_bit::cells(&whole.scales, &whole.offsets))?;
        let group = whole.group;
        let data = if whole.four_bits {
            Data::Int4 {
                words: uploader.store(&int4::words(&whole.words()))?,
                cells,
                group,
                affine: true,
            }
        } else {
            Data::Int8 {
                data: uploader.store(&whole.bytes())?,
                cells,
                group,
            }
        };
        Ok(Self::new(data, whole.rows, whole.columns))
    }

    /// Copies rows of e4m3 to the GPU, parts one above the other.
    pub(super) fn fp8(
        uploader: &Uploader,
        parts: &[(&Bytes<'_>, &[f32])],
        columns: usize,
    ) -> Result<Self, CudaError> {
        let scales: Vec<u8> = parts
            .iter()
            .flat_map(|(_, scales)| *scales)
            .flat_map(|scale| scale.to_le_bytes())
            .collect();
        let rows = scales.len() / size_of::<f32>();
        let data = uploader.device().alloc(rows * columns)?;
        let mut first = 0;
        for (values, _) in parts {
            let place = data.view().slice(first, values.len());
            upload_bytes(uploader, values, place)?;
            first += values.len();
        }
        let scales = uploader.store(&scales)?;
        Ok(Self::new(Data::Fp8 { data, scales }, rows, columns))
    }

    /// Rounds random values that depend on the seed alone, made on the GPU.
    pub(super) fn random_fp8(
        device: &Device,
        float: Float,
        (rows, columns): (usize, usize),
        seed: u64,
    ) -> Result<Self, CudaError> {
        device.bind()?;
        let values = device.alloc(rows * columns * Float::BYTES)?;
        fill_random(
            device,
            float,
            values.view(),
            seed,
            1.0 / (columns as f32).sqrt(),
        )?;
        let (data, scales) = (device.alloc(rows * columns)?, device.alloc(rows * 4)?);
        QuantizeRows {
            float,
            x: values.view(),
            out: data.view(),
            scales: scales.view(),
            m: rows,
            k: columns,
        }
        .launch(device)?;
        device.synchronize()?;
        Ok(Self::new(Data::Fp8 { data, scales }, rows, columns))
    }

    /// Bytes that its values take in 16 bits, if it has others; see [`Self::values`].
    pub(super) fn value_bytes(&self) -> usize {
        match self.data {
            Data::Float(_) => 0,
            Data::Int4 { .. } | Data::Int8 { .. } | Data::Fp8 { .. } => {
                self.rows * self.columns * Float::BYTES
            }
        }
    }

    /// Whether it is in four bits.
    pub(super) fn is_int4(&self) -> bool {
        matches!(self.data, Data::Int4 { .. })
    }

    /// Whether it is in eight bits.
    pub(super) fn is_eight_bit(&self) -> bool {
        matches!(self.data, Data::Fp8 { .. } | Data::Int8 { .. })
    }

    /// Its four-bit weights, if it has such.
    pub(super) fn int4_view(&self) -> Option<Int4View<'_>> {
        match self.weight() {
            Weight::Int4(view) => Some(view),
            Weight::Float(_) | Weight::EightBit(_) => None,
        }
    }

    /// Its eight-bit floats, if it has such.
    pub(super) fn fp8_view(&self) -> Option<Fp8View<'_>> {
        match &self.data {
            Data::Fp8 { data, scales } => Some(Fp8View {
                data: data.view(),
                scales: scales.view(),
            }),
            Data::Float(_) | Data::Int4 { .. } | Data::Int8 { .. } => None,
        }
    }

    /// As products with few rows read it.
    pub(super) fn weight(&self) -> Weight<'_> {
        match &self.data {
            Data::Float(data) => Weight::Float(data.view()),
            Data::Int4 {
                words,
                cells,
                group,
                affine,
            } => Weight::Int4(Int4View {
                words: words.view(),
                cells: cells.view(),
                group: *group,
                affine: *affine,
            }),
            Data::Int8 { data, cells, group } => Weight::EightBit(EightBit::Int8(Int8View {
                data: data.view(),
                cells: cells.view(),
                group: *group,
            })),
            Data::Fp8 { data, scales } => Weight::EightBit(EightBit::Fp8(Fp8View {
                data: data.view(),
                scales: scales.view(),
            })),
        }
    }

    /// Its values in 16 bits where they lie in memory, as they are or as a copy.
    pub(super) fn float_view(&self) -> Option<View<'_>> {
        match &self.data {
            Data::Float(data) => Some(data.view()),
            Data::Int4 { .. } | Data::Int8 { .. } | Data::Fp8 { .. } => {
                self.copy.get().map(DeviceBuffer::view)
            }
        }
    }

    /// Turns fewer bits into 16-bit floats once for all products with many rows, in memory of their own.
    pub(super) fn keep_values(&self, device: &Device, float: Float) -> Result<(), CudaError> {
        let copy = device.alloc(self.value_bytes())?;
        self.values(device, float, Some(&copy))?;
        self.copy.get_or_init(|| copy);
        Ok(())
    }

    /// The matrix in 16-bit floats, for the product with many rows that is queued next: fewer bits that have no copy are turned
    /// into them in `scratch`. That product must not read its weights before the kernel in front of it has ended.
    pub(super) fn values<'a>(
        &'a self,
        device: &Device,
        float: Float,
        scratch: Option<&'a DeviceBuffer>,
    ) -> Result<View<'a>, CudaError> {
        if let Some(view) = self.float_view() {
            return Ok(view);
        }
        let out = scratch.ok_or_else(|| CudaError::Shape {
            op: "dequantize",
            message: "there is no scratch memory: this is a bug".to_owned(),
        })?;
        let (n, k) = (self.rows, self.columns);
        match self.weight() {
            Weight::Float(_) => {}
            Weight::Int4(weight) => DequantizeInt4 {
                weight,
                out: out.view(),
                n,
                k,
            }
            .launch(device)?,
            Weight::EightBit(weight) => DequantizeEightBit {
                float,
                weight,
                out: out.view(),
                n,
                k,
            }
            .launch(device)?,
        }
        Ok(out.view())
    }
}
