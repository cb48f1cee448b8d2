//! The committed YAML is what the types say, and the examples parse into them.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::{fs, path::Path};

use ashlar_crds::{InferenceService, inference_service_crd, inference_service_crd_yaml};

fn folder(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

#[test]
fn committed_yaml_is_fresh() {
    let committed =
        fs::read_to_string(folder("yaml/inferenceservices.serving.ashlar.dev.yaml")).unwrap();
    assert!(
        committed == inference_service_crd_yaml(),
        "run `make generate` and commit crds/yaml"
    );
    assert!(committed.lines().count() < 2500, "the CRD must stay small");
}

#[test]
fn valid_examples_survive_a_round_trip() {
    let mut seen = 0;
    for entry in fs::read_dir(folder("examples")).unwrap() {
        let path = entry.unwrap().path();
        if !path
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .starts_with("valid-")
        {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let service: InferenceService =
            serde_yaml_ng::from_str(&text).unwrap_or_else(|e| panic!("{path:?}: {e}"));
        let again: InferenceService =
            serde_json::from_value(serde_json::to_value(&service).unwrap()).unwrap();
        assert_eq!(service, again, "{path:?}");
        seen += 1;
    }
    assert!(seen >= 4);
}

#[test]
fn replicas_have_a_schema_default_so_that_scale_works() {
    let crd = serde_json::to_value(inference_service_crd()).unwrap();
    let version = &crd["spec"]["versions"][0];
    assert_eq!(
        version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["replicas"]["default"],
        1
    );
    assert_eq!(
        version["subresources"]["scale"]["specReplicasPath"],
        ".spec.replicas"
    );
    assert_eq!(
        version["subresources"]["scale"]["labelSelectorPath"],
        ".status.selector"
    );
}
