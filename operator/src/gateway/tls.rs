//! TLS for clients, from a Secret that is mounted as files. New files are taken while connections go on: a certificate is
//! renewed without a restart. What cannot be used is said, and the certificate before stays.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use sha2::{Digest as _, Sha256};
use tokio_rustls::TlsAcceptor;

use crate::renewal;

/// Where certificate and key are.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// The chain as PEM, the server's own certificate first.
    pub certificate: PathBuf,
    /// Its key as PEM.
    pub key: PathBuf,
}

/// Why certificate or key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {path}: is the Secret of --tls-cert and --tls-key mounted there?")]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A file is no PEM of its kind.
    #[error("{path} holds no {what} as PEM")]
    Pem {
        /// Which.
        path: PathBuf,
        /// `certificate` or `private key`.
        what: &'static str,
    },
    /// They do not belong together, or are of a kind that is not supported.
    #[error("certificate and key cannot be used: {0}; do they belong together?")]
    Unusable(#[from] rustls::Error),
}

#[derive(Debug)]
struct Current {
    key: Arc<CertifiedKey>,
    /// Hash of both files.
    digest: Vec<u8>,
}

/// The certificate as the files have it.
#[derive(Debug)]
pub struct Certificate {
    files: TlsFiles,
    current: RwLock<Current>,
}

impl Certificate {
    /// Reads the files.
    ///
    /// # Errors
    /// [`TlsError`] when they cannot be used.
    pub fn load(files: TlsFiles) -> Result<Arc<Self>, TlsError> {
        let current = RwLock::new(read(&files)?);
        Ok(Arc::new(Self { files, current }))
    }

    /// What takes connections with it. HTTP/1.1 only, as without TLS.
    ///
    /// # Panics
    /// Never: the provider has the default versions.
    #[must_use]
    pub fn acceptor(self: &Arc<Self>) -> TlsAcceptor {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("ring has the default versions: this is a bug")
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(self) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        TlsAcceptor::from(Arc::new(config))
    }

    /// Looks at the files again; true when there is a new certificate.
    ///
    /// # Errors
    /// [`TlsError`] when the new files cannot be used; the certificate before stays.
    pub fn renew(&self) -> Result<bool, TlsError> {
        let new = read(&self.files)?;
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        let changed = current.digest != new.digest;
        if changed {
            *current = new;
        }
        Ok(changed)
    }

    /// Looks at the files again and again, for ever.
    pub async fn follow(self: Arc<Self>) {
        renewal::follow(
            || self.renew(),
            "a new certificate is served",
            "the certificate before is kept",
        )
        .await;
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        Some(Arc::clone(&current.key))
    }
}

fn read(files: &TlsFiles) -> Result<Current, TlsError> {
    let bytes = |path: &PathBuf| {
        std::fs::read(path).map_err(|source| TlsError::Read {
            path: path.clone(),
            source,
        })
    };
    let (chain, key) = (bytes(&files.certificate)?, bytes(&files.key)?);
    let digest = Sha256::new()
        .chain_update(&chain)
        .chain_update(&key)
        .finalize();
    let bad = |path: &PathBuf, what| TlsError::Pem {
        path: path.clone(),
        what,
    };
    let certificates: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&chain)
        .collect::<Result<_, _>>()
        .map_err(|_| bad(&files.certificate, "certificate"))?;
    if certificates.is_empty() {
        return Err(bad(&files.certificate, "certificate"));
    }
    let key = PrivateKeyDer::from_pem_slice(&key).map_err(|_| bad(&files.key, "private key"))?;
    let provider = rustls::crypto::ring::default_provider();
    Ok(Current {
        key: Arc::new(CertifiedKey::from_der(certificates, key, &provider)?),
        digest: digest.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]
    use super::*;

    fn write(files: &TlsFiles, names: &[&str]) {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let made = rcgen::generate_simple_self_signed(names).unwrap();
        std::fs::write(&files.certificate, made.cert.pem()).unwrap();
        std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
    }

    #[test]
    fn a_renewed_certificate_is_taken_and_a_broken_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let files = TlsFiles {
            certificate: dir.path().join("tls.crt"),
            key: dir.path().join("tls.key"),
        };
        assert!(matches!(
            Certificate::load(files.clone()),
            Err(TlsError::Read { .. })
        ));
        write(&files, &["a.example.com"]);
        let certificate = Certificate::load(files.clone()).unwrap();
        let first = certificate.current.read().unwrap().key.cert.clone();
        assert!(!certificate.renew().unwrap());
        write(&files, &["b.example.com"]);
        assert!(certificate.renew().unwrap());
        let second = certificate.current.read().unwrap().key.cert.clone();
        assert_ne!(first, second);
        std::fs::write(&files.key, "no key").unwrap();
        assert!(matches!(
            certificate.renew(),
            Err(TlsError::Pem {
                what: "private key",
                ..
            })
        ));
        // The key of another certificate.
        let other = rcgen::generate_simple_self_signed(vec!["c".into()]).unwrap();
        std::fs::write(&files.key, other.signing_key.serialize_pem()).unwrap();
        assert!(matches!(certificate.renew(), Err(TlsError::Unusable(_))));
        assert_eq!(certificate.current.read().unwrap().key.cert, second);
    }
}
