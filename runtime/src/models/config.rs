//! One [`ModelConfig`] for every model of the Llama family, from a Hugging Face `config.json` or from GGUF metadata.

use serde::Deserialize;

use super::registry::Architecture;
use crate::{
    engine::request::TokenId,
    model_runner::ModelCosts,
    weights::{Checkpoint, Fp8Scheme, Gguf, SafetensorsFolder, Scheme, WeightsError},
};

/// Largest value of any size in a configuration: far above every real model, far below overflow.
const MAX_SIZE: usize = 1 << 24;
/// Most layers.
const MAX_LAYERS: usize = 1024;

/// Sizes and constants of a model. All products of sizes fit a `usize`.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Its row in the registry.
    pub architecture: &'static Architecture,
    /// Width of the logits.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Values in a head, even.
    pub head_dim: usize,
    /// Added to the mean square in every RMS norm.
    pub rms_norm_eps: f32,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Longest sequence the model was made for.
    pub max_position: usize,
    /// Attention reaches back this many tokens, the row's own included, in every layer.
    pub sliding_window: Option<usize>,
    /// The output head is the embedding.
    pub tie_embeddings: bool,
    /// q, k and v must have a bias.
    pub qkv_bias: bool,
    /// How the matrices of the layers are quantised, in checkpoints of safetensors.
    pub quantization: Option<Scheme>,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<TokenId>,
}

/// Rotary position embedding over pairs `(i, i + head_dim/2)`.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// How they are stretched for longer contexts.
    pub scaling: RopeScaling,
}

/// Change to the rotary frequencies.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// All divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, the middle blended.
    Llama3 {
        /// The divisor.
        factor: f64,
        /// Below `original_max_position / low_freq_factor` wavelengths count as low.
        low_freq_factor: f64,
        /// Above `original_max_position / high_freq_factor` wavelengths count as high.
        high_freq_factor: f64,
        /// The context length before stretching.
        original_max_position: f64,
    },
    /// One divisor per frequency, as a checkpoint stores them.
    Factors(Vec<f32>),
}

impl RopeConfig {
    /// The angular frequency of each pair, `[head_dim / 2]`.
    #[must_use]
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f64> {
        let base = (0..head_dim / 2).map(|i| self.theta.powf(-((2 * i) as f64) / head_dim as f64));
        match &self.scaling {
            RopeScaling::None => base.collect(),
            RopeScaling::Linear { factor } => base.map(|freq| freq / factor).collect(),
            RopeScaling::Factors(factors) => base
                .zip(factors)
                .map(|(freq, factor)| freq / f64::from(*factor))
                .collect(),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position,
            } => {
                let stretch = |freq: f64| {
                    let wavelengths = original_max_position * freq / (2.0 * std::f64::consts::PI);
                    let blend =
                        (wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let blend = blend.clamp(0.0, 1.0);
                    (1.0 - blend) * freq / factor + blend * freq
                };
                base.map(stretch).collect()
            }
        }
    }
}

impl ModelConfig {
    /// The configuration of an open checkpoint.
    ///
    /// # Errors
    /// [`WeightsError`] when a needed value is absent, out of range, or names something this runtime does not do.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self, WeightsError> {
        let config = match checkpoint {
            Checkpoint::Gguf(gguf) => from_gguf(gguf)?,
            Checkpoint::Safetensors(folder) => from_hf(folder)?,
        };
        config
            .check()
            .map_err(|message| checkpoint.mismatch(message))?;
        Ok(config)
    }

    /// Where `on`, 16-bit matrices of the layers become eight-bit floats as they are loaded; quantised ones stay as they are.
    #[must_use]
    pub fn with_fp8(mut self, on: bool) -> Self {
        if on && self.quantization.is_none() {
            self.quantization = Some(Scheme::Fp8(Fp8Scheme::ONLINE));
        }
        self
    }

    /// Rows of the fused q, k, v matrix.
    #[must_use]
    pub fn qkv_size(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }

    /// Width of the attention's result.
    #[must_use]
    pub fn attention_size(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// What the model costs when its weights take so many bytes.
    #[must_use]
    pub fn costs(&self, weight_bytes: u64) -> ModelCosts {
        let size = |size: usize| size as f64;
        let (hidden, layers) = (size(self.hidden_size), size(self.num_layers));
        let projections = size(self.qkv_size() + self.attention_size());
        let mlp = 3.0 * size(self.intermediate_size);
        ModelCosts {
            weight_bytes,
            flops_per_token: 2.0 * layers * hidden * (projections + mlp),
            flops_per_output: 2.0 * hidden * size(self.vocab_size),
            // A product with a key, and one with a value.
            flops_per_attended: 4.0 * layers * size(self.attention_size()),
        }
    }

    fn check(&self) -> Result<(), String> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_layers", self.num_layers),
            ("num_heads", self.num_heads),
            ("num_kv_heads", self.num_kv_heads),
            ("head_dim", self.head_dim),
            ("max_position", self.max_position),
        ];
        let is_wrong = |size: usize| size == 0 || size > MAX_SIZE;
        // Its factors first: their product may not even be a number.
        let wrong = sizes.into_iter().find(|(_, size)| is_wrong(*size));
        let wrong = wrong.or_else(|| {
            let size = self.qkv_size();
            is_wrong(size).then_some(("qkv_size", size))
        });
        if let Some((name, size)) = wrong {
            return Err(format!(
                "{name} is {size}, and must be between 1 and {MAX_SIZE}"
            ));
        }
        if self.num_layers > MAX_LAYERS {
            return Err(format!(
                "it has {} layers, and {MAX_LAYERS} are the most",
                self.num_layers
            ));
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return Err(format!(
                "{} heads do not divide into {} KV heads",
                self.num_heads, self.num_kv_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(format!(
                "head_dim is {}, and rotary embedding needs it even",
                self.head_dim
            ));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            return Err(format!("the RMS norm's epsilon is {}", self.rms_norm_eps));
        }
        let frequencies = self.rope.inverse_frequencies(self.head_dim);
        if frequencies.len() != self.head_dim / 2
            || !frequencies
                .iter()
                .all(|freq| freq.is_finite() && *freq > 0.0)
        {
            return Err("the rotary embedding's base or scaling is out of range".to_owned());
        }
        Ok(())
    }
}

/// The fields read from `config.json`; the names are its own.
#[derive(Deserialize)]
struct HfConfig {
    architectures: Option<Vec<String>>,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: f32,
    rope_theta: Option<f64>,
    rope_scaling: Option<HfRope>,
    rope_parameters: Option<HfRope>,
    max_position_embeddings: usize,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    hidden_act: Option<String>,
    eos_token_id: Option<TokenIds>,
    quantization_config: Option<serde_json::Value>,
    /// What compressed-tensors called it at first.
    compression_config: Option<serde_json::Value>,
}

#[derive(Deserialize, Default, Clone)]
struct HfRope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    partial_rotary_factor: Option<f64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TokenIds {
    One(TokenId),
    Several(Vec<TokenId>),
}

impl TokenIds {
    fn into_vec(self) -> Vec<TokenId> {
        match self {
            Self::One(id) => vec![id],
            Self::Several(ids) => ids,
        }
    }
}

fn from_hf(folder: &SafetensorsFolder) -> Result<ModelConfig, WeightsError> {
    let hf = HfConfig::deserialize(folder.config()).map_err(|error| WeightsError::Malformed {
        path: folder.path().join("config.json").display().to_string(),
        format: "config.json",
        message: error.to_string(),
    })?;
    let class = hf
        .architectures
        .as_ref()
        .and_then(|classes| classes.first())
        .map_or("", String::as_str);
    let architecture = Architecture::from_hf(class)
        .ok_or_else(|| folder.unsupported(unknown_architecture(class)))?;
    let quantization = hf
        .quantization_config
        .as_ref()
        .or(hf.compression_config.as_ref())
        .filter(|config| !config.is_null())
        .map(Scheme::from_config)
        .transpose()
        .map_err(|message| folder.unsupported(message))?;
    if let Some(activation) = hf
        .hidden_act
        .as_deref()
        .filter(|activation| !matches!(*activation, "silu" | "swish"))
    {
        return Err(
            folder.unsupported(format!("its activation is {activation}; silu is supported"))
        );
    }
    let window_on = hf.use_sliding_window.unwrap_or(true);
    let sliding_window = hf.sliding_window.filter(|_| window_on);
    if sliding_window.is_some() && hf.max_window_layers.is_some_and(|layers| layers != 0) {
        let message = "its sliding window covers only some layers (max_window_layers); set use_sliding_window to false";
        return Err(folder.unsupported(message.to_owned()));
    }
    let mut eos_token_ids = hf.eos_token_id.map_or_else(Vec::new, TokenIds::into_vec);
    if let Some(ids) = folder
        .generation_config()
        .and_then(|config| config.get("eos_token_id"))
    {
        eos_token_ids
            .extend(TokenIds::deserialize(ids).map_or_else(|_| Vec::new(), TokenIds::into_vec));
    }
    eos_token_ids.sort_unstable();
    eos_token_ids.dedup();
    let head_dim = hf
        .head_dim
        .unwrap_or(hf.hidden_size / hf.num_attention_heads.max(1));
    let rope = hf.rope_parameters.or(hf.rope_scaling).unwrap_or_default();
    let theta = rope.rope_theta.or(hf.rope_theta).unwrap_or(10_000.0);
    let scaling = hf_scaling(&rope).map_err(|message| folder.unsupported(message))?;
    Ok(ModelConfig {
        architecture,
        vocab_size: hf.vocab_size,
        hidden_size: hf.hidden_size,
        intermediate_size: hf.intermediate_size,
        num_layers: hf.num_hidden_layers,
        num_heads: hf.num_attention_heads,
        num_kv_heads: hf.num_key_value_heads.unwrap_or(hf.num_attention_heads),
        head_dim,
        rms_norm_eps: hf.rms_norm_eps,
        rope: RopeConfig { theta, scaling },
        max_position: hf.max_position_embeddings,
        sliding_window,
        tie_embeddings: hf.tie_word_embeddings,
        qkv_bias: architecture.qkv_bias || hf.attention_bias,
        quantization,
        eos_token_ids,
    })
}

fn hf_scaling(rope: &HfRope) -> Result<RopeScaling, String> {
    if rope
        .partial_rotary_factor
        .is_some_and(|factor| factor != 1.0)
    {
        return Err(
            "its rotary embedding covers only part of each head (partial_rotary_factor)".to_owned(),
        );
    }
    let need =
        |value: Option<f64>, name: &str| value.ok_or_else(|| format!("rope_scaling lacks {name}"));
    match rope.rope_type.as_deref() {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear {
            factor: need(rope.factor, "factor")?,
        }),
        Some("llama3") => Ok(RopeScaling::Llama3 {
            factor: need(rope.factor, "factor")?,
            low_freq_factor: need(rope.low_freq_factor, "low_freq_factor")?,
            high_freq_factor: need(rope.high_freq_factor, "high_freq_factor")?,
            original_max_position: need(
                rope.original_max_position_embeddings,
                "original_max_position_embeddings",
            )?,
        }),
        Some(other) => Err(format!(
            "its rope_scaling is of type {other}; default, linear and llama3 are supported"
        )),
    }
}

fn unknown_architecture(name: &str) -> String {
    format!(
        "its architecture is {name:?}; supported are {}",
        Architecture::supported()
    )
}

fn from_gguf(gguf: &Gguf) -> Result<ModelConfig, WeightsError> {
    let name = gguf.architecture()?;
    let architecture = Architecture::from_gguf(name)
        .ok_or_else(|| gguf.unsupported(unknown_architecture(name)))?;
    let size = |key: &str| -> Result<Option<usize>, WeightsError> {
        Ok(gguf
            .u32(&format!("{name}.{key}"))?
            .map(|value| value as usize))
    };
    let need = |key: &str| -> Result<usize, WeightsError> {
        size(key)?.ok_or_else(|| gguf.malformed(format!("{name}.{key} is missing")))
    };
    let embedding = gguf.tensor("token_embd.weight");
    let embedding = embedding
        .ok_or_else(|| gguf.malformed("tensor token_embd.weight is missing".to_owned()))?;
    let hidden_size = need("embedding_length")?;
    let num_heads = need("attention.head_count")?;
    let head_dim = match size("attention.key_length")? {
        Some(dim) => dim,
        None => hidden_size / num_heads.max(1),
    };
    for (key, what) in [
        ("attention.value_length", "value heads"),
        ("rope.dimension_count", "rotary embedding"),
    ] {
        if let Some(other) = size(key)?.filter(|other| *other != head_dim) {
            return Err(gguf.unsupported(format!(
                "its {what} cover {other} of {head_dim} values in a head"
            )));
        }
    }
    if let Some(experts) = size("expert_count")?.filter(|experts| *experts > 0) {
        return Err(gguf.unsupported(format!(
            "it is a mixture of {experts} experts; dense models are supported"
        )));
    }
    let eps_key = format!("{name}.attention.layer_norm_rms_epsilon");
    let eps = gguf
        .f64(&eps_key)?
        .ok_or_else(|| gguf.malformed(format!("{eps_key} is missing")))?;
    let mut eos_token_ids = Vec::new();
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        eos_token_ids.extend(gguf.u32(&format!("tokenizer.ggml.{key}"))?);
    }
    eos_token_ids.sort_unstable();
    eos_token_ids.dedup();
    Ok(ModelConfig {
        architecture,
        vocab_size: embedding.rows(),
        hidden_size,
        intermediate_size: need("feed_forward_length")?,
        num_layers: need("block_count")?,
        num_heads,
        num_kv_heads: size("attention.head_count_kv")?.unwrap_or(num_heads),
        head_dim,
        rms_norm_eps: eps as f32,
        rope: RopeConfig {
            theta: gguf
                .f64(&format!("{name}.rope.freq_base"))?
                .unwrap_or(10_000.0),
            scaling: gguf_scaling(gguf, name)?,
        },
        max_position: need("context_length")?,
        sliding_window: size("attention.sliding_window")?.filter(|window| *window > 0),
        tie_embeddings: gguf.tensor("output.weight").is_none(),
        qkv_bias: architecture.qkv_bias,
        quantization: None,
        eos_token_ids,
    })
}

fn gguf_scaling(gguf: &Gguf, name: &str) -> Result<RopeScaling, WeightsError> {
    if let Some(tensor) = gguf.tensor("rope_freqs.weight") {
        if tensor.kind != crate::weights::GgmlType::F32 {
            return Err(gguf.malformed(format!(
                "rope_freqs.weight is stored as {:?}, not F32",
                tensor.kind
            )));
        }
        let factors = tensor
            .data
            .as_chunks::<4>()
            .0
            .iter()
            .map(|bytes| f32::from_le_bytes(*bytes));
        return Ok(RopeScaling::Factors(factors.collect()));
    }
    let factor = match gguf.f64(&format!("{name}.rope.scaling.factor"))? {
        Some(factor) => Some(factor),
        None => gguf.f64(&format!("{name}.rope.scale_linear"))?,
    };
    match (gguf.str(&format!("{name}.rope.scaling.type"))?, factor) {
        (Some("none"), _) | (None | Some("linear"), None) => Ok(RopeScaling::None),
        (None | Some("linear"), Some(1.0)) => Ok(RopeScaling::None),
        (None | Some("linear"), Some(factor)) => Ok(RopeScaling::Linear { factor }),
        (Some(other), _) => Err(gguf.unsupported(format!(
            "its rope scaling is of type {other}; none and linear are supported"
        ))),
    }
}

#[cfg(test)]
mod tests;
