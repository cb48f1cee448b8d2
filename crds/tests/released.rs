//! The resource only grows: what any released definition takes, this one takes, and means the same by it.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::{fs, path::Path};

use serde_json::Value;

/// Where `newer` no longer takes what `older` took.
fn shrunk(path: &str, older: &Value, newer: &Value, found: &mut Vec<String>) {
    if older["type"] != newer["type"] {
        found.push(format!(
            "{path}: {} became {}",
            older["type"], newer["type"]
        ));
    }
    let names = |schema: &Value| -> Vec<String> {
        let required = schema["required"].as_array().into_iter().flatten();
        required
            .filter_map(|name| Some(name.as_str()?.to_owned()))
            .collect()
    };
    let before = names(older);
    for name in names(newer) {
        if !before.contains(&name) {
            found.push(format!("{path}.{name}: became required"));
        }
    }
    for value in older["enum"].as_array().into_iter().flatten() {
        if !newer["enum"]
            .as_array()
            .is_none_or(|all| all.contains(value))
        {
            found.push(format!("{path}: no longer takes {value}"));
        }
    }
    for (bound, tighter) in [
        ("minimum", 1.0),
        ("maximum", -1.0),
        ("minLength", 1.0),
        ("maxLength", -1.0),
        ("maxItems", -1.0),
    ] {
        let (before, after) = (older[bound].as_f64(), newer[bound].as_f64());
        if after.is_some_and(|after| before.is_none_or(|before| (after - before) * tighter > 0.0)) {
            found.push(format!("{path}: {bound} became {after:?}"));
        }
    }
    if older["default"] != newer["default"] && !older["default"].is_object() {
        found.push(format!("{path}: the default became {}", newer["default"]));
    }
    for (name, older) in older["properties"].as_object().into_iter().flatten() {
        match newer["properties"].get(name) {
            Some(newer) => shrunk(&format!("{path}.{name}"), older, newer, found),
            None => found.push(format!("{path}.{name}: is gone")),
        }
    }
    if older["items"].is_object() {
        shrunk(
            &format!("{path}[]"),
            &older["items"],
            &newer["items"],
            found,
        );
    }
}

fn schema(crd: &Value, version: &str) -> Value {
    let versions = crd["spec"]["versions"].as_array().unwrap();
    let found = versions.iter().find(|one| one["name"] == version);
    let found = found.unwrap_or_else(|| panic!("version {version} is gone"));
    assert_eq!(found["served"], true, "{version} is no longer served");
    found["schema"]["openAPIV3Schema"].clone()
}

#[test]
fn no_release_knew_a_field_that_this_one_does_not() {
    let newest = serde_json::to_value(ashlar_crds::inference_service_crd()).unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("released");
    let mut releases = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let released: Value = serde_yaml_ng::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        let mut found = Vec::new();
        for version in released["spec"]["versions"].as_array().unwrap() {
            let name = version["name"].as_str().unwrap();
            shrunk(
                "",
                &schema(&released, name),
                &schema(&newest, name),
                &mut found,
            );
        }
        assert!(found.is_empty(), "{}: {found:#?}", path.display());
        releases += 1;
    }
    assert!(releases > 0);
}

#[test]
fn what_shrinks_is_seen() {
    let older = serde_json::json!({"type": "object", "properties": {
        "a": {"type": "string", "enum": ["x", "y"], "maxLength": 9}, "b": {"type": "integer", "maximum": 9}, "c": {"type": "array", "items": {"type": "string"}}, "d": {"type": "string"}}});
    let newer = serde_json::json!({"type": "object", "required": ["a"], "properties": {
        "a": {"type": "string", "enum": ["x"], "maxLength": 5}, "b": {"type": "integer", "maximum": 8, "default": 1}, "c": {"type": "array", "items": {"type": "integer"}}}});
    let mut found = Vec::new();
    shrunk("", &older, &newer, &mut found);
    assert_eq!(found.len(), 7, "{found:#?}");
    found.clear();
    shrunk("", &older, &older, &mut found);
    assert!(found.is_empty());
}
