//! Two teams share a cluster. Neither sees the other's service, and a key opens only the service that it was given for.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use anyhow::{Context, Result, ensure};
use ashlar_e2e::cluster::run;
use ashlar_e2e::service::{QUESTION, chat, condition, manifest, text};
use ashlar_e2e::wait;
use ashlar_e2e::{Namespace, with_namespace};
use http::StatusCode;
use kube::api::DynamicObject;
use serde_json::json;
use sha2::{Digest, Sha256};

/// Gives the namespace a Secret that accepts `key`, and a service that asks for it.
async fn keyed(ns: &Namespace, key: &str) -> Result<()> {
    let digest = format!("sha256:{}", hex::encode(Sha256::digest(key)));
    ns.apply(&json!({
        "apiVersion": "v1", "kind": "Secret",
        "metadata": {"name": "keys", "namespace": ns.name},
        "stringData": {"team": digest},
    }))
    .await?;
    let mut service = manifest(ns, "smollm2");
    service["spec"]["endpoint"] = json!({"auth": "Keys", "apiKeySecretRef": {"name": "keys"}});
    ns.apply(&service).await?;
    Ok(())
}

/// Lets the gateway read the one Secret, with the manifests that the operator's own message points at.
async fn grant(ns: &Namespace) -> Result<DynamicObject> {
    let waiting = wait::object(
        &ns.services(),
        "smollm2",
        "EndpointReady=False, KeysUnreadable",
        wait::REACTION,
        |service| {
            condition(service, "EndpointReady")
                .is_some_and(|c| c.status == "False" && c.reason == "KeysUnreadable")
        },
    )
    .await?;
    let message = condition(&waiting, "EndpointReady")
        .context("waited for above: this is a bug")?
        .message;
    let command = format!("grant {}/smollm2", ns.name);
    ensure!(
        message.contains(&command),
        "the message does not say what to run: {message}"
    );
    let printed = run(
        "kubectl",
        &[
            "exec",
            "-n",
            "ashlar-system",
            "deployment/ashlar-operator",
            "--",
            "ashlar-operator",
            "grant",
            &format!("{}/smollm2", ns.name),
        ],
    )
    .await?;
    let file = std::env::temp_dir().join(format!("{}-grant.yaml", ns.name));
    std::fs::write(&file, printed)?;
    run(
        "kubectl",
        &[
            "apply",
            "-f",
            file.to_str().context("a temporary path is UTF-8")?,
        ],
    )
    .await?;
    std::fs::remove_file(&file)?;
    ns.ready("smollm2").await
}

#[tokio::test]
async fn a_key_opens_its_own_service_and_no_other() -> Result<()> {
    with_namespace("red", async |red| {
        with_namespace("blue", async |blue| {
            keyed(&red, "red-key").await?;
            keyed(&blue, "blue-key").await?;
            let (red_service, blue_service) = (grant(&red).await?, grant(&blue).await?);
            let red_url = format!("{}/chat/completions", text(&red_service, "/status/url")?);
            let blue_url = format!("{}/chat/completions", text(&blue_service, "/status/url")?);
            let request = chat("smollm2", QUESTION, 32);
            let http = &red.http;

            for (url, key) in [(&red_url, "red-key"), (&blue_url, "blue-key")] {
                let answer = http.with_key(key).post(url, &request).await?.chat_text()?;
                ensure!(answer.contains("Paris"), "{url} answers {answer:?}");
            }
            http.post(&red_url, &request)
                .await?
                .openai_error(StatusCode::UNAUTHORIZED)
                .context("no key")?;
            http.with_key("guess")
                .post(&red_url, &request)
                .await?
                .openai_error(StatusCode::UNAUTHORIZED)
                .context("a wrong key")?;
            http.with_key("blue-key")
                .post(&red_url, &request)
                .await?
                .openai_error(StatusCode::UNAUTHORIZED)
                .context("blue's key on red")?;
            http.with_key("red-key")
                .post(&blue_url, &request)
                .await?
                .openai_error(StatusCode::UNAUTHORIZED)
                .context("red's key on blue")?;
            // The stored digest is no key.
            let digest = format!("sha256:{}", hex::encode(Sha256::digest("red-key")));
            http.with_key(&digest)
                .post(&red_url, &request)
                .await?
                .openai_error(StatusCode::UNAUTHORIZED)
                .context("the digest as a key")?;

            // A bare model name, the same in both namespaces, means the service that the key opens.
            let root = red_url.split("/e2e-").next().unwrap();
            let bare = format!("{root}/v1/chat/completions");
            let answer = http
                .with_key("red-key")
                .post(&bare, &request)
                .await?
                .chat_text()?;
            ensure!(
                answer.contains("Paris"),
                "by bare name red answers {answer:?}"
            );
            http.with_key("guess")
                .post(&bare, &request)
                .await?
                .openai_error(StatusCode::NOT_FOUND)
                .context("a bare name and a wrong key")?;
            Ok(())
        })
        .await
    })
    .await
}

#[tokio::test]
async fn what_is_not_there_is_not_found() -> Result<()> {
    with_namespace("absent", async |ns| {
        let service = ns.serve(&manifest(&ns, "smollm2")).await?;
        let url = text(&service, "/status/url")?;
        let root = url
            .strip_suffix(&format!("/{}/smollm2/v1", ns.name))
            .context("status.url ends in namespace and name")?;
        let request = chat("smollm2", QUESTION, 8);
        for path in [
            format!("/{}/other/v1", ns.name),
            "/nowhere/smollm2/v1".to_owned(),
            "/v1".to_owned(),
        ] {
            let answer = ns
                .http
                .post(&format!("{root}{path}/chat/completions"), &request)
                .await?;
            answer
                .openai_error(StatusCode::NOT_FOUND)
                .with_context(|| format!("asking {path}"))?;
        }
        Ok(())
    })
    .await
}
