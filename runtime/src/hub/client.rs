//! The hub's protocol: revision → commit and listing, addresses, and requests for bytes.

use std::{sync::Arc, time::Duration};

use hf_hub::{
    Repo, RepoType,
    api::sync::{Api, ApiBuilder, ApiRepo},
};
use serde::Deserialize;
use ureq::{Agent, Body, http::Response, tls::TlsConfig};

use super::{
    HubError,
    attempt::{Fault, beginning, new_agent},
    select::safe_path,
    uri,
};
pub use super::{
    settings::{DEFAULT_ENDPOINT, HubConfig, Token},
    snapshot::{Digest, RemoteFile, Snapshot},
};

/// Most bytes of a listing or an index: tens of thousands of files fit.
pub(crate) const MAX_DOCUMENT_BYTES: u64 = 32 << 20;
/// Most relative redirects followed while asking for a file's hash.
const MAX_REDIRECTS: usize = 5;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_escaped() {
        assert_eq!(percent_encoded("a b/ü#?.gguf"), "a%20b/%C3%BC%23%3F.gguf");
    }
}
