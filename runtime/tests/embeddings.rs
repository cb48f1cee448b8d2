//! `/v1/embeddings`: the default model's against an independent implementation, and the API's shapes and refusals.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)] // Tests fail by panicking.

use std::{fs, path::PathBuf};

use ashlar::{
    engine::{
        Engine, EngineConfig, EngineHandle,
        request::{Pooling, Request, TokenId},
    },
    model_runner::Dtype,
    pooler::PoolerConfig,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use safetensors::SafeTensors;
use serde::Deserialize;
use serde_json::{Value, json};
use support::{Reply, Server, Setup, tiny_tokenizer};

mod common;
#[path = "support/http_server.rs"]
mod support;

const PATH: &str = "/v1/embeddings";
/// Between 32 bits computed in another order.
const MAX_EXACT_DISTANCE: f64 = 1e-8;
/// Of 4-bit weights with 8-bit activations.
const MAX_FAST_DISTANCE: f64 = 1e-3;

#[derive(Deserialize)]
struct Case {
    prompt: Vec<TokenId>,
}

fn reference(name: &str) -> Vec<u8> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/reference");
    fs::read(folder.join(name)).unwrap()
}

/// The final hidden states of every prompt of `reference/llama_numpy.py`, `[tokens, width]` each.
fn references() -> Vec<(Vec<TokenId>, Vec<Vec<f64>>)> {
    let cases: Vec<Case> = serde_json::from_slice(&reference("golden.json")).unwrap();
    let file = reference("golden-hidden.safetensors");
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let hidden = tensors.tensor("hidden").unwrap();
    let values = hidden.data().as_chunks::<4>().0;
    let mut rows = values.chunks_exact(hidden.shape()[1]).map(|row| {
        row.iter()
            .map(|word| f64::from(f32::from_le_bytes(*word)))
            .collect()
    });
    let cases = cases.into_iter().map(|case| {
        let states = rows.by_ref().take(case.prompt.len()).collect();
        (case.prompt, states)
    });
    cases.collect()
}

fn pool(states: &[Vec<f64>], pooling: Pooling) -> Vec<f64> {
    match pooling {
        Pooling::Last => states.last().unwrap().clone(),
        Pooling::Mean => (0..states[0].len())
            .map(|i| states.iter().map(|row| row[i]).sum::<f64>() / states.len() as f64)
            .collect(),
    }
}

fn embed(engine: &EngineHandle, prompt: &[TokenId], pooling: Pooling) -> Vec<f32> {
    let mut stream = engine.submit(Request::embed(prompt, pooling)).unwrap();
    let update = stream.next_blocking().unwrap();
    let embedding = update
        .embedding
        .unwrap_or_else(|| panic!("{:?}", update.finish));
    PoolerConfig::default().finish(embedding, None)
}

#[test]
fn the_default_model_s_embeddings_are_those_of_the_reference() {
    for (dtype, bar) in [
        (Dtype::Float32, MAX_EXACT_DISTANCE),
        (Dtype::Auto, MAX_FAST_DISTANCE),
    ] {
        // Prompts are computed in several pieces.
        let config = EngineConfig {
            max_num_batched_tokens: 32,
            max_num_seqs: 8,
            ..EngineConfig::default()
        };
        let engine = Engine::start(Box::new(common::runner(dtype)), config).unwrap();
        let mut worst = 0f64;
        for (prompt, states) in references() {
            for pooling in [Pooling::Last, Pooling::Mean] {
                let found = embed(&engine, &prompt, pooling);
                let length: f64 = found.iter().map(|v| f64::from(*v).powi(2)).sum();
                assert!((length - 1.0).abs() < 1e-5, "its length is {length}");
                let expected: Vec<f32> = pool(&states, pooling).iter().map(|v| *v as f32).collect();
                let distance = common::cosine_distance(&found, &expected);
                assert!(distance < bar, "{dtype:?} {pooling:?}: {distance}");
                worst = worst.max(distance);
                // Again, with the prompt in the cache.
                assert_eq!(found, embed(&engine, &prompt, pooling));
            }
        }
        println!("{dtype:?}: the largest distance is {worst:.1e}");
        engine.shutdown();
        engine.join_blocking().unwrap();
    }
}

async fn vectors(server: &Server, body: &Value) -> Vec<Vec<f32>> {
    let reply = server.post(PATH, body).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let answer = reply.json();
    assert_eq!(answer["object"], "list");
    assert_eq!(answer["model"], "tiny");
    let data = answer["data"].as_array().unwrap();
    let of = |(index, item): (usize, &Value)| {
        assert_eq!(item["object"], "embedding");
        assert_eq!(item["index"], index);
        match &item["embedding"] {
            Value::String(text) => {
                let bytes = STANDARD.decode(text).unwrap();
                let words = bytes.as_chunks::<4>();
                assert!(words.1.is_empty());
                words
                    .0
                    .iter()
                    .map(|word| f32::from_le_bytes(*word))
                    .collect()
            }
            numbers => serde_json::from_value(numbers.clone()).unwrap(),
        }
    };
    data.iter().enumerate().map(of).collect()
}

#[tokio::test]
async fn texts_and_tokens_one_and_many_are_the_same() {
    let server = Setup::default().start().await;
    let text = vectors(&server, &json!({"input": "abc"})).await;
    assert_eq!(text[0].len(), 4);
    for same in [
        json!({"input": [97, 98, 99]}),
        json!({"input": ["abc"], "model": "alias", "user": "x"}),
        json!({"input": [[97, 98, 99]], "encoding_format": "float"}),
        json!({"input": "abc", "encoding_format": "base64"}),
        json!({"input": "xyzabc", "truncate_prompt_tokens": 3}),
    ] {
        assert_eq!(vectors(&server, &same).await, text, "{same}");
    }
    let several = vectors(&server, &json!({"input": ["abc", "b", "abc"]})).await;
    assert_eq!(several[0], text[0]);
    assert_eq!(several[2], text[0]);
    assert_ne!(several[1], text[0]);
    let reply = server.post(PATH, &json!({"input": ["abc", "b"]})).await;
    let usage = json!({"prompt_tokens": 4, "total_tokens": 4});
    assert_eq!(reply.json()["usage"], usage);
}

#[tokio::test]
async fn dimensions_are_cut_and_lengths_are_one() {
    let server = Setup::default().start().await;
    let whole = vectors(&server, &json!({"input": "abc"})).await.remove(0);
    let cut = json!({"input": "abc", "dimensions": 2});
    let cut = vectors(&server, &cut).await.remove(0);
    let length = |v: &[f32]| v.iter().map(|x| x * x).sum::<f32>().sqrt();
    assert!((length(&whole) - 1.0).abs() < 1e-5);
    assert_eq!(cut.len(), 2);
    let scale = length(&whole[..2]);
    for (a, b) in cut.iter().zip(&whole) {
        assert!((a - b / scale).abs() < 1e-5);
    }

    let mut setup = Setup::default();
    setup.api.pooler = r#"{"pooling_type": "MEAN", "normalize": false}"#.parse().unwrap();
    let mean = setup.start().await;
    let raw = vectors(&mean, &json!({"input": "abc"})).await.remove(0);
    assert!(length(&raw) > 2.0);
}

#[tokio::test]
async fn more_inputs_than_the_queue_holds_are_embedded() {
    let mut setup = Setup::default();
    setup.engine.max_num_seqs = 2;
    setup.engine.max_num_queued_reqs = 64;
    let server = setup.start().await;
    let inputs: Vec<Vec<u32>> = (0..2048).map(|i| vec![i % 200, i / 200]).collect();
    let found = vectors(&server, &json!({"input": inputs})).await;
    assert_eq!(found.len(), 2048);
    assert_eq!(
        found[7],
        vectors(&server, &json!({"input": [7, 0]})).await[0]
    );
    server
        .until("all have gone", |stats| stats.running == 0)
        .await;
}

#[tokio::test]
async fn what_cannot_be_embedded_is_refused_by_its_field() {
    let server = Setup::default().start().await;
    let many = vec!["a"; 2049];
    let empty: [u32; 0] = [];
    for (body, param) in [
        (json!({"input": ""}), "input"),
        (json!({"input": empty}), "input"),
        (json!({"input": ["a", ""]}), "input"),
        (json!({"input": [[1], empty]}), "input"),
        (json!({"input": many}), "input"),
        (json!({"input": [tiny_tokenizer::VOCAB_SIZE]}), "input"),
        (json!({"input": "a".repeat(300)}), "input"),
        (json!({"input": "a".repeat(1 << 20)}), "input"),
        (json!({"input": {"text": "a"}}), "input"),
        (json!({"input": "a", "dimensions": 0}), "dimensions"),
        (json!({"input": "a", "dimensions": 5}), "dimensions"),
        (
            json!({"input": "a", "encoding_format": "int8"}),
            "encoding_format",
        ),
        (
            json!({"input": "a", "truncate_prompt_tokens": 0}),
            "truncate_prompt_tokens",
        ),
        (
            json!({"input": "a", "cache_salt": "s".repeat(300)}),
            "cache_salt",
        ),
    ] {
        let message = server.post(PATH, &body).await.error(400, Some(param));
        assert!(message.len() > 10, "{message}");
    }
    assert_eq!(server.post(PATH, &json!({})).await.status, 400);
    let unknown = json!({"input": "a", "model": "other"});
    server.post(PATH, &unknown).await.error(404, Some("model"));
    // A whole input at the model's length is fine.
    let whole = json!({"input": vec![1; 256]});
    assert_eq!(server.post(PATH, &whole).await.status, 200);
    let cut = json!({"input": "a".repeat(1000), "truncate_prompt_tokens": -1});
    assert_eq!(server.post(PATH, &cut).await.status, 200);
}

#[tokio::test]
async fn a_device_that_cannot_says_what_can() {
    let server = Setup::saying("x").start().await;
    let reply: Reply = server.post(PATH, &json!({"input": "a"})).await;
    let message = reply.error(501, None);
    assert!(message.contains("--device cpu"), "{message}");
}
