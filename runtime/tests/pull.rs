//! `hub::pull` against a server on loopback that speaks the hub's protocol, faults included.
#![allow(clippy::unwrap_used, missing_docs, unreachable_pub)] // a test may panic, and has no callers

#[path = "support/hub_server.rs"]
mod hub_server;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use ashlar::hub::{
    Hub, HubConfig, HubError, Phase, Place, Progress, PullOptions, Pulled, Selection, Token, pull,
};
use hub_server::{COMMIT, Fault, HubServer, Repository};

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

#[test]
fn takes_what_a_runtime_needs_and_resolves_the_branch() {
    let server = HubServer::start(sharded());
    let (_dir, folder) = temp();
    let pulled = into_folder(&server, &folder).unwrap();
    assert_eq!(pulled.revision, COMMIT);
    let want = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ];
    assert_eq!(listing(&folder), want);
    for name in want {
        assert_eq!(
            std::fs::read(folder.join(name)).unwrap(),
            server.content(name),
            "{name}"
        );
    }
    assert_eq!(
        pulled.bytes(),
        want.iter()
            .map(|name| server.content(name).len() as u64)
            .sum::<u64>()
    );
    assert_eq!(pulled.model_path(), folder);
    // Everything after the first answer names the commit, so that a moving branch cannot mix two revisions.
    assert!(
        server
            .requests()
            .iter()
            .skip(1)
            .all(|request| request.path.contains(COMMIT)),
        "{:?}",
        server.requests()
    );
}

#[test]
fn a_second_pull_of_a_commit_sends_nothing() {
    let server = HubServer::start(sharded());
    let (_dir, folder) = temp();
    into_folder(&server, &folder).unwrap();
    let before = server.requests().len();
    let mut options = options(Place::Folder(folder.clone()));
    options.revision = COMMIT.into();
    pull(
        &Hub::new(config(&server)).unwrap().into(),
        &options,
        &Progress::silent(),
    )
    .unwrap();
    assert_eq!(server.requests().len(), before);
    // By its branch it asks once what the branch means now.
    into_folder(&server, &folder).unwrap();
    assert_eq!(server.requests().len(), before + 1);
}

#[test]
fn a_broken_connection_goes_on_where_it_stopped() {
    let server = HubServer::start(single(3_000_000));
    server.fault(
        "model.safetensors",
        Fault::BreakAfter {
            bytes: 1_000_000,
            times: 2,
        },
    );
    let (_dir, folder) = temp();
    into_folder(&server, &folder).unwrap();
    assert_eq!(
        std::fs::read(folder.join("model.safetensors")).unwrap(),
        server.content("model.safetensors")
    );
    let starts: Vec<u64> = server
        .requests()
        .iter()
        .filter(|r| r.is_get_of("model.safetensors"))
        .map(|r| r.range_start)
        .collect();
    assert_eq!(starts.len(), 3, "{starts:?}");
    assert!(
        starts[0] == 0 && starts[1] > 0 && starts[2] > starts[1],
        "each attempt starts further on: {starts:?}"
    );
}

#[test]
fn a_later_run_resumes_what_an_earlier_one_left() {
    let server = HubServer::start(single(3_000_000));
    server.fault(
        "model.safetensors",
        Fault::BreakAfter {
            bytes: 1_000_000,
            times: 1,
        },
    );
    server.fault(
        "model.safetensors",
        Fault::Status {
            status: 503,
            times: 10,
        },
    );
    let (_dir, folder) = temp();
    let error = into_folder(&server, &folder).unwrap_err();
    assert!(
        matches!(error, HubError::Network { attempts: 3, .. }),
        "{error}"
    );
    assert!(
        !folder.join("model.safetensors").exists(),
        "no file before it is whole"
    );
    server.clear_faults();
    let before = server.requests().len();
    into_folder(&server, &folder).unwrap();
    let starts: Vec<u64> = server.requests()[before..]
        .iter()
        .filter(|r| r.is_get_of("model.safetensors"))
        .map(|r| r.range_start)
        .collect();
    assert!(starts.len() == 1 && starts[0] > 0, "{starts:?}");
    assert_eq!(
        std::fs::read(folder.join("model.safetensors")).unwrap(),
        server.content("model.safetensors")
    );
}

#[test]
fn a_mirror_that_ignores_ranges_restarts_the_file() {
    let server = HubServer::start(single(1_500_000));
    server.fault(
        "model.safetensors",
        Fault::BreakAfter {
            bytes: 500_000,
            times: 1,
        },
    );
    server.ignore_ranges();
    let (_dir, folder) = temp();
    into_folder(&server, &folder).unwrap();
    assert_eq!(
        std::fs::read(folder.join("model.safetensors")).unwrap(),
        server.content("model.safetensors")
    );
}

#[test]
fn wrong_bytes_are_fetched_once_more_and_then_refused() {
    for (name, times) in [("model.safetensors", 1), ("config.json", 1)] {
        let server = HubServer::start(single(400_000));
        server.fault(name, Fault::Corrupt { times });
        let (_dir, folder) = temp();
        into_folder(&server, &folder).unwrap();
        assert_eq!(
            std::fs::read(folder.join(name)).unwrap(),
            server.content(name),
            "{name}"
        );
    }
    let server = HubServer::start(single(400_000));
    server.fault("model.safetensors", Fault::Corrupt { times: 10 });
    let (_dir, folder) = temp();
    let error = into_folder(&server, &folder).unwrap_err();
    assert!(
        matches!(&error, HubError::HashMismatch { file, .. } if file == "model.safetensors"),
        "{error}"
    );
    assert!(!folder.join("model.safetensors").exists());
    let parts = std::fs::read_dir(folder.join(".ashlar/partial"))
        .unwrap()
        .count();
    assert_eq!(parts, 0, "wrong bytes must not be resumed later");
}

#[test]
fn a_stalled_connection_is_given_up_and_resumed() {
    let server = HubServer::start(single(2_000_000));
    server.fault(
        "model.safetensors",
        Fault::StallAfter {
            bytes: 600_000,
            times: 1,
        },
    );
    let (_dir, folder) = temp();
    into_folder(&server, &folder).unwrap();
    assert_eq!(
        std::fs::read(folder.join("model.safetensors")).unwrap(),
        server.content("model.safetensors")
    );
    assert!(
        server
            .requests()
            .iter()
            .any(|r| r.is_get_of("model.safetensors") && r.range_start > 0)
    );
}

#[test]
fn refusals_say_what_to_do() {
    let cases: &[(u16, &str, &str)] = &[
        (401, "GatedRepo", "accept its conditions"),
        (403, "GatedRepo", "accept its conditions"),
        (401, "RepoNotFound", "check the spelling"),
        (404, "RepoNotFound", "check the spelling"),
        (404, "RevisionNotFound", "no revision \"main\""),
        (401, "", "HF_TOKEN"),
        (403, "", "HF_TOKEN"),
        (404, "", "check the spelling"),
        (418, "", "HTTP 418"),
    ];
    for &(status, code, words) in cases {
        let server = HubServer::start(single(10));
        server.refuse_listing(status, code);
        let (_dir, folder) = temp();
        let error = into_folder(&server, &folder).unwrap_err().to_string();
        assert!(error.contains(words), "{status} {code}: {error}");
        assert_eq!(
            server.requests().len(),
            1,
            "{status} {code} will not pass: it must not be retried"
        );
        assert!(
            !folder.exists(),
            "nothing is written for a model that cannot be had"
        );
    }
}

#[test]
fn a_missing_file_is_named() {
    let server = HubServer::start(single(10));
    server.fault(
        "model.safetensors",
        Fault::Status {
            status: 404,
            times: 9,
        },
    );
    let (_dir, folder) = temp();
    let error = into_folder(&server, &folder).unwrap_err();
    assert!(
        matches!(&error, HubError::FileNotFound { file, .. } if file == "model.safetensors"),
        "{error}"
    );
}

#[test]
fn a_busy_hub_is_asked_again() {
    let server = HubServer::start(single(10_000));
    server.fault(
        "model.safetensors",
        Fault::Status {
            status: 429,
            times: 2,
        },
    );
    let (_dir, folder) = temp();
    into_folder(&server, &folder).unwrap();
    assert_eq!(
        server
            .requests()
            .iter()
            .filter(|r| r.is_get_of("model.safetensors"))
            .count(),
        3
    );
}

#[test]
fn the_token_goes_to_the_hub_and_not_to_its_storage() {
    let storage = HubServer::start(single(50_000));
    let server = HubServer::start(single(50_000));
    server.redirect_large_files_to(&storage);
    server.require_token("hf_secret");
    let (_dir, folder) = temp();
    let error = into_folder(&server, &folder).unwrap_err();
    assert!(
        matches!(error, HubError::Unauthorized { status: 401, .. }),
        "{error}"
    );
    let config = HubConfig {
        token: Token::new("hf_secret"),
        ..config(&server)
    };
    pull(
        &Hub::new(config).unwrap().into(),
        &options(Place::Folder(folder.clone())),
        &Progress::silent(),
    )
    .unwrap();
    assert_eq!(
        std::fs::read(folder.join("model.safetensors")).unwrap(),
        server.content("model.safetensors")
    );
    assert!(!storage.requests().is_empty());
    assert!(
        storage
            .requests()
            .iter()
            .all(|request| request.authorization.is_none()),
        "the token left the hub's host"
    );
}

#[test]
fn a_hub_whose_listing_has_no_hashes_is_asked_file_by_file() {
    let server = HubServer::start(single(50_000));
    server.bare_listing();
    server.fault("model.safetensors", Fault::Corrupt { times: 10 });
    let (_dir, folder) = temp();
    let error = into_folder(&server, &folder).unwrap_err();
    assert!(
        matches!(error, HubError::HashMismatch { .. }),
        "hashes come from the ETag then: {error}"
    );
    server.clear_faults();
    into_folder(&server, &folder).unwrap();
    assert_eq!(
        std::fs::read(folder.join("model.safetensors")).unwrap(),
        server.content("model.safetensors")
    );
}

#[test]
fn names_that_leave_the_folder_are_refused() {
    let server = HubServer::start(single(10).file("../evil.json", b"x"));
    let (dir, folder) = temp();
    let error = into_folder(&server, &folder).unwrap_err();
    assert!(
        matches!(error, HubError::Protocol { .. }) && error.to_string().contains("evil"),
        "{error}"
    );
    assert!(!dir.path().join("evil.json").exists());
}

#[test]
fn a_cache_shows_a_model_only_when_it_is_whole() {
    let server = HubServer::start(single(2_000_000));
    server.fault(
        "model.safetensors",
        Fault::Status {
            status: 500,
            times: 10,
        },
    );
    let (_dir, cache) = temp();
    pull_from(&server, Place::Cache(cache.clone())).unwrap_err();
    let complete = |cache: &Path| {
        let folders = std::fs::read_dir(cache.join("sha256"))
            .unwrap()
            .map(|entry| entry.unwrap().path());
        folders
            .filter(|path| path.is_dir() && path.extension().is_none())
            .collect::<Vec<_>>()
    };
    assert_eq!(complete(&cache), Vec::<PathBuf>::new());
    server.clear_faults();
    let pulled = pull_from(&server, Place::Cache(cache.clone())).unwrap();
    assert_eq!(complete(&cache), std::slice::from_ref(&pulled.folder));
    assert_eq!(
        pulled.folder.file_name().unwrap().len(),
        64,
        "the name is a hash"
    );
    assert_eq!(
        listing(&pulled.folder),
        ["config.json", "model.safetensors"]
    );
}

#[test]
fn a_cached_branch_serves_without_the_hub() {
    let server = HubServer::start(single(1000));
    let (_dir, cache) = temp();
    let first = pull_from(&server, Place::Cache(cache.clone())).unwrap();
    let config = config(&server);
    drop(server);
    let hub = Hub::new(config).unwrap().into();
    assert_eq!(
        pull(
            &hub,
            &options(Place::Cache(cache.clone())),
            &Progress::silent()
        )
        .unwrap(),
        first
    );
    // A branch never seen before cannot be served, and the message says that the hub was unreachable.
    let unseen = PullOptions {
        revision: "other".into(),
        ..options(Place::Cache(cache))
    };
    assert!(matches!(
        pull(&hub, &unseen, &Progress::silent()),
        Err(HubError::Network { .. })
    ));
}

#[test]
fn a_new_revision_in_the_same_folder_leaves_no_old_file() {
    let server = HubServer::start(sharded());
    let (_dir, folder) = temp();
    into_folder(&server, &folder).unwrap();
    std::fs::write(folder.join("mine.txt"), "kept").unwrap();
    server.replace(single(5000), &"b".repeat(40));
    let pulled = into_folder(&server, &folder).unwrap();
    assert_eq!(pulled.revision, "b".repeat(40));
    assert_eq!(
        listing(&folder),
        ["config.json", "mine.txt", "model.safetensors"],
        "stale shards would be loaded"
    );
}

#[test]
fn a_damaged_local_file_is_replaced() {
    let server = HubServer::start(single(5000));
    let (_dir, folder) = temp();
    into_folder(&server, &folder).unwrap();
    std::fs::write(folder.join("model.safetensors"), "short").unwrap();
    into_folder(&server, &folder).unwrap();
    assert_eq!(
        std::fs::read(folder.join("model.safetensors")).unwrap(),
        server.content("model.safetensors")
    );
}

#[test]
fn two_pulls_at_once_download_once() {
    let server = HubServer::start(single(3_000_000));
    let (_dir, cache) = temp();
    let both: Vec<Pulled> = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..2)
            .map(|_| scope.spawn(|| pull_from(&server, Place::Cache(cache.clone())).unwrap()))
            .collect();
        runs.into_iter().map(|run| run.join().unwrap()).collect()
    });
    assert_eq!(both[0], both[1]);
    assert_eq!(
        server
            .requests()
            .iter()
            .filter(|r| r.is_get_of("model.safetensors"))
            .count(),
        1
    );
}

#[test]
fn one_gguf_by_pattern_is_the_model_itself() {
    let repository = Repository::default()
        .lfs("x-Q4_0.gguf", &bytes(3000, 1))
        .lfs("x-Q8_0.gguf", &bytes(6000, 2));
    let server = HubServer::start(repository);
    let (_dir, folder) = temp();
    let error = into_folder(&server, &folder).unwrap_err();
    assert!(error.to_string().contains("x-Q8_0.gguf"), "{error}");
    let mut options = options(Place::Folder(folder.clone()));
    options.selection.include = vec!["*Q4_0.gguf".into()];
    let pulled = pull(
        &Hub::new(config(&server)).unwrap().into(),
        &options,
        &Progress::silent(),
    )
    .unwrap();
    assert_eq!(pulled.model_path(), folder.join("x-Q4_0.gguf"));
    assert_eq!(listing(&folder), ["x-Q4_0.gguf"]);
}

#[test]
fn the_status_endpoint_tells_phase_and_bytes() {
    use std::io::{Read, Write};
    let server = HubServer::start(single(200_000));
    let (_dir, folder) = temp();
    let progress = Progress::silent();
    let port = ashlar::hub::progress::serve_status(progress.clone(), 0)
        .unwrap()
        .port();
    let read = || {
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream
            .write_all(b"GET /status HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        serde_json::from_str::<serde_json::Value>(text.split("\r\n\r\n").nth(1).unwrap()).unwrap()
    };
    assert_eq!(read()["phase"], "resolving");
    let hub = Hub::new(config(&server)).unwrap().into();
    pull(&hub, &options(Place::Folder(folder.clone())), &progress).unwrap();
    let status = read();
    assert_eq!(
        (&status["phase"], &status["revision"]),
        (&"ready".into(), &COMMIT.into())
    );
    assert_eq!(
        (
            status["downloadedBytes"].as_u64(),
            status["totalBytes"].as_u64()
        ),
        (Some(200_002), Some(200_002))
    );
    server.refuse_listing(404, "RepoNotFound");
    pull(&hub, &options(Place::Folder(folder)), &progress).unwrap_err();
    assert_eq!(progress.status().phase, Phase::Failed);
    assert!(read()["error"].as_str().unwrap().contains("owner/model"));
}
