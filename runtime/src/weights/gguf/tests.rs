#![allow(clippy::unwrap_used, missing_docs)] // Tests fail by panicking.

use std::io::Write;

use proptest::prelude::*;

use super::*;

/// Builds a GGUF file byte by byte; `metadata` and `tensors` are counted as they are added.
#[derive(Default)]
struct Builder {
    metadata: Vec<u8>,
    num_metadata: u64,
    tensors: Vec<u8>,
    num_tensors: u64,
    data: Vec<u8>,
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

impl Builder {
    fn pair(mut self, key: &str, type_id: u32, value: &[u8]) -> Self {
        self.metadata.extend(string(key));
        self.metadata.extend(type_id.to_le_bytes());
        self.metadata.extend(value);
        self.num_metadata += 1;
        self
    }

    fn tensor(mut self, name: &str, dims: &[u64], type_id: u32, offset: u64) -> Self {
        self.tensors.extend(string(name));
        self.tensors.extend((dims.len() as u32).to_le_bytes());
        dims.iter()
            .for_each(|dim| self.tensors.extend(dim.to_le_bytes()));
        self.tensors.extend(type_id.to_le_bytes());
        self.tensors.extend(offset.to_le_bytes());
        self.num_tensors += 1;
        self
    }

    fn data(mut self, data: &[u8]) -> Self {
        self.data = data.to_vec();
        self
    }

    fn build(self) -> Vec<u8> {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend(self.num_tensors.to_le_bytes());
        file.extend(self.num_metadata.to_le_bytes());
        file.extend(self.metadata);
        file.extend(self.tensors);
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(self.data);
        file
    }
}

fn open(bytes: &[u8]) -> Result<Gguf, WeightsError> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    Gguf::open(file.path())
}

fn error_of(bytes: &[u8]) -> String {
    open(bytes)
        .expect_err("the file must be refused")
        .to_string()
}

fn sample() -> Builder {
    let tokens = [
        &8u32.to_le_bytes()[..],
        &2u64.to_le_bytes(),
        &string("a"),
        &string("é"),
    ]
    .concat();
    let scores = [
        &6u32.to_le_bytes()[..],
        &2u64.to_le_bytes(),
        &0.5f32.to_le_bytes(),
        &(-1f32).to_le_bytes(),
    ]
    .concat();
    Builder::default()
        .pair("general.architecture", 8, &string("llama"))
        .pair("llama.block_count", 4, &7u32.to_le_bytes())
        .pair("llama.rope.freq_base", 6, &1e5f32.to_le_bytes())
        .pair("tokenizer.ggml.add_bos_token", 7, &[1])
        .pair("tokenizer.ggml.model", 8, &string("gpt2"))
        .pair("tokenizer.ggml.tokens", 9, &tokens)
        .pair("tokenizer.ggml.scores", 9, &scores)
        .tensor("w", &[32, 2], 8, 0)
        .tensor("n", &[4], 0, 96)
        .data(&[9; 112])
}

#[test]
fn reads_metadata_and_tensors() {
    let gguf = open(&sample().build()).unwrap();
    assert_eq!(gguf.architecture().unwrap(), "llama");
    assert_eq!(gguf.u32("llama.block_count").unwrap(), Some(7));
    assert_eq!(gguf.f64("llama.rope.freq_base").unwrap(), Some(1e5));
    assert_eq!(gguf.u32("absent").unwrap(), None);
    let tokenizer = gguf.tokenizer().unwrap();
    assert_eq!(tokenizer.tokens, ["a", "é"]);
    assert_eq!(tokenizer.scores, Some(vec![0.5, -1.0]));
    assert_eq!(tokenizer.add_bos_token, Some(true));
    assert_eq!(tokenizer.merges, None);
    let weight = gguf.tensor("w").unwrap();
    assert_eq!(
        (
            weight.kind,
            weight.columns(),
            weight.rows(),
            weight.data.len()
        ),
        (GgmlType::Q8_0, 32, 2, 68)
    );
    assert_eq!(gguf.tensor("n").unwrap().data.len(), 16);
    assert!(gguf.tensor("absent").is_none());
    let message = gguf.u32("general.architecture").unwrap_err().to_string();
    assert!(
        message.contains("general.architecture is a string and should be an integer"),
        "{message}"
    );
}

#[test]
fn refuses_what_lies_about_its_size() {
    let array = |len: u64| [&8u32.to_le_bytes()[..], &len.to_le_bytes()].concat();
    let cases: &[(Vec<u8>, &str)] = &[
        (b"GGML".to_vec(), "does not start with"),
        (b"GG".to_vec(), "it ends at byte 2"),
        (b"GGUF\0\0\0\x03aaaaaaaaaaaaaaaa".to_vec(), "big-endian"),
        (b"GGUF\x01\0\0\0aaaaaaaaaaaaaaaa".to_vec(), "version is 1"),
        (
            [b"GGUF\x03\0\0\0", &[255u8; 16][..]].concat(),
            "tensors (at most",
        ),
        (
            Builder::default()
                .pair("k", 8, &u64::MAX.to_le_bytes())
                .build(),
            "claims 18446744073709551615 bytes",
        ),
        (
            Builder::default()
                .pair("k", 8, &4096u64.to_le_bytes())
                .build(),
            "it ends at byte",
        ),
        (
            Builder::default().pair("k", 9, &array(u64::MAX)).build(),
            "array elements (at most",
        ),
        (
            Builder::default().pair("k", 9, &array(1 << 23)).build(),
            "it ends at byte",
        ),
        (
            Builder::default()
                .pair("k", 9, &[&9u32.to_le_bytes()[..], &[0; 8]].concat())
                .build(),
            "arrays of arrays",
        ),
        (
            Builder::default().pair("k", 7, &[2]).build(),
            "a bool holds 2",
        ),
        (
            Builder::default().pair("k", 77, &[0; 8]).build(),
            "unknown value type 77",
        ),
        (
            Builder::default()
                .pair("k", 7, &[1])
                .pair("k", 7, &[1])
                .build(),
            "appears twice",
        ),
        (
            Builder::default()
                .pair("general.alignment", 4, &12u32.to_le_bytes())
                .build(),
            "general.alignment is 12",
        ),
        (
            Builder::default().tensor("t", &[], 0, 0).build(),
            "has 0 dimensions",
        ),
        (
            Builder::default().tensor("t", &[1; 5], 0, 0).build(),
            "has 5 dimensions",
        ),
        (
            Builder::default().tensor("t", &[4, 0], 0, 0).build(),
            "empty dimension",
        ),
        (
            Builder::default().tensor("t", &[4], 99, 0).build(),
            "storage type 99",
        ),
        (
            Builder::default()
                .tensor("t", &[4], 0, 8)
                .data(&[0; 64])
                .build(),
            "not aligned",
        ),
        (
            Builder::default()
                .tensor("t", &[33], 8, 0)
                .data(&[0; 64])
                .build(),
            "not whole Q8_0 blocks",
        ),
        (
            Builder::default()
                .tensor("t", &[17], 0, 0)
                .data(&[0; 64])
                .build(),
            "past the end",
        ),
        (
            Builder::default()
                .tensor("t", &[4], 0, u64::MAX - 31)
                .data(&[0; 64])
                .build(),
            "past the end",
        ),
        (
            Builder::default()
                .tensor("t", &[1 << 40, 1 << 40], 0, 0)
                .data(&[0; 64])
                .build(),
            "past the end",
        ),
        (
            Builder::default()
                .tensor("a", &[16], 0, 0)
                .tensor("b", &[4], 0, 32)
                .data(&[0; 64])
                .build(),
            "tensors a and b overlap",
        ),
        (
            Builder::default()
                .tensor("a", &[4], 0, 0)
                .tensor("a", &[4], 0, 32)
                .data(&[0; 64])
                .build(),
            "the tensor a appears twice",
        ),
        (
            Builder::default()
                .pair("split.count", 2, &3u16.to_le_bytes())
                .build(),
            "one of 3 parts",
        ),
    ];
    for (bytes, expected) in cases {
        let message = error_of(bytes);
        assert!(
            message.contains(expected),
            "{message:?} should contain {expected:?}"
        );
    }
}

#[test]
fn refuses_every_truncation() {
    let whole = sample().build();
    for len in 0..whole.len() {
        assert!(
            open(&whole[..len]).is_err(),
            "{len} of {} bytes were accepted",
            whole.len()
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// A damaged file is refused or read, and never panics or reads outside itself.
    #[test]
    fn survives_damage(damage in prop::collection::vec((0usize..520, any::<u8>()), 1..6)) {
        let mut bytes = sample().build();
        for (at, value) in damage {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        if let Ok(gguf) = open(&bytes) {
            let _ = gguf.tokenizer();
            for name in gguf.tensor_names().map(str::to_owned).collect::<Vec<_>>() {
                let tensor = gguf.tensor(&name).unwrap();
                prop_assert!(tensor.rows() * tensor.columns() > 0);
            }
        }
    }
}
