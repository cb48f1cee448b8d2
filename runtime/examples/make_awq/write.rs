//! The files of a checkpoint as AWQ's tools write them.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::Context;
use ashlar::{
    models::{
        config::{ModelConfig, RopeScaling},
        decoder::Decoder,
        registry::HF_WEIGHTS,
    },
    tokenizer::Tokenizer,
};
use half::f16;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::json;

use crate::{
    record::Recorder,
    search::{Quantized, QuantizedModel},
};

/// Which of eight columns the nibbles of a word hold, lowest first.
const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// Writes `config.json`, `model.safetensors` and the tokenizer's files.
pub(crate) fn checkpoint(
    folder: &Path,
    model: &QuantizedModel,
    decoder: &Decoder<Recorder>,
    config: &ModelConfig,
    tokenizer: &Tokenizer,
    group: usize,
) -> anyhow::Result<()> {
    fs::create_dir_all(folder)?;
    let tensors = tensors(model, decoder, group);
    let views = tensors.iter().map(|(name, (dtype, shape, data))| {
        let view = TensorView::new(*dtype, shape.clone(), data);
        view.map(|view| (name.as_str(), view))
    });
    let views = views.collect::<Result<Vec<_>, _>>()?;
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors"))
        .context("cannot write model.safetensors")?;
    let write = |name: &str, value: &serde_json::Value| {
        fs::write(folder.join(name), serde_json::to_string_pretty(value)?)
            .with_context(|| format!("cannot write {name}"))
    };
    write("config.json", &config_json(config, group)?)?;
    fs::write(folder.join("tokenizer.json"), tokenizer.to_json()?)?;
    let mut named: serde_json::Map<String, serde_json::Value> = tokenizer
        .named_tokens()
        .into_iter()
        .filter_map(|(name, text)| Some((name.to_owned(), json!(text?))))
        .collect();
    named.insert("chat_template".to_owned(), json!(tokenizer.chat_template()));
    write("tokenizer_config.json", &named.into())?;
    write(
        "generation_config.json",
        &json!({"eos_token_id": config.eos_token_ids}),
    )
}

fn config_json(config: &ModelConfig, group: usize) -> anyhow::Result<serde_json::Value> {
    anyhow::ensure!(
        config.rope.scaling == RopeScaling::None,
        "this tool writes no rope_scaling"
    );
    anyhow::ensure!(!config.qkv_bias, "this tool writes no biases");
    Ok(json!({
        "architectures": [config.architecture.hf_class],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "eos_token_id": config.eos_token_ids,
        "torch_dtype": "float16",
        "quantization_config": {
            "quant_method": "awq", "bits": 4, "group_size": group, "zero_point": true, "version": "gemm",
            "modules_to_not_convert": null,
        },
    }))
}

fn tensors(model: &QuantizedModel, decoder: &Decoder<Recorder>, group: usize) -> Tensors {
    let mut tensors = Tensors::new();
    let mut plain = |name: String, shape: Vec<usize>, values: &[f32]| {
        let bytes = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes());
        tensors.insert(name, (Dtype::F16, shape, bytes.collect()));
    };
    let mut vocabulary = |name: &str, packed: &ashlar_kernels::cpu::PackedMatrix| {
        let (rows, columns) = (packed.rows(), packed.columns());
        let mut values = vec![0.0; rows * columns];
        for (row, values) in values.chunks_exact_mut(columns).enumerate() {
            packed.dequantize_row(row, values);
        }
        plain(format!("{name}.weight"), vec![rows, columns], &values);
    };
    let names = &HF_WEIGHTS;
    vocabulary(names.embedding.parts[0].name, &decoder.embedding.parts[0]);
    if let Some(head) = &decoder.head {
        vocabulary(names.head.parts[0].name, &head.parts[0]);
    }
    let mut norm = |template: &str, layer: usize, values: &[f32]| {
        let name = template.replace("{}", &layer.to_string());
        plain(name, vec![values.len()], values);
    };
    norm(names.final_norm, 0, &decoder.final_norm);
    for (index, (layer, source)) in model.layers.iter().zip(&decoder.layers).enumerate() {
        norm(names.input_norm, index, &layer.input_norm);
        norm(names.post_attention_norm, index, &layer.post_attention_norm);
        if let Some(norms) = &source.head_norms {
            norm(names.query_norm, index, &norms.query);
            norm(names.key_norm, index, &norms.key);
        }
    }
    for (index, layer) in model.layers.iter().enumerate() {
        let entries = [
            &names.qkv,
            &names.attention_output,
            &names.gate_up,
            &names.down,
        ];
        let parts = entries.iter().flat_map(|entry| entry.parts);
        for (part, matrix) in parts.zip(&layer.matrices) {
            let name = part.name.replace("{}", &index.to_string());
            tensors.extend(matrix.tensors(&name, group));
        }
    }
    tensors
}

impl Quantized {
    /// `qweight`, `qzeros` and `scales`.
    fn tensors(&self, name: &str, group: usize) -> Tensors {
        let (n, k, groups) = (self.rows, self.columns, self.columns / group);
        let qweight = packed(k, n, |input, output| self.q[output * k + input]);
        let qzeros = packed(groups, n, |at, output| self.zeros[output * groups + at]);
        let scales = (0..groups).flat_map(|at| {
            (0..n).flat_map(move |output| self.scales[output * groups + at].to_le_bytes())
        });
        [
            ("qweight", (Dtype::I32, vec![k, n / 8], qweight)),
            ("qzeros", (Dtype::I32, vec![groups, n / 8], qzeros)),
            ("scales", (Dtype::F16, vec![groups, n], scales.collect())),
        ]
        .into_iter()
        .map(|(suffix, tensor)| (format!("{name}.{suffix}"), tensor))
        .collect()
    }
}

/// `[rows, columns / 8]` words.
fn packed(rows: usize, columns: usize, at: impl Fn(usize, usize) -> u8) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(rows * columns / 2);
    for row in 0..rows {
        for first in (0..columns).step_by(8) {
            let nibbles = ORDER.iter().enumerate();
            let word = nibbles.fold(0u32, |word, (i, column)| {
                word | u32::from(at(row, first + column)) << (4 * i)
            });
            bytes.extend(word.to_le_bytes());
        }
    }
    bytes
}
