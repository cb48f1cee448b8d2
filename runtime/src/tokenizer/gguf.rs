//! A tokenizer from GGUF metadata: byte-level BPE (`gpt2`) by the name of its pre-tokenizer, and SentencePiece BPE
//! (`llama`).
//!
//! The metadata is turned into the description of a `tokenizer.json`: both sources then run the same code.

use std::{cmp::Reverse, collections::HashMap};

use serde_json::{Value, json};

use super::{
    Parts, TokenizerError,
    table::{Alphabet, Entry, TokenTable},
};
use crate::{
    engine::request::TokenId,
    weights::{Gguf, gguf::GgufTokenizer},
};

const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN_SPLIT: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Texts that end a turn in the templates of the supported families; a control token so named ends a sequence.
const END_OF_TURN: [&str; 6] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<end_of_turn>",
];

/// Token types of the format.
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// How a named pre-tokenizer splits text before BPE.
struct PreTokenizer {
    names: &'static [&'static str],
    split: Split,
    /// A whole word that is in the vocabulary is one token, whatever the merges say.
    ignore_merges: bool,
    /// A begin-of-sequence token is added when the file does not say.
    add_bos: bool,
    /// Text is brought to Unicode's composed form first.
    nfc: bool,
}

enum Split {
    /// GPT-2's own pattern.
    Gpt2,
    /// Each digit alone, then GPT-2's pattern.
    DigitsGpt2,
    /// A pattern, then nothing more.
    Pattern(&'static str),
}

const PRE_TOKENIZERS: [PreTokenizer; 5] = [
    PreTokenizer {
        names: &["gpt-2", "gpt2", "phi-2", "jina-en", "mpt", "olmo"],
        split: Split::Gpt2,
        ignore_merges: false,
        add_bos: false,
        nfc: false,
    },
    PreTokenizer {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell"],
        split: Split::DigitsGpt2,
        ignore_merges: false,
        add_bos: false,
        nfc: false,
    },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3"],
        split: Split::Pattern(LLAMA3_SPLIT),
        ignore_merges: true,
        add_bos: true,
        nfc: false,
    },
    PreTokenizer {
        names: &["qwen2", "deepseek-r1-qwen"],
        split: Split::Pattern(QWEN2_SPLIT),
        ignore_merges: false,
        add_bos: false,
        nfc: true,
    },
    PreTokenizer {
        names: &["tekken"],
        split: Split::Pattern(TEKKEN_SPLIT),
        ignore_merges: true,
        add_bos: true,
        nfc: false,
    },
];

/// Reads the tokenizer of a GGUF file.
pub(super) fn build(gguf: &Gguf) -> Result<Parts, TokenizerError> {
    let meta = gguf.tokenizer()?;
    let path = gguf.path().display().to_string();
    let unsupported = |message: String| TokenizerError::Unsupported {
        path: path.clone(),
        message,
    };
    let (description, alphabet) = match meta.model {
        "gpt2" => (byte_level(&meta).map_err(unsupported)?, Alphabet::ByteLevel),
        "llama" => (
            sentence_piece(&meta).map_err(unsupported)?,
            Alphabet::SentencePiece {
                strips_first_space: meta.add_space_prefix.unwrap_or(true),
            },
        ),
        other => {
            return Err(unsupported(format!(
                "its kind is {other:?}; gpt2 and llama are supported. Name a tokenizer.json with --tokenizer"
            )));
        }
    };
    let inner: tokenizers::Tokenizer =
        serde_json::from_value(description).map_err(|error| TokenizerError::Malformed {
            path: path.clone(),
            message: error.to_string(),
        })?;
    let entries = (0..meta.tokens.len()).map(|id| {
        let kind = kind_of(&meta, id);
        Some(Entry {
            text: meta.tokens[id],
            special: kind == CONTROL || kind == UNKNOWN,
            literal: kind == USER_DEFINED,
        })
    });
    let text = |id: Option<TokenId>| {
        id.and_then(|id| meta.tokens.get(id as usize))
            .map(|&text| text.to_owned())
    };
    Ok(Parts {
        table: TokenTable::new(alphabet, entries),
        eos_token_ids: eos_ids(&meta),
        bos_token: text(meta.bos_token_id),
        eos_token: text(meta.eos_token_id),
        unk_token: text(meta.unknown_token_id),
        pad_token: text(meta.padding_token_id),
        chat_template: meta.chat_template.map(str::to_owned),
        inner,
    })
}

fn kind_of(meta: &GgufTokenizer<'_>, id: usize) -> i32 {
    meta.token_types
        .as_ref()
        .and_then(|kinds| kinds.get(id).copied())
        .unwrap_or(1)
}

/// The declared ends, and control tokens whose text is known to end a turn.
fn eos_ids(meta: &GgufTokenizer<'_>) -> Vec<TokenId> {
    let declared = [meta.eos_token_id, meta.eot_token_id, meta.eom_token_id];
    let mut ids: Vec<TokenId> = declared.into_iter().flatten().collect();
    for (id, text) in meta.tokens.iter().enumerate() {
        if kind_of(meta, id) == CONTROL && END_OF_TURN.contains(text) {
            ids.extend(TokenId::try_from(id));
        }
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Tokens that are recognised in text before anything else.
fn added_tokens(meta: &GgufTokenizer<'_>) -> Vec<Value> {
    let entries = meta.tokens.iter().enumerate().filter_map(|(id, text)| {
        let kind = kind_of(meta, id);
        (matches!(kind, UNKNOWN | CONTROL | USER_DEFINED) && !text.is_empty()).then(|| {
            json!({
                "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": kind != USER_DEFINED,
            })
        })
    });
    entries.collect()
}

fn vocabulary(meta: &GgufTokenizer<'_>) -> Value {
    let entries = meta.tokens.iter().enumerate();
    Value::Object(
        entries
            .map(|(id, text)| ((*text).to_owned(), json!(id)))
            .collect(),
    )
}

/// What goes around a text: the begin- and end-of-sequence tokens that the file asks for.
fn post_processor(meta: &GgufTokenizer<'_>, add_bos: bool) -> Result<Value, String> {
    let add_bos = meta.add_bos_token.unwrap_or(add_bos);
    let add_eos = meta.add_eos_token.unwrap_or(false);
    let mut single = vec![json!({"Sequence": {"id": "A", "type_id": 0}})];
    let mut tokens = serde_json::Map::new();
    let wanted = [
        (add_bos, meta.bos_token_id, "begin"),
        (add_eos, meta.eos_token_id, "end"),
    ];
    for (add, id, which) in wanted {
        if !add {
            continue;
        }
        let id = id.ok_or_else(|| format!("it adds a {which}-of-sequence token but names none"))?;
        let text = *meta.tokens.get(id as usize).ok_or_else(|| {
            format!("its {which}-of-sequence token {id} is not in the vocabulary")
        })?;
        let piece = json!({"SpecialToken": {"id": text, "type_id": 0}});
        if which == "begin" {
            single.insert(0, piece);
        } else {
            single.push(piece);
        }
        tokens.insert(
            text.to_owned(),
            json!({"id": text, "ids": [id], "tokens": [text]}),
        );
    }
    if tokens.is_empty() {
        return Ok(Value::Null);
    }
    let pair =
        json!([{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]);
    Ok(
        json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}),
    )
}

fn byte_level(meta: &GgufTokenizer<'_>) -> Result<Value, String> {
    let known = || {
        let names = PRE_TOKENIZERS.iter().flat_map(|pre| pre.names);
        names.copied().collect::<Vec<_>>().join(", ")
    };
    let name = meta.pre.ok_or_else(|| {
        format!(
            "it does not name its pre-tokenizer (tokenizer.ggml.pre): convert the model again, or name a \
             tokenizer.json with --tokenizer. Known names: {}",
            known()
        )
    })?;
    let pre = PRE_TOKENIZERS
        .iter()
        .find(|pre| pre.names.contains(&name))
        .ok_or_else(|| {
            format!(
                "its pre-tokenizer is {name:?}; supported are {}. Name a tokenizer.json with --tokenizer",
                known()
            )
        })?;
    let merges = meta.merges.as_ref().ok_or("it has no merges")?;
    let merges: Vec<[&str; 2]> = merges
        .iter()
        .map(|merge| {
            merge
                .split_once(' ')
                .map(|(left, right)| [left, right])
                .ok_or_else(|| format!("the merge {merge:?} has no space"))
        })
        .collect::<Result<_, _>>()?;
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let pre_tokenizer = match pre.split {
        Split::Gpt2 => bytes(true),
        Split::DigitsGpt2 => json!({"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true}, bytes(true),
        ]}),
        Split::Pattern(pattern) => json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false}, bytes(false),
        ]}),
    };
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added_tokens(meta),
        "normalizer": if pre.nfc { json!({"type": "NFC"}) } else { Value::Null },
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor(meta, pre.add_bos)?,
        "decoder": bytes(true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": pre.ignore_merges, "vocab": vocabulary(meta), "merges": merges,
        },
    }))
}

fn sentence_piece(meta: &GgufTokenizer<'_>) -> Result<Value, String> {
    let scores = meta.scores.as_ref().ok_or("it has no scores")?;
    let unknown = meta
        .unknown_token_id
        .and_then(|id| meta.tokens.get(id as usize).copied());
    let mut normalizers =
        vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
    if meta.add_space_prefix.unwrap_or(true) {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
    }
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added_tokens(meta),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": post_processor(meta, true)?,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true,
            "ignore_merges": false, "vocab": vocabulary(meta), "merges": merges_of(meta, scores),
        },
    }))
}

/// SentencePiece stores scores, BPE wants merges: every way to put a token together from two others, in the order of
/// the result's score.
fn merges_of<'a>(meta: &GgufTokenizer<'a>, scores: &[f32]) -> Vec<[&'a str; 2]> {
    let ids: HashMap<&str, usize> = (0..meta.tokens.len())
        .filter(|&id| !matches!(kind_of(meta, id), CONTROL | UNKNOWN))
        .map(|id| (meta.tokens[id], id))
        .collect();
    let mut merges = Vec::new();
    for (&token, &id) in &ids {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                merges.push((Reverse(ordered(scores[id])), id, l, r));
            }
        }
    }
    merges.sort_unstable();
    merges
        .into_iter()
        .map(|(_, _, left, right)| [meta.tokens[left], meta.tokens[right]])
        .collect()
}

/// An integer that orders as the float does.
fn ordered(value: f32) -> i32 {
    let bits = value.to_bits().cast_signed();
    bits ^ ((bits >> 31) & i32::MAX)
}
