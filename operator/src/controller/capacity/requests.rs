//! What pods ask of nodes.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::PodSpec;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::{Resource, api::ObjectMeta};
use serde::Deserialize;

use crate::controller::{quantity, seen};

/// Resource and amount, in thousandths of the resource's unit.
pub(in crate::controller) type Requests = BTreeMap<String, f64>;

/// The part of a pod that says what it takes from its node.
#[derive(Debug, Clone, Deserialize, Resource)]
#[resource(inherit = k8s_openapi::api::core::v1::Pod)]
pub(super) struct BoundPod {
    #[serde(deserialize_with = "seen::meta")]
    pub(super) metadata: ObjectMeta,
    #[serde(default)]
    pub(super) spec: BoundSpec,
    #[serde(default)]
    pub(super) status: BoundStatus,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct BoundSpec {
    pub(super) node_name: Option<String>,
    containers: Vec<BoundContainer>,
    init_containers: Vec<BoundContainer>,
    overhead: BTreeMap<String, Quantity>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct BoundContainer {
    resources: BoundResources,
    restart_policy: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct BoundResources {
    requests: BTreeMap<String, Quantity>,
    limits: BTreeMap<String, Quantity>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct BoundStatus {
    pub(super) phase: Option<String>,
}

/// What a pod asks of a node in all: containers together, or the greediest init container, and one place for a pod.
pub(super) fn bound_requests(spec: &BoundSpec) -> Requests {
    let of = |container: &BoundContainer| -> Requests {
        let BoundResources { requests, limits } = &container.resources;
        // What has a limit and no request requests its limit.
        limits
            .iter()
            .chain(requests)
            .filter_map(|(resource, amount)| {
                Some((resource.clone(), quantity::thousandths(&amount.0)?))
            })
            .collect()
    };
    let add = |sum: &mut Requests, more: &Requests| {
        for (resource, amount) in more {
            *sum.entry(resource.clone()).or_default() += amount;
        }
    };
    let mut total = Requests::new();
    for container in &spec.containers {
        add(&mut total, &of(container));
    }
    let mut sidecars = Requests::new();
    for container in &spec.init_containers {
        let mut alone = of(container);
        if container.restart_policy.as_deref() == Some("Always") {
            add(&mut sidecars, &alone);
            add(&mut total, &alone);
            continue;
        }
        add(&mut alone, &sidecars);
        for (resource, amount) in alone {
            let sum = total.entry(resource).or_default();
            *sum = sum.max(amount);
        }
    }
    for (resource, amount) in &spec.overhead {
        if let Some(amount) = quantity::thousandths(&amount.0) {
            *total.entry(resource.clone()).or_default() += amount;
        }
    }
    total.insert("pods".into(), 1e3);
    total
}

/// The same of a pod that is still to be made.
pub(super) fn requests_of(pod: &PodSpec) -> Requests {
    let value = serde_json::to_value(pod).expect("a pod spec is plain data: this is a bug");
    let spec = BoundSpec::deserialize(value).unwrap_or_default();
    bound_requests(&spec)
}
