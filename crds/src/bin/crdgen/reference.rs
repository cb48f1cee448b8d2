//! The resource's fields as a page: one table for `spec`, one for `status`, and the rules.

use std::fmt::Write as _;

use serde_json::Value;

/// Fields of Kubernetes' own types: their parts are in Kubernetes' reference.
const FOREIGN: [&str; 6] = [
    "affinity",
    "allowFrom",
    "behavior",
    "conditions",
    "template",
    "tolerations",
];

/// The page.
pub(super) fn markdown() -> String {
    let crd = serde_json::to_value(ashlar_crds::inference_service_crd())
        .expect("a CRD is plain data: this is a bug");
    let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    let mut page = String::from(
        "<!-- Generated from the types by `make generate`; edit crds/src/inference_service.rs. -->\n\n# InferenceService\n\n\
         `serving.ashlar.dev/v1alpha1`, short name `infsvc`. Unknown fields are refused. Defaults are filled in by the API server, so\n\
         `kubectl get -o yaml` shows them.\n",
    );
    for (part, title) in [("spec", "Spec"), ("status", "Status")] {
        let _ = write!(
            page,
            "\n## {title}\n\n| field | type | default | what it is |\n|---|---|---|---|\n"
        );
        fields(&mut page, part, &schema["properties"][part]);
    }
    page.push_str("\n## Rules\n\nBeyond the bounds above the API server refuses what breaks one of these:\n\n");
    rules(&mut page, schema);
    page
}

/// A row for every field below `path`.
fn fields(page: &mut String, path: &str, schema: &Value) {
    let required = schema["required"].as_array();
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        let needed = required.is_some_and(|all| all.iter().any(|one| one == name.as_str()));
        let default = match &field["default"] {
            Value::Null if needed => "required".to_owned(),
            // An object that is filled in from its own fields' defaults.
            Value::Null | Value::Object(_) => String::new(),
            value => format!("`{value}`"),
        };
        let about = field["description"].as_str().unwrap_or_default();
        let about = about.split_whitespace().collect::<Vec<_>>().join(" ");
        let bounds = bounds(field);
        let _ = writeln!(
            page,
            "| `{path}` | {} | {default} | {}{bounds} |",
            kind(field),
            about.replace('|', "\\|")
        );
        if FOREIGN.contains(&name.as_str()) {
            continue;
        }
        fields(page, &path, field);
        fields(page, &format!("{path}[]"), &field["items"]);
    }
}

fn kind(field: &Value) -> String {
    let plain = |field: &Value| {
        field["type"]
            .as_str()
            .unwrap_or("quantity")
            .replace("integer", "number")
    };
    match field["type"].as_str() {
        Some("array") => format!("list of {}s", plain(&field["items"])),
        Some("object") if field["additionalProperties"].is_object() => "map".to_owned(),
        _ => plain(field),
    }
}

fn bounds(field: &Value) -> String {
    let mut said = Vec::new();
    if let Some(values) = field["enum"].as_array() {
        let values: Vec<String> = values
            .iter()
            .filter_map(|value| Some(format!("`{}`", value.as_str()?)))
            .collect();
        said.push(format!("one of {}", values.join(", ")));
    }
    match (&field["minimum"], &field["maximum"]) {
        (Value::Null, Value::Null) => {}
        (least, most) => said.push(format!("{least} to {most}")),
    }
    if let Some(most) = field["maxItems"].as_u64() {
        said.push(format!("at most {most}"));
    }
    if said.is_empty() {
        String::new()
    } else {
        format!(" ({})", said.join("; "))
    }
}

/// The messages of all rules below `schema`.
fn rules(page: &mut String, schema: &Value) {
    for rule in schema["x-kubernetes-validations"]
        .as_array()
        .into_iter()
        .flatten()
    {
        if let Some(message) = rule["message"].as_str() {
            let _ = writeln!(page, "- {message}");
        }
    }
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        if !FOREIGN.contains(&name.as_str()) {
            rules(page, field);
        }
    }
}
