//! One request from its head to the first byte of an answer: resolve, check the key, pick a replica, send, and try
//! another replica as long as nothing has been answered.
//!
//! A request is tried again after a connection that could not be opened, after a replica's own word that it drains, and
//! once after a connection that broke before the head of a response (an idle connection can close at the very moment it
//! is used; a request that kills its replica must not visit them all). It goes to another replica, or later to the same
//! one (`avoid`). The client's leaving drops the future and with it the replica's connection.

mod admit;
mod outcome;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use http::uri::PathAndQuery;
use http::{HeaderMap, Method, Request, Response, Uri, request};
use hyper::body::Incoming;
use tokio::sync::watch;

use self::admit::Admitted;
use self::outcome::{Outcome, outcome};
use super::affinity::{self, Prefix};
use super::attempt::Attempt;
use super::auth;
use super::avoid::Avoided;
use super::error::GatewayError;
use super::headers;
use super::hold::{Ask, Holds, Picked, Turn};
use super::keys::KeyStore;
use super::metrics::{Cause, Meter, Metrics};
use super::models;
use super::request_body::{AttemptBody, BodyLimits, ReplayBody};
use super::resolve::{self, Target};
use super::response_body::{GatewayBody, Tracked};
use super::snapshot::{Replica, Service, ServiceId, Snapshot};
use crate::model_tls::Trust;
use crate::pod_http::{self, Client, Peer, PodBody, Settings};

/// Attempts before giving up; draining and restarting replicas are passed over quickly.
const MAX_ATTEMPTS: usize = 32;
/// Idle connections to a replica close before the runtime closes them.
const IDLE: Duration = Duration::from_secs(20);
/// Idle connections that are kept for each replica: as many as requests may end at about one time.
const IDLE_CONNECTIONS: usize = 1024;

/// A replica's body, while the request's may still be on its way.
type ReplicaBody = PodBody<AttemptBody<Incoming>>;
/// A response of the gateway.
pub type GatewayResponse = Response<GatewayBody<ReplicaBody>>;

/// Bounds of the proxy.
#[derive(Debug, Clone, Copy)]
pub struct ProxyLimits {
    /// Bounds of a request's body.
    pub body: BodyLimits,
    /// Longest wait for a connection to a replica.
    pub connect_timeout: Duration,
    /// Longest time until an answer begins.
    pub request_timeout: Duration,
}

/// Everything that requests share.
pub struct Proxy {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    /// Turns true once the first whole picture of the cluster is there.
    synced: watch::Receiver<bool>,
    keys: Arc<KeyStore>,
    holds: Holds,
    metrics: Arc<Metrics>,
    limits: ProxyLimits,
    replicas: Client,
}

/// An error, and the meter of the service it concerns.
struct Failure(GatewayError, Option<Meter>);

impl From<GatewayError> for Failure {
    fn from(error: GatewayError) -> Self {
        Self(error, None)
    }
}

/// What is the same for every attempt.
struct Outgoing {
    method: Method,
    path: PathAndQuery,
    headers: HeaderMap,
    length: Option<u64>,
    /// The time that it has until the answer begins, and when that is over.
    timeout: Duration,
    deadline: tokio::time::Instant,
}

impl Outgoing {
    /// The error when its time is over.
    fn late(&self, service: &ServiceId) -> GatewayError {
        GatewayError::DeadlineExceeded {
            service: service.clone(),
            after: self.timeout,
        }
    }

    /// The error when no replica was found, after attempts that failed for `reason`, if there were any.
    fn without_replica(
        &self,
        mut error: GatewayError,
        service: &ServiceId,
        reason: String,
    ) -> GatewayError {
        if let GatewayError::NoReplica { failed, .. } = &mut error {
            if tokio::time::Instant::now() >= self.deadline {
                return self.late(service);
            }
            *failed = (!reason.is_empty()).then_some(reason);
        }
        error
    }
}

impl Proxy {
    /// A proxy over pictures of the cluster that others keep up to date.
    #[must_use]
    pub fn new(
        snapshots: watch::Receiver<Arc<Snapshot>>,
        synced: watch::Receiver<bool>,
        keys: Arc<KeyStore>,
        holds: Holds,
        metrics: Arc<Metrics>,
        limits: ProxyLimits,
        trust: Arc<Trust>,
    ) -> Self {
        let settings = Settings {
            connect_timeout: limits.connect_timeout,
            idle: IDLE,
            idle_per_address: IDLE_CONNECTIONS,
        };
        Self {
            snapshots,
            synced,
            keys,
            holds,
            metrics,
            replicas: Client::new(settings, trust),
            limits,
        }
    }

    /// Answers one request; every failure becomes a response.
    pub async fn handle(&self, request: Request<Incoming>, peer: SocketAddr) -> GatewayResponse {
        let started = Instant::now();
        let (parts, body) = request.into_parts();
        let request_id = headers::request_id(&parts.headers);
        let answered = self.answer(&parts, body, peer, &request_id, started).await;
        let mut response = answered.unwrap_or_else(|Failure(error, mut meter)| {
            let status = error.status();
            match &mut meter {
                Some(meter) => meter.head(status.as_u16()),
                None => self.metrics.unresolved(status.as_u16()),
            }
            if status.is_server_error() {
                tracing::warn!(request_id = ?request_id, %error, "request failed");
            }
            error.response().map(|body| GatewayBody::Own(body, meter))
        });
        headers::to_client(response.headers_mut(), &request_id);
        response
    }

    async fn answer(
        &self,
        parts: &request::Parts,
        body: Incoming,
        peer: SocketAddr,
        request_id: &HeaderValue,
        started: Instant,
    ) -> Result<GatewayResponse, Failure> {
        if !*self.synced.borrow() {
            return Err(GatewayError::Starting.into());
        }
        let length = headers::content_length(&parts.headers);
        let limit = self.limits.body.total;
        if length.is_some_and(|length| length > limit) {
            return Err(GatewayError::BodyTooLarge { limit }.into());
        }
        let snapshot = Arc::clone(&self.snapshots.borrow());
        let host = headers::host(&parts.uri, &parts.headers);
        let key = auth::presented(&parts.headers);
        let body = ReplayBody::new(body, self.limits.body);
        let target = resolve::resolve(&snapshot, host, &parts.method, &parts.uri)
            .map_err(GatewayError::from)?;
        let admitted = match target {
            Target::Service { service, path } => {
                self.admit(service, path, key, body, started).await?
            }
            Target::Model => {
                self.admit_by_model(&snapshot, &parts.uri, key, body, started)
                    .await?
            }
            Target::ModelList => {
                let visible = self.visible(&snapshot, key).await?;
                self.metrics.unresolved(200);
                return Ok(own_json(models::list(&visible)));
            }
            Target::ModelCard { id } => {
                let visible = self.visible(&snapshot, key).await?;
                let card =
                    models::card(&visible, &id).ok_or(GatewayError::ModelNotFound { model: id })?;
                self.metrics.unresolved(200);
                return Ok(own_json(card));
            }
        };
        let timeout = headers::request_timeout(&parts.headers);
        let timeout = timeout.map_or(self.limits.request_timeout, |asked| {
            asked.min(self.limits.request_timeout)
        });
        let mut headers = parts.headers.clone();
        let client = admitted.client.as_deref();
        headers::to_replica(&mut headers, host, peer.ip(), request_id, client);
        let length = length.map(|length| length.saturating_add_signed(admitted.grown));
        if let Some(length) = length {
            headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
        }
        let outgoing = Outgoing {
            method: parts.method.clone(),
            path: admitted.path.clone(),
            headers,
            length,
            timeout,
            deadline: tokio::time::Instant::from_std(started) + timeout,
        };
        self.forward(admitted, &outgoing).await
    }

    /// Sends the request to replica after replica until one answers.
    async fn forward(
        &self,
        admitted: Admitted,
        outgoing: &Outgoing,
    ) -> Result<GatewayResponse, Failure> {
        let Admitted {
            service,
            body,
            meter,
            ..
        } = admitted;
        let id = &service.spec.id;
        let mut snapshots = self.snapshots.clone();
        let prefix = match prompt(&service, outgoing, &body).await {
            Ok(prefix) => prefix,
            Err(error) => return Err(Failure(error, Some(meter))),
        };
        let deadline = self.holds.deadline().min(outgoing.deadline);
        let mut avoided = Avoided::default();
        let mut resets = 0;
        let mut reason = String::new();
        for _ in 0..MAX_ATTEMPTS {
            let ask = Ask {
                id,
                avoided: &avoided,
                prefix: prefix.as_ref(),
                bytes: body.kept_bytes(),
                deadline,
            };
            let picked = self.holds.replica(&mut snapshots, &ask, &meter).await;
            let picked = match picked {
                Ok(picked) => picked,
                Err(error) => {
                    let error = outgoing.without_replica(error, id, reason);
                    return Err(Failure(error, Some(meter)));
                }
            };
            let (mut attempt, outcome) = self.attempt(outgoing, &service, &body, picked).await;
            let cause = match outcome {
                Outcome::Answered(response) => {
                    attempt.head(response.status());
                    return Ok(respond(response, meter, attempt));
                }
                Outcome::Ended(error) => return Err(Failure(error, Some(meter))),
                Outcome::Failed(cause, why) => {
                    failed(cause, &mut attempt, &mut avoided);
                    resets += u32::from(cause == Cause::Reset);
                    reason = why;
                    cause
                }
            };
            let replica = attempt.replica();
            tracing::debug!(service = %id, replica = %replica.address, ?cause, reason, "attempt failed");
            if !body.can_replay() || resets > 1 {
                break;
            }
            meter.retry(cause);
        }
        let service = id.clone();
        Err(Failure(
            GatewayError::Upstream { service, reason },
            Some(meter),
        ))
    }

    /// One attempt at the replica that was picked.
    async fn attempt(
        &self,
        outgoing: &Outgoing,
        service: &Arc<Service>,
        body: &ReplayBody<Incoming>,
        picked: Picked,
    ) -> (Attempt, Outcome) {
        let Picked {
            replica,
            in_flight,
            turn,
        } = picked;
        let attempt = Attempt::new(&self.metrics, service, replica, in_flight);
        let attempt_body = body.attempt(outgoing.length);
        let sent = self.send(outgoing, attempt.replica(), attempt_body, turn);
        let outcome = match tokio::time::timeout_at(outgoing.deadline, sent).await {
            Ok(sent) => outcome(sent, body),
            Err(_) => Outcome::Ended(outgoing.late(&service.spec.id)),
        };
        (attempt, outcome)
    }

    /// Sends the request to the replica, and gives up its turn when it has left.
    async fn send(
        &self,
        outgoing: &Outgoing,
        replica: &Replica,
        body: AttemptBody<Incoming>,
        turn: Option<Turn>,
    ) -> Result<Response<ReplicaBody>, pod_http::Error> {
        let mut request = Request::new(body);
        *request.method_mut() = outgoing.method.clone();
        *request.uri_mut() = Uri::from(outgoing.path.clone());
        *request.headers_mut() = outgoing.headers.clone();
        let peer = Peer {
            address: replica.address,
            tls: replica.tls.as_deref(),
        };
        self.replicas.send(peer, request, turn).await
    }
}

/// The request's prompt, where there is a choice between replicas to make by it.
async fn prompt(
    service: &Service,
    outgoing: &Outgoing,
    body: &ReplayBody<Incoming>,
) -> Result<Option<Prefix>, GatewayError> {
    let single = service.replicas.len() == 1;
    if single || outgoing.method != Method::POST || outgoing.length == Some(0) {
        return Ok(None);
    }
    let beginning = body.beginning(affinity::MAX_BODY_BYTES).await?;
    Ok(Prefix::of_body(&beginning))
}

/// Tells a failure to the replica's health and its revision's trial, and keeps the request away from there.
fn failed(cause: Cause, attempt: &mut Attempt, avoided: &mut Avoided) {
    let incarnation = attempt.replica().incarnation.clone();
    match cause {
        Cause::Draining => avoided.for_good(&incarnation),
        Cause::Connect | Cause::Reset => {
            if avoided.contains(&incarnation) {
                attempt.failed_again();
            } else {
                attempt.failed();
            }
            avoided.for_a_while(&incarnation);
        }
    }
}

/// The replica's response as the client's.
fn respond(response: Response<ReplicaBody>, mut meter: Meter, attempt: Attempt) -> GatewayResponse {
    meter.head(response.status().as_u16());
    let headers = response.headers();
    let events = !headers.contains_key(CONTENT_LENGTH)
        && headers
            .get(CONTENT_TYPE)
            .and_then(|kind| kind.to_str().ok())
            .is_some_and(|kind| kind.starts_with("text/event-stream"));
    response.map(|body| GatewayBody::Replica(Tracked::new(body, meter, attempt, events)))
}

fn own_json(json: String) -> GatewayResponse {
    let body = http_body_util::Full::new(Bytes::from(json));
    let mut response = Response::new(GatewayBody::Own(body, None));
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
