#![allow(clippy::unwrap_used, missing_docs)] // Tests fail by panicking.

use super::*;
use crate::{
    kv_cache::BlockId,
    model_runner::{SeqInput, Slot},
    models::{
        config::{RopeConfig, RopeScaling},
        registry::Architecture,
    },
};

fn model() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::from_hf("LlamaForCausalLM").unwrap(),
        vocab_size: 100,
        hidden_size: 32,
        intermediate_size: 64,
        num_layers: 2,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 16,
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

fn config(kv_cache: KvCacheSize, max_model_len: Option<u32>) -> CpuRunnerConfig {
    CpuRunnerConfig {
        kv_cache,
        max_model_len,
        max_num_seqs: 4,
        max_num_batched_tokens: 32,
        ..Default::default()
    }
}

#[test]
fn the_pool_is_sized_by_one_formula() {
    let model = model();
    // 2 layers × (K and V) × 16 values × 2 bytes.
    let sized = |kv_cache, len| limits(&config(kv_cache, len), &model, KvDtype::Float16, 1);
    let auto = sized(KvCacheSize::Auto, None).unwrap();
    assert_eq!(
        (auto.kv_bytes_per_token, auto.num_blocks, auto.max_model_len),
        (128, 4 * 16 + 1, 256)
    );
    let f32 = limits(
        &config(KvCacheSize::Auto, None),
        &model,
        KvDtype::Float32,
        1,
    )
    .unwrap();
    assert_eq!(f32.kv_bytes_per_token, 256);
    // Three ranks hold three times as much; the memory is that of all.
    let three = limits(
        &config(KvCacheSize::Auto, None),
        &model,
        KvDtype::Float16,
        3,
    )
    .unwrap();
    assert_eq!(
        (three.kv_bytes_per_token, three.num_blocks),
        (384, auto.num_blocks)
    );
    let bytes = sized(KvCacheSize::Bytes(128 * 16 * 10 + 5), Some(144)).unwrap();
    assert_eq!((bytes.num_blocks, bytes.max_model_len), (10, 144));
    // Without a length, the model's is lowered to what fits; an explicit one that does not fit is an error.
    assert_eq!(
        sized(KvCacheSize::Blocks(10), None).unwrap().max_model_len,
        144
    );
    let message = sized(KvCacheSize::Blocks(10), Some(145))
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("holds 144 tokens, and --max-model-len is 145"),
        "{message}"
    );
    assert!(sized(KvCacheSize::Blocks(1), None).is_err());
    assert!(matches!(
        sized(KvCacheSize::Auto, Some(257)),
        Err(CpuRunnerError::TooLong {
            asked: 257,
            model: 256
        })
    ));
    assert!(matches!(
        sized(KvCacheSize::Auto, Some(0)),
        Err(CpuRunnerError::Zero {
            name: "--max-model-len"
        })
    ));
}

fn step() -> ModelInput {
    ModelInput {
        token_ids: vec![5, 6, 7],
        positions: vec![0, 1, 9],
        slot_mapping: vec![16, 17, -1],
        seqs: vec![
            SeqInput {
                slot: Slot(0),
                query_start: 0,
                query_len: 2,
                context_len: 2,
                block_table: vec![BlockId(1)],
            },
            SeqInput {
                slot: Slot(3),
                query_start: 2,
                query_len: 1,
                context_len: 10,
                block_table: vec![BlockId(2)],
            },
        ],
        logit_rows: vec![1, 2],
        ..ModelInput::default()
    }
}

#[test]
fn a_step_outside_the_limits_is_refused_before_it_runs() {
    let limits = limits(
        &config(KvCacheSize::Blocks(10), None),
        &model(),
        KvDtype::Float16,
        1,
    )
    .unwrap();
    check(&step(), &limits).unwrap();
    type Damage = fn(&mut ModelInput);
    let cases: [(Damage, &str); 13] = [
        (|step| *step = ModelInput::default(), "number of rows"),
        (|step| step.token_ids[0] = 100, "outside the vocabulary"),
        (
            |step| step.positions.truncate(2),
            "lengths of the row arrays",
        ),
        (|step| step.positions[0] = 144, "a position is too large"),
        (|step| step.slot_mapping[0] = 160, "a cache slot is outside"),
        (|step| step.slot_mapping[0] = -2, "a cache slot is outside"),
        (|step| step.logit_rows = vec![1, 1], "do not ascend"),
        (|step| step.logit_rows = vec![3], "outside the step"),
        (|step| step.seqs[1].query_start = 1, "in order"),
        (|step| step.seqs.truncate(1), "do not cover the rows"),
        (
            |step| step.seqs[1].context_len = 17,
            "a block table is too short",
        ),
        (
            |step| step.seqs[1].block_table[0] = BlockId(10),
            "a block is outside",
        ),
        (|step| step.seqs[1].slot = Slot(4), "a slot is outside"),
    ];
    for (change, expected) in cases {
        let mut step = step();
        change(&mut step);
        let message = check(&step, &limits).unwrap_err().message;
        assert!(
            message.contains(expected),
            "{message:?} should contain {expected:?}"
        );
    }
}
