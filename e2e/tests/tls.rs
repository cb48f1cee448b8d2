//! A platform engineer wants the traffic between gateway and model pods encrypted.

use anyhow::{Context, Result, ensure};
use ashlar_e2e::cluster::{self, SYSTEM_NAMESPACE};
use ashlar_e2e::namespace::Namespace;
use ashlar_e2e::service::manifest;
use ashlar_e2e::with_namespace;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::json;

/// The Secret with the CA, beside the chart.
const CA: &str = "e2e-model-ca";

#[tokio::test]
async fn model_pods_serve_by_tls_and_the_gateway_asks_for_their_name() -> Result<()> {
    with_namespace("tls", async |ns| {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = params.self_signed(&key)?.pem();
        let issuer = Issuer::new(params, key);

        let system: Api<Secret> = Api::namespaced(ns.client.clone(), SYSTEM_NAMESPACE);
        let secret = json!({
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": CA},
            "stringData": {"ca.crt": ca},
        });
        let apply = PatchParams::apply("e2e").force();
        system.patch(CA, &apply, &Patch::Apply(&secret)).await?;
        cluster::install_with(&[&format!("modelTls.caSecretName={CA}")]).await?;

        served_by_tls(&ns, &issuer).await?;

        // As the other tests expect it.
        cluster::install().await?;
        system.delete(CA, &DeleteParams::default()).await?;
        Ok(())
    })
    .await
}

async fn served_by_tls(ns: &Namespace, issuer: &Issuer<'_, KeyPair>) -> Result<()> {
    let key = KeyPair::generate()?;
    let name = format!("smollm2-pods.{}.svc", ns.name);
    let certificate = CertificateParams::new(vec![name])?.signed_by(&key, issuer)?;
    ns.apply(&json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "pods", "namespace": ns.name},
        "type": "kubernetes.io/tls",
        "stringData": {"tls.crt": certificate.pem(), "tls.key": key.serialize_pem()},
    }))
    .await?;
    let mut service = manifest(ns, "smollm2");
    service["spec"]["runtime"]["tlsSecretName"] = json!("pods");
    let service = ns.serve(&service).await?;

    ns.ask(&service).await?;

    let pod = ns.pods_of("smollm2").await?.pop();
    let status = pod.and_then(|pod| pod.status).context("no pod")?;
    let address = status.pod_ip.context("the pod has no address")?;
    let plain = ns.http.get(&format!("http://{address}:8000/health")).await;
    ensure!(
        plain
            .as_ref()
            .is_ok_and(|answer| !answer.status.is_success())
            || plain.is_err(),
        "the pod answers plain HTTP"
    );
    Ok(())
}
