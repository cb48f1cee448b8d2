//! Counts, numbers and ids that are out of all bounds.

use serde_json::{Value, json};

use crate::{CHAT, COMPLETIONS, Street, chat, support::tiny_tokenizer, with};

#[tokio::test]
async fn counts_without_bound() {
    let street = Street::new().await;
    let many: Vec<String> = vec!["a".to_owned(); 257];
    street
        .refuses(
            COMPLETIONS,
            &[
                (with(json!({"n": 1_000_000})), "n"),
                (with(json!({"n": 128, "prompt": ["a", "b", "c"]})), "n"),
                (with(json!({"prompt": many})), "prompt"),
                (with(json!({"logprobs": 129})), "logprobs"),
                (with(json!({"prompt_logprobs": 129})), "prompt_logprobs"),
                (with(json!({"stop": vec!["x"; 1000]})), "stop"),
                (
                    with(json!({"stop_token_ids": vec![1; 5000]})),
                    "stop_token_ids",
                ),
                (with(json!({"bad_words": vec!["x"; 5000]})), "bad_words"),
                (
                    with(json!({"allowed_token_ids": vec![1; 5000]})),
                    "allowed_token_ids",
                ),
                (
                    with(json!({"cache_salt": "s".repeat(10_000)})),
                    "cache_salt",
                ),
            ],
        )
        .await;
    let large = with(json!({"user": "x".repeat(9 << 20)})).to_string();
    street.send(COMPLETIONS, &[large]).await[0].error(413, None);
    let many: Vec<Value> = vec![json!({"role": "user", "content": "x"}); 5000];
    let tools: Vec<Value> = vec![json!({"type": "function", "function": {"name": "f"}}); 200];
    street
        .refuses(
            CHAT,
            &[
                (chat(json!({"messages": many})), "messages"),
                (chat(json!({"tools": tools})), "tools"),
            ],
        )
        .await;
}

#[tokio::test]
async fn numbers_that_are_none() {
    let street = Street::new().await;
    let fields = [
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ];
    let mut bodies = Vec::new();
    for field in fields {
        for number in [
            "NaN",
            "Infinity",
            "-Infinity",
            "1e400",
            "-1e400",
            "1e308",
            "\"nan\"",
            "[1]",
        ] {
            bodies.push(format!(
                "{{\"prompt\": \"a\", \"max_tokens\": 2, \"{field}\": {number}}}"
            ));
        }
    }
    for bias in ["NaN", "1e400", "1e308"] {
        bodies.push(format!(
            "{{\"prompt\": \"a\", \"logit_bias\": {{\"1\": {bias}}}}}"
        ));
    }
    for (body, reply) in bodies.iter().zip(street.send(COMPLETIONS, &bodies).await) {
        assert_eq!(reply.status, 400, "{body}: {reply:?}");
        assert!(reply.json()["error"]["message"].as_str().unwrap().len() > 10);
    }
}

#[tokio::test]
async fn least_tokens_without_most_tokens() {
    let street = Street::new().await;
    street
        .refuses(
            COMPLETIONS,
            &[
                (
                    with(json!({"min_tokens": 4_000_000_000_u32, "max_tokens": null})),
                    "min_tokens",
                ),
                (with(json!({"min_tokens": 6})), "min_tokens"),
            ],
        )
        .await;
    let body = chat(json!({"min_tokens": 3, "max_tokens": null, "stop": ["a"]})).to_string();
    assert_eq!(street.send(CHAT, &[body]).await[0].status, 200);
}

#[tokio::test]
async fn token_ids_outside_the_vocabulary() {
    let street = Street::new().await;
    let id = tiny_tokenizer::VOCAB_SIZE;
    street
        .refuses(
            COMPLETIONS,
            &[
                (with(json!({"prompt": [1, id]})), "prompt"),
                (with(json!({"prompt": [[1], [u32::MAX]]})), "prompt"),
                (with(json!({"stop_token_ids": [id]})), "stop_token_ids"),
                (
                    with(json!({"allowed_token_ids": [1, id]})),
                    "allowed_token_ids",
                ),
                (
                    with(json!({"logit_bias": {id.to_string(): 1}})),
                    "logit_bias",
                ),
                (with(json!({"logit_bias": {"-1": 1}})), "logit_bias"),
            ],
        )
        .await;
    let replies = street
        .send("/detokenize", &[json!({"tokens": [id]}).to_string()])
        .await;
    replies[0].error(400, Some("tokens"));
    let negative = with(json!({"prompt": [-1]})).to_string();
    assert_eq!(street.send(COMPLETIONS, &[negative]).await[0].status, 400);
}

#[tokio::test]
async fn embeddings_without_bound() {
    let street = Street::new().await;
    let id = tiny_tokenizer::VOCAB_SIZE;
    street
        .refuses(
            "/v1/embeddings",
            &[
                (json!({"input": vec!["a"; 5000]}), "input"),
                (json!({"input": "a".repeat(100_000)}), "input"),
                (json!({"input": [[1], [id]]}), "input"),
                (json!({"input": ""}), "input"),
                (json!({"input": "a", "dimensions": u32::MAX}), "dimensions"),
            ],
        )
        .await;
    let many = json!({"input": vec!["a"; 2048]}).to_string();
    let reply = street.send("/v1/embeddings", &[many]).await.remove(0);
    assert_eq!(reply.status, 200);
}
