//! One attempt to reach a source: the connection's settings, how it may fail, and when to try again.

use std::{io::Read, path::Path, time::Duration};

use ureq::{
    Agent, Body,
    config::RedirectAuthHeaders,
    http::Response,
    tls::{PemItem, RootCerts, TlsConfig},
};

use super::{HubError, settings::HubConfig};

/// Most bytes of an error answer that are shown.
const MAX_DETAIL_BYTES: u64 = 300;

/// How one attempt failed.
#[derive(Debug)]
pub(crate) enum Fault {
    /// It may pass.
    Retry {
        /// What happened.
        reason: String,
        /// The server's own wish.
        after: Option<Duration>,
    },
    /// It will not.
    Fatal(HubError),
}

impl Fault {
    pub(crate) fn network(error: ureq::Error) -> Self {
        Self::Retry {
            reason: error.to_string(),
            after: None,
        }
    }

    pub(crate) fn document(what: &str, error: ureq::Error) -> Self {
        match error {
            ureq::Error::Json(_) | ureq::Error::BodyExceedsLimit(_) => {
                Self::Fatal(HubError::Protocol {
                    what: what.to_owned(),
                    reason: error.to_string(),
                })
            }
            other => Self::network(other),
        }
    }
}

impl HubConfig {
    /// Runs `attempt` until it succeeds, fails for good, or has failed [`Self::max_attempts`] times.
    pub(crate) fn retrying<T>(
        &self,
        what: &str,
        mut attempt: impl FnMut() -> Result<T, Fault>,
    ) -> Result<T, HubError> {
        let mut failures = 0;
        loop {
            match attempt() {
                Ok(value) => return Ok(value),
                Err(Fault::Fatal(error)) => return Err(error),
                Err(Fault::Retry { reason, after }) => {
                    failures += 1;
                    self.pause(what, failures, reason, after)?;
                }
            }
        }
    }

    /// Waits before attempt `failures + 1`, or gives up.
    pub(crate) fn pause(
        &self,
        what: &str,
        failures: u32,
        reason: String,
        after: Option<Duration>,
    ) -> Result<(), HubError> {
        if failures >= self.max_attempts {
            return Err(HubError::Network {
                what: what.to_owned(),
                attempts: failures,
                reason,
            });
        }
        let longest = self.retry_base * 30;
        let doubled = self
            .retry_base
            .saturating_mul(1 << failures.min(5))
            .min(longest);
        let jittered = doubled.mul_f64(0.5 + 0.5 * rand::random::<f64>());
        let wait = after.map_or(jittered, |after| {
            after.min(longest.max(Duration::from_secs(30)))
        });
        tracing::warn!(what, failures, %reason, wait_seconds = wait.as_secs_f64(), "will try again");
        std::thread::sleep(wait);
        Ok(())
    }
}

/// A client with these settings, and how it trusts.
pub(crate) fn new_agent(config: &HubConfig) -> Result<(Agent, TlsConfig), HubError> {
    let tls = TlsConfig::builder()
        .root_certs(root_certs(config.ca_file.as_deref())?)
        .build();
    let agent = Agent::config_builder()
        .tls_config(tls.clone())
        .http_status_as_error(false)
        .redirect_auth_headers(RedirectAuthHeaders::SameHost)
        .user_agent(concat!("ashlar/", env!("CARGO_PKG_VERSION")))
        // Compressed answers would break lengths, ranges and hashes.
        .accept_encoding("identity")
        .timeout_connect(Some(config.stall))
        .timeout_recv_response(Some(config.stall))
        .timeout_per_read(Some(config.stall))
        .build();
    Ok((agent.into(), tls))
}

fn root_certs(file: Option<&Path>) -> Result<RootCerts, HubError> {
    let Some(file) = file else {
        return Ok(RootCerts::WebPki);
    };
    let bad = |reason: String| HubError::BadSetting {
        name: "SSL_CERT_FILE",
        reason: format!("{}: {reason}", file.display()),
    };
    let pem = std::fs::read(file).map_err(|error| bad(error.to_string()))?;
    let mut certificates = Vec::new();
    for item in ureq::tls::parse_pem(&pem) {
        if let PemItem::Certificate(certificate) = item.map_err(|error| bad(error.to_string()))? {
            certificates.push(certificate);
        }
    }
    if certificates.is_empty() {
        return Err(bad("it holds no certificate in PEM form".to_owned()));
    }
    Ok(RootCerts::new_with_certs(&certificates))
}

pub(crate) fn beginning(response: Response<Body>) -> String {
    let mut text = Vec::new();
    // What cannot be read is merely not shown.
    let _ = response
        .into_body()
        .into_reader()
        .take(MAX_DETAIL_BYTES)
        .read_to_end(&mut text);
    String::from_utf8_lossy(&text).trim().to_owned()
}
