//! What is measured of HTTP, in the names of FastAPI's instrumentator.

use std::time::Duration;

use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry, core::Collector,
};

const HTTP_SECONDS: [f64; 3] = [0.1, 0.5, 1.0];
const HTTP_FINE_SECONDS: [f64; 21] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0,
    7.5, 10.0, 30.0, 60.0,
];
pub(super) struct Http {
    pub(super) requests: IntCounterVec,
    pub(super) duration: HistogramVec,
    pub(super) fine_duration: Histogram,
    pub(super) request_bytes: HistogramVec,
    pub(super) response_bytes: HistogramVec,
}

impl Http {
    pub(super) fn new(registry: &Registry) -> prometheus::Result<Self> {
        fn add<C: Collector + Clone + 'static>(
            registry: &Registry,
            collector: prometheus::Result<C>,
        ) -> prometheus::Result<C> {
            let collector = collector?;
            registry.register(Box::new(collector.clone()))?;
            Ok(collector)
        }
        let histogram = |name: &str, help: &str, edges: &[f64]| HistogramOpts {
            common_opts: Opts::new(name, help),
            buckets: edges.to_vec(),
        };
        let bytes = [
            256.0,
            1024.0,
            4096.0,
            16384.0,
            65536.0,
            262_144.0,
            1_048_576.0,
        ];
        Ok(Self {
            requests: add(
                registry,
                IntCounterVec::new(
                    Opts::new("http_requests_total", "Requests answered"),
                    &["method", "status", "handler"],
                ),
            )?,
            duration: add(
                registry,
                HistogramVec::new(
                    histogram(
                        "http_request_duration_seconds",
                        "Time to answer",
                        &HTTP_SECONDS,
                    ),
                    &["method", "handler"],
                ),
            )?,
            fine_duration: add(
                registry,
                Histogram::with_opts(histogram(
                    "http_request_duration_highr_seconds",
                    "Time to answer, in fine steps",
                    &HTTP_FINE_SECONDS,
                )),
            )?,
            request_bytes: add(
                registry,
                HistogramVec::new(
                    histogram("http_request_size_bytes", "Bytes of request bodies", &bytes),
                    &["handler"],
                ),
            )?,
            response_bytes: add(
                registry,
                HistogramVec::new(
                    histogram(
                        "http_response_size_bytes",
                        "Bytes of response bodies",
                        &bytes,
                    ),
                    &["handler"],
                ),
            )?,
        })
    }
}

/// One answered HTTP request.
#[derive(Debug, Clone, Copy)]
pub struct HttpSample<'a> {
    /// One of the known methods, or `OTHER`.
    pub method: &'static str,
    /// `2xx`, `4xx`, …
    pub status_class: &'static str,
    /// The route's pattern, or `none`.
    pub handler: &'a str,
    /// From the head of the request to the end of the answer.
    pub duration: Duration,
    /// Bytes of the request's body.
    pub request_bytes: u64,
    /// Bytes of the answer's body.
    pub response_bytes: u64,
}
