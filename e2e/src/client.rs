//! A plain HTTP client: whole answers and server-sent events, with the times at which the events arrived. It never retries.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

/// The longest a test waits for the next byte of an answer.
const QUIET_LIMIT: Duration = Duration::from_secs(60);
/// The largest whole answer.
const BODY_LIMIT_BYTES: usize = 8 << 20;

/// An HTTP client that may carry an API key.
#[derive(Debug, Clone)]
pub struct Http {
    pool: Pool<HttpConnector, Full<Bytes>>,
    key: Option<String>,
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: StatusCode,
    /// The body as text.
    pub body: String,
}

/// One `data:` of a stream and when its last byte arrived.
#[derive(Debug)]
pub struct Event {
    /// The text after `data: `.
    pub data: String,
    /// Arrival.
    pub at: Instant,
}

/// Server-sent events of one answer. Dropping it closes the connection.
#[derive(Debug)]
pub struct Events {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Default for Http {
    fn default() -> Self {
        Self::new()
    }
}

impl Http {
    /// A client without a key.
    #[must_use]
    pub fn new() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        // No idle connections: each request shows what a new client meets.
        Self {
            pool: Pool::builder(TokioExecutor::new())
                .pool_max_idle_per_host(0)
                .build(connector),
            key: None,
        }
    }

    /// The same client, sending `key` as its bearer token.
    #[must_use]
    pub fn with_key(&self, key: &str) -> Self {
        Self {
            pool: self.pool.clone(),
            key: Some(key.to_owned()),
        }
    }

    /// `GET url`.
    ///
    /// # Errors
    /// When no whole answer arrives. An HTTP status is never an error.
    pub async fn get(&self, url: &str) -> Result<Answer> {
        whole(self.send(Method::GET, url, None).await?).await
    }

    /// `POST url` with a JSON body.
    ///
    /// # Errors
    /// When no whole answer arrives. An HTTP status is never an error.
    pub async fn post(&self, url: &str, body: &Value) -> Result<Answer> {
        whole(self.send(Method::POST, url, Some(body)).await?).await
    }

    /// `POST url` with a JSON body, to read the answer as it comes.
    ///
    /// # Errors
    /// When there is no answer, or it is not `200` with server-sent events.
    pub async fn stream(&self, url: &str, body: &Value) -> Result<Events> {
        let response = self.send(Method::POST, url, Some(body)).await?;
        if response.status() != StatusCode::OK {
            let answer = whole(response).await?;
            bail!("POST {url} answered {}: {}", answer.status, answer.body);
        }
        let kind = response
            .headers()
            .get(header::CONTENT_TYPE)
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default();
        ensure!(
            kind.starts_with("text/event-stream"),
            "POST {url} streams {kind:?}, not text/event-stream"
        );
        Ok(Events {
            body: response.into_body(),
            buffer: Vec::new(),
        })
    }

    async fn send(
        &self,
        method: Method,
        url: &str,
        body: Option<&Value>,
    ) -> Result<Response<Incoming>> {
        let mut request = Request::builder().method(method.clone()).uri(url);
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        let bytes = match body {
            Some(body) => {
                request = request.header(header::CONTENT_TYPE, "application/json");
                Bytes::from(serde_json::to_vec(body)?)
            }
            None => Bytes::new(),
        };
        let sent = self.pool.request(request.body(Full::new(bytes))?);
        tokio::time::timeout(QUIET_LIMIT, sent)
            .await
            .with_context(|| format!("{method} {url}: no answer in {} s", QUIET_LIMIT.as_secs()))?
            .with_context(|| format!("{method} {url}"))
    }
}

async fn whole(response: Response<Incoming>) -> Result<Answer> {
    let status = response.status();
    let body = Limited::new(response.into_body(), BODY_LIMIT_BYTES).collect();
    let body = tokio::time::timeout(QUIET_LIMIT, body)
        .await
        .context("the answer's body did not end in time")?
        .map_err(|error| anyhow::anyhow!("reading the answer's body: {error}"))?;
    Ok(Answer {
        status,
        body: String::from_utf8(body.to_bytes().to_vec()).context("the answer is not UTF-8")?,
    })
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Errors
    /// When it is not JSON; the error shows it.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body)
            .with_context(|| format!("not JSON ({}): {}", self.status, self.body))
    }

    /// The assistant's text of a chat completion.
    ///
    /// # Errors
    /// When the answer is anything but a `200` with one.
    pub fn chat_text(&self) -> Result<String> {
        ensure!(
            self.status == StatusCode::OK,
            "answered {}: {}",
            self.status,
            self.body
        );
        let json = self.json()?;
        let text = json
            .pointer("/choices/0/message/content")
            .and_then(Value::as_str);
        Ok(text
            .with_context(|| format!("no message in {json}"))?
            .to_owned())
    }

    /// Checks that this is an error of OpenAI's shape with the given status, and returns its message.
    ///
    /// # Errors
    /// When it is not.
    pub fn openai_error(&self, status: StatusCode) -> Result<String> {
        ensure!(
            self.status == status,
            "answered {} instead of {status}: {}",
            self.status,
            self.body
        );
        let json = self.json()?;
        let message = json.pointer("/error/message").and_then(Value::as_str);
        ensure!(
            json.pointer("/error/type").is_some_and(Value::is_string),
            "no error.type in {json}"
        );
        Ok(message
            .with_context(|| format!("no error.message in {json}"))?
            .to_owned())
    }
}

impl Events {
    /// The next event; `None` when the answer has ended properly.
    ///
    /// # Errors
    /// When the connection breaks, or nothing arrives for a minute.
    pub async fn next(&mut self) -> Result<Option<Event>> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = self.buffer.drain(..end + 2).collect();
                let event = String::from_utf8(event).context("an event is not UTF-8")?;
                // Comments keep a quiet connection open; they are no events.
                let data: Vec<&str> = event
                    .lines()
                    .filter_map(|line| line.strip_prefix("data:"))
                    .map(str::trim_start)
                    .collect();
                if data.is_empty() {
                    continue;
                }
                return Ok(Some(Event {
                    data: data.join("\n"),
                    at: Instant::now(),
                }));
            }
            let frame = tokio::time::timeout(QUIET_LIMIT, self.body.frame())
                .await
                .context("the stream went quiet")?;
            match frame {
                None => {
                    ensure!(
                        self.buffer.is_empty(),
                        "the stream ended inside an event: {:?}",
                        String::from_utf8_lossy(&self.buffer)
                    );
                    return Ok(None);
                }
                Some(frame) => {
                    if let Ok(data) = frame.context("the stream broke")?.into_data() {
                        self.buffer.extend_from_slice(&data);
                        ensure!(
                            self.buffer.len() <= BODY_LIMIT_BYTES,
                            "one event is larger than {BODY_LIMIT_BYTES} bytes"
                        );
                    }
                }
            }
        }
    }

    /// All remaining events.
    ///
    /// # Errors
    /// As [`Events::next`].
    pub async fn rest(mut self) -> Result<Vec<Event>> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await? {
            events.push(event);
        }
        Ok(events)
    }
}

/// The text pieces that chat-completion `events` carry, joined.
///
/// # Errors
/// When an event before `[DONE]` is not JSON or carries an error.
pub fn streamed_text(events: &[Event]) -> Result<String> {
    let mut text = String::new();
    for event in events.iter().filter(|event| event.data != "[DONE]") {
        let chunk: Value = serde_json::from_str(&event.data)
            .with_context(|| format!("not JSON: {}", event.data))?;
        ensure!(
            chunk.get("error").is_none(),
            "the stream carries an error: {chunk}"
        );
        text.push_str(
            chunk
                .pointer("/choices/0/delta/content")
                .and_then(Value::as_str)
                .unwrap_or_default(),
        );
    }
    Ok(text)
}

/// Samples of a Prometheus page: series, as written there, to value.
#[must_use]
pub fn samples(page: &str) -> BTreeMap<String, f64> {
    page.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.rsplit_once(' '))
        .filter_map(|(series, value)| Some((series.to_owned(), value.parse().ok()?)))
        .collect()
}

/// The sum of all series of the metric `name`.
#[must_use]
pub fn total(page: &str, name: &str) -> f64 {
    let of_name = |series: &String| series.split('{').next() == Some(name);
    samples(page)
        .iter()
        .filter(|(series, _)| of_name(series))
        .map(|(_, value)| value)
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metrics_page_is_summed_by_name() {
        let page = "# TYPE a counter\na{x=\"1 2\"} 1\na{x=\"3\"} 2.5\nab 7\n";
        assert!((total(page, "a") - 3.5).abs() < 1e-9);
        assert!((total(page, "ab") - 7.0).abs() < 1e-9);
        assert!(total(page, "b").abs() < 1e-9);
    }

    #[test]
    fn streamed_pieces_are_joined_and_errors_are_errors() {
        let event = |data: &str| Event {
            data: data.to_owned(),
            at: Instant::now(),
        };
        let piece = |text: &str| {
            event(&format!(
                "{{\"choices\":[{{\"delta\":{{\"content\":{text:?}}}}}]}}"
            ))
        };
        let events = [piece("Par"), piece("is"), event("[DONE]")];
        assert_eq!(streamed_text(&events).ok().as_deref(), Some("Paris"));
        assert!(streamed_text(&[event("{\"error\":{\"message\":\"no\"}}")]).is_err());
    }
}
