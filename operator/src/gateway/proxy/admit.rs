//! Who may come in: the request's service, its key and the limits of its client.

use std::sync::Arc;
use std::time::Instant;

use http::Uri;
use http::uri::PathAndQuery;
use hyper::body::Incoming;

use super::super::auth::KeyDigest;
use super::super::error::GatewayError;
use super::super::keys::{OnMiss, Verdict};
use super::super::limits::Refusal;
use super::super::metrics::Meter;
use super::super::request_body::ReplayBody;
use super::super::resolve::{self, ModelMatch};
use super::super::snapshot::{Access, Service, Snapshot};
use super::{Failure, Proxy};

/// A request whose service is known and that may be answered by it.
pub(super) struct Admitted {
    pub(super) service: Arc<Service>,
    pub(super) path: PathAndQuery,
    pub(super) client: Option<String>,
    pub(super) body: ReplayBody<Incoming>,
    /// By how many bytes the body's length changed.
    pub(super) grown: i64,
    pub(super) meter: Meter,
}

impl Proxy {
    /// Lets a request in at a service that Host, path or `NAMESPACE/NAME` named.
    pub(super) async fn admit(
        &self,
        service: Arc<Service>,
        path: PathAndQuery,
        key: Option<KeyDigest>,
        body: ReplayBody<Incoming>,
        started: Instant,
    ) -> Result<Admitted, Failure> {
        let meter = self.metrics.meter(&service.spec.id, started);
        let client = match self.authorise(&service, key).await {
            Ok(client) => client,
            Err(error) => return Err(Failure(error, Some(meter))),
        };
        Ok(self.within_limits(Admitted {
            service,
            path,
            client,
            body,
            grown: 0,
            meter,
        })?)
    }

    /// Lets the request on if its client may have it now.
    fn within_limits(&self, mut admitted: Admitted) -> Result<Admitted, GatewayError> {
        let service = &admitted.service;
        let (limits, id) = (&service.spec.limits, &service.spec.id);
        let client = admitted.client.as_deref().unwrap_or_default();
        let gateways = self.snapshots.borrow().gateways;
        let quotas = &service.state.quotas;
        match quotas.admit(limits, client, gateways, Instant::now()) {
            Ok(permit) => {
                admitted.meter.keep(permit);
                Ok(admitted)
            }
            Err(refusal) => {
                self.metrics.limited(id);
                let service = id.clone();
                // It is no load of the service's, and does not count as one.
                admitted.meter.forget();
                Err(match refusal {
                    Refusal::Rate { retry_after } => GatewayError::RateLimited {
                        service,
                        retry_after,
                    },
                    Refusal::Concurrency => GatewayError::TooManyOpen { service },
                })
            }
        }
    }

    /// The name of the key's holder, or nothing at an open service.
    async fn authorise(
        &self,
        service: &Service,
        key: Option<KeyDigest>,
    ) -> Result<Option<String>, GatewayError> {
        if service.spec.access == Access::Open {
            return Ok(None);
        }
        let key = key.ok_or(GatewayError::KeyMissing)?;
        match self.keys.check(service, &key, OnMiss::ReadAgain).await {
            Verdict::Client(client) => Ok(Some(client)),
            Verdict::Rejected => Err(GatewayError::KeyRejected),
            Verdict::Unreadable(reason) => Err(GatewayError::KeysUnreadable {
                service: service.spec.id.clone(),
                reason,
            }),
        }
    }

    /// Finds the service by the body's `model`, and lets the request in there.
    pub(super) async fn admit_by_model(
        &self,
        snapshot: &Snapshot,
        uri: &Uri,
        key: Option<KeyDigest>,
        body: ReplayBody<Incoming>,
        started: Instant,
    ) -> Result<Admitted, Failure> {
        let path = uri
            .path_and_query()
            .cloned()
            .unwrap_or_else(|| PathAndQuery::from_static("/"));
        let (model, literal) = body.model().await?;
        match resolve::by_model(snapshot, &model) {
            ModelMatch::Direct(service) => {
                let served = service.spec.model.clone();
                let mut admitted = self
                    .admit(Arc::clone(service), path, key, body, started)
                    .await?;
                admitted.grown = admitted.body.replace(&literal, &served);
                Ok(admitted)
            }
            ModelMatch::Among(candidates) => {
                // Without a key there is nothing to be found: the answer is the same as for a key of nobody's.
                let Some(key) = key else {
                    return Err(GatewayError::ModelNotFound { model }.into());
                };
                let mut accepted = self.accepting(candidates, key, OnMiss::ReadAgain).await;
                let (Some((service, client)), None) = (accepted.pop(), accepted.pop()) else {
                    return Err(GatewayError::ModelNotFound { model }.into());
                };
                Ok(self.within_limits(Admitted {
                    meter: self.metrics.meter(&service.spec.id, started),
                    service,
                    path,
                    client: Some(client),
                    body,
                    grown: 0,
                })?)
            }
        }
    }

    /// Those of `services` that accept the key, with the name that each knows its holder by.
    async fn accepting(
        &self,
        services: &[Arc<Service>],
        key: KeyDigest,
        on_miss: OnMiss,
    ) -> Vec<(Arc<Service>, String)> {
        let checks = services.iter().map(|service| async move {
            match self.keys.check(service, &key, on_miss).await {
                Verdict::Client(client) => Some((Arc::clone(service), client)),
                Verdict::Rejected | Verdict::Unreadable(_) => None,
            }
        });
        let verdicts = futures::future::join_all(checks).await;
        verdicts.into_iter().flatten().collect()
    }

    /// The services that a key's holder may know of.
    pub(super) async fn visible(
        &self,
        snapshot: &Snapshot,
        key: Option<KeyDigest>,
    ) -> Result<Vec<Arc<Service>>, GatewayError> {
        let key = key.ok_or(GatewayError::KeyMissing)?;
        let keyed: Vec<_> = snapshot
            .services()
            .filter(|service| matches!(service.spec.access, Access::Keys { .. }))
            .cloned()
            .collect();
        let accepted = self.accepting(&keyed, key, OnMiss::Reject).await;
        if accepted.is_empty() {
            return Err(GatewayError::KeyRejected);
        }
        Ok(accepted.into_iter().map(|(service, _)| service).collect())
    }
}
