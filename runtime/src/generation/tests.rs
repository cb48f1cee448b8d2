#![allow(clippy::unwrap_used)] // Tests.

use super::*;
use crate::{
    engine::{Engine, EngineConfig, request::Request},
    model_runner::fake::{FakeConfig, FakeModel, FakeRunner},
    tokenizer::tests::{tiny, tiny_tokenizer},
};

/// Runs a model that says `script`, and returns the texts of all updates with the end.
fn say(
    script: Vec<TokenId>,
    params: SamplingParams,
    options: &TextOptions,
) -> (Vec<TextToken>, String, TextFinish) {
    let mut config = FakeConfig {
        model: FakeModel::Script(script),
        eos_token_ids: vec![tiny_tokenizer::EOS],
        ..FakeConfig::default()
    };
    config.limits.vocab_size = tiny_tokenizer::VOCAB_SIZE;
    let engine_config = EngineConfig {
        eos_token_ids: config.eos_token_ids.clone(),
        ..EngineConfig::default()
    };
    let engine = Engine::start(Box::new(FakeRunner::new(config)), engine_config).unwrap();
    let stream = engine
        .submit(Request::new(vec![1, 2, 3], params.clone()))
        .unwrap();
    let mut stream = TextStream::new(stream, tiny(), &params, options);
    let (mut tokens, mut text) = (Vec::new(), String::new());
    let finish = loop {
        let update = stream.next_blocking().unwrap();
        text.push_str(&update.text());
        tokens.extend(update.tokens);
        if let Some(finish) = update.finish {
            break finish;
        }
    };
    assert!(stream.next_blocking().is_none());
    engine.shutdown();
    engine.join_blocking().unwrap();
    (tokens, text, finish)
}

fn bytes(text: &str) -> Vec<TokenId> {
    text.bytes().map(u32::from).collect()
}

fn params(max_tokens: u32) -> SamplingParams {
    SamplingParams {
        max_tokens,
        ..SamplingParams::default()
    }
}

fn stop(stops: &[&str]) -> TextOptions {
    TextOptions {
        stop: stops.iter().map(|&s| s.to_owned()).collect(),
        ..TextOptions::default()
    }
}

#[test]
fn every_token_yields_one_piece() {
    let (tokens, text, finish) = say(bytes("a日b"), params(5), &TextOptions::default());
    let pieces: Vec<&str> = tokens.iter().map(|token| token.text.as_str()).collect();
    assert_eq!(pieces, ["a", "", "", "日", "b"]);
    assert_eq!(text, "a日b");
    assert_eq!(finish.reason, FinishReason::Length);
}

#[test]
fn an_end_of_sequence_token_has_no_text() {
    let script = [bytes("hi"), vec![tiny_tokenizer::EOS]].concat();
    let options = TextOptions {
        skip_special_tokens: false,
        ..TextOptions::default()
    };
    let (tokens, text, finish) = say(script, params(9), &options);
    assert_eq!((tokens.len(), text.as_str()), (3, "hi"));
    assert_eq!(
        (finish.reason, finish.stop_cause),
        (FinishReason::Stop, None)
    );
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let (_, text, finish) = say(bytes("one END two"), params(500), &stop(&["END"]));
    assert_eq!(text, "one ");
    assert_eq!(finish.stop_cause, Some(StopCause::Text("END".to_owned())));
    let options = TextOptions {
        include_stop_str_in_output: true,
        ..stop(&["END"])
    };
    assert_eq!(
        say(bytes("one END two"), params(500), &options).1,
        "one END"
    );
}

#[test]
fn text_held_back_comes_at_the_end() {
    let (_, text, finish) = say(bytes("abEN"), params(4), &stop(&["END"]));
    assert_eq!(
        (text.as_str(), finish.reason),
        ("abEN", FinishReason::Length)
    );
    // An unfinished character is replaced.
    let (_, text, _) = say(vec![97, 0xE6], params(2), &TextOptions::default());
    assert_eq!(text, "a\u{FFFD}");
}

#[test]
fn a_stop_token_is_named_and_stop_strings_wait_for_min_tokens() {
    let with_stop_id = SamplingParams {
        stop_token_ids: vec![u32::from(b'c')],
        ..params(9)
    };
    let (_, text, finish) = say(bytes("abcd"), with_stop_id, &TextOptions::default());
    assert_eq!(text, "ab");
    assert_eq!(finish.stop_cause, Some(StopCause::Token(u32::from(b'c'))));

    let at_least_five = SamplingParams {
        min_tokens: 5,
        ..params(20)
    };
    let (_, text, _) = say(bytes("aXbcdeX"), at_least_five, &stop(&["X"]));
    assert_eq!(text, "aXbcde");
}
