//! Tools, reasoning, structured output, and the APIs beside OpenAI's chat, over real sockets.
#![allow(clippy::unwrap_used, missing_docs)] // Tests.

use ashlar::http::{ApiKeys, ReasoningParser};
use serde_json::{Value, json};
use support::Setup;

#[path = "support/http_server.rs"]
mod support;

const CALL: &str = "Let me look.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Köln\"}}\n</tool_call>";

fn tools() -> Value {
    json!([{"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": {
        "type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"],
        "additionalProperties": false, "$defs": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
    }}}])
}

fn chat(extra: Value) -> Value {
    let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 200});
    let extra = extra.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(extra);
    body
}

/// A streamed message as clients put it together: content, reasoning, calls, finish reason.
fn assemble(frames: &[Value]) -> (String, String, Vec<Value>, Value) {
    let (mut content, mut reasoning, mut finish) = (String::new(), String::new(), Value::Null);
    let mut calls: Vec<Value> = Vec::new();
    for frame in frames {
        let choice = &frame["choices"][0];
        let delta = &choice["delta"];
        content.push_str(delta["content"].as_str().unwrap_or_default());
        reasoning.push_str(delta["reasoning_content"].as_str().unwrap_or_default());
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            let at = usize::try_from(call["index"].as_u64().unwrap()).unwrap();
            if at == calls.len() {
                assert_eq!(call["type"], "function");
                calls.push(
                    json!({"id": call["id"], "name": call["function"]["name"], "arguments": ""}),
                );
            }
            let before = calls[at]["arguments"].as_str().unwrap().to_owned();
            let more = call["function"]["arguments"].as_str().unwrap();
            calls[at]["arguments"] = format!("{before}{more}").into();
        }
        if !choice["finish_reason"].is_null() {
            finish = choice["finish_reason"].clone();
        }
    }
    (content, reasoning, calls, finish)
}

#[tokio::test]
async fn a_tool_call_is_read_whole_and_streamed() {
    let server = Setup::answering(CALL).start().await;
    let body = chat(json!({"tools": tools()}));
    let json = server.post("/v1/chat/completions", &body).await.json();
    let choice = &json["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{json}");
    assert_eq!(choice["message"]["content"], "Let me look.");
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(call["function"]["name"], "weather");
    assert_eq!(call["function"]["arguments"], "{\"city\": \"Köln\"}");
    assert!(call["id"].as_str().unwrap().starts_with("call_"));

    let body = chat(json!({"tools": tools(), "stream": true}));
    let frames = server.post("/v1/chat/completions", &body).await.frames();
    let (content, _, calls, finish) = assemble(&frames);
    assert_eq!(content, "Let me look.");
    assert_eq!(finish, "tool_calls");
    assert_eq!(calls[0]["name"], "weather");
    assert_eq!(calls[0]["arguments"], "{\"city\": \"Köln\"}");
    // The arguments come in many pieces, not in one.
    let pieces = frames
        .iter()
        .filter(|f| f["choices"][0]["delta"]["tool_calls"].is_array());
    assert!(pieces.count() > 5);
    // Without tools it is text.
    let json = server
        .post("/v1/chat/completions", &chat(json!({})))
        .await
        .json();
    assert_eq!(json["choices"][0]["message"]["content"], CALL);
    assert_eq!(json["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn a_forced_call_is_valid_whatever_the_model_would_say() {
    let mut setup = Setup::default();
    setup.fake.limits.max_model_len = 2048;
    let server = setup.start().await;
    let named = json!({"type": "function", "function": {"name": "weather"}});
    for seed in 0..6 {
        for (choice, parallel) in [(json!("required"), false), (named.clone(), true)] {
            let extra = json!({
                "tools": tools(), "tool_choice": choice, "parallel_tool_calls": parallel, "seed": seed, "max_tokens": 400,
            });
            let json = server
                .post("/v1/chat/completions", &chat(extra.clone()))
                .await
                .json();
            let message = &json["choices"][0]["message"];
            assert_eq!(json["choices"][0]["finish_reason"], "tool_calls", "{json}");
            let calls = message["tool_calls"].as_array().unwrap();
            assert_eq!(calls.len(), 1);
            assert_eq!(calls[0]["function"]["name"], "weather");
            let arguments: Value =
                serde_json::from_str(calls[0]["function"]["arguments"].as_str().unwrap()).unwrap();
            assert!(["Rome", "Oslo"].contains(&arguments["city"].as_str().unwrap()));
            assert_eq!(message["content"], Value::Null);
            let mut streamed = chat(extra);
            streamed["stream"] = json!(true);
            let frames = server
                .post("/v1/chat/completions", &streamed)
                .await
                .frames();
            let (content, _, calls, finish) = assemble(&frames);
            assert_eq!((content.as_str(), finish), ("", json!("tool_calls")));
            assert_eq!(
                calls[0]["arguments"],
                message["tool_calls"][0]["function"]["arguments"]
            );
        }
    }
}

#[tokio::test]
async fn a_conversation_with_calls_and_results_goes_on() {
    let server = Setup::answering("It rains.").start().await;
    let messages = json!([
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Rome\"}"}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]);
    let body = chat(json!({"messages": messages, "tools": tools()}));
    let json = server.post("/v1/chat/completions", &body).await.json();
    assert_eq!(
        json["choices"][0]["message"]["content"], "It rains.",
        "{json}"
    );
    assert_eq!(json["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn reasoning_is_split_off() {
    let mut setup = Setup::answering("<think>Hm, well.\n</think>\n\nYes.");
    setup.api.reasoning_parser = ReasoningParser::DeepseekR1;
    let server = setup.start().await;
    let json = server
        .post("/v1/chat/completions", &chat(json!({})))
        .await
        .json();
    let message = &json["choices"][0]["message"];
    assert_eq!(message["content"], "Yes.");
    assert_eq!(message["reasoning_content"], "Hm, well.");
    assert_eq!(message["reasoning"], "Hm, well.");
    let body = chat(json!({"stream": true}));
    let frames = server.post("/v1/chat/completions", &body).await.frames();
    let (content, reasoning, _, finish) = assemble(&frames);
    assert_eq!(
        (content.as_str(), reasoning.as_str()),
        ("Yes.", "Hm, well.")
    );
    assert_eq!(finish, "stop");
}

#[tokio::test]
async fn structured_outputs_of_every_kind() {
    let server = Setup::default().start().await;
    let schema = json!({
        "type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"], "additionalProperties": false,
    });
    let is_object = |text: &str| {
        let value: Value = serde_json::from_str(text).unwrap();
        value["a"].as_u64().unwrap() < 100 && ["x", "y"].contains(&value["b"].as_str().unwrap())
    };
    let named = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": true}});
    let digits = |text: &str| text.len() == 4 && text.bytes().all(|byte| byte.is_ascii_digit());
    let choice = |text: &str| ["red", "green"].contains(&text);
    let nested =
        |text: &str| text.contains('c') && text.matches('a').count() == text.matches('b').count();
    type Check<'a> = &'a dyn Fn(&str) -> bool;
    let cases: [(Value, Check<'_>); 8] = [
        (json!({"response_format": named}), &is_object),
        (json!({"structured_outputs": {"json": schema}}), &is_object),
        (json!({"guided_json": schema.to_string()}), &is_object),
        (
            json!({"structured_outputs": {"regex": "[0-9]{4}"}}),
            &digits,
        ),
        (json!({"guided_regex": "[0-9]{2}[0-9]{2}"}), &digits),
        (
            json!({"structured_outputs": {"choice": ["red", "green"]}}),
            &choice,
        ),
        (json!({"guided_choice": ["red", "green"]}), &choice),
        (
            json!({"guided_grammar": "start: \"a\" start \"b\" | \"c\""}),
            &nested,
        ),
    ];
    for (extra, check) in cases {
        for seed in 0..4 {
            let mut body = chat(extra.clone());
            body["seed"] = json!(seed);
            let json = server.post("/v1/chat/completions", &body).await.json();
            let choice = &json["choices"][0];
            let text = choice["message"]["content"].as_str().unwrap();
            if choice["finish_reason"] == "stop" {
                assert!(check(text), "{extra}: {text:?}");
            } else {
                assert!(extra.get("guided_grammar").is_some(), "{json}");
            }
        }
    }
}

#[tokio::test]
async fn allowed_ids_and_bad_words() {
    let server = Setup::default().start().await;
    let body = json!({"prompt": "x", "max_tokens": 40, "allowed_token_ids": [97, 98, 99], "bad_words": ["ab", "c"]});
    let json = server.post("/v1/completions", &body).await.json();
    let text = json["choices"][0]["text"].as_str().unwrap();
    assert_eq!(text.len(), 40);
    assert!(!text.contains("ab") && !text.contains('c'), "{text:?}");
}

#[tokio::test]
async fn log_probabilities_of_the_prompt() {
    let server = Setup::default().start().await;
    let body = json!({"prompt": ["abcd", "xyz"], "max_tokens": 2, "echo": true, "logprobs": 2, "n": 2, "temperature": 0});
    let json = server.post("/v1/completions", &body).await.json();
    for (index, prompt) in [(0, "abcd"), (1, "abcd"), (2, "xyz"), (3, "xyz")] {
        let choice = &json["choices"][index];
        let logprobs = &choice["logprobs"];
        let tokens = logprobs["tokens"].as_array().unwrap();
        assert_eq!(tokens.len(), prompt.len() + 2);
        assert_eq!(tokens[0], prompt[..1]);
        let sampled = logprobs["token_logprobs"].as_array().unwrap();
        assert_eq!(sampled.len(), tokens.len());
        assert_eq!(sampled[0], Value::Null);
        assert!(sampled[1..].iter().all(|l| l.as_f64().unwrap() < 0.0));
        assert_eq!(logprobs["top_logprobs"][1].as_object().unwrap().len(), 2);
        assert!(choice["text"].as_str().unwrap().starts_with(prompt));
    }
    // What generating the same token says of it, the prompt says too.
    let body = json!({"prompt": "abcd", "max_tokens": 1, "logprobs": 0, "temperature": 0});
    let first = server.post("/v1/completions", &body).await.json();
    let logprobs = &first["choices"][0]["logprobs"];
    let text = first["choices"][0]["text"].as_str().unwrap();
    if text.is_ascii() && text.len() == 1 {
        let prompt = [97, 98, 99, 100, u32::from(text.as_bytes()[0])];
        let body =
            json!({"prompt": prompt, "max_tokens": 1, "prompt_logprobs": 1, "temperature": 0});
        let json = server.post("/v1/completions", &body).await.json();
        let entries = json["choices"][0]["prompt_logprobs"].as_array().unwrap();
        assert_eq!(entries.len(), 5);
        let entry = &entries[4][prompt[4].to_string()];
        assert_eq!(entry["rank"], 1);
        let (a, b) = (
            entry["logprob"].as_f64().unwrap(),
            logprobs["token_logprobs"][0].as_f64().unwrap(),
        );
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
    let chat = chat(json!({"prompt_logprobs": 0, "max_tokens": 1}));
    let json = server.post("/v1/chat/completions", &chat).await.json();
    let prompt = json["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(
        json["prompt_logprobs"].as_array().unwrap().len() as u64,
        prompt
    );
}

#[tokio::test]
async fn responses_whole_and_streamed() {
    let mut setup = Setup::answering(&format!("<think>Hm.</think>{CALL}"));
    setup.api.reasoning_parser = ReasoningParser::DeepseekR1;
    let server = setup.start().await;
    let flat = json!([{"type": "function", "name": "weather", "parameters": {"type": "object"}}]);
    let input = json!([
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    ]);
    let mut body = json!({"model": "tiny", "input": input, "tools": flat, "max_output_tokens": 300, "instructions": "x"});
    let whole = server.post("/v1/responses", &body).await.json();
    assert_eq!(whole["object"], "response", "{whole}");
    assert_eq!(whole["status"], "completed");
    let kinds: Vec<&str> = whole["output"]
        .as_array()
        .unwrap()
        .iter()
        .map(|i| i["type"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["reasoning", "message", "function_call"]);
    assert_eq!(whole["output"][0]["content"][0]["text"], "Hm.");
    assert_eq!(whole["output"][1]["content"][0]["text"], "Let me look.");
    assert_eq!(whole["output"][2]["arguments"], "{\"city\": \"Köln\"}");
    let usage = &whole["usage"];
    let sum = usage["input_tokens"].as_u64().unwrap() + usage["output_tokens"].as_u64().unwrap();
    assert_eq!(usage["total_tokens"], sum);

    body["stream"] = json!(true);
    let events = server.post("/v1/responses", &body).await.events();
    assert_eq!(events[0]["type"], "response.created");
    let last = events.last().unwrap();
    assert_eq!(last["type"], "response.completed");
    let text = |kind: &str| -> String {
        let of_kind = events.iter().filter(|event| event["type"] == kind);
        of_kind
            .map(|event| event["delta"].as_str().unwrap())
            .collect()
    };
    assert_eq!(text("response.output_text.delta"), "Let me look.");
    assert_eq!(text("response.reasoning_text.delta"), "Hm.");
    assert_eq!(
        text("response.function_call_arguments.delta"),
        "{\"city\": \"Köln\"}"
    );
    for (index, item) in last["response"]["output"]
        .as_array()
        .unwrap()
        .iter()
        .enumerate()
    {
        let of_item: Vec<&str> = events
            .iter()
            .filter(|event| event["output_index"] == index)
            .map(|event| event["type"].as_str().unwrap())
            .collect();
        assert_eq!(of_item.first(), Some(&"response.output_item.added"));
        assert_eq!(of_item.last(), Some(&"response.output_item.done"));
        assert_eq!(item["status"], "completed");
    }

    let cut = json!({"input": "Hi", "max_output_tokens": 3});
    let cut = server.post("/v1/responses", &cut).await.json();
    assert_eq!(cut["status"], "incomplete");
    assert_eq!(cut["incomplete_details"]["reason"], "max_output_tokens");
    let stateful = json!({"input": "Hi", "previous_response_id": "resp_1"});
    server
        .post("/v1/responses", &stateful)
        .await
        .error(400, Some("previous_response_id"));
}

#[tokio::test]
async fn messages_whole_and_streamed() {
    let server = Setup::answering(CALL).start().await;
    let tool = json!({"name": "weather", "input_schema": {"type": "object", "properties": {}}});
    let messages = json!([
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": [
            {"type": "text", "text": "One moment."}, {"type": "tool_use", "id": "t1", "name": "weather", "input": {}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
            {"type": "text", "text": "And now?"}]},
    ]);
    let mut body = json!({"model": "tiny", "max_tokens": 300, "system": "Be brief.", "messages": messages, "tools": [tool]});
    let whole = server.post("/v1/messages", &body).await.json();
    assert_eq!(whole["type"], "message", "{whole}");
    assert_eq!(whole["stop_reason"], "tool_use");
    assert_eq!(
        whole["content"][0],
        json!({"type": "text", "text": "Let me look."})
    );
    assert_eq!(whole["content"][1]["input"], json!({"city": "Köln"}));

    let count = server.post("/v1/messages/count_tokens", &body).await.json();
    assert_eq!(count["input_tokens"], whole["usage"]["input_tokens"]);

    body["stream"] = json!(true);
    let events = server.post("/v1/messages", &body).await.events();
    let kinds: Vec<&str> = events
        .iter()
        .map(|event| event["type"].as_str().unwrap())
        .collect();
    assert_eq!(
        kinds[..3],
        [
            "message_start",
            "content_block_start",
            "content_block_delta"
        ]
    );
    assert_eq!(
        kinds[kinds.len() - 3..],
        ["content_block_stop", "message_delta", "message_stop"]
    );
    let joined = |kind: &str, field: &str| -> String {
        let deltas = events
            .iter()
            .map(|event| &event["delta"])
            .filter(|delta| delta["type"] == kind);
        deltas.map(|delta| delta[field].as_str().unwrap()).collect()
    };
    assert_eq!(joined("text_delta", "text"), "Let me look.");
    assert_eq!(
        joined("input_json_delta", "partial_json"),
        "{\"city\": \"Köln\"}"
    );
    assert_eq!(events[events.len() - 2]["delta"]["stop_reason"], "tool_use");

    let reply = server.post("/v1/messages", &json!({"messages": []})).await;
    assert_eq!(reply.status, 400);
    assert_eq!(reply.json()["type"], "error");
    assert_eq!(reply.json()["error"]["type"], "invalid_request_error");
}

#[tokio::test]
async fn stop_sequences_and_lengths_of_messages() {
    let server = Setup::saying("one END two ").start().await;
    let body = json!({
        "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}], "stop_sequences": ["END"],
    });
    let json = server.post("/v1/messages", &body).await.json();
    assert_eq!(
        (&json["stop_reason"], &json["stop_sequence"]),
        (&json!("stop_sequence"), &json!("END"))
    );
    assert_eq!(json["content"][0]["text"], "one ");
    let body = json!({"max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]});
    let json = server.post("/v1/messages", &body).await.json();
    assert_eq!(json["stop_reason"], "max_tokens");
}

#[tokio::test]
async fn an_anthropic_key_opens_too() {
    let mut setup = Setup::default();
    setup.api.api_keys = ApiKeys::new(&["secret"]);
    let server = setup.start().await;
    let body =
        json!({"max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]}).to_string();
    for (header, status) in [
        ("x-api-key: secret", 200),
        ("x-api-key: wrong", 401),
        ("x-other: secret", 401),
    ] {
        let reply = server.send("POST", "/v1/messages", &[header], &body).await;
        assert_eq!(reply.status, status);
    }
}

#[tokio::test]
async fn tenants_do_not_see_each_other_s_prefixes() {
    let mut setup = Setup::default();
    setup.api.api_keys = ApiKeys::new(&["one", "two"]);
    setup.api.isolate_prefix_cache = true;
    let server = setup.start().await;
    let body = json!({"prompt": "x".repeat(100), "max_tokens": 1}).to_string();
    let mut cached = Vec::new();
    for key in ["one", "one", "two", "two"] {
        let header = format!("authorization: Bearer {key}");
        let reply = server
            .send("POST", "/v1/completions", &[&header], &body)
            .await;
        cached.push(
            reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
                .as_u64()
                .unwrap(),
        );
    }
    assert_eq!(cached, [0, 96, 0, 96]);
}

#[tokio::test]
async fn a_request_over_its_time_limit_fails() {
    let mut setup = Setup::saying("x").step(std::time::Duration::from_millis(20));
    setup.api.request_timeout = Some(std::time::Duration::from_millis(150));
    let server = setup.start().await;
    let body = json!({"prompt": "a", "max_tokens": 200});
    server.post("/v1/completions", &body).await.error(408, None);
    let body = json!({"prompt": "a", "max_tokens": 200, "stream": true});
    let frames = server.post("/v1/completions", &body).await.frames();
    assert_eq!(frames.last().unwrap()["error"]["code"], 408);
    let short = json!({"prompt": "a", "max_tokens": 2});
    assert_eq!(server.post("/v1/completions", &short).await.status, 200);
}
