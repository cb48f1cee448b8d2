//! Chat templates come with models: `TEMPLATE \0 MESSAGES`, the messages as JSON.

use ashlar::chat_template::{ChatInput, ChatTemplate, MAX_OUTPUT_BYTES};
use serde_json::{Value, json};

/// Compiles and renders.
pub(crate) fn run(data: &[u8]) {
    let (template, messages) = crate::halves(data);
    let Ok(template) = String::from_utf8(template.to_vec()) else {
        return;
    };
    let Ok(template) = ChatTemplate::new(template, &crate::tokenizer()) else {
        return;
    };
    let messages: Vec<Value> = serde_json::from_slice(messages)
        .unwrap_or_else(|_| vec![json!({"role": "user", "content": "hello"})]);
    let tools =
        json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]);
    for tools in [None, Some(&tools)] {
        let rendered = template.render(&ChatInput {
            messages: &messages,
            add_generation_prompt: true,
            tools,
            kwargs: None,
        });
        if let Ok(text) = rendered {
            assert!(text.len() <= MAX_OUTPUT_BYTES, "{} bytes", text.len());
        }
    }
}
