//! Probes, metrics and version.

use std::sync::Arc;

use axum::{
    Json,
    extract::{RawQuery, State},
    response::{IntoResponse, Response},
};
use http::{StatusCode, header};
use serde_json::{Value, json};

use super::{App, error::ApiError};
use crate::shutdown::Phase;

/// Names that one `/metrics?name[]=` may list.
const MAX_NAMES: usize = 64;

fn unavailable(message: impl Into<String>) -> ApiError {
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message)
}

/// `GET /health`: a request sent now would be answered.
pub(super) async fn ready(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let stats = app.model.engine.stats();
    if app.lifecycle.phase() > Phase::Serving || stats.draining {
        let mut error = unavailable("the server is shutting down");
        error.draining = true;
        return Err(error);
    }
    if !stats.alive {
        return Err(unavailable("the engine has stopped"));
    }
    if stats.silent_for > app.config.stall_limit {
        return Err(unavailable(format!(
            "the engine has given no sign of life for {:.0} s",
            stats.silent_for.as_secs_f64()
        )));
    }
    Ok(Json(json!({
        "status": "ok",
        "running": stats.running,
        "waiting": stats.waiting,
        "steps": stats.steps,
    })))
}

/// `GET /health/live`: the process is worth keeping. Fails when only a restart can help.
pub(super) async fn live(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let stats = app.model.engine.stats();
    if !stats.alive && !stats.draining {
        return Err(unavailable("the engine has stopped"));
    }
    let hopeless = app.config.stall_limit * 2;
    if stats.silent_for > hopeless {
        return Err(unavailable("the engine is stuck"));
    }
    Ok(Json(json!({"status": "alive"})))
}

/// `GET /metrics`, with `?name[]=…` for some of them.
pub(super) async fn metrics(State(app): State<Arc<App>>, RawQuery(query): RawQuery) -> Response {
    let query = query.unwrap_or_default();
    let names: Vec<&str> = query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .filter(|(key, _)| matches!(*key, "name[]" | "name%5B%5D" | "name%5b%5d"))
        .map(|(_, name)| name)
        .take(MAX_NAMES)
        .collect();
    // Metric names have one character that clients may escape.
    let names: Vec<String> = names
        .iter()
        .map(|name| name.replace("%3A", ":").replace("%3a", ":"))
        .collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    exposition(app.metrics.render(&names))
}

/// Metrics as Prometheus reads them.
pub(super) fn exposition(text: Vec<u8>) -> Response {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

/// `GET /version`.
pub(super) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}
