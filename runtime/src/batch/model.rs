//! A loaded model as the [`Generator`] of a batch: the same checks, tokenizer and engine as the server's.

use std::sync::Arc;

use super::{Answer, BatchRequest, Generator, OneOrMany, Prompt, Usage};
use crate::{
    chat_template::ChatInput,
    engine::request::{FinishReason, Request, TokenId},
    generation::TextStream,
    http::sampling::{self, Limits, Sampling, SamplingFields},
    llm::LoadedModel,
};

/// Answers lines with a model.
#[derive(Debug, Clone)]
pub struct ModelGenerator {
    model: Arc<LoadedModel>,
    /// `max_tokens` of lines that name none.
    max_tokens: u32,
}

impl ModelGenerator {
    /// A generator over `model`.
    #[must_use]
    pub fn new(model: LoadedModel, max_tokens: u32) -> Self {
        Self {
            model: Arc::new(model),
            max_tokens,
        }
    }

    fn limits(&self) -> Limits {
        Limits {
            max_length: self.model.max_length(),
            vocab_size: self.model.engine.limits().vocab_size,
        }
    }

    fn sampling(&self, request: &mut BatchRequest) -> Result<Sampling, String> {
        let wide = |value: Option<f32>| value.map(f64::from);
        let fields = SamplingFields {
            temperature: wide(request.temperature),
            top_p: wide(request.top_p),
            top_k: request.top_k,
            min_p: wide(request.min_p),
            seed: request.seed.map(u64::cast_signed),
            repetition_penalty: wide(request.repetition_penalty),
            presence_penalty: wide(request.presence_penalty),
            frequency_penalty: wide(request.frequency_penalty),
            max_tokens: Some(request.max_tokens.unwrap_or(self.max_tokens)),
            min_tokens: Some(request.min_tokens),
            stop: request
                .stop
                .take()
                .map(|stop| sampling::OneOrMany::Many(OneOrMany::into_vec(stop))),
            stop_token_ids: Some(std::mem::take(&mut request.stop_token_ids)),
            ignore_eos: Some(request.ignore_eos),
            ..SamplingFields::default()
        };
        let defaults = self.model.tokenizer.generation_defaults();
        fields
            .validate(defaults, self.limits(), None)
            .map_err(|error| error.message)
    }

    fn tokens(&self, request: BatchRequest) -> Result<Vec<TokenId>, String> {
        let encode = |text: &str, special| {
            self.model
                .tokenizer
                .encode(text, special)
                .map_err(|error| error.to_string())
        };
        match (request.prompt, request.messages) {
            (Some(Prompt::Tokens(tokens)), _) => Ok(tokens),
            (Some(Prompt::Text(text)), _) => encode(&text, true),
            (None, messages) => {
                let template = self.model.chat_template.as_ref().ok_or(
                    "the model has no chat template: send \"prompt\", or give one with --chat-template",
                )?;
                let messages = messages.unwrap_or_default();
                let input = ChatInput {
                    kwargs: None,
                    messages: &messages,
                    add_generation_prompt: true,
                    tools: None,
                };
                // The template writes the special tokens itself.
                encode(
                    &template.render(&input).map_err(|error| error.to_string())?,
                    false,
                )
            }
        }
    }
}

impl Generator for ModelGenerator {
    async fn generate(&self, mut request: BatchRequest) -> Result<Answer, String> {
        let mut sampling = self.sampling(&mut request)?;
        let this = self.clone();
        let tokens = tokio::task::spawn_blocking(move || this.tokens(request))
            .await
            .map_err(|error| format!("tokenising ended abnormally: {error}"))??;
        let prompt_tokens = tokens.len();
        let room = sampling.max_tokens(prompt_tokens, self.limits());
        sampling.params.max_tokens = room.map_err(|error| error.message)?;
        let stream = self
            .model
            .engine
            .submit(Request::new(tokens, sampling.params.clone()))
            .map_err(|error| error.to_string())?;
        let tokenizer = Arc::clone(&self.model.tokenizer);
        let mut stream = TextStream::new(stream, tokenizer, &sampling.params, &sampling.text);
        let (mut text, mut finish) = (String::new(), None);
        while let Some(update) = stream.next().await {
            text.push_str(&update.text());
            finish = update.finish.or(finish);
        }
        let finish = finish.ok_or("the engine went away")?;
        if matches!(finish.reason, FinishReason::Error | FinishReason::Abort) {
            return Err(finish
                .error
                .unwrap_or_else(|| "the engine stopped".to_owned()));
        }
        let prompt_tokens = u32::try_from(prompt_tokens).unwrap_or(u32::MAX);
        let completion_tokens = stream.num_tokens();
        let total_tokens = prompt_tokens.saturating_add(completion_tokens);
        Ok(Answer {
            text,
            finish_reason: finish.reason.as_str(),
            usage: Usage {
                prompt_tokens,
                completion_tokens,
                total_tokens,
            },
        })
    }
}
