//! The block table of one sequence: logical → physical blocks. Grows at its end only.

use super::BlockId;

/// Blocks of one sequence in the order of its tokens.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct BlockTable {
    blocks: Vec<BlockId>,
}

impl BlockTable {
    /// The blocks, in token order.
    #[must_use]
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Number of blocks.
    #[must_use]
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// True when the sequence holds no block.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Where the K and V of `position` lie in the pool: `block·block_size + offset`.
    ///
    /// # Panics
    /// When the table does not reach `position`: the scheduler allocates before it schedules.
    #[must_use]
    pub fn slot_of(&self, position: u32, block_size: u32) -> i64 {
        let block = self.blocks[(position / block_size) as usize];
        i64::from(block.0) * i64::from(block_size) + i64::from(position % block_size)
    }

    pub(super) fn push(&mut self, block: BlockId) {
        self.blocks.push(block);
    }

    pub(super) fn take(&mut self) -> Vec<BlockId> {
        std::mem::take(&mut self.blocks)
    }
}
