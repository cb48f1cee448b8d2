//! The chunked coding of a body (RFC 9112, section 7.1). Pure.
//!
//! Strict where lenience lets two readers see two different bodies: a line ends in CR LF and nothing else. Extensions and
//! trailers are read within bounds and dropped.

/// Most digits of a chunk's size: no chunk has more bytes than fit in 60 bits.
const MAX_DIGITS: u8 = 15;
/// Most bytes of one chunk's extensions.
const MAX_EXTENSION: u32 = 1024;
/// Most bytes of all trailers.
const MAX_TRAILERS: u32 = 16 << 10;

/// What is wrong with a chunked body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// There is no size where one has to be.
    #[error("the size of a chunk is not a hexadecimal number")]
    Size,
    /// The size has too many digits.
    #[error("the size of a chunk is too large")]
    TooLarge,
    /// The extensions of a chunk are too long.
    #[error("the extensions of a chunk are too long")]
    Extension,
    /// The trailers are too long.
    #[error("the trailers are too long")]
    Trailers,
    /// A line of the framing does not end in CR LF.
    #[error("a line does not end in CR LF")]
    LineEnd,
    /// A chunk is longer than its size.
    #[error("a chunk is longer than its size says")]
    ChunkEnd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// In the digits of a size.
    Size {
        size: u64,
        digits: u8,
    },
    /// In what follows the size on its line.
    Extension {
        size: u64,
        bytes: u32,
    },
    /// Before the LF of the size's line.
    SizeLf {
        size: u64,
    },
    /// Before so many more bytes of the chunk.
    Data {
        left: u64,
    },
    /// Before the CR, or the LF, that ends the chunk.
    DataCr,
    DataLf,
    /// At the beginning of a trailer's line, within it, and before its LF.
    Trailer {
        bytes: u32,
    },
    TrailerLine {
        bytes: u32,
    },
    TrailerLf {
        bytes: u32,
    },
    /// Before the last LF.
    LastLf,
    /// Behind it.
    Done,
}

/// Where in a chunked body we are.
#[derive(Debug)]
pub(super) struct Chunked(State);

const NEXT: State = State::Size { size: 0, digits: 0 };

impl Chunked {
    /// At the beginning.
    pub(super) fn new() -> Self {
        Self(NEXT)
    }

    /// The body has ended.
    pub(super) fn is_done(&self) -> bool {
        self.0 == State::Done
    }

    /// Moves the payload in `bytes`, which follow on those before, to their front. Returns how many bytes it has, and how many
    /// of `bytes` belong to the body.
    pub(super) fn decode(&mut self, bytes: &mut [u8]) -> Result<(usize, usize), ChunkError> {
        let (mut payload, mut at) = (0, 0);
        while at < bytes.len() && !self.is_done() {
            let State::Data { left } = self.0 else {
                self.0 = step(self.0, bytes[at])?;
                at += 1;
                continue;
            };
            let here = usize::try_from(left).map_or(bytes.len() - at, |l| l.min(bytes.len() - at));
            bytes.copy_within(at..at + here, payload);
            payload += here;
            at += here;
            let left = left - here as u64;
            self.0 = if left == 0 {
                State::DataCr
            } else {
                State::Data { left }
            };
        }
        Ok((payload, at))
    }
}

/// The state after one byte of the framing.
fn step(state: State, byte: u8) -> Result<State, ChunkError> {
    Ok(match (state, byte) {
        (State::Size { digits: 1.., size }, b'\r') => State::SizeLf { size },
        (State::Size { digits: 1.., size }, b';' | b' ' | b'\t') => {
            State::Extension { size, bytes: 1 }
        }
        (State::Size { digits, size }, _) => {
            let digit = char::from(byte).to_digit(16).ok_or(ChunkError::Size)?;
            if digits == MAX_DIGITS {
                return Err(ChunkError::TooLarge);
            }
            State::Size {
                size: size << 4 | u64::from(digit),
                digits: digits + 1,
            }
        }
        (State::Extension { size, .. }, b'\r') => State::SizeLf { size },
        (State::SizeLf { size: 0 }, b'\n') => State::Trailer { bytes: 0 },
        (State::SizeLf { size }, b'\n') => State::Data { left: size },
        (State::DataCr, b'\r') => State::DataLf,
        (State::DataLf, b'\n') => NEXT,
        (State::Trailer { .. }, b'\r') => State::LastLf,
        (State::TrailerLine { bytes }, b'\r') => State::TrailerLf { bytes },
        (State::TrailerLf { bytes }, b'\n') => State::Trailer { bytes },
        (State::LastLf, b'\n') => State::Done,
        (State::DataCr | State::DataLf, _) => return Err(ChunkError::ChunkEnd),
        (State::SizeLf { .. } | State::TrailerLf { .. } | State::LastLf, _)
        | (State::Extension { .. } | State::Trailer { .. } | State::TrailerLine { .. }, b'\n') => {
            return Err(ChunkError::LineEnd);
        }
        (State::Extension { bytes, .. }, _) if bytes == MAX_EXTENSION => {
            return Err(ChunkError::Extension);
        }
        (State::Extension { size, bytes }, _) => State::Extension {
            size,
            bytes: bytes + 1,
        },
        (State::Trailer { bytes } | State::TrailerLine { bytes }, _) if bytes == MAX_TRAILERS => {
            return Err(ChunkError::Trailers);
        }
        (State::Trailer { bytes } | State::TrailerLine { bytes }, _) => {
            State::TrailerLine { bytes: bytes + 1 }
        }
        // Not of the framing: `decode` takes these.
        (State::Data { .. } | State::Done, _) => state,
    })
}

#[cfg(test)]
#[path = "tests/chunked.rs"]
mod tests;
