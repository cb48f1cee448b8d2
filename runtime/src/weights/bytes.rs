//! Bytes of tensors: where a file holds them, or made from those.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    ops::{Deref, Range},
    path::Path,
};

/// Bytes in memory, in a mapped file as a rule.
#[derive(Debug, Clone, Copy)]
pub struct StoredBytes<'a> {
    bytes: &'a [u8],
    /// The file, and where in it they begin.
    place: Option<(&'a Path, u64)>,
}

impl<'a> StoredBytes<'a> {
    /// `bytes` as the map of the file `path` has them from `start`.
    pub(super) fn in_file(bytes: &'a [u8], path: &'a Path, start: u64) -> Self {
        Self {
            bytes,
            place: Some((path, start)),
        }
    }

    /// All of them.
    #[must_use]
    pub fn bytes(self) -> &'a [u8] {
        self.bytes
    }

    fn slice(self, range: Range<usize>) -> Self {
        let start = range.start as u64;
        Self {
            bytes: &self.bytes[range],
            place: self.place.map(|(path, first)| (path, first + start)),
        }
    }

    /// Reads them from the file, if they lie in one: reading into a buffer costs less than copying from a map does, and leaves
    /// no page of the file in this process's memory.
    fn reader(self) -> io::Result<Box<dyn Read + 'a>> {
        let Some((path, start)) = self.place else {
            return Ok(Box::new(self.bytes));
        };
        // Opened each time: a checkpoint may have more files than a process may hold open.
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(start))?;
        Ok(Box::new(file.take(self.bytes.len() as u64)))
    }
}

impl<'a> From<&'a [u8]> for StoredBytes<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self { bytes, place: None }
    }
}

impl Deref for StoredBytes<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes
    }
}

/// Bytes that are stored, or were made.
#[derive(Debug, Clone)]
pub enum Bytes<'a> {
    /// As a file has them.
    Stored(StoredBytes<'a>),
    /// Others.
    Made(Vec<u8>),
}

impl<'a> Bytes<'a> {
    /// A part; stored bytes are not copied.
    ///
    /// # Panics
    /// When it is outside.
    #[must_use]
    pub fn slice(self, range: Range<usize>) -> Self {
        match self {
            Self::Stored(stored) => Self::Stored(stored.slice(range)),
            Self::Made(bytes) => Self::Made(bytes[range].to_vec()),
        }
    }

    /// To be changed; stored bytes are copied first.
    pub fn to_mut(&mut self) -> &mut Vec<u8> {
        if let Self::Stored(stored) = self {
            *self = Self::Made(stored.to_vec());
        }
        match self {
            Self::Made(bytes) => bytes,
            Self::Stored(_) => unreachable!("they were copied: this is a bug"),
        }
    }

    /// Reads all of them from the start, stored ones from their file rather than through its map.
    ///
    /// # Errors
    /// What the system says when the file cannot be opened.
    pub fn reader(&self) -> io::Result<Box<dyn Read + '_>> {
        match self {
            Self::Stored(stored) => stored.reader(),
            Self::Made(bytes) => Ok(Box::new(bytes.as_slice())),
        }
    }
}

impl Deref for Bytes<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Stored(stored) => stored,
            Self::Made(bytes) => bytes,
        }
    }
}

impl From<Vec<u8>> for Bytes<'_> {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Made(bytes)
    }
}

impl<'a> From<StoredBytes<'a>> for Bytes<'a> {
    fn from(stored: StoredBytes<'a>) -> Self {
        Self::Stored(stored)
    }
}

impl PartialEq for Bytes<'_> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, missing_docs)] // Tests fail by panicking.
mod tests {
    use super::*;
    use crate::weights::MappedFile;

    fn read(bytes: &Bytes<'_>) -> Vec<u8> {
        let mut all = Vec::new();
        bytes.reader().unwrap().read_to_end(&mut all).unwrap();
        all
    }

    #[test]
    fn stored_bytes_are_read_from_their_place_in_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let content: Vec<u8> = (0..=255).cycle().take(70_000).collect();
        std::fs::write(&path, &content).unwrap();
        let map = MappedFile::open(&path).unwrap();
        let stored = Bytes::from(map.slice(1_000..69_001));
        assert_eq!(read(&stored), content[1_000..69_001]);
        let part = stored.clone().slice(10..40_000);
        assert_eq!(*part, content[1_010..41_000]);
        assert_eq!(read(&part), content[1_010..41_000]);
        assert!(read(&stored.slice(5..5)).is_empty());
        // The map lives on; reading it does not go through it.
        std::fs::remove_file(&path).unwrap();
        assert_eq!(*part, content[1_010..41_000]);
        assert!(part.reader().is_err());
    }

    #[test]
    fn made_bytes_and_those_in_memory_are_read_as_they_are() {
        let memory = [1u8, 2, 3, 4];
        let mut bytes = Bytes::from(StoredBytes::from(&memory[..])).slice(1..3);
        assert_eq!(read(&bytes), [2, 3]);
        bytes.to_mut().push(9);
        assert_eq!((read(&bytes), memory), (vec![2, 3, 9], [1, 2, 3, 4]));
        assert_eq!(read(&bytes.slice(1..3)), [3, 9]);
    }
}
