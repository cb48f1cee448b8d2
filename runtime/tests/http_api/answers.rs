//! What requests are answered with, whole and in streams.

use serde_json::{Value, json};

use crate::{
    chat, completion,
    support::{Setup, tiny_tokenizer},
};

#[tokio::test]
async fn a_chat_is_answered_with_usage() {
    let server = Setup::saying("hello").start().await;
    let reply = server.post("/v1/chat/completions", &chat(json!({}))).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert!(reply.headers.contains_key("x-request-id"));
    let json = reply.json();
    assert!(json["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(json["object"], "chat.completion");
    assert_eq!(json["model"], "tiny");
    let choice = &json["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["message"]["content"], "hello");
    assert_eq!(choice["finish_reason"], "length");
    // <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n in tokens.
    assert_eq!(json["usage"]["prompt_tokens"], 1 + 5 + 2 + 1 + 1 + 1 + 10);
    assert_eq!(json["usage"]["completion_tokens"], 5);
    assert_eq!(json["usage"]["total_tokens"], 26);
    assert_eq!(json["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
}

#[tokio::test]
async fn a_stream_has_a_chunk_per_token_and_usage_at_the_end() {
    let server = Setup::saying("a日b").start().await;
    let body = chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let reply = server.post("/v1/chat/completions", &body).await;
    assert!(reply.headers["content-type"].starts_with("text/event-stream"));
    let frames = reply.frames();
    assert_eq!(frames.len(), 6);
    let contents: Vec<&str> = frames[..5]
        .iter()
        .map(|frame| frame["choices"][0]["delta"]["content"].as_str().unwrap())
        .collect();
    assert_eq!(contents, ["a", "", "", "日", "b"]);
    assert_eq!(frames[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(frames[0]["object"], "chat.completion.chunk");
    assert_eq!(frames[3]["choices"][0]["finish_reason"], Value::Null);
    assert_eq!(frames[4]["choices"][0]["finish_reason"], "length");
    assert_eq!(frames[5]["choices"], json!([]));
    assert_eq!(frames[5]["usage"]["completion_tokens"], 5);
    assert!(frames.iter().all(|frame| frame["id"] == frames[0]["id"]));
}

#[tokio::test]
async fn streams_say_what_whole_answers_say() {
    let server = Setup::default().start().await;
    for extra in [
        json!({"seed": 7, "temperature": 1.0, "n": 3, "max_tokens": 20}),
        json!({"logprobs": 2, "n": 2}),
        json!({"prompt": ["ab", "cd"], "echo": true}),
        json!({"frequency_penalty": 1.5, "logit_bias": {"65": 5}, "min_tokens": 3}),
    ] {
        let whole = server
            .post("/v1/completions", &completion(extra.clone()))
            .await;
        let whole = whole.json();
        let mut streamed = completion(extra);
        streamed["stream"] = json!(true);
        let frames = server.post("/v1/completions", &streamed).await.frames();
        for choice in whole["choices"].as_array().unwrap() {
            let mine: Vec<&Value> = frames
                .iter()
                .map(|frame| &frame["choices"][0])
                .filter(|chunk| chunk["index"] == choice["index"])
                .collect();
            let text: String = mine.iter().map(|c| c["text"].as_str().unwrap()).collect();
            assert_eq!(choice["text"], text.as_str());
            assert_eq!(
                choice["finish_reason"],
                mine.last().unwrap()["finish_reason"]
            );
            if !choice["logprobs"].is_null() {
                let tokens: Vec<&Value> = mine
                    .iter()
                    .flat_map(|c| c["logprobs"]["token_logprobs"].as_array().unwrap())
                    .collect();
                let whole: Vec<&Value> = choice["logprobs"]["token_logprobs"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .collect();
                assert_eq!(whole, tokens);
                assert_eq!(
                    choice["logprobs"]["top_logprobs"][0]
                        .as_object()
                        .unwrap()
                        .len(),
                    2
                );
            }
        }
    }
}

#[tokio::test]
async fn choices_differ_and_seeds_repeat() {
    let server = Setup::default().start().await;
    let body = completion(json!({"seed": 7, "temperature": 1.0, "n": 3, "max_tokens": 20}));
    let first = server.post("/v1/completions", &body).await.json();
    let again = server.post("/v1/completions", &body).await.json();
    assert_eq!(first["choices"], again["choices"]);
    let texts: std::collections::HashSet<&str> = first["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| choice["text"].as_str().unwrap())
        .collect();
    assert_eq!(texts.len(), 3);
    assert_eq!(first["usage"]["prompt_tokens"], 3);
}

#[tokio::test]
async fn chat_logprobs_have_tokens_and_bytes() {
    let server = Setup::default().start().await;
    let body = chat(json!({"logprobs": true, "top_logprobs": 3, "temperature": 0}));
    let json = server.post("/v1/chat/completions", &body).await.json();
    let content = json["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    assert_eq!(content.len(), 5);
    for entry in content {
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        // Greedy: the sampled token is the most likely one.
        assert_eq!(entry["logprob"], top[0]["logprob"]);
        assert_eq!(entry["bytes"], top[0]["bytes"]);
        assert!(entry["logprob"].as_f64().unwrap() <= 0.0);
    }
}

#[tokio::test]
async fn stop_strings_end_the_answer_and_are_named() {
    let server = Setup::saying("one END two").start().await;
    let body = completion(json!({"stop": ["zzz", "END"], "max_tokens": 50}));
    let json = server.post("/v1/completions", &body).await.json();
    assert_eq!(json["choices"][0]["text"], "one ");
    assert_eq!(json["choices"][0]["finish_reason"], "stop");
    assert_eq!(json["choices"][0]["stop_reason"], "END");
    assert_eq!(json["usage"]["completion_tokens"], 7);
    server
        .until("the sequence ends", |stats| stats.running == 0)
        .await;
}

#[tokio::test]
async fn special_tokens_of_the_model_end_answers() {
    let mut setup = Setup::default();
    let mut script: Vec<u32> = "hey".bytes().map(u32::from).collect();
    script.push(tiny_tokenizer::EOS);
    setup.fake.model = ashlar::model_runner::fake::FakeModel::Script(script);
    let server = setup.start().await;
    let json = server
        .post("/v1/completions", &completion(json!({"max_tokens": 9})))
        .await
        .json();
    assert_eq!(json["choices"][0]["text"], "hey");
    assert_eq!(json["choices"][0]["finish_reason"], "stop");
    assert_eq!(json["choices"][0]["stop_reason"], Value::Null);
    let on = server
        .post(
            "/v1/completions",
            &completion(json!({"max_tokens": 9, "ignore_eos": true})),
        )
        .await
        .json();
    assert_eq!(on["choices"][0]["text"], "heyheyh");
    assert_eq!(on["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn the_article_s_routes() {
    let server = Setup::saying("hello").start().await;
    let body = json!({"prompt": "abc", "max_tokens": 5});
    let reply = server.post("/generate", &body).await;
    assert_eq!(reply.json(), json!({"response": "hello"}));

    let frames = server
        .get("/stream?prompt=a%20b&max_tokens=5")
        .await
        .frames();
    assert_eq!(frames.len(), 5);
    assert_eq!(frames[0], json!({"token": u32::from(b'h'), "text": "h"}));

    let before = server.get("/metrics?name[]=llm_requests_total").await.body;
    assert!(before.contains("llm_requests_total 0"), "{before}");
    let measured = server.post("/generate_measured", &body).await.json();
    assert_eq!(measured["response"], "hello");
    let after = server.get("/metrics").await.body;
    assert!(after.contains("llm_requests_total 1"), "{after}");
    assert!(after.contains("llm_generation_seconds_count 1"), "{after}");
}

#[tokio::test]
async fn models_version_and_tokens() {
    let server = Setup::default().start().await;
    let models = server.get("/v1/models").await.json();
    assert_eq!(models["data"][0]["id"], "tiny");
    assert_eq!(models["data"][1]["id"], "alias");
    assert_eq!(models["data"][0]["max_model_len"], 256);
    assert_eq!(server.get("/v1/models/alias").await.json()["id"], "alias");
    server
        .get("/v1/models/other")
        .await
        .error(404, Some("model"));
    assert!(server.get("/version").await.json()["version"].is_string());
    let tokens = server
        .post("/tokenize", &json!({"prompt": "hello"}))
        .await
        .json();
    assert_eq!(tokens["tokens"], json!([258, 111]));
    assert_eq!(tokens["count"], 2);
    let text = server
        .post("/detokenize", &json!({"tokens": [258, 111]}))
        .await
        .json();
    assert_eq!(text["prompt"], "hello");
    server
        .post("/detokenize", &json!({"tokens": [9999]}))
        .await
        .error(400, Some("tokens"));
}
