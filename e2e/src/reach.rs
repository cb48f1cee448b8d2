//! What a pod reaches, asked by `curl` in its place: in a pod of the test's own, or in a pod that is there, as an ephemeral container.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use kube::Client;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::namespace::Namespace;
use crate::wait::{self, Seen};

/// Addresses by name, as DNS labels.
pub type Targets<'a> = [(&'a str, &'a str)];

/// Which of the targets answered, whatever their answer was.
pub type Reached = BTreeMap<String, bool>;

/// One try a second: a new pod is nobody's peer until the network plugin has heard of it.
const TRIES: &str = "8";
/// `curl`'s exit codes for a connection that was refused, and for one that came to nothing in time. A name that is not resolved
/// has another.
const CUT_OFF: [i32; 2] = [7, 28];

fn image() -> String {
    std::env::var("ASHLAR_E2E_CLIENT_IMAGE").unwrap_or_else(|_| "ashlar.local/client:1".to_owned())
}

/// A container that asks once, as the `restricted` level wants it.
fn container(name: &str, url: &str) -> Value {
    json!({
        "name": name, "image": image(), "imagePullPolicy": "IfNotPresent",
        "command": [
            "curl", "--silent", "--show-error", "--insecure", "--connect-timeout", "3", "--max-time", "20",
            "--retry", TRIES, "--retry-delay", "1", "--retry-connrefused", "--retry-max-time", TRIES, url,
        ],
        "securityContext": {
            "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"},
        },
    })
}

/// The exit codes by container, once all have ended.
fn ended<'a>(statuses: impl Iterator<Item = &'a ContainerStatus>) -> Option<BTreeMap<String, i32>> {
    let code =
        |status: &ContainerStatus| Some(status.state.as_ref()?.terminated.as_ref()?.exit_code);
    statuses
        .map(|status| Some((status.name.clone(), code(status)?)))
        .collect()
}

fn reached(name: &str, code: i32) -> Result<bool> {
    match code {
        0 => Ok(true),
        code if CUT_OFF.contains(&code) => Ok(false),
        code => bail!("curl of {name} ended with {code}"),
    }
}

impl Namespace {
    /// What a new pod with `labels` reaches in this namespace.
    ///
    /// # Errors
    /// When the pod does not run, or a target fails otherwise than by being cut off.
    pub async fn reach_from_new_pod(
        &self,
        labels: &Value,
        targets: &Targets<'_>,
    ) -> Result<Reached> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.name);
        let containers: Vec<_> = targets
            .iter()
            .map(|(name, url)| container(name, url))
            .collect();
        let manifest = json!({
            "metadata": {"generateName": "probe-", "labels": labels},
            "spec": {"restartPolicy": "Never", "automountServiceAccountToken": false, "containers": containers},
        });
        let made = pods
            .create(&PostParams::default(), &serde_json::from_value(manifest)?)
            .await?;
        let pod = made
            .metadata
            .name
            .context("a pod has a name: this is a bug")?;
        let codes = wait::until(&format!("the end of {pod}"), wait::REACTION, async || {
            let status = pods.get(&pod).await?.status.unwrap_or_default();
            let statuses = status.container_statuses.clone().unwrap_or_default();
            Ok(match ended(statuses.iter()) {
                Some(codes) if codes.len() == targets.len() => Seen::Done(codes),
                _ => Seen::NotYet(serde_json::to_string(&status)?),
            })
        })
        .await?;
        pods.delete(&pod, &DeleteParams::default().grace_period(0))
            .await?;
        codes
            .into_iter()
            .map(|(name, code)| Ok((name.clone(), reached(&name, code)?)))
            .collect()
    }
}

/// What the pod of this namespace and name reaches.
///
/// # Errors
/// As [`Namespace::reach_from_new_pod`].
pub async fn reach_from(
    client: &Client,
    (namespace, pod): (&str, &str),
    targets: &Targets<'_>,
) -> Result<Reached> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    // They stay in the pod's spec for ever, so each has a name of its own.
    let spec = pods.get(pod).await?.spec.unwrap_or_default();
    let round = spec.ephemeral_containers.map_or(0, |all| all.len());
    let name_of = |target: &str| format!("probe-{round}-{target}");
    let containers: Vec<_> = targets
        .iter()
        .map(|(target, url)| container(&name_of(target), url))
        .collect();
    let patch = Patch::Strategic(json!({"spec": {"ephemeralContainers": containers}}));
    pods.patch_ephemeral_containers(pod, &PatchParams::default(), &patch)
        .await?;
    let codes = wait::until(
        &format!("the probes in {pod}"),
        wait::REACTION,
        async || {
            let status = pods.get(pod).await?.status.unwrap_or_default();
            let statuses = status
                .ephemeral_container_statuses
                .clone()
                .unwrap_or_default();
            let own = format!("probe-{round}-");
            Ok(
                match ended(
                    statuses
                        .iter()
                        .filter(|status| status.name.starts_with(&own)),
                ) {
                    Some(codes) if codes.len() == targets.len() => Seen::Done(codes),
                    _ => Seen::NotYet(serde_json::to_string(&statuses)?),
                },
            )
        },
    )
    .await?;
    targets
        .iter()
        .map(|(target, _)| {
            Ok((
                (*target).to_owned(),
                reached(target, codes[&name_of(target)])?,
            ))
        })
        .collect()
}

/// Waits until `ask` finds that exactly the `wanted` targets answer.
///
/// # Errors
/// When it does not within [`wait::REACTION`].
pub async fn only(
    what: &str,
    wanted: &[&str],
    mut ask: impl AsyncFnMut() -> Result<Reached>,
) -> Result<()> {
    wait::until(what, wait::REACTION, async || {
        let reached = ask().await?;
        let right = reached
            .iter()
            .all(|(name, answers)| *answers == wanted.contains(&name.as_str()));
        Ok(if right {
            Seen::Done(())
        } else {
            Seen::NotYet(format!("{reached:?}"))
        })
    })
    .await
}
