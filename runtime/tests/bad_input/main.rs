//! Inputs that have hurt other servers: each is sent for real, is refused with words that help or served safely, and a
//! neighbour that runs all the while says exactly what it says alone.
#![allow(clippy::unwrap_used, missing_docs)] // Tests.

mod grammars;
mod numbers;
mod requests;

use std::time::Duration;

use serde_json::{Value, json};
use support::{Reply, Server, Setup};
use tokio::task::JoinHandle;

#[path = "../support/http_server.rs"]
mod support;

const NEIGHBOUR: &str = "neighbour";

/// A long stream with a seed of its own.
fn neighbour_body() -> String {
    json!({"prompt": NEIGHBOUR, "max_tokens": 200, "seed": 5, "temperature": 1, "stream": true, "ignore_eos": true})
        .to_string()
}

fn text_of(reply: &Reply) -> String {
    let frames = reply.frames();
    assert_eq!(
        frames.last().unwrap()["choices"][0]["finish_reason"],
        "length",
        "{reply:?}"
    );
    let texts = frames
        .iter()
        .map(|frame| frame["choices"][0]["text"].as_str().unwrap());
    texts.collect()
}

struct Street {
    server: std::sync::Arc<Server>,
    alone: String,
}

impl Street {
    async fn new() -> Self {
        let setup = Setup::default().step(Duration::from_millis(2));
        let server = std::sync::Arc::new(setup.start().await);
        let reply = server
            .send("POST", "/v1/completions", &[], &neighbour_body())
            .await;
        Self {
            alone: text_of(&reply),
            server,
        }
    }

    fn neighbour(&self) -> JoinHandle<Reply> {
        let server = std::sync::Arc::clone(&self.server);
        tokio::spawn(async move {
            server
                .send("POST", "/v1/completions", &[], &neighbour_body())
                .await
        })
    }

    /// Sends bad bodies while a neighbour runs.
    async fn send(&self, path: &str, bodies: &[String]) -> Vec<Reply> {
        let neighbour = self.neighbour();
        self.server
            .until("the neighbour runs", |stats| stats.running > 0)
            .await;
        let mut replies = Vec::new();
        for body in bodies {
            replies.push(self.server.send("POST", path, &[], body).await);
        }
        assert_eq!(
            text_of(&neighbour.await.unwrap()),
            self.alone,
            "{path}: {bodies:?}"
        );
        replies
    }

    /// Each is a 400 that names the field and says something.
    async fn refuses(&self, path: &str, cases: &[(Value, &str)]) {
        let bodies: Vec<String> = cases.iter().map(|(body, _)| body.to_string()).collect();
        let replies = self.send(path, &bodies).await;
        for ((body, param), reply) in cases.iter().zip(replies) {
            let message = reply.error(400, Some(param));
            assert!(message.len() > 10, "{body}: {message}");
        }
    }
}

fn with(extra: Value) -> Value {
    let mut body = json!({"prompt": "abc", "max_tokens": 5});
    let extra = extra.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(extra);
    body
}

fn chat(extra: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5});
    let extra = extra.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(extra);
    body
}

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";
