//! From a model's name to a model that runs: files, tokenizer, chat template, device, engine.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use super::device::{Loaded, load_runner};
#[cfg(feature = "cuda")]
use crate::model_runner::cuda::CudaRunnerError;
use crate::{
    chat_template::{ChatTemplate, ChatTemplateError},
    config::{self, ConfigError, EngineArgs, Quantization},
    engine::{Engine, EngineConfig, EngineHandle, EngineObserver, StartError},
    hub::{self, HubError, Progress},
    model_runner::{ModelRunner, cpu::CpuRunnerError},
    models::{config::ModelConfig, loader},
    tokenizer::{Tokenizer, TokenizerError},
    weights::{Checkpoint, Fp8Source, Int4Source, Scheme, WeightsError},
};

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The flags contradict each other or this build.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The model is not on this machine and cannot be had.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template cannot be used.
    #[error(transparent)]
    ChatTemplate(#[from] ChatTemplateError),
    /// A file named by a flag cannot be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// `--quantization` disagrees with the checkpoint.
    #[error(
        "--quantization {asked} does not agree with {path}, which is {found}: use --quantization auto"
    )]
    Quantization {
        /// What was asked.
        asked: String,
        /// The model.
        path: String,
        /// What it is.
        found: &'static str,
    },
    /// The model's files cannot be used.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The model cannot be run.
    #[error(transparent)]
    Runner(#[from] CpuRunnerError),
    /// The model cannot be run on the GPU.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    GpuRunner(#[from] CudaRunnerError),
    /// The engine could not start.
    #[error(transparent)]
    Start(#[from] StartError),
}

/// A running model.
#[derive(Debug, Clone)]
pub struct LoadedModel {
    /// The local path it was loaded from.
    pub path: PathBuf,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Its chat template, where it has one.
    pub chat_template: Option<Arc<ChatTemplate>>,
    /// Its engine.
    pub engine: EngineHandle,
}

impl LoadedModel {
    /// Finds the model (downloading it if the name is a hub address), loads it and starts its engine, which tells
    /// `observer` what it does. Blocks: call it outside async tasks.
    ///
    /// # Errors
    /// [`LoadError`] saying what to change.
    pub fn load(
        args: &EngineArgs,
        observer: Arc<dyn EngineObserver>,
        progress: &Progress,
    ) -> Result<Self, LoadError> {
        let (path, tokenizer) = resolve(args, progress)?;
        let chat_template = load_template(args, &tokenizer)?;
        let Loaded {
            runner,
            mut eos_token_ids,
        } = load_runner(args, &path)?;
        let limits = runner.limits();
        let (max_num_seqs, max_num_batched_tokens) =
            (limits.max_num_seqs, limits.max_num_batched_tokens);
        eos_token_ids.extend_from_slice(tokenizer.eos_token_ids());
        eos_token_ids.sort_unstable();
        eos_token_ids.dedup();
        let config = EngineConfig {
            max_num_seqs,
            max_num_batched_tokens,
            long_prefill_token_threshold: args.long_prefill_token_threshold,
            enable_prefix_caching: args.prefix_caching(),
            max_num_queued_reqs: args.max_num_queued_reqs,
            seed: args.seed,
            eos_token_ids,
            ..EngineConfig::default()
        };
        Ok(Self {
            path,
            tokenizer,
            chat_template,
            engine: Engine::start_observed(runner, config, observer)?,
        })
    }

    /// Longest prompt and output together that this engine can ever hold, in tokens.
    #[must_use]
    pub fn max_length(&self) -> u32 {
        max_length(&self.engine)
    }
}

/// `max_model_len`, or what the whole KV cache holds if that is less.
#[must_use]
pub fn max_length(engine: &EngineHandle) -> u32 {
    let limits = engine.limits();
    let pool = u64::from(limits.num_blocks.saturating_sub(1)) * u64::from(limits.block_size);
    u32::try_from(pool).map_or(limits.max_model_len, |pool| pool.min(limits.max_model_len))
}

/// A model on a device without an engine, for what needs its logits.
pub struct ModelOnDevice {
    /// The local path it was loaded from.
    pub path: PathBuf,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// What computes its steps.
    pub runner: Box<dyn ModelRunner>,
}

impl ModelOnDevice {
    /// Finds and loads the model as [`LoadedModel::load`] does.
    ///
    /// # Errors
    /// [`LoadError`] saying what to change.
    pub fn open(args: &EngineArgs, progress: &Progress) -> Result<Self, LoadError> {
        let (path, tokenizer) = resolve(args, progress)?;
        let Loaded { runner, .. } = load_runner(args, &path)?;
        Ok(Self {
            path,
            tokenizer,
            runner,
        })
    }
}

/// Finds the model (downloading it if the name is a hub address) and reads its tokenizer.
fn resolve(args: &EngineArgs, progress: &Progress) -> Result<(PathBuf, Arc<Tokenizer>), LoadError> {
    args.validate()?;
    let path = hub::resolve_model(
        &args.model,
        args.revision.as_deref(),
        args.download_dir.as_deref(),
        progress,
    )?;
    check_quantization(args.quantization, &path)?;
    let tokenizer = Tokenizer::from_model_path(args.tokenizer.as_deref().unwrap_or(&path))?;
    Ok((path, Arc::new(tokenizer)))
}

/// `--quantization` names what the checkpoint is, or nothing: it never picks another way to run it. Only `fp8` does something
/// to a checkpoint that is not quantised.
fn check_quantization(asked: Quantization, path: &Path) -> Result<(), LoadError> {
    if asked == Quantization::Auto {
        return Ok(());
    }
    let checkpoint = Checkpoint::open_for(path, loader::LoadFormat::Dummy)?;
    let (found, agrees) = match &checkpoint {
        Checkpoint::Gguf(_) => ("a GGUF file", asked == Quantization::Gguf),
        Checkpoint::Safetensors(_) => {
            match ModelConfig::from_checkpoint(&checkpoint)?.quantization {
                None => (
                    "not quantised",
                    matches!(asked, Quantization::None | Quantization::Fp8),
                ),
                Some(Scheme::Fp8(scheme)) => (
                    "in 8-bit floats",
                    asked == Quantization::Fp8
                        || (scheme.source == Fp8Source::CompressedTensors
                            && asked == Quantization::CompressedTensors),
                ),
                Some(Scheme::Int4(scheme)) => match scheme.source {
                    Int4Source::Awq => ("AWQ", asked == Quantization::Awq),
                    Int4Source::Gptq { .. } => ("GPTQ", asked == Quantization::Gptq),
                    Int4Source::CompressedTensors { .. } => (
                        "in compressed-tensors' 4 bits",
                        asked == Quantization::CompressedTensors,
                    ),
                },
            }
        }
    };
    if agrees {
        return Ok(());
    }
    Err(LoadError::Quantization {
        asked: config::value_name(asked),
        path: path.display().to_string(),
        found,
    })
}

fn load_template(
    args: &EngineArgs,
    tokenizer: &Tokenizer,
) -> Result<Option<Arc<ChatTemplate>>, LoadError> {
    let source = match &args.chat_template {
        Some(file) => Some(
            std::fs::read_to_string(file).map_err(|source| LoadError::Io {
                path: file.display().to_string(),
                source,
            })?,
        ),
        None => tokenizer.chat_template().map(str::to_owned),
    };
    match source {
        Some(source) => Ok(Some(Arc::new(ChatTemplate::new(source, tokenizer)?))),
        None => Ok(None),
    }
}
