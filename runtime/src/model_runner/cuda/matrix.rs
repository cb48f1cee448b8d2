//! Weight matrices on the GPU: 16-bit floats, or four bits as the checkpoint has them.

use ashlar_kernels::cuda::{CudaError, Device, DeviceBuffer, Float, View, int4::DequantizeInt4};

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
    /// As [`Int4Matrix`]; read as IEEE halves.
    Int4 {
        qweight: DeviceBuffer,
        scales: DeviceBuffer,
        zeros: DeviceBuffer,
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

    /// Copies a matrix to the GPU.
    pub(super) fn int4(device: &Device, matrix: &Int4Matrix) -> Result<Self, CudaError> {
        let upload = |bytes: &[u8]| {
            let buffer = device.alloc(bytes.len())?;
            device.write(bytes, buffer.view())?;
            Ok::<_, CudaError>(buffer)
        };
        let words = matrix.qweight.iter().flat_map(|word| word.to_le_bytes());
        let scales = matrix.scales.iter().flat_map(|scale| scale.to_le_bytes());
        Ok(Self {
            data: Data::Int4 {
                qweight: upload(&words.collect::<Vec<u8>>())?,
                scales: upload(&scales.collect::<Vec<u8>>())?,
                zeros: upload(&matrix.zeros)?,
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

    /// The matrix in 16-bit floats, for the operation that is queued next: four bits are turned into them in `scratch`.
    pub(super) fn values<'a>(
        &'a self,
        device: &Device,
        scratch: Option<&'a DeviceBuffer>,
    ) -> Result<View<'a>, CudaError> {
        match &self.data {
            Data::Float(data) => Ok(data.view()),
            Data::Int4 {
                qweight,
                scales,
                zeros,
                group,
            } => {
                let out = scratch.ok_or_else(|| CudaError::Shape {
                    op: "dequantize_int4",
                    message: "there is no scratch memory yet: this is a bug".to_owned(),
                })?;
                DequantizeInt4 {
                    qweight: qweight.view(),
                    scales: scales.view(),
                    zeros: zeros.view(),
                    out: out.view(),
                    n: self.rows,
                    k: self.columns,
                    group: *group,
                }
                .launch(device)?;
                Ok(out.view())
            }
        }
    }
}
