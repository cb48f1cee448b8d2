//! Each condition's verdict: whether it holds, and what to say of it.

use ashlar_crds::{
    Auth,
    conditions::{READY, reason},
};

use super::{Facts, KeyAccess};
use crate::{
    autoscaler::Outcome,
    controller::{pods::Blocker, validate::ValidatedService},
};

/// Whether a condition holds, and why.
pub(super) struct Verdict {
    pub(super) ok: bool,
    pub(super) reason: &'static str,
    pub(super) message: String,
}

pub(super) fn verdict(ok: bool, reason: &'static str, message: impl Into<String>) -> Verdict {
    Verdict {
        ok,
        reason,
        message: message.into(),
    }
}

pub(super) fn endpoint_verdict(facts: &Facts<'_>) -> Verdict {
    let spec = &facts.service.service.spec.endpoint;
    if facts.gateway_endpoints == 0 {
        return verdict(
            false,
            reason::GATEWAY_UNAVAILABLE,
            format!(
                "Service {} in namespace {} has no ready endpoint; look at its Deployment",
                facts.defaults.gateway_service, facts.defaults.namespace
            ),
        );
    }
    if let Some(conflict) = facts.host_conflict {
        // By its other addresses the service answers, but not by all that the user asked for.
        return verdict(false, reason::HOST_CONFLICT, conflict);
    }
    if spec.gateway_ref.is_some() && !facts.has_http_routes {
        return verdict(
            false,
            reason::API_NOT_INSTALLED,
            "spec.endpoint.gatewayRef needs the Gateway API (HTTPRoute, gateway.networking.k8s.io/v1), which this cluster does not have; install it, or remove the field",
        );
    }
    match (spec.auth, facts.keys) {
        (Auth::Keys, KeyAccess::Denied) => verdict(
            false,
            reason::KEYS_UNREADABLE,
            format!(
                "the gateway may not read Secret {}; let it: ashlar-operator grant {}/{} | kubectl apply -f -",
                spec.api_key_secret_ref
                    .as_ref()
                    .map_or("", |s| s.name.as_str()),
                facts.service.namespace,
                facts.service.name
            ),
        ),
        (Auth::Keys, KeyAccess::Unknown) => verdict(
            false,
            reason::KEYS_UNREADABLE,
            "it is not known yet whether the gateway may read the keys",
        ),
        (Auth::Keys, KeyAccess::Allowed) => verdict(true, reason::AVAILABLE, "callers show a key"),
        (Auth::None, _) => verdict(
            true,
            reason::AVAILABLE,
            "open to whoever reaches the gateway",
        ),
    }
}

pub(super) fn workloads_verdict(facts: &Facts<'_>, worst: Option<&Blocker>) -> Verdict {
    let wanted = facts.service.wanted;
    if facts.plan.halted {
        if let Some(why) = &facts.newest.rolled_back {
            return verdict(
                false,
                reason::REVISION_FAILED,
                format!(
                    "revision {} was rolled back: {why}; apply the old spec, or another",
                    facts.newest.hash
                ),
            );
        }
        let words = facts.newest.failed.clone().unwrap_or_default();
        return verdict(
            false,
            reason::REVISION_FAILED,
            format!(
                "revision {} does not start: {words}; apply the old spec to go back",
                facts.newest.hash
            ),
        );
    }
    if wanted == 0 {
        return verdict(true, reason::SCALED_TO_ZERO, "no replica is wanted");
    }
    if facts.newest.ready >= wanted && facts.plan.rollout.is_none() {
        return verdict(
            true,
            reason::AVAILABLE,
            format!("{wanted} of {wanted} replicas are ready"),
        );
    }
    let progress = format!(
        "{} of {wanted} replicas of revision {} are ready",
        facts.newest.ready, facts.newest.hash
    );
    match worst {
        Some(blocker) if blocker.severity >= 3 => verdict(
            false,
            blocker.reason,
            format!("{progress}; {}", blocker.message),
        ),
        _ if facts.plan.rollout.is_some() => {
            let reason = if worst.is_some_and(|b| b.reason == reason::DRAINING) {
                reason::DRAINING
            } else {
                reason::ROLLING_OUT
            };
            verdict(
                false,
                reason,
                format!(
                    "{progress}; {}",
                    facts.plan.rollout.clone().unwrap_or_default()
                ),
            )
        }
        Some(blocker) => verdict(
            false,
            blocker.reason,
            format!("{progress}; {}", blocker.message),
        ),
        None => verdict(false, reason::STARTING, progress),
    }
}

pub(super) fn model_verdict(facts: &Facts<'_>, ready: usize, worst: Option<&Blocker>) -> Verdict {
    if ready > 0 {
        return verdict(
            true,
            reason::AVAILABLE,
            format!("{} is loaded", facts.service.service.spec.model.uri),
        );
    }
    match worst {
        Some(blocker) => verdict(false, blocker.reason, blocker.message.clone()),
        None if facts.service.wanted == 0 => {
            verdict(true, reason::SCALED_TO_ZERO, "no replica is wanted")
        }
        None => verdict(false, reason::STARTING, "no pod exists yet"),
    }
}

pub(super) fn ready_verdict(
    facts: &Facts<'_>,
    ready: usize,
    endpoint: &Verdict,
    workloads: &Verdict,
    worst: Option<&Blocker>,
) -> Verdict {
    // A host that leads nowhere does not keep `status.url` from answering.
    let of_hosts = [reason::HOST_CONFLICT, reason::API_NOT_INSTALLED].contains(&endpoint.reason);
    if !endpoint.ok && !of_hosts {
        return verdict(false, endpoint.reason, endpoint.message.clone());
    }
    if ready > 0 {
        let reason = if facts.plan.halted {
            reason::REVISION_FAILED
        } else {
            reason::AVAILABLE
        };
        let message = if workloads.ok {
            "requests are answered".to_owned()
        } else {
            format!("requests are answered; {}", workloads.message)
        };
        return verdict(true, reason, message);
    }
    let was_ready = facts.service.service.status.as_ref().is_some_and(|status| {
        let same = status
            .revision
            .as_ref()
            .is_some_and(|r| r.current == facts.newest.hash);
        same && status
            .conditions
            .iter()
            .any(|c| c.type_ == READY && c.status == "True")
    });
    let scaled = facts.service.service.spec.scaling.is_some();
    if facts.service.wanted == 0 {
        let message = if scaled {
            "no replica is wanted; the next request is held and wakes the service"
        } else {
            "no replica is wanted; set replicas to serve again"
        };
        return verdict(was_ready, reason::SCALED_TO_ZERO, message);
    }
    // Requests are held while a service that slept wakes up: nothing is wrong unless its pods cannot start.
    let waking = was_ready
        && scaled
        && facts.service.service.status.as_ref().is_some_and(|status| {
            let mut conditions = status.conditions.iter();
            conditions.any(|c| {
                c.type_ == READY
                    && [reason::SCALED_TO_ZERO, reason::WAKING_UP].contains(&&*c.reason)
            })
        });
    if waking && worst.is_none_or(|blocker| blocker.severity < 3) {
        return verdict(
            true,
            reason::WAKING_UP,
            "requests are held until the first pod is ready",
        );
    }
    verdict(false, workloads.reason, workloads.message.clone())
}

pub(super) fn scaling_verdict(service: &ValidatedService, outcome: Option<&Outcome>) -> Verdict {
    let Some(scaling) = &service.service.spec.scaling else {
        return verdict(
            true,
            reason::FIXED_REPLICAS,
            "spec.replicas, kubectl scale, HPA or KEDA set the number of replicas",
        );
    };
    if let Some(blind) = outcome.and_then(|outcome| outcome.blind.as_ref()) {
        return verdict(false, reason::METRICS_UNAVAILABLE, blind.clone());
    }
    let range = format!(
        "between {} and {} replicas by KV-cache use and waiting requests",
        scaling.min_replicas, scaling.max_replicas
    );
    let last = outcome.and_then(|o| o.explanation.as_ref());
    let message = last.map_or(range.clone(), |last| format!("{range}; last {last}"));
    verdict(true, reason::AVAILABLE, message)
}
