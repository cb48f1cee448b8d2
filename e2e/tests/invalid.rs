//! A user makes a mistake and is told which field breaks which rule, by the API server itself.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use ashlar_e2e::cluster::run;
use ashlar_e2e::with_namespace;

/// The examples whose file name starts with `prefix`.
fn examples(prefix: &str) -> Result<Vec<PathBuf>> {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../crds/examples"));
    let mut found = Vec::new();
    for entry in
        std::fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))?
    {
        let path = entry?.path();
        if path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(prefix))
        {
            found.push(path);
        }
    }
    found.sort();
    ensure!(!found.is_empty(), "no {prefix}* in {}", folder.display());
    Ok(found)
}

#[tokio::test]
async fn every_invalid_example_is_refused_with_its_field_and_rule() -> Result<()> {
    with_namespace("invalid", async |ns| {
        let mut wrong = Vec::new();
        for path in examples("invalid-")? {
            let text = std::fs::read_to_string(&path)?;
            let first = text.lines().next().unwrap_or_default();
            let expected = first
                .strip_prefix("# expect: ")
                .with_context(|| format!("{}: no `# expect: ` line", path.display()))?;
            let file = path.to_str().context("the repository's path is UTF-8")?;
            match run(
                "kubectl",
                &["create", "--dry-run=server", "-n", &ns.name, "-f", file],
            )
            .await
            {
                Ok(_) => wrong.push(format!("{file}: accepted")),
                Err(error) => {
                    let message = format!("{error:#}");
                    // Refused by validation, not for being unreadable, and with the rule's own words.
                    let by_rule = message.contains("is invalid") && message.contains(expected);
                    let names_field = message.contains("spec") || message.contains("metadata.name");
                    if !(by_rule && names_field) {
                        wrong.push(format!("{file}: expected {expected:?} in {message}"));
                    }
                }
            }
        }
        if !wrong.is_empty() {
            bail!("{}", wrong.join("\n"));
        }
        Ok(())
    })
    .await
}

#[tokio::test]
async fn every_valid_example_is_accepted() -> Result<()> {
    with_namespace("valid", async |ns| {
        for path in examples("valid-")? {
            let file = path.to_str().context("the repository's path is UTF-8")?;
            run(
                "kubectl",
                &["create", "--dry-run=server", "-n", &ns.name, "-f", file],
            )
            .await?;
        }
        Ok(())
    })
    .await
}
