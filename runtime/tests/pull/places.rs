//! Folders and caches that hold models already.

use std::path::{Path, PathBuf};

use ashlar::hub::{Hub, HubError, Place, Progress, PullOptions, Pulled, pull};

use crate::{
    config,
    hub_server::{COMMIT, Fault, HubServer},
    into_folder, listing, options, pull_from, sharded, single, temp,
};

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
