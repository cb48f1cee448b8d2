//! Spans as a collector gets them, over HTTP on loopback.
#![allow(clippy::unwrap_used, missing_docs)] // Tests fail by panicking.

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use ashlar::traces::{RequestSpan, Traces};
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{KeyValue, any_value::Value},
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use prost::Message;
use serde_json::json;
use support::{Server, Setup};

#[path = "support/http_server.rs"]
mod support;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

/// Takes what is posted to `/v1/traces`.
#[derive(Clone)]
struct Collector {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<ExportTraceServiceRequest>>>,
}

impl Collector {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let collector = Self {
            address: listener.local_addr().unwrap(),
            requests: Arc::default(),
        };
        let requests = Arc::clone(&collector.requests);
        // Ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                let requests = Arc::clone(&requests);
                std::thread::spawn(move || {
                    let mut reader = BufReader::new(stream);
                    while let Some(request) = read_request(&mut reader) {
                        requests.lock().unwrap().push(request);
                        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
                        reader.get_mut().write_all(answer).unwrap();
                    }
                });
            }
        });
        collector
    }

    fn traces(&self) -> Traces {
        Traces::new(&format!("http://{}", self.address)).unwrap()
    }

    fn spans(&self) -> Vec<Span> {
        let requests = self.requests.lock().unwrap();
        let scopes = requests
            .iter()
            .flat_map(|request| &request.resource_spans)
            .flat_map(|resource| &resource.scope_spans);
        scopes.flat_map(|scope| scope.spans.clone()).collect()
    }
}

fn read_request(reader: &mut impl BufRead) -> Option<ExportTraceServiceRequest> {
    let mut line = String::new();
    if reader.read_line(&mut line).ok()? == 0 {
        return None;
    }
    assert_eq!(line.trim(), "POST /v1/traces HTTP/1.1");
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let line = line.trim().to_lowercase();
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(": ").unwrap();
        match name {
            "content-length" => length = value.parse().unwrap(),
            "content-type" => assert_eq!(value, "application/x-protobuf"),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    Some(ExportTraceServiceRequest::decode(body.as_slice()).unwrap())
}

fn attributes(list: &[KeyValue]) -> HashMap<&str, &Value> {
    let pairs = list.iter().filter_map(|pair| {
        let value = pair.value.as_ref()?.value.as_ref()?;
        Some((pair.key.as_str(), value))
    });
    pairs.collect()
}

fn seconds(attributes: &HashMap<&str, &Value>, name: &str) -> f64 {
    match attributes.get(name) {
        Some(Value::DoubleValue(seconds)) => *seconds,
        other => panic!("{name} is {other:?}"),
    }
}

async fn serve(traces: &Traces) -> Server {
    let mut setup = Setup::saying("ab").step(Duration::from_millis(2));
    setup.api.traces = Some(traces.clone());
    setup.start().await
}

/// Every span on its way has arrived.
async fn settle(server: &Server, traces: Traces) {
    server.connections.all_ended().await;
    tokio::task::spawn_blocking(move || traces.shutdown())
        .await
        .unwrap();
}

#[tokio::test]
async fn a_request_is_a_span_of_its_client_s_trace_with_its_phases_below() {
    let collector = Collector::start();
    let traces = collector.traces();
    let server = serve(&traces).await;
    let parent = format!("traceparent: 00-{TRACE}-{PARENT}-01");
    let body =
        json!({"prompt": "abc", "max_tokens": 5, "temperature": 0.5, "n": 2, "stream": true});
    let headers = [parent.as_str(), "x-request-id: r1"];
    let reply = server
        .send("POST", "/v1/completions", &headers, &body.to_string())
        .await;
    assert_eq!(reply.status, 200);
    server.get("/health").await;
    settle(&server, traces).await;

    let resource = collector.requests.lock().unwrap()[0].resource_spans[0]
        .resource
        .clone()
        .unwrap();
    let service = attributes(&resource.attributes)["service.name"].clone();
    assert_eq!(service, Value::StringValue("ashlar".to_owned()));

    let spans = collector.spans();
    let span = spans
        .iter()
        .find(|span| span.name == "text_completion tiny")
        .unwrap_or_else(|| panic!("{spans:?}"));
    assert_eq!(hex::encode(&span.trace_id), TRACE);
    assert_eq!(hex::encode(&span.parent_span_id), PARENT);
    assert_eq!(span.kind(), SpanKind::Server);
    let found = attributes(&span.attributes);
    for (name, expected) in [
        (
            "gen_ai.operation.name",
            Value::StringValue("text_completion".into()),
        ),
        ("gen_ai.request.id", Value::StringValue("r1".into())),
        ("gen_ai.request.model", Value::StringValue("tiny".into())),
        ("gen_ai.request.n", Value::IntValue(2)),
        ("gen_ai.request.max_tokens", Value::IntValue(5)),
        ("gen_ai.request.temperature", Value::DoubleValue(0.5)),
        ("gen_ai.usage.input_tokens", Value::IntValue(3)),
        ("gen_ai.usage.output_tokens", Value::IntValue(10)),
        ("http.response.status_code", Value::IntValue(200)),
        ("http.route", Value::StringValue("/v1/completions".into())),
    ] {
        assert_eq!(found.get(name), Some(&&expected), "{name}");
    }
    let part = |name| seconds(&found, name);
    let decode = part("gen_ai.latency.time_in_model_decode");
    assert!(decode >= 0.008, "four steps of 2 ms: {decode}");
    let inference = part("gen_ai.latency.time_in_model_inference");
    let prefill = part("gen_ai.latency.time_in_model_prefill");
    assert!((inference - prefill - decode).abs() < 1e-9);
    let first = part("gen_ai.latency.time_to_first_token");
    assert!(first >= prefill + part("gen_ai.latency.time_in_queue"));
    assert!(part("gen_ai.latency.e2e") >= inference);

    let mut phases: Vec<&Span> = spans
        .iter()
        .filter(|other| other.parent_span_id == span.span_id)
        .collect();
    phases.sort_by_key(|phase| phase.start_time_unix_nano);
    let names: Vec<&str> = phases.iter().map(|phase| phase.name.as_str()).collect();
    assert_eq!(names, ["queue", "prefill", "decode"]);
    assert!(phases.is_sorted_by(|a, b| a.end_time_unix_nano <= b.start_time_unix_nano));
    for phase in phases {
        assert_eq!(phase.trace_id, span.trace_id);
        assert!(phase.start_time_unix_nano >= span.start_time_unix_nano);
        assert!(phase.end_time_unix_nano <= span.end_time_unix_nano);
    }
    assert_eq!(spans.len(), 4, "probes have no span: {spans:?}");
}

#[tokio::test]
async fn what_the_client_does_not_sample_is_not_sent_and_errors_say_so() {
    let collector = Collector::start();
    let traces = collector.traces();
    let server = serve(&traces).await;
    let unsampled = format!("traceparent: 00-{TRACE}-{PARENT}-00");
    let body = json!({"prompt": "abc", "max_tokens": 2}).to_string();
    server
        .send("POST", "/v1/completions", &[&unsampled], &body)
        .await;
    for header in ["traceparent: nonsense", "tracestate: a=b"] {
        let reply = server
            .send("POST", "/v1/completions", &[header], "{\"prompt\": 7}")
            .await;
        assert_eq!(reply.status, 400);
    }
    settle(&server, traces).await;
    let spans = collector.spans();
    assert_eq!(spans.len(), 2, "{spans:?}");
    for span in &spans {
        assert!(span.parent_span_id.is_empty());
        assert_ne!(hex::encode(&span.trace_id), TRACE);
        let found = attributes(&span.attributes);
        let kind = Value::StringValue("400".to_owned());
        assert_eq!(found.get("error.type"), Some(&&kind));
        // The client's fault is no error of the server.
        let status = span.status.as_ref().map(|status| status.code());
        assert_ne!(status, Some(StatusCode::Error));
    }
    assert_ne!(spans[0].trace_id, spans[1].trace_id);
}

#[test]
fn a_collector_that_does_not_answer_costs_nobody_anything() {
    // Connections are taken by the system, and nobody reads.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let traces = Traces::new(&format!("http://{address}")).unwrap();
    let parent = Traces::parent(&http::HeaderMap::new());
    let started = Instant::now();
    let span = RequestSpan {
        method: "POST",
        route: "/v1/completions",
        status: 200,
        started: Some(started),
        ..RequestSpan::default()
    };
    for _ in 0..100_000 {
        traces.record(&parent, &span);
    }
    let elapsed = started.elapsed();
    assert!(elapsed < Duration::from_secs(5), "{elapsed:?}");
    drop(listener);
    traces.shutdown();
}

#[test]
fn an_address_that_is_none_is_refused() {
    let error = Traces::new("collector:4317").unwrap_err().to_string();
    assert!(error.contains("http://collector:4318/v1/traces"), "{error}");
}
