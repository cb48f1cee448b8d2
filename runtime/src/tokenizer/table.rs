//! The bytes of every token, in one allocation.

use std::collections::HashMap;

use serde_json::Value;

use crate::engine::request::TokenId;

/// How token texts stand for bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Alphabet {
    /// GPT-2's: each byte is one printable character.
    ByteLevel,
    /// SentencePiece's: `▁` is a space, `<0x0A>` is a byte.
    SentencePiece {
        /// A decoded text begins with a space that is not part of it.
        strips_first_space: bool,
    },
}

/// Bytes and kind of every token.
#[derive(Debug)]
pub(super) struct TokenTable {
    /// All tokens' bytes, one after the other.
    bytes: Vec<u8>,
    /// `[vocab + 1]` where each token begins.
    starts: Vec<u32>,
    special: Vec<bool>,
    strips_first_space: bool,
    max_token_bytes: usize,
}

/// One token as its tokenizer writes it.
pub(super) struct Entry<'a> {
    pub(super) text: &'a str,
    /// A control token.
    pub(super) special: bool,
    /// Its text is itself, not in the alphabet.
    pub(super) literal: bool,
}

impl TokenTable {
    /// The table of tokens in id order; `None` for an id without a token.
    pub(super) fn new<'a>(
        alphabet: Alphabet,
        entries: impl Iterator<Item = Option<Entry<'a>>>,
    ) -> Self {
        let from_char = byte_alphabet();
        let mut table = Self {
            bytes: Vec::new(),
            starts: vec![0],
            special: Vec::new(),
            strips_first_space: matches!(
                alphabet,
                Alphabet::SentencePiece {
                    strips_first_space: true
                }
            ),
            max_token_bytes: 1,
        };
        for entry in entries {
            let before = table.bytes.len();
            if let Some(entry) = &entry {
                if entry.literal || entry.special {
                    table.bytes.extend_from_slice(entry.text.as_bytes());
                } else {
                    match alphabet {
                        Alphabet::ByteLevel => {
                            push_byte_level(&mut table.bytes, entry.text, &from_char);
                        }
                        Alphabet::SentencePiece { .. } => {
                            push_sentence_piece(&mut table.bytes, entry.text);
                        }
                    }
                }
            }
            let end = table.bytes.len();
            table.max_token_bytes = table.max_token_bytes.max(end - before);
            table.starts.push(u32::try_from(end).unwrap_or(u32::MAX));
            table.special.push(entry.is_some_and(|entry| entry.special));
        }
        table
    }

    /// The table of a `tokenizer.json`; the error says which decoder is not known.
    pub(super) fn from_json(
        tokenizer: &tokenizers::Tokenizer,
        json: &Value,
    ) -> Result<Self, String> {
        let alphabet = alphabet_of(&json["decoder"])?;
        let added = tokenizer.get_added_tokens_decoder();
        let vocab = tokenizer.get_vocab(true);
        let size = vocab.values().max().map_or(0, |&id| id as usize + 1);
        // Ids may have gaps, but a table far larger than its vocabulary is a broken file.
        if size > vocab.len() * 4 + 1024 {
            return Err(format!("{} tokens have ids up to {size}", vocab.len()));
        }
        let mut texts: Vec<Option<&str>> = vec![None; size];
        for (text, &id) in &vocab {
            texts[id as usize] = Some(text);
        }
        let entries = texts.iter().enumerate().map(|(id, text)| {
            let added = u32::try_from(id).ok().and_then(|id| added.get(&id));
            text.map(|text| Entry {
                text,
                special: added.is_some_and(|token| token.special),
                literal: added.is_some(),
            })
        });
        Ok(Self::new(alphabet, entries))
    }

    pub(super) fn len(&self) -> usize {
        self.special.len()
    }

    pub(super) fn bytes(&self, id: TokenId) -> &[u8] {
        let id = id as usize;
        match (self.starts.get(id), self.starts.get(id + 1)) {
            (Some(&start), Some(&end)) => &self.bytes[start as usize..end as usize],
            _ => &[],
        }
    }

    pub(super) fn is_special(&self, id: TokenId) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    pub(super) fn strips_first_space(&self) -> bool {
        self.strips_first_space
    }

    pub(super) fn max_token_bytes(&self) -> usize {
        self.max_token_bytes
    }
}

/// The alphabet that a decoder of `tokenizer.json` reads.
fn alphabet_of(decoder: &Value) -> Result<Alphabet, String> {
    let kind = decoder["type"].as_str().unwrap_or("none");
    let parts = decoder["decoders"].as_array();
    let has = |name: &str| parts.is_some_and(|parts| parts.iter().any(|part| part["type"] == name));
    match kind {
        "ByteLevel" => Ok(Alphabet::ByteLevel),
        "Sequence" if has("ByteLevel") => Ok(Alphabet::ByteLevel),
        "Sequence" if has("ByteFallback") => Ok(Alphabet::SentencePiece {
            strips_first_space: has("Strip"),
        }),
        "Metaspace" => Ok(Alphabet::SentencePiece {
            strips_first_space: decoder["prepend_scheme"] != "never",
        }),
        other => Err(format!(
            "its decoder is {other}; ByteLevel, ByteFallback and Metaspace are supported"
        )),
    }
}

fn push_byte_level(bytes: &mut Vec<u8>, text: &str, from_char: &HashMap<char, u8>) {
    let mut utf8 = [0; 4];
    for c in text.chars() {
        match from_char.get(&c) {
            Some(&byte) => bytes.push(byte),
            // Outside the alphabet: itself, as other decoders of this kind do.
            None => bytes.extend_from_slice(c.encode_utf8(&mut utf8).as_bytes()),
        }
    }
}

fn push_sentence_piece(bytes: &mut Vec<u8>, text: &str) {
    let byte = text
        .strip_prefix("<0x")
        .and_then(|rest| rest.strip_suffix('>'))
        .filter(|hex| hex.len() == 2)
        .and_then(|hex| u8::from_str_radix(hex, 16).ok());
    match byte {
        Some(byte) => bytes.push(byte),
        None => bytes.extend_from_slice(text.replace('▁', " ").as_bytes()),
    }
}

/// GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other bytes for U+0100 onward.
fn byte_alphabet() -> HashMap<char, u8> {
    let is_printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 0x100;
    (0..=u8::MAX)
        .map(|byte| {
            let code = if is_printable(byte) {
                u32::from(byte)
            } else {
                next += 1;
                next - 1
            };
            (
                char::from_u32(code).expect("below the surrogates: this is a bug"),
                byte,
            )
        })
        .collect()
}
