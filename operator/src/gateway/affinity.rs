//! Which replica has a prompt's beginning in its KV cache, as far as this gateway can know. Pure.
//!
//! A prompt is cut into blocks of [`BLOCK_BYTES`] bytes of its JSON text, about as long as a block of the runtime's KV
//! cache, and each block is hashed with all before it, as the runtime does. A conversation's next turn begins with the
//! same blocks. [`Index`] remembers which replicas were sent a block; where nothing is remembered, every gateway ranks
//! the replicas by the same hash (rendezvous), so that gateways agree without telling each other.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

/// Bytes of prompt that make a block: 16 tokens of about 4 bytes.
pub const BLOCK_BYTES: usize = 64;
/// Most blocks of a prompt that are looked at.
pub const MAX_BLOCKS: usize = 256;
/// Bytes of a request's body that are read to find them.
pub const MAX_BODY_BYTES: usize = BLOCK_BYTES * MAX_BLOCKS + 2048;
/// Bytes of a prompt without messages by which replicas are ranked when nothing is remembered.
const OPENING_BYTES: usize = 1024;
/// Replicas remembered for one block.
const REPLICAS: usize = 4;
/// Blocks remembered by each of the two generations of an index: 24 bytes each.
const GENERATION: usize = 1 << 16;

/// The hashes of a prompt's blocks, each of all blocks up to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prefix {
    blocks: Vec<u64>,
    /// Hash of what all turns of a chat have in common: everything up to the first message of the user.
    opening: u64,
}

impl Prefix {
    /// Reads a request's body, or its beginning; `None` without a whole block of a prompt.
    #[must_use]
    pub fn of_body(body: &[u8]) -> Option<Self> {
        let prompt = prompt(body)?;
        let mut chain = 0u64;
        let blocks: Vec<u64> = prompt
            .chunks_exact(BLOCK_BYTES)
            .take(MAX_BLOCKS)
            .map(|block| {
                let mut hasher = DefaultHasher::new();
                (chain, block).hash(&mut hasher);
                chain = hasher.finish();
                chain
            })
            .collect();
        let mut hasher = DefaultHasher::new();
        opening(prompt).hash(&mut hasher);
        (!blocks.is_empty()).then(|| Self {
            blocks,
            opening: hasher.finish(),
        })
    }

    /// The hashes, longest last.
    #[must_use]
    pub fn blocks(&self) -> &[u64] {
        &self.blocks
    }

    /// A replica's rank for this prompt when nothing is remembered: the highest is asked first.
    #[must_use]
    pub fn rank(&self, replica: u32) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.opening, replica).hash(&mut hasher);
        hasher.finish()
    }
}

/// The JSON text of the top-level value of `messages`, `prompt` or `input`, as far as it is there.
fn prompt(body: &[u8]) -> Option<&[u8]> {
    let start = body.iter().position(|byte| !byte.is_ascii_whitespace())?;
    if body[start] != b'{' {
        return None;
    }
    let (mut depth, mut quoted, mut escaped) = (0u32, false, false);
    // Where the string that was read last began and ended, at the top level.
    let (mut opened, mut last): (usize, Option<&[u8]>) = (0, None);
    let mut value: Option<usize> = None;
    for (at, &byte) in body.iter().enumerate().skip(start) {
        if quoted {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => {
                    quoted = false;
                    if depth == 1 && value.is_none() {
                        last = Some(&body[opened..at]);
                    }
                }
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => (quoted, opened) = (true, at + 1),
            b':' if depth == 1 && value.is_none() => {
                if matches!(last, Some(b"messages" | b"prompt" | b"input")) {
                    value = Some(at + 1);
                }
            }
            b'{' | b'[' => depth += 1,
            b'}' | b']' | b',' if depth == 1 && value.is_some() => {
                return value.map(|from| body[from..at].trim_ascii_start());
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    value.map(|from| body[from..].trim_ascii_start())
}

/// What the turns of a chat begin with: the messages up to the first one of the user, or a prompt's first bytes.
fn opening(prompt: &[u8]) -> &[u8] {
    let first = &prompt[..prompt.len().min(OPENING_BYTES)];
    if prompt.first() != Some(&b'[') {
        return first;
    }
    let (mut depth, mut quoted, mut escaped, mut start) = (0u32, false, false, 0);
    for (at, &byte) in prompt.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            _ if quoted => {}
            b'{' | b'[' => {
                depth += 1;
                if depth == 2 {
                    start = at;
                }
            }
            b'}' | b']' => {
                depth = depth.saturating_sub(1);
                let message = &prompt[start..=at];
                if depth == 1 && message.windows(6).any(|word| word == b"\"user\"") {
                    return &prompt[..=at];
                }
            }
            _ => {}
        }
    }
    first
}

/// Replicas that were sent a block, newest first; 0 is none.
type Replicas = [u32; REPLICAS];

/// Who was sent which block. Bounded: the older half is forgotten when the newer is full.
#[derive(Debug, Default)]
pub struct Index {
    new: HashMap<u64, Replicas>,
    old: HashMap<u64, Replicas>,
}

impl Index {
    /// Replicas that were sent this block.
    pub fn replicas(&self, block: u64) -> impl Iterator<Item = u32> + use<> {
        let found = self.new.get(&block).or_else(|| self.old.get(&block));
        let found = found.copied().unwrap_or_default();
        found.into_iter().filter(|replica| *replica != 0)
    }

    /// `replica` is sent these blocks.
    pub fn sent(&mut self, prefix: &Prefix, replica: u32) {
        if self.new.len() + prefix.blocks.len() > GENERATION {
            self.old = std::mem::take(&mut self.new);
        }
        for block in &prefix.blocks {
            let before = self.old.remove(block).unwrap_or_default();
            let replicas = self.new.entry(*block).or_insert(before);
            let at = replicas.iter().position(|known| *known == replica);
            let at = at.unwrap_or(REPLICAS - 1);
            replicas[..=at].rotate_right(1);
            replicas[0] = replica;
        }
    }
}

#[cfg(test)]
#[path = "tests/affinity.rs"]
mod tests;
