//! A public bucket of an S3-compatible store with one file in it, served from the test's own process: what pods download.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;

use crate::cluster::Cluster;

/// The bucket's name.
pub const BUCKET: &str = "models";
/// The file's key.
pub const KEY: &str = "team/model.gguf";

/// A running store.
pub struct Bucket {
    /// `http://ADDRESS:PORT`, as pods reach it.
    pub endpoint: String,
    /// The file's bytes.
    pub size: usize,
    downloads: Arc<AtomicUsize>,
}

impl Bucket {
    /// Serves the default model where the cluster's pods reach it.
    ///
    /// # Errors
    /// When `ASHLAR_TEST_MODEL` names no file, or the cluster's node is not this machine.
    pub async fn of_the_model(cluster: &Cluster) -> Result<Self> {
        let model = std::env::var("ASHLAR_TEST_MODEL")
            .context("ASHLAR_TEST_MODEL is not set: run `make e2e`")?;
        Self::start(cluster.node_address().await?, std::fs::read(&model)?).await
    }

    /// Serves `content` on an address of this machine.
    ///
    /// # Errors
    /// When there is no port.
    async fn start(address: IpAddr, content: Vec<u8>) -> Result<Self> {
        let listener = tokio::net::TcpListener::bind((address, 0))
            .await
            .with_context(|| format!("listening on {address}"))?;
        let bound: SocketAddr = listener.local_addr()?;
        let size = content.len();
        let (content, downloads) = (Bytes::from(content), Arc::new(AtomicUsize::new(0)));
        let counted = Arc::clone(&downloads);
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (content, counted) = (content.clone(), Arc::clone(&counted));
                tokio::spawn(async move {
                    let handler = hyper::service::service_fn(move |request| {
                        let answer = answer(&request, &content, &counted);
                        async move { Ok::<_, Infallible>(answer) }
                    });
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(socket), handler)
                        .await
                });
            }
        });
        Ok(Self {
            endpoint: format!("http://{bound}"),
            size,
            downloads,
        })
    }

    /// How often the file's content was asked for.
    #[must_use]
    pub fn downloads(&self) -> usize {
        self.downloads.load(Ordering::SeqCst)
    }
}

fn answer(
    request: &Request<Incoming>,
    content: &Bytes,
    downloads: &AtomicUsize,
) -> Response<Full<Bytes>> {
    let size = content.len();
    let path = request.uri().path();
    let response = Response::builder().header(header::ETAG, "\"one\"");
    let made = if path == format!("/{BUCKET}/") {
        response.body(Full::from(format!(
            "<?xml version=\"1.0\"?><ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><IsTruncated>false</IsTruncated><Contents><Key>{KEY}</Key><ETag>&quot;one&quot;</ETag><Size>{size}</Size></Contents></ListBucketResult>"
        )))
    } else if path != format!("/{BUCKET}/{KEY}") {
        response.status(StatusCode::NOT_FOUND).body(Full::default())
    } else if request.method() == Method::HEAD {
        response
            .header(header::CONTENT_LENGTH, size)
            .body(Full::default())
    } else {
        downloads.fetch_add(1, Ordering::SeqCst);
        response.body(Full::new(content.clone()))
    };
    made.expect("constant parts make a response: this is a bug")
}
