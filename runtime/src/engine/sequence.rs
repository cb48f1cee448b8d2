//! The engine's state of one sequence.

use std::sync::Arc;

use super::{
    config::{EngineConfig, KvReservation},
    constraint::{Constraint, GrammarState},
    request::{Pooling, Request, SamplingParams, SeqId, TokenId},
    waiting::TenantId,
};
use crate::{
    kv_cache::{BlockHash, BlockHasher, BlockTable},
    model_runner::{Slot, SlotInit},
};

/// A request with its progress. `tokens` is what the host knows; `num_computed` and `num_placeholders` run ahead of it
/// as steps are scheduled.
#[derive(Debug)]
pub struct Sequence {
    /// Identity.
    pub id: SeqId,
    /// Sampling parameters, seed set.
    pub params: Arc<SamplingParams>,
    /// The prompt.
    pub prompt: Arc<[TokenId]>,
    /// Which of `n` choices it is.
    pub choice_index: u32,
    /// What it may say.
    pub constraint: Constraint,
    /// Lower numbers are admitted first.
    pub priority: i32,
    /// Whose it is.
    pub tenant: TenantId,
    /// Log-probabilities of the prompt are wanted, with this many alternatives.
    pub prompt_logprobs: Option<u32>,
    /// Its prompt is to be embedded: nothing is drawn.
    pub pooling: Option<Pooling>,
    /// Prompt and output known on the host.
    pub tokens: Vec<TokenId>,
    /// Tokens whose K and V exist once all submitted steps have run.
    pub num_computed: u32,
    /// Output tokens that submitted steps will draw and the host does not know yet.
    pub num_placeholders: u32,
    /// Its blocks; empty while it waits.
    pub table: BlockTable,
    /// Leading blocks of the table that were offered to the prefix cache, or came from it.
    pub num_published: u32,
    /// Its place; `None` while it waits.
    pub slot: Option<Slot>,
    /// Raised at each preemption: results of older epochs are stale.
    pub epoch: u32,
    /// The last step that names it; 0 before the first.
    pub last_step: u64,
    /// Times it was preempted.
    pub num_preemptions: u32,
    /// Prompt tokens found in the prefix cache at first admission; `None` before that.
    pub num_cached: Option<u32>,
    hasher: BlockHasher,
    hashes: Vec<BlockHash>,
}

impl Sequence {
    /// A new sequence; hashes its prompt if there is a prefix cache.
    #[must_use]
    pub fn new(id: SeqId, request: Request, config: &EngineConfig, block_size: u32) -> Self {
        let mut params = request.params;
        params
            .seed
            .get_or_insert_with(|| split_mix(config.seed ^ split_mix(id.0)));
        let hasher = BlockHasher::new(block_size, 0, request.cache_salt.as_deref());
        let mut hashes = Vec::new();
        if config.enable_prefix_caching && config.reservation == KvReservation::Paged {
            hasher.extend(&mut hashes, &request.prompt);
        }
        Self {
            id,
            tokens: request.prompt.to_vec(),
            params: Arc::new(params),
            prompt: request.prompt,
            choice_index: request.choice_index,
            constraint: request.constraint,
            priority: request.priority,
            tenant: request.tenant,
            prompt_logprobs: request.prompt_logprobs,
            pooling: request.pooling,
            num_computed: 0,
            num_placeholders: 0,
            table: BlockTable::default(),
            num_published: 0,
            slot: None,
            epoch: 0,
            last_step: 0,
            num_preemptions: 0,
            num_cached: None,
            hasher,
            hashes,
        }
    }

    /// Known tokens, prompt and output.
    #[must_use]
    pub fn num_tokens(&self) -> u32 {
        u32::try_from(self.tokens.len()).expect("max_model_len is a u32: this is a bug")
    }

    /// Prompt tokens.
    #[must_use]
    pub fn num_prompt(&self) -> u32 {
        u32::try_from(self.prompt.len()).expect("max_model_len is a u32: this is a bug")
    }

    /// Output tokens known on the host.
    #[must_use]
    pub fn num_generated(&self) -> u32 {
        self.num_tokens() - self.num_prompt()
    }

    /// Tokens to compute until the next one can be drawn; 0 when submitted steps are certain to reach `max_tokens`.
    #[must_use]
    pub fn remaining(&self) -> u32 {
        if self.num_generated() + self.num_placeholders >= self.params.max_tokens {
            return 0;
        }
        self.num_tokens() + self.num_placeholders - self.num_computed
    }

    /// One token behind: its next row is the one it draws from.
    #[must_use]
    pub fn is_decoding(&self) -> bool {
        self.remaining() <= 1
    }

    /// The mask of the next token is being computed.
    #[must_use]
    pub fn mask_pending(&self) -> bool {
        let state = self.constraint.grammar().map(|grammar| grammar.state());
        matches!(state, Some(GrammarState::Pending))
    }

    /// Its next token can be drawn in the next step: what it may be is known.
    #[must_use]
    pub fn may_sample(&self) -> bool {
        if self.num_placeholders > 0 && self.constraint.follows_tokens() {
            return false;
        }
        let state = self.constraint.grammar().map(|grammar| grammar.state());
        matches!(state, None | Some(GrammarState::Ready(_)))
    }

    /// Output tokens known on the host.
    #[must_use]
    pub fn output(&self) -> &[TokenId] {
        &self.tokens[self.prompt.len()..]
    }

    /// The known token at a position, or `None` when a submitted step is still drawing it.
    #[must_use]
    pub fn token_at(&self, position: u32) -> Option<TokenId> {
        self.tokens.get(position as usize).copied()
    }

    /// Hashes of the full blocks of the known tokens.
    pub fn block_hashes(&mut self) -> &[BlockHash] {
        self.hasher.extend(&mut self.hashes, &self.tokens);
        &self.hashes
    }

    /// The hashes computed so far, without computing more.
    #[must_use]
    pub fn known_hashes(&self) -> &[BlockHash] {
        &self.hashes
    }

    /// What the runner has to know before the sequence's first step in a slot.
    #[must_use]
    pub fn slot_init(&self, slot: Slot) -> SlotInit {
        SlotInit {
            slot,
            seq: self.id,
            params: Arc::clone(&self.params),
            choice_index: self.choice_index,
            prompt: Arc::clone(&self.prompt),
            output: self.output().to_vec(),
        }
    }
}

/// One round of SplitMix64: spreads small seeds over all bits.
fn split_mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
