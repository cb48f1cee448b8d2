//! What HTTP costs: tokens per second over 1,000 streams against the engine's own rate, and the memory of 5,000 idle
//! connections and 5,000 queued streams. The model is a fake whose steps take 20 ms; the clients are a second process.
//!
//! `make bench-front-end`; the bars are in the output, and a missed one is a failure.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)] // A measurement.

use std::{
    net::SocketAddr,
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use ashlar::engine::request::{Request, SamplingParams};
use serde_json::json;
use support::{Server, Setup};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
};

#[path = "../tests/support/http_server.rs"]
mod support;

const STREAMS: usize = 1000;
const TOKENS: u32 = 200;
const STEP: Duration = Duration::from_millis(20);
const CONNECTIONS: usize = 5000;
/// Share of the engine's own rate that HTTP must keep.
const LEAST_SHARE: f64 = 0.95;
const MOST_GROWTH_MIB: f64 = 300.0;
const SCRAPES: u32 = 500;
const MOST_SCRAPE_MS: f64 = 2.5;

/// Says which part a child process plays: `streams ADDRESS` or `hold ADDRESS`.
const ROLE: &str = "ASHLAR_BENCH_ROLE";

fn setup() -> Setup {
    let mut setup = Setup::saying("The quick brown fox. ").step(STEP);
    let limits = &mut setup.fake.limits;
    limits.max_num_seqs = 1024;
    limits.max_num_batched_tokens = 8192;
    limits.num_blocks = 65_536;
    limits.max_model_len = 2048;
    setup.engine.max_num_seqs = 1024;
    setup.engine.max_num_batched_tokens = 8192;
    setup.engine.max_num_queued_reqs = 16_384;
    setup.api.access_log = false;
    setup
}

fn body(tokens: u32) -> String {
    let body = json!({"prompt": "Hi", "max_tokens": tokens, "stream": true, "ignore_eos": true});
    body.to_string()
}

async fn open(address: SocketAddr, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream
}

/// Reads until the end of the stream; true when it was whole.
async fn drain(mut stream: TcpStream) -> bool {
    let mut buffer = [0; 16 << 10];
    let mut tail = Vec::new();
    loop {
        let read = stream.read(&mut buffer).await.unwrap();
        if read == 0 {
            return false;
        }
        tail.extend_from_slice(&buffer[..read]);
        let text = String::from_utf8_lossy(&tail);
        if text.contains("[DONE]") {
            return true;
        }
        let keep = tail.len().saturating_sub(16);
        tail.drain(..keep);
    }
}

/// The child's part.
async fn child(role: &str) {
    let (part, address) = role.split_once(' ').unwrap();
    let address: SocketAddr = address.parse().unwrap();
    if part == "streams" {
        let mut tasks = JoinSet::new();
        for _ in 0..STREAMS {
            tasks.spawn(async move { drain(open(address, &body(TOKENS)).await).await });
        }
        assert!(tasks.join_all().await.into_iter().all(|whole| whole));
        return;
    }
    let mut held = Vec::new();
    for index in 0..CONNECTIONS * 2 {
        if index < CONNECTIONS {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let head = "GET /health HTTP/1.1\r\nhost: x\r\n\r\n";
            stream.write_all(head.as_bytes()).await.unwrap();
            let mut answer = [0; 1024];
            assert!(stream.read(&mut answer).await.unwrap() > 0);
            held.push(stream);
        } else {
            held.push(open(address, &body(1500)).await);
        }
    }
    // Held until the parent ends this process.
    std::future::pending::<()>().await;
    drop(held);
}

fn spawn(role: &str, address: SocketAddr) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .env(ROLE, format!("{role} {address}"))
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

/// Tokens per second of the engine with `STREAMS` readers in this process.
async fn in_process(server: &Server) -> f64 {
    let mut tasks = JoinSet::new();
    for _ in 0..STREAMS {
        let params = SamplingParams {
            max_tokens: TOKENS,
            ignore_eos: true,
            ..SamplingParams::default()
        };
        let mut stream = server
            .engine
            .submit(Request::new([72, 105], params))
            .unwrap();
        tasks.spawn(async move { while stream.next().await.is_some() {} });
    }
    let rate = rate_of_all(server).await;
    tasks.join_all().await;
    rate
}

/// Tokens per second while all streams run: neither their rush in nor their end.
async fn rate_of_all(server: &Server) -> f64 {
    server
        .until("all streams", |stats| stats.running as usize == STREAMS)
        .await;
    let (started, before) = (Instant::now(), server.engine.stats().generation_tokens);
    server
        .until("the first end", |stats| (stats.running as usize) < STREAMS)
        .await;
    let tokens = server.engine.stats().generation_tokens - before;
    tokens as f64 / started.elapsed().as_secs_f64()
}

async fn over_http(server: &Server) -> f64 {
    let mut client = spawn("streams", server.address);
    let waiting = tokio::task::spawn_blocking(move || client.wait().unwrap().success());
    let rate = rate_of_all(server).await;
    assert!(waiting.await.unwrap(), "every stream is whole");
    rate
}

fn resident_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<f64>()
        .unwrap()
        / 1024.0
}

/// Growth of resident memory, in MiB.
async fn memory(server: &Server) -> f64 {
    let before = resident_mib();
    let mut client = spawn("hold", server.address);
    let waiting = async {
        loop {
            let stats = server.engine.stats();
            if (stats.running + stats.waiting) as usize == CONNECTIONS {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), waiting)
        .await
        .unwrap();
    let growth = resident_mib() - before;
    client.kill().unwrap();
    client.wait().unwrap();
    server
        .until("all have gone", |stats| stats.running + stats.waiting == 0)
        .await;
    growth
}

/// Milliseconds of a whole `/metrics` over HTTP, one after another, and its KiB.
async fn scrape(server: &Server) -> (f64, f64) {
    let started = Instant::now();
    let mut bytes = 0;
    for _ in 0..SCRAPES {
        bytes = server.get("/metrics").await.body.len();
    }
    let each = started.elapsed().as_secs_f64() * 1e3 / f64::from(SCRAPES);
    (each, bytes as f64 / 1024.0)
}

fn main() -> ExitCode {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(2).enable_all().build().unwrap();
    if let Ok(role) = std::env::var(ROLE) {
        runtime.block_on(child(&role));
        return ExitCode::SUCCESS;
    }
    runtime.block_on(async {
        let server = setup().start().await;
        let alone = in_process(&server).await;
        let http = over_http(&server).await;
        let share = http / alone;
        println!("1,000 streams, steps of 20 ms: {alone:.0} tokens/s in process, {http:.0} over HTTP: {:.1} % (bar: 95 %)", share * 100.0);
        let (ms, kib) = scrape(&server).await;
        println!("a scrape of /metrics: {ms:.2} ms, {kib:.0} KiB (bar: 2.5 ms, a twentieth of the time between scrapes every 50 ms)");
        let growth = memory(&server).await;
        println!("5,000 idle connections and 5,000 streams: {growth:.0} MiB more (bar: 300 MiB)");
        if share >= LEAST_SHARE && ms < MOST_SCRAPE_MS && growth < MOST_GROWTH_MIB {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    })
}
