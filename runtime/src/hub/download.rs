//! One file: from the hub into a partial file, resumed and hashed, then into its place.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use md5::Md5;
use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use super::{
    HubError,
    attempt::Fault,
    client::{Digest, RemoteFile},
    progress::{FileProgress, Progress},
    source::Source,
};

/// Bytes read and written at once.
const CHUNK_BYTES: usize = 256 << 10;
/// Times that a whole file may arrive with the wrong hash.
const MAX_MISMATCHES: u32 = 2;

/// What to fetch and where to put it.
pub(crate) struct Job<'a> {
    pub(crate) source: &'a Source,
    pub(crate) repo: &'a str,
    pub(crate) commit: &'a str,
    pub(crate) file: &'a RemoteFile,
    /// Final folder.
    pub(crate) folder: &'a Path,
    /// Folder of partial files, on the same file system.
    pub(crate) partial: &'a Path,
    /// Raised by whoever failed first: the others stop between two chunks.
    pub(crate) stop: &'a AtomicBool,
}

impl Job<'_> {
    /// Makes the file present and correct: an existing one is checked and kept.
    pub(crate) fn run(&self, progress: &Progress) -> Result<(), HubError> {
        let target = self.folder.join(&self.file.path);
        let mut counted = progress.start_file(&self.file.path);
        if self.is_present(&target)? {
            counted.set(self.size());
            return Ok(());
        }
        let part = self.partial.join(self.partial_name());
        self.fetch(&part, &mut counted)?;
        if let Some(parent) = target.parent() {
            std::fs::create_dir_all(parent).map_err(HubError::io("create", parent))?;
        }
        std::fs::rename(&part, &target).map_err(HubError::io("write", target))
    }

    fn size(&self) -> u64 {
        self.file
            .size
            .expect("sizes are known before a download starts: this is a bug")
    }

    /// Named after the content, so that another revision with the same file resumes it.
    fn partial_name(&self) -> String {
        let name = match &self.file.digest {
            Some(digest) => digest.hex().to_owned(),
            None => hex::encode(Sha256::digest(format!(
                "{}\0{}\0{}",
                self.repo, self.commit, self.file.path
            ))),
        };
        format!("{name}.part")
    }

    fn is_present(&self, target: &Path) -> Result<bool, HubError> {
        let Ok(mut file) = File::open(target) else {
            return Ok(false);
        };
        let length = file.metadata().map_err(HubError::io("read", target))?.len();
        if length != self.size() {
            return Ok(false);
        }
        let mut hasher = Hasher::new(self.file.digest.as_ref(), self.size());
        hasher
            .read_all(&mut file)
            .map_err(HubError::io("read", target))?;
        Ok(hasher.finish().is_none_or(|actual| {
            Some(actual.as_str()) == self.file.digest.as_ref().map(Digest::hex)
        }))
    }

    fn fetch(&self, part: &Path, counted: &mut FileProgress) -> Result<(), HubError> {
        let what = format!("downloading {}", self.file.path);
        let (mut failures, mut mismatches) = (0, 0);
        loop {
            let mut moved = false;
            match self.attempt(part, counted, &mut moved) {
                Ok(None) => return Ok(()),
                Ok(Some(actual)) => {
                    mismatches += 1;
                    std::fs::remove_file(part).map_err(HubError::io("remove", part))?;
                    counted.set(0);
                    if mismatches == MAX_MISMATCHES {
                        let expected = self
                            .file
                            .digest
                            .as_ref()
                            .map(Digest::hex)
                            .unwrap_or_default()
                            .to_owned();
                        return Err(HubError::HashMismatch {
                            file: self.file.path.clone(),
                            expected,
                            actual,
                        });
                    }
                    tracing::warn!(
                        file = self.file.path,
                        "the hash does not match: downloading it once more"
                    );
                }
                Err(Fault::Fatal(error)) => return Err(error),
                Err(Fault::Retry { reason, after }) => {
                    failures = if moved { 1 } else { failures + 1 };
                    self.source.config().pause(&what, failures, reason, after)?;
                }
            }
        }
    }

    /// Goes on from what the partial file holds. `Ok(Some(hash))` is a complete file with a wrong hash.
    fn attempt(
        &self,
        part: &Path,
        counted: &mut FileProgress,
        moved: &mut bool,
    ) -> Result<Option<String>, Fault> {
        let disk = |error| Fault::Fatal(HubError::io("write", part)(error));
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(part)
            .map_err(disk)?;
        if file.metadata().map_err(disk)?.len() > self.size() {
            file.set_len(0).map_err(disk)?;
        }
        let mut hasher = Hasher::new(self.file.digest.as_ref(), self.size());
        let mut have = hasher.read_all(&mut file).map_err(disk)?;
        counted.set(have);
        if have < self.size() {
            let response = self.source.bytes(self.repo, self.commit, self.file, have)?;
            let resumed = resumes_at(&response, have, self.size());
            if !resumed || response.status().as_u16() == 416 {
                // The whole file, or a range that we did not ask for: what is on disk cannot be joined to it.
                file.set_len(0).map_err(disk)?;
                file.seek(SeekFrom::Start(0)).map_err(disk)?;
                (hasher, have) = (Hasher::new(self.file.digest.as_ref(), self.size()), 0);
                counted.set(0);
                if response.status().as_u16() != 200 {
                    return Err(Fault::Retry {
                        reason: "the server answered with another range".to_owned(),
                        after: None,
                    });
                }
            }
            self.copy(
                &mut response.into_body().into_reader(),
                part,
                &mut file,
                &mut hasher,
                &mut have,
                counted,
                moved,
            )?;
        }
        file.sync_all().map_err(disk)?;
        Ok(hasher
            .finish()
            .filter(|actual| Some(actual.as_str()) != self.file.digest.as_ref().map(Digest::hex)))
    }

    #[allow(clippy::too_many_arguments)] // the parts of one attempt; a struct would only rename them
    fn copy(
        &self,
        body: &mut impl Read,
        part: &Path,
        file: &mut File,
        hasher: &mut Hasher,
        have: &mut u64,
        counted: &mut FileProgress,
        moved: &mut bool,
    ) -> Result<(), Fault> {
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Fault::Fatal(HubError::Network {
                    what: self.file.path.clone(),
                    attempts: 0,
                    reason: "another file failed".to_owned(),
                }));
            }
            let read = match body.read(&mut chunk) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) => {
                    return Err(Fault::Retry {
                        reason: error.to_string(),
                        after: None,
                    });
                }
            };
            if *have + read as u64 > self.size() {
                let reason = format!("more than the announced {} bytes arrived", self.size());
                return Err(Fault::Fatal(HubError::Protocol {
                    what: self.file.path.clone(),
                    reason,
                }));
            }
            file.write_all(&chunk[..read])
                .map_err(HubError::io("write", part))
                .map_err(Fault::Fatal)?;
            hasher.update(&chunk[..read]);
            *have += read as u64;
            *moved = true;
            counted.set(*have);
        }
        if *have < self.size() {
            let reason = format!("the connection ended at {have} of {} bytes", self.size());
            return Err(Fault::Retry {
                reason,
                after: None,
            });
        }
        Ok(())
    }
}

/// True when the answer's bytes continue a partial file of `have` bytes (or nothing is there to continue).
fn resumes_at(response: &ureq::http::Response<ureq::Body>, have: u64, size: u64) -> bool {
    match response.status().as_u16() {
        206 => {
            let range = response
                .headers()
                .get("content-range")
                .and_then(|value| value.to_str().ok());
            range
                .and_then(|text| text.strip_prefix("bytes "))
                .is_some_and(|text| {
                    text.split_once('-')
                        .is_some_and(|(start, _)| start.parse() == Ok(have))
                        && text.ends_with(&format!("/{size}"))
                })
        }
        200 => have == 0,
        _ => false,
    }
}

enum Hasher {
    Sha256(Box<Sha256>),
    GitSha1(Box<Sha1>),
    Md5(Box<Md5>),
    Md5Parts(Box<PartsHasher>),
    None,
}

/// MD5 of the MD5s of equal parts, of which the last may be shorter.
struct PartsHasher {
    part_bytes: u64,
    /// Bytes that the part at hand still takes.
    room: u64,
    part: Md5,
    all: Md5,
    parts: u64,
}

impl PartsHasher {
    fn new(part_bytes: u64) -> Self {
        Self {
            part_bytes,
            room: part_bytes,
            part: Md5::default(),
            all: Md5::default(),
            parts: 0,
        }
    }

    fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let taken =
                usize::try_from(self.room).map_or(bytes.len(), |room| bytes.len().min(room));
            self.part.update(&bytes[..taken]);
            self.room -= taken as u64;
            bytes = &bytes[taken..];
            if self.room == 0 {
                self.end_part();
            }
        }
    }

    fn end_part(&mut self) {
        self.all.update(std::mem::take(&mut self.part).finalize());
        (self.room, self.parts) = (self.part_bytes, self.parts + 1);
    }

    fn finish(mut self) -> String {
        if self.room < self.part_bytes {
            self.end_part();
        }
        format!("{}-{}", hex::encode(self.all.finalize()), self.parts)
    }
}

impl Hasher {
    fn new(digest: Option<&Digest>, size: u64) -> Self {
        match digest {
            Some(Digest::Sha256(_)) => Self::Sha256(Box::default()),
            Some(Digest::GitSha1(_)) => {
                Self::GitSha1(Box::new(Sha1::new_with_prefix(format!("blob {size}\0"))))
            }
            Some(Digest::Md5(_)) => Self::Md5(Box::default()),
            Some(Digest::Md5Parts { part_bytes, .. }) => {
                Self::Md5Parts(Box::new(PartsHasher::new(*part_bytes)))
            }
            None => Self::None,
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::GitSha1(hasher) => hasher.update(bytes),
            Self::Md5(hasher) => hasher.update(bytes),
            Self::Md5Parts(hasher) => hasher.update(bytes),
            Self::None => {}
        }
    }

    /// Hashes from the current position to the end; returns the number of bytes.
    fn read_all(&mut self, file: &mut File) -> std::io::Result<u64> {
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut total = 0;
        loop {
            let read = file.read(&mut chunk)?;
            if read == 0 {
                return Ok(total);
            }
            self.update(&chunk[..read]);
            total += read as u64;
        }
    }

    /// Lower-case hex; `None` when there was nothing to compare with.
    fn finish(self) -> Option<String> {
        match self {
            Self::Sha256(hasher) => Some(hex::encode(hasher.finalize())),
            Self::GitSha1(hasher) => Some(hex::encode(hasher.finalize())),
            Self::Md5(hasher) => Some(hex::encode(hasher.finalize())),
            Self::Md5Parts(hasher) => Some(hasher.finish()),
            Self::None => None,
        }
    }
}

/// Partial files left by older pulls that nothing will resume.
pub(crate) fn clear_partials(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    let parts: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "part"))
        .collect();
    for part in parts {
        if let Err(error) = std::fs::remove_file(&part) {
            tracing::warn!(path = %part.display(), %error, "cannot remove a leftover partial file");
        }
    }
}
