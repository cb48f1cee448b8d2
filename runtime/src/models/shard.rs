//! Which part of a model each tensor-parallel rank holds.
//!
//! Heads go by KV group: a rank has whole groups, or with more ranks than groups a part of one group's query heads and a
//! copy of its KV head. Everything that does not divide is padded with zeros, so that all ranks have the same shapes:
//! a head of zeros adds nothing to the attention's output, a zero row of gate and up nothing to the MLP's.

use super::{
    config::ModelConfig,
    registry::{GGUF_WEIGHTS, Role, Shard},
};
use crate::weights::{
    Checkpoint, Scheme,
    cut::{self, Cut, Span},
};

/// Rows of the vocabulary that a rank holds are a multiple of this.
const VOCABULARY_MULTIPLE: usize = 16;
/// Rows of gate and up that a rank holds are a multiple of this, at least.
const MLP_MULTIPLE: usize = 32;

/// One rank's part of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// This rank.
    pub rank: usize,
    /// All of them.
    pub ranks: usize,
    head_dim: usize,
    query_heads: Span,
    kv_heads: Span,
    intermediate: Span,
    /// Its rows of the embedding and the head.
    pub vocabulary: Span,
}

impl Partition {
    /// The whole model, on the only rank.
    #[must_use]
    pub fn whole(config: &ModelConfig) -> Self {
        Self {
            rank: 0,
            ranks: 1,
            head_dim: config.head_dim,
            query_heads: Span::whole(config.num_heads),
            kv_heads: Span::whole(config.num_kv_heads),
            intermediate: Span::whole(config.intermediate_size),
            vocabulary: Span::whole(config.vocab_size),
        }
    }

    /// The part of `rank` of `ranks`.
    ///
    /// # Errors
    /// In words, when there are more ranks than heads.
    pub fn new(
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        (rank, ranks): (usize, usize),
    ) -> Result<Self, String> {
        let multiple = mlp_multiple(checkpoint, config);
        Self::with_multiple(config, (rank, ranks), multiple)
    }

    fn with_multiple(
        config: &ModelConfig,
        (rank, ranks): (usize, usize),
        mlp_multiple: usize,
    ) -> Result<Self, String> {
        if ranks == 1 {
            return Ok(Self::whole(config));
        }
        if ranks > config.num_heads {
            return Err(format!(
                "--tensor-parallel-size is {ranks}, and the model has {} attention heads; use at most so many",
                config.num_heads
            ));
        }
        let (query_heads, kv_heads) = heads(config, (rank, ranks));
        Ok(Self {
            rank,
            ranks,
            head_dim: config.head_dim,
            query_heads,
            kv_heads,
            intermediate: Span::of_rank(config.intermediate_size, (rank, ranks), mlp_multiple),
            vocabulary: Span::of_rank(config.vocab_size, (rank, ranks), VOCABULARY_MULTIPLE),
        })
    }

    /// The model's sizes as this rank sees them: its heads and its part of the MLP. The vocabulary is the whole one.
    #[must_use]
    pub fn local(&self, config: &ModelConfig) -> ModelConfig {
        ModelConfig {
            num_heads: self.query_heads.padded,
            num_kv_heads: self.kv_heads.padded,
            intermediate_size: self.intermediate.padded,
            ..config.clone()
        }
    }

    /// What of a part of a matrix this rank holds; `None` for all of it.
    #[must_use]
    pub fn cut(&self, shard: Shard, role: Role) -> Option<Cut> {
        let query = self.query_heads.times(self.head_dim);
        let cut = match (shard, role) {
            (Shard::Replicate, _) => return None,
            (Shard::Vocab, _) => Cut::Rows(self.vocabulary),
            (Shard::KvGroup, Role::Query) => Cut::Rows(query),
            (Shard::KvGroup, _) => Cut::Rows(self.kv_heads.times(self.head_dim)),
            (Shard::Column, _) => Cut::Rows(self.intermediate),
            (Shard::Row, Role::AttentionOutput) => Cut::Columns(query),
            (Shard::Row, _) => Cut::Columns(self.intermediate),
        };
        (self.ranks > 1).then_some(cut)
    }
}

/// Query and KV heads of a rank.
fn heads(config: &ModelConfig, (rank, ranks): (usize, usize)) -> (Span, Span) {
    let (groups, group) = (config.num_kv_heads, config.num_heads / config.num_kv_heads);
    let sharers = ranks / groups;
    if sharers <= 1 {
        let kv_heads = Span::of_rank(groups, (rank, ranks), 1);
        return (kv_heads.times(group), kv_heads);
    }
    // Ranks beyond the last group have zeros alone.
    let has_group = rank / sharers < groups;
    let first = rank / sharers * group;
    let part = Span::of_rank(group, (rank % sharers, sharers), 1);
    let kv_head = if has_group { rank / sharers } else { groups };
    let query_heads = Span {
        start: if has_group { first + part.start } else { 0 },
        len: if has_group { part.len } else { 0 },
        padded: part.padded,
    };
    let kv_heads = Span {
        start: kv_head,
        len: usize::from(has_group),
        padded: 1,
    };
    (query_heads, kv_heads)
}

/// What a rank's inputs of `down` must be a multiple of: whole blocks and groups of its storage, in every layer.
fn mlp_multiple(checkpoint: &Checkpoint, config: &ModelConfig) -> usize {
    let grouped = match &config.quantization {
        Some(Scheme::Int4(scheme)) => {
            let group = scheme.group_of(config.intermediate_size);
            // One scale for all inputs can be cut anywhere.
            if group < config.intermediate_size {
                group
            } else {
                1
            }
        }
        Some(Scheme::Fp8(scheme)) => scheme.block.map_or(1, |size| size[1]),
        None => 1,
    };
    let names = (0..config.num_layers).map(|layer| {
        let name = GGUF_WEIGHTS.down.parts[0].name;
        format!("{}.weight", name.replace("{}", &layer.to_string()))
    });
    let stored = match checkpoint {
        Checkpoint::Safetensors(_) => None,
        Checkpoint::Gguf(_) => names
            .filter_map(|name| checkpoint.tensor(&name).ok().flatten())
            .map(|tensor| cut::column_multiple(tensor.kind))
            .max(),
    };
    grouped.max(stored.unwrap_or(1)).max(MLP_MULTIPLE)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, missing_docs)] // Tests fail by panicking.

    use proptest::prelude::*;

    use super::*;
    use crate::models::{
        config::{RopeConfig, RopeScaling},
        registry::Architecture,
    };

    fn model(num_heads: usize, num_kv_heads: usize) -> ModelConfig {
        ModelConfig {
            architecture: Architecture::from_hf("LlamaForCausalLM").unwrap(),
            vocab_size: 1000,
            hidden_size: 576,
            intermediate_size: 1536,
            num_layers: 2,
            num_heads,
            num_kv_heads,
            head_dim: 64,
            rms_norm_eps: 1e-5,
            rope: RopeConfig {
                theta: 1e4,
                scaling: RopeScaling::None,
            },
            max_position: 256,
            sliding_window: None,
            tie_embeddings: true,
            qkv_bias: false,
            quantization: None,
            eos_token_ids: vec![2],
        }
    }

    fn span(start: usize, len: usize, padded: usize) -> Span {
        Span { start, len, padded }
    }

    #[test]
    fn nine_heads_in_three_groups_are_padded() {
        let part = |rank, ranks| {
            let part = Partition::with_multiple(&model(9, 3), (rank, ranks), 32).unwrap();
            (part.query_heads, part.kv_heads)
        };
        assert_eq!(part(0, 2), (span(0, 6, 6), span(0, 2, 2)));
        assert_eq!(part(1, 2), (span(6, 3, 6), span(2, 1, 2)));
        assert_eq!(part(2, 4), (span(6, 3, 3), span(2, 1, 1)));
        assert_eq!(part(3, 4), (span(9, 0, 3), span(3, 0, 1)));
        // Two ranks share a group: two heads and one, and the last two ranks have none.
        assert_eq!(part(1, 8), (span(2, 1, 2), span(0, 1, 1)));
        assert_eq!(part(4, 8), (span(6, 2, 2), span(2, 1, 1)));
        assert_eq!(part(7, 8), (span(0, 0, 2), span(3, 0, 1)));
        let error = Partition::with_multiple(&model(9, 3), (0, 10), 32).unwrap_err();
        assert!(error.contains("the model has 9 attention heads"), "{error}");
    }

    #[test]
    fn a_model_that_divides_is_not_padded() {
        let llama = ModelConfig {
            hidden_size: 4096,
            intermediate_size: 14336,
            vocab_size: 128_256,
            ..model(32, 8)
        };
        for (ranks, kv_heads) in [(2, 4), (4, 2), (8, 1), (16, 1)] {
            for rank in 0..ranks {
                let part = Partition::with_multiple(&llama, (rank, ranks), 128).unwrap();
                let local = part.local(&llama);
                assert_eq!(local.num_heads, 32 / ranks);
                assert_eq!(local.num_kv_heads, kv_heads);
                assert_eq!(local.intermediate_size, 14336 / ranks);
                assert_eq!(part.vocabulary, Span::of_rank(128_256, (rank, ranks), 1));
                assert_eq!(local.vocab_size, 128_256);
            }
        }
    }

    #[test]
    fn one_rank_cuts_nothing() {
        let part = Partition::with_multiple(&model(9, 3), (0, 1), 32).unwrap();
        assert_eq!(part.cut(Shard::Row, Role::Down), None);
        assert_eq!(part.local(&model(9, 3)), model(9, 3));
    }

    proptest! {
        #[test]
        fn every_query_head_is_on_one_rank_beside_its_kv_head(
            groups in 1usize..10, group in 1usize..9, ranks in 2usize..20,
        ) {
            let config = model(groups * group, groups);
            let mut seen = vec![0; config.num_heads];
            for rank in 0..ranks.min(config.num_heads) {
                let ranks = ranks.min(config.num_heads);
                if ranks == 1 { continue; }
                let part = Partition::with_multiple(&config, (rank, ranks), 32).unwrap();
                let local = part.local(&config);
                prop_assert!(local.num_heads.is_multiple_of(local.num_kv_heads));
                let shared = local.num_heads / local.num_kv_heads;
                for at in 0..part.query_heads.len {
                    let head = part.query_heads.start + at;
                    seen[head] += 1;
                    prop_assert!(at / shared < part.kv_heads.len);
                    prop_assert_eq!(part.kv_heads.start + at / shared, head / group);
                }
            }
            if ranks.min(config.num_heads) > 1 {
                prop_assert!(seen.iter().all(|count| *count == 1), "{:?}", seen);
            }
        }
    }
}
