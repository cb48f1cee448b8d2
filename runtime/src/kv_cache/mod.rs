//! The paged KV cache as bookkeeping: blocks, block tables, reference counts and the prefix cache.
//!
//! Pure: nothing here knows a tensor, a thread or a request's text.

/// Index of one block of [`block_size`](crate::model_runner::RunnerLimits::block_size) tokens in the pool.
///
/// Block 0 is the null block: it is never allocated and stands for positions outside a sliding window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

impl BlockId {
    /// The block that holds nothing and is never handed out.
    pub const NULL: Self = Self(0);
}
