//! Eight-bit floats and GGUF's blocks on the GPU against the CPU's exact mode on the same values.

use ashlar::model_runner::{CpuRunner, CpuRunnerConfig, Dtype, KvCacheSize};

use super::{
    common::families::{LAYERS, Numbers, VOCAB, round_to_fp8},
    *,
};

/// Eight-bit activations, of three bits each: what many rows are multiplied with. Attention in these models chooses sharply,
/// so that it grows from layer to layer; a wrong term would be near 1.
const MAX_FP8_DISTANCE: (f64, f64) = (4e-2, 2e-1);

fn gpu_with(
    path: &Path,
    dtype: Option<Float>,
    quantize_fp8: bool,
    batch_invariant: bool,
) -> Driver<CudaRunner> {
    Driver::new(
        CudaRunner::new(&CudaRunnerConfig {
            dtype,
            quantize_fp8,
            // Beside copies in one way, without them in the other.
            quantized_weights_only: !batch_invariant,
            batch_invariant,
            ..config(path, Float::F16, false)
        })
        .unwrap(),
    )
}

fn exact_cpu(path: &Path, quantize_fp8: bool) -> Driver {
    Driver::new(
        CpuRunner::new(&CpuRunnerConfig {
            path: path.to_owned(),
            dtype: Dtype::Float32,
            quantize_fp8,
            kv_cache: KvCacheSize::Blocks(1024),
            max_num_seqs: 32,
            max_num_batched_tokens: 2048,
            max_model_len: Some(2048),
            ..CpuRunnerConfig::default()
        })
        .unwrap(),
    )
}

/// The logits of a prompt of `len` tokens, cut into pieces, and of what is decoded behind it, differ from the CPU's by at most so
/// much: the mean and the worst `1 − cosine`.
fn assert_near(
    what: &str,
    gpu: &mut Driver<CudaRunner>,
    cpu: &mut Driver,
    (len, pieces): (usize, &[usize]),
    (max_mean, max_worst): (f64, f64),
) {
    let tokens = prompt(len as u64, len + DECODED);
    let want = logits(cpu, &tokens, &[]);
    let (mean, worst) = distance(&logits(gpu, &tokens, pieces), &want);
    let case = format!(
        "{what}: {len} tokens, {DECODED} decoded: 1 − cosine {mean:.2e} mean, {worst:.2e} worst"
    );
    println!("{case}");
    assert!(mean < max_mean && worst < max_worst, "{case}");
}

#[test]
fn eight_bit_floats_compute_what_the_cpu_computes() {
    for family in families() {
        let folder = checkpoint(&family);
        let mut cpu = exact_cpu(&folder, true);
        for ((float, few_mean, few_worst), invariant) in both_ways(TYPES) {
            let mut gpu = gpu_with(&folder, Some(float), true, invariant);
            let what = format!(
                "{} fp8 beside {float:?}, invariant {invariant}",
                family.name
            );
            // Rows one by one read the weights alone in eight bits; those of long prompts are rounded too.
            for (len, most) in [
                (1, (few_mean, few_worst)),
                (130, MAX_FP8_DISTANCE),
                (515, MAX_FP8_DISTANCE),
            ] {
                assert_near(&what, &mut gpu, &mut cpu, (len, &[]), most);
            }
            let prompts: Vec<_> = (0..32).map(|i| prompt(i + 50, 20)).collect();
            let first = together(&mut gpu, &prompts);
            assert_eq!(first, together(&mut gpu, &prompts), "{}", family.name);
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}

/// A checkpoint that says so has its weights alone in eight bits: long prompts' rows are not rounded, and are as near as they are
/// to 16-bit weights.
#[test]
fn rows_meet_eight_bit_weights_as_they_are_where_the_checkpoint_says_so() {
    for family in families() {
        let folder = checkpoint(&family);
        round_to_fp8(&folder);
        let mut cpu = exact_cpu(&folder, false);
        for ((float, max_mean, max_worst), invariant) in both_ways(TYPES) {
            let mut gpu = gpu_with(&folder, Some(float), false, invariant);
            let what = format!(
                "{} fp8 weights beside {float:?}, invariant {invariant}",
                family.name
            );
            for len in [1, 130, 515] {
                let most = (max_mean, max_worst);
                assert_near(&what, &mut gpu, &mut cpu, (len, &[]), most);
            }
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}

/// A storage type of GGUF: its number, values in a block.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Q4_0,
    Q4_1,
    Q8_0,
    Q4K,
    Q6K,
}

impl Kind {
    fn id(self) -> u32 {
        match self {
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 8,
            Self::Q4K => 12,
            Self::Q6K => 14,
        }
    }

    /// A block of random integers that spread by about `size` around 0, and its values' number.
    fn block(self, numbers: &mut Numbers, size: f32) -> (Vec<u8>, usize) {
        let mut bytes =
            |count: usize| -> Vec<u8> { (0..count).map(|_| numbers.next() as u8).collect() };
        let half = |value: f32| half::f16::from_f32(value).to_le_bytes();
        match self {
            Self::Q4_0 => {
                // −8..=7 is not 0 in the mean; of both signs it is.
                let sign = if bytes(1)[0] % 2 == 0 { 1.0 } else { -1.0 };
                ([&half(sign * size / 4.6)[..], &bytes(16)].concat(), 32)
            }
            Self::Q4_1 => {
                let d = size / 4.6;
                ([&half(d)[..], &half(-7.5 * d), &bytes(16)].concat(), 32)
            }
            Self::Q8_0 => ([&half(size / 74.0)[..], &bytes(32)].concat(), 32),
            Self::Q4K => {
                let d = size / (4.6 * 40.0);
                // Six-bit scales of 16 and more, and minima equal to them.
                let scales = bytes(8).iter().map(|b| b % 48 + 16).collect::<Vec<u8>>();
                let mut packed = vec![0; 12];
                for j in 0..4 {
                    let (low, high) = (scales[j], scales[j + 4]);
                    packed[j] = low | high >> 4 << 6;
                    packed[j + 4] = low | high >> 4 << 6;
                    packed[j + 8] = (high & 15) | (high & 15) << 4;
                }
                (
                    [&half(d)[..], &half(7.5 * d), &packed, &bytes(128)].concat(),
                    256,
                )
            }
            Self::Q6K => {
                let values = bytes(192);
                let scales = bytes(16).iter().map(|b| b % 48 + 16).collect::<Vec<u8>>();
                (
                    [&values[..], &scales, &half(size / (18.5 * 40.0))].concat(),
                    256,
                )
            }
        }
    }
}

/// A file of format GGUF, version 3.
#[derive(Default)]
struct GgufFile {
    pairs: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    data: Vec<u8>,
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

impl GgufFile {
    fn pair(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.pairs
            .push([string(key), kind.to_le_bytes().into(), value.into()].concat());
    }

    fn tensor(&mut self, name: &str, dims: &[usize], kind: u32, data: &[u8]) {
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        let mut entry = [string(name), (dims.len() as u32).to_le_bytes().into()].concat();
        // The innermost first.
        dims.iter()
            .rev()
            .for_each(|dim| entry.extend((*dim as u64).to_le_bytes()));
        entry.extend(kind.to_le_bytes());
        entry.extend((self.data.len() as u64).to_le_bytes());
        self.tensors.push(entry);
        self.data.extend(data);
    }

    fn matrix(
        &mut self,
        numbers: &mut Numbers,
        name: &str,
        (rows, columns): (usize, usize),
        kind: Kind,
        scale: f32,
    ) {
        let size = scale / (columns as f32).sqrt();
        let mut data = Vec::new();
        let mut values = 0;
        while values < rows * columns {
            let (block, len) = kind.block(numbers, size);
            data.extend(block);
            values += len;
        }
        self.tensor(name, &[rows, columns], kind.id(), &data);
    }

    fn write(mut self, path: &Path) {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.pairs.len() as u64).to_le_bytes());
        file.extend(self.pairs.concat());
        file.extend(self.tensors.concat());
        file.resize(file.len().next_multiple_of(32), 0);
        file.append(&mut self.data);
        fs::write(path, file).unwrap();
    }
}

/// A small Llama whose layers' matrices are of these kinds: most of them, and v and down.
pub(super) fn gguf(path: &Path, (most, others): (Kind, Kind)) {
    const HIDDEN: usize = 512;
    const INTERMEDIATE: usize = 1024;
    const KV: usize = 128;
    let mut numbers = Numbers(11);
    let mut file = GgufFile::default();
    file.pair("general.architecture", 8, &string("llama"));
    for (key, value) in [
        ("embedding_length", HIDDEN),
        ("feed_forward_length", INTERMEDIATE),
        ("block_count", LAYERS),
        ("attention.head_count", 8),
        ("attention.head_count_kv", 2),
        ("context_length", 2048),
    ] {
        file.pair(&format!("llama.{key}"), 4, &(value as u32).to_le_bytes());
    }
    let eps = 1e-5f32.to_le_bytes();
    file.pair("llama.attention.layer_norm_rms_epsilon", 6, &eps);
    file.matrix(
        &mut numbers,
        "token_embd.weight",
        (VOCAB, HIDDEN),
        Kind::Q8_0,
        8.0,
    );
    let norm = |numbers: &mut Numbers| -> Vec<u8> {
        let unit =
            |numbers: &mut Numbers| 0.8 + 0.4 * (numbers.next() as f32 / (1u64 << 31) as f32);
        (0..HIDDEN)
            .flat_map(|_| unit(numbers).to_le_bytes())
            .collect()
    };
    let data = norm(&mut numbers);
    file.tensor("output_norm.weight", &[HIDDEN], 0, &data);
    for layer in 0..LAYERS {
        for name in ["attn_norm", "ffn_norm"] {
            let data = norm(&mut numbers);
            file.tensor(&format!("blk.{layer}.{name}.weight"), &[HIDDEN], 0, &data);
        }
        for (name, shape, kind, scale) in [
            ("attn_q", (HIDDEN, HIDDEN), most, 1.0),
            ("attn_k", (KV, HIDDEN), most, 1.0),
            ("attn_v", (KV, HIDDEN), others, 1.0),
            ("attn_output", (HIDDEN, HIDDEN), most, 1.0),
            ("ffn_gate", (INTERMEDIATE, HIDDEN), most, 1.0),
            ("ffn_up", (INTERMEDIATE, HIDDEN), most, 1.0),
            ("ffn_down", (HIDDEN, INTERMEDIATE), others, 1.0),
        ] {
            file.matrix(
                &mut numbers,
                &format!("blk.{layer}.{name}.weight"),
                shape,
                kind,
                scale,
            );
        }
    }
    file.write(path);
}

/// As for AWQ: values are rounded to halves once, and those of K-quants' scales too.
const MAX_GGUF_DISTANCE: (f64, f64) = (1e-5, 3e-5);

#[test]
fn ggufs_blocks_compute_what_the_cpu_computes() {
    let folder = tempfile::tempdir().unwrap();
    for (name, kinds) in [
        ("Q4_0", (Kind::Q4_0, Kind::Q4_0)),
        ("Q4_1 and Q8_0", (Kind::Q4_1, Kind::Q8_0)),
        ("Q8_0", (Kind::Q8_0, Kind::Q8_0)),
        ("Q4_K and Q6_K", (Kind::Q4K, Kind::Q6K)),
        ("Q4_K", (Kind::Q4K, Kind::Q4K)),
    ] {
        let path = folder.path().join(format!("{name}.gguf"));
        gguf(&path, kinds);
        let mut cpu = exact_cpu(&path, false);
        // As served, and dequantised to brain floats at load.
        let (bf16_mean, bf16_worst) = (TYPES[0].1, TYPES[0].2);
        for (float, invariant, (max_mean, max_worst)) in [
            (None, false, MAX_GGUF_DISTANCE),
            (None, true, MAX_GGUF_DISTANCE),
            (Some(Float::Bf16), false, (bf16_mean, bf16_worst)),
        ] {
            let mut gpu = gpu_with(&path, float, false, invariant);
            let what = format!("{name} in {float:?}, invariant {invariant}");
            for (len, pieces) in [(1, &[][..]), (17, &[]), (130, &[33, 1, 64]), (515, &[])] {
                let most = (max_mean, max_worst);
                assert_near(&what, &mut gpu, &mut cpu, (len, pieces), most);
            }
            let prompts: Vec<_> = (0..32).map(|i| prompt(i + 50, 20)).collect();
            let first = together(&mut gpu, &prompts);
            assert_eq!(first, together(&mut gpu, &prompts), "{name}");
        }
    }
}
