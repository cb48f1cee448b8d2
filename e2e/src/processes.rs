//! Processes of this machine, for faults that no API causes. The cluster must run here.

use std::process::Command;

use anyhow::{Result, ensure};

/// Where a process tells of itself, in words that end with a zero byte.
#[derive(Debug, Clone, Copy)]
pub enum Words {
    /// Its command line.
    Arguments,
    /// The variables that it was started with.
    Environment,
}

/// Kills the processes that have each of these words, at once and without a word to them.
///
/// # Errors
/// When there is none.
pub fn kill(words: &[(Words, &str)]) -> Result<()> {
    let found = find(words);
    ensure!(!found.is_empty(), "no process here has {words:?}");
    for process in found {
        // It may have ended by itself.
        let _ = Command::new("kill").args(["-KILL", &process]).status();
    }
    Ok(())
}

fn find(words: &[(Words, &str)]) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter(|process| {
            words.iter().all(|(place, word)| {
                let file = match place {
                    Words::Arguments => "cmdline",
                    Words::Environment => "environ",
                };
                let text = std::fs::read(process.path().join(file)).unwrap_or_default();
                text.split(|byte| *byte == 0)
                    .any(|found| found == word.as_bytes())
            })
        })
        .map(|process| process.file_name().to_string_lossy().into_owned())
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
        .collect()
}
