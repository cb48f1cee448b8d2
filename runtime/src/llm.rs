//! A model that is loaded and running: tokenizer, chat template and engine together.
//!
//! [`Llm`] is the Rust caller's API; `ashlar serve` and `ashlar generate` stand on the same [`LoadedModel`].

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    chat_template::{ChatTemplate, ChatTemplateError},
    config::{self, ConfigError, Dtype, EngineArgs, KvCacheDtype, Quantization},
    engine::{
        Engine, EngineConfig, EngineHandle, EngineObserver, NoObserver, StartError, SubmitError,
        request::{FinishReason, Request, SamplingParams, TokenId},
    },
    generation::{TextOptions, TextStream},
    hub::{self, HubError, Progress},
    model_runner::{
        ModelRunner,
        cpu::{self, CpuRunner, CpuRunnerConfig, CpuRunnerError, KvCacheSize, KvDtype},
    },
    models::{config::ModelConfig, loader},
    tokenizer::{Tokenizer, TokenizerError},
    weights::{Checkpoint, Fp8Source, Int4Source, Scheme, WeightsError},
};
#[cfg(feature = "cuda")]
use crate::{
    config::Device,
    model_runner::cuda::{self, CudaError, CudaRunner, CudaRunnerConfig, CudaRunnerError, Float},
};

/// Default of `--max-num-seqs`.
const MAX_NUM_SEQS: u32 = 256;
/// Default of `--max-num-batched-tokens` on the CPU: a step of so many prompt tokens delays running outputs by a
/// fraction of a second on a small machine, and is large enough for the weights to be read once for many rows.
const CPU_MAX_NUM_BATCHED_TOKENS: u32 = 512;

/// Default of `--max-num-seqs` on a GPU.
#[cfg(feature = "cuda")]
const GPU_MAX_NUM_SEQS: u32 = 1024;
/// Default of `--max-num-batched-tokens` on a GPU: enough rows to reach its full rate.
#[cfg(feature = "cuda")]
const GPU_MAX_NUM_BATCHED_TOKENS: u32 = 8192;

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

/// A model on a device.
struct Loaded {
    runner: Box<dyn ModelRunner>,
    eos_token_ids: Vec<TokenId>,
}

/// On the device that was asked for; `auto` is a GPU where this build and this machine have one.
fn load_runner(args: &EngineArgs, path: &Path) -> Result<Loaded, LoadError> {
    #[cfg(feature = "cuda")]
    if args.device != Device::Cpu {
        match load_on_gpu(args, path) {
            Err(LoadError::GpuRunner(CudaRunnerError::Cuda(
                error @ CudaError::NoDevice { .. },
            ))) if args.device == Device::Auto => {
                tracing::info!(%error, "the model runs on the CPU");
            }
            result => return result,
        }
    }
    args.validate_for_cpu()?;
    load_on_cpu(args, path)
}

fn load_on_cpu(args: &EngineArgs, path: &Path) -> Result<Loaded, LoadError> {
    let max_num_batched_tokens = args
        .max_num_batched_tokens
        .unwrap_or(CPU_MAX_NUM_BATCHED_TOKENS);
    let config = CpuRunnerConfig {
        path: path.to_owned(),
        load_format: args.load_format.into(),
        dtype: match args.dtype {
            Dtype::Float32 => cpu::Dtype::Float32,
            Dtype::Auto | Dtype::Float16 | Dtype::Bfloat16 => cpu::Dtype::Auto,
        },
        quantize_fp8: args.quantization == Quantization::Fp8,
        kv_dtype: match args.kv_cache_dtype {
            KvCacheDtype::Auto => KvDtype::Auto,
            KvCacheDtype::Fp8 => KvDtype::Fp8,
        },
        kv_cache: args
            .kv_cache_memory_bytes
            .map_or(KvCacheSize::Auto, KvCacheSize::Bytes),
        max_num_seqs: args
            .max_num_seqs
            .unwrap_or(MAX_NUM_SEQS.min(max_num_batched_tokens)),
        max_num_batched_tokens,
        max_model_len: args.max_model_len,
        ..CpuRunnerConfig::default()
    };
    if args.tensor_parallel_size > 1 {
        let runner = CpuRunner::on_ranks(&config, args.tensor_parallel_size as usize)?;
        return Ok(Loaded {
            eos_token_ids: runner.leader().model_config().eos_token_ids.clone(),
            runner: Box::new(runner),
        });
    }
    let runner = CpuRunner::new(&config)?;
    Ok(Loaded {
        eos_token_ids: runner.model_config().eos_token_ids.clone(),
        runner: Box::new(runner),
    })
}

#[cfg(feature = "cuda")]
fn load_on_gpu(args: &EngineArgs, path: &Path) -> Result<Loaded, LoadError> {
    // Before the flags: without a GPU, `auto` goes on with the CPU's.
    cuda::probe()?;
    args.validate_for_gpu()?;
    let max_num_batched_tokens = args
        .max_num_batched_tokens
        .unwrap_or(GPU_MAX_NUM_BATCHED_TOKENS);
    let config = CudaRunnerConfig {
        path: path.to_owned(),
        load_format: args.load_format.into(),
        dtype: match args.dtype {
            Dtype::Float16 => Some(Float::F16),
            Dtype::Bfloat16 => Some(Float::Bf16),
            Dtype::Auto | Dtype::Float32 => None,
        },
        quantize_fp8: args.quantization == Quantization::Fp8,
        kv_dtype: match args.kv_cache_dtype {
            KvCacheDtype::Auto => cuda::KvDtype::Float,
            KvCacheDtype::Fp8 => cuda::KvDtype::Fp8,
        },
        ordinal: 0,
        gpu_memory_utilization: args.gpu_memory_utilization,
        kv_cache_memory_bytes: args.kv_cache_memory_bytes,
        max_num_seqs: args
            .max_num_seqs
            .unwrap_or(GPU_MAX_NUM_SEQS.min(max_num_batched_tokens)),
        max_num_batched_tokens,
        max_model_len: args.max_model_len,
        enforce_eager: args.enforce_eager,
        batch_invariant: args.batch_invariant,
    };
    let ranks = args.tensor_parallel_size as usize;
    if ranks > 1 {
        let runner = CudaRunner::on_ranks(&config, &(0..ranks).collect::<Vec<_>>())?;
        return Ok(Loaded {
            eos_token_ids: runner.leader().model_config().eos_token_ids.clone(),
            runner: Box::new(runner),
        });
    }
    let runner = CudaRunner::new(&config)?;
    Ok(Loaded {
        eos_token_ids: runner.model_config().eos_token_ids.clone(),
        runner: Box::new(runner),
    })
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

/// Why a text could not be generated.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// A prompt could not be tokenised.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A prompt does not fit, or the engine has stopped.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// The engine failed this request.
    #[error("the request failed: {0}")]
    Failed(String),
}

/// What a prompt was completed with.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// The text, without the prompt.
    pub text: String,
    /// Its tokens.
    pub token_ids: Vec<TokenId>,
    /// Tokens of the prompt.
    pub num_prompt_tokens: usize,
    /// Of these, taken from the prefix cache.
    pub num_cached_tokens: u32,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// A model in this process.
///
/// ```no_run
/// use ashlar::{config::EngineArgs, engine::request::SamplingParams, llm::Llm};
///
/// let llm = Llm::new(EngineArgs::new("model.gguf"))?;
/// let params = SamplingParams { temperature: 0.0, max_tokens: 32, ..SamplingParams::default() };
/// for completion in llm.generate(&["The capital of France is"], &params)? {
///     println!("{}", completion.text);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Llm {
    model: LoadedModel,
}

impl Llm {
    /// Loads a model.
    ///
    /// # Errors
    /// [`LoadError`] saying what to change.
    pub fn new(args: EngineArgs) -> Result<Self, LoadError> {
        let observer = Arc::new(NoObserver);
        LoadedModel::load(&args, observer, &Progress::silent()).map(|model| Self { model })
    }

    /// The model behind it.
    #[must_use]
    pub fn model(&self) -> &LoadedModel {
        &self.model
    }

    /// Completes all prompts, batched together; results are in the prompts' order. Output is cut short where prompt
    /// and `max_tokens` exceed the model's length.
    ///
    /// # Errors
    /// [`GenerateError`] of the first prompt that failed.
    pub fn generate<S: AsRef<str>>(
        &self,
        prompts: &[S],
        params: &SamplingParams,
    ) -> Result<Vec<Completion>, GenerateError> {
        self.generate_with(prompts, params, &TextOptions::default())
    }

    /// [`generate`](Self::generate) with stop strings and the like.
    ///
    /// # Errors
    /// [`GenerateError`] of the first prompt that failed.
    pub fn generate_with<S: AsRef<str>>(
        &self,
        prompts: &[S],
        params: &SamplingParams,
        options: &TextOptions,
    ) -> Result<Vec<Completion>, GenerateError> {
        let mut running: VecDeque<(usize, TextStream)> = VecDeque::new();
        let mut done = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let tokens = self.model.tokenizer.encode(prompt.as_ref(), true)?;
            let num_prompt_tokens = tokens.len();
            let room = u64::from(self.model.max_length()).saturating_sub(num_prompt_tokens as u64);
            let mut params = params.clone();
            // A prompt that leaves no room is refused by the engine, with the numbers.
            let room = u32::try_from(room).unwrap_or(u32::MAX).max(1);
            params.max_tokens = params.max_tokens.min(room);
            let request = Request::new(tokens, params.clone());
            let stream = loop {
                match self.model.engine.submit(request.clone()) {
                    Err(SubmitError::QueueFull { .. }) => match running.pop_front() {
                        Some((prompt_tokens, stream)) => done.push(collect(prompt_tokens, stream)?),
                        // Others fill the queue.
                        None => std::thread::yield_now(),
                    },
                    other => break other?,
                }
            };
            let tokenizer = Arc::clone(&self.model.tokenizer);
            let stream = TextStream::new(stream, tokenizer, &params, options);
            running.push_back((num_prompt_tokens, stream));
        }
        for (prompt_tokens, stream) in running {
            done.push(collect(prompt_tokens, stream)?);
        }
        Ok(done)
    }
}

impl Drop for Llm {
    fn drop(&mut self) {
        self.model.engine.shutdown();
        // A failure was already told to every request.
        let _ = self.model.engine.join_blocking();
    }
}

fn collect(num_prompt_tokens: usize, mut stream: TextStream) -> Result<Completion, GenerateError> {
    let mut completion = Completion {
        text: String::new(),
        token_ids: Vec::new(),
        num_prompt_tokens,
        num_cached_tokens: 0,
        finish_reason: FinishReason::Abort,
    };
    while let Some(update) = stream.next_blocking() {
        completion.text.push_str(&update.text());
        completion
            .token_ids
            .extend(update.tokens.iter().map(|token| token.id));
        completion.num_cached_tokens = update.cached_prompt_tokens;
        if let Some(finish) = update.finish {
            completion.finish_reason = finish.reason;
            if finish.reason == FinishReason::Error {
                let message = finish.error.unwrap_or_else(|| "unknown reason".to_owned());
                return Err(GenerateError::Failed(message));
            }
        }
    }
    Ok(completion)
}
