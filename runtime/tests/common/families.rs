//! Small random checkpoints of every family, and how tests run them.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, missing_docs)] // Each test file uses its own part.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
};

use ashlar::{
    engine::request::TokenId,
    model_runner::{CpuRunner, CpuRunnerConfig, Dtype, KvCacheSize, ModelRunner},
    weights::{Fp8Matrix, Fp8Scales, GgmlType, RawTensor},
};
use half::bf16;
use safetensors::{Dtype as TensorType, tensor::TensorView};
use serde_json::{Value, json};

use super::{Driver, Item, cosine_distance};

pub const VOCAB: usize = 1024;
pub const LAYERS: usize = 4;
pub const DECODED: usize = 24;

/// A family at a small size.
pub struct Family {
    pub name: &'static str,
    pub class: &'static str,
    pub hidden: usize,
    pub intermediate: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub tied: bool,
    pub extra: Value,
}

pub fn families() -> Vec<Family> {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64});
    let family =
        |name, class, (hidden, intermediate), (heads, kv_heads, head_dim), tied, extra| Family {
            name,
            class,
            hidden,
            intermediate,
            heads,
            kv_heads,
            head_dim,
            tied,
            extra,
        };
    vec![
        family(
            "llama3",
            "LlamaForCausalLM",
            (512, 1024),
            (8, 2, 64),
            false,
            json!({"rope_theta": 500_000.0, "rope_scaling": llama3}),
        ),
        family(
            "mistral",
            "MistralForCausalLM",
            (512, 896),
            (4, 1, 128),
            false,
            json!({"rope_theta": 10_000.0, "sliding_window": 48}),
        ),
        family(
            "qwen2",
            "Qwen2ForCausalLM",
            (448, 1216),
            (7, 1, 64),
            true,
            json!({"rope_theta": 1_000_000.0}),
        ),
        family(
            "qwen3",
            "Qwen3ForCausalLM",
            (256, 768),
            (4, 2, 128),
            true,
            json!({"rope_theta": 1_000_000.0}),
        ),
        family(
            "smollm2",
            "LlamaForCausalLM",
            (576, 1536),
            (9, 3, 64),
            true,
            json!({"rope_theta": 100_000.0}),
        ),
    ]
}

/// A stream of numbers that is the same everywhere.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    /// Uniform in `center ± half_width`, rounded to bf16.
    pub fn bf16s(&mut self, count: usize, center: f32, half_width: f32) -> Vec<u8> {
        (0..count)
            .flat_map(|_| {
                let unit = self.next() as f32 / (1u64 << 30) as f32 - 1.0;
                bf16::from_f32(center + half_width * unit).to_le_bytes()
            })
            .collect()
    }
}

/// Writes the family's checkpoint into a new folder.
pub fn checkpoint(family: &Family) -> PathBuf {
    // Tests of one process run at once.
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let folder = std::env::temp_dir().join(format!(
        "ashlar-models-{}-{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed),
        family.name
    ));
    fs::create_dir_all(&folder).unwrap();
    let mut config = json!({
        "architectures": [family.class], "model_type": family.class.trim_end_matches("ForCausalLM").to_lowercase(),
        "hidden_size": family.hidden, "intermediate_size": family.intermediate, "num_hidden_layers": LAYERS,
        "num_attention_heads": family.heads, "num_key_value_heads": family.kv_heads, "head_dim": family.head_dim,
        "rms_norm_eps": 1e-5, "vocab_size": VOCAB, "max_position_embeddings": 2048, "hidden_act": "silu",
        "tie_word_embeddings": family.tied, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    });
    let extra = family.extra.as_object().unwrap().clone();
    config.as_object_mut().unwrap().extend(extra);
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut numbers = Numbers(7);
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut matrix = |name: String, rows: usize, columns: usize, scale: f32| {
        let data = numbers.bf16s(rows * columns, 0.0, scale * (3.0 / columns as f32).sqrt());
        tensors.push((name, vec![rows, columns], data));
    };
    let (q, kv) = (
        family.heads * family.head_dim,
        family.kv_heads * family.head_dim,
    );
    matrix(
        "model.embed_tokens.weight".into(),
        VOCAB,
        family.hidden,
        8.0,
    );
    if !family.tied {
        matrix("lm_head.weight".into(), VOCAB, family.hidden, 2.0);
    }
    for layer in 0..LAYERS {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        // Keys and queries large enough that attention chooses.
        matrix(name("self_attn.q_proj"), q, family.hidden, 1.5);
        matrix(name("self_attn.k_proj"), kv, family.hidden, 1.5);
        matrix(name("self_attn.v_proj"), kv, family.hidden, 1.0);
        matrix(name("self_attn.o_proj"), family.hidden, q, 1.0);
        matrix(
            name("mlp.gate_proj"),
            family.intermediate,
            family.hidden,
            1.0,
        );
        matrix(name("mlp.up_proj"), family.intermediate, family.hidden, 1.0);
        matrix(
            name("mlp.down_proj"),
            family.hidden,
            family.intermediate,
            1.0,
        );
    }
    let mut vector = |name: String, len: usize, center: f32, half_width: f32| {
        let data = numbers.bf16s(len, center, half_width);
        tensors.push((name, vec![len], data));
    };
    vector("model.norm.weight".into(), family.hidden, 1.0, 0.2);
    for layer in 0..LAYERS {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        vector(name("input_layernorm.weight"), family.hidden, 1.0, 0.2);
        vector(
            name("post_attention_layernorm.weight"),
            family.hidden,
            1.0,
            0.2,
        );
        if family.class.starts_with("Qwen3") {
            vector(name("self_attn.q_norm.weight"), family.head_dim, 1.0, 0.2);
            vector(name("self_attn.k_norm.weight"), family.head_dim, 1.0, 0.2);
        }
        if family.class.starts_with("Qwen2") {
            vector(name("self_attn.q_proj.bias"), q, 0.0, 0.5);
            vector(name("self_attn.k_proj.bias"), kv, 0.0, 0.5);
            vector(name("self_attn.v_proj.bias"), kv, 0.0, 0.5);
        }
    }
    let views: HashMap<&str, TensorView<'_>> = tensors
        .iter()
        .map(|(name, shape, data)| {
            let view = TensorView::new(TensorType::BF16, shape.clone(), data).unwrap();
            (name.as_str(), view)
        })
        .collect();
    let bytes = safetensors::serialize(views, None).unwrap();
    fs::write(folder.join("model.safetensors"), bytes).unwrap();
    folder
}

/// Makes the matrices of the layers four-bit ones in AWQ's layout, of random bits.
pub fn quantize(folder: &Path, group: usize) {
    let mut numbers = Numbers(77);
    let awq = json!({"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"});
    replace_matrices(folder, awq, |matrix| {
        let (n, k) = (matrix.shape()[0], matrix.shape()[1]);
        let mut words = |count: usize, word: &dyn Fn(u64) -> u32| -> Vec<u8> {
            (0..count)
                .flat_map(|_| word(numbers.next() << 16 ^ numbers.next()).to_le_bytes())
                .collect()
        };
        let qweight = words(k * n / 8, &|random| random as u32);
        // Zeros of 7 or 8: the middle of 0..=15.
        let qzeros = words(k / group * n / 8, &|random| {
            0x7777_7777 + (random as u32 & 0x1111_1111)
        });
        // About as large as the weights that they replace: uniform in ±8 spreads by 4.6.
        let scale = 1.5 / (4.6 * (k as f32).sqrt());
        let scales = (0..k / group * n).flat_map(|_| {
            let unit = numbers.next() as f32 / (1u64 << 31) as f32;
            half::f16::from_f32(scale * (0.5 + unit)).to_le_bytes()
        });
        let scales = scales.collect();
        vec![
            ("qweight", TensorType::I32, vec![k, n / 8], qweight),
            ("qzeros", TensorType::I32, vec![k / group, n / 8], qzeros),
            ("scales", TensorType::F16, vec![k / group, n], scales),
        ]
    });
}

/// Rounds the matrices of the layers to eight-bit floats, a scale for each row, in compressed-tensors' layout; activations are
/// said to be in 16 bits.
pub fn round_to_fp8(folder: &Path) {
    let weights_alone = json!({
        "quant_method": "compressed-tensors", "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": true},
            "input_activations": null,
        }},
        "ignore": ["lm_head"],
    });
    replace_matrices(folder, weights_alone, |matrix| {
        let (n, k) = (matrix.shape()[0], matrix.shape()[1]);
        assert_eq!(matrix.dtype(), TensorType::BF16);
        let raw = RawTensor {
            kind: GgmlType::BF16,
            rows: n,
            columns: k,
            data: matrix.data().to_vec().into(),
        };
        let rounded = Fp8Matrix::quantize(&raw).unwrap();
        let Fp8Scales::Rows(scales) = &rounded.scales else {
            panic!("rows have a scale each")
        };
        let scales = scales.iter().flat_map(|scale| scale.to_le_bytes());
        let (data, scales) = (rounded.data.to_vec(), scales.collect());
        vec![
            ("weight", TensorType::F8_E4M3, vec![n, k], data),
            ("weight_scale", TensorType::F32, vec![n, 1], scales),
        ]
    });
}

/// The end of a tensor's name, its type, shape and bytes.
type Part = (&'static str, TensorType, Vec<usize>, Vec<u8>);

/// Has `make` store the matrices of the layers in another way, which the configuration says from now on.
fn replace_matrices(
    folder: &Path,
    quantization: Value,
    mut make: impl FnMut(&TensorView<'_>) -> Vec<Part>,
) {
    let file = fs::read(folder.join("model.safetensors")).unwrap();
    let stored = safetensors::SafeTensors::deserialize(&file).unwrap();
    let mut tensors: Vec<(String, TensorType, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, tensor) in stored.tensors() {
        let Some(name) = name.strip_suffix("_proj.weight") else {
            let (shape, data) = (tensor.shape().to_vec(), tensor.data().to_vec());
            tensors.push((name, tensor.dtype(), shape, data));
            continue;
        };
        for (suffix, kind, shape, data) in make(&tensor) {
            tensors.push((format!("{name}_proj.{suffix}"), kind, shape, data));
        }
    }
    let views = tensors.iter().map(|(name, kind, shape, data)| {
        (name, TensorView::new(*kind, shape.clone(), data).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    drop(stored);
    fs::write(folder.join("model.safetensors"), bytes).unwrap();
    let config = fs::read(folder.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config["quantization_config"] = quantization;
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

/// Settings of a CPU runner that every test's sequences fit.
pub fn cpu_config(path: &Path, dtype: Dtype) -> CpuRunnerConfig {
    CpuRunnerConfig {
        path: path.to_owned(),
        dtype,
        kv_cache: KvCacheSize::Blocks(1024),
        max_num_seqs: 32,
        max_num_batched_tokens: 2048,
        max_model_len: Some(2048),
        ..CpuRunnerConfig::default()
    }
}

pub fn cpu(path: &Path) -> Driver {
    Driver::new(CpuRunner::new(&cpu_config(path, Dtype::Float32)).unwrap())
}

pub fn prompt(seed: u64, len: usize) -> Vec<TokenId> {
    let mut numbers = Numbers(seed);
    (0..len)
        .map(|_| (numbers.next() % (VOCAB as u64 - 3) + 3) as TokenId)
        .collect()
}

/// Logits of every prompt position and of `DECODED` given tokens after it, the prompt in these pieces.
pub fn logits<R: ModelRunner>(
    driver: &mut Driver<R>,
    tokens: &[TokenId],
    pieces: &[usize],
) -> Vec<f32> {
    let (mut rest, after) = tokens.split_at(tokens.len() - DECODED);
    let mut all = Vec::new();
    let steps = pieces
        .iter()
        .copied()
        .chain([usize::MAX])
        .map_while(|size| {
            let (piece, left) = rest.split_at(size.min(rest.len()));
            rest = left;
            (!piece.is_empty()).then_some(piece)
        })
        .collect::<Vec<_>>();
    for piece in steps.into_iter().chain(after.chunks(1)) {
        // No more rows of logits than a step may have.
        for part in piece.chunks(200) {
            let item = Item {
                slot: 3,
                tokens: part,
                logits: part.len(),
            };
            all.extend(driver.step(&[item]).remove(0).0);
        }
    }
    driver.finish(3);
    all
}

/// Mean and largest `1 − cosine` over the positions.
pub fn distance(a: &[f32], b: &[f32]) -> (f64, f64) {
    assert_eq!(a.len(), b.len());
    let (mut sum, mut worst) = (0f64, 0f64);
    for (a, b) in a.chunks_exact(VOCAB).zip(b.chunks_exact(VOCAB)) {
        let distance = cosine_distance(a, b);
        assert!(distance.is_finite(), "logits that are no numbers");
        sum += distance;
        worst = worst.max(distance);
    }
    (sum / (a.len() / VOCAB) as f64, worst)
}

/// Greedy tokens and logits of several sequences that decode together.
pub fn together<R: ModelRunner>(
    driver: &mut Driver<R>,
    prompts: &[Vec<TokenId>],
) -> (Vec<u32>, Vec<TokenId>) {
    let (mut bits, mut tokens) = (Vec::new(), Vec::new());
    let mut next: Vec<Vec<TokenId>> = prompts.to_vec();
    for _ in 0..DECODED {
        let items: Vec<Item<'_>> = next
            .iter()
            .zip(0..)
            .map(|(tokens, slot)| Item {
                slot,
                tokens,
                logits: 1,
            })
            .collect();
        let results = driver.step(&items);
        next = results
            .iter()
            .map(|(_, token)| vec![token.unwrap()])
            .collect();
        for (logits, token) in results {
            bits.extend(logits.iter().map(|logit| logit.to_bits()));
            tokens.extend(token);
        }
    }
    (0..).zip(prompts).for_each(|(slot, _)| driver.finish(slot));
    (bits, tokens)
}
