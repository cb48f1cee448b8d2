//! A model's files: opened, read and loaded as for serving.

use std::{
    fs,
    path::{Path, PathBuf},
};

use ashlar::{
    model_runner::{CpuRunner, CpuRunnerConfig, KvCacheSize},
    models::config::ModelConfig,
    tokenizer::Tokenizer,
    weights::Checkpoint,
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Larger models are not loaded: their memory would be the input's right.
const MAX_WIDTH: usize = 1024;

/// Where the inputs of a target become files, until the thread ends. Targets run side by side in tests, and a file that another
/// writes anew while it is mapped is a bus error.
fn folder(target: &str) -> PathBuf {
    thread_local! {
        static FOLDER: TempDir = crate::scratch();
    }
    let own = FOLDER.with(|folder| folder.path().join(target));
    fs::create_dir_all(&own).expect("a folder can be made");
    own
}

fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).expect("the input can be written");
}

fn read(path: &Path) {
    let Ok(checkpoint) = Checkpoint::open(path) else {
        return;
    };
    if let Checkpoint::Gguf(gguf) = &checkpoint {
        for name in gguf.tensor_names() {
            let tensor = checkpoint.tensor(name).expect("a listed tensor is there");
            let tensor = tensor.expect("a listed tensor is there");
            assert_eq!(
                tensor.row_bytes() * tensor.rows,
                tensor.data.len(),
                "{name}: whole rows"
            );
            let _ = tensor.to_f32();
        }
        // Built from the metadata alone.
        let _ = Tokenizer::from_checkpoint(&checkpoint);
    }
    let Ok(config) = ModelConfig::from_checkpoint(&checkpoint) else {
        return;
    };
    let widths = [
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
        config.qkv_size(),
        config.attention_size(),
    ];
    if widths.iter().any(|width| *width > MAX_WIDTH) || config.num_layers > 4 {
        return;
    }
    drop(checkpoint);
    let runner = CpuRunner::new(&CpuRunnerConfig {
        path: path.to_owned(),
        kv_cache: KvCacheSize::Blocks(3),
        max_num_seqs: 1,
        max_num_batched_tokens: 16,
        threads: 1,
        ..CpuRunnerConfig::default()
    });
    drop(runner);
}

/// A whole GGUF file.
pub(crate) fn gguf(data: &[u8]) {
    let file = folder("gguf").join("model.gguf");
    write(&file, data);
    read(&file);
}

/// `CONFIG \0 SAFETENSORS`: a Hugging Face folder.
pub(crate) fn safetensors(data: &[u8]) {
    let (config, tensors) = crate::halves(data);
    let folder = folder("safetensors");
    write(&folder.join("config.json"), config);
    write(&folder.join("model.safetensors"), tensors);
    read(&folder);
}

/// `QUANTIZATION_CONFIG \0 SAFETENSORS`: the folder of a small model in four bits or in eight-bit floats.
pub(crate) fn quantization(data: &[u8]) {
    let (quantization, tensors) = crate::halves(data);
    let Ok(quantization) = serde_json::from_slice::<Value>(quantization) else {
        return;
    };
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32, "tie_word_embeddings": true, "quantization_config": quantization,
    });
    let folder = folder("quantization");
    write(&folder.join("config.json"), config.to_string().as_bytes());
    write(&folder.join("model.safetensors"), tensors);
    read(&folder);
}
