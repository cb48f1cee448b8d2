//! The folders of one pull: locked, filled, and marked complete last.

use std::{
    fs::{File, TryLockError},
    path::{Path, PathBuf},
};

use super::{
    HubError, Phase, Progress,
    client::RemoteFile,
    download::clear_partials,
    evict,
    store::{
        MANIFEST, Manifest, ManifestFile, OWN_FOLDER, PARTIAL, Place, PullOptions, cache_folder,
        read_manifest,
    },
};

/// Times that a model may be evicted while its lock is waited for.
const MAX_LOCKS: u32 = 5;

/// Folders of one pull.
pub(super) struct Work {
    /// Where files are put: the target itself, or a folder beside it.
    pub(super) staging: PathBuf,
    /// Where the model will be.
    pub(super) target: PathBuf,
    pub(super) lock: PathBuf,
}

impl Work {
    pub(super) fn new(options: &PullOptions, source: &str, commit: &str) -> Self {
        match &options.place {
            Place::Folder(folder) => Self {
                staging: folder.clone(),
                target: folder.clone(),
                lock: folder.join(OWN_FOLDER).join("lock"),
            },
            Place::Cache(cache) => {
                let target = cache_folder(cache, options, source, commit);
                Self {
                    staging: target.with_extension("partial"),
                    lock: target.with_extension("lock"),
                    target,
                }
            }
        }
    }

    /// Held until dropped, or until the process ends, however it ends.
    pub(super) fn lock(&self, progress: &Progress) -> Result<File, HubError> {
        let io = |action| HubError::io(action, &self.lock);
        for _ in 0..MAX_LOCKS {
            if let Some(parent) = self.lock.parent() {
                std::fs::create_dir_all(parent).map_err(HubError::io("create", parent))?;
            }
            let file = File::create(&self.lock).map_err(io("create"))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    tracing::info!(lock = %self.lock.display(), "another process pulls this model: waiting for it");
                    progress.set_phase(Phase::Waiting);
                    file.lock().map_err(io("lock"))?;
                }
                Err(TryLockError::Error(error))
                    if error.kind() == std::io::ErrorKind::Unsupported =>
                {
                    tracing::warn!(lock = %self.lock.display(), "this file system has no locks: do not pull the same model twice at once");
                }
                Err(TryLockError::Error(error)) => return Err(io("lock")(error)),
            }
            if is_at(&file, &self.lock) {
                return Ok(file);
            }
            // Whoever held it has evicted the model: a lock on a file that has no name any more locks nobody out.
        }
        Err(HubError::Network {
            what: format!("locking {}", self.lock.display()),
            attempts: MAX_LOCKS,
            reason: "the model was evicted each time; give the cache more room".to_owned(),
        })
    }

    pub(super) fn manifest(
        &self,
        options: &PullOptions,
        source: &str,
        commit: &str,
        wanted: &[RemoteFile],
    ) -> Manifest {
        let mut files: Vec<ManifestFile> = wanted
            .iter()
            .map(|file| ManifestFile {
                path: file.path.clone(),
                size: file.size.unwrap_or_default(),
                digest: file.digest.clone(),
            })
            .collect();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Manifest {
            repo: options.repo.clone(),
            revision: commit.to_owned(),
            source: source.to_owned(),
            include: options.selection.include.clone(),
            exclude: options.selection.exclude.clone(),
            files,
        }
    }

    /// Takes the mark of completeness away, and with it what an earlier model left that this one does not have.
    pub(super) fn prepare(&self, new: &Manifest) -> Result<(), HubError> {
        let partial = self.staging.join(PARTIAL);
        std::fs::create_dir_all(&partial).map_err(HubError::io("create", partial))?;
        if let Some(old) = read_manifest(&self.staging) {
            remove_if_there(&self.staging.join(MANIFEST))?;
            for file in old
                .files
                .iter()
                .filter(|old| new.files.iter().all(|file| file.path != old.path))
            {
                if super::select::safe_path(&file.path).is_some() {
                    remove_if_there(&self.staging.join(&file.path))?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn complete(&self, manifest: &Manifest) -> Result<(), HubError> {
        clear_partials(&self.staging.join(PARTIAL));
        evict::touch(&self.staging);
        let text =
            serde_json::to_vec_pretty(manifest).expect("a manifest is plain data: this is a bug");
        write_whole(&self.staging.join(MANIFEST), &text)?;
        sync_folder(&self.staging)?;
        if self.staging != self.target {
            std::fs::rename(&self.staging, &self.target)
                .map_err(HubError::io("write", &self.target))?;
            if let Some(parent) = self.target.parent() {
                sync_folder(parent)?;
            }
        }
        Ok(())
    }
}

/// Writes beside, then renames: a reader sees the old text or the new, never a part.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), HubError> {
    let beside = path.with_extension(format!("{}.new", std::process::id()));
    let write = || {
        use std::io::Write;
        let mut file = File::create(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&beside, path)
    };
    write().map_err(HubError::io("write", path))
}

/// True while the file is the one that has this name.
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let id = |found: std::fs::Metadata| (found.dev(), found.ino());
    let (open, named) = (file.metadata().map(id), std::fs::metadata(path).map(id));
    matches!((open, named), (Ok(open), Ok(named)) if open == named)
}

fn remove_if_there(path: &Path) -> Result<(), HubError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(HubError::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}

fn sync_folder(folder: &Path) -> Result<(), HubError> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(HubError::io("write", folder))
}
