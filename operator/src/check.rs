//! `ashlar-operator check`: asks an installed gateway through its Service, as a client does. `helm test` runs it in a pod.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::StatusCode;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;

/// Longest wait for one answer.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Pause between two tries.
const PAUSE: Duration = Duration::from_millis(500);
/// Most bytes of the answer.
const MAX_BODY: usize = 8 << 20;

/// Arguments of `check`.
#[derive(Debug, Clone, clap::Args)]
pub struct CheckArgs {
    /// The gateway's Service.
    #[arg(
        long,
        default_value = "ashlar-gateway.ashlar-system.svc:80",
        value_name = "HOST:PORT"
    )]
    pub gateway: String,
    /// Seconds after which to give up.
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    pub timeout: u64,
}

/// The gateway did not answer as it should.
#[derive(Debug, thiserror::Error)]
#[error(
    "the gateway {gateway} does not answer as it should: {reason}; look at its pods: kubectl get pods -l app.kubernetes.io/component=gateway"
)]
pub struct CheckError {
    gateway: String,
    reason: String,
}

/// Succeeds as soon as the gateway answers somebody without a key, if only that one is needed.
///
/// # Errors
/// [`CheckError`] with the last failure when it does not in time.
pub async fn run(args: &CheckArgs) -> Result<(), CheckError> {
    let deadline = Instant::now() + Duration::from_secs(args.timeout);
    loop {
        let asked = tokio::time::timeout(TIMEOUT, ask(&args.gateway)).await;
        let reason = match asked {
            Ok(Ok(status)) => {
                tracing::info!(gateway = args.gateway, %status, "the gateway answers");
                return Ok(());
            }
            Ok(Err(reason)) => reason,
            Err(_) => format!("no answer within {} s", TIMEOUT.as_secs()),
        };
        if Instant::now() >= deadline {
            return Err(CheckError {
                gateway: args.gateway.clone(),
                reason,
            });
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// The status of the answer: a list of models, or, where all services ask for keys, that a key is needed.
async fn ask(gateway: &str) -> Result<StatusCode, String> {
    let said = |error: &dyn std::fmt::Display| error.to_string();
    let socket = tokio::net::TcpStream::connect(gateway)
        .await
        .map_err(|error| said(&error))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(socket))
        .await
        .map_err(|error| said(&error))?;
    let connection = tokio::spawn(connection);
    let host = gateway.split(':').next().unwrap_or_default();
    let request = http::Request::get("/v1/models")
        .header(http::header::HOST, host)
        .body(Empty::<Bytes>::new())
        .map_err(|error| said(&error))?;
    let answer = sender
        .send_request(request)
        .await
        .map_err(|error| said(&error))?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), MAX_BODY).collect().await;
    connection.abort();
    let body = body.map_err(|error| error.to_string())?.to_bytes();
    let said: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
    let lists = status.is_success() && said["data"].is_array();
    let wants_key = status == StatusCode::UNAUTHORIZED && said["error"]["message"].is_string();
    if lists || wants_key {
        Ok(status)
    } else {
        Err(format!("it answered {status}"))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use axum::{Json, Router, routing::get};
    use serde_json::json;

    use super::*;

    async fn gateway(router: Router) -> CheckArgs {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let gateway = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move { axum::serve(listener, router).await });
        CheckArgs {
            gateway,
            timeout: 0,
        }
    }

    #[tokio::test]
    async fn a_list_of_models_or_the_wish_for_a_key_is_an_answer() {
        let list = || async { Json(json!({"object": "list", "data": []})) };
        let good = gateway(Router::new().route("/v1/models", get(list))).await;
        run(&good).await.unwrap();

        let closed = || async {
            (
                StatusCode::UNAUTHORIZED,
                Json(json!({"error": {"message": "key"}})),
            )
        };
        let closed = gateway(Router::new().route("/v1/models", get(closed))).await;
        run(&closed).await.unwrap();

        let down = || async { (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"data": []}))) };
        let bad = gateway(Router::new().route("/v1/models", get(down))).await;
        let error = run(&bad).await.unwrap_err().to_string();
        assert!(error.contains("503"), "{error}");

        let nobody = CheckArgs {
            gateway: "127.0.0.1:1".into(),
            timeout: 0,
        };
        assert!(run(&nobody).await.is_err());
    }
}
