//! K and V in eight-bit floats on the GPU against the CPU's exact mode with the same.

use ashlar::model_runner::{self, CpuRunner, CpuRunnerConfig, Dtype, ModelRunner};
use common::families::{LAYERS, cpu_config};
use safetensors::{Dtype as TensorType, SafeTensors, tensor::TensorView};

use super::*;

/// Types of the activations, and how far off eight-bit caches may be, as a share of what eight bits cost: where activations
/// differ by a rounding, some K and V become another eight-bit float. With other scales the two would be twice that apart.
const SHARES: [(Float, f64); 2] = [(Float::Bf16, 1.2), (Float::F16, 0.4)];

/// Gives the layers scales of K and V, the first layer none.
fn add_scales(folder: &Path) {
    let file = fs::read(folder.join("model.safetensors")).unwrap();
    let stored = SafeTensors::deserialize(&file).unwrap();
    let scales: Vec<(String, [u8; 4])> = (1..LAYERS)
        .flat_map(|layer| {
            let name = format!("model.layers.{layer}.self_attn");
            let scale = 0.013 * layer as f32;
            [
                (format!("{name}.k_scale"), scale.to_le_bytes()),
                (format!("{name}.v_scale"), (0.7 * scale).to_le_bytes()),
            ]
        })
        .collect();
    let scales = scales.iter().map(|(name, scale)| {
        let scale = TensorView::new(TensorType::F32, vec![1], scale).unwrap();
        (name.clone(), scale)
    });
    let all = stored.tensors().into_iter().chain(scales);
    let bytes = safetensors::serialize(all, None).unwrap();
    drop(stored);
    fs::write(folder.join("model.safetensors"), bytes).unwrap();
}

fn cpu_in_eight_bits(folder: &Path) -> Driver {
    let config = CpuRunnerConfig {
        kv_dtype: model_runner::KvDtype::Fp8,
        ..cpu_config(folder, Dtype::Float32)
    };
    Driver::new(CpuRunner::new(&config).unwrap())
}

fn in_eight_bits(folder: &Path, float: Float, enforce_eager: bool) -> CudaRunnerConfig {
    CudaRunnerConfig {
        kv_dtype: KvDtype::Fp8,
        ..config(folder, float, enforce_eager)
    }
}

/// Tokens of a prompt and after it, the CPU's logits, and the mean `1 − cosine` that eight bits cost.
struct Sample {
    tokens: Vec<TokenId>,
    want: Vec<f32>,
    loss: f64,
}

fn samples(folder: &Path) -> Vec<Sample> {
    let (mut exact, mut cpu) = (cpu(folder), cpu_in_eight_bits(folder));
    let lengths = [(2, 17), (3, 130), (4, 515)];
    let samples = lengths.map(|(seed, len)| {
        let tokens = prompt(seed, len + DECODED);
        let want = logits(&mut cpu, &tokens, &[]);
        let (loss, _) = distance(&want, &logits(&mut exact, &tokens, &[]));
        Sample { tokens, want, loss }
    });
    samples.into()
}

fn check<R: ModelRunner>(what: &str, share: f64, driver: &mut Driver<R>, samples: &[Sample]) {
    for sample in samples {
        for pieces in [&[][..], &[33, 1, 64]] {
            let (mean, worst) = distance(&logits(driver, &sample.tokens, pieces), &sample.want);
            let case = format!(
                "{what}, {} tokens in pieces {pieces:?}: 1 − cosine {mean:.2e} mean, {worst:.2e} worst; eight bits cost \
                 {:.2e}",
                sample.tokens.len(),
                sample.loss
            );
            println!("{case}");
            assert!(mean < share * sample.loss, "{case}");
        }
    }
}

#[test]
fn eight_bit_caches_hold_what_the_cpu_holds() {
    for family in families() {
        let folder = checkpoint(&family);
        add_scales(&folder);
        let samples = samples(&folder);
        for (float, share) in SHARES {
            let mut gpu =
                Driver::new(CudaRunner::new(&in_eight_bits(&folder, float, false)).unwrap());
            let what = format!("{} {float:?}", family.name);
            check(&what, share, &mut gpu, &samples);
            let mut gpus = gpus(&in_eight_bits(&folder, float, false), 2);
            check(&format!("{what} on 2 ranks"), share, &mut gpus, &samples);
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}

#[test]
fn graphs_with_eight_bit_caches_compute_what_launches_compute() {
    for family in families() {
        let folder = checkpoint(&family);
        add_scales(&folder);
        for float in [Float::Bf16, Float::F16] {
            let [mut graphs, mut eager] = [false, true].map(|enforce_eager| {
                let config = in_eight_bits(&folder, float, enforce_eager);
                Driver::new(CudaRunner::new(&config).unwrap())
            });
            for count in [1usize, 4, 32] {
                let prompts: Vec<_> = (0..count)
                    .map(|i| prompt(i as u64 + 50, 5 + 11 * i % 60))
                    .collect();
                let want = together(&mut eager, &prompts);
                let case = format!("{} {float:?}, {count} sequences", family.name);
                assert!(together(&mut graphs, &prompts) == want, "{case}");
            }
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}

#[test]
fn eight_bit_caches_hold_twice_the_tokens() {
    let folder = checkpoint(&families()[0]);
    let limits = |config: &CudaRunnerConfig| CudaRunner::new(config).unwrap().limits().clone();
    let halves = limits(&config(&folder, Float::Bf16, true));
    let eight = limits(&in_eight_bits(&folder, Float::Bf16, true));
    assert_eq!(eight.num_blocks, 2 * halves.num_blocks);
    assert_eq!(2 * eight.kv_bytes_per_token, halves.kv_bytes_per_token);
    fs::remove_dir_all(&folder).unwrap();
}
