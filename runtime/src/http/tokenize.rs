//! `/tokenize` and `/detokenize`.

use std::sync::Arc;

use axum::{Json, extract::State};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    App,
    chat::Conversation,
    error::ApiError,
    openai::{BodyResult, body_bytes},
    parse,
    tools::Tools,
};
use crate::engine::request::TokenId;

#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct TokenizeFields {
    model: Option<String>,
    prompt: Option<String>,
    messages: Option<Vec<Value>>,
    add_special_tokens: Option<bool>,
    add_generation_prompt: Option<bool>,
    return_token_strs: Option<bool>,
    tools: Option<Value>,
    chat_template_kwargs: Option<Map<String, Value>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct DetokenizeFields {
    model: Option<String>,
    tokens: Vec<TokenId>,
}

/// `POST /tokenize`: of a `prompt`, or of `messages` as the chat template renders them.
pub(super) async fn tokenize(
    State(app): State<Arc<App>>,
    body: BodyResult,
) -> Result<Json<Value>, ApiError> {
    let fields: TokenizeFields = parse(&body_bytes(body)?)?;
    app.check_model(fields.model.as_deref())?;
    let (text, add_special_tokens) = match (fields.prompt, fields.messages) {
        (Some(prompt), None) => (prompt, fields.add_special_tokens.unwrap_or(true)),
        (None, Some(messages)) => {
            let add_generation_prompt = fields.add_generation_prompt.unwrap_or(true);
            let mut conversation = Conversation {
                messages,
                tools: Tools::read(fields.tools.as_ref(), None, None)?,
                add_generation_prompt,
                template_kwargs: fields.chat_template_kwargs.unwrap_or_default(),
            };
            let text = conversation.render(&app)?;
            (text, fields.add_special_tokens.unwrap_or(false))
        }
        _ => {
            return Err(ApiError::invalid(
                "prompt",
                "send either prompt or messages",
            ));
        }
    };
    // What is too long to serve may still be counted.
    let tokens = app
        .encode
        .encode(text, add_special_tokens, u32::MAX)
        .await?;
    let mut answer = json!({
        "count": tokens.len(), "max_model_len": app.limits.max_length, "tokens": tokens,
    });
    if fields.return_token_strs.unwrap_or(false) {
        let texts: Vec<_> = tokens
            .iter()
            .map(|&id| String::from_utf8_lossy(app.model.tokenizer.token_bytes(id)))
            .collect();
        answer["token_strs"] = json!(texts);
    }
    Ok(Json(answer))
}

/// `POST /detokenize`.
pub(super) async fn detokenize(
    State(app): State<Arc<App>>,
    body: BodyResult,
) -> Result<Json<Value>, ApiError> {
    let fields: DetokenizeFields = parse(&body_bytes(body)?)?;
    app.check_model(fields.model.as_deref())?;
    let text = app.model.tokenizer.decode(&fields.tokens, false)?;
    Ok(Json(json!({"prompt": text})))
}
