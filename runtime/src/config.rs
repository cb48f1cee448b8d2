//! The flags that describe a model and its engine, shared by `serve`, `generate`, `bench` and
//! [`Llm`](crate::llm::Llm).
//!
//! Names and meanings are vLLM's. Each flag has an `ASHLAR_…` variable; the command line wins.
//! What the flags contradict is refused here, before a byte of the model is read.

use std::path::PathBuf;

use clap::ValueEnum;

use crate::{model_runner::cpu, models::loader};

/// Most GPUs that serve a model.
const MAX_GPU_RANKS: u32 = 8;

/// Where the model computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Device {
    /// The best device that this build and this machine have.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// What the model computes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Dtype {
    /// As the checkpoint stores it, by the fastest kernels.
    #[default]
    Auto,
    /// Weights are dequantised and everything is computed in 32 bits: exact and slow.
    #[value(alias = "float")]
    Float32,
    /// 16-bit IEEE floats.
    #[value(alias = "half")]
    Float16,
    /// 16-bit brain floats.
    Bfloat16,
}

/// Where weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum LoadFormat {
    /// The model's files.
    #[default]
    Auto,
    /// Nowhere: random weights in the model's shapes, to measure speed. Needs config.json and a tokenizer only.
    Dummy,
}

impl From<LoadFormat> for loader::LoadFormat {
    fn from(format: LoadFormat) -> Self {
        match format {
            LoadFormat::Auto => Self::Auto,
            LoadFormat::Dummy => Self::Dummy,
        }
    }
}

/// How the checkpoint is quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Quantization {
    /// As the checkpoint says.
    #[default]
    Auto,
    /// Not quantised.
    None,
    /// AWQ, 4 bits.
    Awq,
    /// GPTQ, 4 bits.
    Gptq,
    /// 4 bits in compressed-tensors' pack-quantized format.
    CompressedTensors,
    /// 8-bit floats.
    Fp8,
    /// A GGUF file.
    Gguf,
}

/// What the KV cache stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum KvCacheDtype {
    /// The type that the model computes in.
    #[default]
    Auto,
    /// 8-bit floats (e4m3), scaled as the checkpoint says, or not at all.
    #[value(alias = "fp8_e4m3")]
    Fp8,
}

/// Why the flags cannot be used together, or not by this build.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A flag asks for a GPU.
    #[error(
        "{flag} needs a GPU, and this build has no CUDA or this machine no GPU: use the CUDA image on a GPU, or --device cpu"
    )]
    NoCuda {
        /// The flag with its value.
        flag: String,
    },
    /// A flag asks for something that the GPU backend does not do.
    #[error("{flag} cannot be used on the GPU: {hint}")]
    NotOnGpu {
        /// The flag with its value.
        flag: String,
        /// What to use instead.
        hint: &'static str,
    },
    /// A flag asks for something that the CPU backend does not do.
    #[error("{flag} cannot be used on the CPU: {hint}")]
    NotOnCpu {
        /// The flag with its value.
        flag: String,
        /// What to use instead.
        hint: &'static str,
    },
    /// A value is outside its range.
    #[error("{flag} is {value}: it must be {allowed}")]
    OutOfRange {
        /// The flag.
        flag: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        allowed: &'static str,
    },
    /// Two flags contradict each other.
    #[error("{message}")]
    Contradiction {
        /// Which two, and what to do.
        message: String,
    },
}

/// Which model, and how its engine runs it.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Model and engine")]
pub struct EngineArgs {
    /// Model: a folder in the Hugging Face layout or with one .gguf file, a .gguf file, or hf://OWNER/NAME
    #[arg(env = "ASHLAR_MODEL", value_name = "MODEL")]
    pub model: String,
    /// Commit, branch or tag of a model on the hub [default: main]
    #[arg(long, env = "ASHLAR_REVISION", value_name = "REVISION")]
    pub revision: Option<String>,
    /// Folder for downloaded models [default: $XDG_CACHE_HOME/ashlar or ~/.cache/ashlar]
    #[arg(long, env = "ASHLAR_DOWNLOAD_DIR", value_name = "FOLDER")]
    pub download_dir: Option<PathBuf>,
    /// Folder or tokenizer.json to take the tokenizer from, instead of the model's own
    #[arg(long, env = "ASHLAR_TOKENIZER", value_name = "PATH")]
    pub tokenizer: Option<PathBuf>,
    /// File with a Jinja chat template, instead of the model's own
    #[arg(long, env = "ASHLAR_CHAT_TEMPLATE", value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
    /// Where to compute
    #[arg(long, env = "ASHLAR_DEVICE", value_enum, default_value_t)]
    pub device: Device,
    /// Where the weights come from
    #[arg(long, env = "ASHLAR_LOAD_FORMAT", value_enum, default_value_t)]
    pub load_format: LoadFormat,
    /// What to compute in; float32 dequantises exactly, for comparisons
    #[arg(long, env = "ASHLAR_DTYPE", value_enum, default_value_t)]
    pub dtype: Dtype,
    /// How the checkpoint is quantised; anything but auto must agree with the checkpoint
    #[arg(
        long,
        short = 'q',
        env = "ASHLAR_QUANTIZATION",
        value_enum,
        default_value_t
    )]
    pub quantization: Quantization,
    /// Longest prompt and output together, in tokens: 4096, 32k (32,000) or 32K (32,768) [default: the model's own]
    #[arg(long, env = "ASHLAR_MAX_MODEL_LEN", value_name = "TOKENS", value_parser = parse_u32)]
    pub max_model_len: Option<u32>,
    /// Most sequences that run at once [default: 256 on the CPU, 1024 on a GPU]
    #[arg(long, env = "ASHLAR_MAX_NUM_SEQS", value_name = "N", value_parser = parse_u32)]
    pub max_num_seqs: Option<u32>,
    /// Most tokens in one step, prompts and outputs together [default: 512 on the CPU, 8192 on a GPU]
    #[arg(long, env = "ASHLAR_MAX_NUM_BATCHED_TOKENS", value_name = "TOKENS", value_parser = parse_u32)]
    pub max_num_batched_tokens: Option<u32>,
    /// Most prompt tokens of one sequence in one step; 0 = no limit
    #[arg(long, env = "ASHLAR_LONG_PREFILL_TOKEN_THRESHOLD", value_name = "TOKENS", value_parser = parse_u32, default_value = "0")]
    pub long_prefill_token_threshold: u32,
    /// Requests that may wait for a place; one more is answered 429
    #[arg(long, env = "ASHLAR_MAX_NUM_QUEUED_REQS", value_name = "N", value_parser = parse_u32, default_value = "1024")]
    pub max_num_queued_reqs: u32,
    /// Tokens in one block of the KV cache; 16 on the CPU
    #[arg(long, env = "ASHLAR_BLOCK_SIZE", value_name = "TOKENS", value_parser = parse_u32, default_value = "16")]
    pub block_size: u32,
    /// What the KV cache stores
    #[arg(long, env = "ASHLAR_KV_CACHE_DTYPE", value_enum, default_value_t)]
    pub kv_cache_dtype: KvCacheDtype,
    /// Memory of the KV cache in bytes: 4G = 4·2³⁰, 4g = 4·10⁹ [default on the CPU: what --max-num-seqs needs, at most
    /// a quarter of the memory]
    #[arg(long, env = "ASHLAR_KV_CACHE_MEMORY_BYTES", value_name = "BYTES", value_parser = parse_size)]
    pub kv_cache_memory_bytes: Option<u64>,
    /// Share of the GPU's memory to use, above 0 and up to 1; not used on the CPU
    #[arg(
        long,
        env = "ASHLAR_GPU_MEMORY_UTILIZATION",
        value_name = "SHARE",
        default_value_t = 0.9
    )]
    pub gpu_memory_utilization: f64,
    /// GPUs that share the model; on the CPU, groups of threads that do so as GPUs would
    #[arg(long, visible_alias = "tp", env = "ASHLAR_TENSOR_PARALLEL_SIZE", value_name = "N", value_parser = parse_u32, default_value = "1")]
    pub tensor_parallel_size: u32,
    /// Reuse the KV cache of equal prompt beginnings (the default)
    #[arg(long, env = "ASHLAR_ENABLE_PREFIX_CACHING", overrides_with = "no_enable_prefix_caching", default_value_t = true, default_missing_value = "true", num_args = 0..=1, require_equals = true, action = clap::ArgAction::Set)]
    pub enable_prefix_caching: bool,
    /// Compute every prompt from its first token
    #[arg(
        long,
        env = "ASHLAR_NO_ENABLE_PREFIX_CACHING",
        overrides_with = "enable_prefix_caching"
    )]
    pub no_enable_prefix_caching: bool,
    /// Keep no 16-bit copy of quantised weights: more KV cache, slower prompts. Without this flag a GPU keeps one, for products
    /// with many rows, where it takes at most an eighth of the KV cache's memory
    #[arg(long, env = "ASHLAR_QUANTIZED_WEIGHTS_ONLY")]
    pub quantized_weights_only: bool,
    /// Do without CUDA graphs; nothing to do without on the CPU
    #[arg(long, env = "ASHLAR_ENFORCE_EAGER")]
    pub enforce_eager: bool,
    /// Give a request the same logits and tokens, bit for bit, whatever else runs, however its prompt is cut, and from the prefix
    /// cache or not; slower on a GPU. On the CPU it is so with this flag and without
    #[arg(long, env = "ASHLAR_BATCH_INVARIANT")]
    pub batch_invariant: bool,
    /// Seeds requests that bring no seed
    #[arg(long, env = "ASHLAR_SEED", value_name = "SEED", default_value_t = 0)]
    pub seed: u64,
}

impl EngineArgs {
    /// Every flag at its default, for this model.
    #[must_use]
    pub fn new(model: impl Into<String>) -> Self {
        Self {
            model: model.into(),
            revision: None,
            download_dir: None,
            tokenizer: None,
            chat_template: None,
            device: Device::Auto,
            load_format: LoadFormat::Auto,
            dtype: Dtype::Auto,
            quantization: Quantization::Auto,
            max_model_len: None,
            max_num_seqs: None,
            max_num_batched_tokens: None,
            long_prefill_token_threshold: 0,
            max_num_queued_reqs: 1024,
            block_size: 16,
            kv_cache_dtype: KvCacheDtype::Auto,
            kv_cache_memory_bytes: None,
            gpu_memory_utilization: 0.9,
            tensor_parallel_size: 1,
            enable_prefix_caching: true,
            no_enable_prefix_caching: false,
            quantized_weights_only: false,
            enforce_eager: false,
            batch_invariant: false,
            seed: 0,
        }
    }

    /// Prefix caching after both of its flags.
    #[must_use]
    pub fn prefix_caching(&self) -> bool {
        self.enable_prefix_caching && !self.no_enable_prefix_caching
    }

    /// Refuses values outside their range, flags that contradict each other, and what this build cannot do.
    ///
    /// # Errors
    /// [`ConfigError`] naming the flag and what to use instead.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let sizes = [
            ("--max-model-len", self.max_model_len),
            ("--max-num-seqs", self.max_num_seqs),
            ("--max-num-batched-tokens", self.max_num_batched_tokens),
            ("--max-num-queued-reqs", Some(self.max_num_queued_reqs)),
            ("--block-size", Some(self.block_size)),
            ("--tensor-parallel-size", Some(self.tensor_parallel_size)),
        ];
        for (flag, value) in sizes {
            if value == Some(0) {
                return Err(ConfigError::OutOfRange {
                    flag,
                    value: "0".to_owned(),
                    allowed: "at least 1",
                });
            }
        }
        let share = self.gpu_memory_utilization;
        if !(share > 0.0 && share <= 1.0) {
            return Err(ConfigError::OutOfRange {
                flag: "--gpu-memory-utilization",
                value: share.to_string(),
                allowed: "above 0 and at most 1",
            });
        }
        if let (Some(seqs), Some(tokens)) = (self.max_num_seqs, self.max_num_batched_tokens)
            && seqs > tokens
        {
            return Err(ConfigError::Contradiction {
                message: format!(
                    "--max-num-seqs {seqs} is more than --max-num-batched-tokens {tokens}: every running sequence \
                     needs one token of a step, so lower the first or raise the second"
                ),
            });
        }
        self.validate_device()
    }

    fn validate_device(&self) -> Result<(), ConfigError> {
        if cfg!(feature = "cuda") {
            match self.device {
                Device::Cpu => self.validate_for_cpu(),
                Device::Cuda => self.validate_for_gpu(),
                // Which it will be is known once a GPU was looked for.
                Device::Auto => Ok(()),
            }
        } else if self.device == Device::Cuda {
            Err(ConfigError::NoCuda {
                flag: "--device cuda".to_owned(),
            })
        } else {
            self.validate_for_cpu()
        }
    }

    /// Refuses what the GPU backend does not do.
    ///
    /// # Errors
    /// [`ConfigError`] naming the flag and what to use instead.
    pub fn validate_for_gpu(&self) -> Result<(), ConfigError> {
        let refuse = |flag: String, hint| Err(ConfigError::NotOnGpu { flag, hint });
        if self.tensor_parallel_size > MAX_GPU_RANKS {
            let flag = format!("--tensor-parallel-size {}", self.tensor_parallel_size);
            return refuse(flag, "at most 8 GPUs of one machine serve a model");
        }
        if self.dtype == Dtype::Float32 {
            let flag = "--dtype float32".to_owned();
            return refuse(flag, "use auto, bfloat16 or float16, or --device cpu");
        }
        if self.block_size != cpu::BLOCK_SIZE {
            return refuse(format!("--block-size {}", self.block_size), "use 16");
        }
        Ok(())
    }

    /// Refuses what the CPU backend does not do.
    ///
    /// # Errors
    /// [`ConfigError`] naming the flag and what to use instead.
    pub fn validate_for_cpu(&self) -> Result<(), ConfigError> {
        // Whoever asks for several devices means GPUs, unless it is said.
        if self.tensor_parallel_size > 1 && self.device != Device::Cpu {
            let flag = format!("--tensor-parallel-size {}", self.tensor_parallel_size);
            return Err(ConfigError::NoCuda { flag });
        }
        if let dtype @ (Dtype::Float16 | Dtype::Bfloat16) = self.dtype {
            return Err(ConfigError::NotOnCpu {
                flag: format!("--dtype {}", value_name(dtype)),
                hint: "use auto (fast) or float32 (exact)",
            });
        }
        if self.block_size != cpu::BLOCK_SIZE {
            return Err(ConfigError::NotOnCpu {
                flag: format!("--block-size {}", self.block_size),
                hint: "use 16",
            });
        }
        Ok(())
    }
}

/// How a flag's value is written.
pub(crate) fn value_name(value: impl ValueEnum) -> String {
    value
        .to_possible_value()
        .map_or_else(String::new, |value| value.get_name().to_owned())
}

/// Reads `4096`, `32k` (·10³), `32K` (·2¹⁰), `1.5G`, …: a small letter counts in thousands, a capital in 1,024s.
///
/// # Errors
/// In words, what is wrong with the text.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let expected = || format!("{text:?} is not a number such as 4096, 32k, 32K or 1.5G");
    let (digits, unit) = match text.char_indices().last() {
        Some((at, last)) if last.is_ascii_alphabetic() => (&text[..at], Some(last)),
        _ => (text, None),
    };
    let scale: u64 = match unit {
        None => 1,
        Some('k') => 1_000,
        Some('m') => 1_000_000,
        Some('g') => 1_000_000_000,
        Some('t') => 1_000_000_000_000,
        Some('K') => 1 << 10,
        Some('M') => 1 << 20,
        Some('G') => 1 << 30,
        Some('T') => 1 << 40,
        Some(_) => return Err(expected()),
    };
    if let Ok(whole) = digits.parse::<u64>() {
        return whole
            .checked_mul(scale)
            .ok_or_else(|| format!("{text:?} is too large"));
    }
    // A fraction only makes sense with a unit, and must come to a whole number.
    let fraction: f64 = match digits.parse() {
        Ok(value) if unit.is_some() && digits.contains('.') => value,
        _ => return Err(expected()),
    };
    let value = fraction * scale as f64;
    if (0.0..1e18).contains(&value) {
        Ok(value.round() as u64)
    } else {
        Err(expected())
    }
}

/// [`parse_size`] for values that fit 32 bits.
///
/// # Errors
/// In words, what is wrong with the text.
pub fn parse_u32(text: &str) -> Result<u32, String> {
    u32::try_from(parse_size(text)?).map_err(|_| format!("{text:?} is too large"))
}

#[cfg(test)]
mod tests;
