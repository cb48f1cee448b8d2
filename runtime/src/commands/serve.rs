//! `ashlar serve`: binds, loads, serves, drains.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use ::http::HeaderName;
use anyhow::Context;
use ashlar::{
    config::EngineArgs,
    engine::EngineHandle,
    http::{
        self, ApiConfig, ApiKeys, ReasoningParser, ToolCallParser,
        server::{self, Connections, Site},
        tls::{Certificate, TlsError, TlsFiles},
    },
    hub::Progress,
    llm::LoadedModel,
    metrics::{LateObserver, Metrics},
    pooler::PoolerConfig,
    shutdown::{DrainTimes, Lifecycle, Phase, Signals, StopSignal},
    telemetry::{self, LogFormat},
    traces::Traces,
};
use tokio::net::TcpListener;

/// HTTP needs little, and on the CPU the model needs every core.
const WORKER_THREADS: usize = 2;
/// Threads for tokenising long prompts and loading.
const MAX_BLOCKING_THREADS: usize = 8;
/// Time that answers get to reach their clients once the engine has finished.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// Flags of `ashlar serve`.
#[derive(Debug, clap::Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    server: ServerArgs,
}

/// The flags that the model does not know.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Server")]
struct ServerArgs {
    /// Address to listen on
    #[arg(long, env = "ASHLAR_HOST", default_value = "0.0.0.0")]
    host: IpAddr,
    /// Port to listen on; 0 takes a free one
    #[arg(long, env = "ASHLAR_PORT", default_value_t = 8000)]
    port: u16,
    /// Names of the model in requests; answers carry the first [default: MODEL]
    #[arg(long, env = "ASHLAR_SERVED_MODEL_NAME", value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    served_model_name: Vec<String>,
    /// File with the server's certificate and those that it was signed with, in PEM: with it clients speak TLS. A new one is
    /// taken without a restart
    #[arg(
        long,
        env = "ASHLAR_SSL_CERTFILE",
        value_name = "FILE",
        requires = "ssl_keyfile"
    )]
    ssl_certfile: Option<PathBuf>,
    /// File with the certificate's key, in PEM
    #[arg(
        long,
        env = "ASHLAR_SSL_KEYFILE",
        value_name = "FILE",
        requires = "ssl_certfile"
    )]
    ssl_keyfile: Option<PathBuf>,
    /// Key that clients must send; may be given several times
    #[arg(
        long,
        env = "ASHLAR_API_KEY",
        value_name = "KEY",
        value_delimiter = ',',
        hide_env_values = true
    )]
    api_key: Vec<String>,
    /// Seconds that running requests get to finish after SIGTERM
    #[arg(
        long,
        env = "ASHLAR_SHUTDOWN_TIMEOUT",
        value_name = "SECONDS",
        default_value_t = 30
    )]
    shutdown_timeout: u64,
    /// Seconds after SIGTERM in which requests are still taken, while others learn that this server leaves
    #[arg(
        long,
        env = "ASHLAR_DRAIN_DELAY",
        value_name = "SECONDS",
        default_value_t = 5
    )]
    drain_delay: u64,
    /// Seconds without a sign of life from the engine after which /health fails; /health/live does after twice as many
    #[arg(
        long,
        env = "ASHLAR_HEALTH_STALL_TIMEOUT",
        value_name = "SECONDS",
        default_value_t = 60,
        value_parser = clap::value_parser!(u64).range(1..)
    )]
    health_stall_timeout: u64,
    /// Send usage at the end of every stream
    #[arg(long, env = "ASHLAR_ENABLE_FORCE_INCLUDE_USAGE")]
    enable_force_include_usage: bool,
    /// Write no log line per request
    #[arg(long, env = "ASHLAR_DISABLE_ACCESS_LOG")]
    disable_access_log: bool,
    /// How the model writes tool calls
    #[arg(long, env = "ASHLAR_TOOL_CALL_PARSER", value_enum, default_value_t)]
    tool_call_parser: ToolCallParser,
    /// Accepted for compatibility: tools are always offered to the model
    #[arg(long, env = "ASHLAR_ENABLE_AUTO_TOOL_CHOICE")]
    enable_auto_tool_choice: bool,
    /// How the model marks its reasoning
    #[arg(long, env = "ASHLAR_REASONING_PARSER", value_enum, default_value_t)]
    reasoning_parser: ReasoningParser,
    /// Seconds after which a request fails, however far it is [default: no limit]
    #[arg(long, env = "ASHLAR_REQUEST_TIMEOUT", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    request_timeout: Option<u64>,
    /// Header that names whose request it is, set by a proxy that clients cannot pass by; places are shared fairly
    /// between tenants [default: the API key]
    #[arg(long, env = "ASHLAR_TENANT_HEADER", value_name = "NAME")]
    tenant_header: Option<HeaderName>,
    /// Reuse the KV cache of equal prompt beginnings only among the requests of one tenant
    #[arg(long, env = "ASHLAR_ISOLATE_PREFIX_CACHE")]
    isolate_prefix_cache: bool,
    /// Who is served first: fcfs goes by arrival, priority by the requests' own `priority` (lower is sooner) before
    /// that; both share places fairly between tenants
    #[arg(long, env = "ASHLAR_SCHEDULING_POLICY", value_enum, default_value_t)]
    scheduling_policy: SchedulingPolicy,
    /// How embeddings are made: {"pooling_type": "LAST" or "MEAN", "normalize": true} [default: the model's own, or the
    /// last token's state at length 1]
    #[arg(long, env = "ASHLAR_POOLER_CONFIG", value_name = "JSON")]
    pooler_config: Option<PoolerConfig>,
    /// Show metrics under their former vLLM names too: gpu_cache_usage_perc, gpu_prefix_cache_hits and _queries,
    /// time_per_output_token_seconds, num_requests_swapped, cpu_cache_usage_perc
    #[arg(long, env = "ASHLAR_ENABLE_METRIC_ALIASES")]
    enable_metric_aliases: bool,
    /// Where to send OpenTelemetry traces, a span per request, by OTLP over HTTP: http://COLLECTOR:4318
    #[arg(long, env = "ASHLAR_OTLP_TRACES_ENDPOINT", value_name = "URL")]
    otlp_traces_endpoint: Option<String>,
    /// Form of log lines
    #[arg(long, env = "ASHLAR_LOG_FORMAT", value_enum, default_value_t)]
    log_format: LogFormat,
    /// What is logged: a level, or TARGET=LEVEL,…
    #[arg(
        long,
        env = "ASHLAR_LOG",
        value_name = "FILTER",
        default_value = "info"
    )]
    log: String,
}

/// Whether requests may say how urgent they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
enum SchedulingPolicy {
    #[default]
    Fcfs,
    Priority,
}

/// Runs `ashlar serve` until SIGTERM or SIGINT.
pub(crate) fn run(args: ServeArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    telemetry::init(args.server.log_format, &args.server.log).map_err(anyhow::Error::msg)?;
    args.engine.validate()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKER_THREADS)
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .thread_name("ashlar-http")
        .enable_all()
        .build()
        .context("the async runtime could not start")?;
    let result = runtime.block_on(serve(args, started));
    // Loading, if it still runs, is not waited for.
    runtime.shutdown_background();
    result
}

async fn serve(args: ServeArgs, started: Instant) -> anyhow::Result<()> {
    let mut signals = Signals::new().context("signal handlers could not be installed")?;
    let traces = match &args.server.otlp_traces_endpoint {
        Some(endpoint) => Some(Traces::new(endpoint)?),
        None => None,
    };
    let certificate = certificate(&args.server)?;
    let address = SocketAddr::new(args.server.host, args.server.port);
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}: choose another --host or --port"))?;
    let address = listener.local_addr().context("the socket has no address")?;
    let site = Site::default();
    let lifecycle = Lifecycle::default();
    let connections = Connections::default();
    tokio::spawn(server::serve(
        listener,
        site.clone(),
        lifecycle.clone(),
        connections.clone(),
        certificate.as_ref().map(Certificate::acceptor),
    ));
    tracing::info!(%address, model = %args.engine.model, "loading");
    // A cache that needs room sees by this that the model is in use.
    let _in_use = ashlar::hub::hold(std::path::Path::new(&args.engine.model));

    let observer = Arc::new(LateObserver::default());
    let engine_args = args.engine.clone();
    let engine_observer = Arc::clone(&observer);
    let load = tokio::task::spawn_blocking(move || {
        LoadedModel::load(&engine_args, engine_observer, &Progress::visible())
    });
    let model = tokio::select! {
        loaded = load => loaded.context("loading the model panicked")??,
        signal = signals.next() => {
            tracing::info!(?signal, "stopped while loading");
            return Ok(());
        }
    };
    let engine = model.engine.clone();
    let config = api_config(&args, &model, traces.clone())?;
    let name = config
        .served_model_names
        .first()
        .cloned()
        .unwrap_or_default();
    let mut metrics = Metrics::new(&name, engine.clone())?;
    if args.server.enable_metric_aliases {
        metrics = metrics.with_former_names(&name)?;
    }
    let metrics = Arc::new(metrics);
    observer.set(metrics.observer());
    site.set_ready(http::router(
        model.clone(),
        config,
        metrics,
        lifecycle.clone(),
    ));
    log_ready(&model, &name, address, started);

    tokio::select! {
        ended = engine.join() => ended.context("the engine failed")?,
        signal = signals.next() => {
            let times = drain_times(&args.server, signal);
            drain(&engine, &lifecycle, &connections, times, &mut signals).await?;
        }
    }
    if let Some(traces) = traces {
        tokio::task::spawn_blocking(move || traces.shutdown())
            .await
            .context("sending the last traces panicked")?;
    }
    tracing::info!("stopped");
    Ok(())
}

/// What clients that speak TLS are shown; none without the flags.
fn certificate(args: &ServerArgs) -> Result<Option<Arc<Certificate>>, TlsError> {
    let (Some(certificate), Some(key)) = (&args.ssl_certfile, &args.ssl_keyfile) else {
        return Ok(None);
    };
    let certificate = Certificate::load(TlsFiles {
        certificate: certificate.clone(),
        key: key.clone(),
    })?;
    tokio::spawn(Arc::clone(&certificate).follow());
    Ok(Some(certificate))
}

fn api_config(
    args: &ServeArgs,
    model: &LoadedModel,
    traces: Option<Traces>,
) -> anyhow::Result<ApiConfig> {
    let mut names = args.server.served_model_name.clone();
    names.retain(|name| !name.is_empty());
    if names.is_empty() {
        names.push(args.engine.model.clone());
    }
    let pooler = match args.server.pooler_config {
        Some(config) => config,
        None => PoolerConfig::of_model(&model.path).map_err(anyhow::Error::msg)?,
    };
    Ok(ApiConfig {
        pooler,
        traces,
        served_model_names: names,
        api_keys: ApiKeys::new(&args.server.api_key),
        stall_limit: Duration::from_secs(args.server.health_stall_timeout),
        force_include_usage: args.server.enable_force_include_usage,
        access_log: !args.server.disable_access_log,
        tool_call_parser: args.server.tool_call_parser,
        reasoning_parser: args.server.reasoning_parser,
        request_timeout: args.server.request_timeout.map(Duration::from_secs),
        tenant_header: args.server.tenant_header.clone(),
        isolate_prefix_cache: args.server.isolate_prefix_cache,
        honour_priority: args.server.scheduling_policy == SchedulingPolicy::Priority,
    })
}

fn log_ready(model: &LoadedModel, name: &str, address: SocketAddr, started: Instant) {
    let limits = model.engine.limits();
    let config = model.engine.config();
    tracing::info!(
        model = name,
        path = %model.path.display(),
        %address,
        max_model_len = model.max_length(),
        vocab_size = limits.vocab_size,
        max_num_seqs = config.max_num_seqs,
        max_num_batched_tokens = config.max_num_batched_tokens,
        kv_cache_blocks = limits.num_blocks,
        kv_cache_bytes = u64::from(limits.num_blocks) * u64::from(limits.block_size) * limits.kv_bytes_per_token,
        prefix_caching = config.enable_prefix_caching,
        chat_template = model.chat_template.is_some(),
        seconds_to_ready = started.elapsed().as_secs_f64(),
        "ready"
    );
}

fn drain_times(args: &ServerArgs, signal: StopSignal) -> DrainTimes {
    DrainTimes {
        // Whoever pressed Ctrl-C has no routing table to wait for.
        delay: match signal {
            StopSignal::Terminate => Duration::from_secs(args.drain_delay),
            StopSignal::Interrupt => Duration::ZERO,
        },
        timeout: Duration::from_secs(args.shutdown_timeout),
    }
}

/// Leaves in order: not ready, then refusing, then the running requests' end. A second signal ends them at once.
async fn drain(
    engine: &EngineHandle,
    lifecycle: &Lifecycle,
    connections: &Connections,
    times: DrainTimes,
    signals: &mut Signals,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + times.delay + times.timeout;
    let stats = engine.stats();
    tracing::info!(
        running = stats.running,
        waiting = stats.waiting,
        delay_seconds = times.delay.as_secs(),
        timeout_seconds = times.timeout.as_secs(),
        "draining"
    );
    lifecycle.enter(Phase::Leaving);
    let impatient = tokio::select! {
        () = tokio::time::sleep(times.delay) => false,
        _ = signals.next() => true,
    };
    lifecycle.enter(Phase::Refusing);
    if impatient {
        engine.shutdown();
    } else {
        engine.drain(deadline);
    }
    let ended = tokio::select! {
        ended = engine.join() => ended,
        _ = signals.next() => {
            engine.shutdown();
            engine.join().await
        }
    };
    if tokio::time::timeout(FLUSH_TIMEOUT, connections.all_ended())
        .await
        .is_err()
    {
        tracing::warn!("some clients did not take their answer in time");
    }
    ended.context("the engine failed while draining")
}
