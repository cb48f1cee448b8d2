//! The API `external.metrics.k8s.io`, from which HorizontalPodAutoscalers take figures: as adapters to Prometheus do it, a
//! metric's value is the sum of the series of that name that match the selector.
//!
//! The API server forwards the group to whatever an APIService names, here to this process.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService;
use kube::api::{Api, DeleteParams, PostParams};
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use crate::Namespace;
use crate::prometheus::Prometheus;
use crate::wait;

const GROUP: &str = "external.metrics.k8s.io";
const VERSION: &str = "v1beta1";
/// The Service that the APIService names, in the test's namespace.
const SERVICE: &str = "external-metrics";

/// The API, registered. [`ExternalMetrics::remove`] has to be called: an API without a server keeps namespaces from ending.
#[derive(Debug)]
pub struct ExternalMetrics {
    apis: Api<APIService>,
    serving: JoinHandle<()>,
}

impl Drop for ExternalMetrics {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl ExternalMetrics {
    /// Serves what `prometheus` knows, and waits until the API server has found it.
    ///
    /// # Errors
    /// When there is such an API already, or the API server does not reach this process.
    pub async fn start(ns: &Namespace, prometheus: Arc<Prometheus>) -> Result<Self> {
        let host = format!("{SERVICE}.{}.svc", ns.name);
        let made = rcgen::generate_simple_self_signed([host])?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)?;
        let listener = TcpListener::bind((address_for_cluster(ns).await?, 0)).await?;
        let address = listener.local_addr()?;
        let apis = Api::all(ns.client.clone());
        let serving = tokio::spawn(serve(
            listener,
            TlsAcceptor::from(Arc::new(config)),
            prometheus,
        ));
        let metrics = Self { apis, serving };
        register(ns, &metrics.apis, address, &made.cert.pem()).await?;
        if let Err(error) = metrics.is_available().await {
            metrics.remove().await?;
            return Err(error);
        }
        Ok(metrics)
    }

    async fn is_available(&self) -> Result<()> {
        let available = |api: &APIService| {
            let conditions = api.status.as_ref().and_then(|s| s.conditions.as_ref());
            conditions
                .into_iter()
                .flatten()
                .any(|c| c.type_ == "Available" && c.status == "True")
        };
        wait::object(&self.apis, &name(), "available", wait::REACTION, available)
            .await
            .map(drop)
    }

    /// Removes the API.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn remove(self) -> Result<()> {
        let removed = self.apis.delete(&name(), &DeleteParams::default()).await;
        removed
            .map(drop)
            .context("removing the API of external metrics")
    }
}

fn name() -> String {
    format!("{VERSION}.{GROUP}")
}

/// An address of this machine that the cluster's nodes reach.
async fn address_for_cluster(ns: &Namespace) -> Result<IpAddr> {
    let node = ns.cluster.node_address().await?;
    // Nothing is sent: it only asks the routes which of our addresses would be used.
    let unspecified = if node.is_ipv4() {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    };
    let socket = UdpSocket::bind(unspecified)?;
    socket.connect((node, 443))?;
    Ok(socket.local_addr()?.ip())
}

/// Tells the API server where the API is.
async fn register(
    ns: &Namespace,
    apis: &Api<APIService>,
    address: SocketAddr,
    certificate: &str,
) -> Result<()> {
    let port = json!({"name": "https", "port": 443, "protocol": "TCP"});
    ns.apply(&json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": SERVICE, "namespace": ns.name},
        "spec": {"ports": [port]},
    }))
    .await?;
    ns.apply(&json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": SERVICE, "namespace": ns.name, "labels": {"kubernetes.io/service-name": SERVICE}},
        "addressType": if address.is_ipv4() { "IPv4" } else { "IPv6" },
        "endpoints": [{"addresses": [address.ip().to_string()], "conditions": {"ready": true}}],
        "ports": [{"name": "https", "port": address.port(), "protocol": "TCP"}],
    }))
    .await?;
    let bundle = k8s_openapi::ByteString(certificate.as_bytes().to_vec());
    let api = json!({
        "metadata": {"name": name()},
        "spec": {
            "group": GROUP, "version": VERSION, "groupPriorityMinimum": 100, "versionPriority": 100,
            "service": {"namespace": ns.name, "name": SERVICE, "port": 443}, "caBundle": bundle,
        },
    });
    apis.create(&PostParams::default(), &serde_json::from_value(api)?)
        .await
        .context("registering an API of external metrics")?;
    Ok(())
}

async fn serve(listener: TcpListener, acceptor: TlsAcceptor, prometheus: Arc<Prometheus>) {
    while let Ok((socket, _)) = listener.accept().await {
        // The API server opens a connection again when one has ended.
        tokio::spawn(connection(
            socket,
            acceptor.clone(),
            Arc::clone(&prometheus),
        ));
    }
}

async fn connection(
    socket: TcpStream,
    acceptor: TlsAcceptor,
    prometheus: Arc<Prometheus>,
) -> Option<()> {
    let socket = acceptor.accept(socket).await.ok()?;
    let service = service_fn(move |request: Request<Incoming>| {
        let prometheus = Arc::clone(&prometheus);
        async move { Ok::<_, Infallible>(response(&prometheus, &request).await) }
    });
    let server = hyper::server::conn::http1::Builder::new();
    server
        .serve_connection(TokioIo::new(socket), service)
        .await
        .ok()
}

async fn response(prometheus: &Prometheus, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let (path, query) = (request.uri().path(), request.uri().query());
    let (status, body) = match answer(prometheus, path, query.unwrap_or_default()).await {
        Ok(Some(body)) => (StatusCode::OK, body),
        Ok(None) => (
            StatusCode::NOT_FOUND,
            json!({"kind": "Status", "code": 404}),
        ),
        Err(error) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            json!({"kind": "Status", "code": 500, "message": format!("{error:#}")}),
        ),
    };
    let mut response = Response::new(Full::from(body.to_string()));
    *response.status_mut() = status;
    let json = http::HeaderValue::from_static("application/json");
    response.headers_mut().insert("content-type", json);
    response
}

/// What the API says at a path, if it has it.
async fn answer(prometheus: &Prometheus, path: &str, query: &str) -> Result<Option<Value>> {
    let version = format!("{GROUP}/{VERSION}");
    let Some(path) = path.strip_prefix(&format!("/apis/{version}")) else {
        return Ok(None);
    };
    if path.is_empty() {
        return Ok(Some(json!({
            "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version,
            "resources": [{
                "name": "metrics", "singularName": "", "namespaced": true, "kind": "ExternalMetricValueList", "verbs": ["get"],
            }],
        })));
    }
    let Some((_, metric)) = path
        .rsplit_once('/')
        .filter(|_| path.starts_with("/namespaces/"))
    else {
        return Ok(None);
    };
    let expression = expression(metric, &selector(query)?)?;
    let found = prometheus.query(&expression).await?;
    // Without a series there is no value: an HPA then leaves the replicas as they are.
    let items = found.iter().map(|sample| {
        json!({
            "metricName": metric, "metricLabels": {}, "value": sample.value.to_string(),
            "timestamp": k8s_openapi::jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        })
    });
    Ok(Some(json!({
        "kind": "ExternalMetricValueList", "apiVersion": version, "metadata": {}, "items": items.collect::<Vec<_>>(),
    })))
}

/// The value of `labelSelector` in a URL's query.
fn selector(query: &str) -> Result<String> {
    let value = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("labelSelector="));
    let mut bytes = value.unwrap_or_default().bytes();
    let mut text = Vec::new();
    while let Some(byte) = bytes.next() {
        text.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digits = [bytes.next(), bytes.next()].map(Option::unwrap_or_default);
                u8::from_str_radix(std::str::from_utf8(&digits)?, 16)?
            }
            other => other,
        });
    }
    Ok(String::from_utf8(text)?)
}

/// The sum of a metric's series with the labels of a selector like `a=b,c=d`.
fn expression(metric: &str, selector: &str) -> Result<String> {
    let mut labels = Vec::new();
    for pair in selector.split(',').filter(|pair| !pair.is_empty()) {
        let (label, value) = pair.split_once('=').context("no equality")?;
        ensure!(!label.ends_with('!'), "{pair}: only equality is known here");
        labels.push(format!("{label}={:?}", value.trim_start_matches('=')));
    }
    Ok(format!("sum({metric}{{{}}})", labels.join(",")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_becomes_labels() {
        let asked = selector("timeout=1s&labelSelector=namespace%3Ddemo%2Cname%3Dsmollm2").ok();
        let asked = asked.unwrap_or_default();
        assert_eq!(asked, "namespace=demo,name=smollm2");
        let sum = expression("m", &asked).ok();
        assert_eq!(
            sum.as_deref(),
            Some("sum(m{namespace=\"demo\",name=\"smollm2\"})")
        );
        assert!(expression("m", "a!=b").is_err());
        assert!(expression("m", "a in (b)").is_err());
    }
}
