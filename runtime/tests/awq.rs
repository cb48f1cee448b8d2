//! A real AWQ checkpoint of the default model (`examples/make_awq`) on the CPU: what is served is what the file says, in
//! whichever four-bit layout it says it.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)] // Tests fail by panicking.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
};

use ashlar::{
    bench::perplexity::{Perplexity, perplexity},
    config::{EngineArgs, Quantization},
    engine::request::{SamplingParams, TokenId},
    llm::{Llm, LoadError},
    model_runner::{CpuRunner, CpuRunnerConfig, Dtype, KvCacheSize, KvDtype},
    tokenizer::Tokenizer,
    weights::{Checkpoint, Int4Matrix, Int4Scheme, SafetensorsFolder},
};
use ashlar_kernels::e4m3;
use common::{Driver, Item, model_path};
use safetensors::{Dtype as StoredType, tensor::TensorView};
use serde_json::{Value, json};

/// The bar for every quantised path against its own dequantised weights.
const MAX_SERVED_CHANGE_PERCENT: f64 = 0.5;
/// What four bits may cost a model this small: 13 % were measured.
const MAX_QUANTISED_CHANGE_PERCENT: f64 = 16.0;
const QUESTION: &str =
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n";

fn awq_path() -> PathBuf {
    let path = std::env::var_os("ASHLAR_TEST_AWQ_MODEL").map(PathBuf::from);
    path.expect(
        "this test runs the default model's AWQ checkpoint: set ASHLAR_TEST_AWQ_MODEL to the folder that \
         `e2e/cluster/awq.sh` prints (`make test` does that by itself)",
    )
}

fn config(path: &Path, dtype: Dtype) -> CpuRunnerConfig {
    CpuRunnerConfig {
        path: path.to_owned(),
        dtype,
        kv_cache: KvCacheSize::Blocks(130),
        max_num_seqs: 4,
        max_num_batched_tokens: 256,
        max_model_len: Some(2048),
        ..CpuRunnerConfig::default()
    }
}

fn runner(path: &Path, dtype: Dtype) -> CpuRunner {
    CpuRunner::new(&config(path, dtype)).unwrap()
}

/// Tokens of the test text, by the checkpoint's tokenizer, which must be the original's.
fn passage() -> Vec<TokenId> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/passage.txt");
    let text = fs::read_to_string(path).unwrap();
    let [tokens, original] = [awq_path(), model_path()].map(|model| {
        let tokenizer = Tokenizer::from_model_path(&model).unwrap();
        tokenizer.encode(&text, false).unwrap()
    });
    assert_eq!(tokens, original);
    tokens
}

#[test]
fn what_is_served_has_the_perplexity_of_the_dequantised_weights() {
    let tokens = passage();
    let measure = |path: &Path, dtype| -> Perplexity {
        perplexity(&mut runner(path, dtype), &[], &tokens, 2048).unwrap()
    };
    let (awq, original) = (awq_path(), model_path());
    let served = measure(&awq, Dtype::Auto);
    let exact = measure(&awq, Dtype::Float32);
    let before = measure(&original, Dtype::Float32);
    let (change, cost) = (served.percent_above(&exact), exact.percent_above(&before));
    println!(
        "perplexity of {} tokens: unquantised {:.4}, AWQ exact {:.4} ({cost:+.2} %), AWQ as served {:.4} ({change:+.4} %)",
        served.tokens, before.perplexity, exact.perplexity, served.perplexity
    );
    assert!(change.abs() <= MAX_SERVED_CHANGE_PERCENT);
    assert!((0.0..=MAX_QUANTISED_CHANGE_PERCENT).contains(&cost));
}

#[test]
fn the_flag_and_automatic_detection_give_the_same_answer_and_a_wrong_flag_is_refused() {
    let open = |quantization| {
        let model = awq_path().display().to_string();
        Llm::new(EngineArgs {
            quantization,
            max_num_seqs: Some(2),
            max_model_len: Some(256),
            ..EngineArgs::new(model)
        })
    };
    let params = SamplingParams {
        temperature: 0.0,
        max_tokens: 24,
        ..SamplingParams::default()
    };
    let mut answers = [Quantization::Auto, Quantization::Awq].map(|quantization| {
        let llm = open(quantization).unwrap();
        llm.generate(&[QUESTION], &params).unwrap().remove(0).text
    });
    assert!(answers[0].contains("Paris"), "{answers:?}");
    answers.sort();
    assert_eq!(answers[0], answers[1]);
    for wrong in [Quantization::Gptq, Quantization::Gguf, Quantization::None] {
        let error = open(wrong).expect_err("refused");
        assert!(matches!(error, LoadError::Quantization { .. }), "{error}");
        assert!(error.to_string().contains("which is AWQ"), "{error}");
    }
}

/// Name, type, shape and bytes of a tensor to write.
type Stored = (String, StoredType, Vec<usize>, Vec<u8>);

fn words(values: impl Iterator<Item = u32>) -> Vec<u8> {
    values.flat_map(u32::to_le_bytes).collect()
}

/// Eight values to a word, lowest nibble first.
fn pack(values: &[u8]) -> u32 {
    let nibbles = values.iter().enumerate();
    nibbles.fold(0, |word, (i, value)| word | u32::from(*value) << (4 * i))
}

fn halves(values: impl Iterator<Item = half::f16>) -> Vec<u8> {
    values.flat_map(half::f16::to_le_bytes).collect()
}

fn as_gptq(name: &str, m: &Int4Matrix) -> Vec<Stored> {
    let (n, k, groups) = (m.rows, m.columns, m.columns / m.group);
    let qweight = (0..k / 8).flat_map(|word| (0..n).map(move |row| m.qweight[row * k / 8 + word]));
    let zeros: Vec<u8> = m
        .zeros
        .iter()
        .map(|zero| zero.wrapping_sub(1) & 15)
        .collect();
    let order = (0..k).map(|input| (input / m.group) as u32);
    let stored = |suffix, kind, shape, data| (format!("{name}.{suffix}"), kind, shape, data);
    vec![
        stored("qweight", StoredType::I32, vec![k / 8, n], words(qweight)),
        stored(
            "qzeros",
            StoredType::I32,
            vec![groups, n / 8],
            words(zeros.chunks(8).map(pack)),
        ),
        stored(
            "scales",
            StoredType::F16,
            vec![groups, n],
            halves(m.scales.iter().copied()),
        ),
        stored("g_idx", StoredType::I32, vec![k], words(order)),
    ]
}

fn as_compressed_tensors(name: &str, m: &Int4Matrix) -> Vec<Stored> {
    let (n, k, groups) = (m.rows, m.columns, m.columns / m.group);
    let scales = (0..n).flat_map(|row| (0..groups).map(move |group| m.scales[group * n + row]));
    let zeros = (0..n / 8)
        .flat_map(|word| (0..groups).map(move |group| pack(&m.zeros[group * n + 8 * word..][..8])));
    let shape = [n as u64, k as u64].into_iter().flat_map(u64::to_le_bytes);
    let stored = |suffix, kind, shape, data| (format!("{name}.{suffix}"), kind, shape, data);
    let qweight = words(m.qweight.iter().copied());
    vec![
        stored("weight_packed", StoredType::I32, vec![n, k / 8], qweight),
        stored(
            "weight_scale",
            StoredType::F16,
            vec![n, groups],
            halves(scales),
        ),
        stored(
            "weight_zero_point",
            StoredType::I32,
            vec![n / 8, groups],
            words(zeros),
        ),
        stored("weight_shape", StoredType::I64, vec![2], shape.collect()),
    ]
}

/// Writes the AWQ checkpoint in another layout.
fn convert(into: &Path, quantization: Value, layout: impl Fn(&str, &Int4Matrix) -> Vec<Stored>) {
    let from = awq_path();
    let source = SafetensorsFolder::open(&from).unwrap();
    let mut config = source.config().clone();
    let scheme = Int4Scheme::from_config(&config["quantization_config"]).unwrap();
    config["quantization_config"] = quantization;
    fs::write(into.join("config.json"), config.to_string()).unwrap();
    let file = fs::read(from.join("model.safetensors")).unwrap();
    let mut tensors: Vec<Stored> = Vec::new();
    for (name, tensor) in safetensors::SafeTensors::deserialize(&file)
        .unwrap()
        .tensors()
    {
        if let Some(name) = name.strip_suffix(".qweight") {
            let shape = (8 * tensor.shape()[1], tensor.shape()[0]);
            let matrix = Int4Matrix::read(&scheme, name, shape, |name| source.stored(name));
            tensors.extend(layout(name, &matrix.unwrap()));
        } else if !name.ends_with(".qzeros") && !name.ends_with(".scales") {
            tensors.push((
                name,
                tensor.dtype(),
                tensor.shape().to_vec(),
                tensor.data().to_vec(),
            ));
        }
    }
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    safetensors::serialize_to_file(views, None, &into.join("model.safetensors")).unwrap();
}

#[test]
fn the_same_weights_in_every_layout_give_the_same_bits() {
    let tokens = &passage()[..48];
    let logits = |path: &Path| {
        let mut driver = Driver::new(runner(path, Dtype::Auto));
        let item = Item {
            slot: 0,
            tokens,
            logits: tokens.len(),
        };
        driver.step(&[item]).remove(0).0
    };
    let expected = logits(&awq_path());
    let gptq = json!({"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": false, "sym": false});
    let compressed = json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "int", "symmetric": false, "strategy": "group", "group_size": 64,
        }}},
        "ignore": ["lm_head"],
    });
    let folder = tempfile::tempdir().unwrap();
    convert(folder.path(), gptq, as_gptq);
    assert!(logits(folder.path()) == expected, "GPTQ");
    let folder = tempfile::tempdir().unwrap();
    convert(folder.path(), compressed, as_compressed_tensors);
    assert!(logits(folder.path()) == expected, "compressed-tensors");
}

/// Eight-bit floats with a scale for each row, or for blocks of 128 × 128.
fn as_fp8(name: &str, m: &Int4Matrix, block: Option<usize>) -> Vec<Stored> {
    let (n, k) = (m.rows, m.columns);
    let (height, width) = block.map_or((1, k), |block| (block, block));
    let values = m.dequantize();
    let across = k.div_ceil(width);
    let mut scales = vec![1e-20f32; n.div_ceil(height) * across];
    let place = |at: usize| at / k / height * across + at % k / width;
    for (at, value) in values.iter().enumerate() {
        let scale = &mut scales[place(at)];
        *scale = scale.max(value.abs() / e4m3::MAX);
    }
    let data = values.iter().enumerate();
    let data = data.map(|(at, value)| e4m3::narrow(value / scales[place(at)]));
    let scale_bytes = scales.iter().flat_map(|scale| scale.to_le_bytes());
    let (suffix, shape) = match block {
        None => ("weight_scale", vec![n, 1]),
        Some(_) => ("weight_scale_inv", vec![n.div_ceil(height), across]),
    };
    vec![
        (
            format!("{name}.weight"),
            StoredType::F8_E4M3,
            vec![n, k],
            data.collect(),
        ),
        (
            format!("{name}.{suffix}"),
            StoredType::F32,
            shape,
            scale_bytes.collect(),
        ),
    ]
}

fn as_bf16(name: &str, m: &Int4Matrix) -> Vec<Stored> {
    let values = m.dequantize();
    let values = values.iter().map(|value| half::bf16::from_f32(*value));
    let data = values.flat_map(half::bf16::to_le_bytes).collect();
    let shape = vec![m.rows, m.columns];
    vec![(format!("{name}.weight"), StoredType::BF16, shape, data)]
}

#[test]
fn eight_bit_floats_of_a_checkpoint_and_made_at_load_have_the_perplexity_of_exact_ones() {
    let tokens = &passage()[..700];
    let measure = |config: &CpuRunnerConfig| -> Perplexity {
        let mut runner = CpuRunner::new(config).unwrap();
        perplexity(&mut runner, &[], tokens, 2048).unwrap()
    };
    let before = measure(&config(&awq_path(), Dtype::Float32));
    let compressed = json!({
        "quant_method": "compressed-tensors", "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": true},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": true},
        }},
        "ignore": ["lm_head"],
    });
    let blocks = json!({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]});
    let cases: [(&str, Value, Option<usize>, bool); 3] = [
        ("compressed-tensors", compressed, None, false),
        ("fp8 in blocks", blocks, Some(128), false),
        ("fp8 made at load", Value::Null, None, true),
    ];
    for (what, quantization, block, online) in cases {
        let folder = tempfile::tempdir().unwrap();
        convert(folder.path(), quantization, |name, matrix| {
            if online {
                as_bf16(name, matrix)
            } else {
                as_fp8(name, matrix, block)
            }
        });
        let with = |dtype| CpuRunnerConfig {
            quantize_fp8: online,
            ..config(folder.path(), dtype)
        };
        let served = measure(&with(Dtype::Auto));
        let exact = measure(&with(Dtype::Float32));
        let (change, cost) = (served.percent_above(&exact), exact.percent_above(&before));
        println!(
            "perplexity of {} tokens: {what} exact {:.4} ({cost:+.2} % of four bits), as served {:.4} ({change:+.4} %)",
            served.tokens, exact.perplexity, served.perplexity
        );
        assert!(change.abs() <= MAX_SERVED_CHANGE_PERCENT, "{what}");
        assert!(cost.abs() <= 4.0 && cost != 0.0, "{what}");
    }
}

#[test]
fn a_cache_of_eight_bit_floats_costs_little() {
    let tokens = &passage()[..700];
    let measure = |kv_dtype| -> Perplexity {
        let config = CpuRunnerConfig {
            kv_dtype,
            ..config(&awq_path(), Dtype::Auto)
        };
        let mut runner = CpuRunner::new(&config).unwrap();
        perplexity(&mut runner, &[], tokens, 2048).unwrap()
    };
    let (halves, eight) = (measure(KvDtype::Auto), measure(KvDtype::Fp8));
    let cost = eight.percent_above(&halves);
    println!(
        "perplexity of {} tokens: K and V in 16 bits {:.4}, in 8 bits {:.4} ({cost:+.2} %)",
        halves.tokens, halves.perplexity, eight.perplexity
    );
    assert!(cost.abs() <= 2.0 && cost != 0.0);
}

#[test]
fn a_checkpoint_without_a_scale_is_refused_by_the_tensors_name() {
    let folder = tempfile::tempdir().unwrap();
    let awq = json!({"quant_method": "gptq", "bits": 4, "group_size": 64});
    convert(folder.path(), awq, |name, matrix| {
        let mut tensors = as_gptq(name, matrix);
        tensors.retain(|(tensor, ..)| tensor != "model.layers.17.mlp.down_proj.scales");
        tensors
    });
    assert!(Checkpoint::open(folder.path()).is_ok());
    let error = CpuRunner::new(&CpuRunnerConfig {
        path: folder.path().to_owned(),
        ..CpuRunnerConfig::default()
    })
    .err()
    .expect("refused");
    let message = error.to_string();
    assert!(
        message.contains("model.layers.17.mlp.down_proj.scales is missing"),
        "{message}"
    );
}

#[test]
fn a_truncated_checkpoint_is_refused_by_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let from = awq_path();
    fs::copy(from.join("config.json"), folder.path().join("config.json")).unwrap();
    let file = fs::read(from.join("model.safetensors")).unwrap();
    let to = folder.path().join("model.safetensors");
    for len in [0, 7, 1000, file.len() / 2, file.len() - 1] {
        fs::write(&to, &file[..len]).unwrap();
        let message = Checkpoint::open(folder.path()).unwrap_err().to_string();
        assert!(
            message.contains("model.safetensors") && message.contains("download it again"),
            "{len} bytes: {message}"
        );
    }
}
