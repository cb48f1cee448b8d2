//! What weights are on the GPU: which stay in fewer bits, and how the others become 16-bit floats.

use ashlar_kernels::{
    cpu::BlockFormat,
    cuda::{CudaError, Float, Uploader, View, eight_bit, int4},
};
use half::{bf16, f16};

use super::CudaBackend;
use crate::weights::{Bytes, Fp8Scales, GgmlType, Int4Matrix, RawTensor, StoredBytes, Weight};

impl CudaBackend {
    /// Fills `to` with the matrix in the backend's type.
    pub(super) fn upload_values(&self, part: &Weight<'_>, to: View<'_>) -> Result<(), String> {
        let upload = |bytes: Vec<u8>, to| {
            let sent = self.uploader.upload(bytes.as_slice(), to);
            sent.map_err(|error| error.to_string())
        };
        match part {
            Weight::Rows(raw) if self.is_native(raw.kind) => {
                upload_bytes(&self.uploader, &raw.data, to).map_err(|error| error.to_string())
            }
            Weight::Rows(raw) => {
                let row_bytes = raw.columns * Float::BYTES;
                // Some rows after the others: vocabularies in 32 bits are large.
                let rows = (Uploader::PIECE / row_bytes).max(1);
                for (index, data) in raw.data.chunks(rows * raw.row_bytes()).enumerate() {
                    let piece = RawTensor {
                        kind: raw.kind,
                        rows: data.len() / raw.row_bytes(),
                        columns: raw.columns,
                        data: StoredBytes::from(data).into(),
                    };
                    let start = index * rows * row_bytes;
                    let place = to.slice(start, piece.rows * row_bytes);
                    upload(self.convert(&piece)?, place)?;
                }
                Ok(())
            }
            Weight::Int4(matrix) => upload(self.to_bytes(&matrix.dequantize()), to),
            Weight::Fp8(matrix) => upload(self.to_bytes(&matrix.dequantize()), to),
        }
    }

    /// 16-bit bytes of a tensor of any storage type.
    fn convert(&self, raw: &RawTensor<'_>) -> Result<Vec<u8>, String> {
        let values = match raw.to_f32() {
            Some(values) => values,
            None => {
                let format = block_format(raw.kind)
                    .ok_or_else(|| format!("the GPU cannot compute with {:?}", raw.kind))?;
                let mut values = vec![0.0; raw.rows * raw.columns];
                format
                    .dequantize(&raw.data, &mut values)
                    .map_err(|error| error.to_string())?;
                values
            }
        };
        Ok(self.to_bytes(&values))
    }

    pub(super) fn to_bytes(&self, values: &[f32]) -> Vec<u8> {
        let values = values.iter();
        match self.float {
            Float::Bf16 => values
                .flat_map(|value| bf16::from_f32(*value).to_le_bytes())
                .collect(),
            Float::F16 => values
                .flat_map(|value| f16::from_f32(*value).to_le_bytes())
                .collect(),
        }
    }

    /// The parts, where all are in four bits and can stay so together; their scales are IEEE halves.
    pub(super) fn four_bit_parts<'a>(
        &self,
        stacked: &'a [Weight<'_>],
    ) -> Option<Vec<&'a Int4Matrix>> {
        let parts: Option<Vec<&Int4Matrix>> = stacked
            .iter()
            .map(|part| match part {
                Weight::Int4(matrix) => Some(matrix),
                Weight::Rows(_) | Weight::Fp8(_) => None,
            })
            .collect();
        parts.filter(|parts| {
            self.integers
                && parts.iter().all(|part| part.group == parts[0].group)
                && int4::takes(parts[0].columns, parts[0].group)
        })
    }

    /// The parts' values and scales, where all are eight-bit floats with scales of rows, and of a shape that the products
    /// take.
    pub(super) fn fp8_parts<'a>(
        stacked: &'a [Weight<'a>],
    ) -> Option<Vec<(&'a Bytes<'a>, &'a [f32])>> {
        let parts: Option<Vec<_>> = stacked
            .iter()
            .map(|part| match part {
                Weight::Fp8(matrix) => match &matrix.scales {
                    Fp8Scales::Rows(scales) => Some((&matrix.data, scales.as_slice())),
                    Fp8Scales::Blocks { .. } => None,
                },
                Weight::Rows(_) | Weight::Int4(_) => None,
            })
            .collect();
        let rows: usize = stacked.iter().map(Weight::rows).sum();
        parts.filter(|_| rows.is_multiple_of(16) && eight_bit::takes(stacked[0].columns()))
    }

    fn is_native(&self, kind: GgmlType) -> bool {
        matches!(
            (kind, self.float),
            (GgmlType::BF16, Float::Bf16) | (GgmlType::F16, Float::F16)
        )
    }
}

/// Fills `to` with a tensor's bytes.
pub(in super::super) fn upload_bytes(
    uploader: &Uploader,
    bytes: &Bytes<'_>,
    to: View<'_>,
) -> Result<(), CudaError> {
    let reader = bytes.reader().map_err(|error| CudaError::Source {
        message: error.to_string(),
    })?;
    uploader.upload(reader, to)
}

/// GGUF's formats of quantised blocks.
pub(in super::super) fn block_format(kind: GgmlType) -> Option<BlockFormat> {
    Some(match kind {
        GgmlType::Q4_0 => BlockFormat::Q4_0,
        GgmlType::Q4_1 => BlockFormat::Q4_1,
        GgmlType::Q5_0 => BlockFormat::Q5_0,
        GgmlType::Q5_1 => BlockFormat::Q5_1,
        GgmlType::Q8_0 => BlockFormat::Q8_0,
        GgmlType::Q4K => BlockFormat::Q4K,
        GgmlType::Q5K => BlockFormat::Q5K,
        GgmlType::Q6K => BlockFormat::Q6K,
        _ => return None,
    })
}
