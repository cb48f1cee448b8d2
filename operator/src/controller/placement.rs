//! Whether a node takes a pod: its selector, its required affinity, taints, and what is left of each resource. Pure.
//!
//! Affinity between pods and volumes are not looked at: the scheduler knows them, and a rollout asks it by trying.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{
    Node, NodeSelectorRequirement, NodeSelectorTerm, PodSpec, ResourceQuota, Taint, Toleration,
};
use kube::ResourceExt as _;

use super::{
    capacity::{NodeRoom, Requests},
    quantity,
};

/// A node with what it has to give; its bulky status stays behind.
pub(super) fn node_room(mut node: Node) -> NodeRoom {
    let status = node.status.take().unwrap_or_default();
    let allocatable = status
        .allocatable
        .iter()
        .flatten()
        .filter_map(|(resource, amount)| {
            Some((resource.clone(), quantity::thousandths(&amount.0)?))
        })
        .collect();
    let ready = |c: &&k8s_openapi::api::core::v1::NodeCondition| c.type_ == "Ready";
    let ready = status.conditions.iter().flatten().find(ready);
    if ready.is_none_or(|condition| condition.status != "True") {
        node.spec.get_or_insert_default().unschedulable = Some(true);
    }
    node.metadata.managed_fields = None;
    node.metadata.annotations = None;
    NodeRoom {
        node: Arc::new(node),
        allocatable,
    }
}

/// True when the scheduler could put the pod on this node, as far as node and pod alone say.
pub(super) fn admits(node: &Node, pod: &PodSpec) -> bool {
    let spec = node.spec.as_ref();
    if spec.is_some_and(|spec| spec.unschedulable == Some(true)) {
        return false;
    }
    let selected = pod
        .node_selector
        .iter()
        .flatten()
        .all(|(key, value)| node.labels().get(key) == Some(value));
    let required = pod
        .affinity
        .as_ref()
        .and_then(|affinity| affinity.node_affinity.as_ref())
        .and_then(|node| {
            node.required_during_scheduling_ignored_during_execution
                .as_ref()
        });
    let wanted = required.is_none_or(|selector| {
        let terms = &selector.node_selector_terms;
        terms.iter().any(|term| matches_term(node, term))
    });
    let taints = spec.and_then(|spec| spec.taints.as_ref());
    let tolerations = pod.tolerations.as_deref().unwrap_or_default();
    let tolerated = taints.into_iter().flatten().all(|taint| {
        taint.effect == "PreferNoSchedule" || tolerations.iter().any(|t| tolerates(t, taint))
    });
    selected && wanted && tolerated
}

fn matches_term(node: &Node, term: &NodeSelectorTerm) -> bool {
    let labels = term.match_expressions.iter().flatten();
    let fields = term.match_fields.iter().flatten();
    if term.match_expressions.is_none() && term.match_fields.is_none() {
        return false;
    }
    let name = node.name_any();
    let by_field = |requirement: &NodeSelectorRequirement| {
        let value = (requirement.key == "metadata.name").then_some(name.as_str());
        meets(value, requirement)
    };
    labels
        .map(|r| meets(node.labels().get(&r.key).map(String::as_str), r))
        .chain(fields.map(by_field))
        .all(|met| met)
}

fn meets(value: Option<&str>, requirement: &NodeSelectorRequirement) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let listed = value.is_some_and(|value| values.iter().any(|v| v == value));
    let compared = || {
        let bound: i64 = values.first()?.parse().ok()?;
        Some(value?.parse::<i64>().ok()?.cmp(&bound))
    };
    match requirement.operator.as_str() {
        "In" => listed,
        "NotIn" => !listed,
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compared() == Some(std::cmp::Ordering::Greater),
        "Lt" => compared() == Some(std::cmp::Ordering::Less),
        _ => false,
    }
}

fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let effect = toleration.effect.as_deref().unwrap_or_default();
    let key = toleration.key.as_deref().unwrap_or_default();
    let exists = toleration.operator.as_deref() == Some("Exists");
    let same_key = key == taint.key || (key.is_empty() && exists);
    let same_value = exists
        || toleration.value.as_deref().unwrap_or_default()
            == taint.value.as_deref().unwrap_or_default();
    (effect.is_empty() || effect == taint.effect) && same_key && same_value
}

/// Takes a request out of what a node has left; false, and nothing taken, when it does not fit.
pub(super) fn take(left: &mut Requests, request: &Requests) -> bool {
    let fits = request.iter().all(|(resource, amount)| {
        *amount <= 0.0 || left.get(resource).is_some_and(|l| l >= amount)
    });
    if fits {
        for (resource, amount) in request {
            if let Some(left) = left.get_mut(resource) {
                *left -= amount;
            }
        }
    }
    fits
}

/// Takes a request out of the first node where it fits.
pub(super) fn take_first(free: &mut [(Arc<Node>, Requests)], request: &Requests) {
    for (_, left) in free {
        if take(left, request) {
            return;
        }
    }
}

/// How many more pods of this request a quota allows.
pub(super) fn quota_room(quota: &ResourceQuota, pod: &PodSpec, request: &Requests) -> i32 {
    // A quota for some pods only is left to admission, except by priority class, which pods name.
    let scoped = quota.spec.as_ref().is_some_and(|spec| {
        spec.scopes.as_ref().is_some_and(|s| !s.is_empty()) || spec.scope_selector.is_some()
    });
    if scoped && pod.priority_class_name.is_none() {
        return i32::MAX;
    }
    let Some(status) = &quota.status else {
        return i32::MAX;
    };
    let amounts = status.hard.iter().flatten().filter_map(|(name, hard)| {
        let resource = name.strip_prefix("requests.").unwrap_or(name);
        let ask = *request.get(resource)?;
        let hard = quantity::thousandths(&hard.0)?;
        let used = status.used.as_ref().and_then(|used| used.get(name));
        let used = used
            .and_then(|used| quantity::thousandths(&used.0))
            .unwrap_or(0.0);
        #[allow(clippy::cast_possible_truncation, reason = "clamped to the range")]
        let pods = ((hard - used) / ask)
            .floor()
            .clamp(0.0, f64::from(i32::MAX)) as i32;
        (ask > 0.0).then_some(pods)
    });
    amounts.min().unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use serde_json::{Value, json};

    use super::*;

    fn node(spec: Value, ready: &str) -> Node {
        let node = json!({
            "metadata": {"name": "n", "labels": {"zone": "a", "generation": "90"}},
            "spec": spec,
            "status": {"conditions": [{"type": "Ready", "status": ready}]},
        });
        let room = node_room(serde_json::from_value(node).unwrap());
        Arc::unwrap_or_clone(room.node)
    }

    fn pod(spec: Value) -> PodSpec {
        let mut pod = json!({"containers": []});
        pod.as_object_mut()
            .unwrap()
            .extend(spec.as_object().unwrap().clone());
        serde_json::from_value(pod).unwrap()
    }

    #[test]
    fn selectors_and_required_affinity_bind() {
        let node = node(json!({}), "True");
        assert!(admits(&node, &pod(json!({"nodeSelector": {"zone": "a"}}))));
        assert!(!admits(&node, &pod(json!({"nodeSelector": {"zone": "b"}}))));
        let required = |key: &str, operator: &str, values: Value| {
            let requirement = json!({"key": key, "operator": operator, "values": values});
            let selector = json!({"nodeSelectorTerms": [{"matchExpressions": [requirement]}]});
            pod(
                json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": selector}}}),
            )
        };
        for (key, operator, values, expected) in [
            ("zone", "In", json!(["a", "b"]), true),
            ("zone", "NotIn", json!(["a"]), false),
            ("zone", "Exists", json!([]), true),
            ("spot", "Exists", json!([]), false),
            ("spot", "DoesNotExist", json!([]), true),
            ("generation", "Gt", json!(["80"]), true),
            ("generation", "Lt", json!(["80"]), false),
            ("zone", "Gt", json!(["80"]), false),
        ] {
            let verdict = admits(&node, &required(key, operator, values));
            assert_eq!(verdict, expected, "{key} {operator}");
        }
    }

    #[test]
    fn taints_and_nodes_that_are_not_ready_keep_pods_away() {
        let tainted = node(
            json!({"taints": [{"key": "gpu", "value": "yes", "effect": "NoSchedule"}]}),
            "True",
        );
        assert!(!admits(&tainted, &pod(json!({}))));
        let tolerant = |toleration: Value| pod(json!({"tolerations": [toleration]}));
        assert!(admits(
            &tainted,
            &tolerant(json!({"key": "gpu", "operator": "Exists"}))
        ));
        assert!(admits(
            &tainted,
            &tolerant(json!({"key": "gpu", "value": "yes", "effect": "NoSchedule"}))
        ));
        assert!(!admits(
            &tainted,
            &tolerant(json!({"key": "gpu", "value": "no"}))
        ));
        assert!(!admits(
            &tainted,
            &tolerant(json!({"key": "gpu", "operator": "Exists", "effect": "NoExecute"}))
        ));
        assert!(admits(&tainted, &tolerant(json!({"operator": "Exists"}))));
        assert!(!admits(&node(json!({}), "Unknown"), &pod(json!({}))));
        assert!(!admits(
            &node(json!({"unschedulable": true}), "True"),
            &pod(json!({}))
        ));
    }
}
