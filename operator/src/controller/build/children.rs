//! The objects around the pods.

use std::collections::BTreeMap;

use ashlar_crds::names::{
    FIELD_MANAGER, PULL_LABEL, REVISION_LABEL, RUNTIME_PORT, RUNTIME_PORT_NAME,
};
use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy},
        core::v1::{PodTemplateSpec, Service, ServiceAccount, ServicePort, ServiceSpec},
        discovery::v1::EndpointSlice,
        networking::v1::{
            NetworkPolicy, NetworkPolicyEgressRule, NetworkPolicyIngressRule, NetworkPolicyPeer,
            NetworkPolicyPort, NetworkPolicySpec,
        },
        policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec},
    },
    apimachinery::pkg::{apis::meta::v1::LabelSelector, util::intstr::IntOrString},
};
use kube::{ResourceExt, api::ApiResource, core::GroupVersionKind};

use super::{
    super::validate::{InvalidSpec, ValidatedService},
    Child, Defaults, metadata, model, selector,
};

/// Label by which an EndpointSlice belongs to a Service.
pub const SLICE_SERVICE_LABEL: &str = "kubernetes.io/service-name";
/// Label by which an EndpointSlice names who keeps it.
pub const SLICE_MANAGER_LABEL: &str = "endpointslice.kubernetes.io/managed-by";

/// Port of the gateway's Service that clients call.
const GATEWAY_PORT_NAME: &str = "http";

/// Everything except revisions and Deployments; an HTTPRoute only where the cluster has the kind.
///
/// # Errors
/// [`InvalidSpec`] when `endpoint.allowFrom` is not a list of NetworkPolicy peers.
pub fn children(
    service: &ValidatedService,
    defaults: &Defaults,
    gateway_slices: &[EndpointSlice],
    has_http_routes: bool,
) -> Result<Vec<Child>, InvalidSpec> {
    let mut children = vec![
        Child::new(&service_account(service)),
        Child::new(&pods_service(service)),
    ];
    if service.service.spec.endpoint.alias {
        children.push(Child::new(&alias_service(service)));
        children.extend(alias_slices(service, gateway_slices).iter().map(Child::new));
    }
    children.push(Child::new(&network_policy(service, defaults)?));
    if model::is_filled_by_job(service) {
        children.push(Child::new(&pull_policy(service, defaults)));
    }
    if service.wanted >= 2 {
        children.push(Child::new(&disruption_budget(service)));
    }
    children.extend(http_route(service).filter(|_| has_http_routes));
    Ok(children)
}

fn service_account(service: &ValidatedService) -> ServiceAccount {
    ServiceAccount {
        metadata: metadata(service, service.service.service_account_name()),
        automount_service_account_token: Some(false),
        ..ServiceAccount::default()
    }
}

fn pods_service(service: &ValidatedService) -> Service {
    Service {
        metadata: metadata(service, service.service.pods_service_name()),
        spec: Some(ServiceSpec {
            cluster_ip: Some("None".into()),
            selector: Some(selector(service)),
            ports: Some(vec![port(
                RUNTIME_PORT,
                IntOrString::String(RUNTIME_PORT_NAME.into()),
            )]),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}

/// No selector: its endpoints are copies of the gateway's, kept by us.
fn alias_service(service: &ValidatedService) -> Service {
    Service {
        metadata: metadata(service, service.name.clone()),
        spec: Some(ServiceSpec {
            ports: Some(vec![port(80, IntOrString::Int(80))]),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}

fn port(port: i32, target: IntOrString) -> ServicePort {
    ServicePort {
        name: Some(RUNTIME_PORT_NAME.into()),
        port,
        target_port: Some(target),
        protocol: Some("TCP".into()),
        ..ServicePort::default()
    }
}

fn alias_slices(service: &ValidatedService, gateway: &[EndpointSlice]) -> Vec<EndpointSlice> {
    gateway
        .iter()
        .enumerate()
        .map(|(index, slice)| {
            let mut meta = metadata(service, format!("{}-alias-{index}", service.name));
            let labels = meta.labels.get_or_insert_default();
            labels.insert(SLICE_SERVICE_LABEL.into(), service.name.clone());
            labels.insert(SLICE_MANAGER_LABEL.into(), FIELD_MANAGER.into());
            let mut endpoints = slice.endpoints.clone().unwrap_or_default();
            for endpoint in &mut endpoints {
                // The pods are of another namespace: a reference to them would mislead.
                endpoint.target_ref = None;
            }
            let mut ports = slice.ports.clone().unwrap_or_default();
            ports.retain(|port| port.name.as_deref() == Some(GATEWAY_PORT_NAME));
            for port in &mut ports {
                port.name = Some(RUNTIME_PORT_NAME.into());
            }
            EndpointSlice {
                metadata: meta,
                address_type: slice.address_type.clone(),
                endpoints: Some(endpoints),
                ports: Some(ports),
            }
        })
        .collect()
}

fn disruption_budget(service: &ValidatedService) -> PodDisruptionBudget {
    PodDisruptionBudget {
        metadata: metadata(service, service.name.clone()),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            selector: Some(LabelSelector {
                match_labels: Some(selector(service)),
                ..LabelSelector::default()
            }),
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".into()),
            ..PodDisruptionBudgetSpec::default()
        }),
        status: None,
    }
}

/// The kind of the Gateway API by which hosts are reached from outside.
#[must_use]
pub fn http_routes() -> ApiResource {
    let kind = GroupVersionKind::gvk("gateway.networking.k8s.io", "v1", "HTTPRoute");
    ApiResource::from_gvk_with_plural(&kind, "httproutes")
}

/// Leads the hosts to the alias, which is in the route's own namespace: no ReferenceGrant is needed.
fn http_route(service: &ValidatedService) -> Option<Child> {
    let endpoint = &service.service.spec.endpoint;
    let gateway = endpoint.gateway_ref.as_ref()?;
    let mut parent = serde_json::json!({ "name": gateway.name });
    for (field, value) in [
        ("namespace", &gateway.namespace),
        ("sectionName", &gateway.section_name),
    ] {
        if let Some(value) = value {
            parent[field] = value.clone().into();
        }
    }
    let value = serde_json::json!({
        "metadata": metadata(service, service.name.clone()),
        "spec": {
            "parentRefs": [parent],
            "hostnames": endpoint.hosts,
            "rules": [{"backendRefs": [{"name": service.name, "port": 80}]}],
        },
    });
    Some(Child::of(http_routes(), service.name.clone(), value))
}

/// In: gateway, operator and monitoring on the runtime's port, and whom the user allows. Out: DNS, and the web for models that are
/// downloaded.
fn network_policy(
    service: &ValidatedService,
    defaults: &Defaults,
) -> Result<NetworkPolicy, InvalidSpec> {
    let mut from = vec![peer(defaults, "gateway"), peer(defaults, "operator")];
    from.extend(defaults.metrics_from.iter().cloned());
    for allowed in &service.service.spec.endpoint.allow_from {
        let peer = serde_json::from_value(allowed.clone())
            .map_err(|error| InvalidSpec::new("spec.endpoint.allowFrom", error.to_string()))?;
        from.push(peer);
    }
    Ok(NetworkPolicy {
        metadata: metadata(service, service.service.pods_service_name()),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(LabelSelector {
                match_labels: Some(selector(service)),
                ..LabelSelector::default()
            }),
            policy_types: Some(vec!["Ingress".into(), "Egress".into()]),
            ingress: Some(vec![NetworkPolicyIngressRule {
                from: Some(from),
                ports: Some(vec![tcp(RUNTIME_PORT)]),
            }]),
            egress: Some(egress(service, !model::is_filled_by_job(service))),
        }),
    })
}

/// For the pods that fill a claim: the operator asks them how far they are, and they reach the source.
fn pull_policy(service: &ValidatedService, defaults: &Defaults) -> NetworkPolicy {
    NetworkPolicy {
        metadata: metadata(service, format!("{}-pull", service.name)),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(match_labels(PULL_LABEL, &service.name)),
            policy_types: Some(vec!["Ingress".into(), "Egress".into()]),
            ingress: Some(vec![NetworkPolicyIngressRule {
                from: Some(vec![peer(defaults, "operator")]),
                ports: Some(vec![tcp(RUNTIME_PORT)]),
            }]),
            egress: Some(egress(service, true)),
        }),
    }
}

/// A part of Ashlar itself, as the chart labels its pods: others in its namespace may be a gateway or an operator too.
fn peer(defaults: &Defaults, component: &str) -> NetworkPolicyPeer {
    NetworkPolicyPeer {
        namespace_selector: Some(match_labels(
            "kubernetes.io/metadata.name",
            &defaults.namespace,
        )),
        pod_selector: Some(LabelSelector {
            match_labels: Some(BTreeMap::from([
                ("app.kubernetes.io/name".to_owned(), "ashlar".to_owned()),
                (
                    "app.kubernetes.io/component".to_owned(),
                    component.to_owned(),
                ),
            ])),
            ..LabelSelector::default()
        }),
        ip_block: None,
    }
}

fn tcp(port: i32) -> NetworkPolicyPort {
    NetworkPolicyPort {
        port: Some(IntOrString::Int(port)),
        protocol: Some("TCP".into()),
        end_port: None,
    }
}

/// DNS, and for pods that download where the model comes from.
fn egress(service: &ValidatedService, downloads: bool) -> Vec<NetworkPolicyEgressRule> {
    let dns = ["UDP", "TCP"].map(|protocol| NetworkPolicyPort {
        protocol: Some(protocol.into()),
        ..tcp(53)
    });
    let mut egress = vec![NetworkPolicyEgressRule {
        ports: Some(dns.to_vec()),
        to: None,
    }];
    if downloads && service.source.pulled_from().is_some() {
        let endpoint = service.service.spec.model.endpoint.as_deref();
        let named = endpoint.and_then(url_port).filter(|port| *port != 443);
        egress.push(NetworkPolicyEgressRule {
            ports: Some([443].into_iter().chain(named).map(tcp).collect()),
            to: None,
        });
    }
    egress
}

fn match_labels(key: &str, value: &str) -> LabelSelector {
    LabelSelector {
        match_labels: Some(BTreeMap::from([(key.to_owned(), value.to_owned())])),
        ..LabelSelector::default()
    }
}

/// The port that a URL names or implies.
fn url_port(url: &str) -> Option<i32> {
    let (scheme, rest) = url.split_once("://")?;
    let authority = rest.split('/').next()?;
    let named = authority
        .rsplit_once(':')
        .and_then(|(_, port)| port.parse().ok());
    named.or(match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    })
}

/// The Deployment of a revision: the template is the ControllerRevision's, the replica count is the rollout's.
#[must_use]
pub fn deployment(
    service: &ValidatedService,
    hash: &str,
    replicas: i32,
    mut template: PodTemplateSpec,
    annotations: BTreeMap<String, String>,
) -> Deployment {
    let mut meta = metadata(service, service.service.revision_name(hash));
    meta.labels
        .get_or_insert_default()
        .insert(REVISION_LABEL.to_owned(), hash.to_owned());
    meta.annotations = (!annotations.is_empty()).then_some(annotations);
    let mut pod_selector = selector(service);
    pod_selector.insert(REVISION_LABEL.to_owned(), hash.to_owned());
    template
        .metadata
        .get_or_insert_default()
        .labels
        .get_or_insert_default()
        .extend(pod_selector.clone());
    Deployment {
        metadata: meta,
        spec: Some(DeploymentSpec {
            replicas: Some(replicas),
            selector: LabelSelector {
                match_labels: Some(pod_selector),
                ..LabelSelector::default()
            },
            // The template never changes, so a Deployment never rolls by itself.
            strategy: Some(DeploymentStrategy {
                type_: Some("Recreate".into()),
                rolling_update: None,
            }),
            revision_history_limit: Some(1),
            progress_deadline_seconds: Some(
                service
                    .service
                    .spec
                    .startup_timeout_seconds
                    .saturating_add(60),
            ),
            template,
            ..DeploymentSpec::default()
        }),
        status: None,
    }
}

/// The gateway's own slices, in an order that does not change from one look to the next.
#[must_use]
pub fn sorted_slices(mut slices: Vec<EndpointSlice>) -> Vec<EndpointSlice> {
    slices.sort_by_key(ResourceExt::name_any);
    slices
}
