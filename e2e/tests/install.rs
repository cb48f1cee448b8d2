//! A platform engineer installs the chart, installs it again, and checks what it may do.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use anyhow::{Result, ensure};
use ashlar_e2e::cluster::{self, SYSTEM_NAMESPACE, run};
use ashlar_e2e::service::{is_ready, manifest};
use ashlar_e2e::{Cluster, wait, with_namespace};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ListParams};

#[tokio::test]
async fn the_chart_brings_the_resource_the_operator_and_the_gateway() -> Result<()> {
    let cluster = Cluster::connect().await?;
    let definitions: Api<CustomResourceDefinition> = Api::all(cluster.client.clone());
    let name = "inferenceservices.serving.ashlar.dev";
    wait::object(
        &definitions,
        name,
        "established",
        wait::REACTION,
        |definition| {
            let conditions = definition
                .status
                .as_ref()
                .and_then(|status| status.conditions.as_ref());
            conditions.is_some_and(|all| {
                all.iter()
                    .any(|c| c.type_ == "Established" && c.status == "True")
            })
        },
    )
    .await?;

    let deployments: Api<Deployment> = Api::namespaced(cluster.client.clone(), SYSTEM_NAMESPACE);
    for name in ["ashlar-operator", "ashlar-gateway"] {
        wait::object(
            &deployments,
            name,
            "all replicas available",
            wait::REACTION,
            |deployment| {
                let wanted = deployment.spec.as_ref().and_then(|spec| spec.replicas);
                deployment
                    .status
                    .as_ref()
                    .is_some_and(|status| status.available_replicas == wanted)
            },
        )
        .await?;
    }
    Ok(())
}

#[tokio::test]
async fn installing_again_restarts_nothing() -> Result<()> {
    with_namespace("install", async |ns| {
        ns.serve(&manifest(&ns, "kept")).await?;
        let before = (
            pods(&ns.client, &ns.name).await?,
            pods(&ns.client, SYSTEM_NAMESPACE).await?,
        );

        cluster::install().await?;

        let service = ns.services().get("kept").await?;
        ensure!(
            is_ready(&service),
            "the service is no longer Ready: {}",
            service.data
        );
        let after = (
            pods(&ns.client, &ns.name).await?,
            pods(&ns.client, SYSTEM_NAMESPACE).await?,
        );
        ensure!(before == after, "pods changed from {before:?} to {after:?}");
        Ok(())
    })
    .await
}

/// Name, identity and restarts of every pod in a namespace.
async fn pods(client: &kube::Client, namespace: &str) -> Result<Vec<(String, String, i32)>> {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let restarts = |pod: &Pod| {
        let statuses = pod
            .status
            .as_ref()
            .and_then(|status| status.container_statuses.as_ref());
        statuses.map_or(0, |all| all.iter().map(|status| status.restart_count).sum())
    };
    let listed = api.list(&ListParams::default()).await?;
    let mut all: Vec<_> = listed
        .iter()
        .filter(|pod| pod.metadata.deletion_timestamp.is_none())
        .map(|pod| {
            (
                pod.metadata.name.clone().unwrap(),
                pod.metadata.uid.clone().unwrap(),
                restarts(pod),
            )
        })
        .collect();
    all.sort();
    Ok(all)
}

#[tokio::test]
async fn neither_operator_nor_gateway_may_read_secrets_or_grant_rights() -> Result<()> {
    Cluster::connect().await?;
    for account in ["ashlar-operator", "ashlar-gateway"] {
        let user = format!("--as=system:serviceaccount:{SYSTEM_NAMESPACE}:{account}");
        for (verb, kind) in [
            ("get", "secrets"),
            ("list", "secrets"),
            ("bind", "clusterroles.rbac.authorization.k8s.io"),
            ("escalate", "clusterroles.rbac.authorization.k8s.io"),
            ("create", "clusterrolebindings.rbac.authorization.k8s.io"),
        ] {
            // `can-i` prints the answer, and ends with status 1 when it is no.
            let question = ["auth", "can-i", verb, kind, "--all-namespaces", &user];
            let answer = run("kubectl", &question)
                .await
                .unwrap_or_else(|error| format!("{error:#}"));
            ensure!(
                answer.lines().any(|line| line == "no"),
                "may {account} {verb} {kind} everywhere? {answer}"
            );
        }
    }
    Ok(())
}
