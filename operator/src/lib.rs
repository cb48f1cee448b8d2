//! # Controller, autoscaler and gateway of Ashlar
//!
//! ```text
//! controller   InferenceService → pods: fetch → validate → build → apply → status
//! autoscaler   load of pods and gateways → replicas: scrape → signal → decide, inside the leading controller
//! exposition   Prometheus' text about many services, part by part
//! gateway      requests → pods: resolve → auth → hold → route → proxy
//! backoff      how long to wait after failures
//! check        asks an installed gateway, for `helm test`
//! model_tls    whom to believe to be a model pod
//! node_cache   folders of a node for models, made by a DaemonSet
//! pod_http     requests to model pods, plain or by TLS
//! renewal      files of Secrets, looked at again for new ones
//! ```
//!
//! Controller and gateway run as two Deployments of one image and meet only in the API server: the gateway reads what
//! the controller wrote.
#![forbid(unsafe_code)]

pub mod autoscaler;
mod backoff;
pub mod check;
pub mod controller;
mod exposition;
pub mod gateway;
pub mod model_tls;
pub mod node_cache;
pub mod pod_http;
mod renewal;
