//! What a caller asks for and what it gets back, after all validation: every 4xx is behind a [`Request`].

use std::{sync::Arc, time::Instant};

use super::{constraint::Constraint, waiting::TenantId};

/// Token id in the model's vocabulary.
pub type TokenId = u32;

/// Identity of a sequence for the life of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

/// How the next token is drawn. Field names and meanings are vLLM's `SamplingParams`.
///
/// Order of application, everywhere: penalties and bias → mask → temperature → min-p → top-k → renormalise → top-p.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 selects the most likely token (greedy).
    pub temperature: f32,
    /// Smallest set of tokens whose probability reaches this; 1 turns it off.
    pub top_p: f32,
    /// Keep the k most likely tokens; 0 turns it off.
    pub top_k: u32,
    /// Keep tokens with at least this share of the most likely token's probability; 0 turns it off.
    pub min_p: f32,
    /// Seed of the request's own random stream; `None` takes one from the engine's seed and the request's id.
    pub seed: Option<u64>,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output; 1 turns it off.
    pub repetition_penalty: f32,
    /// Subtracted once from the logits of tokens seen in the output; 0 turns it off.
    pub presence_penalty: f32,
    /// Subtracted per occurrence from the logits of tokens seen in the output; 0 turns it off.
    pub frequency_penalty: f32,
    /// Added to single logits.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Most tokens to generate, at least 1.
    pub max_tokens: u32,
    /// Tokens before which neither EOS nor a stop id may end the sequence.
    pub min_tokens: u32,
    /// Ids that end the sequence, beside the model's own EOS ids.
    pub stop_token_ids: Vec<TokenId>,
    /// Go on past EOS.
    pub ignore_eos: bool,
    /// Return log-probabilities of the sampled token and of this many most likely ones (≤ 20).
    pub logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: None,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            max_tokens: 16,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
        }
    }
}

/// How a prompt's final hidden states become its embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pooling {
    /// The last token's.
    Last,
    /// The mean over all tokens: such a prompt is computed whole, without the prefix cache.
    Mean,
}

/// One sequence to generate, or one prompt to embed: validated, tokenised, within the model's length.
#[derive(Debug, Clone)]
pub struct Request {
    /// Prompt tokens, at least one, `prompt.len() + max_tokens ≤ max_model_len` (an embedding has no output).
    pub prompt: Arc<[TokenId]>,
    /// How to sample.
    pub params: SamplingParams,
    /// Index of the choice among `n`: part of the random stream's key, so that choices differ.
    pub choice_index: u32,
    /// Keeps prefix-cache hits inside one tenant; bounded by the HTTP layer.
    pub cache_salt: Option<String>,
    /// What it may say.
    pub constraint: Constraint,
    /// Lower numbers are admitted first.
    pub priority: i32,
    /// Whose it is: places are shared fairly between tenants.
    pub tenant: TenantId,
    /// When it fails if it has not ended by itself.
    pub deadline: Option<Instant>,
    /// Log-probabilities of the prompt's own tokens, with this many most likely ones each. Such a prompt is computed
    /// whole, in small pieces, without the prefix cache.
    pub prompt_logprobs: Option<u32>,
    /// Embed the prompt instead of going on from it.
    pub pooling: Option<Pooling>,
}

impl Request {
    /// A request for one choice, without a cache salt.
    #[must_use]
    pub fn new(prompt: impl Into<Arc<[TokenId]>>, params: SamplingParams) -> Self {
        Self {
            prompt: prompt.into(),
            params,
            choice_index: 0,
            cache_salt: None,
            constraint: Constraint::default(),
            priority: 0,
            tenant: 0,
            deadline: None,
            prompt_logprobs: None,
            pooling: None,
        }
    }

    /// A request for a prompt's embedding.
    #[must_use]
    pub fn embed(prompt: impl Into<Arc<[TokenId]>>, pooling: Pooling) -> Self {
        // Nothing is drawn: the parameters have no effect, beyond one token to wait for.
        let params = SamplingParams {
            max_tokens: 1,
            ..SamplingParams::default()
        };
        Self {
            pooling: Some(pooling),
            ..Self::new(prompt, params)
        }
    }
}

/// Why a sequence ended. Names are the labels of `vllm:request_success_total{finished_reason}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// EOS, a stop id or a stop string.
    Stop,
    /// `max_tokens` or the model's length.
    Length,
    /// The client left, or the server is shutting down.
    Abort,
    /// This request failed (for example non-finite logits); no other did.
    Error,
}

impl FinishReason {
    /// The name in metrics and in the API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error => "error",
        }
    }
}

/// Log-probabilities of one generated position, natural logarithm, after penalties and before temperature.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Log-probability of the sampled token.
    pub sampled: f32,
    /// The most likely tokens, most likely first, as many as the request asked for.
    pub top: Vec<(TokenId, f32)>,
}

/// One generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratedToken {
    /// Its id.
    pub id: TokenId,
    /// Present when the request asked for log-probabilities.
    pub logprobs: Option<TokenLogprobs>,
}
