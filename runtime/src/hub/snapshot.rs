//! What a source holds at one moment: files with their sizes and hashes.

use serde::Deserialize;

/// Hash that a file must have, in lower-case hex.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Digest {
    /// Of the content: large files.
    Sha256(String),
    /// Git's blob id, SHA-1 of a header and the content: small files.
    GitSha1(String),
    /// Of the content: objects of a bucket that were written at once.
    Md5(String),
    /// Of the MD5s of the parts, as a store tags an object that was written in parts of `part_bytes`.
    Md5Parts {
        /// Hex digits, `-`, number of parts.
        etag: String,
        /// Bytes of each part but the last.
        part_bytes: u64,
    },
}

impl Digest {
    /// From an `ETag` or a listing: 64 hex digits or 40.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text
            .trim()
            .trim_start_matches("W/")
            .trim_matches('"')
            .to_ascii_lowercase();
        if !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        match text.len() {
            64 => Some(Self::Sha256(text)),
            40 => Some(Self::GitSha1(text)),
            _ => None,
        }
    }

    /// The hex digits; of parts, their number too.
    #[must_use]
    pub fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::GitSha1(hex) | Self::Md5(hex) => hex,
            Self::Md5Parts { etag, .. } => etag,
        }
    }
}

/// A file of a snapshot. Its path is safe to join to a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteFile {
    /// Relative path.
    pub path: String,
    /// Bytes; `None` until [`Hub::describe`].
    pub size: Option<u64>,
    /// Hash; `None` until [`Hub::describe`].
    pub digest: Option<Digest>,
    /// Entity tag that the bytes must still have; only of objects in a bucket.
    pub etag: Option<String>,
}

/// A model's files at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// 40 hex digits.
    pub commit: String,
    /// All its files.
    pub files: Vec<RemoteFile>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_told_apart_by_length() {
        assert_eq!(
            Digest::parse(&format!("\"{}\"", "AB".repeat(32))),
            Some(Digest::Sha256("ab".repeat(32)))
        );
        assert_eq!(
            Digest::parse(&format!("W/\"{}\"", "0c".repeat(20))),
            Some(Digest::GitSha1("0c".repeat(20)))
        );
        assert_eq!(
            Digest::parse("\"d41d8cd98f00b204e9800998ecf8427e-3\""),
            None
        );
    }
}
