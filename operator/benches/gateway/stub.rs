//! A replica that costs as little as can be: it answers at once, streams as fast as it is read, or keeps a stream open.
//!
//! The path says which: `…/answer`, `…/flood` (one event a write, without end), `…/timed` (an event with the time every
//! 20 ms), `…/idle` (one event, then nothing).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

const STREAM: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

/// Nanoseconds since the epoch, on one clock for all processes.
pub(crate) fn now_ns() -> u128 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos())
}

/// As long as it says: a connection on which more follows is not used again, and each request would have one of its own.
fn answer() -> String {
    let body = r#"{"id":"chatcmpl-0","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"Paris is the capital of France."},"end":"stop"}]}"#;
    let length = body.len();
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
}

fn event(text: &str) -> Vec<u8> {
    let data = format!(
        "data: {{\"id\":\"chatcmpl-0\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{text}\"}}}}]}}\n\n"
    );
    format!("{:x}\r\n{data}\r\n", data.len()).into_bytes()
}

/// Serves until the process ends.
pub(crate) async fn serve(listener: TcpListener) {
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            let _ = stream.set_nodelay(true);
            tokio::spawn(connection(stream));
        }
    }
}

async fn connection(mut stream: TcpStream) -> Option<()> {
    let mut buffer = Vec::with_capacity(4096);
    let answer = answer();
    loop {
        let head = loop {
            if let Some(at) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
            if stream.read_buf(&mut buffer).await.ok()? == 0 {
                return None;
            }
        };
        let text = String::from_utf8_lossy(&buffer[..head]).to_ascii_lowercase();
        let length = text
            .lines()
            .find_map(|line| line.strip_prefix("content-length:"));
        let length: usize = length.and_then(|l| l.trim().parse().ok()).unwrap_or(0);
        while buffer.len() < head + length {
            if stream.read_buf(&mut buffer).await.ok()? == 0 {
                return None;
            }
        }
        let path = text.split(' ').nth(1).unwrap_or_default().to_owned();
        buffer.drain(..head + length);
        if path.ends_with("/answer") {
            stream.write_all(answer.as_bytes()).await.ok()?;
            continue;
        }
        stream.write_all(STREAM).await.ok()?;
        if path.ends_with("/flood") {
            let event = event(" token");
            loop {
                stream.write_all(&event).await.ok()?;
                tokio::task::yield_now().await; // one event a write: none rides along with the next
            }
        }
        if path.ends_with("/timed") {
            loop {
                stream.write_all(&event(&now_ns().to_string())).await.ok()?;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        stream.write_all(&event(" idle")).await.ok()?;
        // Until the other side leaves.
        while stream.read_buf(&mut buffer).await.ok()? > 0 {}
        return None;
    }
}
