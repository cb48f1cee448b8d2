//! Whom to believe to be a model pod: TLS with pods that a certificate of their own was given (`spec.runtime.tlsSecretName`).
//!
//! Pods have no name that lasts, so all pods of a service show a certificate for the service's headless name
//! ([`server_name`]), signed by one of the installation's CAs ([`Trust`]). A pod says by its label that it speaks TLS: pods of
//! the revision before may still do without.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use ashlar_crds::names::{SERVICE_LABEL, TLS_LABEL};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::renewal;

/// The flag of operator and gateway.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ModelTlsArgs {
    /// Certificates, as PEM, of the CAs that sign those of model pods (spec.runtime.tlsSecretName); a new file is taken
    /// without a restart.
    #[arg(long, env = "ASHLAR_MODEL_CA", value_name = "FILE")]
    pub model_ca: Option<PathBuf>,
}

/// Why the CAs cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The file cannot be read.
    #[error("cannot read {path}: is the Secret of --model-ca mounted there?")]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file has no certificate that can be used.
    #[error("{path} holds no certificate of a CA as PEM")]
    Pem {
        /// Which.
        path: PathBuf,
    },
}

/// Why there is no TLS with a pod. The words are for whoever reads the gateway's answer or log.
#[derive(Debug, thiserror::Error)]
enum TlsFailure {
    #[error(
        "the pod speaks TLS, and no CA is configured for model pods: set the chart's modelTls.caSecretName"
    )]
    NoCa,
    #[error("no TLS with the pod as {name}: {reason}")]
    Refused { name: String, reason: String },
}

struct Roots {
    config: Arc<ClientConfig>,
    pem: Vec<u8>,
}

/// The CAs that certificates of model pods are signed by, as the file has them.
pub struct Trust {
    file: Option<PathBuf>,
    roots: RwLock<Option<Roots>>,
}

impl Trust {
    /// Trusts nobody: pods with TLS cannot be reached.
    #[must_use]
    pub fn none() -> Arc<Self> {
        Arc::new(Self {
            file: None,
            roots: RwLock::new(None),
        })
    }

    /// Reads the file, if there is one.
    ///
    /// # Errors
    /// [`TrustError`] when it cannot be used.
    pub fn load(args: &ModelTlsArgs) -> Result<Arc<Self>, TrustError> {
        let roots = args.model_ca.as_deref().map(read).transpose()?;
        Ok(Arc::new(Self {
            file: args.model_ca.clone(),
            roots: RwLock::new(roots),
        }))
    }

    /// Looks at the file again; true when it has changed.
    ///
    /// # Errors
    /// [`TrustError`] when the new file cannot be used; the CAs before stay.
    pub fn renew(&self) -> Result<bool, TrustError> {
        let Some(file) = &self.file else {
            return Ok(false);
        };
        let new = read(file)?;
        let mut roots = self.roots.write().unwrap_or_else(PoisonError::into_inner);
        let changed = roots.as_ref().is_none_or(|roots| roots.pem != new.pem);
        if changed {
            *roots = Some(new);
        }
        Ok(changed)
    }

    /// Looks at the file again and again, for ever; returns at once without one.
    pub async fn follow(self: Arc<Self>) {
        if self.file.is_none() {
            return;
        }
        renewal::follow(
            || self.renew(),
            "new CAs of model pods are trusted",
            "the CAs before are kept",
        )
        .await;
    }

    /// Agrees on TLS with the pod at the other end, which has to be of the service that `name` names.
    ///
    /// # Errors
    /// There is no CA, or the pod's certificate is not for `name` or not signed by one of the CAs.
    pub async fn secure(&self, stream: TcpStream, name: &str) -> io::Result<TlsStream<TcpStream>> {
        let config = {
            let roots = self.roots.read().unwrap_or_else(PoisonError::into_inner);
            roots.as_ref().map(|roots| Arc::clone(&roots.config))
        };
        let config = config.ok_or_else(|| io::Error::other(TlsFailure::NoCa))?;
        let refused = |error: &dyn std::error::Error| {
            io::Error::other(TlsFailure::Refused {
                name: name.to_owned(),
                reason: with_causes(error),
            })
        };
        let server = ServerName::try_from(name.to_owned()).map_err(|error| refused(&error))?;
        let connected = TlsConnector::from(config).connect(server, stream).await;
        connected.map_err(|error| refused(&error))
    }
}

/// An error with its causes, in one text.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}

fn read(path: &Path) -> Result<Roots, TrustError> {
    let pem = std::fs::read(path).map_err(|source| TrustError::Read {
        path: path.to_owned(),
        source,
    })?;
    let bad = || TrustError::Pem {
        path: path.to_owned(),
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|_| bad())?;
        roots.add(certificate).map_err(|_| bad())?;
    }
    if roots.is_empty() {
        return Err(bad());
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring has the default versions: this is a bug")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    // A resumed session would not look at the certificate; connections are kept anyway.
    config.resumption = Resumption::disabled();
    Ok(Roots {
        config: Arc::new(config),
        pem,
    })
}

/// The name that the certificates of a service's pods are for.
#[must_use]
pub fn server_name(namespace: &str, service: &str) -> String {
    format!("{service}-pods.{namespace}.svc")
}

/// The name that the pod's certificate has to be for; none for a pod that speaks no TLS.
#[must_use]
pub fn server_name_of(pod: &Pod) -> Option<String> {
    let labels = pod.labels();
    let service = labels.get(SERVICE_LABEL)?;
    labels.get(TLS_LABEL).filter(|value| *value == "true")?;
    Some(server_name(pod.metadata.namespace.as_deref()?, service))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]
    use super::*;

    #[test]
    fn only_a_pod_that_says_so_speaks_tls() {
        let pod = |labels: serde_json::Value| -> Pod {
            serde_json::from_value(serde_json::json!({
                "metadata": {"name": "p", "namespace": "team-a", "labels": labels},
            }))
            .unwrap()
        };
        let name = |labels| server_name_of(&pod(labels));
        let service = serde_json::json!({SERVICE_LABEL: "chat"});
        assert_eq!(name(service), None);
        let secured = serde_json::json!({SERVICE_LABEL: "chat", TLS_LABEL: "true"});
        assert_eq!(name(secured).as_deref(), Some("chat-pods.team-a.svc"));
    }

    #[test]
    fn a_new_file_is_taken_and_a_broken_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let args = ModelTlsArgs {
            model_ca: Some(folder.path().join("ca.crt")),
        };
        let file = args.model_ca.clone().unwrap();
        assert!(matches!(Trust::load(&args), Err(TrustError::Read { .. })));
        let write = || {
            let made = rcgen::generate_simple_self_signed(vec!["ca".into()]).unwrap();
            std::fs::write(&file, made.cert.pem()).unwrap();
        };
        write();
        let trust = Trust::load(&args).unwrap();
        assert!(!trust.renew().unwrap());
        write();
        assert!(trust.renew().unwrap());
        for broken in ["", "no certificate"] {
            std::fs::write(&file, broken).unwrap();
            assert!(matches!(trust.renew(), Err(TrustError::Pem { .. })));
        }
        assert!(
            trust.roots.read().unwrap().is_some(),
            "the one before stays"
        );
    }
}
