//! Allocation, sharing and release of blocks for whole sequences.

use super::{BlockHash, BlockId, BlockTable, block::BlockPool, prefix_cache::PrefixCache};

/// The bookkeeping contradicts itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the block pool lost its integrity: {0}")]
pub struct IntegrityError(String);

/// Hands out the blocks of one pool.
pub struct BlockManager {
    pool: BlockPool,
    cache: PrefixCache,
    block_size: u32,
    enable_prefix_caching: bool,
}

impl BlockManager {
    /// A pool of `num_blocks` blocks (null block included) of `block_size` tokens.
    #[must_use]
    pub fn new(num_blocks: u32, block_size: u32, enable_prefix_caching: bool) -> Self {
        Self {
            pool: BlockPool::new(num_blocks),
            cache: PrefixCache::default(),
            block_size,
            enable_prefix_caching,
        }
    }

    /// Tokens in a block.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Whether blocks are published and found by hash.
    #[must_use]
    pub fn prefix_caching(&self) -> bool {
        self.enable_prefix_caching
    }

    /// Blocks that can be allocated now, cached ones included.
    #[must_use]
    pub fn num_free(&self) -> u32 {
        self.pool.num_free()
    }

    /// Blocks that exist, the null block aside.
    #[must_use]
    pub fn num_total(&self) -> u32 {
        self.pool.len().saturating_sub(1)
    }

    /// Blocks that `num_tokens` tokens take.
    #[must_use]
    pub fn blocks_for(&self, num_tokens: u32) -> u32 {
        num_tokens.div_ceil(self.block_size)
    }

    /// The cached blocks of the longest known beginning of a sequence of `num_tokens` tokens with these block hashes.
    /// At least one token is always left to compute, so that it yields logits. Takes nothing.
    #[must_use]
    pub fn lookup(&self, hashes: &[BlockHash], num_tokens: u32) -> Vec<BlockId> {
        if !self.enable_prefix_caching {
            return Vec::new();
        }
        let most = (num_tokens.saturating_sub(1) / self.block_size) as usize;
        hashes
            .iter()
            .take(most)
            .map_while(|hash| self.cache.get(hash))
            .collect()
    }

    /// Fills an empty table: the cached blocks `hits`, then new ones up to `num_blocks` in all, leaving at least
    /// `keep_free` blocks free. False, and nothing taken, when there are too few.
    pub fn admit(
        &mut self,
        table: &mut BlockTable,
        hits: &[BlockId],
        num_blocks: u32,
        keep_free: u32,
    ) -> bool {
        assert!(table.is_empty(), "a table is filled once: this is a bug");
        let num_hits = u32::try_from(hits.len()).expect("hits fit the pool: this is a bug");
        let new = num_blocks.saturating_sub(num_hits);
        let free_hits = hits.iter().filter(|&&b| self.pool.ref_count(b) == 0);
        let from_free = u64::from(new) + free_hits.count() as u64 + u64::from(keep_free);
        if from_free > u64::from(self.pool.num_free()) {
            return false;
        }
        // Hits first: a new block must not evict one of them.
        for &block in hits {
            self.pool.acquire(block);
            table.push(block);
        }
        for _ in 0..new {
            let block = self
                .take()
                .expect("the free blocks were counted: this is a bug");
            table.push(block);
        }
        true
    }

    /// Grows a table by new blocks until it holds `num_tokens` tokens. False, and nothing taken, when there are too few.
    pub fn grow(&mut self, table: &mut BlockTable, num_tokens: u32) -> bool {
        let missing = self.missing(table, num_tokens);
        if missing > self.pool.num_free() {
            return false;
        }
        for _ in 0..missing {
            let block = self
                .take()
                .expect("the free blocks were counted: this is a bug");
            table.push(block);
        }
        true
    }

    /// Blocks that [`grow`](Self::grow) would take.
    #[must_use]
    pub fn missing(&self, table: &BlockTable, num_tokens: u32) -> u32 {
        let have = u32::try_from(table.len()).expect("a table fits the pool: this is a bug");
        self.blocks_for(num_tokens).saturating_sub(have)
    }

    fn take(&mut self) -> Option<BlockId> {
        let (block, evicted) = self.pool.take()?;
        if let Some(hash) = evicted {
            self.cache.remove(&hash);
        }
        Some(block)
    }

    /// Makes a full block findable by its hash. False when caching is off or other block has this content already.
    pub fn publish(&mut self, block: BlockId, hash: BlockHash) -> bool {
        if !self.enable_prefix_caching || self.pool.hash(block).is_some() {
            return false;
        }
        let published = self.cache.insert(hash, block);
        if published {
            self.pool.set_hash(block, Some(hash));
        }
        published
    }

    /// Takes a published block back: the step that should have written it failed.
    pub fn withdraw(&mut self, block: BlockId) {
        if let Some(hash) = self.pool.hash(block).copied() {
            self.cache.remove(&hash);
            self.pool.set_hash(block, None);
        }
    }

    /// Gives a sequence's blocks back, last first, so that the ends of prefixes are evicted before their beginnings.
    pub fn free(&mut self, table: &mut BlockTable) {
        for block in table.take().into_iter().rev() {
            self.pool.release(block);
        }
    }

    /// Whether no table can hold a block.
    #[must_use]
    pub fn all_free(&self) -> bool {
        self.pool.num_free() + 1 == self.pool.len()
    }

    /// Proves the invariants of [`kv_cache`](super), given every table in existence.
    ///
    /// # Errors
    /// [`IntegrityError`] names the first contradiction.
    pub fn check_integrity<'a>(
        &self,
        tables: impl IntoIterator<Item = &'a BlockTable>,
    ) -> Result<(), IntegrityError> {
        let fail = |what: String| Err(IntegrityError(what));
        let total = self.pool.len() as usize;
        let mut held = vec![0u32; total];
        for block in tables.into_iter().flat_map(BlockTable::blocks) {
            held[block.0 as usize] += 1;
        }
        let free = self.pool.free_list();
        if free.len() != self.pool.num_free() as usize {
            return fail(format!(
                "the free list has {} blocks, its count says {}",
                free.len(),
                self.pool.num_free()
            ));
        }
        let mut is_free = vec![false; total];
        for block in free {
            if std::mem::replace(&mut is_free[block.0 as usize], true) {
                return fail(format!("block {} is twice in the free list", block.0));
            }
        }
        let mut cached = 0;
        for id in (0..self.pool.len()).map(BlockId) {
            let (count, tables) = (self.pool.ref_count(id), held[id.0 as usize]);
            if count != tables {
                return fail(format!(
                    "block {} is counted {count} times and held by {tables} tables",
                    id.0
                ));
            }
            if is_free[id.0 as usize] != (count == 0 && id != BlockId::NULL) {
                return fail(format!(
                    "block {} is neither free nor in use, or both",
                    id.0
                ));
            }
            if let Some(hash) = self.pool.hash(id) {
                cached += 1;
                if self.cache.get(hash) != Some(id) {
                    return fail(format!("block {} carries a hash that is not its own", id.0));
                }
            }
        }
        if cached != self.cache.len() {
            return fail(format!(
                "{} hashes are cached and {cached} blocks carry one",
                self.cache.len()
            ));
        }
        Ok(())
    }
}
