#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, dead_code)] // Tests.

use std::sync::Arc;

use super::*;

#[path = "../../tests/support/tiny_tokenizer.rs"]
pub(crate) mod tiny_tokenizer;

/// The tiny tokenizer.
pub(crate) fn tiny() -> Arc<Tokenizer> {
    let folder = tempfile::tempdir().unwrap();
    tiny_tokenizer::write(folder.path());
    Arc::new(Tokenizer::from_model_path(folder.path()).unwrap())
}

#[test]
fn reads_a_folder() {
    let tokenizer = tiny();
    assert_eq!(tokenizer.encode("hello!", true).unwrap(), [258, 111, 33]);
    assert_eq!(
        tokenizer.encode("<|im_start|>é", false).unwrap(),
        [259, 0xC3, 0xA9]
    );
    assert_eq!(tokenizer.eos_token_ids(), [260]);
    assert_eq!(tokenizer.vocab_size(), 261);
    assert_eq!(tokenizer.token_bytes(258), b"hell");
    assert_eq!(tokenizer.token_bytes(0), [0]);
    assert_eq!(tokenizer.token_bytes(9999), b"");
    assert!(tokenizer.is_special(259) && !tokenizer.is_special(258));
    assert_eq!(
        tokenizer.chat_template(),
        Some(tiny_tokenizer::CHAT_TEMPLATE)
    );
    assert_eq!(
        tokenizer.named_tokens()[0],
        ("bos_token", Some("<|im_start|>"))
    );
}

#[test]
fn decodes_what_it_encodes() {
    let tokenizer = tiny();
    for text in ["", "hello world", "日本 🎉\n\t\0", "  x  "] {
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    }
    assert_eq!(tokenizer.decode(&[104, 259, 105], true).unwrap(), "hi");
    assert_eq!(
        tokenizer.decode(&[104, 259, 105], false).unwrap(),
        "h<|im_start|>i"
    );
    assert_eq!(tokenizer.decode(&[0xE6, 0x97], true).unwrap(), "\u{FFFD}");
    assert!(matches!(
        tokenizer.decode(&[261], true),
        Err(TokenizerError::UnknownId {
            token: 261,
            vocab_size: 261
        })
    ));
}

#[test]
fn reads_recommended_sampling_and_several_ends() {
    let folder = tempfile::tempdir().unwrap();
    tiny_tokenizer::write(folder.path());
    std::fs::write(
        folder.path().join("generation_config.json"),
        r#"{"eos_token_id": [3, 260], "temperature": 0.6, "top_p": 0.9, "top_k": 20}"#,
    )
    .unwrap();
    std::fs::write(folder.path().join("chat_template.jinja"), "other").unwrap();
    let tokenizer = Tokenizer::from_model_path(folder.path()).unwrap();
    assert_eq!(tokenizer.eos_token_ids(), [3, 260]);
    assert_eq!(tokenizer.generation_defaults().temperature, Some(0.6));
    assert_eq!(tokenizer.generation_defaults().top_k, Some(20));
    assert_eq!(tokenizer.chat_template(), Some("other"));
}

#[test]
fn refuses_a_decoder_that_it_does_not_know() {
    let folder = tempfile::tempdir().unwrap();
    tiny_tokenizer::write(folder.path());
    let file = folder.path().join("tokenizer.json");
    let text = std::fs::read_to_string(&file).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    json["decoder"] = serde_json::json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    std::fs::write(&file, json.to_string()).unwrap();
    let error = Tokenizer::from_model_path(&file).unwrap_err().to_string();
    assert!(error.contains("WordPiece"), "{error}");
}
