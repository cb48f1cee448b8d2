//! How a checkpoint says that its linear layers are quantised.

use std::fmt;

use serde_json::Value;

use super::{Fp8Matrix, Fp8Scheme, Int4Matrix, Int4Scheme, Weight};

/// How the linear layers of a checkpoint are quantised. Which of them are is told by their tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// Four-bit integers.
    Int4(Int4Scheme),
    /// Eight-bit floats.
    Fp8(Fp8Scheme),
}

impl Scheme {
    /// Reads the value of `quantization_config`.
    ///
    /// # Errors
    /// In words, what about it is not supported, and what is.
    pub fn from_config(config: &Value) -> Result<Self, String> {
        let text = |name: &str| config.get(name).and_then(Value::as_str);
        let method = text("quant_method").unwrap_or("unnamed");
        match (method, text("format")) {
            ("fp8" | "fbgemm_fp8" | "modelopt", _) => Fp8Scheme::from_config(config).map(Self::Fp8),
            ("compressed-tensors", Some("float-quantized" | "naive-quantized")) => {
                Fp8Scheme::from_compressed_tensors(config).map(Self::Fp8)
            }
            ("awq" | "gptq" | "compressed-tensors", _) => {
                Int4Scheme::from_config(config).map(Self::Int4)
            }
            _ => Err(format!(
                "its weights are quantised by the method {method}; awq, gptq and compressed-tensors with 4 bits, fp8 and \
                 compressed-tensors with 8-bit floats are supported, and so are f16 and bf16 checkpoints and GGUF files"
            )),
        }
    }
}

impl Scheme {
    /// A matrix of values that look random and depend on the seed alone.
    ///
    /// # Errors
    /// In words, why a matrix of this shape cannot be stored so.
    pub fn random(
        &self,
        (rows, columns): (usize, usize),
        seed: u64,
    ) -> Result<Weight<'static>, String> {
        match self {
            Self::Int4(scheme) => {
                let group = scheme.group_of(columns);
                if !columns.is_multiple_of(group) {
                    return Err(format!("{columns} inputs are not groups of {group}"));
                }
                let matrix = Int4Matrix::random((rows, columns), group, seed);
                Ok(Weight::Int4(matrix))
            }
            Self::Fp8(_) => Ok(Weight::Fp8(Fp8Matrix::random((rows, columns), seed))),
        }
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int4(scheme) => scheme.source.fmt(f),
            Self::Fp8(scheme) => scheme.source.fmt(f),
        }
    }
}
