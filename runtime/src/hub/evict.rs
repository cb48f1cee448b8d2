//! Room in a folder of many models: what is neither named nor in use goes, the least recently used first.
//!
//! `ashlar serve` holds a lock on [`IN_USE`] in its model's folder, together with others, for as long as it runs, and each pull
//! that finds its model complete sets that file's time. So a model may go while both its locks can be had, this one and that
//! of a pull, and the time says when it was last asked for.

use std::{
    fs::{File, TryLockError},
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::{
    HubError,
    store::{MANIFEST, OWN_FOLDER, read_manifest},
};

/// How much a folder of models may hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Budget {
    /// Most bytes of all models.
    pub max_bytes: u64,
    /// Names of folders that must stay.
    pub keep: Vec<String>,
}

struct Candidate {
    folder: PathBuf,
    bytes: u64,
    used: SystemTime,
}

/// File of a model's folder that whoever uses the model locks.
pub(crate) const IN_USE: &str = ".ashlar/in-use";

/// Locks of pulls: inside the folder, or beside it in a cache.
fn pull_locks(folder: &Path) -> [PathBuf; 2] {
    [
        folder.join(OWN_FOLDER).join("lock"),
        folder.with_extension("lock"),
    ]
}

/// Keeps a pulled model from being evicted until the handle is dropped; `None` for a folder that no pull made.
#[must_use]
pub fn hold(model: &Path) -> Option<File> {
    let folder = if model.is_file() {
        model.parent()?
    } else {
        model
    };
    let file = File::open(folder.join(IN_USE)).ok()?;
    match file.try_lock_shared() {
        Ok(()) => Some(file),
        Err(error) => {
            tracing::debug!(%error, folder = %folder.display(), "this model is not held: an eviction would not see that it is in use");
            None
        }
    }
}

/// A model was asked for.
pub(crate) fn touch(folder: &Path) {
    // A cache that is mounted read-only keeps the time of its last pull.
    let _ = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(folder.join(IN_USE))
        .and_then(|file| file.set_modified(SystemTime::now()));
}

/// Makes room for `needed` bytes beside `target`.
///
/// # Errors
/// [`HubError::CacheFull`] when what may go is not enough; nothing is removed then. [`HubError::Io`] when a removal fails.
pub(crate) fn make_room(target: &Path, needed: u64, budget: &Budget) -> Result<(), HubError> {
    let Some(models) = target.parent() else {
        return Ok(());
    };
    let mut others = candidates(models, target)?;
    let mut used: u64 = others.iter().map(|other| other.bytes).sum();
    let free = |used: u64| used.saturating_add(needed) <= budget.max_bytes;
    if free(used) {
        return Ok(());
    }
    others.retain(|other| {
        let name = other.folder.file_name().and_then(|name| name.to_str());
        name.is_none_or(|name| !budget.keep.iter().any(|keep| keep == name))
    });
    others.sort_by_key(|other| other.used);
    // Locked one after another until it is enough: nobody starts to use what is about to go.
    let mut going = Vec::new();
    for other in others {
        if free(used) {
            break;
        }
        if let Some(held) = lock_alone(&other.folder) {
            used = used.saturating_sub(other.bytes);
            going.push((other, held));
        }
    }
    if !free(used) {
        return Err(HubError::CacheFull {
            needed,
            max_bytes: budget.max_bytes,
            in_use: used,
        });
    }
    for (other, _held) in going {
        tracing::info!(folder = %other.folder.display(), bytes = other.bytes, "evicted: the least recently used model that nothing uses");
        remove(&other.folder)?;
    }
    Ok(())
}

fn candidates(models: &Path, target: &Path) -> Result<Vec<Candidate>, HubError> {
    let entries = match std::fs::read_dir(models) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(HubError::io("read", models)(error)),
    };
    let folders = entries.flatten().map(|entry| entry.path());
    let others = folders.filter(|path| path != target && path.join(OWN_FOLDER).is_dir());
    Ok(others
        .map(|folder| Candidate {
            bytes: bytes_in(&folder),
            used: last_used(&folder),
            folder,
        })
        .collect())
}

/// By the manifest, or what an unfinished download has on disk.
fn bytes_in(folder: &Path) -> u64 {
    if let Some(manifest) = read_manifest(folder) {
        return manifest.files.iter().map(|file| file.size).sum();
    }
    let (mut bytes, mut folders) = (0, vec![folder.to_path_buf()]);
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(found) if found.is_dir() => folders.push(entry.path()),
                Ok(found) => bytes += found.len(),
                Err(_) => {} // gone meanwhile
            }
        }
    }
    bytes
}

fn last_used(folder: &Path) -> SystemTime {
    let found = std::fs::metadata(folder.join(IN_USE));
    found
        .and_then(|found| found.modified())
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

/// All the model's locks for this process alone; `None` while somebody uses or pulls it.
fn lock_alone(folder: &Path) -> Option<Vec<File>> {
    touch_if_missing(folder);
    let mut held = Vec::new();
    for lock in [folder.join(IN_USE)].into_iter().chain(pull_locks(folder)) {
        let Ok(file) = File::options().read(true).write(true).open(&lock) else {
            continue;
        };
        match file.try_lock() {
            Ok(()) => held.push(file),
            Err(TryLockError::WouldBlock) => return None,
            Err(TryLockError::Error(error)) => {
                tracing::warn!(lock = %lock.display(), %error, "this file system has no locks: nothing is evicted here");
                return None;
            }
        }
    }
    (!held.is_empty()).then_some(held)
}

/// A server that starts from now on has something to lock.
fn touch_if_missing(folder: &Path) {
    if !folder.join(IN_USE).exists() {
        touch(folder);
    }
}

/// First the mark of completeness: whoever looks meanwhile finds no model, not half of one.
fn remove(folder: &Path) -> Result<(), HubError> {
    match std::fs::remove_file(folder.join(MANIFEST)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(HubError::io("remove", folder)(error));
        }
        _ => {}
    }
    std::fs::remove_dir_all(folder).map_err(HubError::io("remove", folder))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test may panic
mod tests {
    use std::time::Duration;

    use super::*;

    /// A complete model of so many bytes, last used so many seconds ago.
    fn model(models: &Path, name: &str, bytes: usize, ago: u64) -> PathBuf {
        let folder = models.join(name);
        std::fs::create_dir_all(folder.join(OWN_FOLDER)).unwrap();
        std::fs::write(folder.join("w"), vec![0; bytes]).unwrap();
        let manifest = serde_json::json!({
            "repo": name, "revision": "r", "source": "s", "include": [], "exclude": [],
            "files": [{"path": "w", "size": bytes}],
        });
        std::fs::write(folder.join(MANIFEST), manifest.to_string()).unwrap();
        let lock = File::create(folder.join(IN_USE)).unwrap();
        lock.set_modified(SystemTime::now() - Duration::from_secs(ago))
            .unwrap();
        folder
    }

    fn budget(max_bytes: u64, keep: &[&str]) -> Budget {
        Budget {
            max_bytes,
            keep: keep.iter().map(|&name| name.to_owned()).collect(),
        }
    }

    #[test]
    fn the_least_recently_used_goes_and_no_more_than_has_to() {
        let dir = tempfile::tempdir().unwrap();
        let (old, middle, new) = (
            model(dir.path(), "old", 100, 300),
            model(dir.path(), "middle", 100, 200),
            model(dir.path(), "new", 100, 100),
        );
        let target = dir.path().join("target");
        make_room(&target, 100, &budget(400, &[])).unwrap();
        assert!(old.exists(), "there was room");
        make_room(&target, 100, &budget(300, &[])).unwrap();
        assert!(!old.exists() && middle.exists() && new.exists());
        // Asked for again, it is no more the oldest.
        touch(&middle);
        make_room(&target, 100, &budget(200, &[])).unwrap();
        assert!(middle.exists() && !new.exists());
    }

    #[test]
    fn what_is_named_or_in_use_stays_and_a_full_cache_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (used, named, idle) = (
            model(dir.path(), "used", 100, 300),
            model(dir.path(), "named", 100, 200),
            model(dir.path(), "idle", 100, 100),
        );
        let serving = hold(&used).unwrap();
        let target = dir.path().join("target");
        let error = make_room(&target, 150, &budget(300, &["named"])).unwrap_err();
        assert!(
            matches!(
                error,
                HubError::CacheFull {
                    needed: 150,
                    max_bytes: 300,
                    in_use: 200
                }
            ),
            "{error}"
        );
        assert!(used.exists() && named.exists() && idle.exists());
        make_room(&target, 100, &budget(300, &["named"])).unwrap();
        assert!(used.exists() && named.exists() && !idle.exists());
        drop(serving);
        make_room(&target, 200, &budget(300, &["named"])).unwrap();
        assert!(!used.exists() && named.exists());
    }

    #[test]
    fn an_unfinished_download_counts_by_what_it_has_on_disk() {
        let dir = tempfile::tempdir().unwrap();
        let half = model(dir.path(), "half", 500, 100);
        std::fs::remove_file(half.join(MANIFEST)).unwrap();
        assert_eq!(bytes_in(&half), 500);
        assert!(hold(dir.path()).is_none(), "no pull made this folder");
    }
}
