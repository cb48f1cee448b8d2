//! The clients: requests at a fixed rate, many streams at once, streams that only stay open.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::stub::now_ns;

/// Connections that share the fixed rate.
const CONNECTIONS: u32 = 50;

fn request(path: &str) -> Vec<u8> {
    let body =
        r#"{"model":"m","messages":[{"role":"user","content":"What is the capital of France?"}]}"#;
    format!(
        "POST /a/s/v1/{path} HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

async fn connect(to: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(to).await.context("connecting")?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Reads a whole answer with a length.
async fn answer(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Result<()> {
    buffer.clear();
    loop {
        ensure!(
            stream.read_buf(buffer).await? > 0,
            "closed before the answer"
        );
        let Some(head) = buffer.windows(4).position(|w| w == b"\r\n\r\n") else {
            continue;
        };
        let text = String::from_utf8_lossy(&buffer[..head]).to_ascii_lowercase();
        ensure!(
            text.starts_with("http/1.1 200"),
            "not answered well: {text}"
        );
        let length = text.lines().find_map(|l| l.strip_prefix("content-length:"));
        let length: usize = length.context("no length")?.trim().parse()?;
        if buffer.len() >= head + 4 + length {
            return Ok(());
        }
    }
}

/// Seconds from the moment that each request was due to its answer's last byte, sorted; `rate` requests a second.
pub(crate) async fn latencies(to: SocketAddr, rate: u32, time: Duration) -> Result<Vec<f64>> {
    let begin = Instant::now() + Duration::from_millis(200);
    let gap = Duration::from_secs(1) * CONNECTIONS / rate;
    let mut clients = JoinSet::new();
    for client in 0..CONNECTIONS {
        clients.spawn(async move {
            let mut stream = connect(to).await?;
            let (request, mut buffer) = (request("answer"), Vec::with_capacity(4096));
            let mut due = begin + gap * client / CONNECTIONS;
            let mut taken = Vec::new();
            while due < begin + time {
                tokio::time::sleep_until(due).await;
                // Timers wake a little late: that is the client's, not the proxy's.
                let sent = Instant::now();
                stream.write_all(&request).await?;
                answer(&mut stream, &mut buffer).await?;
                taken.push(sent.elapsed().as_secs_f64());
                due += gap;
            }
            Ok::<_, anyhow::Error>(taken)
        });
    }
    let mut all = Vec::new();
    while let Some(taken) = clients.join_next().await {
        all.extend(taken??);
    }
    all.sort_by(f64::total_cmp);
    Ok(all)
}

/// Opens a stream and reads until its first event is there; returns the bytes after the head.
async fn open(to: SocketAddr, path: &str) -> Result<(TcpStream, Vec<u8>)> {
    let mut stream = connect(to).await?;
    stream.write_all(&request(path)).await?;
    let mut buffer = Vec::with_capacity(512);
    loop {
        if stream.read_buf(&mut buffer).await? == 0 {
            bail!(
                "closed before the first event: {}",
                String::from_utf8_lossy(&buffer)
            );
        }
        if let Some(head) = buffer.windows(4).position(|w| w == b"\r\n\r\n")
            && buffer[head + 4..].windows(2).any(|w| w == b"\n\n")
        {
            buffer.drain(..head + 4);
            return Ok((stream, buffer));
        }
    }
}

/// Events a second over so many streams, each as fast as it goes.
pub(crate) async fn events(to: SocketAddr, streams: usize, time: Duration) -> Result<f64> {
    let count = Arc::new(AtomicU64::new(0));
    let mut readers = JoinSet::new();
    for _ in 0..streams {
        let count = Arc::clone(&count);
        readers.spawn(async move {
            let (mut stream, _) = open(to, "flood").await?;
            let (mut buffer, mut last) = (vec![0u8; 16 << 10], 0u8);
            loop {
                let read = stream.read(&mut buffer).await?;
                ensure!(read > 0, "a stream ended");
                let mut events = 0;
                for byte in &buffer[..read] {
                    events += u64::from(*byte == b'\n' && last == b'\n');
                    last = *byte;
                }
                count.fetch_add(events, Ordering::Relaxed);
            }
            #[allow(unreachable_code, reason = "gives the task its type")]
            Ok::<(), anyhow::Error>(())
        });
    }
    tokio::time::sleep(time / 4).await; // all of them run
    let (from, began) = (count.load(Ordering::Relaxed), Instant::now());
    tokio::time::sleep(time).await;
    let rate = (count.load(Ordering::Relaxed) - from) as f64 / began.elapsed().as_secs_f64();
    if let Some(ended) = readers.try_join_next() {
        ended??;
    }
    Ok(rate)
}

/// The longest time from an event's writing to its reading, in seconds, at a stream that is never busy.
pub(crate) async fn longest_held_back(to: SocketAddr, time: Duration) -> Result<f64> {
    let (mut stream, mut text) = open(to, "timed").await?;
    let (end, mut longest) = (Instant::now() + time, 0.0_f64);
    text.clear();
    while Instant::now() < end {
        ensure!(stream.read_buf(&mut text).await? > 0, "the stream ended");
        let now = now_ns();
        let read = String::from_utf8_lossy(&text).into_owned();
        let events: Vec<&str> = read.split("\"content\":\"").skip(1).collect();
        for sent in events
            .iter()
            .filter_map(|e| e.split('"').next()?.parse::<u128>().ok())
        {
            longest = longest.max(now.saturating_sub(sent) as f64 / 1e9);
        }
        if read.ends_with("\r\n") {
            text.clear();
        }
    }
    Ok(longest)
}

/// Opens so many streams that stay open; dropping them closes them.
pub(crate) async fn idle(to: SocketAddr, streams: usize) -> Result<Vec<TcpStream>> {
    let mut open_streams = Vec::with_capacity(streams);
    for batch in 0..streams.div_ceil(200) {
        let count = 200.min(streams - batch * 200);
        let opened = futures::future::join_all((0..count).map(|_| open(to, "idle"))).await;
        for stream in opened {
            open_streams.push(stream?.0);
        }
    }
    Ok(open_streams)
}
