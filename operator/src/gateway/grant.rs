//! `ashlar-operator grant NAMESPACE/NAME`: the Role and RoleBinding by which a namespace's owner lets the gateway read
//! the one Secret with a service's key digests. Nobody else gets anything, and the gateway gets nothing else.

use std::io::Write as _;

use k8s_openapi::api::rbac::v1::{PolicyRule, Role, RoleBinding, RoleRef, Subject};
use kube::api::{Api, DynamicObject, ObjectMeta};

use super::snapshot::Access;
use super::watch;

/// Arguments of `grant`.
#[derive(Debug, Clone, clap::Args)]
pub struct GrantArgs {
    /// The service, as NAMESPACE/NAME.
    #[arg(value_name = "NAMESPACE/NAME", value_parser = parse_service)]
    pub service: (String, String),
    /// The Secret with the digests; without it the service is asked for its `endpoint.apiKeySecretRef`.
    #[arg(long)]
    pub secret: Option<String>,
    /// Where the gateway runs.
    #[arg(
        long,
        env = "ASHLAR_OPERATOR_NAMESPACE",
        default_value = "ashlar-system"
    )]
    pub operator_namespace: String,
    /// The gateway's ServiceAccount.
    #[arg(long, default_value = "ashlar-gateway")]
    pub gateway_service_account: String,
}

fn parse_service(text: &str) -> Result<(String, String), String> {
    match text.split_once('/') {
        Some((namespace, name)) if is_dns_label(namespace) && is_dns_label(name) => {
            Ok((namespace.to_owned(), name.to_owned()))
        }
        _ => Err("write it as NAMESPACE/NAME, for example chat/mistral".to_owned()),
    }
}

fn is_dns_label(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    !text.is_empty()
        && text.len() <= 63
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// Why nothing was printed.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    /// The cluster cannot be asked for the service.
    #[error("the service cannot be read from the cluster: name its Secret with --secret")]
    Read(#[source] kube::Error),
    /// No cluster is configured.
    #[error("no cluster is configured to read the service from: name its Secret with --secret")]
    Config(#[source] kube::Error),
    /// The service names no Secret.
    #[error(
        "{0} has no endpoint.apiKeySecretRef, so there is nothing to grant; set it, or name the Secret with --secret"
    )]
    NoSecret(String),
    /// The YAML could not be written.
    #[error("the manifests could not be written")]
    Write(#[source] std::io::Error),
}

/// The manifests as YAML. Pure.
#[must_use]
pub fn manifests(args: &GrantArgs, secret: &str) -> String {
    let (namespace, name) = &args.service;
    let metadata = ObjectMeta {
        name: Some(format!("{name}-ashlar-gateway-keys")),
        namespace: Some(namespace.clone()),
        ..ObjectMeta::default()
    };
    let role = Role {
        metadata: metadata.clone(),
        rules: Some(vec![PolicyRule {
            api_groups: Some(vec![String::new()]),
            resources: Some(vec!["secrets".to_owned()]),
            resource_names: Some(vec![secret.to_owned()]),
            verbs: vec!["get".to_owned()],
            ..PolicyRule::default()
        }]),
    };
    let binding = RoleBinding {
        role_ref: RoleRef {
            api_group: Some("rbac.authorization.k8s.io".to_owned()),
            kind: "Role".to_owned(),
            name: metadata.name.clone().unwrap_or_default(),
        },
        metadata,
        subjects: Some(vec![Subject {
            kind: "ServiceAccount".to_owned(),
            name: args.gateway_service_account.clone(),
            namespace: Some(args.operator_namespace.clone()),
            ..Subject::default()
        }]),
    };
    let yaml = |object: Result<String, serde_yaml_ng::Error>| {
        object.expect("a Role and its binding are plain data: this is a bug")
    };
    format!(
        "{}---\n{}",
        yaml(serde_yaml_ng::to_string(&role)),
        yaml(serde_yaml_ng::to_string(&binding))
    )
}

/// Prints the manifests to standard output.
///
/// # Errors
/// [`GrantError`] when the Secret's name is neither given nor found.
pub async fn run(args: &GrantArgs) -> Result<(), GrantError> {
    let secret = match &args.secret {
        Some(secret) => secret.clone(),
        None => secret_of(&args.service).await?,
    };
    let mut out = std::io::stdout().lock();
    out.write_all(manifests(args, &secret).as_bytes())
        .map_err(GrantError::Write)
}

async fn secret_of((namespace, name): &(String, String)) -> Result<String, GrantError> {
    let client = kube::Client::try_default()
        .await
        .map_err(GrantError::Config)?;
    let resource = watch::inference_services();
    let services = Api::<DynamicObject>::namespaced_with(client, namespace, &resource);
    let service = services.get(name).await.map_err(GrantError::Read)?;
    match watch::service_spec(&service).map(|spec| spec.access) {
        Some(Access::Keys { secret }) => Ok(secret),
        _ => Err(GrantError::NoSecret(format!("{namespace}/{name}"))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        grant: GrantArgs,
    }

    #[test]
    fn grants_get_on_one_secret_to_the_gateway_only() {
        let args = Cli::try_parse_from(["grant", "chat/mistral"])
            .unwrap()
            .grant;
        insta::assert_snapshot!(manifests(&args, "team-keys"), @r"
        apiVersion: rbac.authorization.k8s.io/v1
        kind: Role
        metadata:
          name: mistral-ashlar-gateway-keys
          namespace: chat
        rules:
        - apiGroups:
          - ''
          resourceNames:
          - team-keys
          resources:
          - secrets
          verbs:
          - get
        ---
        apiVersion: rbac.authorization.k8s.io/v1
        kind: RoleBinding
        metadata:
          name: mistral-ashlar-gateway-keys
          namespace: chat
        roleRef:
          apiGroup: rbac.authorization.k8s.io
          kind: Role
          name: mistral-ashlar-gateway-keys
        subjects:
        - kind: ServiceAccount
          name: ashlar-gateway
          namespace: ashlar-system
        ");
    }

    #[test]
    fn a_service_is_namespace_slash_name() {
        for bad in ["mistral", "chat/", "/mistral", "a/b/c", "Chat/x", "chat/-x"] {
            assert!(Cli::try_parse_from(["grant", bad]).is_err(), "{bad}");
        }
    }
}
