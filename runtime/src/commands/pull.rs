//! `ashlar pull`: a model from a hub or a bucket to this machine.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::Context;
use serde_json::json;

use ashlar::hub::{
    Budget, HubConfig, ModelUri, Place, Progress, PullOptions, Pulled, S3Config, Selection, Source,
    Token, default_cache, progress::serve_status, pull,
};

/// Download a model: resumes, checks every hash, and prints the commit that a branch or tag meant.
#[derive(Debug, clap::Args)]
pub(crate) struct PullArgs {
    /// OWNER/NAME or hf://OWNER/NAME[/FILE.gguf][@REVISION] of a hub, or s3://BUCKET/FOLDER[/FILE.gguf] of a store.
    #[arg(value_name = "MODEL")]
    repo: String,

    /// Branch, tag or commit; resolved once, before anything is downloaded. Of a bucket: what an earlier pull printed.
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

    /// Put the model into this cache of many models [default: $ASHLAR_CACHE, else $XDG_CACHE_HOME/ashlar or
    /// ~/.cache/ashlar].
    // Not clap's `env`: the variable is a default, which `--dest` beats, and no second answer that contradicts it.
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,

    /// Access token for private and gated repositories; better given by the variable than on the command line.
    #[arg(long, env = "HF_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    token: Option<String>,

    /// Address of the hub, of a mirror, or of an S3-compatible store [hub: $HF_ENDPOINT, store: $AWS_ENDPOINT_URL].
    #[arg(long, env = "ASHLAR_ENDPOINT", value_name = "URL")]
    endpoint: Option<String>,

    /// Region of the store [default: $AWS_REGION, else us-east-1]. Its keys are read from AWS_ACCESS_KEY_ID,
    /// AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN; without them requests are not signed.
    #[arg(long, env = "ASHLAR_REGION", value_name = "REGION")]
    region: Option<String>,

    /// Only files that match this pattern (`*` and `?`); may be given several times.
    #[arg(long, value_name = "PATTERN")]
    include: Vec<String>,

    /// No file that matches this pattern; may be given several times.
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<String>,

    /// Most bytes of the models in the folder that holds this one: with more, those that nothing uses go first, the least
    /// recently used before others.
    #[arg(long, env = "ASHLAR_MAX_CACHE_BYTES", value_name = "BYTES")]
    max_cache_bytes: Option<u64>,

    /// A model's folder, by name, that stays whatever room is needed; may be given several times.
    #[arg(long, value_name = "FOLDER", requires = "max_cache_bytes")]
    keep: Vec<String>,

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
    let (source, options) = prepare(&args)?;
    let progress = Progress::visible();
    if let Some(port) = args.status_port {
        let address = serve_status(progress.clone(), port)
            .with_context(|| format!("cannot serve --status-port {port}"))?;
        tracing::info!(%address, "serving progress");
    }
    let pulled = pull(&source, &options, &progress);
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

fn prepare(args: &PullArgs) -> anyhow::Result<(Source, PullOptions)> {
    let text = if args.repo.contains("://") {
        args.repo.clone()
    } else {
        format!("hf://{}", args.repo)
    };
    let uri = ModelUri::parse(&text)?;
    let (in_uri, file) = match &uri {
        ModelUri::Local(_) => (None, None),
        ModelUri::Hub { revision, file, .. } => (revision.clone(), file.clone()),
        ModelUri::Bucket { file, .. } => (None, file.clone()),
    };
    if let (Some(in_uri), Some(flag)) = (&in_uri, &args.revision)
        && in_uri != flag
    {
        anyhow::bail!("two revisions: {in_uri} in the address and --revision {flag}; give one");
    }
    if file.is_some() && !args.include.is_empty() {
        anyhow::bail!("the address names a file already: leave --include out");
    }
    let (config, store) = settings(args, &uri)?;
    let (source, repo) = Source::of(&uri, config, store)?;
    let place = match (&args.dest, &args.cache) {
        (Some(dest), _) => Place::Folder(dest.clone()),
        (None, cache) => Place::Cache(cache.clone().unwrap_or_else(default_cache)),
    };
    let revision = in_uri
        .or_else(|| args.revision.clone())
        .unwrap_or_else(|| source.default_revision().to_owned());
    let selection = Selection {
        include: file.map_or_else(|| args.include.clone(), |file| vec![file]),
        exclude: args.exclude.clone(),
    };
    let options = PullOptions {
        repo,
        revision,
        place,
        selection,
        budget: args.max_cache_bytes.map(|max_bytes| Budget {
            max_bytes,
            keep: args.keep.clone(),
        }),
    };
    Ok((source, options))
}

/// What the flags say, and for the rest the environment.
fn settings(args: &PullArgs, uri: &ModelUri) -> anyhow::Result<(HubConfig, S3Config)> {
    let mut config = HubConfig::from_env()?;
    config.workers = args.max_workers.into();
    if let Some(token) = &args.token {
        config.token = Token::new(token);
    }
    let mut store = S3Config::from_env();
    match (&args.endpoint, uri) {
        (Some(endpoint), ModelUri::Bucket { .. }) => store.endpoint = Some(endpoint.clone()),
        (Some(endpoint), _) => config.set_endpoint(endpoint)?,
        (None, _) => {}
    }
    if args.region.is_some() {
        store.region.clone_from(&args.region);
    }
    Ok((config, store))
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
