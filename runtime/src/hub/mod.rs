//! Models from a hub onto this machine: resolved once, resumed, checked, and never half there.
//!
//! ```text
//! uri ──► source: client or s3 (revision → commit, listing) ──► select (what a runtime needs) ──► store (place), work (lock)
//!                                                                                     └► download (resume, hash)
//! ```
//!
//! `hf-hub` supplies the protocol: endpoint, token lookup, addresses and the listing request. The bytes themselves are
//! fetched here over `ureq` (the client that `hf-hub` itself uses), because `hf-hub` 0.5 checks no hash, waits for ever
//! on a stalled connection, appends a whole answer to a partial file when a mirror ignores `Range`, and names files in
//! its cache after whatever `ETag` the server sent.
//!
//! Invariants:
//! - a folder with a manifest is complete, and every file in it had the size and hash that the hub announced;
//! - a name from the hub is never used as a path before [`select::safe_path`] accepted it;
//! - a token goes to the hub's own host only, and appears in no log, error or `Debug` output.

mod attempt;
pub mod client;
pub mod download;
pub mod error;
pub mod evict;
pub mod progress;
pub mod s3;
pub mod select;
mod settings;
mod snapshot;
pub mod source;
pub mod store;
pub mod uri;
mod work;

use std::path::{Path, PathBuf};

pub use client::{Hub, HubConfig, Token};
pub use error::HubError;
pub use evict::{Budget, hold};
pub use progress::{Phase, Progress};
pub use s3::{Bucket, S3Config};
pub use select::Selection;
pub use source::Source;
pub use store::{Place, PullOptions, Pulled, pull};
pub use uri::ModelUri;

/// Folder that holds pulled models unless told otherwise: `$ASHLAR_CACHE`, `$XDG_CACHE_HOME/ashlar`, `~/.cache/ashlar`.
#[must_use]
pub fn default_cache() -> PathBuf {
    let from = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    from("ASHLAR_CACHE")
        .or_else(|| from("XDG_CACHE_HOME").map(|dir| dir.join("ashlar")))
        .or_else(|| from("HOME").map(|dir| dir.join(".cache/ashlar")))
        .unwrap_or_else(|| PathBuf::from("ashlar-cache"))
}

/// Local path of the model that `model` names: a folder or file as it is, an address of a hub or bucket after pulling
/// it.
///
/// `revision` is used when the address itself carries none; both default to the source's newest. Settings come from the
/// environment ([`HubConfig::from_env`], [`S3Config::from_env`]). Blocks while downloading: call it outside async tasks.
///
/// # Errors
/// [`HubError`] when the address is malformed, or its files cannot be had.
pub fn resolve_model(
    model: &str,
    revision: Option<&str>,
    cache: Option<&Path>,
    progress: &Progress,
) -> Result<PathBuf, HubError> {
    let uri = ModelUri::parse(model)?;
    let (uri_revision, file) = match uri.clone() {
        ModelUri::Local(path) => return Ok(path),
        ModelUri::Hub { revision, file, .. } => (revision, file),
        ModelUri::Bucket { file, .. } => (None, file),
    };
    let (source, repo) = Source::of(&uri, HubConfig::from_env()?, S3Config::from_env())?;
    let revision = uri_revision
        .or_else(|| revision.map(str::to_owned))
        .unwrap_or_else(|| source.default_revision().to_owned());
    let cache = cache.map_or_else(default_cache, Path::to_path_buf);
    let selection = file
        .clone()
        .map_or_else(Selection::default, |file| Selection {
            include: vec![file],
            exclude: Vec::new(),
        });
    let options = PullOptions {
        repo,
        revision,
        place: Place::Cache(cache),
        selection,
        budget: None,
    };
    let pulled = pull(&source, &options, progress)?;
    Ok(pulled.model_path())
}
