//! `ashlar pull`.

/// Flags of `ashlar pull`.
#[derive(Debug, clap::Args)]
pub(crate) struct PullArgs {}

/// Runs `ashlar pull`.
pub(crate) fn run(_args: PullArgs) -> anyhow::Result<()> {
    anyhow::bail!("this build does not have `ashlar pull`")
}
