//! The only writes of a reconcile besides status: server-side apply of what differs, deletion of what is no longer built.

use ashlar_crds::{InferenceService, conditions::reason, names::FIELD_MANAGER};
use kube::{
    Api, Client,
    api::{ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, Preconditions},
};
use serde_json::Value;

use super::{build::Child, fetch::LiveChild, quantity, timed};

/// Why the cluster could not be brought to what was built.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// An object of that name exists and belongs to someone else.
    #[error(
        "{kind} {name} exists and does not belong to this InferenceService; delete or rename it, or rename the service"
    )]
    NameTaken {
        /// Its kind.
        kind: String,
        /// Its name.
        name: String,
    },
    /// A call failed.
    #[error("cannot {verb} {kind} {name}: {source}")]
    Call {
        /// What was tried.
        verb: &'static str,
        /// On which kind.
        kind: String,
        /// On which object.
        name: String,
        /// What the API server said.
        #[source]
        source: kube::Error,
    },
}

impl ApplyError {
    /// The reason to show when the user has to do something; none when trying again may help.
    #[must_use]
    pub fn blocks(&self) -> Option<&'static str> {
        let code = match self {
            Self::NameTaken { .. } => return Some(reason::NAME_TAKEN),
            Self::Call {
                source: kube::Error::Api(api),
                ..
            } => api.code,
            Self::Call { .. } => return None,
        };
        match code {
            400 | 422 => Some(reason::INVALID_SPEC),
            403 => Some(reason::FORBIDDEN),
            _ => None,
        }
    }
}

/// True when `live` already holds everything that `desired` says: nothing would change by applying it.
#[must_use]
pub fn is_current(desired: &Value, live: &Value) -> bool {
    match (desired, live) {
        (Value::Object(desired), Value::Object(live)) => {
            desired.iter().all(|(key, desired)| match live.get(key) {
                Some(live) if SELECTORS.contains(&key.as_str()) => desired == live,
                Some(live) if QUANTITIES.contains(&key.as_str()) => same_quantities(desired, live),
                Some(live) => is_current(desired, live),
                // The API server drops what is empty.
                None => is_empty(desired),
            })
        }
        (Value::Array(desired), Value::Array(live)) => {
            desired.len() == live.len()
                && desired
                    .iter()
                    .zip(live)
                    .all(|(desired, live)| is_current(desired, live))
        }
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        (desired, live) => desired == live,
    }
}

/// Fields to which the API server adds nothing: one label more selects other pods.
const SELECTORS: [&str; 4] = [
    "selector",
    "podSelector",
    "namespaceSelector",
    "matchLabels",
];
/// Fields whose values the API server writes in its own form: `0.5` becomes `500m`.
const QUANTITIES: [&str; 3] = ["limits", "requests", "sizeLimit"];

fn same_quantities(desired: &Value, live: &Value) -> bool {
    match (desired, live) {
        (Value::Object(desired), Value::Object(live)) => {
            desired.iter().all(|(key, desired)| match live.get(key) {
                Some(live) => same_quantities(desired, live),
                None => false,
            })
        }
        (Value::String(desired), Value::String(live)) => {
            desired == live
                || matches!((quantity::thousandths(desired), quantity::thousandths(live)), (Some(a), Some(b)) if a == b)
        }
        (desired, live) => desired == live,
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(fields) => fields.values().all(is_empty),
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

/// Applies one child if it differs from what is there; true when something was written.
///
/// # Errors
/// [`ApplyError::NameTaken`] when the name belongs to someone else, [`ApplyError::Call`] when the API server refuses.
pub async fn apply(
    client: &Client,
    service: &InferenceService,
    child: &Child,
    live: &[LiveChild],
) -> Result<bool, ApplyError> {
    let needed = is_needed(client, service, child, live).await?;
    if needed {
        write(client, service, child).await?;
    }
    Ok(needed)
}

/// Whether a child has to be written. Asks the API server only about a name that the caches do not know.
///
/// # Errors
/// [`ApplyError::NameTaken`] when the name belongs to someone else, [`ApplyError::Call`] when the API server does not say.
pub async fn is_needed(
    client: &Client,
    service: &InferenceService,
    child: &Child,
    live: &[LiveChild],
) -> Result<bool, ApplyError> {
    let uid = service.metadata.uid.as_deref().unwrap_or_default();
    let taken = || ApplyError::NameTaken {
        kind: child.resource.kind.clone(),
        name: child.name.clone(),
    };
    let mut live = live.iter();
    let found = live.find(|l| l.resource.kind == child.resource.kind && l.name == child.name);
    if let Some(live) = found {
        if live.owner.as_deref() != Some(uid) {
            return Err(taken());
        }
        return Ok(!live.terminating && !is_current(&child.value, &live.value));
    }
    // Not in our cache: new, or somebody else's.
    let existing = timed(api_of(client, service, child).get_opt(&child.name))
        .await
        .map_err(|source| failed("read", child, source))?;
    let owned = existing.is_none_or(|existing| {
        let mut owners = existing.metadata.owner_references.iter().flatten();
        owners.any(|owner| owner.uid == uid)
    });
    if owned { Ok(true) } else { Err(taken()) }
}

/// Writes a child.
///
/// # Errors
/// [`ApplyError::Call`] when the API server refuses.
pub async fn write(
    client: &Client,
    service: &InferenceService,
    child: &Child,
) -> Result<(), ApplyError> {
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let api = api_of(client, service, child);
    timed(api.patch(&child.name, &params, &Patch::Apply(&child.value)))
        .await
        .map_err(|source| failed("apply", child, source))?;
    tracing::info!(
        namespace = service.metadata.namespace,
        service = service.metadata.name,
        kind = child.resource.kind,
        name = child.name,
        "applied"
    );
    Ok(())
}

fn api_of(client: &Client, service: &InferenceService, child: &Child) -> Api<DynamicObject> {
    let namespace = service.metadata.namespace.as_deref().unwrap_or_default();
    Api::namespaced_with(client.clone(), namespace, &child.resource)
}

fn failed(verb: &'static str, child: &Child, source: kube::Error) -> ApplyError {
    ApplyError::Call {
        verb,
        kind: child.resource.kind.clone(),
        name: child.name.clone(),
        source,
    }
}

/// Deletes a child of ours.
///
/// # Errors
/// [`ApplyError::Call`] when the API server refuses; an object that is already gone is no error.
pub async fn delete(
    client: &Client,
    service: &InferenceService,
    resource: &ApiResource,
    live: &LiveChild,
) -> Result<(), ApplyError> {
    let namespace = service.metadata.namespace.as_deref().unwrap_or_default();
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), namespace, resource);
    let params = DeleteParams {
        preconditions: Some(Preconditions {
            uid: live
                .value
                .pointer("/metadata/uid")
                .and_then(Value::as_str)
                .map(str::to_owned),
            resource_version: None,
        }),
        ..DeleteParams::background()
    };
    match timed(api.delete(&live.name, &params)).await {
        Ok(_) => {
            tracing::info!(
                namespace,
                service = service.metadata.name,
                kind = resource.kind,
                name = live.name,
                "deleted"
            );
            Ok(())
        }
        Err(kube::Error::Api(error)) if error.code == 404 || error.code == 409 => Ok(()),
        Err(source) => Err(ApplyError::Call {
            verb: "delete",
            kind: resource.kind.clone(),
            name: live.name.clone(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::is_current;

    #[test]
    fn what_the_server_adds_is_no_difference_and_what_someone_changed_is() {
        let desired =
            json!({"spec": {"replicas": 1, "ports": [{"port": 80}], "empty": {}, "none": null}});
        assert!(is_current(
            &desired,
            &json!({"spec": {"replicas": 1, "ports": [{"port": 80, "protocol": "TCP"}], "more": 1}})
        ));
        assert!(!is_current(
            &desired,
            &json!({"spec": {"replicas": 2, "ports": [{"port": 80}]}})
        ));
        assert!(!is_current(
            &desired,
            &json!({"spec": {"replicas": 1, "ports": [{"port": 80}, {"port": 81}]}})
        ));
        assert!(!is_current(&desired, &json!({"spec": {"replicas": 1}})));
        for (ours, edited) in [
            (json!({"app": "m"}), json!({"app": "m", "by": "hand"})),
            (
                json!({"matchLabels": {"app": "m"}}),
                json!({"matchLabels": {"app": "m"}, "matchExpressions": [{"key": "by", "operator": "Exists"}]}),
            ),
        ] {
            let spec = |selector| json!({"spec": {"selector": selector}});
            assert!(is_current(&spec(&ours), &spec(&ours)));
            assert!(!is_current(&spec(&ours), &spec(&edited)));
        }
    }

    #[test]
    fn quantities_are_compared_by_what_they_mean() {
        let of = |cpu: &str, memory: &str| json!({"limits": {"cpu": cpu, "memory": memory}});
        assert!(is_current(&of("0.5", "1024Mi"), &of("500m", "1Gi")));
        assert!(!is_current(&of("0.5", "1Gi"), &of("500m", "1G")));
        assert!(!is_current(
            &of("1", "1Gi"),
            &json!({"limits": {"cpu": "1"}})
        ));
        // Elsewhere a string is itself.
        assert!(!is_current(
            &json!({"label": "1.0"}),
            &json!({"label": "1"})
        ));
    }
}
