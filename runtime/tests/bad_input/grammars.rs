//! Grammars and templates that are none, or too much.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{CHAT, COMPLETIONS, Street, chat, with};

#[tokio::test]
async fn schemas_and_expressions_that_are_none_or_too_much() {
    let street = Street::new().await;
    let mut deep = json!({"type": "string"});
    for _ in 0..70 {
        deep = json!({"items": deep});
    }
    let so = |value: Value| with(json!({"structured_outputs": value}));
    street
        .refuses(
            COMPLETIONS,
            &[
                (
                    so(json!({"json": {"type": "nonsense"}})),
                    "structured_outputs",
                ),
                (so(json!({"json": "not json"})), "structured_outputs"),
                (so(json!({"json": 7})), "structured_outputs"),
                (
                    so(json!({"json": {"type": "object", "properties": 7}})),
                    "structured_outputs",
                ),
                (
                    so(json!({"json": {"$ref": "http://169.254.169.254/"}})),
                    "structured_outputs",
                ),
                (so(json!({"json": {"pattern": "("}})), "structured_outputs"),
                (
                    so(json!({"json": json!({"type": "array", "items": {"items": deep}})})),
                    "structured_outputs",
                ),
                (so(json!({"regex": "(("})), "structured_outputs"),
                (so(json!({"regex": "(".repeat(500)})), "structured_outputs"),
                (
                    so(json!({"regex": "x".repeat(200_000)})),
                    "structured_outputs",
                ),
                (so(json!({"choice": []})), "structured_outputs"),
                (so(json!({"choice": vec!["x"; 2000]})), "structured_outputs"),
                (so(json!({"grammar": "start: ("})), "structured_outputs"),
                (
                    so(json!({"grammar": "root ::= \"a\""})),
                    "structured_outputs",
                ),
                (
                    so(json!({"regex": "a", "choice": ["b"]})),
                    "structured_outputs",
                ),
                (
                    with(json!({"response_format": {"type": "json_schema"}})),
                    "response_format",
                ),
            ],
        )
        .await;
    let tool = |parameters: Value| {
        let tool = json!({"type": "function", "function": {"name": "f", "parameters": parameters}});
        chat(json!({"tools": [tool], "tool_choice": "required"}))
    };
    street
        .refuses(
            CHAT,
            &[
                (tool(json!([1])), "tools[0].function.parameters"),
                (tool(json!({"type": 7})), "structured_outputs"),
                (
                    tool(json!({"properties": {"x": {"type": "nonsense"}}})),
                    "structured_outputs",
                ),
            ],
        )
        .await;
    // Expressions that blow up elsewhere: answered, whatever the answer, in bounded time.
    let started = Instant::now();
    let hostile = [
        "(a+)+b",
        "((a{1,100}){1,100}){1,100}",
        "(.*a){25}",
        "(x|xx|xxx)*y",
        "[a-z]{1,100000}",
    ];
    let bodies: Vec<String> = hostile
        .iter()
        .map(|regex| {
            with(json!({"structured_outputs": {"regex": regex}, "max_tokens": 40})).to_string()
        })
        .collect();
    for reply in street.send(COMPLETIONS, &bodies).await {
        assert!([200, 400].contains(&reply.status), "{reply:?}");
    }
    assert!(
        started.elapsed() < Duration::from_secs(30),
        "{:?}",
        started.elapsed()
    );
}

#[tokio::test]
async fn many_different_grammars() {
    let street = Street::new().await;
    let bodies: Vec<String> = (0..300)
        .map(|n| {
            with(json!({"structured_outputs": {"regex": format!("[ab]{n}")}, "max_tokens": 6}))
                .to_string()
        })
        .collect();
    for (n, reply) in street.send(COMPLETIONS, &bodies).await.iter().enumerate() {
        let text = reply.json()["choices"][0]["text"]
            .as_str()
            .unwrap()
            .to_owned();
        assert!(
            ["a", "b"].iter().any(|c| text == format!("{c}{n}")),
            "{text}"
        );
    }
}

#[tokio::test]
async fn templates_and_their_variables() {
    let street = Street::new().await;
    let many: serde_json::Map<String, Value> =
        (0..100).map(|n| (format!("k{n}"), json!(n))).collect();
    street
        .refuses(
            CHAT,
            &[
                (
                    chat(json!({"chat_template": "{% for i in range(10 ** 12) %}x{% endfor %}"})),
                    "chat_template",
                ),
                (
                    chat(json!({"chat_template_kwargs": {"messages": []}})),
                    "chat_template_kwargs",
                ),
                (
                    chat(json!({"chat_template_kwargs": {"chat_template": "x"}})),
                    "chat_template_kwargs",
                ),
                (
                    chat(json!({"chat_template_kwargs": many})),
                    "chat_template_kwargs",
                ),
            ],
        )
        .await;
    let fine = chat(json!({"chat_template_kwargs": {"enable_thinking": false}})).to_string();
    assert_eq!(street.send(CHAT, &[fine]).await[0].status, 200);
}
