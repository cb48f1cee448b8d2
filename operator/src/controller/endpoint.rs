//! Whether the address answers as the user wants: gateway, keys and host names.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use ashlar_crds::{Auth, InferenceService};
use k8s_openapi::api::{
    authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec},
    discovery::v1::EndpointSlice,
};
use kube::{Api, ResourceExt as _, api::PostParams};

use super::{Context, status::KeyAccess, timed, validate::ValidatedService};

/// How long a yes is believed: the gateway finds out sooner, and says 503.
const BELIEVED: Duration = Duration::from_secs(1800);
/// Most answers remembered.
const MAX_ANSWERS: usize = 16_384;

/// Yeses of the API server, by namespace and Secret.
#[derive(Default)]
pub(super) struct KeyAnswers(Mutex<HashMap<(String, String), Instant>>);

impl KeyAnswers {
    fn known(&self, key: &(String, String)) -> bool {
        let answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        answers.get(key).is_some_and(|at| at.elapsed() < BELIEVED)
    }

    fn remember(&self, key: (String, String)) {
        let mut answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if answers.len() >= MAX_ANSWERS {
            answers.clear();
        }
        // Not all at one time: a restart must not make every service ask in the same second for ever.
        let early = BELIEVED.mul_f64(rand::random::<f64>() / 2.0);
        let now = Instant::now();
        answers.insert(key, now.checked_sub(early).unwrap_or(now));
    }
}

/// Asks the API server whether the gateway may read the service's Secret.
pub(super) async fn key_access(service: &ValidatedService, context: &Context) -> KeyAccess {
    let endpoint = &service.service.spec.endpoint;
    let Some(secret) = endpoint
        .api_key_secret_ref
        .as_ref()
        .filter(|_| endpoint.auth == Auth::Keys)
    else {
        return KeyAccess::Allowed;
    };
    let key = (service.namespace.clone(), secret.name.clone());
    if context.key_answers.known(&key) {
        return KeyAccess::Allowed;
    }
    let review = SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some(format!(
                "system:serviceaccount:{}:{}",
                context.defaults.namespace, context.gateway_account
            )),
            resource_attributes: Some(ResourceAttributes {
                namespace: Some(service.namespace.clone()),
                verb: Some("get".into()),
                version: Some("v1".into()),
                resource: Some("secrets".into()),
                name: Some(secret.name.clone()),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    };
    let reviews: Api<SubjectAccessReview> = Api::all(context.client.clone());
    match timed(reviews.create(&PostParams::default(), &review)).await {
        Ok(answer) if answer.status.as_ref().is_some_and(|status| status.allowed) => {
            context.key_answers.remember(key);
            KeyAccess::Allowed
        }
        Ok(_) => KeyAccess::Denied,
        Err(error) => {
            tracing::warn!(%error, "cannot ask whether the gateway may read the keys");
            KeyAccess::Unknown
        }
    }
}

/// One of the service's hosts that an older service holds, and which; the gateway judges in the same way. `all` services are
/// looked at only if this one has hosts.
pub(super) fn host_conflict(
    service: &InferenceService,
    all: impl FnOnce() -> Vec<Arc<InferenceService>>,
) -> Option<String> {
    let hosts = &service.spec.endpoint.hosts;
    if hosts.is_empty() {
        return None;
    }
    let age = |service: &InferenceService| {
        let created = service.creation_timestamp();
        let created = created.map_or(i64::MAX, |time| time.0.as_second());
        (created, service.namespace(), service.name_any())
    };
    let own = age(service);
    all()
        .iter()
        .filter(|other| !other.spec.endpoint.hosts.is_empty() && age(other) < own)
        .find_map(|other| {
            let host = hosts.iter().find(|host| other.spec.endpoint.hosts.contains(host))?;
            // Whose it is is not for every tenant to know.
            let theirs = other.namespace() == service.namespace();
            let holder = if theirs {
                format!("InferenceService {}", other.name_any())
            } else {
                "a service of another namespace".to_owned()
            };
            Some(format!(
                "host {host} belongs to {holder}, which is older; remove it from spec.endpoint.hosts of one of the two"
            ))
        })
}

/// Addresses of all gateways, ready or not.
pub(super) fn addresses(slices: &[EndpointSlice]) -> Vec<IpAddr> {
    let endpoints = slices
        .iter()
        .flat_map(|slice| slice.endpoints.iter().flatten());
    endpoints
        .filter_map(|endpoint| endpoint.addresses.first()?.parse().ok())
        .collect()
}

/// Addresses of the gateway that take requests.
pub(super) fn ready_endpoints(slices: &[EndpointSlice]) -> usize {
    slices
        .iter()
        .flat_map(|slice| slice.endpoints.iter().flatten())
        .filter(|endpoint| {
            let conditions = endpoint.conditions.as_ref();
            conditions.is_none_or(|c| c.ready.unwrap_or(true))
        })
        .map(|endpoint| endpoint.addresses.len())
        .sum()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use serde_json::json;

    use super::*;

    fn service(
        namespace: &str,
        name: &str,
        created: &str,
        hosts: &[&str],
    ) -> Arc<InferenceService> {
        let service = json!({
            "apiVersion": "serving.ashlar.dev/v1alpha1", "kind": "InferenceService",
            "metadata": {"name": name, "namespace": namespace, "creationTimestamp": created},
            "spec": {"model": {"uri": "oci://m"}, "endpoint": {"auth": "None", "hosts": hosts}},
        });
        Arc::new(serde_json::from_value(service).unwrap())
    }

    #[test]
    fn the_older_service_keeps_a_host_and_the_younger_is_told() {
        let old = service("a", "old", "2026-01-01T00:00:00Z", &["x.example.com"]);
        let young = service(
            "b",
            "young",
            "2026-01-02T00:00:00Z",
            &["y.example.com", "x.example.com"],
        );
        let all = [Arc::clone(&young), Arc::clone(&old)];
        assert_eq!(host_conflict(&old, || all.to_vec()), None);
        let words = host_conflict(&young, || all.to_vec()).unwrap();
        assert!(
            words.contains("x.example.com") && !words.contains("old "),
            "{words}"
        );
        let neighbour = service("a", "near", "2026-01-02T00:00:00Z", &["x.example.com"]);
        let words = host_conflict(&neighbour, || all.to_vec()).unwrap();
        assert!(words.contains("InferenceService old"), "{words}");
    }
}
