//! Prints the CRD; `make generate` writes it to `crds/yaml`.
#![forbid(unsafe_code)]

use std::io::Write as _;

fn main() -> std::io::Result<()> {
    std::io::stdout().write_all(ashlar_crds::inference_service_crd_yaml().as_bytes())
}
