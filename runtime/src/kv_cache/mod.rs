//! The paged KV cache as bookkeeping: blocks, block tables, reference counts and the prefix cache.
//!
//! Pure: nothing here knows a tensor, a thread or a request's text.
//!
//! ```text
//! BlockManager ──► BlockPool     reference counts, LRU free list
//!        │   └───► PrefixCache   block hash → block
//!        └───────► BlockTable    one sequence: logical → physical blocks
//! ```
//!
//! Invariants ([`BlockManager::check_integrity`] proves them):
//! - a block is free (reference count 0, in the free list) or in use, never both, and none is lost;
//! - a block's reference count is the number of tables that hold it;
//! - a cached hash names one block, and that block carries this hash.

mod block;
mod block_manager;
mod block_table;
mod prefix_cache;
#[cfg(test)]
mod tests;

pub use block_manager::{BlockManager, IntegrityError};
pub use block_table::BlockTable;
pub use prefix_cache::{BlockHash, BlockHasher};

/// Index of one block of [`block_size`](crate::model_runner::RunnerLimits::block_size) tokens in the pool.
///
/// Block 0 is the null block: it is never allocated and stands for positions outside a sliding window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

impl BlockId {
    /// The block that holds nothing and is never handed out.
    pub const NULL: Self = Self(0);
}
