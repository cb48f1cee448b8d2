//! Clients that speak TLS, and a certificate that is renewed while they do.

use std::sync::Arc;

use ashlar_operator::gateway::tls::{Certificate, TlsFiles};
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::harness::{Gateway, Setting, echo, open_service, soon};

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
