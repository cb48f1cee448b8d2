//! Why a model could not be had, in words that say what to do next.

use std::path::PathBuf;

/// What failed between a model's address and its files on disk.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The text is no address.
    #[error(
        "{uri:?} is not a model: {reason}; give a folder, a .gguf file, hf://OWNER/NAME[/FILE.gguf][@REVISION] or s3://BUCKET/FOLDER[/FILE.gguf]"
    )]
    BadUri {
        /// As written.
        uri: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A setting cannot be used.
    #[error("{name} cannot be used: {reason}")]
    BadSetting {
        /// The flag or variable.
        name: &'static str,
        /// Why.
        reason: String,
    },
    /// Unknown or private repository.
    #[error(
        "the hub has no repository {repo}, or hides it: check the spelling; if it is private, set HF_TOKEN to a token that may read it"
    )]
    RepoNotFound {
        /// Which.
        repo: String,
    },
    /// The repository exists, the revision does not.
    #[error("{repo} has no revision {revision:?}: give one of its branches, tags or commits")]
    RevisionNotFound {
        /// Which repository.
        repo: String,
        /// As asked for.
        revision: String,
    },
    /// Conditions must be accepted first.
    #[error(
        "{repo} is gated: accept its conditions at {endpoint}/{repo}, then set HF_TOKEN to a token of that account"
    )]
    Gated {
        /// Which.
        repo: String,
        /// The hub.
        endpoint: String,
    },
    /// Token missing or refused.
    #[error(
        "the hub refused access to {repo} (HTTP {status}): set HF_TOKEN to a token that may read it"
    )]
    Unauthorized {
        /// Which.
        repo: String,
        /// 401 or 403.
        status: u16,
    },
    /// Listed, but not there.
    #[error(
        "{repo} lists {file}, but the hub answers 404 for it: the repository is damaged, or the mirror incomplete"
    )]
    FileNotFound {
        /// Which repository.
        repo: String,
        /// Which file.
        file: String,
    },
    /// Any other status.
    #[error("the hub answered HTTP {status} for {what}: {detail}")]
    Status {
        /// The status.
        status: u16,
        /// What was asked.
        what: String,
        /// Beginning of the answer.
        detail: String,
    },
    /// A bucket's store said no.
    #[error("the store answered HTTP {status} {code} for {what}: {advice}")]
    Store {
        /// What was asked.
        what: String,
        /// The status.
        status: u16,
        /// The store's own code; may be empty.
        code: String,
        /// What to do.
        advice: String,
    },
    /// The folder of a bucket is empty.
    #[error("s3://{uri} holds no objects: check bucket and folder")]
    NoObjects {
        /// Bucket and folder.
        uri: String,
    },
    /// A bucket holds something else by now.
    #[error(
        "s3://{uri} does not hold what it held at revision {wanted} any more (now {found}): restore the objects, or take what is there as a new revision (annotation serving.ashlar.dev/restart, or a pull without --revision)"
    )]
    ObjectsChanged {
        /// Bucket and folder.
        uri: String,
        /// As asked for.
        wanted: String,
        /// As found.
        found: String,
    },
    /// Somebody wrote an object while it was read.
    #[error(
        "s3://{uri} was replaced while it was being downloaded: pull again when the upload is over"
    )]
    ObjectReplaced {
        /// Bucket and key.
        uri: String,
    },
    /// The network gave up.
    #[error(
        "{what} failed after {attempts} attempts without progress: {reason}; run the command again to go on where it stopped"
    )]
    Network {
        /// What was asked.
        what: String,
        /// How often in a row.
        attempts: u32,
        /// The last failure.
        reason: String,
    },
    /// An answer that is not the protocol.
    #[error("the hub's answer for {what} cannot be used: {reason}")]
    Protocol {
        /// What was asked.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// Bytes differ from the announced hash, twice.
    #[error(
        "{file} does not match its hash (expected {expected}, got {actual}), twice in a row: the source or a proxy alters it; nothing was kept"
    )]
    HashMismatch {
        /// Which file.
        file: String,
        /// As the hub announced.
        expected: String,
        /// As downloaded.
        actual: String,
    },
    /// Nothing this runtime can load.
    #[error("{repo} holds no weights that can be loaded: {found}")]
    NoWeights {
        /// Which.
        repo: String,
        /// What it holds instead, and what to do.
        found: String,
    },
    /// The patterns leave nothing.
    #[error(
        "no file of {repo} matches --include {include:?} --exclude {exclude:?}; it holds: {files}"
    )]
    NothingSelected {
        /// Which.
        repo: String,
        /// Patterns.
        include: Vec<String>,
        /// Patterns.
        exclude: Vec<String>,
        /// Names, shortened.
        files: String,
    },
    /// Too many models that may not go.
    #[error(
        "the model needs {needed} bytes, and of the {max_bytes} that the cache may hold {in_use} are models in use: raise the cache's maxBytes, or delete services that use it"
    )]
    CacheFull {
        /// Bytes of this model.
        needed: u64,
        /// The bound.
        max_bytes: u64,
        /// Bytes that must stay.
        in_use: u64,
    },
    /// The file system said no.
    #[error("cannot {action} {path}: {source}{}", disk_hint(source))]
    Io {
        /// Verb.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

fn disk_hint(source: &std::io::Error) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            "; free space there, or give the model cache a larger volume"
        }
        std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => {
            "; give a folder this user may write with --dest or --cache"
        }
        _ => "",
    }
}

impl HubError {
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}
