//! libFuzzer around one target, named by `ASHLAR_FUZZ_TARGET`. `make fuzz` runs them all.
#![no_main]

use std::sync::LazyLock;

use ashlar_fuzz::{TARGETS, Target};

static TARGET: LazyLock<&Target> = LazyLock::new(|| {
    let name = std::env::var("ASHLAR_FUZZ_TARGET").unwrap_or_default();
    let found = TARGETS.iter().find(|target| target.name == name);
    found.unwrap_or_else(|| {
        let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
        panic!("set ASHLAR_FUZZ_TARGET to one of {names:?}")
    })
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| (TARGET.run)(data));
