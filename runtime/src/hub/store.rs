//! Where a pulled model lies, and the pull itself: resolve, select, lock, download, mark complete.
//!
//! In a cache a model is a folder `sha256/<hash of repository, commit, source and selection>/` that appears by one
//! rename when it is complete. In a folder of the user's own, files appear one by one, and the manifest last.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{
    HubError, Phase, Progress, Selection,
    client::{Digest, RemoteFile, Snapshot},
    download::Job,
    evict::{self, Budget},
    select::{SAFETENSORS_INDEX, select},
    source::Source,
    uri,
    work::{Work, write_whole},
};

/// Our own files inside a model's folder.
pub const OWN_FOLDER: &str = ".ashlar";
pub(crate) const MANIFEST: &str = ".ashlar/manifest.json";
pub(super) const PARTIAL: &str = ".ashlar/partial";

/// Where to put a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A cache of many models.
    Cache(PathBuf),
    /// A folder for this one.
    Folder(PathBuf),
}

/// What to pull.
#[derive(Debug, Clone)]
pub struct PullOptions {
    /// `OWNER/NAME` of a hub, `BUCKET/FOLDER` of a store.
    pub repo: String,
    /// Commit, branch or tag; of a bucket [`super::s3::LATEST`] or what an earlier pull found.
    pub revision: String,
    /// Where to.
    pub place: Place,
    /// Which files.
    pub selection: Selection,
    /// What the models beside this one may take with it; no bound without.
    pub budget: Option<Budget>,
}

/// What a folder holds. Written last: a folder that has it is complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// `OWNER/NAME`.
    pub repo: String,
    /// Commit.
    pub revision: String,
    /// The hub's address.
    pub source: String,
    /// The user's patterns.
    pub include: Vec<String>,
    /// The user's patterns.
    pub exclude: Vec<String>,
    /// All files, by path.
    pub files: Vec<ManifestFile>,
}

/// One file of a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestFile {
    /// Relative path.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// The hash it was checked against.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
}

/// A model that is here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    /// Its folder.
    pub folder: PathBuf,
    /// Its commit.
    pub revision: String,
    /// Its files.
    pub files: Vec<ManifestFile>,
}

impl Pulled {
    /// What to load: the one `.gguf` file when that is all the weights there are, the folder otherwise.
    #[must_use]
    pub fn model_path(&self) -> PathBuf {
        let weights: Vec<&str> = self
            .files
            .iter()
            .map(|file| file.path.as_str())
            .filter(|path| path.ends_with(".gguf") || path.ends_with(".safetensors"))
            .collect();
        match weights.as_slice() {
            [only] if only.ends_with(".gguf") => self.folder.join(only),
            _ => self.folder.clone(),
        }
    }

    /// Bytes of all files.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }
}

/// Makes a model present. Safe to run several times at once and to break off at any point.
///
/// # Errors
/// [`HubError`]; what was downloaded so far stays for the next attempt, unless its hash was wrong.
pub fn pull(
    source: &Source,
    options: &PullOptions,
    progress: &Progress,
) -> Result<Pulled, HubError> {
    let result = pull_inner(source, options, progress);
    match &result {
        Ok(_) => progress.set_phase(Phase::Ready),
        Err(error) => progress.fail(&error.to_string()),
    }
    result
}

fn pull_inner(
    from: &Source,
    options: &PullOptions,
    progress: &Progress,
) -> Result<Pulled, HubError> {
    from.check(&options.repo, &options.revision)?;
    let source = from.config().endpoint.as_str();
    progress.set_phase(Phase::Resolving);
    if uri::is_commit(&options.revision)
        && let Some(found) = find(options, source, &options.revision)
    {
        return Ok(present(found, progress));
    }
    let snapshot = match from.snapshot(&options.repo, &options.revision) {
        Ok(snapshot) => snapshot,
        Err(error) => return offline(options, source, error, progress),
    };
    progress.set_revision(&snapshot.commit);
    tracing::info!(
        repo = options.repo,
        asked = options.revision,
        revision = snapshot.commit,
        "resolved"
    );
    if let Err(error) = remember(options, source, &snapshot.commit) {
        // A cache mounted read-only still serves what it holds.
        tracing::debug!(%error, "the meaning of this revision is not kept for a later start without the hub");
    }
    if let Some(found) = find(options, source, &snapshot.commit) {
        return Ok(present(found, progress));
    }
    let wanted = wanted_files(from, options, &snapshot)?;
    let work = Work::new(options, source, &snapshot.commit);
    let _lock = work.lock(progress)?;
    // Whoever held the lock before may have done all of it.
    if let Some(found) = find(options, source, &snapshot.commit) {
        return Ok(present(found, progress));
    }
    let manifest = work.manifest(options, source, &snapshot.commit, &wanted);
    if let Some(budget) = &options.budget {
        let needed = manifest.files.iter().map(|file| file.size).sum();
        evict::make_room(&work.target, needed, budget)?;
    }
    work.prepare(&manifest)?;
    download_all(from, options, &snapshot.commit, &wanted, &work, progress)?;
    work.complete(&manifest)?;
    Ok(Pulled {
        folder: work.target,
        revision: snapshot.commit,
        files: manifest.files,
    })
}

/// Selects, and makes every size known.
fn wanted_files(
    source: &Source,
    options: &PullOptions,
    snapshot: &Snapshot,
) -> Result<Vec<RemoteFile>, HubError> {
    let names: Vec<String> = snapshot
        .files
        .iter()
        .map(|file| file.path.clone())
        .collect();
    let index = snapshot
        .files
        .iter()
        .find(|file| file.path == SAFETENSORS_INDEX)
        .filter(|_| options.selection.include.is_empty());
    let shards: Option<BTreeSet<String>> = match index {
        Some(index) => {
            let map = source.weight_map(&options.repo, &snapshot.commit, index)?;
            Some(map.into_values().collect())
        }
        None => None,
    };
    let picked = select(&options.repo, &names, shards.as_ref(), &options.selection)?;
    let mut wanted: Vec<RemoteFile> = snapshot
        .files
        .iter()
        .filter(|file| picked.contains(&file.path))
        .cloned()
        .collect();
    for file in &mut wanted {
        source.describe(&options.repo, &snapshot.commit, file)?;
    }
    // Largest first: the workers then end at about the same time.
    wanted.sort_by_key(|file| std::cmp::Reverse(file.size));
    Ok(wanted)
}

fn download_all(
    source: &Source,
    options: &PullOptions,
    commit: &str,
    wanted: &[RemoteFile],
    work: &Work,
    progress: &Progress,
) -> Result<(), HubError> {
    progress.set_total(wanted.iter().filter_map(|file| file.size).sum());
    progress.set_phase(Phase::Downloading);
    let (next, stop, first_error) = (
        AtomicUsize::new(0),
        AtomicBool::new(false),
        Mutex::new(None),
    );
    let partial = work.staging.join(PARTIAL);
    let worker = || {
        while !stop.load(Ordering::Relaxed)
            && let Some(file) = wanted.get(next.fetch_add(1, Ordering::Relaxed))
        {
            let job = Job {
                source,
                repo: &options.repo,
                commit,
                file,
                folder: &work.staging,
                partial: &partial,
                stop: &stop,
            };
            if let Err(error) = job.run(progress) {
                first_error
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .get_or_insert(error);
                stop.store(true, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..source.config().workers.clamp(1, wanted.len().max(1)) {
            scope.spawn(worker);
        }
        worker();
    });
    match first_error
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
    {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

pub(super) fn cache_folder(
    cache: &Path,
    options: &PullOptions,
    source: &str,
    commit: &str,
) -> PathBuf {
    let mut key = format!("{}\0{commit}\0{source}", options.repo);
    if !options.selection.is_default() {
        key.push_str(&format!(
            "\0{:?}\0{:?}",
            options.selection.include, options.selection.exclude
        ));
    }
    cache.join("sha256").join(hex::encode(Sha256::digest(key)))
}

/// The complete model, if it is there already: manifest of this very pull, every file of its size.
fn find(options: &PullOptions, source: &str, commit: &str) -> Option<Pulled> {
    let folder = match &options.place {
        Place::Folder(folder) => folder.clone(),
        Place::Cache(cache) => cache_folder(cache, options, source, commit),
    };
    let manifest = read_manifest(&folder)?;
    let same = manifest.repo == options.repo
        && manifest.revision == commit
        && manifest.source == source
        && manifest.include == options.selection.include
        && manifest.exclude == options.selection.exclude;
    let whole = |file: &ManifestFile| {
        std::fs::metadata(folder.join(&file.path)).is_ok_and(|found| found.len() == file.size)
    };
    (same && manifest.files.iter().all(whole)).then_some(Pulled {
        folder,
        revision: manifest.revision,
        files: manifest.files,
    })
}

fn present(found: Pulled, progress: &Progress) -> Pulled {
    evict::touch(&found.folder);
    progress.set_revision(&found.revision);
    progress.set_total(found.bytes());
    progress
        .start_file(found.files.last().map_or("", |file| file.path.as_str()))
        .set(found.bytes());
    tracing::info!(folder = %found.folder.display(), revision = found.revision, "already complete");
    found
}

/// The hub cannot be reached: what a branch or tag meant last time will do, if it is here.
fn offline(
    options: &PullOptions,
    source: &str,
    error: HubError,
    progress: &Progress,
) -> Result<Pulled, HubError> {
    let known = match (&error, ref_file(options, source)) {
        (HubError::Network { .. }, Some(path)) => std::fs::read_to_string(path).ok(),
        _ => None,
    };
    match known.and_then(|commit| find(options, source, commit.trim())) {
        Some(found) => {
            tracing::warn!(%error, revision = found.revision, "the hub cannot be reached: using the copy in the cache");
            Ok(present(found, progress))
        }
        None => Err(error),
    }
}

fn ref_file(options: &PullOptions, source: &str) -> Option<PathBuf> {
    let Place::Cache(cache) = &options.place else {
        return None;
    };
    let key = format!("{}\0{}\0{source}", options.repo, options.revision);
    (!uri::is_commit(&options.revision))
        .then(|| cache.join("refs").join(hex::encode(Sha256::digest(key))))
}

fn remember(options: &PullOptions, source: &str, commit: &str) -> Result<(), HubError> {
    let Some(path) = ref_file(options, source) else {
        return Ok(());
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(HubError::io("create", parent))?;
    }
    write_whole(&path, commit.as_bytes())
}

pub(crate) fn read_manifest(folder: &Path) -> Option<Manifest> {
    serde_json::from_slice(&std::fs::read(folder.join(MANIFEST)).ok()?).ok()
}
