//! Every file of every corpus through its target, whole, cut short, and with bytes changed. Inputs that a fuzzer found
//! to be trouble are part of the corpora.
#![allow(clippy::unwrap_used, missing_docs)] // Tests fail by panicking.

use std::{fs, path::Path};

use ashlar_fuzz::{TARGETS, Target};

/// Damaged copies of each file.
const DAMAGED: u64 = 32;

/// SplitMix64.
fn next(state: &mut u64) -> usize {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (z ^ (z >> 31)) as usize
}

fn smoke(target: &Target) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target.name);
    let mut files: Vec<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} has a corpus", target.name);
    let mut state = 7;
    for file in files {
        let whole = fs::read(&file).unwrap();
        (target.run)(&whole);
        for _ in 0..DAMAGED {
            let mut bytes = whole.clone();
            if next(&mut state).is_multiple_of(4) {
                bytes.truncate(next(&mut state) % (whole.len() + 1));
            }
            for _ in 0..next(&mut state) % 4 {
                if !bytes.is_empty() {
                    let at = next(&mut state) % bytes.len();
                    bytes[at] = next(&mut state) as u8;
                }
            }
            (target.run)(&bytes);
        }
    }
}

macro_rules! corpora {
    ($($name:ident),*) => {
        $(#[test]
        fn $name() {
            smoke(TARGETS.iter().find(|target| target.name == stringify!($name)).unwrap());
        })*

        #[test]
        fn every_target_is_tested() {
            assert_eq!(TARGETS.map(|target| target.name), [$(stringify!($name)),*]);
        }
    };
}

corpora!(
    request,
    chat_template,
    gguf,
    safetensors,
    quantization,
    tool_calls
);
