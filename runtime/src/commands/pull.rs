//! `ashlar pull`: a model from a hub to this machine.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::Context;
use serde_json::json;

use ashlar::hub::{
    Hub, HubConfig, ModelUri, Place, Progress, PullOptions, Pulled, Selection, Token,
    default_cache, progress::serve_status, pull,
};

/// Download a model: resumes, checks every hash, and prints the commit that a branch or tag meant.
#[derive(Debug, clap::Args)]
pub(crate) struct PullArgs {
    /// Repository: OWNER/NAME, or hf://OWNER/NAME[/FILE.gguf][@REVISION].
    #[arg(value_name = "REPO")]
    repo: String,

    /// Branch, tag or commit; resolved once, before anything is downloaded.
    #[arg(long, env = "ASHLAR_REVISION", value_name = "REVISION")]
    revision: Option<String>,

    /// Put the files directly into this folder.
    #[arg(
        long,
        env = "ASHLAR_DEST",
        value_name = "DIR",
        conflicts_with = "cache"
    )]
    dest: Option<PathBuf>,

    /// Put the model into this cache of many models [default: $XDG_CACHE_HOME/ashlar or ~/.cache/ashlar].
    #[arg(long, env = "ASHLAR_CACHE", value_name = "DIR")]
    cache: Option<PathBuf>,

    /// Access token for private and gated repositories; better given by the variable than on the command line.
    #[arg(long, env = "HF_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    token: Option<String>,

    /// Address of the hub or of a mirror.
    #[arg(long, env = "HF_ENDPOINT", value_name = "URL")]
    endpoint: Option<String>,

    /// Only files that match this pattern (`*` and `?`); may be given several times.
    #[arg(long, value_name = "PATTERN")]
    include: Vec<String>,

    /// No file that matches this pattern; may be given several times.
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<String>,

    /// Files downloaded at once.
    #[arg(long, env = "ASHLAR_MAX_WORKERS", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=32))]
    max_workers: u8,

    /// Serve progress as JSON on this port while it runs: {phase, revision, file, downloadedBytes, totalBytes, error}.
    #[arg(long, env = "ASHLAR_STATUS_PORT", value_name = "PORT")]
    status_port: Option<u16>,

    /// Write the result (or the error) here too, as JSON; in a pod: /dev/termination-log.
    #[arg(long, env = "ASHLAR_RESULT_FILE", value_name = "FILE")]
    result_file: Option<PathBuf>,
}

/// Runs the command. Prints one line of JSON: `{"repo", "revision", "path", "files", "bytes"}`.
///
/// # Errors
/// When the model cannot be had; the message says what to do.
pub(crate) fn run(args: PullArgs) -> anyhow::Result<()> {
    let (hub, options) = prepare(&args)?;
    let progress = Progress::visible();
    if let Some(port) = args.status_port {
        let address = serve_status(progress.clone(), port)
            .with_context(|| format!("cannot serve --status-port {port}"))?;
        tracing::info!(%address, "serving progress");
    }
    let pulled = pull(&hub, &options, &progress);
    let result = match &pulled {
        Ok(pulled) => describe(&options.repo, pulled),
        Err(error) => json!({"repo": options.repo, "error": error.to_string()}),
    };
    if let Some(file) = &args.result_file {
        write_result(file, &result)?;
    }
    pulled?;
    writeln!(std::io::stdout(), "{result}").context("cannot write to standard output")
}

fn prepare(args: &PullArgs) -> anyhow::Result<(Hub, PullOptions)> {
    let text = if args.repo.contains("://") {
        args.repo.clone()
    } else {
        format!("hf://{}", args.repo)
    };
    let ModelUri::Hub {
        repo,
        revision,
        file,
    } = ModelUri::parse(&text)?
    else {
        anyhow::bail!(
            "{} is on this machine already: pull takes OWNER/NAME or hf://OWNER/NAME",
            args.repo
        );
    };
    if let (Some(in_uri), Some(flag)) = (&revision, &args.revision)
        && in_uri != flag
    {
        anyhow::bail!("two revisions: {in_uri} in the address and --revision {flag}; give one");
    }
    if file.is_some() && !args.include.is_empty() {
        anyhow::bail!("the address names a file already: leave --include out");
    }
    let mut config = HubConfig::from_env()?;
    config.workers = args.max_workers.into();
    if let Some(endpoint) = &args.endpoint {
        config.set_endpoint(endpoint)?;
    }
    if let Some(token) = &args.token {
        config.token = Token::new(token);
    }
    let place = match (&args.dest, &args.cache) {
        (Some(dest), _) => Place::Folder(dest.clone()),
        (None, cache) => Place::Cache(cache.clone().unwrap_or_else(default_cache)),
    };
    let include = file.map_or_else(|| args.include.clone(), |file| vec![file]);
    let revision = revision
        .or_else(|| args.revision.clone())
        .unwrap_or_else(|| "main".to_owned());
    let selection = Selection {
        include,
        exclude: args.exclude.clone(),
    };
    Ok((
        Hub::new(config)?,
        PullOptions {
            repo,
            revision,
            place,
            selection,
        },
    ))
}

fn describe(repo: &str, pulled: &Pulled) -> serde_json::Value {
    json!({
        "repo": repo,
        "revision": pulled.revision,
        "path": pulled.model_path(),
        "files": pulled.files.len(),
        "bytes": pulled.bytes(),
    })
}

fn write_result(file: &Path, result: &serde_json::Value) -> anyhow::Result<()> {
    // In place, not by renaming: a termination log is a mounted file.
    std::fs::write(file, result.to_string())
        .with_context(|| format!("cannot write --result-file {}", file.display()))
}
