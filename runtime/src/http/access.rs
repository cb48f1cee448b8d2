//! Around every request: its id, its log line when the last byte is out, its HTTP metrics.

use std::{
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::{MatchedPath, Request, State},
    middleware::Next,
    response::Response,
};
use http::{HeaderName, HeaderValue, Method, StatusCode, header};
use hyper::body::{Frame, SizeHint};

use opentelemetry::Context as TraceContext;

use super::App;
use crate::{
    engine::Timings,
    metrics::HttpSample,
    shutdown::Phase,
    traces::{Asked, RequestSpan, Traces},
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id that is taken over from a client.
const MAX_REQUEST_ID_BYTES: usize = 128;
/// Routes that only probes and collectors call: not counted, and logged at debug.
const PROBES: [&str; 4] = ["/health", "/health/live", "/ping", "/metrics"];

/// What handlers add to the log line of a request.
#[derive(Debug, Default)]
pub(crate) struct AccessInfo {
    pub(crate) prompt_tokens: AtomicU32,
    pub(crate) cached_tokens: AtomicU32,
    pub(crate) completion_tokens: AtomicU32,
    pub(crate) finish: OnceLock<&'static str>,
    /// When the first choice went through its phases.
    pub(crate) timings: OnceLock<Timings>,
    /// What it asked for, where it generates.
    pub(crate) asked: OnceLock<Asked>,
    /// When the request reached the server.
    pub(crate) arrival: OnceLock<Instant>,
    /// Whose request it is.
    pub(crate) tenant: OnceLock<Tenant>,
    /// When it fails if it has not ended.
    pub(crate) deadline: OnceLock<Instant>,
}

impl AccessInfo {
    /// When the request reached the server.
    pub(crate) fn arrival(&self) -> Instant {
        *self.arrival.get_or_init(Instant::now)
    }
}

/// Whose request it is, as far as the server can tell.
#[derive(Debug, Clone)]
pub(crate) struct Tenant {
    /// For fair shares.
    pub(crate) id: u64,
    /// For the prefix cache: hits stay among requests of the same salt.
    pub(crate) salt: Option<String>,
}

/// Writes the line and counts when dropped: at the last byte, or when the client has gone.
struct Record {
    app: Arc<App>,
    info: Arc<AccessInfo>,
    request_id: HeaderValue,
    method: &'static str,
    handler: String,
    status: StatusCode,
    started: Instant,
    first_byte: Option<Duration>,
    request_bytes: u64,
    response_bytes: u64,
    complete: bool,
    /// The trace that it belongs to; `None` when it is not traced.
    trace: Option<TraceContext>,
}

impl Record {
    /// Hands the request's span over.
    fn trace(&self, duration: Duration) {
        let (Some(traces), Some(parent)) = (&self.app.config.traces, &self.trace) else {
            return;
        };
        traces.record(
            parent,
            &RequestSpan {
                method: self.method,
                route: &self.handler,
                status: self.status.as_u16(),
                model: self.app.model_name(),
                request_id: self.request_id.to_str().unwrap_or_default(),
                started: Some(self.started),
                duration,
                client_left: !self.complete,
                prompt_tokens: self.info.prompt_tokens.load(Relaxed),
                cached_tokens: self.info.cached_tokens.load(Relaxed),
                completion_tokens: self.info.completion_tokens.load(Relaxed),
                finish: self.info.finish.get().copied(),
                asked: self.info.asked.get().copied(),
                timings: self.info.timings.get().copied(),
            },
        );
    }

    /// Milliseconds without a place, to the first token, and from there to the last, of the first choice.
    fn phases(&self) -> [f64; 3] {
        let ms = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_duration_since(from).as_secs_f64() * 1e3,
            _ => 0.0,
        };
        self.info.timings.get().map_or([0.0; 3], |t| {
            [
                ms(Some(t.queued), t.scheduled),
                ms(t.scheduled, t.first_token),
                ms(t.first_token, t.last_token),
            ]
        })
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let duration = self.started.elapsed();
        let is_probe = PROBES.contains(&self.handler.as_str());
        if !is_probe {
            self.app.metrics.observe_http(&HttpSample {
                method: self.method,
                status_class: class(self.status),
                handler: &self.handler,
                duration,
                request_bytes: self.request_bytes,
                response_bytes: self.response_bytes,
            });
        }
        self.trace(duration);
        if !self.app.config.access_log {
            return;
        }
        let [queue_ms, prefill_ms, decode_ms] = self.phases();
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    target: "ashlar::access",
                    request_id = self.request_id.to_str().unwrap_or_default(),
                    method = self.method,
                    route = %self.handler,
                    status = self.status.as_u16(),
                    duration_ms = duration.as_secs_f64() * 1e3,
                    first_byte_ms = self.first_byte.unwrap_or(duration).as_secs_f64() * 1e3,
                    queue_ms,
                    prefill_ms,
                    decode_ms,
                    response_bytes = self.response_bytes,
                    prompt_tokens = self.info.prompt_tokens.load(Relaxed),
                    cached_tokens = self.info.cached_tokens.load(Relaxed),
                    completion_tokens = self.info.completion_tokens.load(Relaxed),
                    finish = self.info.finish.get().copied().unwrap_or("none"),
                    client_left = !self.complete,
                    "request"
                )
            };
        }
        if is_probe {
            line!(debug);
        } else {
            line!(info);
        }
    }
}

/// The middleware.
pub(super) async fn record(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
) -> Response {
    let info = Arc::new(AccessInfo::default());
    let request_id = request_id(&request);
    let handler = request.extensions().get::<MatchedPath>();
    let mut record = Record {
        info: Arc::clone(&info),
        request_id: request_id.clone(),
        method: method(request.method()),
        handler: handler.map_or("none", MatchedPath::as_str).to_owned(),
        status: StatusCode::OK,
        started: Instant::now(),
        first_byte: None,
        request_bytes: request.body().size_hint().lower(),
        response_bytes: 0,
        complete: false,
        trace: None,
        app: Arc::clone(&app),
    };
    if app.config.traces.is_some() && !PROBES.contains(&record.handler.as_str()) {
        record.trace = Some(Traces::parent(request.headers()));
    }
    let arrival = info.arrival();
    if let Some(limit) = app.config.request_timeout {
        // Set once, here.
        let _ = info.deadline.set(arrival + limit);
    }
    request.extensions_mut().insert(info);
    let mut response = next.run(request).await;
    record.status = response.status();
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, request_id);
    if app.lifecycle.phase() >= Phase::Refusing {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response.map(|inner| Body::new(RecordedBody { inner, record }))
}

/// The client's id if it is short and printable, otherwise a new one.
fn request_id(request: &Request) -> HeaderValue {
    let given = request.headers().get(REQUEST_ID).filter(|id| {
        let bytes = id.as_bytes();
        (1..=MAX_REQUEST_ID_BYTES).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
    });
    given.cloned().unwrap_or_else(|| {
        let id = uuid::Uuid::new_v4().simple().to_string();
        HeaderValue::from_str(&id).expect("hex digits are a header value: this is a bug")
    })
}

/// A closed set: a client must not be able to invent labels.
fn method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::PATCH => "PATCH",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        _ => "OTHER",
    }
}

fn class(status: StatusCode) -> &'static str {
    match status.as_u16() / 100 {
        1 => "1xx",
        2 => "2xx",
        3 => "3xx",
        4 => "4xx",
        _ => "5xx",
    }
}

/// A body that keeps the [`Record`] until its end.
struct RecordedBody {
    inner: Body,
    record: Record,
}

impl HttpBody for RecordedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    let record = &mut self.record;
                    record.response_bytes += data.len() as u64;
                    let elapsed = record.started.elapsed();
                    record.first_byte.get_or_insert(elapsed);
                    // Hyper may not ask again after the last frame of a body of known length.
                    self.record.complete |= self.inner.is_end_stream();
                }
            }
            Some(Err(_)) => {}
            None => self.record.complete = true,
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
