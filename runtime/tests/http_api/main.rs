//! The API as clients see it, over real sockets, with a fake model.
#![allow(clippy::unwrap_used, missing_docs)] // Tests.

mod answers;
mod contract;
mod server;

use serde_json::{Value, json};

#[path = "../support/http_server.rs"]
mod support;

fn chat(extra: Value) -> Value {
    let mut body =
        json!({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5});
    body.as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    body
}

fn completion(extra: Value) -> Value {
    let mut body = json!({"prompt": "abc", "max_tokens": 5, "temperature": 0});
    body.as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    body
}
