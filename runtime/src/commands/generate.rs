//! `ashlar generate`.

/// Flags of `ashlar generate`.
#[derive(Debug, clap::Args)]
pub(crate) struct GenerateArgs {}

/// Runs `ashlar generate`.
pub(crate) fn run(_args: GenerateArgs) -> anyhow::Result<()> {
    anyhow::bail!("this build does not have `ashlar generate`")
}
