//! Whole models on the GPU: the families' logits against the CPU's exact mode, launches one by one against graphs bit
//! for bit, and chunked prompts and batches against runs alone. Checkpoints are small, random, and made here; beside them the
//! default model, where its file is at hand.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)] // Tests fail by panicking.

mod common;
#[path = "gpu_models/default_model.rs"]
mod default_model;
#[path = "gpu_models/fp8_cache.rs"]
mod fp8_cache;
#[path = "gpu_models/invariant.rs"]
mod invariant;
#[path = "gpu_models/quantized.rs"]
mod quantized;

use std::{fs, path::Path};

use ashlar::{
    engine::request::TokenId,
    model_runner::{
        RankedRunner,
        cuda::{self, CudaRunner, CudaRunnerConfig, Float, KvDtype},
    },
    models::loader::LoadFormat,
};
use common::{
    Driver,
    families::{
        DECODED, Family, checkpoint, cpu, distance, families, logits, prompt, quantize, together,
    },
};
use serde_json::json;

fn config(path: &Path, float: Float, enforce_eager: bool) -> CudaRunnerConfig {
    CudaRunnerConfig {
        path: path.to_owned(),
        load_format: LoadFormat::Auto,
        dtype: Some(float),
        quantize_fp8: false,
        kv_dtype: KvDtype::Float,
        ordinal: 0,
        gpu_memory_utilization: 0.5,
        kv_cache_memory_bytes: Some(256 << 20),
        max_num_seqs: 32,
        max_num_batched_tokens: 2048,
        max_model_len: Some(2048),
        quantized_weights_only: false,
        enforce_eager,
        batch_invariant: false,
    }
}

fn gpu(path: &Path, float: Float, enforce_eager: bool) -> Driver<CudaRunner> {
    Driver::new(CudaRunner::new(&config(path, float, enforce_eager)).unwrap())
}

/// Ranks on one GPU, or dealt out to all there are with `ASHLAR_TEST_GPUS=all`.
fn gpus(config: &CudaRunnerConfig, ranks: usize) -> Driver<RankedRunner<CudaRunner>> {
    let all = std::env::var("ASHLAR_TEST_GPUS").is_ok_and(|value| value == "all");
    let count = if all { cuda::count().unwrap() } else { 1 };
    let ordinals: Vec<usize> = (0..ranks).map(|rank| rank % count).collect();
    Driver::new(CudaRunner::on_ranks(config, &ordinals).unwrap())
}

/// Types of the activations, and the largest mean and worst `1 − cosine`. The weights are the same on both sides; one
/// rounding of an activation is 2⁻⁹ of it in brain floats and 2⁻¹² in half floats, so a wrong term shows in the latter.
const TYPES: [(Float, f64, f64); 2] = [(Float::Bf16, 1e-3, 1e-2), (Float::F16, 2e-5, 2e-4)];

/// Each as it is served by default, and with `--batch-invariant`.
fn both_ways<T: Copy, const N: usize>(cases: [T; N]) -> impl Iterator<Item = (T, bool)> {
    cases
        .into_iter()
        .flat_map(|case| [(case, false), (case, true)])
}

#[test]
fn every_family_computes_what_the_cpu_computes() {
    for family in families() {
        let folder = checkpoint(&family);
        let mut cpu = cpu(&folder);
        let cases: Vec<_> = [(1, 1), (2, 17), (3, 130), (4, 515)]
            .into_iter()
            .map(|(seed, len)| {
                let tokens = prompt(seed, len + DECODED);
                let want = logits(&mut cpu, &tokens, &[]);
                (len, tokens, want)
            })
            .collect();
        for ((float, max_mean, max_worst), invariant) in both_ways(TYPES) {
            let config = CudaRunnerConfig {
                batch_invariant: invariant,
                ..config(&folder, float, false)
            };
            let mut gpu = Driver::new(CudaRunner::new(&config).unwrap());
            for (len, tokens, want) in &cases {
                for pieces in [&[][..], &[33, 1, 64]] {
                    let (mean, worst) = distance(&logits(&mut gpu, tokens, pieces), want);
                    let case = format!(
                        "{} {float:?}, invariant {invariant}: {len} tokens in pieces {pieces:?}, {DECODED} decoded: 1 − cosine {mean:.2e} mean, \
                         {worst:.2e} worst",
                        family.name
                    );
                    println!("{case}");
                    assert!(mean < max_mean && worst < max_worst, "{case}");
                }
            }
        }
        dump(&family, &folder, &cases);
        fs::remove_dir_all(&folder).unwrap();
    }
}

/// With `ASHLAR_DUMP_LOGITS=FOLDER`, what another implementation needs to compare: checkpoint, tokens, and the CPU's
/// logits `[positions, VOCAB]`.
fn dump(family: &Family, folder: &Path, cases: &[(usize, Vec<TokenId>, Vec<f32>)]) {
    let Some(root) = std::env::var_os("ASHLAR_DUMP_LOGITS") else {
        return;
    };
    let to = Path::new(&root).join(family.name);
    fs::create_dir_all(&to).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(folder.join(file), to.join(file)).unwrap();
    }
    for (len, tokens, logits) in cases {
        let bytes: Vec<u8> = logits
            .iter()
            .flat_map(|logit| logit.to_le_bytes())
            .collect();
        fs::write(to.join(format!("logits-{len}.f32")), bytes).unwrap();
        fs::write(
            to.join(format!("tokens-{len}.json")),
            json!(tokens).to_string(),
        )
        .unwrap();
    }
}

#[test]
fn graphs_compute_what_launches_compute_bit_for_bit() {
    for family in families() {
        let folder = checkpoint(&family);
        let (mut graphs, mut eager) = (
            gpu(&folder, Float::Bf16, false),
            gpu(&folder, Float::Bf16, true),
        );
        // Each exactly a bucket: eager steps run unpadded.
        for count in [1usize, 2, 4, 8, 16, 32] {
            let prompts: Vec<_> = (0..count)
                .map(|i| prompt(i as u64 + 50, 5 + 11 * i % 60))
                .collect();
            let (want, tokens) = together(&mut eager, &prompts);
            for _ in 0..2 {
                let (bits, again) = together(&mut graphs, &prompts);
                assert_eq!(
                    again, tokens,
                    "{}: {count} sequences draw other tokens",
                    family.name
                );
                assert!(
                    bits == want,
                    "{}: {count} sequences have other bits",
                    family.name
                );
            }
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}

/// Largest mean and worst `1 − cosine` of four-bit weights, whose products with scales are rounded to halves too.
const MAX_AWQ_DISTANCE: (f64, f64) = (5e-5, 5e-4);

#[test]
fn awq_models_compute_what_the_cpu_computes() {
    for (family, group) in families().into_iter().zip([32, 64, 32, 64, 32]) {
        let folder = checkpoint(&family);
        quantize(&folder, group);
        let mut cpu = cpu(&folder);
        for (quantized_weights_only, batch_invariant) in
            [(false, false), (true, false), (true, true)]
        {
            let config = CudaRunnerConfig {
                quantized_weights_only,
                batch_invariant,
                ..config(&folder, Float::F16, false)
            };
            let mut gpu = Driver::new(CudaRunner::new(&config).unwrap());
            for (seed, len) in [(1, 1), (2, 17), (3, 130), (4, 515)] {
                let tokens = prompt(seed, len + DECODED);
                let want = logits(&mut cpu, &tokens, &[]);
                let (mean, worst) = distance(&logits(&mut gpu, &tokens, &[33, 1, 64]), &want);
                let case = format!(
                    "{} AWQ, groups of {group}, alone {quantized_weights_only}, invariant {batch_invariant}: {len} tokens, {DECODED} decoded: 1 − cosine \
                     {mean:.2e} mean, {worst:.2e} worst",
                    family.name
                );
                println!("{case}");
                let (max_mean, max_worst) = MAX_AWQ_DISTANCE;
                assert!(mean < max_mean && worst < max_worst, "{case}");
            }
            // And decodes of several sequences at once, as graphs.
            let prompts: Vec<_> = (0..32).map(|i| prompt(i + 50, 20)).collect();
            let (bits, tokens) = together(&mut gpu, &prompts);
            assert_eq!((bits, tokens), together(&mut gpu, &prompts));
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}

/// As [`TYPES`]; every rank's product is rounded before it is summed.
const RANK_TYPES: [(Float, f64, f64); 2] =
    [(Float::Bf16, 1.5e-3, 1.5e-2), (Float::F16, 4e-5, 4e-4)];

#[test]
fn ranks_compute_what_the_cpu_computes() {
    for family in families() {
        let folder = checkpoint(&family);
        let mut cpu = cpu(&folder);
        let cases = [(2, 17), (4, 515)].map(|(seed, len)| {
            let tokens = prompt(seed, len + DECODED);
            let want = logits(&mut cpu, &tokens, &[]);
            (len, tokens, want)
        });
        for (float, max_mean, max_worst) in RANK_TYPES {
            for ranks in [2, 4] {
                let mut gpus = gpus(&config(&folder, float, false), ranks);
                for (len, tokens, want) in &cases {
                    let (mean, worst) = distance(&logits(&mut gpus, tokens, &[33, 1, 64]), want);
                    let case = format!(
                        "{} {float:?} on {ranks} ranks: {len} tokens, {DECODED} decoded: 1 − cosine {mean:.2e} mean, \
                         {worst:.2e} worst",
                        family.name
                    );
                    println!("{case}");
                    assert!(mean < max_mean && worst < max_worst, "{case}");
                }
            }
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}

#[test]
fn graphs_of_ranks_compute_what_launches_compute_and_four_bits_are_cut() {
    for (family, group) in families().into_iter().zip([32, 64, 32, 64, 32]) {
        let folder = checkpoint(&family);
        for quantized in [false, true] {
            if quantized {
                quantize(&folder, group);
            }
            let float = if quantized { Float::F16 } else { Float::Bf16 };
            let mut graphs = gpus(&config(&folder, float, false), 2);
            let mut eager = gpus(&config(&folder, float, true), 2);
            for count in [1usize, 4, 32] {
                let prompts: Vec<_> = (0..count)
                    .map(|i| prompt(i as u64 + 50, 5 + 11 * i % 60))
                    .collect();
                let (want, tokens) = together(&mut eager, &prompts);
                let (bits, again) = together(&mut graphs, &prompts);
                let case = format!("{}, four bits: {quantized}, {count} sequences", family.name);
                assert_eq!(again, tokens, "{case} draw other tokens");
                assert!(bits == want, "{case} have other bits");
            }
            if quantized {
                let tokens = prompt(3, 130 + DECODED);
                let want = logits(&mut cpu(&folder), &tokens, &[]);
                let (mean, worst) = distance(&logits(&mut graphs, &tokens, &[33, 1]), &want);
                println!(
                    "{} AWQ on 2 ranks: 1 − cosine {mean:.2e} mean, {worst:.2e} worst",
                    family.name
                );
                let (max_mean, max_worst) = MAX_AWQ_DISTANCE;
                assert!(mean < 2.0 * max_mean && worst < 2.0 * max_worst);
            }
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}
