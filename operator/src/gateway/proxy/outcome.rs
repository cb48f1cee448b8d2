//! What an attempt at a replica came to: an answer, the request's end, or a failure that another attempt may mend.

use http::{Response, StatusCode};
use hyper::body::Incoming;

use super::super::error::GatewayError;
use super::super::headers;
use super::super::metrics::Cause;
use super::super::request_body::ReplayBody;
use super::ReplicaBody;
use crate::pod_http;

fn is_draining<B>(response: &Response<B>) -> bool {
    response.status() == StatusCode::SERVICE_UNAVAILABLE
        && response
            .headers()
            .get(headers::DRAINING)
            .is_some_and(|value| value == "1")
}

/// What came of an attempt.
pub(super) enum Outcome {
    Answered(Response<ReplicaBody>),
    /// No further attempt can help.
    Ended(GatewayError),
    /// A further attempt may; and what went wrong, in words.
    Failed(Cause, String),
}

/// What came of sending the request.
pub(super) fn outcome(
    sent: Result<Response<ReplicaBody>, pod_http::Error>,
    body: &ReplayBody<Incoming>,
) -> Outcome {
    match sent {
        Ok(response) if is_draining(&response) && body.can_replay() => {
            Outcome::Failed(Cause::Draining, "the replica is draining".to_owned())
        }
        Ok(response) => Outcome::Answered(response),
        Err(error) => match body.failure() {
            Some(failure) => Outcome::Ended(failure),
            None if error.is_connect() => Outcome::Failed(Cause::Connect, root_cause(&error)),
            None => Outcome::Failed(Cause::Reset, root_cause(&error)),
        },
    }
}

/// The innermost error, which says most: `Connection refused`, not `no connection`.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
