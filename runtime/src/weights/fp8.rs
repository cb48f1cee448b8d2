//! Weights in eight-bit floats (e4m3): how checkpoints store them, and how 16-bit ones become them.
//!
//! Invariants:
//! - reading is exact: the matrix has the stored bytes, and scales are widened to f32;
//! - nothing but shapes and types is trusted once they were checked: any bytes give a matrix or an error.

use std::fmt;

use ashlar_kernels::e4m3::{MAX, narrow, widen};
use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::Value;

use super::{Bytes, RawTensor, int4::StoredTensor};

#[cfg(test)]
mod tests;

/// Who stored them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fp8Source {
    /// `quant_method: fp8` and its like: `weight` beside `weight_scale`, or `weight_scale_inv` of blocks.
    Fp8,
    /// compressed-tensors' `float-quantized`.
    CompressedTensors,
    /// No one: the checkpoint's 16-bit matrices are rounded as they are loaded, with a scale for each row.
    Online,
}

impl fmt::Display for Fp8Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fp8 => "fp8",
            Self::CompressedTensors => "compressed-tensors",
            Self::Online => "fp8 made at load",
        })
    }
}

/// How the linear layers of a checkpoint are stored as eight-bit floats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fp8Scheme {
    /// Who stored them.
    pub source: Fp8Source,
    /// Rows and columns that share a scale, where neither a row nor the whole matrix does.
    pub block: Option<[usize; 2]>,
    /// Whether rows of activations may be rounded to eight bits too, which is faster and less exact.
    pub rounds_rows: bool,
}

impl Fp8Scheme {
    /// What makes eight-bit floats of a 16-bit checkpoint.
    pub const ONLINE: Self = Self {
        source: Fp8Source::Online,
        block: None,
        rounds_rows: true,
    };

    /// Reads a `quantization_config` whose method is fp8, fbgemm_fp8 or modelopt.
    pub(super) fn from_config(config: &Value) -> Result<Self, String> {
        let text = |name: &str| config.get(name).and_then(Value::as_str);
        if text("quant_method") == Some("modelopt") {
            let algorithm = text("quant_algo").unwrap_or("unnamed");
            if algorithm != "FP8" {
                return Err(format!(
                    "its weights are quantised by modelopt as {algorithm}; FP8 is supported"
                ));
            }
        }
        if let Some(format) = text("fmt").filter(|format| *format != "e4m3") {
            return Err(format!(
                "its eight-bit floats are of the format {format}; e4m3 is supported"
            ));
        }
        let block = match config.get("weight_block_size") {
            None | Some(Value::Null) => None,
            Some(size) => Some(block_size(size)?),
        };
        Ok(Self {
            source: Fp8Source::Fp8,
            block,
            // These methods always do; `activation_scheme` says when their scales are chosen.
            rounds_rows: true,
        })
    }

    /// Reads one of compressed-tensors with eight-bit floats.
    pub(super) fn from_compressed_tensors(config: &Value) -> Result<Self, String> {
        let groups = config.get("config_groups").and_then(Value::as_object);
        let groups = groups
            .filter(|groups| !groups.is_empty())
            .ok_or("its quantization_config has no config_groups")?;
        let (mut block, mut rounds_rows) = (None, true);
        for group in groups.values() {
            rounds_rows &= group
                .get("input_activations")
                .is_some_and(|activations| !activations.is_null());
            let weights = group
                .get("weights")
                .filter(|weights| weights.is_object())
                .ok_or("a group of its quantization_config has no weights")?;
            let (bits, kind) = (weights.get("num_bits"), weights.get("type"));
            let (bits, kind) = (
                bits.and_then(Value::as_u64),
                kind.and_then(Value::as_str).unwrap_or("int"),
            );
            if (bits, kind) != (Some(8), "float") {
                return Err(format!(
                    "its weights are {} bits of type {kind}; float of 8 bits is supported",
                    bits.map_or_else(
                        || "an unnamed number of".to_owned(),
                        |bits| bits.to_string()
                    )
                ));
            }
            let strategy = weights.get("strategy").and_then(Value::as_str);
            match strategy {
                None | Some("tensor" | "channel") => {}
                Some("block") => {
                    let size = weights.get("block_structure").unwrap_or(&Value::Null);
                    block = Some(block_size(size)?);
                }
                Some(other) => {
                    return Err(format!(
                        "its weights have a scale for each {other}; tensor, channel and block are supported"
                    ));
                }
            }
        }
        Ok(Self {
            source: Fp8Source::CompressedTensors,
            block,
            rounds_rows,
        })
    }
}

fn block_size(value: &Value) -> Result<[usize; 2], String> {
    let sizes: Option<Vec<usize>> = value.as_array().and_then(|sizes| {
        let sizes = sizes
            .iter()
            .map(|size| size.as_u64().and_then(|size| usize::try_from(size).ok()));
        sizes.collect()
    });
    match sizes.as_deref() {
        Some([rows, columns]) if *rows > 0 && *columns > 0 => Ok([*rows, *columns]),
        _ => Err(format!(
            "its blocks are of the size {value}; two positive numbers are needed, such as [128, 128]"
        )),
    }
}

/// Which values share a scale.
#[derive(Debug, Clone, PartialEq)]
pub enum Fp8Scales {
    /// `[rows]`; where a whole matrix shares one it is repeated.
    Rows(Vec<f32>),
    /// `[⌈rows / size[0]⌉, ⌈columns / size[1]⌉]`
    Blocks {
        /// Rows and columns of a block.
        size: [usize; 2],
        /// The scales.
        scales: Vec<f32>,
    },
}

/// A matrix `[rows, columns]` of `w = q · scale`, q in e4m3.
#[derive(Debug, Clone, PartialEq)]
pub struct Fp8Matrix<'a> {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub columns: usize,
    /// `[rows, columns]`
    pub data: Bytes<'a>,
    /// What they are multiplied with.
    pub scales: Fp8Scales,
}

/// Why a matrix cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("the tensor {name} {problem}")]
pub struct Fp8Error {
    name: String,
    problem: String,
}

fn fail(name: &str, problem: String) -> Fp8Error {
    Fp8Error {
        name: name.to_owned(),
        problem,
    }
}

impl Fp8Scales {
    /// The scales of a matrix of this shape, or what is wrong with them.
    fn read(
        scale: &StoredTensor<'_>,
        scheme: &Fp8Scheme,
        (rows, columns): (usize, usize),
    ) -> Result<Self, String> {
        let values = floats(scale)
            .ok_or_else(|| format!("is stored as {:?}; floats are expected", scale.dtype))?;
        let bad = |value: &&f32| !value.is_finite() || **value < 0.0;
        if let Some(value) = values.iter().find(bad) {
            return Err(format!("holds {value}, which is no scale"));
        }
        let blocks = scheme
            .block
            .map(|size| [rows.div_ceil(size[0]), columns.div_ceil(size[1])]);
        match (blocks, scheme.block) {
            (Some(blocks), Some(size)) if scale.shape == blocks => Ok(Self::Blocks {
                size,
                scales: values,
            }),
            _ if scale.shape.iter().all(|size| *size == 1) && values.len() == 1 => {
                Ok(Self::Rows(vec![values[0]; rows]))
            }
            (None, _) if scale.shape == [rows, 1] || scale.shape == [rows] => {
                Ok(Self::Rows(values))
            }
            _ => {
                let expected = match blocks {
                    Some(blocks) => format!("{blocks:?}"),
                    None => format!("[1] or [{rows}, 1]"),
                };
                let shape = &scale.shape;
                Err(format!(
                    "has the shape {shape:?}, and {expected} is expected"
                ))
            }
        }
    }
}

impl<'a> Fp8Matrix<'a> {
    /// Reads the matrix `name` (without `.weight`) of this shape, or says that it is not stored in eight-bit floats; `find`
    /// looks tensors up by name.
    ///
    /// # Errors
    /// [`Fp8Error`] naming the tensor, what it is, and what was expected.
    pub fn read(
        scheme: &Fp8Scheme,
        name: &str,
        (rows, columns): (usize, usize),
        find: impl Fn(&str) -> Option<StoredTensor<'a>>,
    ) -> Result<Option<Self>, Fp8Error> {
        let weight_name = format!("{name}.weight");
        let Some(weight) = find(&weight_name).filter(|weight| weight.dtype == Dtype::F8_E4M3)
        else {
            return Ok(None);
        };
        if weight.shape != [rows, columns] {
            let problem = format!(
                "has the shape {:?}, and [{rows}, {columns}] is expected",
                weight.shape
            );
            return Err(fail(&weight_name, problem));
        }
        let names = [
            format!("{name}.weight_scale"),
            format!("{name}.weight_scale_inv"),
        ];
        let (scale_name, scale) = names
            .iter()
            .find_map(|name| find(name).map(|tensor| (name, tensor)))
            .ok_or_else(|| fail(&names[0], "is missing".to_owned()))?;
        let scales = Fp8Scales::read(&scale, scheme, (rows, columns))
            .map_err(|problem| fail(scale_name, problem))?;
        Ok(Some(Self {
            rows,
            columns,
            data: weight.data.into(),
            scales,
        }))
    }

    /// Rounds a matrix of floats, each row with the scale that takes its largest value to e4m3's largest; none for other types.
    #[must_use]
    pub fn quantize(raw: &RawTensor<'_>) -> Option<Fp8Matrix<'static>> {
        let values = raw.to_f32()?;
        let mut data = Vec::with_capacity(values.len());
        let mut scales = Vec::with_capacity(raw.rows);
        for row in values.chunks_exact(raw.columns) {
            let largest = row
                .iter()
                .fold(1e-20f32, |most, value| most.max(value.abs()));
            scales.push(largest / MAX);
            let factor = MAX / largest;
            data.extend(row.iter().map(|value| narrow(value * factor)));
        }
        Some(Fp8Matrix {
            rows: raw.rows,
            columns: raw.columns,
            data: data.into(),
            scales: Fp8Scales::Rows(scales),
        })
    }

    /// Values that look random and depend on the seed alone, of about the size that initialised weights have.
    #[must_use]
    pub fn random((rows, columns): (usize, usize), seed: u64) -> Fp8Matrix<'static> {
        let mut state = seed;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            // Any byte but the two that are no numbers, small ones as often as large ones: they spread by about 90.
            ((state >> 32) as u8) & 0xfe
        };
        let data: Vec<u8> = (0..rows * columns).map(|_| next()).collect();
        Fp8Matrix {
            rows,
            columns,
            data: data.into(),
            scales: Fp8Scales::Rows(vec![Self::random_scale(columns); rows]),
        }
    }

    /// The scale of random weights.
    #[must_use]
    pub fn random_scale(columns: usize) -> f32 {
        1.0 / (90.0 * (columns as f32).sqrt())
    }

    /// All values, `[rows, columns]`.
    #[must_use]
    pub fn dequantize(&self) -> Vec<f32> {
        let table: Vec<f32> = (0..=255).map(widen).collect();
        let mut values = Vec::with_capacity(self.rows * self.columns);
        for (row, bytes) in self.data.chunks_exact(self.columns).enumerate() {
            match &self.scales {
                Fp8Scales::Rows(scales) => {
                    let scale = scales[row];
                    values.extend(bytes.iter().map(|q| table[usize::from(*q)] * scale));
                }
                Fp8Scales::Blocks { size, scales } => {
                    let width = self.columns.div_ceil(size[1]);
                    let scales = &scales[row / size[0] * width..][..width];
                    for (bytes, scale) in bytes.chunks(size[1]).zip(scales) {
                        values.extend(bytes.iter().map(|q| table[usize::from(*q)] * scale));
                    }
                }
            }
        }
        values
    }
}

/// All values of a tensor of floats.
pub(super) fn floats(tensor: &StoredTensor<'_>) -> Option<Vec<f32>> {
    let data = tensor.data;
    Some(match tensor.dtype {
        Dtype::F32 => data
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect(),
        Dtype::BF16 => data
            .as_chunks()
            .0
            .iter()
            .map(|b| bf16::from_le_bytes(*b).to_f32())
            .collect(),
        Dtype::F16 => data
            .as_chunks()
            .0
            .iter()
            .map(|b| f16::from_le_bytes(*b).to_f32())
            .collect(),
        _ => return None,
    })
}
