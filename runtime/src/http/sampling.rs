//! The sampling fields that all generating routes share, and their ranges.
//!
//! Everything is checked here, before the engine sees it: a number that is not finite, an id outside the vocabulary or a
//! count without bound is a 400 that names the field.

mod validate;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use super::{
    App,
    error::ApiError,
    structured::{self, StructuredFields},
};
use crate::{
    engine::{
        constraint::Constraint,
        request::{SamplingParams, TokenId},
    },
    generation::TextOptions,
    grammar::{CompiledGrammar, GrammarSpec},
    traces::Asked,
};

pub use validate::check_id;

/// Most choices of one prompt.
pub const MAX_N: u32 = 128;
/// Most stop strings.
pub const MAX_STOP_STRINGS: usize = 16;
/// Longest stop string, in bytes.
pub const MAX_STOP_BYTES: usize = 1024;
/// Most entries of `logit_bias`, and of `stop_token_ids`.
pub const MAX_LISTED_IDS: usize = 1024;
/// Most log-probabilities of a position.
pub const MAX_LOGPROBS: u32 = 20;
/// Most entries of `bad_words`.
pub const MAX_BAD_WORDS: usize = 128;
/// Longest entry of `bad_words`, in bytes.
pub const MAX_BAD_WORD_BYTES: usize = 256;
/// Longest `cache_salt`, in bytes.
pub const MAX_CACHE_SALT_BYTES: usize = 256;

/// One string or a list of them.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum OneOrMany {
    /// One.
    One(String),
    /// A list.
    Many(Vec<String>),
}

/// `stream_options`.
#[derive(Debug, Clone, Copy, Default, Deserialize, JsonSchema)]
pub struct StreamOptions {
    /// A last chunk with `usage` and no choices.
    pub include_usage: Option<bool>,
    /// `usage` in every chunk.
    pub continuous_usage_stats: Option<bool>,
}

/// Fields of every generating request. Unknown ones are ignored; `null` is the same as absent.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[allow(missing_docs)] // The names are OpenAI's and vLLM's.
pub struct SamplingFields {
    #[schemars(range(min = 1, max = 128))]
    pub n: Option<u32>,
    pub best_of: Option<u32>,
    #[schemars(range(min = 0, max = 100))]
    pub temperature: Option<f64>,
    #[schemars(range(min = 0.000001, max = 1))]
    pub top_p: Option<f64>,
    #[schemars(range(min = -1, max = 1000000))]
    pub top_k: Option<i64>,
    #[schemars(range(min = 0, max = 1))]
    pub min_p: Option<f64>,
    pub seed: Option<i64>,
    #[schemars(range(min = 0.01, max = 100))]
    pub repetition_penalty: Option<f64>,
    #[schemars(range(min = -2, max = 2))]
    pub presence_penalty: Option<f64>,
    #[schemars(range(min = -2, max = 2))]
    pub frequency_penalty: Option<f64>,
    #[schemars(schema_with = "super::openapi::logit_bias")]
    pub logit_bias: Option<BTreeMap<String, f64>>,
    #[schemars(range(min = 1))]
    pub max_tokens: Option<u32>,
    #[schemars(range(min = 1))]
    pub max_completion_tokens: Option<u32>,
    pub min_tokens: Option<u32>,
    pub stop: Option<OneOrMany>,
    #[schemars(length(max = 1024))]
    pub stop_token_ids: Option<Vec<TokenId>>,
    pub include_stop_str_in_output: Option<bool>,
    pub ignore_eos: Option<bool>,
    pub skip_special_tokens: Option<bool>,
    #[schemars(length(max = 256))]
    pub cache_salt: Option<String>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    #[schemars(schema_with = "super::openapi::response_format")]
    pub response_format: Option<Value>,
    pub structured_outputs: Option<StructuredFields>,
    pub guided_json: Option<Value>,
    pub guided_regex: Option<String>,
    pub guided_choice: Option<Vec<String>>,
    pub guided_grammar: Option<String>,
    #[schemars(range(max = 20))]
    pub prompt_logprobs: Option<u32>,
    pub allowed_token_ids: Option<Vec<TokenId>>,
    #[schemars(length(max = 128))]
    pub bad_words: Option<Vec<String>>,
    pub priority: Option<i32>,
    #[schemars(range(min = 1))]
    pub truncate_prompt_tokens: Option<u32>,
}

/// What a request may ask of this model.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Prompt and output together.
    pub max_length: u32,
    /// Ids are below this.
    pub vocab_size: u32,
}

/// A request's sampling after all checks that need no prompt.
#[derive(Debug, Clone)]
pub struct Sampling {
    /// Choices of each prompt.
    pub n: u32,
    /// `max_tokens` is the request's, or `u32::MAX` when it has none.
    pub params: SamplingParams,
    /// Stop strings and the like.
    pub text: TextOptions,
    /// Keeps prefix-cache hits inside one tenant.
    pub cache_salt: Option<String>,
    /// Stream the answer.
    pub stream: bool,
    /// A last chunk with `usage`.
    pub include_usage: bool,
    /// `usage` in every chunk.
    pub continuous_usage: bool,
    /// What the output must be.
    pub grammar: Option<GrammarSpec>,
    /// The only ids that it may have.
    pub allowed_token_ids: Option<Vec<TokenId>>,
    /// Texts that it must not contain.
    pub bad_words: Vec<String>,
    /// Lower is sooner.
    pub priority: i32,
    /// Log-probabilities of the prompt, with so many alternatives.
    pub prompt_logprobs: Option<u32>,
    /// Keep only so many tokens at the prompt's end.
    pub truncate_prompt_tokens: Option<u32>,
}

/// What limits a request's output, ready to be given to each of its sequences.
#[derive(Debug, Clone)]
pub struct OutputLimits {
    vocab_size: u32,
    allowed_token_ids: Option<Vec<TokenId>>,
    bad_words: Vec<Vec<TokenId>>,
    grammar: Option<CompiledGrammar>,
}

impl OutputLimits {
    /// For one sequence.
    #[must_use]
    pub fn constraint(&self) -> Constraint {
        let grammar = self.grammar.as_ref().map(CompiledGrammar::session);
        if grammar.is_none() && self.bad_words.is_empty() && self.allowed_token_ids.is_none() {
            return Constraint::default();
        }
        Constraint::new(
            self.vocab_size,
            self.allowed_token_ids.as_deref(),
            self.bad_words.clone(),
            grammar,
        )
    }
}

impl Sampling {
    /// Compiles the grammar and tokenises the bad words.
    ///
    /// # Errors
    /// 400 when the grammar cannot be used.
    pub(crate) async fn output_limits(&self, app: &App) -> Result<OutputLimits, ApiError> {
        let grammar = match &self.grammar {
            None => None,
            Some(spec) => Some(
                app.grammars
                    .compile(spec)
                    .await
                    .map_err(|error| structured::refused(&error))?,
            ),
        };
        let mut bad_words = Vec::new();
        for word in &self.bad_words {
            // In the middle of a text it begins with a space.
            for text in [word.clone(), format!(" {word}")] {
                let tokens = app.model.tokenizer.encode(&text, false)?;
                if !tokens.is_empty() && !bad_words.contains(&tokens) {
                    bad_words.push(tokens);
                }
            }
        }
        Ok(OutputLimits {
            vocab_size: app.limits.vocab_size,
            allowed_token_ids: self.allowed_token_ids.clone(),
            bad_words,
            grammar,
        })
    }

    /// The prompt's last tokens, as many as `truncate_prompt_tokens` keeps.
    pub(super) fn kept<'a>(&self, prompt: &'a [TokenId]) -> &'a [TokenId] {
        let kept = self.truncate_prompt_tokens;
        kept.map_or(prompt, |kept| {
            &prompt[prompt.len().saturating_sub(kept as usize)..]
        })
    }

    /// What a trace says of the request.
    pub(super) fn asked(&self) -> Asked {
        Asked {
            n: self.n,
            max_tokens: Some(self.params.max_tokens).filter(|&tokens| tokens != u32::MAX),
            temperature: self.params.temperature,
            top_p: self.params.top_p,
        }
    }

    /// `max_tokens` for a prompt of this length.
    ///
    /// # Errors
    /// 400 with the numbers when prompt and output exceed the model's length.
    pub fn max_tokens(&self, prompt_tokens: usize, limits: Limits) -> Result<u32, ApiError> {
        let length = u64::from(limits.max_length);
        let prompt = prompt_tokens as u64;
        if prompt >= length {
            return Err(ApiError::invalid(
                "prompt",
                format!(
                    "the prompt has {prompt} tokens and the model's length is {length}, prompt and output together: \
                     shorten the prompt"
                ),
            ));
        }
        let room = u32::try_from(length - prompt).unwrap_or(u32::MAX);
        let asked = self.params.max_tokens;
        if asked == u32::MAX {
            return Ok(room);
        }
        if asked > room {
            return Err(ApiError::invalid(
                "max_tokens",
                format!(
                    "{prompt} prompt tokens and {asked} output tokens exceed the model's length of {length}: lower \
                     max_tokens to {room} or shorten the prompt"
                ),
            ));
        }
        Ok(asked)
    }
}
