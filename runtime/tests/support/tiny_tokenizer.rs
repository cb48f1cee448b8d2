//! A `tokenizer.json` small enough to see through: one token per byte (its id is the byte), a few merges, two control
//! tokens and a chat template.

use std::path::Path;

use serde_json::{Value, json};

/// Ids: 0–255 bytes, 256 `he`, 257 `ll`, 258 `hell`, 259 `<|im_start|>`, 260 `<|im_end|>`.
pub const VOCAB_SIZE: u32 = 261;
/// `<|im_end|>`.
pub const EOS: u32 = 260;

pub const CHAT_TEMPLATE: &str = "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// GPT-2's character for a byte.
fn char_of(byte: u8) -> char {
    let is_printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if is_printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !is_printable(b)).count();
    char::from_u32(0x100 + u32::try_from(before).unwrap()).unwrap()
}

fn description() -> Value {
    let mut vocab: serde_json::Map<String, Value> = (0..=255u8)
        .map(|byte| (char_of(byte).to_string(), json!(byte)))
        .collect();
    for (text, id) in [("he", 256), ("ll", 257), ("hell", 258)] {
        vocab.insert(text.to_owned(), json!(id));
    }
    let added = |id: u32, content: &str| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    };
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(259, "<|im_start|>"), added(EOS, "<|im_end|>")],
        "normalizer": null, "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [["h", "e"], ["l", "l"], ["he", "ll"]],
        },
    })
}

/// Writes `tokenizer.json` and `tokenizer_config.json` into a folder.
pub fn write(folder: &Path) {
    let config = json!({"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}, "chat_template": CHAT_TEMPLATE});
    std::fs::write(folder.join("tokenizer.json"), description().to_string()).unwrap();
    std::fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
}
