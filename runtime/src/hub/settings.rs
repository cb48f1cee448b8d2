//! Where the hub is, who asks, and how patient to be with it.

use std::time::Duration;

use super::HubError;

/// The public hub.
pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// A secret that never prints itself.
#[derive(Clone)]
pub struct Token(pub(super) String);

impl Token {
    /// Takes a token; blanks around it (a file's last newline) are dropped, an empty one is none.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        let text = text.trim();
        (!text.is_empty()).then(|| Self(text.to_owned()))
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(***)")
    }
}

/// Where the hub is and how patient to be with it.
#[derive(Debug, Clone)]
pub struct HubConfig {
    /// Base address, no slash at its end.
    pub endpoint: String,
    /// Access token.
    pub token: Option<Token>,
    /// PEM file with the authorities to trust instead of the public ones.
    pub ca_file: Option<std::path::PathBuf>,
    /// Longest silence of a connection before it is given up and resumed.
    pub stall: Duration,
    /// First pause before a retry; it doubles, with jitter, up to 30 times this.
    pub retry_base: Duration,
    /// Failures in a row, without a byte between them, before giving up.
    pub max_attempts: u32,
    /// Files downloaded at once.
    pub workers: usize,
}

impl Default for HubConfig {
    fn default() -> Self {
        Self {
            endpoint: DEFAULT_ENDPOINT.to_owned(),
            token: None,
            ca_file: None,
            stall: Duration::from_secs(30),
            retry_base: Duration::from_millis(500),
            max_attempts: 6,
            workers: 4,
        }
    }
}

impl HubConfig {
    /// `HF_ENDPOINT`, `HF_TOKEN` (or the token file that `hf auth login` writes), `SSL_CERT_FILE`.
    ///
    /// # Errors
    /// [`HubError::BadSetting`] when the endpoint is not an http(s) address.
    pub fn from_env() -> Result<Self, HubError> {
        let var = |name: &str| {
            std::env::var(name)
                .ok()
                .filter(|value| !value.trim().is_empty())
        };
        let mut config = Self {
            ca_file: var("SSL_CERT_FILE").map(Into::into),
            ..Self::default()
        };
        if let Some(endpoint) = var("HF_ENDPOINT") {
            config.set_endpoint(&endpoint)?;
        }
        let token = var("HF_TOKEN").or_else(|| hf_hub::Cache::from_env().token());
        config.token = token.as_deref().and_then(Token::new);
        Ok(config)
    }

    /// Sets the base address.
    ///
    /// # Errors
    /// [`HubError::BadSetting`] when it is not an http(s) address.
    pub fn set_endpoint(&mut self, endpoint: &str) -> Result<(), HubError> {
        let endpoint = endpoint.trim().trim_end_matches('/');
        let rest = endpoint
            .strip_prefix("https://")
            .or_else(|| endpoint.strip_prefix("http://"));
        if rest.is_none_or(str::is_empty) {
            let reason = format!("{endpoint:?} is no http:// or https:// address");
            return Err(HubError::BadSetting {
                name: "--endpoint (HF_ENDPOINT)",
                reason,
            });
        }
        self.endpoint = endpoint.to_owned();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_does_not_print() {
        let config = HubConfig {
            token: Token::new("hf_secret\n"),
            ..HubConfig::default()
        };
        assert!(!format!("{config:?}").contains("secret"));
        assert!(Token::new(" \n").is_none());
    }

    #[test]
    fn the_endpoint_is_an_http_address() {
        let mut config = HubConfig::default();
        assert!(config.set_endpoint("huggingface.co").is_err());
        assert!(config.set_endpoint("https://").is_err());
        assert!(config.set_endpoint("http://mirror:8080/hub/").is_ok());
        assert_eq!(config.endpoint, "http://mirror:8080/hub");
    }
}
