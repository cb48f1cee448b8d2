//! The hub's protocol: revision → commit and listing, addresses, and requests for bytes.

use std::{io::Read, path::Path, sync::Arc, time::Duration};

use hf_hub::{
    Repo, RepoType,
    api::sync::{Api, ApiBuilder, ApiRepo},
};
use serde::Deserialize;
use ureq::{
    Agent, Body,
    config::RedirectAuthHeaders,
    http::Response,
    tls::{PemItem, RootCerts, TlsConfig},
};

use super::{HubError, select::safe_path, uri};

/// The public hub.
pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// Most bytes of a listing or an index: tens of thousands of files fit.
pub(crate) const MAX_DOCUMENT_BYTES: u64 = 32 << 20;
/// Most bytes of an error answer that are shown.
const MAX_DETAIL_BYTES: u64 = 300;
/// Most relative redirects followed while asking for a file's hash.
const MAX_REDIRECTS: usize = 5;

/// A secret that never prints itself.
#[derive(Clone)]
pub struct Token(String);

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

/// Hash that a file must have, in lower-case hex.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Digest {
    /// Of the content: large files.
    Sha256(String),
    /// Git's blob id, SHA-1 of a header and the content: small files.
    GitSha1(String),
    /// Of the content: objects of a bucket that were written at once.
    Md5(String),
    /// Of the MD5s of the parts, as a store tags an object that was written in parts of `part_bytes`.
    Md5Parts {
        /// Hex digits, `-`, number of parts.
        etag: String,
        /// Bytes of each part but the last.
        part_bytes: u64,
    },
}

impl Digest {
    /// From an `ETag` or a listing: 64 hex digits or 40.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text
            .trim()
            .trim_start_matches("W/")
            .trim_matches('"')
            .to_ascii_lowercase();
        if !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        match text.len() {
            64 => Some(Self::Sha256(text)),
            40 => Some(Self::GitSha1(text)),
            _ => None,
        }
    }

    /// The hex digits; of parts, their number too.
    #[must_use]
    pub fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::GitSha1(hex) | Self::Md5(hex) => hex,
            Self::Md5Parts { etag, .. } => etag,
        }
    }
}

/// A file of a snapshot. Its path is safe to join to a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteFile {
    /// Relative path.
    pub path: String,
    /// Bytes; `None` until [`Hub::describe`].
    pub size: Option<u64>,
    /// Hash; `None` until [`Hub::describe`].
    pub digest: Option<Digest>,
    /// Entity tag that the bytes must still have; only of objects in a bucket.
    pub etag: Option<String>,
}

/// A model's files at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// 40 hex digits.
    pub commit: String,
    /// All its files.
    pub files: Vec<RemoteFile>,
}

#[derive(Deserialize)]
struct Listing {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

/// A connection to one hub.
#[derive(Clone, Debug)]
pub struct Hub {
    api: Api,
    agent: Agent,
    tls: TlsConfig,
    config: Arc<HubConfig>,
}

impl Hub {
    /// Prepares a client; sends nothing.
    ///
    /// # Errors
    /// [`HubError::BadSetting`] when the CA file cannot be used.
    pub fn new(config: HubConfig) -> Result<Self, HubError> {
        let builder = ApiBuilder::new()
            .with_endpoint(config.endpoint.clone())
            .with_token(config.token.as_ref().map(|token| token.0.clone()))
            .with_user_agent("ashlar", env!("CARGO_PKG_VERSION"))
            .with_progress(false);
        let api = builder.build().map_err(|error| HubError::BadSetting {
            name: "hub client",
            reason: error.to_string(),
        })?;
        let (agent, tls) = new_agent(&config)?;
        Ok(Self {
            api,
            agent,
            tls,
            config: Arc::new(config),
        })
    }

    /// Its settings.
    #[must_use]
    pub fn config(&self) -> &HubConfig {
        &self.config
    }

    fn repo(&self, repo: &str, revision: &str) -> ApiRepo {
        self.api.repo(Repo::with_revision(
            repo.to_owned(),
            RepoType::Model,
            revision.to_owned(),
        ))
    }

    /// Resolves a revision to its commit and lists the files. Retries what may pass.
    ///
    /// # Errors
    /// [`HubError`]: unknown, gated, unreachable, or an answer that is not a listing.
    pub fn snapshot(&self, repo: &str, revision: &str) -> Result<Snapshot, HubError> {
        let what = format!("{repo} at {revision}");
        let listing: Listing = self.config.retrying(&what, || {
            let request = self
                .repo(repo, revision)
                .info_request()
                .query("blobs", "true")
                .config();
            let request = request
                .http_status_as_error(false)
                .tls_config(self.tls.clone())
                .timeout_connect(Some(self.config.stall))
                .timeout_recv_response(Some(self.config.stall))
                .timeout_per_read(Some(self.config.stall))
                .build();
            let response = request.call().map_err(Fault::network)?;
            let mut response = self.accept(response, repo, revision, None)?;
            response
                .body_mut()
                .with_config()
                .limit(MAX_DOCUMENT_BYTES)
                .read_json()
                .map_err(|error| Fault::document(&what, error))
        })?;
        let bad = |reason: String| HubError::Protocol {
            what: what.clone(),
            reason,
        };
        if !uri::is_commit(&listing.sha) {
            return Err(bad(format!(
                "its commit is {:?}, not 40 hex digits",
                listing.sha
            )));
        }
        let remote = |sibling: Sibling| {
            let path = safe_path(&sibling.rfilename).map(str::to_owned);
            let path =
                path.ok_or_else(|| bad(format!("it lists a file named {:?}", sibling.rfilename)))?;
            let (size, id) = match sibling.lfs {
                Some(lfs) => (lfs.size.or(sibling.size), lfs.sha256),
                None => (sibling.size, sibling.blob_id),
            };
            Ok(RemoteFile {
                path,
                size,
                digest: id.as_deref().and_then(Digest::parse),
                etag: None,
            })
        };
        let files = listing
            .siblings
            .into_iter()
            .map(remote)
            .collect::<Result<_, HubError>>()?;
        Ok(Snapshot {
            commit: listing.sha,
            files,
        })
    }

    /// Fills in size and hash from the file's own headers, for hubs whose listing lacks them.
    ///
    /// # Errors
    /// [`HubError`] as for any request, or when the headers hold no size.
    pub fn describe(
        &self,
        repo: &str,
        commit: &str,
        file: &mut RemoteFile,
    ) -> Result<(), HubError> {
        if file.size.is_some() && file.digest.is_some() {
            return Ok(());
        }
        let response = self
            .config
            .retrying(&file.path, || self.head(repo, commit, &file.path))?;
        let header = |name: &str| {
            response
                .headers()
                .get(name)
                .and_then(|value| value.to_str().ok())
        };
        let size = header("x-linked-size")
            .or_else(|| header("content-length"))
            .and_then(|text| text.parse().ok());
        file.size = file.size.or(size);
        file.digest = header("x-linked-etag")
            .or_else(|| header("etag"))
            .and_then(Digest::parse)
            .or(file.digest.take());
        if file.size.is_none() {
            return Err(HubError::Protocol {
                what: file.path.clone(),
                reason: "neither listing nor headers hold its size".to_owned(),
            });
        }
        if file.digest.is_none() {
            tracing::warn!(
                file = file.path,
                "the hub gives no hash for this file: only its size is checked"
            );
        }
        Ok(())
    }

    /// HEAD of a file. The hash stands in the hub's own answer, so a redirect to another host is not followed.
    fn head(&self, repo: &str, commit: &str, path: &str) -> Result<Response<Body>, Fault> {
        let mut address = self.address(repo, commit, path);
        for _ in 0..MAX_REDIRECTS {
            let request = self.authorised(self.agent.head(&address));
            let response = request
                .config()
                .max_redirects(0)
                .max_redirects_will_error(false)
                .build()
                .call()
                .map_err(Fault::network)?;
            let location = response
                .headers()
                .get("location")
                .and_then(|value| value.to_str().ok());
            match location {
                Some(relative)
                    if response.status().is_redirection()
                        && relative.starts_with('/')
                        && !relative.starts_with("//") =>
                {
                    address = format!("{}{relative}", self.config.endpoint);
                }
                _ if response.status().is_redirection() => return Ok(response),
                _ => return self.accept(response, repo, commit, Some(path)),
            }
        }
        Err(Fault::Fatal(HubError::Protocol {
            what: path.to_owned(),
            reason: format!("more than {MAX_REDIRECTS} redirects"),
        }))
    }

    fn authorised<S>(&self, request: ureq::RequestBuilder<S>) -> ureq::RequestBuilder<S> {
        match &self.config.token {
            Some(token) => request.header("authorization", format!("Bearer {}", token.0)),
            None => request,
        }
    }

    fn address(&self, repo: &str, commit: &str, path: &str) -> String {
        self.repo(repo, commit).url(&percent_encoded(path))
    }

    /// Asks for a file's bytes from `from` on. The answer is 200, 206 or 416.
    pub(crate) fn bytes(
        &self,
        repo: &str,
        commit: &str,
        path: &str,
        from: u64,
    ) -> Result<Response<Body>, Fault> {
        let mut request = self.authorised(self.agent.get(self.address(repo, commit, path)));
        if from > 0 {
            request = request.header("range", format!("bytes={from}-"));
        }
        let response = request.call().map_err(Fault::network)?;
        if response.status().as_u16() == 416 {
            Ok(response)
        } else {
            self.accept(response, repo, commit, Some(path))
        }
    }

    /// Lets success through; sorts the rest into what may pass and what will not.
    fn accept(
        &self,
        response: Response<Body>,
        repo: &str,
        revision: &str,
        file: Option<&str>,
    ) -> Result<Response<Body>, Fault> {
        let status = response.status().as_u16();
        if (200..300).contains(&status) {
            return Ok(response);
        }
        let header = |name: &str| {
            response
                .headers()
                .get(name)
                .and_then(|value| value.to_str().ok())
                .map(str::to_owned)
        };
        let (code, after) = (
            header("x-error-code"),
            header("retry-after").and_then(|text| text.parse().ok()),
        );
        if status == 408 || status == 429 || status >= 500 {
            let reason = format!("HTTP {status}");
            return Err(Fault::Retry {
                reason,
                after: after.map(Duration::from_secs),
            });
        }
        let repo = repo.to_owned();
        let what = file.map_or_else(
            || format!("{repo} at {revision}"),
            |file| format!("{repo}/{file}"),
        );
        Err(Fault::Fatal(match (code.as_deref(), status) {
            (Some("GatedRepo"), _) => HubError::Gated {
                repo,
                endpoint: self.config.endpoint.clone(),
            },
            (Some("RevisionNotFound"), _) => HubError::RevisionNotFound {
                repo,
                revision: revision.to_owned(),
            },
            (Some("EntryNotFound"), _) => HubError::FileNotFound {
                repo,
                file: file.unwrap_or_default().to_owned(),
            },
            (Some("RepoNotFound"), _) => HubError::RepoNotFound { repo },
            (_, 401 | 403) => HubError::Unauthorized { repo, status },
            (_, 404) => match file {
                Some(file) => HubError::FileNotFound {
                    repo,
                    file: file.to_owned(),
                },
                None => HubError::RepoNotFound { repo },
            },
            _ => HubError::Status {
                status,
                what,
                detail: beginning(response),
            },
        }))
    }
}

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

/// Escapes what has a meaning in an address; `/` stays.
fn percent_encoded(path: &str) -> String {
    path.bytes()
        .fold(String::with_capacity(path.len()), |mut out, byte| {
            if byte.is_ascii_alphanumeric() || b"-_.~/".contains(&byte) {
                out.push(char::from(byte));
            } else {
                out.push_str(&format!("%{byte:02X}"));
            }
            out
        })
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
    fn digests_are_told_apart_by_length() {
        assert_eq!(
            Digest::parse(&format!("\"{}\"", "AB".repeat(32))),
            Some(Digest::Sha256("ab".repeat(32)))
        );
        assert_eq!(
            Digest::parse(&format!("W/\"{}\"", "0c".repeat(20))),
            Some(Digest::GitSha1("0c".repeat(20)))
        );
        assert_eq!(
            Digest::parse("\"d41d8cd98f00b204e9800998ecf8427e-3\""),
            None
        );
    }

    #[test]
    fn addresses_are_escaped() {
        assert_eq!(percent_encoded("a b/ü#?.gguf"), "a%20b/%C3%BC%23%3F.gguf");
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
