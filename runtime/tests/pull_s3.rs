//! `hub::pull` and `ashlar pull` against a store on loopback that speaks S3's protocol and checks every signature.
#![allow(clippy::unwrap_used, missing_docs, unreachable_pub)] // a test may panic, and has no callers

#[path = "support/s3_server.rs"]
mod s3_server;

use std::{path::Path, process::Command, time::Duration};

use ashlar::hub::{
    HubConfig, HubError, ModelUri, Place, Progress, PullOptions, Pulled, S3Config, Selection,
    Source, pull,
};
use rusty_s3::Credentials;
use s3_server::{BUCKET, KEY, REGION, S3Server, SECRET, Tag};

const MODEL: &str = "team/m 1+x";

fn content(length: usize, seed: u8) -> Vec<u8> {
    let mut state = u32::from(seed);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..length).map(|_| next()).collect()
}

/// Two shards, one written in parts, and things of other models around them.
fn filled() -> S3Server {
    let server = S3Server::start();
    let index = br#"{"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}}"#;
    let put =
        |name: &str, content: &[u8], tag| server.put(&format!("{MODEL}/{name}"), content, tag);
    put("", b"", Tag::Md5); // the folder's own marker
    put("config.json", b"{}", Tag::Md5);
    put("tokenizer.json", b"{\"model\":{}}", Tag::Encrypted);
    put("model.safetensors.index.json", index, Tag::Md5);
    put(
        "model-00001-of-00002.safetensors",
        &content(700_001, 1),
        Tag::Parts(256 << 10),
    );
    put(
        "model-00002-of-00002.safetensors",
        &content(400_000, 2),
        Tag::Md5,
    );
    put("pytorch_model.bin", &content(1000, 3), Tag::Md5);
    server.put("team/m 1+x-other/config.json", b"{}", Tag::Md5);
    server
}

fn source(server: &S3Server, credentials: Option<Credentials>, region: &str) -> Source {
    let config = HubConfig {
        retry_base: Duration::from_millis(1),
        stall: Duration::from_secs(2),
        max_attempts: 3,
        ..HubConfig::default()
    };
    let store = S3Config {
        endpoint: Some(server.endpoint()),
        region: Some(region.to_owned()),
        credentials,
    };
    let uri = ModelUri::parse(&format!("s3://{BUCKET}/{MODEL}")).unwrap();
    Source::of(&uri, config, store).unwrap().0
}

fn options(folder: &Path, revision: &str) -> PullOptions {
    PullOptions {
        repo: format!("{BUCKET}/{MODEL}"),
        revision: revision.to_owned(),
        place: Place::Folder(folder.to_path_buf()),
        selection: Selection::default(),
        budget: None,
    }
}

fn pull_at(server: &S3Server, folder: &Path, revision: &str) -> Result<Pulled, HubError> {
    let keys = Some(Credentials::new(KEY, SECRET));
    let source = source(server, keys, REGION);
    pull(&source, &options(folder, revision), &Progress::silent())
}

const FIRST: &str = "team/m 1+x/model-00001-of-00002.safetensors";

#[test]
fn a_folder_of_a_bucket_arrives_whole_and_checked() {
    let (server, dir) = (filled(), tempfile::tempdir().unwrap());
    let progress = Progress::silent();
    let source = source(&server, Some(Credentials::new(KEY, SECRET)), REGION);
    let pulled = pull(&source, &options(dir.path(), "latest"), &progress).unwrap();
    let names: Vec<_> = pulled.files.iter().map(|file| file.path.as_str()).collect();
    assert_eq!(
        names,
        [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
        ]
    );
    assert!(pulled.files.iter().all(|file| file.digest.is_some()));
    let shard = std::fs::read(dir.path().join("model-00001-of-00002.safetensors")).unwrap();
    assert_eq!(shard, content(700_001, 1));
    let status = progress.status();
    assert_eq!(
        (status.downloaded_bytes, status.total_bytes),
        (pulled.bytes(), pulled.bytes())
    );
    assert_eq!(status.revision.as_deref(), Some(pulled.revision.as_str()));
    // A second pull of that revision finds it, and asks the store nothing.
    server.busy(100);
    let again = pull_at(&server, dir.path(), &pulled.revision).unwrap();
    assert_eq!(again.revision, pulled.revision);
}

#[test]
fn a_broken_download_goes_on_where_it_stopped() {
    let (server, dir) = (filled(), tempfile::tempdir().unwrap());
    server.busy(2);
    server.break_after(FIRST, 300_000);
    pull_at(&server, dir.path(), "latest").unwrap();
    let gets = server.gets(FIRST);
    assert_eq!(gets.len(), 2, "{gets:?}");
    assert!(gets[0] == 0 && gets[1] > 0, "{gets:?}");
}

#[test]
fn altered_bytes_are_refused_whatever_the_tag() {
    for tag in [Tag::Md5, Tag::Parts(100_000), Tag::Encrypted] {
        let (server, dir) = (filled(), tempfile::tempdir().unwrap());
        server.put(FIRST, &content(700_001, 1), tag);
        server.corrupt(FIRST, 1);
        pull_at(&server, dir.path(), "latest").unwrap();
        assert_eq!(server.gets(FIRST).len(), 2, "downloaded once more");
        server.corrupt(FIRST, 2);
        let elsewhere = tempfile::tempdir().unwrap();
        let error = pull_at(&server, elsewhere.path(), "latest").unwrap_err();
        assert!(matches!(error, HubError::HashMismatch { .. }), "{error}");
    }
}

#[test]
fn a_tag_that_is_no_hash_leaves_size_and_tag_as_the_check() {
    let (server, dir) = (filled(), tempfile::tempdir().unwrap());
    server.put(FIRST, &content(700_001, 1), Tag::Opaque);
    let pulled = pull_at(&server, dir.path(), "latest").unwrap();
    let file = pulled
        .files
        .iter()
        .find(|file| FIRST.ends_with(&file.path))
        .unwrap();
    assert_eq!((file.size, &file.digest), (700_001, &None));
}

#[test]
fn a_revision_that_is_gone_is_said_and_not_replaced() {
    let (server, dir) = (filled(), tempfile::tempdir().unwrap());
    let first = pull_at(&server, dir.path(), "latest").unwrap().revision;
    server.put(&format!("{MODEL}/config.json"), b"{\"new\":1}", Tag::Md5);
    let elsewhere = tempfile::tempdir().unwrap();
    let error = pull_at(&server, elsewhere.path(), &first).unwrap_err();
    assert!(matches!(error, HubError::ObjectsChanged { .. }), "{error}");
    let second = pull_at(&server, dir.path(), "latest").unwrap();
    assert_ne!(second.revision, first);
    assert_eq!(
        std::fs::read(dir.path().join("config.json")).unwrap(),
        b"{\"new\":1}"
    );
    let error = pull_at(&server, dir.path(), "v1.0").unwrap_err();
    assert!(matches!(error, HubError::BadSetting { .. }), "{error}");
}

#[test]
fn refusals_say_what_to_do() {
    let (server, dir) = (filled(), tempfile::tempdir().unwrap());
    let refusal = |credentials, region: &str| {
        let source = source(&server, credentials, region);
        pull(&source, &options(dir.path(), "latest"), &Progress::silent())
            .unwrap_err()
            .to_string()
    };
    let wrong = refusal(Some(Credentials::new(KEY, "wrong")), REGION);
    assert!(
        wrong.contains("SignatureDoesNotMatch") && wrong.contains("AWS_SECRET_ACCESS_KEY"),
        "{wrong}"
    );
    assert!(refusal(None, REGION).contains("credentialsSecretRef"));
    assert!(refusal(Some(Credentials::new(KEY, SECRET)), "us-west-2").contains("--region"));
    server.make_public();
    let source = source(&server, None, REGION);
    pull(&source, &options(dir.path(), "latest"), &Progress::silent()).unwrap();
    let nowhere = PullOptions {
        repo: format!("{BUCKET}/no/such"),
        ..options(dir.path(), "latest")
    };
    let error = pull(&source, &nowhere, &Progress::silent()).unwrap_err();
    assert!(matches!(error, HubError::NoObjects { .. }), "{error}");
}

#[test]
fn the_command_reads_keys_from_the_environment_and_tells_the_pod() {
    let (server, dir) = (filled(), tempfile::tempdir().unwrap());
    server.put("one/x.gguf", &content(1000, 9), Tag::Md5);
    server.put("one/y.gguf", &content(1000, 8), Tag::Md5);
    let result = dir.path().join("result.json");
    let output = Command::new(env!("CARGO_BIN_EXE_ashlar"))
        .args(["pull", "s3://models/one/x.gguf", "--revision=latest"])
        .arg(format!("--endpoint={}", server.endpoint()))
        .arg(format!("--region={REGION}"))
        .arg(format!("--dest={}", dir.path().join("m").display()))
        .arg(format!("--result-file={}", result.display()))
        .env("AWS_ACCESS_KEY_ID", KEY)
        .env("AWS_SECRET_ACCESS_KEY", SECRET)
        // A default, which `--dest` beats.
        .env("ASHLAR_CACHE", dir.path().join("cache"))
        .output()
        .unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words}");
    assert!(
        !words.contains("Signature=") && !words.contains(SECRET),
        "{words}"
    );
    let told: serde_json::Value = serde_json::from_slice(&std::fs::read(&result).unwrap()).unwrap();
    assert_eq!(
        (told["bytes"].as_u64(), told["files"].as_u64()),
        (Some(1000), Some(1))
    );
    assert_eq!(told["revision"].as_str().unwrap().len(), 40);
}
