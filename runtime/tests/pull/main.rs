//! `hub::pull` against a server on loopback that speaks the hub's protocol, faults included.
#![allow(clippy::unwrap_used, missing_docs, unreachable_pub)] // a test may panic, and has no callers

mod exchange;
mod faults;
mod places;

#[path = "../support/hub_server.rs"]
mod hub_server;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use ashlar::hub::{
    Hub, HubConfig, HubError, Place, Progress, PullOptions, Pulled, Selection, pull,
};
use hub_server::{HubServer, Repository};

const REPO: &str = "owner/model";

fn config(server: &HubServer) -> HubConfig {
    HubConfig {
        endpoint: server.endpoint(),
        retry_base: Duration::from_millis(1),
        stall: Duration::from_millis(400),
        max_attempts: 3,
        ..HubConfig::default()
    }
}

fn options(place: Place) -> PullOptions {
    PullOptions {
        repo: REPO.into(),
        revision: "main".into(),
        place,
        selection: Selection::default(),
        budget: None,
    }
}

fn pull_from(server: &HubServer, place: Place) -> Result<Pulled, HubError> {
    pull(
        &Hub::new(config(server)).unwrap().into(),
        &options(place),
        &Progress::silent(),
    )
}

fn into_folder(server: &HubServer, folder: &Path) -> Result<Pulled, HubError> {
    pull_from(server, Place::Folder(folder.to_path_buf()))
}

/// Names of the files below a folder that are not ours.
fn listing(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != ".ashlar")
        .collect();
    names.sort();
    names
}

fn temp() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    (dir, path)
}

/// Two shards with an index, small files, and things that must stay behind.
fn sharded() -> Repository {
    let index = br#"{"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}}"#;
    Repository::default()
        .file("config.json", b"{}")
        .file("tokenizer.json", b"{\"model\":{}}")
        .file("model.safetensors.index.json", index)
        .lfs("model-00001-of-00002.safetensors", &bytes(700_000, 1))
        .lfs("model-00002-of-00002.safetensors", &bytes(900_001, 2))
        .lfs("consolidated.safetensors", &bytes(1000, 3))
        .lfs("pytorch_model.bin", &bytes(1000, 4))
        .file("README.md", b"hello")
}

fn single(size: usize) -> Repository {
    Repository::default()
        .file("config.json", b"{}")
        .lfs("model.safetensors", &bytes(size, 7))
}

fn bytes(size: usize, seed: u64) -> Vec<u8> {
    // xorshift: no two parts of the file are alike, so a wrong offset cannot go unseen.
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..size)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[0]
        })
        .collect()
}
