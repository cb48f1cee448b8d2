//! Which full blocks hold which token prefixes.
//!
//! A block's hash covers its tokens, all before it (through the parent's hash), the layer group and the request's
//! extras (cache salt), so that equal hashes mean equal KV content and tenants with different salts share nothing.

use std::collections::HashMap;

use sha2::{Digest, Sha256};

use super::BlockId;
use crate::engine::request::TokenId;

/// SHA-256 of a block and everything before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockHash(pub [u8; 32]);

/// Hashes the blocks of one sequence.
#[derive(Debug, Clone)]
pub struct BlockHasher {
    block_size: u32,
    /// Parent of the first block: covers the group and the extras, and through the chain every block does.
    root: BlockHash,
}

impl BlockHasher {
    /// For blocks of layer group `group` (0 is the only one today) and a request's cache salt.
    #[must_use]
    pub fn new(block_size: u32, group: u32, cache_salt: Option<&str>) -> Self {
        let mut sha = Sha256::new();
        sha.update(b"ashlar kv block v1");
        sha.update(block_size.to_le_bytes());
        sha.update(group.to_le_bytes());
        match cache_salt {
            // The tag keeps an absent salt apart from an empty one.
            None => sha.update([0]),
            Some(salt) => {
                sha.update([1]);
                sha.update((salt.len() as u64).to_le_bytes());
                sha.update(salt.as_bytes());
            }
        }
        Self {
            block_size,
            root: BlockHash(sha.finalize().into()),
        }
    }

    /// Appends to `hashes`, which covers the first blocks of `tokens` already, the hashes of further full blocks.
    pub fn extend(&self, hashes: &mut Vec<BlockHash>, tokens: &[TokenId]) {
        let size = self.block_size as usize;
        for block in tokens.chunks_exact(size).skip(hashes.len()) {
            let parent = hashes.last().unwrap_or(&self.root);
            let mut sha = Sha256::new();
            sha.update(parent.0);
            for token in block {
                sha.update(token.to_le_bytes());
            }
            hashes.push(BlockHash(sha.finalize().into()));
        }
    }
}

/// Block hash → the block that holds its content.
#[derive(Default)]
pub(super) struct PrefixCache {
    blocks: HashMap<BlockHash, BlockId>,
}

impl PrefixCache {
    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }

    pub(super) fn get(&self, hash: &BlockHash) -> Option<BlockId> {
        self.blocks.get(hash).copied()
    }

    /// False when another block holds this content already: it keeps the name.
    pub(super) fn insert(&mut self, hash: BlockHash, block: BlockId) -> bool {
        match self.blocks.entry(hash) {
            std::collections::hash_map::Entry::Occupied(_) => false,
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(block);
                true
            }
        }
    }

    pub(super) fn remove(&mut self, hash: &BlockHash) {
        self.blocks.remove(hash);
    }
}
