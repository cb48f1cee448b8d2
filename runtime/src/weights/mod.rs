//! Reading checkpoints: memory-mapped files, nothing copied until a tensor is used.
//!
//! Invariants:
//! - a file is hostile until parsed: every length is checked against a named bound and against the file before it is used;
//! - parsing never allocates more than a small multiple of what the file really holds;
//! - the one `unsafe` of this crate is [`MappedFile::open`].

use std::{
    fs::File,
    io,
    ops::{Deref, Range},
    path::{Path, PathBuf},
};

mod bytes;
pub mod checkpoint;
pub mod cut;
pub mod fp8;
pub mod ggml_type;
pub mod gguf;
pub mod int4;
pub mod safetensors;
mod scheme;

pub use bytes::{Bytes, StoredBytes};
pub use checkpoint::{Checkpoint, RawTensor, Weight};
pub use fp8::{Fp8Matrix, Fp8Scales, Fp8Scheme, Fp8Source};
pub use ggml_type::GgmlType;
pub use gguf::Gguf;
pub use int4::{Int4Matrix, Int4Scheme, Int4Source};
pub use safetensors::SafetensorsFolder;
pub use scheme::Scheme;

/// Why a checkpoint could not be read.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The file cannot be opened or mapped.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file breaks its format: truncated download, or not the format its name says.
    #[error(
        "{path} is not a valid {format} file: {message}; download it again, or check that the whole file was copied"
    )]
    Malformed {
        /// The file.
        path: String,
        /// `GGUF`, `safetensors` or `config.json`.
        format: &'static str,
        /// What is wrong, and where.
        message: String,
    },
    /// The file is valid, but asks for something this runtime does not do.
    #[error("{path} cannot be used: {message}")]
    Unsupported {
        /// The file.
        path: String,
        /// What is not supported, and what to use instead.
        message: String,
    },
    /// The model needs a tensor that the checkpoint does not have, or has in another shape.
    #[error("{path} does not fit its own configuration: {message}")]
    Mismatch {
        /// The file.
        path: String,
        /// Which tensor, what was expected, what is there.
        message: String,
    },
}

/// A whole file in memory, read-only, paged in by the kernel as it is touched.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    map: memmap2::Mmap,
}

impl MappedFile {
    /// Maps `path`.
    ///
    /// # Errors
    /// [`WeightsError::Io`] when the file cannot be opened or mapped.
    #[allow(unsafe_code)] // The crate's documented exception.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let fail = |source| WeightsError::Io {
            path: path.display().to_string(),
            source,
        };
        let file = File::open(path).map_err(fail)?;
        let metadata = file.metadata().map_err(fail)?;
        if !metadata.is_file() {
            return Err(fail(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file",
            )));
        }
        // SAFETY: (1) the map is private to this process and read-only, and lives as long as `Self`; every slice
        // borrows from it. (2) Its length is the file's at this moment; all reads go through bounds-checked slices.
        // (3) The remaining hazard is another process truncating or rewriting the file meanwhile, which would change
        // bytes under a `&[u8]` or raise SIGBUS. Model files are immutable by contract: `pull` writes them under
        // another name, renames them into place and never opens them for writing again, and model volumes are
        // mounted read-only in the runtime's container. No value read from the map is used as a length or offset
        // after parsing without having been copied out first.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(fail)?;
        Ok(Self {
            path: path.to_owned(),
            map,
        })
    }

    /// Some of its bytes.
    ///
    /// # Panics
    /// When they are outside.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> StoredBytes<'_> {
        let start = range.start as u64;
        StoredBytes::in_file(&self.map[range], &self.path, start)
    }

    /// Tells the kernel that the whole file is about to be read once, from start to end.
    pub fn will_read_all(&self) {
        // Advice only: a kernel that refuses it is slower, not wrong.
        let _ = self.map.advise(memmap2::Advice::WillNeed);
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}
