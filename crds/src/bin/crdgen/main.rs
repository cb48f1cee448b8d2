//! Prints what is generated from the types; `make generate` writes it to its places.
//!
//! - `crdgen`: the CRD as YAML, for `crds/yaml` and the chart
//! - `crdgen reference`: its fields as Markdown, for the docs
#![forbid(unsafe_code)]

mod reference;

use std::io::{Error, Write as _};

fn main() -> std::io::Result<()> {
    let text = match std::env::args().nth(1).as_deref() {
        None => ashlar_crds::inference_service_crd_yaml(),
        Some("reference") => reference::markdown(),
        Some(other) => {
            return Err(Error::other(format!(
                "nothing is called {other:?}: say `reference`, or nothing for the CRD"
            )));
        }
    };
    std::io::stdout().write_all(text.as_bytes())
}
