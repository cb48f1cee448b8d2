//! Every way the gateway itself answers a request with an error, in OpenAI's envelope:
//! `{"error": {"message", "type", "param", "code"}}`, with the HTTP status as `code`.
//!
//! Errors of the runtime are passed through untouched; these are only the gateway's own.

use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{Response, StatusCode};
use http_body_util::Full;
use serde_json::json;

use super::resolve::Unresolved;
use super::snapshot::ServiceId;

/// An answer of the gateway's own that is not a success. The message is for the caller and says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GatewayError {
    /// Host, path and model lead to no service.
    #[error(transparent)]
    Unresolved(#[from] Unresolved),
    /// The model is served to nobody who holds this key, or by several services.
    #[error(
        "the model `{model}` does not exist or your API key has no access to it; `NAMESPACE/NAME` as model names one service"
    )]
    ModelNotFound {
        /// The model asked for.
        model: String,
    },
    /// The body names no model although nothing else names the service.
    #[error("{reason}: send `model` in a JSON body, or call /NAMESPACE/NAME/v1/…")]
    ModelMissing {
        /// What is wrong with the body.
        reason: &'static str,
    },
    /// No key, or more than one.
    #[error("send your API key as `Authorization: Bearer KEY`")]
    KeyMissing,
    /// A key that this service does not accept.
    #[error("this API key is not accepted here: check the key and the address")]
    KeyRejected,
    /// The Secret with the keys' digests cannot be read.
    #[error(
        "the keys of {service} cannot be read ({reason}): its owner applies the output of `ashlar-operator grant {service}`"
    )]
    KeysUnreadable {
        /// The service.
        service: ServiceId,
        /// What stands in the way.
        reason: &'static str,
    },
    /// The request body is larger than the gateway takes.
    #[error("the request body is larger than {limit} bytes")]
    BodyTooLarge {
        /// The limit in bytes.
        limit: u64,
    },
    /// The request body stopped coming.
    #[error("the request body did not arrive in time")]
    BodyTimeout,
    /// The request body broke off or was malformed.
    #[error("the request body could not be read: {reason}")]
    BodyBroken {
        /// What the HTTP parser said.
        reason: String,
    },
    /// No replica became ready within the time the gateway holds a request.
    #[error("{service} has no ready replica{}; the request was held for {}: try again later", but(.failed), seconds(.held))]
    NoReplica {
        /// The service.
        service: ServiceId,
        /// How long the request was held.
        held: Duration,
        /// What was wrong with the replica that it was sent to before, if it was.
        failed: Option<String>,
    },
    /// Too many requests wait for a replica already.
    #[error(
        "{service} has no ready replica and too many requests wait for one already: try again later"
    )]
    TooManyHeld {
        /// The service.
        service: ServiceId,
    },
    /// Every replica tried refused or dropped the connection before the first byte of an answer.
    #[error(
        "no replica of {service} answered ({reason}): try again, and see `kubectl describe inferenceservice`"
    )]
    Upstream {
        /// The service.
        service: ServiceId,
        /// What the last attempt met.
        reason: String,
    },
    /// The client has sent more than `endpoint.limits` lets it.
    #[error("you have sent too many requests to {service} in the last minute: wait {} s", .retry_after.as_secs_f64().ceil())]
    RateLimited {
        /// The service.
        service: ServiceId,
        /// When another one may come.
        retry_after: Duration,
    },
    /// The client has more open than `endpoint.limits` lets it.
    #[error("you have too many requests open at {service}: wait until one ends")]
    TooManyOpen {
        /// The service.
        service: ServiceId,
    },
    /// The answer had not begun when the request's time was over.
    #[error("{service} did not begin its answer within {}: try again, or allow more time", seconds(.after))]
    DeadlineExceeded {
        /// The service.
        service: ServiceId,
        /// The time that the request had.
        after: Duration,
    },
    /// The picture of the cluster is not there yet.
    #[error("the gateway is starting: try again in a moment")]
    Starting,
}

/// The part of a message that says what was wrong with the last replica.
fn but(failed: &Option<String>) -> String {
    let failed = failed.as_ref();
    failed.map_or_else(String::new, |why| format!(" but one that failed ({why})"))
}

/// `30 s` or `0.2 s`.
fn seconds(duration: &Duration) -> String {
    if duration.subsec_millis() == 0 {
        format!("{} s", duration.as_secs())
    } else {
        format!("{:.1} s", duration.as_secs_f64())
    }
}

impl GatewayError {
    /// The HTTP status.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Unresolved(_) | Self::ModelNotFound { .. } => StatusCode::NOT_FOUND,
            Self::ModelMissing { .. } | Self::BodyBroken { .. } => StatusCode::BAD_REQUEST,
            Self::KeyMissing | Self::KeyRejected => StatusCode::UNAUTHORIZED,
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BodyTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::Upstream { .. } => StatusCode::BAD_GATEWAY,
            Self::RateLimited { .. } | Self::TooManyOpen { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::DeadlineExceeded { .. } => StatusCode::GATEWAY_TIMEOUT,
            Self::KeysUnreadable { .. }
            | Self::NoReplica { .. }
            | Self::TooManyHeld { .. }
            | Self::Starting => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    fn kind(&self) -> &'static str {
        match self.status() {
            StatusCode::NOT_FOUND => "NotFoundError",
            StatusCode::BAD_REQUEST => "BadRequestError",
            StatusCode::UNAUTHORIZED => "AuthenticationError",
            StatusCode::PAYLOAD_TOO_LARGE => "RequestTooLargeError",
            StatusCode::REQUEST_TIMEOUT => "RequestTimeoutError",
            StatusCode::BAD_GATEWAY => "BadGatewayError",
            StatusCode::TOO_MANY_REQUESTS => "RateLimitError",
            StatusCode::GATEWAY_TIMEOUT => "GatewayTimeoutError",
            _ => "ServiceUnavailableError",
        }
    }

    fn param(&self) -> Option<&'static str> {
        match self {
            Self::ModelNotFound { .. } | Self::ModelMissing { .. } => Some("model"),
            _ => None,
        }
    }

    /// Seconds after which another try makes sense.
    fn retry_after(&self) -> Option<u32> {
        match self {
            Self::KeysUnreadable { .. } => Some(10),
            Self::NoReplica { .. } | Self::TooManyHeld { .. } => Some(5),
            Self::Upstream { .. } | Self::Starting | Self::TooManyOpen { .. } => Some(1),
            Self::RateLimited { retry_after, .. } => Some(retry_after.as_secs_f64().ceil() as u32),
            _ => None,
        }
    }

    /// The envelope's JSON.
    #[must_use]
    pub fn envelope(&self) -> String {
        json!({"error": {
            "message": self.to_string(),
            "type": self.kind(),
            "param": self.param(),
            "code": self.status().as_u16(),
        }})
        .to_string()
    }

    /// The whole response.
    #[must_use]
    pub fn response(&self) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::new(Bytes::from(self.envelope())));
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after() {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status() == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]
    use super::*;

    #[test]
    fn the_envelope_has_all_four_fields() {
        let error = GatewayError::ModelNotFound {
            model: "gpt-5\"".to_owned(),
        };
        let body: serde_json::Value = serde_json::from_str(&error.envelope()).unwrap();
        assert_eq!(body["error"]["type"], "NotFoundError");
        assert_eq!(body["error"]["code"], 404);
        assert_eq!(body["error"]["param"], "model");
        assert!(
            body["error"]["message"]
                .as_str()
                .unwrap()
                .contains("gpt-5\"")
        );
        assert_eq!(body["error"].as_object().unwrap().len(), 4);
    }

    #[test]
    fn unavailable_says_when_to_come_back_and_unauthorized_how() {
        let service = ServiceId::new("chat", "mistral");
        let held = Duration::from_secs(30);
        let mut busy = GatewayError::NoReplica {
            service,
            held,
            failed: None,
        };
        assert!(
            busy.to_string()
                .contains("replica; the request was held for 30 s")
        );
        if let GatewayError::NoReplica { failed, .. } = &mut busy {
            *failed = Some("no route".to_owned());
        }
        assert!(
            busy.to_string()
                .contains("replica but one that failed (no route);")
        );
        let busy = busy.response();
        assert_eq!(busy.status(), 503);
        assert_eq!(busy.headers()[RETRY_AFTER], "5");
        let stranger = GatewayError::KeyMissing.response();
        assert_eq!(stranger.status(), 401);
        assert_eq!(stranger.headers()[WWW_AUTHENTICATE], "Bearer");
    }

    #[test]
    fn unreadable_keys_name_the_command() {
        let error = GatewayError::KeysUnreadable {
            service: ServiceId::new("chat", "mistral"),
            reason: "forbidden",
        };
        assert!(
            error
                .to_string()
                .contains("`ashlar-operator grant chat/mistral`")
        );
    }
}
