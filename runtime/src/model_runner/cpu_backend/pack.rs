//! Weights as the kernels read them.

use ashlar_kernels::cpu::{BlockFormat, Int4Args, KernelError, PackedMatrix};

use super::CpuBackend;
use crate::weights::{Fp8Matrix, GgmlType, Int4Matrix, RawTensor, Weight};

impl CpuBackend {
    /// Eight-bit floats are multiplied as brain floats, which hold them and all but the last bits of their scales.
    pub(super) fn pack_fp8(&self, matrix: &Fp8Matrix<'_>) -> Result<PackedMatrix, String> {
        let values = matrix.dequantize();
        let packed = if self.exact {
            PackedMatrix::from_f32(matrix.rows, matrix.columns, &values)
        } else {
            let values = values.iter();
            let bytes: Vec<u8> = values
                .flat_map(|value| half::bf16::from_f32(*value).to_le_bytes())
                .collect();
            PackedMatrix::from_rows(BlockFormat::BF16, matrix.rows, matrix.columns, &bytes)
        };
        packed.map_err(|error| error.to_string())
    }

    /// Parts of one storage type, one above the other.
    pub(super) fn pack_rows(&self, parts: &[Weight<'_>]) -> Result<PackedMatrix, String> {
        let mut parts = parts.iter().filter_map(|part| match part {
            Weight::Rows(raw) => Some(raw),
            Weight::Int4(_) | Weight::Fp8(_) => None,
        });
        let mut whole = parts.next().ok_or("no part: this is a bug")?.clone();
        let kind = whole.kind;
        let format =
            block_format(kind).ok_or_else(|| format!("the CPU cannot compute with {kind:?}"))?;
        for part in parts {
            whole.rows += part.rows;
            whole.data.to_mut().extend_from_slice(&part.data);
        }
        pack(&whole, format, self.exact).map_err(|error| error.to_string())
    }

    /// Parts in four bits of one group size, one above the other.
    pub(super) fn pack_int4(&self, parts: &[Weight<'_>]) -> Result<PackedMatrix, String> {
        let parts: Vec<&Int4Matrix> = parts
            .iter()
            .filter_map(|part| match part {
                Weight::Int4(matrix) => Some(matrix),
                Weight::Rows(_) | Weight::Fp8(_) => None,
            })
            .collect();
        let whole = Int4Matrix::stack(&parts);
        let packed = if self.exact {
            PackedMatrix::from_f32(whole.rows, whole.columns, &whole.dequantize())
        } else {
            PackedMatrix::from_int4(&Int4Args {
                rows: whole.rows,
                columns: whole.columns,
                group: whole.group,
                qweight: &whole.qweight,
                scales: &whole.scales,
                zeros: &whole.zeros,
            })
        };
        packed.map_err(|error| error.to_string())
    }
}

/// The kernels' name of a storage type they can read.
fn block_format(kind: GgmlType) -> Option<BlockFormat> {
    Some(match kind {
        GgmlType::F32 => BlockFormat::F32,
        GgmlType::F16 => BlockFormat::F16,
        GgmlType::BF16 => BlockFormat::BF16,
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

/// Exact mode packs f32. Otherwise formats that a product reads are packed as they are, and the others as 8 bits.
pub(super) fn pack(
    raw: &RawTensor<'_>,
    format: BlockFormat,
    exact: bool,
) -> Result<PackedMatrix, KernelError> {
    let as_stored = matches!(
        format,
        BlockFormat::F32
            | BlockFormat::F16
            | BlockFormat::BF16
            | BlockFormat::Q4_0
            | BlockFormat::Q4_1
            | BlockFormat::Q8_0
    );
    if as_stored && !exact {
        return PackedMatrix::from_rows(format, raw.rows, raw.columns, &raw.data);
    }
    let mut values = vec![0.0; raw.rows * raw.columns];
    format.dequantize(&raw.data, &mut values)?;
    if exact {
        PackedMatrix::from_f32(raw.rows, raw.columns, &values)
    } else {
        PackedMatrix::quantize_q8(raw.rows, raw.columns, &values)
    }
}
