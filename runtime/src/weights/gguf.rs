//! GGUF files (versions 2 and 3, little-endian): one bounded parse, then zero-copy access to metadata and tensors.
//!
//! Layout: `"GGUF"`, version, tensor count, metadata count; the key–value pairs; one record per tensor (name, dims,
//! type, offset); padding to `general.alignment`; the tensors' bytes. Strings and arrays stay in the map and are
//! decoded when asked for.
//!
//! Invariants, all established by [`Gguf::open`]: every range stored here lies inside the file; tensors are aligned,
//! whole blocks, and do not overlap; names are unique.

use std::{
    collections::HashMap,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{GgmlType, MappedFile, StoredBytes, WeightsError};

mod parse;

/// Most tensors in a file.
const MAX_TENSORS: u64 = 1 << 16;
/// Most metadata pairs in a file.
const MAX_METADATA: u64 = 1 << 16;
/// Most elements of a metadata array: vocabularies end below a million, merges at a few millions.
const MAX_ARRAY: u64 = 1 << 24;
/// Longest string: chat templates reach some 100 KiB.
const MAX_STRING: u64 = 1 << 24;
/// Longest key or tensor name.
const MAX_NAME: u64 = 1 << 10;
/// Most dimensions of a tensor.
const MAX_DIMS: u32 = 4;
/// Largest `general.alignment`.
const MAX_ALIGNMENT: u64 = 1 << 16;

/// A scalar, string or array of the metadata. Strings and arrays are ranges of the file.
#[derive(Debug, Clone)]
enum Value {
    UInt(u64),
    Int(i64),
    Float(f64),
    Bool(bool),
    Str(Range<usize>),
    Array {
        kind: ElementKind,
        len: usize,
        bytes: Range<usize>,
    },
}

impl Value {
    fn kind_name(&self) -> &'static str {
        match self {
            Self::UInt(_) | Self::Int(_) => "an integer",
            Self::Float(_) => "a float",
            Self::Bool(_) => "a bool",
            Self::Str(_) => "a string",
            Self::Array { .. } => "an array",
        }
    }
}

/// Element type of a scalar or array, by the format's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ElementKind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Str,
    U64,
    I64,
    F64,
}

#[derive(Debug, Clone)]
struct TensorRecord {
    kind: GgmlType,
    dims: Vec<u64>,
    bytes: Range<usize>,
}

/// A tensor of the file.
#[derive(Debug, Clone, Copy)]
pub struct GgufTensor<'a> {
    /// Storage type.
    pub kind: GgmlType,
    /// Sizes in the file's order: `dims[0]` is contiguous (a row of a weight matrix), `dims[1]` counts rows.
    pub dims: &'a [u64],
    /// All its bytes, row after row.
    pub data: StoredBytes<'a>,
}

impl GgufTensor<'_> {
    /// Values in one row.
    #[must_use]
    pub fn columns(&self) -> usize {
        usize::try_from(self.dims[0]).expect("a tensor inside the file fits usize: this is a bug")
    }

    /// Number of rows: the product of the other dimensions.
    #[must_use]
    pub fn rows(&self) -> usize {
        let rows: u64 = self.dims[1..].iter().product();
        usize::try_from(rows).expect("a tensor inside the file fits usize: this is a bug")
    }
}

/// An open GGUF file.
#[derive(Debug, Clone)]
pub struct Gguf {
    path: PathBuf,
    map: Arc<MappedFile>,
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, TensorRecord>,
}

impl Gguf {
    /// Maps and parses the file; no tensor is read yet.
    ///
    /// # Errors
    /// [`WeightsError`] when the file cannot be read, is malformed, or is one part of a split model.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let map = Arc::new(MappedFile::open(path)?);
        let (metadata, tensors) = parse::parse(&map).map_err(|message| malformed(path, message))?;
        let gguf = Self {
            path: path.to_owned(),
            map,
            metadata,
            tensors,
        };
        let parts = gguf.u64("split.count")?.unwrap_or(1);
        if parts > 1 {
            let message = format!(
                "it is one of {parts} parts of a split model; merge them into one file first"
            );
            return Err(gguf.unsupported(message));
        }
        Ok(gguf)
    }

    /// Where the file is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The mapped file.
    #[must_use]
    pub fn file(&self) -> &MappedFile {
        &self.map
    }

    /// Whether the key is there, of any type.
    #[must_use]
    pub fn has(&self, key: &str) -> bool {
        self.metadata.contains_key(key)
    }

    /// An integer that is not negative; `None` when the key is absent.
    ///
    /// # Errors
    /// [`WeightsError::Malformed`] when the key holds something else.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, WeightsError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::UInt(value)) => Ok(Some(*value)),
            Some(Value::Int(value)) => u64::try_from(*value)
                .map(Some)
                .map_err(|_| self.malformed(format!("{key} is negative ({value})"))),
            Some(other) => Err(self.wrong_kind(key, "an integer", other)),
        }
    }

    /// An integer below 2³²; `None` when the key is absent.
    ///
    /// # Errors
    /// [`WeightsError::Malformed`] when the key holds something else.
    pub fn u32(&self, key: &str) -> Result<Option<u32>, WeightsError> {
        let Some(value) = self.u64(key)? else {
            return Ok(None);
        };
        u32::try_from(value)
            .map(Some)
            .map_err(|_| self.malformed(format!("{key} is too large ({value})")))
    }

    /// A float (32-bit ones exactly); `None` when the key is absent.
    ///
    /// # Errors
    /// [`WeightsError::Malformed`] when the key holds something else.
    pub fn f64(&self, key: &str) -> Result<Option<f64>, WeightsError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Float(value)) => Ok(Some(*value)),
            Some(other) => Err(self.wrong_kind(key, "a float", other)),
        }
    }

    /// A bool; `None` when the key is absent.
    ///
    /// # Errors
    /// [`WeightsError::Malformed`] when the key holds something else.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, WeightsError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(self.wrong_kind(key, "a bool", other)),
        }
    }

    /// A string; `None` when the key is absent.
    ///
    /// # Errors
    /// [`WeightsError::Malformed`] when the key holds something else, or is not UTF-8.
    pub fn str(&self, key: &str) -> Result<Option<&str>, WeightsError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Str(range)) => {
                let text = std::str::from_utf8(&self.map[range.clone()]);
                text.map(Some)
                    .map_err(|error| self.malformed(format!("{key} is not UTF-8: {error}")))
            }
            Some(other) => Err(self.wrong_kind(key, "a string", other)),
        }
    }

    /// An array of strings; `None` when the key is absent.
    ///
    /// # Errors
    /// [`WeightsError::Malformed`] when the key holds something else, or a string is not UTF-8.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<&str>>, WeightsError> {
        let Some((bytes, len)) =
            self.array(key, "an array of strings", |kind| kind == ElementKind::Str)?
        else {
            return Ok(None);
        };
        let mut reader = parse::Reader::new(bytes);
        let mut strings = Vec::with_capacity(len);
        for index in 0..len {
            let range = reader
                .string(MAX_STRING)
                .expect("arrays are walked when opened: this is a bug");
            let text = std::str::from_utf8(&bytes[range]);
            strings.push(text.map_err(|error| {
                self.malformed(format!("{key}[{index}] is not UTF-8: {error}"))
            })?);
        }
        Ok(Some(strings))
    }

    /// An array of 32-bit floats; `None` when the key is absent.
    ///
    /// # Errors
    /// [`WeightsError::Malformed`] when the key holds something else.
    pub fn f32s(&self, key: &str) -> Result<Option<Vec<f32>>, WeightsError> {
        let array = self.array(key, "an array of 32-bit floats", |kind| {
            kind == ElementKind::F32
        })?;
        Ok(array.map(|(bytes, _)| {
            bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|word| f32::from_le_bytes(*word))
                .collect()
        }))
    }

    /// An array of 32-bit integers, signed or not (all real uses are small); `None` when the key is absent.
    ///
    /// # Errors
    /// [`WeightsError::Malformed`] when the key holds something else.
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>, WeightsError> {
        let is_int = |kind| matches!(kind, ElementKind::I32 | ElementKind::U32);
        let array = self.array(key, "an array of 32-bit integers", is_int)?;
        Ok(array.map(|(bytes, _)| {
            bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|word| i32::from_le_bytes(*word))
                .collect()
        }))
    }

    fn array(
        &self,
        key: &str,
        expected: &str,
        accepts: impl Fn(ElementKind) -> bool,
    ) -> Result<Option<(&[u8], usize)>, WeightsError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Array { kind, len, bytes }) if accepts(*kind) => {
                Ok(Some((&self.map[bytes.clone()], *len)))
            }
            Some(other) => Err(self.wrong_kind(key, expected, other)),
        }
    }

    /// The tensor of this name, if the file has it.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<GgufTensor<'_>> {
        let record = self.tensors.get(name)?;
        Some(GgufTensor {
            kind: record.kind,
            dims: &record.dims,
            data: self.map.slice(record.bytes.clone()),
        })
    }

    /// Names of all tensors, in no order.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// `general.architecture`.
    ///
    /// # Errors
    /// [`WeightsError::Malformed`] when it is absent.
    pub fn architecture(&self) -> Result<&str, WeightsError> {
        self.str("general.architecture")?
            .ok_or_else(|| self.malformed("general.architecture is missing".to_owned()))
    }

    /// What the file says about its tokenizer.
    ///
    /// # Errors
    /// [`WeightsError::Malformed`] when the vocabulary is absent or its arrays disagree in length.
    pub fn tokenizer(&self) -> Result<GgufTokenizer<'_>, WeightsError> {
        let missing = |key: &str| {
            self.malformed(format!(
                "tokenizer.ggml.{key} is missing: the file has no tokenizer"
            ))
        };
        let tokens = self
            .strings("tokenizer.ggml.tokens")?
            .ok_or_else(|| missing("tokens"))?;
        let token_types = self.i32s("tokenizer.ggml.token_type")?;
        let scores = self.f32s("tokenizer.ggml.scores")?;
        for (key, len) in [
            ("token_type", token_types.as_ref().map(Vec::len)),
            ("scores", scores.as_ref().map(Vec::len)),
        ] {
            if let Some(len) = len
                && len != tokens.len()
            {
                let message = format!(
                    "tokenizer.ggml.{key} has {len} entries for {} tokens",
                    tokens.len()
                );
                return Err(self.malformed(message));
            }
        }
        Ok(GgufTokenizer {
            model: self
                .str("tokenizer.ggml.model")?
                .ok_or_else(|| missing("model"))?,
            pre: self.str("tokenizer.ggml.pre")?,
            tokens,
            token_types,
            scores,
            merges: self.strings("tokenizer.ggml.merges")?,
            bos_token_id: self.u32("tokenizer.ggml.bos_token_id")?,
            eos_token_id: self.u32("tokenizer.ggml.eos_token_id")?,
            eot_token_id: self.u32("tokenizer.ggml.eot_token_id")?,
            eom_token_id: self.u32("tokenizer.ggml.eom_token_id")?,
            unknown_token_id: self.u32("tokenizer.ggml.unknown_token_id")?,
            padding_token_id: self.u32("tokenizer.ggml.padding_token_id")?,
            add_bos_token: self.bool("tokenizer.ggml.add_bos_token")?,
            add_eos_token: self.bool("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: self.bool("tokenizer.ggml.add_space_prefix")?,
            chat_template: self.str("tokenizer.chat_template")?,
        })
    }

    fn wrong_kind(&self, key: &str, expected: &str, found: &Value) -> WeightsError {
        self.malformed(format!(
            "{key} is {} and should be {expected}",
            found.kind_name()
        ))
    }

    pub(crate) fn malformed(&self, message: String) -> WeightsError {
        malformed(&self.path, message)
    }

    pub(crate) fn unsupported(&self, message: String) -> WeightsError {
        WeightsError::Unsupported {
            path: self.path.display().to_string(),
            message,
        }
    }
}

fn malformed(path: &Path, message: String) -> WeightsError {
    WeightsError::Malformed {
        path: path.display().to_string(),
        format: "GGUF",
        message,
    }
}

/// The tokenizer's part of the metadata, as stored. `None` = the key is absent.
#[derive(Debug, Clone)]
#[allow(missing_docs)] // Each field is the metadata key of the same name.
pub struct GgufTokenizer<'a> {
    /// `gpt2` (byte-level BPE), `llama` (SentencePiece), …
    pub model: &'a str,
    /// Name of the pre-tokenizer.
    pub pre: Option<&'a str>,
    /// Token texts by id.
    pub tokens: Vec<&'a str>,
    /// 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte; as many as tokens.
    pub token_types: Option<Vec<i32>>,
    /// SentencePiece scores; as many as tokens.
    pub scores: Option<Vec<f32>>,
    /// BPE merges, `"left right"`, best first.
    pub merges: Option<Vec<&'a str>>,
    pub bos_token_id: Option<u32>,
    pub eos_token_id: Option<u32>,
    pub eot_token_id: Option<u32>,
    pub eom_token_id: Option<u32>,
    pub unknown_token_id: Option<u32>,
    pub padding_token_id: Option<u32>,
    pub add_bos_token: Option<bool>,
    pub add_eos_token: Option<bool>,
    pub add_space_prefix: Option<bool>,
    pub chat_template: Option<&'a str>,
}

#[cfg(test)]
mod tests;
