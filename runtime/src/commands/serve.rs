//! `ashlar serve`.

use ashlar::config::EngineArgs;

/// Flags of `ashlar serve`.
#[derive(Debug, clap::Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    engine: EngineArgs,
}

/// Runs `ashlar serve` until SIGTERM or SIGINT.
pub(crate) fn run(args: ServeArgs) -> anyhow::Result<()> {
    args.engine.validate()?;
    anyhow::bail!("this build does not have `ashlar serve`")
}
