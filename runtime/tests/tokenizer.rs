//! The default model's tokenizer, read from its GGUF file, against tokens that plain Python made
//! (`reference/bpe_python.py`).
#![allow(clippy::unwrap_used, missing_docs)] // Tests.

mod common;

use ashlar::tokenizer::Tokenizer;
use serde_json::Value;

#[test]
fn gguf_tokens_equal_the_independent_ones() {
    let tokenizer = Tokenizer::from_model_path(&common::model_path()).unwrap();
    let golden: Vec<Value> =
        serde_json::from_str(include_str!("reference/bpe-smollm2.json")).unwrap();
    assert!(golden.len() > 20);
    for case in golden {
        let text = case["text"].as_str().unwrap();
        let expected: Vec<u32> = serde_json::from_value(case["tokens"].clone()).unwrap();
        let tokens = tokenizer.encode(text, true).unwrap();
        assert_eq!(tokens, expected, "{text:?}");
        assert_eq!(tokenizer.decode(&tokens, false).unwrap(), text);
    }
}

#[test]
fn the_default_model_s_ends_and_template_are_known() {
    let tokenizer = Tokenizer::from_model_path(&common::model_path()).unwrap();
    let end = tokenizer.token_to_id("<|im_end|>").unwrap();
    assert!(tokenizer.eos_token_ids().contains(&end));
    assert!(tokenizer.is_special(end));
    assert!(tokenizer.chat_template().unwrap().contains("<|im_start|>"));
    assert_eq!(tokenizer.vocab_size(), 49_152);
}
