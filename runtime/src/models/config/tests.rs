#![allow(clippy::unwrap_used, missing_docs)] // Tests fail by panicking.

use serde_json::{Value, json};

use super::*;

fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128, "rope_theta": 500000.0, "eos_token_id": [3, 2], "hidden_act": "silu",
    })
}

fn with(mut config: Value, changes: Value) -> Value {
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn parse(config: &Value) -> Result<ModelConfig, WeightsError> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    // An empty safetensors file: a header of two bytes.
    std::fs::write(
        folder.path().join("model.safetensors"),
        b"\x02\0\0\0\0\0\0\0{}",
    )
    .unwrap();
    ModelConfig::from_checkpoint(&Checkpoint::open(folder.path())?)
}

#[test]
fn reads_llama() {
    let config = parse(&llama()).unwrap();
    assert_eq!(
        (config.head_dim, config.qkv_size(), config.attention_size()),
        (16, 128, 64)
    );
    assert_eq!(config.eos_token_ids, [2, 3]);
    assert_eq!(
        config.rope,
        RopeConfig {
            theta: 500_000.0,
            scaling: RopeScaling::None
        }
    );
    assert!(!config.tie_embeddings && !config.qkv_bias && config.sliding_window.is_none());
}

#[test]
fn reads_the_family() {
    let mistral = json!({"architectures": ["MistralForCausalLM"], "sliding_window": 32});
    assert_eq!(
        parse(&with(llama(), mistral)).unwrap().sliding_window,
        Some(32)
    );
    let qwen2 = json!({
        "architectures": ["Qwen2ForCausalLM"], "sliding_window": 32, "use_sliding_window": false,
        "max_window_layers": 1, "tie_word_embeddings": true, "eos_token_id": 7,
    });
    let qwen2 = parse(&with(llama(), qwen2)).unwrap();
    assert!(qwen2.qkv_bias && qwen2.tie_embeddings && qwen2.sliding_window.is_none());
    assert_eq!(qwen2.eos_token_ids, [7]);
    let qwen3 = parse(&with(
        llama(),
        json!({"architectures": ["Qwen3ForCausalLM"], "head_dim": 32}),
    ))
    .unwrap();
    assert!(qwen3.architecture.qk_norm);
    assert_eq!(qwen3.attention_size(), 128);
}

#[test]
fn refuses_what_it_would_compute_wrongly() {
    let cases = [
        (
            json!({"architectures": ["FooForCausalLM"]}),
            "FooForCausalLM",
        ),
        (json!({"num_key_value_heads": 3}), "do not divide"),
        (json!({"num_key_value_heads": 0}), "num_kv_heads is 0"),
        (json!({"head_dim": 15}), "needs it even"),
        (json!({"num_hidden_layers": 5000}), "5000 layers"),
        (json!({"vocab_size": 99999999}), "vocab_size is 99999999"),
        (json!({"vocab_size": -1}), "not a valid config.json"),
        (json!({"hidden_act": "gelu"}), "gelu"),
        (
            json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
            "yarn",
        ),
        (
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
            "lacks low_freq_factor",
        ),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 0.0}}),
            "out of range",
        ),
        (json!({"rope_theta": -5.0}), "out of range"),
        (
            json!({"quantization_config": {"quant_method": "bitsandbytes"}}),
            "the method bitsandbytes",
        ),
        (
            json!({"quantization_config": {"quant_method": "awq", "bits": 3}}),
            "3 bits",
        ),
        (
            json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 1}),
            "only some layers",
        ),
    ];
    for (changes, expected) in cases {
        let message = parse(&with(llama(), changes)).unwrap_err().to_string();
        assert!(
            message.contains(expected),
            "{message:?} should contain {expected:?}"
        );
    }
}

#[test]
fn llama3_keeps_high_and_divides_low_frequencies() {
    let scaling = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    let config = parse(&with(
        llama(),
        json!({"rope_scaling": scaling, "head_dim": 128}),
    ))
    .unwrap();
    let scaled = config.rope.inverse_frequencies(128);
    let plain = RopeConfig {
        theta: config.rope.theta,
        scaling: RopeScaling::None,
    }
    .inverse_frequencies(128);
    assert_eq!(scaled[0], 1.0);
    assert_eq!(scaled[20], plain[20]);
    assert!((scaled[63] / plain[63] - 0.125).abs() < 1e-12);
    // Wavelengths per context at pair 32: 8192 / (2π·√500000) = 1.8438, blended by (1.8438 − 1) / 3.
    let blend = (8192.0 / (2.0 * std::f64::consts::PI * 500_000f64.sqrt()) - 1.0) / 3.0;
    assert!((scaled[32] / plain[32] - ((1.0 - blend) / 8.0 + blend)).abs() < 1e-12);
    // Newer files nest the base beside the scaling.
    let nested = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}});
    assert_eq!(parse(&with(llama(), nested)).unwrap().rope.theta, 777.0);
}
