//! The ranges of the sampling fields, and what they mean to the engine.

use super::{
    Limits, MAX_BAD_WORD_BYTES, MAX_BAD_WORDS, MAX_CACHE_SALT_BYTES, MAX_LISTED_IDS, MAX_LOGPROBS,
    MAX_N, MAX_STOP_BYTES, MAX_STOP_STRINGS, OneOrMany, Sampling, SamplingFields,
};
use crate::{
    engine::request::{SamplingParams, TokenId},
    generation::TextOptions,
    http::{error::ApiError, structured},
    tokenizer::GenerationDefaults,
};

/// Temperatures below this are greedy: dividing by them gains nothing but infinities.
const MIN_TEMPERATURE: f64 = 1e-5;

impl SamplingFields {
    /// Checks every range.
    ///
    /// # Errors
    /// 400 naming the field.
    pub fn validate(
        self,
        defaults: &GenerationDefaults,
        limits: Limits,
        logprobs: Option<u32>,
    ) -> Result<Sampling, ApiError> {
        if self.best_of.is_some_and(|best| best != self.n.unwrap_or(1)) {
            return Err(ApiError::invalid(
                "best_of",
                "best_of is not supported by this server: ask for n and choose",
            ));
        }
        let grammar = structured::grammar_of(&self)?;
        if grammar.is_some() && self.min_tokens.unwrap_or(0) > 0 {
            return Err(ApiError::invalid(
                "min_tokens",
                "min_tokens contradicts structured output, which ends where its grammar does: leave one out",
            ));
        }
        self.check_lists(limits)?;
        let n = self.n.unwrap_or(1);
        if n == 0 || n > MAX_N {
            return Err(ApiError::invalid(
                "n",
                format!("n is {n}: it must be from 1 to {MAX_N}"),
            ));
        }
        if logprobs.is_some_and(|count| count > MAX_LOGPROBS) {
            let message =
                format!("at most {MAX_LOGPROBS} log-probabilities of a position can be had");
            return Err(ApiError::invalid("logprobs", message));
        }
        let text = self.text_options()?;
        if let Some(salt) = &self.cache_salt {
            at_most("cache_salt", "bytes", salt.len(), MAX_CACHE_SALT_BYTES)?;
        }
        let options = self.stream_options.unwrap_or_default();
        let stream = self.stream.unwrap_or(false);
        if self.stream_options.is_some() && !stream {
            return Err(ApiError::invalid(
                "stream_options",
                "stream_options needs stream: true",
            ));
        }
        Ok(Sampling {
            n,
            text,
            stream,
            include_usage: options.include_usage.unwrap_or(false),
            continuous_usage: options.continuous_usage_stats.unwrap_or(false),
            grammar,
            allowed_token_ids: self.allowed_token_ids.clone().filter(|ids| !ids.is_empty()),
            bad_words: self.bad_words.clone().unwrap_or_default(),
            priority: self.priority.unwrap_or(0),
            prompt_logprobs: self.prompt_logprobs,
            truncate_prompt_tokens: self.truncate_prompt_tokens,
            cache_salt: self.cache_salt.clone(),
            params: self.params(defaults, limits, logprobs)?,
        })
    }

    fn check_lists(&self, limits: Limits) -> Result<(), ApiError> {
        let allowed = self.allowed_token_ids.as_deref().unwrap_or_default();
        if allowed.len() > limits.vocab_size as usize {
            at_most(
                "allowed_token_ids",
                "ids",
                allowed.len(),
                limits.vocab_size as usize,
            )?;
        }
        for &id in allowed {
            check_id("allowed_token_ids", id, limits)?;
        }
        let bad_words = self.bad_words.as_deref().unwrap_or_default();
        at_most("bad_words", "words", bad_words.len(), MAX_BAD_WORDS)?;
        if bad_words
            .iter()
            .any(|word| word.is_empty() || word.len() > MAX_BAD_WORD_BYTES)
        {
            return Err(ApiError::invalid(
                "bad_words",
                format!("a bad word must have from 1 to {MAX_BAD_WORD_BYTES} bytes"),
            ));
        }
        if self
            .prompt_logprobs
            .is_some_and(|count| count > MAX_LOGPROBS)
        {
            return Err(ApiError::invalid(
                "prompt_logprobs",
                format!("at most {MAX_LOGPROBS} log-probabilities of a position can be had"),
            ));
        }
        if self.prompt_logprobs.is_some() && self.stream == Some(true) {
            return Err(ApiError::invalid(
                "prompt_logprobs",
                "prompt_logprobs come with whole answers: leave out stream",
            ));
        }
        if self.truncate_prompt_tokens == Some(0) {
            return Err(ApiError::invalid(
                "truncate_prompt_tokens",
                "truncate_prompt_tokens is 0: keep at least one token",
            ));
        }
        Ok(())
    }

    fn text_options(&self) -> Result<TextOptions, ApiError> {
        let stop = match self.stop.clone() {
            None => Vec::new(),
            Some(OneOrMany::One(stop)) => vec![stop],
            Some(OneOrMany::Many(stops)) => stops,
        };
        at_most("stop", "strings", stop.len(), MAX_STOP_STRINGS)?;
        for text in &stop {
            if text.is_empty() || text.len() > MAX_STOP_BYTES {
                return Err(ApiError::invalid(
                    "stop",
                    format!("a stop string must have from 1 to {MAX_STOP_BYTES} bytes"),
                ));
            }
        }
        Ok(TextOptions {
            stop,
            include_stop_str_in_output: self.include_stop_str_in_output.unwrap_or(false),
            skip_special_tokens: self.skip_special_tokens.unwrap_or(true),
        })
    }

    fn params(
        &self,
        defaults: &GenerationDefaults,
        limits: Limits,
        logprobs: Option<u32>,
    ) -> Result<SamplingParams, ApiError> {
        let temperature = self.temperature.or(defaults.temperature);
        let temperature = ranged("temperature", temperature, 1.0, 0.0, 100.0)?;
        let top_p = ranged("top_p", self.top_p.or(defaults.top_p), 1.0, 0.0, 1.0)?;
        if top_p == 0.0 {
            return Err(ApiError::invalid(
                "top_p",
                "top_p is 0: it must be above 0 and at most 1",
            ));
        }
        let repetition = self.repetition_penalty.or(defaults.repetition_penalty);
        let max_tokens = self.max_completion_tokens.or(self.max_tokens);
        if max_tokens == Some(0) {
            return Err(ApiError::invalid(
                "max_tokens",
                "max_tokens is 0: ask for at least one token",
            ));
        }
        let max_tokens = max_tokens.unwrap_or(u32::MAX);
        let min_tokens = self.min_tokens.unwrap_or(0);
        if min_tokens > max_tokens.min(limits.max_length) {
            return Err(ApiError::invalid(
                "min_tokens",
                format!(
                    "min_tokens is {min_tokens}: it must not be above max_tokens or the model's length"
                ),
            ));
        }
        Ok(SamplingParams {
            temperature: if temperature < MIN_TEMPERATURE {
                0.0
            } else {
                temperature as f32
            },
            top_p: top_p as f32,
            top_k: top_k(self.top_k.or(defaults.top_k))?,
            min_p: ranged("min_p", self.min_p.or(defaults.min_p), 0.0, 0.0, 1.0)? as f32,
            seed: self.seed.map(i64::cast_unsigned),
            repetition_penalty: ranged("repetition_penalty", repetition, 1.0, 0.01, 100.0)? as f32,
            presence_penalty: ranged("presence_penalty", self.presence_penalty, 0.0, -2.0, 2.0)?
                as f32,
            frequency_penalty: ranged("frequency_penalty", self.frequency_penalty, 0.0, -2.0, 2.0)?
                as f32,
            logit_bias: self.bias(limits)?,
            max_tokens,
            min_tokens,
            stop_token_ids: self.stop_ids(limits)?,
            ignore_eos: self.ignore_eos.unwrap_or(false),
            logprobs,
        })
    }

    fn bias(&self, limits: Limits) -> Result<Vec<(TokenId, f32)>, ApiError> {
        let Some(bias) = &self.logit_bias else {
            return Ok(Vec::new());
        };
        at_most("logit_bias", "entries", bias.len(), MAX_LISTED_IDS)?;
        let entry = |(id, value): (&String, &f64)| {
            let id: TokenId = id.parse().map_err(|_| {
                ApiError::invalid("logit_bias", format!("{id:?} is not a token id"))
            })?;
            check_id("logit_bias", id, limits)?;
            let value = ranged("logit_bias", Some(*value), 0.0, -100.0, 100.0)?;
            Ok((id, value as f32))
        };
        bias.iter().map(entry).collect()
    }

    fn stop_ids(&self, limits: Limits) -> Result<Vec<TokenId>, ApiError> {
        let ids = self.stop_token_ids.clone().unwrap_or_default();
        at_most("stop_token_ids", "ids", ids.len(), MAX_LISTED_IDS)?;
        for &id in &ids {
            check_id("stop_token_ids", id, limits)?;
        }
        Ok(ids)
    }
}

fn ranged(
    name: &str,
    value: Option<f64>,
    default: f64,
    low: f64,
    high: f64,
) -> Result<f64, ApiError> {
    let value = value.unwrap_or(default);
    if value.is_finite() && value >= low && value <= high {
        Ok(value)
    } else {
        Err(ApiError::invalid(
            name,
            format!("{name} is {value}: it must be from {low} to {high}"),
        ))
    }
}

fn at_most(name: &str, what: &str, value: usize, limit: usize) -> Result<(), ApiError> {
    if value <= limit {
        return Ok(());
    }
    Err(ApiError::invalid(
        name,
        format!("{name} has {value} {what}: at most {limit} are allowed"),
    ))
}

/// −1 and 0 turn it off.
fn top_k(value: Option<i64>) -> Result<u32, ApiError> {
    match value.unwrap_or(0) {
        -1 => Ok(0),
        value => u32::try_from(value).map_err(|_| {
            ApiError::invalid(
                "top_k",
                format!("top_k is {value}: it must be at least 1, or 0 or -1 for no limit"),
            )
        }),
    }
}

/// Refuses an id outside the vocabulary.
///
/// # Errors
/// 400 naming the field.
pub fn check_id(name: &str, id: TokenId, limits: Limits) -> Result<(), ApiError> {
    if id < limits.vocab_size {
        return Ok(());
    }
    Err(ApiError::invalid(
        name,
        format!(
            "token id {id} is outside the vocabulary of {}",
            limits.vocab_size
        ),
    ))
}
