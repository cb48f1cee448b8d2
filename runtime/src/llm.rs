//! A model that is loaded and running: tokenizer, chat template and engine together.
//!
//! [`Llm`] is the Rust caller's API; `ashlar serve` and `ashlar generate` stand on the same [`LoadedModel`].

mod device;
mod load;

use std::{collections::VecDeque, sync::Arc};

pub use load::{LoadError, LoadedModel, ModelOnDevice, max_length};

use crate::{
    config::EngineArgs,
    engine::{
        NoObserver, SubmitError,
        request::{FinishReason, Request, SamplingParams, TokenId},
    },
    generation::{TextOptions, TextStream},
    hub::Progress,
    tokenizer::TokenizerError,
};

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
