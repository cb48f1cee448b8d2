//! The gateway's flags and environment variables.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::hold::Holds;
use super::proxy::ProxyLimits;
use super::request_body::BodyLimits;
use super::snapshot::GatewayNames;
use crate::model_tls::ModelTlsArgs;

/// Arguments of `ashlar-operator gateway`.
#[derive(Debug, Clone, clap::Args)]
pub struct GatewayArgs {
    /// Where clients connect.
    #[arg(
        long,
        env = "ASHLAR_GATEWAY_LISTEN",
        default_value = "0.0.0.0:8080",
        value_name = "ADDRESS"
    )]
    pub listen: SocketAddr,
    /// Where clients connect by TLS; needs --tls-cert and --tls-key.
    #[arg(
        long,
        env = "ASHLAR_GATEWAY_TLS_LISTEN",
        requires = "tls_cert",
        value_name = "ADDRESS"
    )]
    pub tls_listen: Option<SocketAddr>,
    /// The chain of certificates as PEM, the gateway's own first; a new file is taken without a restart.
    #[arg(
        long,
        env = "ASHLAR_GATEWAY_TLS_CERT",
        requires = "tls_key",
        value_name = "FILE"
    )]
    pub tls_cert: Option<PathBuf>,
    /// Its key as PEM.
    #[arg(
        long,
        env = "ASHLAR_GATEWAY_TLS_KEY",
        requires = "tls_listen",
        value_name = "FILE"
    )]
    pub tls_key: Option<PathBuf>,
    /// How pods with TLS are known.
    #[command(flatten)]
    pub model_tls: ModelTlsArgs,
    /// Where /healthz, /readyz and /metrics are served.
    #[arg(
        long,
        env = "ASHLAR_GATEWAY_ADMIN_LISTEN",
        default_value = "0.0.0.0:8081",
        value_name = "ADDRESS"
    )]
    pub admin_listen: SocketAddr,
    /// Name of the gateway's own Service, which no InferenceService may claim as a host.
    #[arg(
        long,
        env = "ASHLAR_GATEWAY_SERVICE_NAME",
        default_value = "ashlar-gateway"
    )]
    pub service_name: String,
    /// Namespace of operator and gateway.
    #[arg(
        long,
        env = "ASHLAR_OPERATOR_NAMESPACE",
        default_value = "ashlar-system"
    )]
    pub namespace: String,
    /// The cluster's DNS domain.
    #[arg(
        long,
        env = "ASHLAR_CLUSTER_DOMAIN",
        default_value = "cluster.local",
        value_name = "DOMAIN"
    )]
    pub cluster_domain: String,
    /// Port of the runtime in its pods.
    #[arg(
        long,
        env = "ASHLAR_RUNTIME_PORT",
        default_value_t = 8000,
        value_name = "PORT"
    )]
    pub runtime_port: u16,
    /// Largest request body; more is answered 413.
    #[arg(
        long,
        env = "ASHLAR_GATEWAY_MAX_BODY_BYTES",
        default_value_t = 10 << 20,
        value_name = "BYTES"
    )]
    pub max_body_bytes: u64,
    /// Bytes of a body kept to send it again, and searched for `model`.
    #[arg(
        long,
        env = "ASHLAR_GATEWAY_REPLAY_BYTES",
        default_value_t = 1 << 20,
        value_name = "BYTES"
    )]
    pub replay_bytes: usize,
    /// Longest pause of a client while it sends a body.
    #[arg(long, env = "ASHLAR_GATEWAY_BODY_TIMEOUT", default_value = "30", value_parser = seconds, value_name = "SECONDS")]
    pub body_timeout: Duration,
    /// Longest wait for a connection to a replica.
    #[arg(long, env = "ASHLAR_GATEWAY_CONNECT_TIMEOUT", default_value = "2", value_parser = seconds, value_name = "SECONDS")]
    pub connect_timeout: Duration,
    /// Longest wait of a request for a ready replica; then it is answered 503.
    #[arg(long, env = "ASHLAR_GATEWAY_HOLD_TIMEOUT", default_value = "30", value_parser = seconds, value_name = "SECONDS")]
    pub hold_timeout: Duration,
    /// Most requests that wait for a replica at one time; more are answered 503.
    #[arg(
        long,
        env = "ASHLAR_GATEWAY_MAX_HELD_REQUESTS",
        default_value_t = 1000,
        value_name = "COUNT"
    )]
    pub max_held_requests: usize,
    /// Most bytes of bodies kept for requests that wait for a replica; with more, requests are answered 503.
    #[arg(
        long,
        env = "ASHLAR_GATEWAY_MAX_HELD_BYTES",
        default_value_t = 64 << 20,
        value_name = "BYTES"
    )]
    pub max_held_bytes: usize,
    /// Most open connections of clients; more wait in the kernel.
    #[arg(long, env = "ASHLAR_GATEWAY_MAX_CONNECTIONS", default_value_t = 16_384, value_parser = clap::value_parser!(u32).range(1..=1_000_000), value_name = "COUNT")]
    pub max_connections: u32,
    /// Longest time from a request's head to its answer's beginning, held or not; then it is answered 504. A client may ask
    /// for less with `x-request-timeout: SECONDS`.
    #[arg(long, env = "ASHLAR_GATEWAY_REQUEST_TIMEOUT", default_value = "3600", value_parser = seconds, value_name = "SECONDS")]
    pub request_timeout: Duration,
    /// After SIGTERM, how long connections are still accepted while endpoints forget this address.
    #[arg(long, env = "ASHLAR_GATEWAY_DRAIN_DELAY", default_value = "10", value_parser = seconds, value_name = "SECONDS")]
    pub drain_delay: Duration,
    /// After that, how long open requests may take to end.
    #[arg(long, env = "ASHLAR_GATEWAY_DRAIN_TIMEOUT", default_value = "120", value_parser = seconds, value_name = "SECONDS")]
    pub drain_timeout: Duration,
}

impl GatewayArgs {
    /// What no service may claim as a host.
    pub(super) fn names(&self) -> GatewayNames {
        GatewayNames {
            service: self.service_name.clone(),
            namespace: self.namespace.clone(),
            cluster_domain: self.cluster_domain.trim_matches('.').to_ascii_lowercase(),
        }
    }

    /// Bounds of holding.
    pub(super) fn holds(&self) -> Holds {
        Holds::new(
            self.max_held_requests,
            self.max_held_bytes,
            self.hold_timeout,
        )
    }

    /// Bounds of the proxy.
    pub(super) fn limits(&self) -> ProxyLimits {
        ProxyLimits {
            body: BodyLimits {
                total: self.max_body_bytes,
                replay: self.replay_bytes,
                idle: self.body_timeout,
            },
            connect_timeout: self.connect_timeout,
            request_timeout: self.request_timeout,
        }
    }
}

/// Longest duration that an argument takes: a day.
const MAX_SECONDS: f64 = 86_400.0;

/// `30` or `0.5`, in seconds.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| "write a number of seconds, such as 30 or 0.5".to_owned())?;
    if !(0.0..=MAX_SECONDS).contains(&seconds) {
        return Err(format!("must lie between 0 and {MAX_SECONDS} seconds"));
    }
    Ok(Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_seconds() {
        assert_eq!(seconds("30"), Ok(Duration::from_secs(30)));
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for bad in ["", "-1", "30s", "NaN", "inf", "1e9"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
