//! Text to token ids and back, from a `tokenizer.json` or from the metadata of a GGUF file.
//!
//! Invariants:
//! - a tokenizer that cannot be reproduced exactly is refused by name, never approximated;
//! - the bytes of every token are known ([`Tokenizer::token_bytes`]), so that decoding is a concatenation of bytes and
//!   can be done token by token.

mod gguf;
mod table;

use std::{collections::HashSet, path::Path, sync::Arc};

use serde_json::Value;
use table::TokenTable;

use crate::{
    engine::request::TokenId,
    weights::{Checkpoint, WeightsError},
};

/// Largest `tokenizer.json` that is read.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;

/// Why a tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The description is not a tokenizer.
    #[error("the tokenizer of {path} is not valid: {message}")]
    Malformed {
        /// Where it comes from.
        path: String,
        /// What is wrong.
        message: String,
    },
    /// The description is valid, but not something this runtime reproduces exactly.
    #[error("the tokenizer of {path} cannot be used: {message}")]
    Unsupported {
        /// Where it comes from.
        path: String,
        /// What is not supported, and what to use instead.
        message: String,
    },
    /// A text could not be encoded.
    #[error("the text cannot be tokenised: {message}")]
    Encode {
        /// What the tokenizer said.
        message: String,
    },
    /// A token id that the vocabulary does not have.
    #[error("token id {token} is outside the vocabulary of {vocab_size}")]
    UnknownId {
        /// The id.
        token: TokenId,
        /// Ids there are.
        vocab_size: usize,
    },
}

/// Sampling parameters that the model's author recommends (`generation_config.json`).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Recommended `temperature`.
    pub temperature: Option<f64>,
    /// Recommended `top_p`.
    pub top_p: Option<f64>,
    /// Recommended `top_k`.
    pub top_k: Option<i64>,
    /// Recommended `min_p`.
    pub min_p: Option<f64>,
    /// Recommended `repetition_penalty`.
    pub repetition_penalty: Option<f64>,
}

/// A model's tokenizer. Cheap to share, safe to use from any thread.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    table: Arc<TokenTable>,
    eos_token_ids: Vec<TokenId>,
    bos_token: Option<String>,
    eos_token: Option<String>,
    unk_token: Option<String>,
    pad_token: Option<String>,
    chat_template: Option<String>,
    defaults: GenerationDefaults,
}

/// What both sources of a tokenizer yield.
struct Parts {
    inner: tokenizers::Tokenizer,
    table: TokenTable,
    eos_token_ids: Vec<TokenId>,
    bos_token: Option<String>,
    eos_token: Option<String>,
    unk_token: Option<String>,
    pad_token: Option<String>,
    chat_template: Option<String>,
}

impl Tokenizer {
    /// The tokenizer of a model: a folder with `tokenizer.json`, a `.gguf` file, a folder with one `.gguf` file, or a
    /// `tokenizer.json` itself.
    ///
    /// # Errors
    /// [`TokenizerError`] when there is none, or it cannot be reproduced exactly.
    pub fn from_model_path(path: &Path) -> Result<Self, TokenizerError> {
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            return Self::from_files(path, path.parent());
        }
        let file = path.join("tokenizer.json");
        if file.is_file() {
            return Self::from_files(&file, Some(path));
        }
        if path.is_dir() && path.join("config.json").is_file() {
            return Err(TokenizerError::Unsupported {
                path: path.display().to_string(),
                message: "the folder has no tokenizer.json; convert the tokenizer, or name another with --tokenizer"
                    .to_owned(),
            });
        }
        Self::from_checkpoint(&Checkpoint::open(path)?)
    }

    /// The tokenizer of an open checkpoint.
    ///
    /// # Errors
    /// As [`from_model_path`](Self::from_model_path).
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self, TokenizerError> {
        match checkpoint {
            Checkpoint::Gguf(gguf) => {
                let parts = gguf::build(gguf)?;
                Ok(Self::from_parts(parts, GenerationDefaults::default()))
            }
            Checkpoint::Safetensors(folder) => {
                Self::from_files(&folder.path().join("tokenizer.json"), Some(folder.path()))
            }
        }
    }

    fn from_parts(parts: Parts, defaults: GenerationDefaults) -> Self {
        Self {
            inner: parts.inner,
            table: Arc::new(parts.table),
            eos_token_ids: parts.eos_token_ids,
            bos_token: parts.bos_token,
            eos_token: parts.eos_token,
            unk_token: parts.unk_token,
            pad_token: parts.pad_token,
            chat_template: parts.chat_template,
            defaults,
        }
    }

    /// `tokenizer.json`, with the other files of its folder where there are any.
    fn from_files(file: &Path, folder: Option<&Path>) -> Result<Self, TokenizerError> {
        let shown = file.display().to_string();
        let json: Value = read_json(file)?.ok_or_else(|| TokenizerError::Io {
            path: shown.clone(),
            source: std::io::ErrorKind::NotFound.into(),
        })?;
        let malformed = |message: String| TokenizerError::Malformed {
            path: shown.clone(),
            message,
        };
        let inner: tokenizers::Tokenizer =
            serde_json::from_value(json.clone()).map_err(|error| malformed(error.to_string()))?;
        let table = TokenTable::from_json(&inner, &json).map_err(|message| {
            TokenizerError::Unsupported {
                path: shown.clone(),
                message,
            }
        })?;
        let read = |name: &str| -> Result<Value, TokenizerError> {
            let found = match folder {
                Some(folder) => read_json(&folder.join(name))?,
                None => None,
            };
            Ok(found.unwrap_or_default())
        };
        let config = read("tokenizer_config.json")?;
        let generation = read("generation_config.json")?;
        let model = read("config.json")?;
        let token = |name: &str| special_token(&config[name]);
        let mut eos: Vec<TokenId> = [&generation["eos_token_id"], &model["eos_token_id"]]
            .into_iter()
            .flat_map(ids)
            .collect();
        eos.extend(token("eos_token").and_then(|text| inner.token_to_id(&text)));
        let mut seen = HashSet::new();
        eos.retain(|id| seen.insert(*id));
        let separate = match folder.map(|folder| folder.join("chat_template.jinja")) {
            Some(path) if path.is_file() => Some(read_text(&path)?),
            _ => None,
        };
        let parts = Parts {
            table,
            eos_token_ids: eos,
            bos_token: token("bos_token"),
            eos_token: token("eos_token"),
            unk_token: token("unk_token"),
            pad_token: token("pad_token"),
            chat_template: separate.or_else(|| default_template(&config["chat_template"])),
            inner,
        };
        let defaults = GenerationDefaults {
            temperature: generation["temperature"].as_f64(),
            top_p: generation["top_p"].as_f64(),
            top_k: generation["top_k"].as_i64(),
            min_p: generation["min_p"].as_f64(),
            repetition_penalty: generation["repetition_penalty"].as_f64(),
        };
        Ok(Self::from_parts(parts, defaults))
    }

    /// Its description in the form of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`] when it cannot be written.
    pub fn to_json(&self) -> Result<String, TokenizerError> {
        self.inner
            .to_string(false)
            .map_err(|error| TokenizerError::Encode {
                message: error.to_string(),
            })
    }

    /// Token ids of a text. `add_special_tokens` adds what the model wants around a text (usually a begin-of-sequence
    /// token); special tokens written in the text are recognised in either case.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`].
    pub fn encode(
        &self,
        text: &str,
        add_special_tokens: bool,
    ) -> Result<Vec<TokenId>, TokenizerError> {
        self.inner
            .encode_fast(text, add_special_tokens)
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|error| TokenizerError::Encode {
                message: error.to_string(),
            })
    }

    /// The text of a whole sequence. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownId`].
    pub fn decode(
        &self,
        ids: &[TokenId],
        skip_special_tokens: bool,
    ) -> Result<String, TokenizerError> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            if id as usize >= self.table.len() {
                return Err(TokenizerError::UnknownId {
                    token: id,
                    vocab_size: self.table.len(),
                });
            }
            if !(skip_special_tokens && self.table.is_special(id)) {
                bytes.extend_from_slice(self.table.bytes(id));
            }
        }
        let text = String::from_utf8_lossy(&bytes);
        let text = match self.table.strips_first_space() {
            true => text.strip_prefix(' ').unwrap_or(&text),
            false => &text,
        };
        Ok(text.to_owned())
    }

    /// The bytes that a token stands for; empty for an id that the vocabulary does not have.
    #[must_use]
    pub fn token_bytes(&self, id: TokenId) -> &[u8] {
        self.table.bytes(id)
    }

    /// Whether the token is a control token, not text.
    #[must_use]
    pub fn is_special(&self, id: TokenId) -> bool {
        self.table.is_special(id)
    }

    /// Bytes of the longest token: `text.len() / max_token_bytes` tokens at least are in a text.
    #[must_use]
    pub fn max_token_bytes(&self) -> usize {
        self.table.max_token_bytes()
    }

    /// Number of ids.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.table.len()
    }

    /// Id of a token by its exact text.
    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<TokenId> {
        self.inner.token_to_id(token)
    }

    /// Ids that end a sequence.
    #[must_use]
    pub fn eos_token_ids(&self) -> &[TokenId] {
        &self.eos_token_ids
    }

    /// The model's own chat template.
    #[must_use]
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// Texts of the special tokens that chat templates name: `bos_token`, `eos_token`, `unk_token`, `pad_token`.
    #[must_use]
    pub fn named_tokens(&self) -> [(&'static str, Option<&str>); 4] {
        [
            ("bos_token", self.bos_token.as_deref()),
            ("eos_token", self.eos_token.as_deref()),
            ("unk_token", self.unk_token.as_deref()),
            ("pad_token", self.pad_token.as_deref()),
        ]
    }

    /// What the model's author recommends for sampling.
    #[must_use]
    pub fn generation_defaults(&self) -> &GenerationDefaults {
        &self.defaults
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("eos_token_ids", &self.eos_token_ids)
            .finish_non_exhaustive()
    }
}

/// A token of `tokenizer_config.json`: its text, or an object with `content`.
fn special_token(value: &Value) -> Option<String> {
    let text = value.as_str().or_else(|| value["content"].as_str());
    text.map(str::to_owned)
}

/// An id or a list of ids.
fn ids(value: &Value) -> Vec<TokenId> {
    let one = |value: &Value| value.as_u64().and_then(|id| TokenId::try_from(id).ok());
    match value {
        Value::Array(list) => list.iter().filter_map(one).collect(),
        other => one(other).into_iter().collect(),
    }
}

/// A template, or the one called `default` of a list of named ones.
fn default_template(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(list) => list
            .iter()
            .find(|entry| entry["name"] == "default")
            .and_then(|entry| entry["template"].as_str())
            .map(str::to_owned),
        _ => None,
    }
}

fn read_text(path: &Path) -> Result<String, TokenizerError> {
    let fail = |source| TokenizerError::Io {
        path: path.display().to_string(),
        source,
    };
    let size = std::fs::metadata(path).map_err(fail)?.len();
    if size > MAX_TOKENIZER_BYTES {
        return Err(TokenizerError::Malformed {
            path: path.display().to_string(),
            message: format!("{size} bytes are more than the {MAX_TOKENIZER_BYTES} that are read"),
        });
    }
    std::fs::read_to_string(path).map_err(fail)
}

/// A JSON file; `None` when there is none.
fn read_json(path: &Path) -> Result<Option<Value>, TokenizerError> {
    if !path.is_file() {
        return Ok(None);
    }
    serde_json::from_str(&read_text(path)?)
        .map(Some)
        .map_err(|error| TokenizerError::Malformed {
            path: path.display().to_string(),
            message: error.to_string(),
        })
}

#[cfg(test)]
pub(crate) mod tests;
