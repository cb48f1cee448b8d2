//! `ashlar bench`.

/// Flags of `ashlar bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct BenchArgs {}

/// Runs `ashlar bench`.
pub(crate) fn run(_args: BenchArgs) -> anyhow::Result<()> {
    anyhow::bail!("this build does not have `ashlar bench`")
}
