//! Fuzz targets: everything of the runtime that reads what others wrote.
//!
//! A target takes any bytes and must come back: an input is refused by an error or served, and nothing panics, hangs or
//! takes memory that the input does not have. `make fuzz MINUTES=10` runs each with libFuzzer from its corpus
//! (`corpus/NAME`); `tests/corpus.rs` runs the corpora, and damaged copies of them, as ordinary tests.
#![forbid(unsafe_code)]

mod checkpoint;
mod request;
mod template;
mod tool_calls;

#[expect(
    clippy::unwrap_used,
    unreachable_pub,
    reason = "shared with the runtime's own tests"
)]
#[path = "../../tests/support/tiny_tokenizer.rs"]
mod tiny_tokenizer;

use std::{
    path::Path,
    sync::{Arc, LazyLock},
};

use ashlar::tokenizer::Tokenizer;

/// One fuzz target.
pub struct Target {
    /// Its name, and its corpus's.
    pub name: &'static str,
    /// Takes one input.
    pub run: fn(&[u8]),
}

/// All of them.
pub const TARGETS: [Target; 6] = [
    Target {
        name: "request",
        run: request::run,
    },
    Target {
        name: "chat_template",
        run: template::run,
    },
    Target {
        name: "gguf",
        run: checkpoint::gguf,
    },
    Target {
        name: "safetensors",
        run: checkpoint::safetensors,
    },
    Target {
        name: "quantization",
        run: checkpoint::quantization,
    },
    Target {
        name: "tool_calls",
        run: tool_calls::run,
    },
];

/// Splits an input at its first zero byte.
fn halves(data: &[u8]) -> (&[u8], &[u8]) {
    match data.iter().position(|&byte| byte == 0) {
        Some(at) => (&data[..at], &data[at + 1..]),
        None => (data, &[]),
    }
}

/// A folder in memory where the system has one.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() {
        tempfile::tempdir_in(memory)
    } else {
        tempfile::tempdir()
    };
    folder.expect("a folder for the inputs can be made")
}

/// One token per byte, and a few more.
fn tokenizer() -> Arc<Tokenizer> {
    static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
        let folder = scratch();
        tiny_tokenizer::write(folder.path());
        let tokenizer = Tokenizer::from_model_path(folder.path());
        Arc::new(tokenizer.expect("the tiny tokenizer is valid"))
    });
    Arc::clone(&TOKENIZER)
}
