//! Buckets of any S3-compatible store: listing, checksums and bytes. `rusty_s3` signs the requests (Signature Version 4, in the
//! query) and reads the listing; they are sent as those of the hub are.
//!
//! A bucket has no commits. What stands for one is a hash of the listing: names, sizes and entity tags. A pull that names it
//! finds the same objects or fails, and an object that is replaced while it is read is noticed by its entity tag.

use std::{fmt, sync::Arc, time::Duration};

use base64::Engine as _;
use rusty_s3::{
    Bucket as Address, Credentials, S3Action, UrlStyle,
    actions::{GetObject, HeadObject, ListObjectsV2},
};
use sha2::{Digest as _, Sha256};
use ureq::{Agent, Body, http::Response};

use super::{
    HubError,
    attempt::{Fault, beginning, new_agent},
    client::{Digest, HubConfig, RemoteFile, Snapshot},
    select::safe_path,
    uri,
};

/// The revision that takes whatever the bucket holds.
pub const LATEST: &str = "latest";
/// Region of stores that have none.
const DEFAULT_REGION: &str = "us-east-1";
/// A signature is used at once; retries sign anew.
const SIGNED_FOR: Duration = Duration::from_secs(900);
/// Most pages of a listing, of a thousand objects each.
const MAX_PAGES: usize = 100;
/// Most bytes of one page.
const MAX_PAGE_BYTES: u64 = 8 << 20;

/// How to reach a store.
#[derive(Clone, Default)]
pub struct S3Config {
    /// Its address, without the bucket; Amazon's in the region when absent.
    pub endpoint: Option<String>,
    /// Its region.
    pub region: Option<String>,
    /// Who asks; nobody for a public bucket.
    pub credentials: Option<Credentials>,
}

impl fmt::Debug for S3Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Config")
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .field("signed", &self.credentials.is_some())
            .finish()
    }
}

impl S3Config {
    /// `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`, `AWS_REGION` or `AWS_DEFAULT_REGION`, `AWS_ACCESS_KEY_ID`,
    /// `AWS_SECRET_ACCESS_KEY` and `AWS_SESSION_TOKEN`, as Amazon's own tools read them.
    #[must_use]
    pub fn from_env() -> Self {
        let var = |name: &str| {
            let value = std::env::var(name).ok()?.trim().to_owned();
            (!value.is_empty()).then_some(value)
        };
        Self {
            endpoint: var("AWS_ENDPOINT_URL_S3").or_else(|| var("AWS_ENDPOINT_URL")),
            region: var("AWS_REGION").or_else(|| var("AWS_DEFAULT_REGION")),
            credentials: Credentials::from_env(),
        }
    }
}

/// One bucket of one store.
#[derive(Clone, Debug)]
pub struct Bucket {
    address: Arc<Address>,
    credentials: Option<Credentials>,
    agent: Agent,
    /// Patience and certificates; its endpoint is the store's.
    config: Arc<HubConfig>,
}

impl Bucket {
    /// Prepares a client; sends nothing.
    ///
    /// # Errors
    /// [`HubError::BadSetting`] when the endpoint or the CA file cannot be used.
    pub fn new(name: &str, store: S3Config, mut config: HubConfig) -> Result<Self, HubError> {
        let region = store.region.unwrap_or_else(|| DEFAULT_REGION.to_owned());
        // Names with dots do not fit Amazon's certificates, and other stores are often reached by address.
        let style = if store.endpoint.is_some() || name.contains('.') {
            UrlStyle::Path
        } else {
            UrlStyle::VirtualHost
        };
        let endpoint = store
            .endpoint
            .unwrap_or_else(|| format!("https://s3.{region}.amazonaws.com"));
        config.set_endpoint(&endpoint)?;
        let bad = |reason: String| HubError::BadSetting {
            name: "--endpoint (AWS_ENDPOINT_URL)",
            reason: format!("{endpoint:?}: {reason}"),
        };
        let parsed = config
            .endpoint
            .parse()
            .map_err(|error| bad(format!("{error}")))?;
        let address = Address::new(parsed, style, name.to_owned(), region)
            .map_err(|error| bad(error.to_string()))?;
        let (agent, _) = new_agent(&config)?;
        Ok(Self {
            address: Arc::new(address),
            credentials: store.credentials,
            agent,
            config: Arc::new(config),
        })
    }

    pub(crate) fn config(&self) -> &HubConfig {
        &self.config
    }

    /// Lists what lies below the folder `repo` (`BUCKET/FOLDER`).
    pub(crate) fn snapshot(&self, repo: &str, revision: &str) -> Result<Snapshot, HubError> {
        if revision != LATEST && !uri::is_commit(revision) {
            return Err(HubError::BadSetting {
                name: "--revision",
                reason: format!(
                    "a bucket has no revision {revision:?}; leave it out, or give the 40 hex digits that an earlier pull printed"
                ),
            });
        }
        let folder = folder(repo);
        let mut files = Vec::new();
        let mut token = None;
        for _ in 0..MAX_PAGES {
            let page = self.page(repo, &folder, token.as_deref())?;
            for object in page.contents {
                // Consoles mark folders by empty objects.
                if object.key.ends_with('/') {
                    continue;
                }
                let file = listed(repo, &folder, &object.key, object.size)?;
                files.push(RemoteFile {
                    etag: object.etag,
                    ..file
                });
            }
            token = page.next_continuation_token;
            if token.is_none() {
                break;
            }
        }
        if token.is_some() {
            let reason =
                format!("more than {MAX_PAGES} pages of objects: name the model's own folder");
            return Err(protocol(repo, reason));
        }
        if files.is_empty() {
            return Err(HubError::NoObjects {
                uri: repo.to_owned(),
            });
        }
        let commit = commit_of(&mut files);
        if uri::is_commit(revision) && revision != commit {
            return Err(HubError::ObjectsChanged {
                uri: repo.to_owned(),
                wanted: revision.to_owned(),
                found: commit,
            });
        }
        Ok(Snapshot { commit, files })
    }

    fn page(
        &self,
        repo: &str,
        folder: &str,
        token: Option<&str>,
    ) -> Result<rusty_s3::actions::ListObjectsV2Response, HubError> {
        let what = format!("the listing of s3://{repo}");
        let text = self.config.retrying(&what, || {
            let mut list = ListObjectsV2::new(&self.address, self.credentials.as_ref());
            if !folder.is_empty() {
                list.with_prefix(folder.to_owned());
            }
            if let Some(token) = token {
                list.with_continuation_token(token.to_owned());
            }
            let request = self.agent.get(list.sign(SIGNED_FOR).as_str());
            let mut response = self.accept(request.call().map_err(Fault::network)?, &what)?;
            let body = response.body_mut().with_config().limit(MAX_PAGE_BYTES);
            body.read_to_string().map_err(Fault::network)
        })?;
        ListObjectsV2::parse_response(&text).map_err(|error| protocol(&what, error.to_string()))
    }

    /// Learns what the object's bytes can be checked against.
    pub(crate) fn describe(&self, repo: &str, file: &mut RemoteFile) -> Result<(), HubError> {
        let response = self.head(repo, file, None)?;
        let header = |name: &str| {
            let value = response.headers().get(name)?;
            value.to_str().ok()
        };
        let length = header("content-length").and_then(|text| text.parse().ok());
        if length.is_some() && length != file.size {
            return Err(changed(repo, file));
        }
        let sha256 = header("x-amz-checksum-sha256").and_then(sha256_of);
        // With keys of the store's own the entity tag is no hash of the content.
        let opaque = header("x-amz-server-side-encryption").is_some_and(|how| how != "AES256")
            || header("x-amz-server-side-encryption-customer-algorithm").is_some();
        let etag = header("etag").map(|tag| tag.trim_matches('"').to_ascii_lowercase());
        let by_etag = etag.filter(|_| !opaque);
        file.digest = match (sha256, by_etag) {
            (Some(sha256), _) => Some(Digest::Sha256(sha256)),
            (None, Some(etag)) => self.digest_of(repo, file, etag)?,
            (None, None) => None,
        };
        if file.digest.is_none() {
            tracing::warn!(
                file = file.path,
                "the store gives no hash for this object: its size and entity tag are checked"
            );
        }
        Ok(())
    }

    /// What an entity tag says: the MD5 of the content, or of the MD5s of its parts.
    fn digest_of(
        &self,
        repo: &str,
        file: &RemoteFile,
        etag: String,
    ) -> Result<Option<Digest>, HubError> {
        let is_md5 = |text: &str| text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let Some((md5, parts)) = etag.split_once('-') else {
            return Ok(is_md5(&etag).then_some(Digest::Md5(etag)));
        };
        let (true, Ok(parts)) = (is_md5(md5), parts.parse::<u64>()) else {
            return Ok(None);
        };
        let first = self.head(repo, file, Some(1))?;
        let length = first.headers().get("content-length");
        let part_bytes = length
            .and_then(|value| value.to_str().ok()?.parse::<u64>().ok())
            .filter(|bytes| *bytes > 0);
        // Parts of unequal sizes, or a store that does not know parts: the tag cannot be computed here.
        let even = part_bytes.filter(|bytes| file.size.unwrap_or(0).div_ceil(*bytes) == parts);
        Ok(even.map(|part_bytes| Digest::Md5Parts { etag, part_bytes }))
    }

    fn head(
        &self,
        repo: &str,
        file: &RemoteFile,
        part: Option<u16>,
    ) -> Result<Response<Body>, HubError> {
        let key = key(repo, &file.path);
        let what = format!("s3://{repo}/{}", file.path);
        self.config.retrying(&what, || {
            let mut head = HeadObject::new(&self.address, self.credentials.as_ref(), &key);
            head.headers_mut().insert("x-amz-checksum-mode", "ENABLED");
            if let Some(part) = part {
                head.query_mut().insert("partNumber", part.to_string());
            }
            let request = self
                .agent
                .head(head.sign(SIGNED_FOR).as_str())
                .header("x-amz-checksum-mode", "ENABLED");
            self.accept(request.call().map_err(Fault::network)?, &what)
        })
    }

    /// Asks for an object's bytes from `from` on. The answer is 200, 206 or 416.
    pub(crate) fn bytes(
        &self,
        repo: &str,
        file: &RemoteFile,
        from: u64,
    ) -> Result<Response<Body>, Fault> {
        let key = key(repo, &file.path);
        let mut get = GetObject::new(&self.address, self.credentials.as_ref(), &key);
        // Signed, so that nobody between here and the store can take it out.
        if let Some(etag) = &file.etag {
            get.headers_mut().insert("if-match", etag.clone());
        }
        let mut request = self.agent.get(get.sign(SIGNED_FOR).as_str());
        if let Some(etag) = &file.etag {
            request = request.header("if-match", etag);
        }
        if from > 0 {
            request = request.header("range", format!("bytes={from}-"));
        }
        let response = request.call().map_err(Fault::network)?;
        match response.status().as_u16() {
            416 => Ok(response),
            412 => Err(Fault::Fatal(changed(repo, file))),
            _ => self.accept(response, &format!("s3://{repo}/{}", file.path)),
        }
    }

    /// Lets success through; sorts the rest into what may pass and what will not.
    fn accept(&self, response: Response<Body>, what: &str) -> Result<Response<Body>, Fault> {
        let status = response.status().as_u16();
        if (200..300).contains(&status) {
            return Ok(response);
        }
        if status == 408 || status == 429 || status >= 500 {
            return Err(Fault::Retry {
                reason: format!("HTTP {status}"),
                after: None,
            });
        }
        let region = response.headers().get("x-amz-bucket-region");
        let region = region.and_then(|value| value.to_str().ok().map(str::to_owned));
        let detail = beginning(response);
        let code = element(&detail, "Code").unwrap_or_default().to_owned();
        if code == "RequestTimeTooSkewed" || code == "SlowDown" {
            return Err(Fault::Retry {
                reason: code,
                after: None,
            });
        }
        let advice = match (code.as_str(), status) {
            ("NoSuchBucket", _) => "the store has no such bucket: check the name and the endpoint".to_owned(),
            ("InvalidAccessKeyId" | "SignatureDoesNotMatch" | "InvalidToken" | "ExpiredToken", _) => {
                "the store does not accept the keys: check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the region".to_owned()
            }
            ("AuthorizationHeaderMalformed" | "PermanentRedirect", _) | (_, 301 | 307) => format!(
                "the bucket is in another region: set --region (AWS_REGION) to {}",
                region.as_deref().unwrap_or("the bucket's own")
            ),
            (_, 401 | 403) if self.credentials.is_none() => {
                "the bucket is not public: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (spec.model.credentialsSecretRef)".to_owned()
            }
            (_, 401 | 403) => "these keys may not read it: allow s3:ListBucket on the bucket and s3:GetObject on the objects".to_owned(),
            (_, 404) => "it is not there: check the path".to_owned(),
            _ => detail,
        };
        Err(Fault::Fatal(HubError::Store {
            what: what.to_owned(),
            status,
            code,
            advice,
        }))
    }
}

fn listed(repo: &str, folder: &str, key: &str, size: Option<u64>) -> Result<RemoteFile, HubError> {
    let name = key.strip_prefix(folder).unwrap_or_default();
    let path = safe_path(name)
        .ok_or_else(|| protocol(repo, format!("it lists an object named {key:?}")))?;
    let size = size.ok_or_else(|| protocol(repo, format!("no size is listed for {key:?}")))?;
    Ok(RemoteFile {
        path: path.to_owned(),
        size: Some(size),
        digest: None,
        etag: None,
    })
}

/// The folder of `BUCKET/FOLDER` as a prefix of keys: empty, or ending in a slash.
fn folder(repo: &str) -> String {
    match repo.split_once('/') {
        Some((_, folder)) if !folder.is_empty() => format!("{folder}/"),
        _ => String::new(),
    }
}

fn key(repo: &str, path: &str) -> String {
    format!("{}{path}", folder(repo))
}

/// Forty hex digits over what the bucket holds; sorts the files by name.
fn commit_of(files: &mut [RemoteFile]) -> String {
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let mut hasher = Sha256::new();
    for file in files {
        let etag = file.etag.as_deref().unwrap_or_default();
        hasher.update(format!(
            "{}\0{}\0{etag}\n",
            file.path,
            file.size.unwrap_or_default()
        ));
    }
    hex::encode(&hasher.finalize()[..20])
}

/// Hex of a checksum of the whole object; one of parts ends in their number.
fn sha256_of(base64: &str) -> Option<String> {
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(base64)
        .ok()?;
    (bytes.len() == 32).then(|| hex::encode(bytes))
}

fn changed(repo: &str, file: &RemoteFile) -> HubError {
    HubError::ObjectReplaced {
        uri: format!("{repo}/{}", file.path),
    }
}

fn protocol(what: &str, reason: String) -> HubError {
    HubError::Protocol {
        what: what.to_owned(),
        reason,
    }
}

/// The text of an element of an error document.
fn element<'a>(xml: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    rest.split_once(&format!("</{name}>")).map(|(text, _)| text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_do_not_print_keys() {
        let config = S3Config {
            credentials: Some(Credentials::new("AKIA", "very-secret")),
            ..S3Config::default()
        };
        let text = format!("{config:?}");
        assert!(!text.contains("secret") && !text.contains("AKIA"), "{text}");
    }

    #[test]
    fn only_a_checksum_of_the_whole_object_counts() {
        let whole = "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=";
        assert_eq!(
            sha256_of(whole).as_deref(),
            Some("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
        );
        assert_eq!(sha256_of(&format!("{whole}-3")), None);
    }

    #[test]
    fn the_listing_is_the_revision_whatever_its_order() {
        let file = |path: &str, etag: &str| RemoteFile {
            path: path.to_owned(),
            size: Some(1),
            digest: None,
            etag: Some(etag.to_owned()),
        };
        let one = commit_of(&mut [file("a", "1"), file("b", "2")]);
        assert_eq!(one, commit_of(&mut [file("b", "2"), file("a", "1")]));
        assert_ne!(one, commit_of(&mut [file("a", "1"), file("b", "3")]));
        assert!(uri::is_commit(&one));
    }
}
