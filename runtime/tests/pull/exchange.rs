//! What is asked of the hub, what is taken and what is refused.

use ashlar::hub::{Hub, HubConfig, HubError, Phase, Place, Progress, Token, pull};

use crate::{
    bytes, config,
    hub_server::{COMMIT, Fault, HubServer, Repository},
    into_folder, listing, options, sharded, single, temp,
};

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
