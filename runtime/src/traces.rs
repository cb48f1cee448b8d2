//! OpenTelemetry traces: a span per request, in the trace that the client began, sent by OTLP over HTTP.
//!
//! A request's span is made when it has ended, from times that were taken anyhow. Ended spans go to a bounded queue that
//! a thread of its own empties: nobody waits for a collector, and what does not fit is dropped and told in the log.

use std::time::{Duration, Instant, SystemTime};

use http::{HeaderMap, Uri};
use opentelemetry::{
    Array, Context, KeyValue, Value,
    propagation::TextMapPropagator,
    trace::{Span, SpanKind, Status, TraceContextExt, Tracer, TracerProvider},
};
use opentelemetry_http::{Bytes, HeaderExtractor, HttpClient, HttpError};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::{
    Resource,
    propagation::TraceContextPropagator,
    trace::{SdkTracer, SdkTracerProvider},
};

use crate::engine::Timings;

/// Where OTLP over HTTP takes spans, unless the address says another path.
const TRACES_PATH: &str = "/v1/traces";
/// Longest wait for the collector's answer.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for the last spans when the server ends.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest answer of a collector that is read.
const MAX_ANSWER_BYTES: u64 = 1 << 20;

/// Why traces cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    /// The address cannot be used.
    #[error(
        "--otlp-traces-endpoint {endpoint} cannot be used: {reason}; an example is http://collector:4318/v1/traces"
    )]
    Endpoint {
        /// The address.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The environment asks for another protocol.
    #[error(
        "{variable} is {protocol}, and spans are sent as http/protobuf only: unset it and give --otlp-traces-endpoint the collector's HTTP port (4318)"
    )]
    Protocol {
        /// The variable.
        variable: &'static str,
        /// Its value.
        protocol: String,
    },
    /// The exporter cannot be set up.
    #[error("traces cannot be sent: {0}")]
    Exporter(#[source] opentelemetry_otlp::ExporterBuildError),
}

/// Sends spans. Clones are the same.
#[derive(Debug, Clone)]
pub struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

/// One ended request, as its span tells it.
#[derive(Debug, Default)]
pub struct RequestSpan<'a> {
    /// `POST`, …
    pub method: &'a str,
    /// The route's pattern.
    pub route: &'a str,
    /// Status of the answer.
    pub status: u16,
    /// The model's name.
    pub model: &'a str,
    /// Id in log lines and answers.
    pub request_id: &'a str,
    /// When it reached the server.
    pub started: Option<Instant>,
    /// From there to its last byte.
    pub duration: Duration,
    /// The client went away before the end.
    pub client_left: bool,
    /// Prompt tokens.
    pub prompt_tokens: u32,
    /// Of these, taken from the prefix cache.
    pub cached_tokens: u32,
    /// Tokens generated, all choices.
    pub completion_tokens: u32,
    /// How it ended.
    pub finish: Option<&'static str>,
    /// What it asked for.
    pub asked: Option<Asked>,
    /// The times of its first choice.
    pub timings: Option<Timings>,
}

/// What a request asked for, where it generates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Asked {
    /// Choices of each prompt.
    pub n: u32,
    /// Most tokens of a choice, if it said.
    pub max_tokens: Option<u32>,
    /// Temperature.
    pub temperature: f32,
    /// Top-p.
    pub top_p: f32,
}

impl Traces {
    /// Sends spans to this collector. `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER`,
    /// `OTEL_EXPORTER_OTLP_HEADERS` and `OTEL_BSP_*` are read as OpenTelemetry says; without a sampler every request that
    /// no client has decided about is sent.
    ///
    /// # Errors
    /// [`TracesError`] naming what to change.
    pub fn new(endpoint: &str) -> Result<Self, TracesError> {
        for variable in [
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
            "OTEL_EXPORTER_OTLP_PROTOCOL",
        ] {
            if let Some(protocol) = std::env::var(variable)
                .ok()
                .filter(|p| p != "http/protobuf")
            {
                return Err(TracesError::Protocol { variable, protocol });
            }
        }
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(Client::new())
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(address(endpoint)?)
            .with_timeout(EXPORT_TIMEOUT)
            .build()
            .map_err(TracesError::Exporter)?;
        let mut resource = Resource::builder();
        if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
            resource = resource.with_service_name("ashlar");
        }
        let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
        let provider = SdkTracerProvider::builder()
            .with_resource(resource.with_attribute(version).build())
            .with_batch_exporter(exporter)
            .build();
        Ok(Self {
            tracer: provider.tracer("ashlar"),
            provider,
        })
    }

    /// The trace that a client's headers belong to (W3C `traceparent`, `tracestate`).
    #[must_use]
    pub fn parent(headers: &HeaderMap) -> Context {
        TraceContextPropagator::new()
            .extract_with_context(&Context::new(), &HeaderExtractor(headers))
    }

    /// Hands a request's span over, with one below it for each of its phases. Never waits.
    pub fn record(&self, parent: &Context, request: &RequestSpan<'_>) {
        let Some(started) = request.started else {
            return;
        };
        let clock = Clock::now();
        let name = match operation(request.route) {
            Some(operation) => format!("{operation} {}", request.model),
            None => format!("{} {}", request.method, request.route),
        };
        let mut span = self
            .tracer
            .span_builder(name)
            .with_kind(SpanKind::Server)
            .with_start_time(clock.at(started))
            .with_attributes(attributes(request))
            .start_with_context(&self.tracer, parent);
        if request.status >= 500 || request.finish == Some("error") {
            span.set_status(Status::error(format!("status {}", request.status)));
        }
        let context = parent.with_remote_span_context(span.span_context().clone());
        for (name, from, to) in phases(request) {
            let mut phase = self
                .tracer
                .span_builder(name)
                .with_kind(SpanKind::Internal)
                .with_start_time(clock.at(from))
                .start_with_context(&self.tracer, &context);
            phase.end_with_timestamp(clock.at(to));
        }
        span.end_with_timestamp(clock.at(started + request.duration));
    }

    /// Sends what is left. Blocks for a few seconds at most.
    pub fn shutdown(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(SHUTDOWN_TIMEOUT) {
            tracing::warn!(%error, "the last traces could not be sent");
        }
    }
}

/// The instant and the time of day that belong together.
struct Clock(Instant, SystemTime);

impl Clock {
    fn now() -> Self {
        Self(Instant::now(), SystemTime::now())
    }

    fn at(&self, instant: Instant) -> SystemTime {
        self.1 - self.0.saturating_duration_since(instant)
    }
}

/// What a route does, in the words of OpenTelemetry's conventions for generative models.
fn operation(route: &str) -> Option<&'static str> {
    match route {
        "/v1/chat/completions" | "/v1/responses" | "/v1/messages" => Some("chat"),
        "/v1/completions" | "/generate" | "/generate_measured" | "/stream" => {
            Some("text_completion")
        }
        "/v1/embeddings" => Some("embeddings"),
        _ => None,
    }
}

/// Names and times of what the first choice went through.
fn phases(request: &RequestSpan<'_>) -> Vec<(&'static str, Instant, Instant)> {
    let Some(timings) = &request.timings else {
        return Vec::new();
    };
    let points = [
        ("queue", Some(timings.queued), timings.scheduled),
        ("prefill", timings.scheduled, timings.first_token),
        ("decode", timings.first_token, timings.last_token),
    ];
    let known = points
        .into_iter()
        .filter_map(|(name, from, to)| Some((name, from?, to?)));
    known.collect()
}

fn attributes(request: &RequestSpan<'_>) -> Vec<KeyValue> {
    let mut all = vec![
        KeyValue::new("http.request.method", request.method.to_owned()),
        KeyValue::new("http.route", request.route.to_owned()),
        KeyValue::new("http.response.status_code", i64::from(request.status)),
        KeyValue::new("gen_ai.request.id", request.request_id.to_owned()),
    ];
    let mut add = |name: &'static str, value: Value| {
        all.push(KeyValue::new(name, value));
    };
    if request.client_left {
        add("error.type", "client_left".into());
    } else if request.status >= 400 {
        add("error.type", request.status.to_string().into());
    }
    let Some(operation) = operation(request.route) else {
        return all;
    };
    add("gen_ai.operation.name", operation.into());
    add("gen_ai.provider.name", "ashlar".into());
    add("gen_ai.request.model", request.model.to_owned().into());
    add("gen_ai.response.model", request.model.to_owned().into());
    // Each count under its present name and the one that vLLM's spans have.
    let (input, output) = (
        i64::from(request.prompt_tokens),
        i64::from(request.completion_tokens),
    );
    add("gen_ai.usage.input_tokens", input.into());
    add("gen_ai.usage.prompt_tokens", input.into());
    add("gen_ai.usage.output_tokens", output.into());
    add("gen_ai.usage.completion_tokens", output.into());
    let cached = i64::from(request.cached_tokens);
    add("gen_ai.usage.cache_read.input_tokens", cached.into());
    if let Some(finish) = request.finish {
        let reasons = Value::Array(Array::String(vec![finish.into()]));
        add("gen_ai.response.finish_reasons", reasons);
    }
    if let Some(asked) = request.asked {
        add("gen_ai.request.n", i64::from(asked.n).into());
        add(
            "gen_ai.request.temperature",
            f64::from(asked.temperature).into(),
        );
        add("gen_ai.request.top_p", f64::from(asked.top_p).into());
        if let Some(max_tokens) = asked.max_tokens {
            add("gen_ai.request.max_tokens", i64::from(max_tokens).into());
        }
    }
    let end_to_end = request.duration.as_secs_f64();
    add("gen_ai.latency.e2e", end_to_end.into());
    add_latencies(request, &mut add);
    all
}

/// The intervals that vLLM's spans have, in seconds.
fn add_latencies(request: &RequestSpan<'_>, add: &mut impl FnMut(&'static str, Value)) {
    let Some(timings) = &request.timings else {
        return;
    };
    let intervals = [
        (
            "gen_ai.latency.time_in_queue",
            Some(timings.queued),
            timings.scheduled,
        ),
        (
            "gen_ai.latency.time_to_first_token",
            request.started,
            timings.first_token,
        ),
        (
            "gen_ai.latency.time_in_model_prefill",
            timings.scheduled,
            timings.first_token,
        ),
        (
            "gen_ai.latency.time_in_model_decode",
            timings.first_token,
            timings.last_token,
        ),
        (
            "gen_ai.latency.time_in_model_inference",
            timings.scheduled,
            timings.last_token,
        ),
    ];
    for (name, from, to) in intervals {
        if let (Some(from), Some(to)) = (from, to) {
            add(
                name,
                to.saturating_duration_since(from).as_secs_f64().into(),
            );
        }
    }
}

/// The whole address: the usual path where none is given.
fn address(endpoint: &str) -> Result<String, TracesError> {
    let wrong = |reason: String| TracesError::Endpoint {
        endpoint: endpoint.to_owned(),
        reason,
    };
    let uri: Uri = endpoint
        .parse()
        .map_err(|error: http::uri::InvalidUri| wrong(error.to_string()))?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none() {
        return Err(wrong("it is no http:// or https:// address".to_owned()));
    }
    let base = endpoint.trim_end_matches('/');
    Ok(if uri.path().trim_matches('/').is_empty() {
        format!("{base}{TRACES_PATH}")
    } else {
        base.to_owned()
    })
}

/// The HTTP client that the project has anyhow, on the exporter's own thread: it may block there.
#[derive(Debug)]
struct Client(ureq::Agent);

impl Client {
    fn new() -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(EXPORT_TIMEOUT))
            .http_status_as_error(false)
            .max_redirects(0)
            .build();
        Self(config.into())
    }

    fn send(&self, request: http::Request<Bytes>) -> Result<http::Response<Bytes>, ureq::Error> {
        let (head, body) = request.into_parts();
        let response = self.0.run(http::Request::from_parts(head, &body[..]))?;
        let (head, mut body) = response.into_parts();
        let bytes = body.with_config().limit(MAX_ANSWER_BYTES).read_to_vec()?;
        Ok(http::Response::from_parts(head, bytes.into()))
    }
}

#[async_trait::async_trait]
impl HttpClient for Client {
    async fn send_bytes(
        &self,
        request: http::Request<Bytes>,
    ) -> Result<http::Response<Bytes>, HttpError> {
        Ok(self.send(request)?)
    }
}

#[cfg(test)]
mod tests {
    use super::address;

    #[test]
    fn an_address_without_a_path_gets_the_usual_one() {
        let of = |endpoint| address(endpoint).map_err(|error| error.to_string());
        assert_eq!(
            of("http://c:4318"),
            Ok("http://c:4318/v1/traces".to_owned())
        );
        assert_eq!(
            of("http://c:4318/"),
            Ok("http://c:4318/v1/traces".to_owned())
        );
        assert_eq!(of("https://c/otlp/x"), Ok("https://c/otlp/x".to_owned()));
        for wrong in ["collector:4318", "grpc://c:4317", "http://", ""] {
            let error = of(wrong).expect_err("refused");
            assert!(error.contains("http://collector:4318"), "{error}");
        }
    }
}
