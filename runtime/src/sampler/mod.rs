//! Draws tokens from logits on the host.
//!
//! Order, everywhere: penalties and bias → mask (and `min_tokens`) → temperature → min-p → top-k → renormalise → top-p.
//!
//! Invariants:
//! - a draw depends on the row's logits and the request alone: its random number is Philox4x32-10 of
//!   (seed, choice index, position);
//! - among equal logits the lowest id wins;
//! - a row with a NaN or infinite logit is an error of that row alone.
//!
//! Every slot has its own lock, so rows of one step may be drawn on many threads.

mod math;
mod philox;
mod slot;
#[cfg(test)]
mod tests;

use std::sync::{Mutex, PoisonError};

pub use self::philox::{philox4x32, uniform};
use self::slot::SlotState;
use crate::{
    engine::request::{GeneratedToken, TokenId},
    model_runner::{SampleRow, SlotInit},
};

/// Why a row has no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// The model's logits, or what penalties and bias made of them, are NaN or infinite.
    #[error("the logits are not finite")]
    NonFinite,
    /// The mask forbids every token.
    #[error("no token is allowed")]
    NoCandidate,
    /// The slot was never bound to a sequence.
    #[error("the slot is not bound to a sequence: this is a bug")]
    UnboundSlot,
}

/// One sampler state per slot.
pub struct Sampler {
    vocab_size: usize,
    eos_ids: Vec<TokenId>,
    slots: Vec<Mutex<Option<SlotState>>>,
}

impl Sampler {
    /// For logits of `vocab_size` tokens and slots `0..max_num_seqs`.
    #[must_use]
    pub fn new(vocab_size: u32, max_num_seqs: u32, eos_ids: Vec<TokenId>) -> Self {
        Self {
            vocab_size: vocab_size as usize,
            eos_ids,
            slots: (0..max_num_seqs).map(|_| Mutex::new(None)).collect(),
        }
    }

    /// Binds a slot to a sequence; what it held before is forgotten.
    ///
    /// # Panics
    /// When the slot is not below `max_num_seqs`.
    pub fn init_slot(&self, init: &SlotInit) {
        let state = SlotState::new(init, &self.eos_ids);
        *self.slots[init.slot.0 as usize]
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(state);
    }

    /// Draws the token of one row from its logits `[vocab_size]`, which it overwrites. Rows of different slots may be
    /// drawn at once from several threads.
    ///
    /// # Errors
    /// [`SampleError`] when the row has no token; its request fails, no other.
    ///
    /// # Panics
    /// When the slot is not below `max_num_seqs` or the row has another width.
    pub fn sample(
        &self,
        row: &SampleRow,
        logits: &mut [f32],
    ) -> Result<GeneratedToken, SampleError> {
        assert_eq!(
            logits.len(),
            self.vocab_size,
            "a row of logits is as wide as the vocabulary: this is a bug"
        );
        let mut slot = self.slots[row.slot.0 as usize]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        slot.as_mut()
            .ok_or(SampleError::UnboundSlot)?
            .sample(row, logits)
    }
}
