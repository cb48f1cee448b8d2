//! What the end-to-end tests share. The tests themselves are in `tests/`, one file per user story.
//!
//! ```text
//! cluster/   scripts: a real one-node Kubernetes in its own network namespace, and the images
//! src/       cluster → the API server and the installed chart      namespace → a namespace that goes away
//!            service → InferenceServices as a user writes them     wait      → conditions with limits
//!            client  → HTTP and server-sent events                 dump      → what to read after a failure
//!            prometheus → a real one, with the chart's jobs and rules
//!            dashboards → what the chart's dashboards ask it
//!            external_metrics → its figures for HorizontalPodAutoscalers
//!            processes → those of the cluster, to kill
//!            reach   → what a pod reaches over the network
//! tests/     install serve quantized stream recover isolation network invalid scale hpa observe alerts upgrade tls
//! ```
//!
//! **Invariants.**
//! - The tests know Ashlar only from outside: manifests, the Kubernetes API, HTTP. They use no type of another crate, so a
//!   renamed field breaks them as it would break a user.
//! - Nothing sleeps for a fixed time; everything waits for a condition and has a limit ([`wait`]).
//! - A test owns one namespace ([`namespace`]), which enforces the `restricted` Pod Security level, and removes it.
//! - Requests are never retried: `Ready` promises that a request sent now is answered.
//!
//! **Environment.** `KUBECONFIG` names any cluster that can pull the images in `ASHLAR_E2E_OPERATOR_IMAGE` and
//! `ASHLAR_E2E_RUNTIME_IMAGE`, and whose Service names and addresses answer from here. `make e2e` starts one and sets all three.
//! `ASHLAR_E2E_PREVIOUS_CHART` and `ASHLAR_E2E_PREVIOUS_OPERATOR_IMAGE` are those of the last release, to upgrade from.
//! `ASHLAR_E2E_MODEL_URI` replaces the embedded default model, `ASHLAR_E2E_AWQ_MODEL_URI` its AWQ checkpoint,
//! `ASHLAR_E2E_CLIENT_IMAGE` the image with `curl`. The cluster must enforce network policies.

#![forbid(unsafe_code)]

pub mod bucket;
pub mod client;
pub mod cluster;
pub mod dashboards;
pub mod dump;
pub mod external_metrics;
pub mod namespace;
pub mod processes;
pub mod prometheus;
pub mod reach;
pub mod service;
pub mod wait;

pub use cluster::Cluster;
pub use namespace::{Namespace, with_namespace};
