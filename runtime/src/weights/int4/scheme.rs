//! What a `config.json` says about its four-bit weights.

use std::fmt;

use serde_json::Value;

use super::GROUP_MULTIPLE;

/// How four-bit weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Int4Source {
    /// AWQ's GEMM layout: packed along the outputs in the order 0, 2, 4, 6, 1, 3, 5, 7; zeros as they are.
    Awq,
    /// GPTQ: packed along the inputs in order.
    Gptq {
        /// The stored zero is one less than the real one (checkpoint format `gptq`, not `gptq_v2`).
        zero_minus_one: bool,
    },
    /// compressed-tensors' `pack-quantized`: packed along the inputs in order, both integers 8 above their signed values.
    CompressedTensors {
        /// No zeros are stored: all are 8.
        symmetric: bool,
    },
}

impl fmt::Display for Int4Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Awq => "AWQ",
            Self::Gptq { .. } => "GPTQ",
            Self::CompressedTensors { .. } => "compressed-tensors",
        })
    }
}

/// How the linear layers of a checkpoint are quantised. Which of them are is told by their tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Int4Scheme {
    /// The layout.
    pub source: Int4Source,
    /// Inputs that share a scale; none: all of a row.
    pub group: Option<usize>,
    /// Groups are said to follow the order of activations; then only an order that is trivial can be used.
    pub act_order: bool,
}

impl Int4Scheme {
    /// Inputs that share a scale in rows of `columns`.
    #[must_use]
    pub fn group_of(&self, columns: usize) -> usize {
        self.group.unwrap_or(columns)
    }

    /// Reads the value of `quantization_config`.
    ///
    /// # Errors
    /// In words, what about it is not supported, and what is.
    pub fn from_config(config: &Value) -> Result<Self, String> {
        let method = config
            .get("quant_method")
            .and_then(Value::as_str)
            .unwrap_or("unnamed");
        match method {
            "awq" => awq(config),
            "gptq" => gptq(config),
            "compressed-tensors" => compressed_tensors(config),
            other => Err(format!(
                "its weights are quantised by the method {other}; awq, gptq and compressed-tensors with 4 bits are \
                 supported, and so are f16 and bf16 checkpoints and GGUF files"
            )),
        }
    }
}

fn awq(config: &Value) -> Result<Int4Scheme, String> {
    four_bits(first(config, &["bits", "w_bit"]))?;
    let version = config.get("version").and_then(Value::as_str);
    if let Some(version) = version.filter(|version| !version.eq_ignore_ascii_case("gemm")) {
        return Err(format!(
            "its AWQ weights are in the layout {version:?}; use the checkpoint in the GEMM layout"
        ));
    }
    Ok(Int4Scheme {
        source: Int4Source::Awq,
        group: group(first(config, &["group_size", "q_group_size"]))?,
        act_order: false,
    })
}

fn gptq(config: &Value) -> Result<Int4Scheme, String> {
    four_bits(config.get("bits"))?;
    let zero_minus_one = match config.get("checkpoint_format").and_then(Value::as_str) {
        None | Some("gptq") => true,
        Some("gptq_v2") => false,
        Some(other) => {
            return Err(format!(
                "its GPTQ weights are in the format {other:?}; use gptq or gptq_v2"
            ));
        }
    };
    Ok(Int4Scheme {
        source: Int4Source::Gptq { zero_minus_one },
        group: group(config.get("group_size"))?,
        act_order: is_true(config.get("desc_act")),
    })
}

fn compressed_tensors(config: &Value) -> Result<Int4Scheme, String> {
    let format = config
        .get("format")
        .and_then(Value::as_str)
        .unwrap_or("unnamed");
    if format != "pack-quantized" {
        return Err(format!(
            "its compressed-tensors weights are in the format {format:?}; pack-quantized with 4 bits is supported"
        ));
    }
    let groups = config.get("config_groups").and_then(Value::as_object);
    let schemes = groups
        .into_iter()
        .flat_map(|groups| groups.values())
        .map(group_scheme);
    let schemes = schemes.collect::<Result<Vec<_>, _>>()?;
    match schemes.as_slice() {
        [first, rest @ ..] if rest.iter().all(|scheme| scheme == first) => Ok(*first),
        [] => Err("its quantization_config has no config_groups".to_owned()),
        _ => Err(
            "its layers are quantised in several ways (config_groups); one is supported".to_owned(),
        ),
    }
}

/// One of `config_groups`.
fn group_scheme(value: &Value) -> Result<Int4Scheme, String> {
    let weights = value
        .get("weights")
        .filter(|weights| weights.is_object())
        .ok_or("a group of its quantization_config has no weights")?;
    if value.get("input_activations").is_some_and(|v| !v.is_null()) {
        return Err(
            "its activations are quantised too (input_activations); weights alone are supported"
                .to_owned(),
        );
    }
    four_bits(weights.get("num_bits"))?;
    if let Some(kind) = weights.get("type").and_then(Value::as_str)
        && kind != "int"
    {
        return Err(format!(
            "its weights are 4 bits of type {kind}; int is supported"
        ));
    }
    let strategy = weights.get("strategy").and_then(Value::as_str);
    let group = match strategy {
        Some("channel") => None,
        Some("group") | None => group(weights.get("group_size"))?,
        Some(other) => {
            return Err(format!(
                "its weights have a scale for each {other}; group and channel are supported"
            ));
        }
    };
    // `weight` and `static` reorder before packing: the stored order is plain.
    let act_order = match weights.get("actorder") {
        None | Some(Value::Null) => false,
        Some(Value::String(order)) => !matches!(order.as_str(), "weight" | "static"),
        other => is_true(other),
    };
    Ok(Int4Scheme {
        source: Int4Source::CompressedTensors {
            symmetric: weights
                .get("symmetric")
                .is_none_or(|value| is_true(Some(value))),
        },
        group,
        act_order,
    })
}

fn first<'a>(config: &'a Value, names: &[&str]) -> Option<&'a Value> {
    names.iter().find_map(|name| config.get(name))
}

fn is_true(value: Option<&Value>) -> bool {
    value.and_then(Value::as_bool) == Some(true)
}

fn four_bits(bits: Option<&Value>) -> Result<(), String> {
    match bits.and_then(Value::as_u64) {
        Some(4) => Ok(()),
        Some(bits) => Err(format!(
            "its weights have {bits} bits; of quantised weights those with 4 are supported"
        )),
        None => Err("its quantization_config does not say how many bits weights have".to_owned()),
    }
}

/// −1 and nothing at all mean one group for a whole row.
fn group(size: Option<&Value>) -> Result<Option<usize>, String> {
    let Some(size) = size.filter(|size| !size.is_null()) else {
        return Ok(None);
    };
    if size.as_i64() == Some(-1) {
        return Ok(None);
    }
    let group = size.as_u64().and_then(|size| usize::try_from(size).ok());
    match group {
        Some(group) if group > 0 && group.is_multiple_of(GROUP_MULTIPLE) => Ok(Some(group)),
        _ => Err(format!(
            "its group_size is {size}; a multiple of {GROUP_MULTIPLE} is needed, or -1"
        )),
    }
}
