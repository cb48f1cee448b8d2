#![allow(clippy::unwrap_used, missing_docs)] // Tests fail by panicking.

use half::{bf16, f16};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

/// Files of a folder, and what the error must say.
type Case<'a> = (Vec<(&'a str, Vec<u8>)>, &'a str);

fn shard(header: &Value, data: &[u8]) -> Vec<u8> {
    let header = header.to_string();
    [
        &(header.len() as u64).to_le_bytes()[..],
        header.as_bytes(),
        data,
    ]
    .concat()
}

fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), "{}").unwrap();
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

#[test]
fn reads_the_three_float_types() {
    let data = [
        &1.5f32.to_le_bytes()[..],
        &f16::from_f32(-2.0).to_le_bytes(),
        &bf16::from_f32(3.0).to_le_bytes(),
    ];
    let header = json!({
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "F16", "shape": [1, 1], "data_offsets": [4, 6]},
        "c": {"dtype": "BF16", "shape": [1], "data_offsets": [6, 8]},
    });
    let dir = folder(&[("model.safetensors", &shard(&header, &data.concat()))]);
    let checkpoint = SafetensorsFolder::open(dir.path()).unwrap();
    let value = |name: &str| checkpoint.tensor(name).unwrap().unwrap().to_f32().unwrap();
    assert_eq!(
        (value("a"), value("b"), value("c")),
        (vec![1.5], vec![-2.0], vec![3.0])
    );
    assert!(checkpoint.tensor("d").unwrap().is_none());
}

#[test]
fn reads_shards_by_the_index() {
    let tensor = json!({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]});
    let first = shard(&json!({"a": tensor}), &1f32.to_le_bytes());
    let second = shard(&json!({"b": tensor}), &2f32.to_le_bytes());
    let index = json!({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}).to_string();
    let files: [(&str, &[u8]); 3] = [
        ("one.safetensors", &first),
        ("two.safetensors", &second),
        ("model.safetensors.index.json", index.as_bytes()),
    ];
    let dir = folder(&files);
    let checkpoint = SafetensorsFolder::open(dir.path()).unwrap();
    assert_eq!(
        checkpoint.tensor("b").unwrap().unwrap().to_f32(),
        Some(vec![2.0])
    );
}

#[test]
fn refuses_malformed_folders() {
    let tensor = json!({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]});
    let good = shard(&json!({"a": tensor}), &[0; 4]);
    let index = |map: Value| json!({"weight_map": map}).to_string().into_bytes();
    let index_name = "model.safetensors.index.json";
    let cases: Vec<Case<'_>> = vec![
        (vec![], "cannot read"),
        (
            vec![(
                "model.safetensors",
                b"\xff\xff\xff\xff\xff\xff\xff\xff".to_vec(),
            )],
            "not a valid safetensors",
        ),
        (
            vec![("model.safetensors", good[..good.len() - 1].to_vec())],
            "not a valid safetensors",
        ),
        (
            vec![("model.safetensors", [&good[..], b"x"].concat())],
            "not a valid safetensors",
        ),
        (
            vec![("model.safetensors", b"short".to_vec())],
            "not a valid safetensors",
        ),
        (
            vec![(index_name, index(json!({"a": "../up.safetensors"})))],
            "not a plain file name",
        ),
        (
            vec![(index_name, index(json!({"a": 3})))],
            "not a valid index",
        ),
        (vec![(index_name, b"{".to_vec())], "not a valid JSON"),
        (
            vec![
                (index_name, index(json!({"b": "one.st"}))),
                ("one.st", good.clone()),
            ],
            "does not hold the tensor b",
        ),
        (
            vec![
                (index_name, index(json!({"a": "one.st", "b": "two.st"}))),
                ("one.st", good.clone()),
                ("two.st", good.clone()),
            ],
            "in two shards",
        ),
    ];
    for (files, expected) in &cases {
        let files: Vec<(&str, &[u8])> = files
            .iter()
            .map(|(name, bytes)| (*name, bytes.as_slice()))
            .collect();
        let message = SafetensorsFolder::open(folder(&files).path())
            .unwrap_err()
            .to_string();
        assert!(
            message.contains(expected),
            "{message:?} should contain {expected:?}"
        );
    }
}

#[test]
fn refuses_types_it_cannot_compute_with() {
    let header = json!({"a": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}});
    let dir = folder(&[("model.safetensors", &shard(&header, &[0; 4]))]);
    let checkpoint = SafetensorsFolder::open(dir.path()).unwrap();
    assert!(
        checkpoint
            .tensor("a")
            .unwrap_err()
            .to_string()
            .contains("stored as I32")
    );
}
