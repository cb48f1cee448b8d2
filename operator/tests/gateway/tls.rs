//! Clients and replicas that speak TLS, and certificates that are renewed while they do.

use std::sync::Arc;
use std::time::Duration;

use ashlar_operator::gateway::tls::{Certificate, TlsFiles};
use ashlar_operator::model_tls::{ModelTlsArgs, Trust};
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::harness::{Gateway, Setting, echo, full, open_service, replica_with, soon};

const NAME: &str = "chat.example.com";

/// Writes a new certificate, and returns it.
fn renew(files: &TlsFiles) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(vec![NAME.to_owned()]).unwrap();
    std::fs::write(&files.certificate, made.cert.pem()).unwrap();
    std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
    CertificateDer::from_pem_slice(made.cert.pem().as_bytes()).unwrap()
}

async fn connect(
    gateway: &Gateway,
    trusted: &CertificateDer<'static>,
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(gateway.address).await?;
    let name = ServerName::try_from(NAME).unwrap();
    TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
}

#[tokio::test]
async fn clients_speak_tls_and_a_new_certificate_cuts_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let files = TlsFiles {
        certificate: dir.path().join("tls.crt"),
        key: dir.path().join("tls.key"),
    };
    let first = renew(&files);
    let certificate = Certificate::load(files.clone()).unwrap();
    let gateway = Gateway::with(Setting {
        tls: Some(certificate.acceptor()),
        ..Setting::default()
    })
    .await;
    let replica = echo("r").await;
    gateway.publish(&[(open_service("a/s", "m"), &[replica.address])]);

    let stream = soon("TLS", connect(&gateway, &first)).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    let mut ask = async || {
        let request = Request::post("/a/s/v1/completions")
            .header("host", NAME)
            .body(Full::new(Bytes::from_static(b"{}")))
            .unwrap();
        let response = soon("an answer", sender.send_request(request))
            .await
            .unwrap();
        let status = response.status().as_u16();
        response.collect().await.unwrap();
        status
    };
    assert_eq!(ask().await, 200);

    let second = renew(&files);
    assert!(certificate.renew().unwrap());
    assert_eq!(ask().await, 200, "the connection from before goes on");
    assert!(
        connect(&gateway, &first).await.is_err(),
        "the old one is not shown any more"
    );
    soon("TLS again", connect(&gateway, &second)).await.unwrap();

    // One who speaks no TLS is let go, and nobody else is hurt.
    let mut plain = TcpStream::connect(gateway.address).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut plain, b"GET / HTTP/1.1\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    let read = tokio::io::AsyncReadExt::read_to_end(&mut plain, &mut answer);
    soon("the end of a plain connection", read)
        .await
        .unwrap_or_default();
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    soon("TLS after that", connect(&gateway, &second))
        .await
        .unwrap();
}

/// A CA, and what it signs.
struct Authority {
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: rcgen::Issuer::new(params, key),
            pem,
        }
    }

    /// Writes a certificate for `name`.
    fn sign(&self, name: &str, files: &TlsFiles) {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(&files.certificate, certificate.pem()).unwrap();
        std::fs::write(&files.key, key.serialize_pem()).unwrap();
    }
}

#[tokio::test]
async fn a_replica_with_tls_is_believed_by_its_ca_and_its_name() {
    const PODS: &str = "s-pods.a.svc";
    const PATH: &str = "/a/s/v1/completions";
    let dir = tempfile::tempdir().unwrap();
    let files = TlsFiles {
        certificate: dir.path().join("tls.crt"),
        key: dir.path().join("tls.key"),
    };
    let (ours, other) = (Authority::new(), Authority::new());
    ours.sign(PODS, &files);
    let certificate = Certificate::load(files.clone()).unwrap();
    // One request a connection: each shows who is believed now.
    let replica = replica_with(Some(certificate.acceptor()), |_| async {
        let answer = http::Response::builder().header("connection", "close");
        Ok(answer.body(full("{}"))?)
    })
    .await;
    let ca = dir.path().join("ca.crt");
    let trusting = async |pem: Option<&str>| {
        if let Some(pem) = pem {
            std::fs::write(&ca, pem).unwrap();
        }
        let args = ModelTlsArgs {
            model_ca: pem.map(|_| ca.clone()),
        };
        let trust = Trust::load(&args).unwrap();
        let gateway = Gateway::with(Setting {
            trust: Arc::clone(&trust),
            tls_name: Some(PODS),
            hold: Duration::from_millis(10),
            ..Setting::default()
        })
        .await;
        gateway.publish(&[(open_service("a/s", "m"), &[replica.address])]);
        (gateway, trust)
    };
    let refused = async |gateway: &Gateway, words: &str| {
        let (status, body) = gateway.post(PATH, None, "{}").await;
        let message = body["error"]["message"].as_str().unwrap();
        assert_eq!(status, 503);
        assert!(message.contains(words), "{message}");
    };

    let (gateway, _) = trusting(None).await;
    refused(&gateway, "modelTls.caSecretName").await;
    let (gateway, trust) = trusting(Some(&other.pem)).await;
    refused(&gateway, "invalid peer certificate").await;
    // The right CA comes while the gateway runs.
    std::fs::write(&ca, format!("{}{}", other.pem, ours.pem)).unwrap();
    assert!(trust.renew().unwrap());
    assert_eq!(gateway.post(PATH, None, "{}").await.0, 200);
    // A renewed certificate, and then one that is another service's.
    ours.sign(PODS, &files);
    assert!(certificate.renew().unwrap());
    assert_eq!(gateway.post(PATH, None, "{}").await.0, 200);
    ours.sign("other-pods.a.svc", &files);
    assert!(certificate.renew().unwrap());
    refused(&gateway, PODS).await;
}

#[tokio::test]
async fn a_replica_that_should_speak_tls_and_does_not_is_not_sent_the_request() {
    let asked = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let plain = super::harness::replica(move |_| {
        count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        async { Ok(http::Response::new(full("{}"))) }
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca.crt");
    std::fs::write(&ca, Authority::new().pem).unwrap();
    let args = ModelTlsArgs { model_ca: Some(ca) };
    let gateway = Gateway::with(Setting {
        trust: Trust::load(&args).unwrap(),
        tls_name: Some("s-pods.a.svc"),
        hold: Duration::from_millis(10),
        ..Setting::default()
    })
    .await;
    gateway.publish(&[(open_service("a/s", "m"), &[plain.address])]);
    let (status, body) = gateway.post("/a/s/v1/completions", None, "{}").await;
    assert_eq!(status, 503, "{body}");
    assert_eq!(asked.load(std::sync::atomic::Ordering::SeqCst), 0);
}
