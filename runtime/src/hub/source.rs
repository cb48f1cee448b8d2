//! Where files come from: the hub or a bucket, asked in the same way.

use std::collections::BTreeMap;

use ureq::{Body, http::Response};

use super::{
    HubError, ModelUri,
    attempt::Fault,
    client::{Hub, HubConfig, MAX_DOCUMENT_BYTES, RemoteFile, Snapshot},
    s3::{Bucket, LATEST, S3Config},
    uri,
};

/// A source of models.
#[derive(Clone, Debug)]
pub enum Source {
    /// A hub; a model is `OWNER/NAME`.
    Hub(Box<Hub>),
    /// A bucket; a model is `BUCKET/FOLDER`.
    Bucket(Bucket),
}

impl From<Hub> for Source {
    fn from(hub: Hub) -> Self {
        Self::Hub(Box::new(hub))
    }
}

impl From<Bucket> for Source {
    fn from(bucket: Bucket) -> Self {
        Self::Bucket(bucket)
    }
}

impl Source {
    /// The source that an address names, and the model in it.
    ///
    /// # Errors
    /// [`HubError::BadSetting`] when a setting cannot be used, [`HubError::BadUri`] for a model that is here already.
    pub fn of(
        uri: &ModelUri,
        config: HubConfig,
        store: S3Config,
    ) -> Result<(Self, String), HubError> {
        match uri {
            ModelUri::Local(path) => Err(HubError::BadUri {
                uri: path.display().to_string(),
                reason: "it is on this machine already",
            }),
            ModelUri::Hub { repo, .. } => Ok((Hub::new(config)?.into(), repo.clone())),
            ModelUri::Bucket { bucket, folder, .. } => {
                let repo = if folder.is_empty() {
                    bucket.clone()
                } else {
                    format!("{bucket}/{folder}")
                };
                Ok((Bucket::new(bucket, store, config)?.into(), repo))
            }
        }
    }

    /// What to pull when nobody says which revision.
    #[must_use]
    pub fn default_revision(&self) -> &'static str {
        match self {
            Self::Hub(_) => "main",
            Self::Bucket(_) => LATEST,
        }
    }

    /// Settings: address, patience, workers.
    #[must_use]
    pub fn config(&self) -> &HubConfig {
        match self {
            Self::Hub(hub) => hub.config(),
            Self::Bucket(bucket) => bucket.config(),
        }
    }

    pub(crate) fn check(&self, repo: &str, revision: &str) -> Result<(), HubError> {
        let bad = |name, reason: &str| HubError::BadSetting {
            name,
            reason: reason.to_owned(),
        };
        if let Self::Hub(_) = self {
            uri::check_repo(repo).map_err(|reason| bad("REPO", reason))?;
        }
        uri::check_revision(revision).map_err(|reason| bad("--revision", reason))
    }

    pub(crate) fn snapshot(&self, repo: &str, revision: &str) -> Result<Snapshot, HubError> {
        match self {
            Self::Hub(hub) => hub.snapshot(repo, revision),
            Self::Bucket(bucket) => bucket.snapshot(repo, revision),
        }
    }

    pub(crate) fn describe(
        &self,
        repo: &str,
        commit: &str,
        file: &mut RemoteFile,
    ) -> Result<(), HubError> {
        match self {
            Self::Hub(hub) => hub.describe(repo, commit, file),
            Self::Bucket(bucket) => bucket.describe(repo, file),
        }
    }

    pub(crate) fn bytes(
        &self,
        repo: &str,
        commit: &str,
        file: &RemoteFile,
        from: u64,
    ) -> Result<Response<Body>, Fault> {
        match self {
            Self::Hub(hub) => hub.bytes(repo, commit, &file.path, from),
            Self::Bucket(bucket) => bucket.bytes(repo, file, from),
        }
    }

    /// The weight map of a safetensors index: tensor names and their files.
    pub(crate) fn weight_map(
        &self,
        repo: &str,
        commit: &str,
        file: &RemoteFile,
    ) -> Result<BTreeMap<String, String>, HubError> {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let index: Index = self.config().retrying(&file.path, || {
            let mut response = self.bytes(repo, commit, file, 0)?;
            let body = response.body_mut().with_config().limit(MAX_DOCUMENT_BYTES);
            body.read_json()
                .map_err(|error| Fault::document(&file.path, error))
        })?;
        Ok(index.weight_map)
    }
}
