//! A checkpoint of either format: its tensors by name, as typed bytes.

use std::path::Path;

use half::{bf16, f16};

use super::{
    Bytes, Fp8Matrix, Fp8Scales, GgmlType, Gguf, Int4Matrix, SafetensorsFolder, Scheme,
    WeightsError, fp8::floats,
};
use crate::models::loader::LoadFormat;

/// An open checkpoint.
#[derive(Debug)]
pub enum Checkpoint {
    /// One GGUF file.
    Gguf(Gguf),
    /// A Hugging Face folder.
    Safetensors(SafetensorsFolder),
}

/// A tensor's bytes, row after row. Vectors have one row.
#[derive(Debug, Clone)]
pub struct RawTensor<'a> {
    /// Storage type; safetensors use the plain ones.
    pub kind: GgmlType,
    /// Number of rows (output features of a matrix).
    pub rows: usize,
    /// Values in a row (input features).
    pub columns: usize,
    /// `rows · kind.bytes_of(columns)` bytes.
    pub data: Bytes<'a>,
}

/// A matrix of a checkpoint, as a device gets it.
#[derive(Debug)]
pub enum Weight<'a> {
    /// Rows of one storage type, as they are stored.
    Rows(RawTensor<'a>),
    /// Four bits with scales and zeros, read from whatever layout the checkpoint has.
    Int4(Int4Matrix),
    /// Eight-bit floats with their scales.
    Fp8(Fp8Matrix<'a>),
}

impl Weight<'_> {
    /// Output features.
    #[must_use]
    pub fn rows(&self) -> usize {
        match self {
            Self::Rows(raw) => raw.rows,
            Self::Int4(matrix) => matrix.rows,
            Self::Fp8(matrix) => matrix.rows,
        }
    }

    /// Input features.
    #[must_use]
    pub fn columns(&self) -> usize {
        match self {
            Self::Rows(raw) => raw.columns,
            Self::Int4(matrix) => matrix.columns,
            Self::Fp8(matrix) => matrix.columns,
        }
    }

    /// Bytes of its values, with their scales and zeros.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        match self {
            Self::Rows(raw) => raw.data.len(),
            Self::Int4(matrix) => {
                size_of_val(&*matrix.qweight)
                    + size_of_val(&*matrix.scales)
                    + size_of_val(&*matrix.zeros)
            }
            Self::Fp8(matrix) => {
                let (Fp8Scales::Rows(scales) | Fp8Scales::Blocks { scales, .. }) = &matrix.scales;
                matrix.data.len() + size_of_val(&**scales)
            }
        }
    }
}

impl RawTensor<'_> {
    /// Bytes of one row.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        self.data.len() / self.rows
    }

    /// All values as f32, exactly, or `None` for quantised and integer types.
    #[must_use]
    pub fn to_f32(&self) -> Option<Vec<f32>> {
        let values = match self.kind {
            GgmlType::F32 => self
                .data
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect(),
            GgmlType::F16 => self
                .data
                .as_chunks::<2>()
                .0
                .iter()
                .map(|b| f16::from_le_bytes(*b).to_f32())
                .collect(),
            GgmlType::BF16 => self
                .data
                .as_chunks::<2>()
                .0
                .iter()
                .map(|b| bf16::from_le_bytes(*b).to_f32())
                .collect(),
            _ => return None,
        };
        Some(values)
    }
}

impl Checkpoint {
    /// Opens a `.gguf` file, a folder with `config.json` and safetensors, or a folder with one `.gguf` file.
    ///
    /// # Errors
    /// [`WeightsError`] when there is no model there, or it cannot be read.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        if !path.is_dir() {
            return Ok(Self::Gguf(Gguf::open(path)?));
        }
        if path.join("config.json").is_file() {
            return Ok(Self::Safetensors(SafetensorsFolder::open(path)?));
        }
        let io = |source| WeightsError::Io {
            path: path.display().to_string(),
            source,
        };
        let mut files = Vec::new();
        for entry in std::fs::read_dir(path).map_err(io)? {
            let file = entry.map_err(io)?.path();
            if file
                .extension()
                .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
            {
                files.push(file);
            }
        }
        match files.as_slice() {
            [file] => Ok(Self::Gguf(Gguf::open(file)?)),
            [] => Err(WeightsError::Unsupported {
                path: path.display().to_string(),
                message: "the folder has neither config.json with safetensors nor a .gguf file"
                    .to_owned(),
            }),
            several => Err(WeightsError::Unsupported {
                path: path.display().to_string(),
                message: format!(
                    "the folder has {} .gguf files; name the one to serve",
                    several.len()
                ),
            }),
        }
    }

    /// As [`Self::open`]; without weights, a folder needs no more than `config.json`.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_for(path: &Path, format: LoadFormat) -> Result<Self, WeightsError> {
        if format == LoadFormat::Dummy && path.join("config.json").is_file() {
            return Ok(Self::Safetensors(SafetensorsFolder::open_config(path)?));
        }
        Self::open(path)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Gguf(gguf) => gguf.path(),
            Self::Safetensors(folder) => folder.path(),
        }
    }

    /// The tensor of this name, if the checkpoint has it.
    ///
    /// # Errors
    /// [`WeightsError::Unsupported`] when it is stored in a type that cannot be used.
    pub fn tensor(&self, name: &str) -> Result<Option<RawTensor<'_>>, WeightsError> {
        match self {
            Self::Gguf(gguf) => Ok(gguf.tensor(name).map(|tensor| RawTensor {
                kind: tensor.kind,
                rows: tensor.rows(),
                columns: tensor.columns(),
                data: tensor.data.into(),
            })),
            Self::Safetensors(folder) => folder.tensor(name),
        }
    }

    /// The matrix `name` (without `.weight`) as the scheme says, if that is how the checkpoint holds it.
    ///
    /// # Errors
    /// [`WeightsError::Mismatch`] when its tensors do not fit each other, the scheme or the shape.
    pub fn quantized(
        &self,
        scheme: &Scheme,
        name: &str,
        shape: (usize, usize),
    ) -> Result<Option<Weight<'_>>, WeightsError> {
        let Self::Safetensors(folder) = self else {
            return Ok(None);
        };
        let find = |tensor: &str| folder.stored(tensor);
        match scheme {
            Scheme::Int4(_) if folder.has(&format!("{name}.weight")) => Ok(None),
            Scheme::Int4(scheme) => Int4Matrix::read(scheme, name, shape, find)
                .map(|matrix| Some(Weight::Int4(matrix)))
                .map_err(|error| self.mismatch(error.to_string())),
            Scheme::Fp8(scheme) => Fp8Matrix::read(scheme, name, shape, find)
                .map(|matrix| matrix.map(Weight::Fp8))
                .map_err(|error| self.mismatch(error.to_string())),
        }
    }

    /// What K and V of each layer are divided by before they are stored in eight bits; 1 where the checkpoint says nothing, of
    /// which a warning tells.
    ///
    /// # Errors
    /// [`WeightsError::Mismatch`] when a scale is no positive number.
    pub fn kv_scales(&self, num_layers: usize) -> Result<Vec<[f32; 2]>, WeightsError> {
        let scales = (0..num_layers).map(|layer| {
            Ok([
                self.kv_scale(layer, "k_scale", "k_proj")?,
                self.kv_scale(layer, "v_scale", "v_proj")?,
            ])
        });
        let scales: Vec<[Option<f32>; 2]> = scales.collect::<Result<_, WeightsError>>()?;
        if scales.iter().flatten().any(Option::is_none) {
            tracing::warn!(
                "the checkpoint has no scales for K and V in 8 bits: they are stored unscaled, and values beyond 448 are cut"
            );
        }
        let given = |scales: &[Option<f32>; 2]| scales.map(|scale| scale.unwrap_or(1.0));
        Ok(scales.iter().map(given).collect())
    }

    fn kv_scale(
        &self,
        layer: usize,
        name: &str,
        projection: &str,
    ) -> Result<Option<f32>, WeightsError> {
        let Self::Safetensors(folder) = self else {
            return Ok(None);
        };
        let attention = format!("model.layers.{layer}.self_attn");
        for name in [
            format!("{attention}.{name}"),
            format!("{attention}.attn.{name}"),
            format!("{attention}.{projection}.{name}"),
        ] {
            if let Some(tensor) = folder.stored(&name) {
                let values = floats(&tensor).unwrap_or_default();
                return match values.as_slice() {
                    [value] if value.is_finite() && *value > 0.0 => Ok(Some(*value)),
                    _ => Err(self.mismatch(format!("{name} is not one positive number"))),
                };
            }
        }
        Ok(None)
    }

    /// Bytes of its files of weights.
    #[must_use]
    pub fn num_bytes(&self) -> u64 {
        let bytes = match self {
            Self::Gguf(gguf) => gguf.file().len(),
            Self::Safetensors(folder) => folder.num_bytes(),
        };
        bytes as u64
    }

    /// Tells the kernel that all of it is about to be read.
    pub fn will_read_all(&self) {
        match self {
            Self::Gguf(gguf) => gguf.file().will_read_all(),
            Self::Safetensors(folder) => folder.will_read_all(),
        }
    }

    pub(crate) fn mismatch(&self, message: String) -> WeightsError {
        WeightsError::Mismatch {
            path: self.path().display().to_string(),
            message,
        }
    }

    pub(crate) fn unsupported(&self, message: String) -> WeightsError {
        WeightsError::Unsupported {
            path: self.path().display().to_string(),
            message,
        }
    }
}
