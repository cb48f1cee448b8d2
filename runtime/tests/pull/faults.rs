//! Connections that break or stall, wrong bytes, a busy hub.

use ashlar::hub::HubError;

use crate::{
    hub_server::{Fault, HubServer},
    into_folder, single, temp,
};

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
