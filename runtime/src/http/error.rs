//! Errors in OpenAI's envelope: `{"error": {"message", "type", "param", "code"}}`.

use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue, StatusCode, header};
use serde_json::{Value, json};

use crate::{
    chat_template::ChatTemplateError,
    engine::{SubmitError, request::FinishReason},
    generation::TextFinish,
    tokenizer::TokenizerError,
};

/// Set on answers of a server that is shutting down: the request was not begun and may be sent elsewhere.
pub const DRAINING_HEADER: HeaderName = HeaderName::from_static("x-ashlar-draining");

/// What a client is told.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiError {
    /// Status of the answer.
    pub status: StatusCode,
    /// What is wrong and what to do.
    pub message: String,
    /// The request's field at fault.
    pub param: Option<String>,
    /// Seconds after which to try again.
    pub retry_after: Option<u32>,
    /// The server is shutting down.
    pub draining: bool,
}

impl ApiError {
    /// An error without a field.
    #[must_use]
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            param: None,
            retry_after: None,
            draining: false,
        }
    }

    /// 400 for a field.
    #[must_use]
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self {
            param: Some(param.to_owned()),
            ..Self::new(StatusCode::BAD_REQUEST, message)
        }
    }

    /// 500.
    #[must_use]
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// 429.
    #[must_use]
    pub fn overloaded(message: impl Into<String>, retry_after: u32) -> Self {
        Self {
            retry_after: Some(retry_after),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, message)
        }
    }

    /// 503 of a server that is shutting down.
    #[must_use]
    pub fn draining() -> Self {
        Self {
            draining: true,
            retry_after: Some(1),
            ..Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "the server is shutting down: send the request to another replica",
            )
        }
    }

    /// What a refused submission means to a client; `retry_after` in seconds.
    #[must_use]
    pub fn from_submit(error: &SubmitError, retry_after: u32) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::QueueFull { .. } => Self::overloaded(message, retry_after),
            SubmitError::ShuttingDown => Self::draining(),
            SubmitError::EngineDead { .. } => Self::new(StatusCode::SERVICE_UNAVAILABLE, message),
            SubmitError::EmptyPrompt => Self::invalid("prompt", message),
            SubmitError::NoTokensWanted | SubmitError::TooLong { .. } => {
                Self::invalid("max_tokens", message)
            }
            SubmitError::NoEmbeddings => Self::new(StatusCode::NOT_IMPLEMENTED, message),
            SubmitError::NeverFits { .. } => Self::invalid("prompt", message),
            SubmitError::TokenOutOfRange { .. } => Self::invalid("prompt", message),
        }
    }

    /// The error of a sequence that failed while it ran.
    #[must_use]
    pub fn from_finish(finish: &TextFinish) -> Self {
        let detail = finish.error.as_deref().unwrap_or("unknown reason");
        if finish.reason == FinishReason::Abort {
            return Self::new(StatusCode::REQUEST_TIMEOUT, detail);
        }
        if finish.refused {
            return Self::new(StatusCode::BAD_REQUEST, detail);
        }
        Self::internal(format!("the request failed: {detail}"))
    }

    /// The envelope.
    #[must_use]
    pub fn body(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": type_of(self.status),
            "param": self.param,
            "code": self.status.as_u16(),
        }})
    }
}

/// vLLM's names.
fn type_of(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => "AuthenticationError",
        StatusCode::NOT_FOUND => "NotFoundError",
        StatusCode::REQUEST_TIMEOUT => "RequestTimeoutError",
        StatusCode::METHOD_NOT_ALLOWED => "MethodNotAllowedError",
        StatusCode::PAYLOAD_TOO_LARGE => "RequestTooLargeError",
        StatusCode::UNPROCESSABLE_ENTITY => "UnprocessableEntityError",
        StatusCode::TOO_MANY_REQUESTS => "RateLimitError",
        StatusCode::NOT_IMPLEMENTED => "NotImplementedError",
        StatusCode::SERVICE_UNAVAILABLE => "ServiceUnavailableError",
        status if status.is_client_error() => "BadRequestError",
        _ => "InternalServerError",
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.draining {
            headers.insert(DRAINING_HEADER, HeaderValue::from_static("1"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<ChatTemplateError> for ApiError {
    fn from(error: ChatTemplateError) -> Self {
        match error {
            ChatTemplateError::Invalid(_) => Self::internal(error.to_string()),
            ChatTemplateError::Refused(_)
            | ChatTemplateError::Render(_)
            | ChatTemplateError::TooLarge => Self::invalid("messages", error.to_string()),
        }
    }
}

impl From<TokenizerError> for ApiError {
    fn from(error: TokenizerError) -> Self {
        match error {
            TokenizerError::UnknownId { .. } => Self::invalid("tokens", error.to_string()),
            TokenizerError::Encode { .. } => Self::invalid("prompt", error.to_string()),
            _ => Self::internal(error.to_string()),
        }
    }
}
