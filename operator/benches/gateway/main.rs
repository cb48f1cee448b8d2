//! What the gateway costs: `make gateway-bench`. The gateway's own server and proxy on one core, against HAProxy on the
//! same core with one thread, and against no proxy; the same stub and clients for all three, on the other cores.
//!
//! Ends with an error when a bar is missed. `SECONDS` (of each measurement, 10) and `STREAMS` (that stay open, 10000) make
//! it smaller.
//!
//! A proxy has two open files for each stream: where the machine's limit allows fewer streams than asked for, as many as
//! fit are opened, and their share of the memory is extended to all; the output says so.
#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]

mod load;
mod stub;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ashlar_operator::gateway::hold::Holds;
use ashlar_operator::gateway::keys::{KeyPolicy, KeyStore, ReadError, SecretSource};
use ashlar_operator::gateway::limits::Limits;
use ashlar_operator::gateway::metrics::Metrics;
use ashlar_operator::gateway::proxy::{Proxy, ProxyLimits};
use ashlar_operator::gateway::request_body::BodyLimits;
use ashlar_operator::gateway::server::{Phase, Server};
use ashlar_operator::gateway::snapshot::{
    Access, GatewayNames, ReplicaSpec, ServiceId, ServiceSpec, Snapshot,
};
use futures::future::BoxFuture;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// That of the real gateway.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Requests a second of the latency measurement, and streams of the throughput measurement.
const RATE: u32 = 1000;
const STREAMS: usize = 1000;
/// Rounds of the latency measurement, an odd number.
const ROUNDS: usize = 5;
/// Open files of a proxy beside those of its streams, with room for connections that end while others begin.
const OTHER_FILES: usize = 150;

/// A process that ends with the benchmark.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    /// Starts a program on the given cores.
    fn on(cores: &str, program: &str, arguments: &[&str]) -> Result<Self> {
        let child = Command::new("taskset")
            .args(["-c", cores, program])
            .args(arguments)
            .stdin(Stdio::null())
            .spawn();
        Ok(Self(child.with_context(|| format!("starting {program}"))?))
    }

    /// Memory in use, in bytes.
    fn memory(&self) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib: f64 = line
            .context("no VmRSS")?
            .trim()
            .trim_end_matches(" kB")
            .parse()?;
        Ok(kib * 1024.0)
    }
}

struct NoSecrets;

impl SecretSource for NoSecrets {
    fn read<'a>(
        &'a self,
        _: &'a str,
        _: &'a str,
    ) -> BoxFuture<'a, Result<BTreeMap<String, Vec<u8>>, ReadError>> {
        Box::pin(async { Err(ReadError::NotFound) })
    }
}

/// The gateway's data path with one open service, whose only replica is the stub.
async fn gateway(listener: TcpListener, upstream: SocketAddr) {
    let names = GatewayNames {
        service: "ashlar-gateway".to_owned(),
        namespace: "ashlar-system".to_owned(),
        cluster_domain: "cluster.local".to_owned(),
    };
    let id = ServiceId::new("a", "s");
    let service = ServiceSpec {
        id: id.clone(),
        model: "m".to_owned(),
        access: Access::Open,
        limits: Limits::default(),
        hosts: Vec::new(),
        alias: true,
        created: 1,
        canary: None,
    };
    let replica = ReplicaSpec {
        service: id,
        uid: "stub".to_owned(),
        revision: String::new(),
        ready_since: "t0".to_owned(),
        address: upstream,
        tls: None,
    };
    let snapshot = Snapshot::build(&Snapshot::empty(names), [service], [replica]);
    let metrics = Arc::new(Metrics::new());
    metrics.follow(&snapshot);
    // Kept: a channel whose sender is gone ends those who wait on it.
    let (_snapshots, snapshots) = watch::channel(Arc::new(snapshot));
    let (_synced, synced) = watch::channel(true);
    let (_phase, phase) = watch::channel(Phase::Serving);
    let proxy = Proxy::new(
        snapshots,
        synced,
        Arc::new(KeyStore::new(Arc::new(NoSecrets), KeyPolicy::default())),
        Holds::new(1000, 64 << 20, Duration::from_secs(30)),
        Arc::clone(&metrics),
        ProxyLimits {
            body: BodyLimits {
                total: 10 << 20,
                replay: 1 << 20,
                idle: Duration::from_secs(30),
            },
            connect_timeout: Duration::from_secs(2),
            request_timeout: Duration::from_secs(3600),
        },
        ashlar_operator::model_tls::Trust::none(),
    );
    let server = Server {
        proxy: Arc::new(proxy),
        metrics,
        phase,
        max_connections: 16_384,
        drain_timeout: Duration::from_secs(1),
        tls: None,
    };
    server.serve(listener).await;
}

fn haproxy_config(listen: SocketAddr, upstream: SocketAddr, connections: usize) -> String {
    format!(
        "global\n  nbthread 1\n  maxconn {connections}\ndefaults\n  mode http\n  timeout client 1h\n  timeout server 1h\n  timeout connect 2s\n  maxconn {connections}\n  http-reuse safe\nfrontend f\n  bind {listen}\n  default_backend b\nbackend b\n  server s {upstream}\n"
    )
}

async fn up(address: SocketAddr) -> Result<()> {
    for _ in 0..500 {
        if TcpStream::connect(address).await.is_ok() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    anyhow::bail!("nothing listens on {address} after 10 s")
}

#[derive(Debug, Default, Clone, Copy)]
struct Figures {
    p50: f64,
    p99: f64,
    events: f64,
    held_back: f64,
    /// Bytes before the first request, and with so many streams open.
    before: f64,
    memory: f64,
    open: usize,
}

impl Figures {
    /// Bytes with so many open streams: as measured, or each further one as large as those that were opened.
    fn memory_of(&self, streams: usize) -> f64 {
        let each = (self.memory - self.before) / self.open.max(1) as f64;
        self.memory + each * streams.saturating_sub(self.open) as f64
    }
}

/// How many streams fit in a proxy's open files.
fn that_fit(streams: usize) -> Result<usize> {
    let limits = std::fs::read_to_string("/proc/self/limits")?;
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"));
    let soft = line.and_then(|line| line.split_whitespace().next());
    // `unlimited` is no number, and no limit.
    let files = soft.context("no limit of open files")?.parse::<usize>();
    Ok(files.map_or(streams, |files| {
        streams.min(files.saturating_sub(OTHER_FILES) / 2)
    }))
}

/// p50 and p99 of each, the median of rounds in which all take their turn: what else runs on a machine takes a core for some
/// milliseconds now and then, and would be found in the figures of whoever it meets.
async fn latencies<const N: usize>(to: [SocketAddr; N], time: Duration) -> Result<[(f64, f64); N]> {
    let mut of = [const { (Vec::new(), Vec::new()) }; N];
    for to in to {
        load::latencies(to, RATE, time / 4).await?; // warm
    }
    for round in 0..ROUNDS {
        for turn in 0..N {
            let which = (round + turn) % N;
            let sorted = load::latencies(to[which], RATE, time * 2 / ROUNDS as u32).await?;
            let at = |share: f64| sorted[((sorted.len() - 1) as f64 * share) as usize];
            of[which].0.push(at(0.5));
            of[which].1.push(at(0.99));
        }
    }
    let median = |mut figures: Vec<f64>| {
        figures.sort_by(f64::total_cmp);
        figures[ROUNDS / 2]
    };
    Ok(of.map(|(p50, p99)| (median(p50), median(p99))))
}

async fn measure(
    to: SocketAddr,
    seconds: u64,
    streams: usize,
    (p50, p99): (f64, f64),
    before: f64,
    memory: impl Fn() -> Result<f64>,
) -> Result<Figures> {
    let time = Duration::from_secs(seconds);
    let held_back = load::longest_held_back(to, time / 2).await?;
    let events = load::events(to, STREAMS, time).await?;
    let open = load::idle(to, streams).await?;
    let memory = memory()?;
    Ok(Figures {
        p50,
        p99,
        events,
        held_back,
        before,
        memory,
        open: open.len(),
    })
}

fn number(name: &str, default: usize) -> Result<usize> {
    std::env::var(name).map_or(Ok(default), |text| {
        text.parse().with_context(|| format!("{name}={text}"))
    })
}

async fn compare() -> Result<()> {
    let (seconds, wanted) = (number("SECONDS", 10)? as u64, number("STREAMS", 10_000)?);
    let streams = that_fit(wanted)?;
    let cores = std::thread::available_parallelism()?.get();
    let (proxy_core, others) = ("0", format!("{}-{}", 1.min(cores - 1), cores - 1));
    let me = std::env::current_exe()?.display().to_string();
    let [stub, ours, theirs]: [SocketAddr; 3] =
        ["127.0.0.1:18300", "127.0.0.1:18301", "127.0.0.1:18302"]
            .map(|a| a.parse().expect("an address: this is a bug"));
    // The clients' own threads stay off the proxy's core.
    let pid = std::process::id().to_string();
    let pinned = Command::new("taskset")
        .args(["-a", "-cp", &others, &pid])
        .stdout(Stdio::null())
        .status()?;
    ensure!(pinned.success(), "taskset failed");

    let _stub = Process::on(&others, &me, &["stub", &stub.to_string()])?;
    up(stub).await?;
    let gateway = Process::on(
        proxy_core,
        &me,
        &["gateway", &ours.to_string(), &stub.to_string()],
    )?;
    up(ours).await?;
    let file = std::env::temp_dir().join(format!("ashlar-haproxy-{pid}.cfg"));
    // Its own sum of open files must keep to the limit, or it does not start.
    let config = haproxy_config(theirs, stub, streams.max(STREAMS) + 10);
    std::fs::write(&file, config)?;
    let haproxy = Process::on(
        proxy_core,
        "haproxy",
        &["-db", "-f", &file.display().to_string()],
    )?;
    up(theirs).await?;

    let before = [gateway.memory()?, haproxy.memory()?];
    let time = Duration::from_secs(seconds);
    let [alone, through_ours, through_theirs] = latencies([stub, ours, theirs], time).await?;
    let direct = measure(stub, seconds, streams, alone, 0.0, || Ok(0.0)).await?;
    let gateways = || gateway.memory();
    let ours = measure(ours, seconds, streams, through_ours, before[0], gateways).await?;
    drop(gateway);
    let haproxys = || haproxy.memory();
    let theirs = measure(
        theirs,
        seconds,
        streams,
        through_theirs,
        before[1],
        haproxys,
    )
    .await;
    drop(haproxy);
    std::fs::remove_file(&file)?;
    report(&direct, &ours, &theirs?, wanted)
}

fn report(direct: &Figures, ours: &Figures, theirs: &Figures, streams: usize) -> Result<()> {
    let ms = |seconds: f64| format!("{:.3} ms", seconds * 1e3);
    println!("| | direct | gateway | HAProxy |\n|---|---|---|---|");
    for (name, of) in [
        (
            "p50 at 1,000 requests a second",
            (|f| f.p50) as fn(&Figures) -> f64,
        ),
        ("p99", |f| f.p99),
        ("longest that an event was on its way", |f| f.held_back),
    ] {
        println!(
            "| {name} | {} | {} | {} |",
            ms(of(direct)),
            ms(of(ours)),
            ms(of(theirs))
        );
    }
    println!(
        "| events a second over {STREAMS} streams | {:.0} | {:.0} | {:.0} |",
        direct.events, ours.events, theirs.events
    );
    println!(
        "| memory with {} open streams | | {:.1} MB | {:.1} MB |",
        ours.open,
        ours.memory / 1e6,
        theirs.memory / 1e6
    );
    let memory = ours.memory_of(streams) / 1e6;
    if ours.open < streams {
        println!(
            "No more than {} streams fit in this machine's limit of open files; of {streams}, each further one like those: {memory:.1} MB and {:.1} MB",
            ours.open,
            theirs.memory_of(streams) / 1e6
        );
    }
    let added =
        |of: fn(&Figures) -> f64| (of(ours) - of(direct)) / (of(theirs) - of(direct)).max(1e-6);
    let bars = [
        ("added p50 ÷ HAProxy's", added(|f| f.p50), 1.5, true),
        ("added p99 ÷ HAProxy's", added(|f| f.p99), 2.0, true),
        (
            "events ÷ HAProxy's",
            ours.events / theirs.events,
            0.7,
            false,
        ),
        ("events a second", ours.events, 80_000.0, false),
        ("memory in MB", memory, 200.0, true),
        (
            "longest on its way, in ms, beyond HAProxy's",
            (ours.held_back - theirs.held_back) * 1e3,
            10.0,
            true,
        ),
    ];
    let mut missed = 0;
    for (name, value, bar, at_most) in bars {
        let good = if at_most { value <= bar } else { value >= bar };
        missed += usize::from(!good);
        let sign = if at_most { "≤" } else { "≥" };
        println!(
            "{} {name}: {value:.2} (bar: {sign} {bar})",
            if good { "met   " } else { "MISSED" }
        );
    }
    ensure!(missed == 0, "{missed} bars missed");
    Ok(())
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let one_thread = matches!(arguments.first(), Some(&"gateway"));
    let runtime = if one_thread {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?
    } else {
        tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()?
    };
    let listen = |address: &str| -> Result<TcpListener> {
        let address: SocketAddr = address.parse()?;
        let socket = tokio::net::TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        Ok(socket.listen(4096)?)
    };
    runtime.block_on(async {
        match arguments.as_slice() {
            ["stub", address] => stub::serve(listen(address)?).await,
            ["gateway", address, upstream] => gateway(listen(address)?, upstream.parse()?).await,
            _ => compare().await?,
        }
        Ok(())
    })
}
