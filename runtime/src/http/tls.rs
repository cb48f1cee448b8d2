//! TLS for clients, from files that a Secret is mounted as. New files are taken while connections go on: a certificate is
//! renewed without a restart. What cannot be used is said, and the certificate before stays.

use std::{
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use sha2::{Digest as _, Sha256};
use tokio_rustls::TlsAcceptor;

/// How often the files are looked at; a kubelet needs about a minute to bring a new Secret.
const LOOK_EVERY: Duration = Duration::from_secs(10);

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
    #[error("cannot read {path}: --ssl-certfile and --ssl-keyfile name files in PEM")]
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
        let mut said = String::new();
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let problem = match self.renew() {
                Ok(changed) => {
                    if changed {
                        tracing::info!("a new certificate is served");
                    }
                    String::new()
                }
                Err(error) => error.to_string(),
            };
            // Once: files that stay broken are not told every few seconds.
            if !problem.is_empty() && problem != said {
                tracing::error!(problem, "the certificate before is kept");
            }
            said = problem;
        }
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
    use std::net::SocketAddr;

    use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
    };
    use tokio_rustls::TlsConnector;

    use super::*;
    use crate::{
        http::server::{Connections, Site, serve},
        shutdown::Lifecycle,
    };

    const NAME: &str = "chat-pods.team-a.svc";

    /// Writes a new certificate, and returns it.
    fn write(files: &TlsFiles) -> CertificateDer<'static> {
        let made = rcgen::generate_simple_self_signed(vec![NAME.to_owned()]).unwrap();
        std::fs::write(&files.certificate, made.cert.pem()).unwrap();
        std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
        CertificateDer::from_pem_slice(made.cert.pem().as_bytes()).unwrap()
    }

    /// Asks a server with this certificate whether it lives, and returns the whole answer.
    async fn ask(
        address: SocketAddr,
        trusted: &CertificateDer<'static>,
    ) -> std::io::Result<String> {
        let mut roots = RootCertStore::empty();
        roots.add(trusted.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let stream = TcpStream::connect(address).await?;
        let name = ServerName::try_from(NAME).unwrap();
        let mut stream = TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await?;
        let request = b"GET /health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        stream.write_all(request).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }

    #[tokio::test]
    async fn it_is_served_and_a_renewed_one_is_taken_and_a_broken_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let files = TlsFiles {
            certificate: folder.path().join("tls.crt"),
            key: folder.path().join("tls.key"),
        };
        let missing = Certificate::load(files.clone());
        assert!(matches!(missing, Err(TlsError::Read { .. })));
        let first = write(&files);
        let certificate = Certificate::load(files.clone()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(
            listener,
            Site::default(),
            Lifecycle::default(),
            Connections::default(),
            Some(certificate.acceptor()),
        ));
        let answer = ask(address, &first).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("alive\n"));

        let second = write(&files);
        assert!(certificate.renew().unwrap());
        assert!(!certificate.renew().unwrap());
        assert!(ask(address, &first).await.is_err(), "the old one is gone");
        ask(address, &second).await.unwrap();

        std::fs::write(&files.key, "no key").unwrap();
        assert!(matches!(certificate.renew(), Err(TlsError::Pem { .. })));
        let other = rcgen::generate_simple_self_signed(vec!["other".into()]).unwrap();
        std::fs::write(&files.key, other.signing_key.serialize_pem()).unwrap();
        assert!(matches!(certificate.renew(), Err(TlsError::Unusable(_))));
        ask(address, &second).await.unwrap();

        // Who speaks no TLS gets no answer, and nobody else is hurt.
        let mut plain = TcpStream::connect(address).await.unwrap();
        plain.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        plain.read_to_end(&mut answer).await.unwrap_or_default();
        assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
        ask(address, &second).await.unwrap();
    }
}
