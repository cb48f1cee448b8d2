//! Weight matrices on the GPU: 16-bit floats, or four bits as the checkpoint has them.

use ashlar_kernels::cuda::{
    CudaError, Device, DeviceBuffer, Float, View,
    int4::{self, DequantizeInt4, Int4View},
    skinny::Weight,
};

use crate::weights::Int4Matrix;

/// A matrix `[rows, columns]` on the GPU.
pub(super) struct Matrix {
    data: Data,
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
    },
}

impl Matrix {
    pub(super) fn float(data: DeviceBuffer, rows: usize, columns: usize) -> Self {
        Self {
            data: Data::Float(data),
            rows,
            columns,
        }
    }

    /// Copies a matrix of groups that the kernels take to the GPU.
    pub(super) fn int4(device: &Device, matrix: &Int4Matrix) -> Result<Self, CudaError> {
        let upload = |bytes: &[u8]| {
            let buffer = device.alloc(bytes.len())?;
            device.write(bytes, buffer.view())?;
            Ok::<_, CudaError>(buffer)
        };
        Ok(Self {
            data: Data::Int4 {
                words: upload(&int4::words(&matrix.qweight))?,
                cells: upload(&int4::cells(&matrix.scales, &matrix.zeros))?,
                group: matrix.group,
            },
            rows: matrix.rows,
            columns: matrix.columns,
        })
    }

    /// Bytes of scratch memory that [`Self::values`] needs.
    pub(super) fn scratch_bytes(&self) -> usize {
        match self.data {
            Data::Float(_) => 0,
            Data::Int4 { .. } => self.rows * self.columns * Float::BYTES,
        }
    }

    /// Whether it is in four bits.
    pub(super) fn is_int4(&self) -> bool {
        matches!(self.data, Data::Int4 { .. })
    }

    /// As products with few rows read it.
    pub(super) fn weight(&self) -> Weight<'_> {
        match &self.data {
            Data::Float(data) => Weight::Float(data.view()),
            Data::Int4 {
                words,
                cells,
                group,
            } => Weight::Int4(Int4View {
                words: words.view(),
                cells: cells.view(),
                group: *group,
            }),
        }
    }

    /// The matrix in 16-bit floats, for the product with many rows that is queued next: four bits are turned into them in
    /// `scratch`. That product must not read its weights before the kernel in front of it has ended.
    pub(super) fn values<'a>(
        &'a self,
        device: &Device,
        scratch: Option<&'a DeviceBuffer>,
    ) -> Result<View<'a>, CudaError> {
        let weight = match self.weight() {
            Weight::Float(view) => return Ok(view),
            Weight::Int4(weight) => weight,
        };
        let out = scratch.ok_or_else(|| CudaError::Shape {
            op: "dequantize_int4",
            message: "there is no scratch memory: this is a bug".to_owned(),
        })?;
        DequantizeInt4 {
            weight,
            out: out.view(),
            n: self.rows,
            k: self.columns,
        }
        .launch(device)?;
        Ok(out.view())
    }
}
