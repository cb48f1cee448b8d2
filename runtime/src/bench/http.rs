//! An OpenAI-compatible server as a target: Ashlar, or a peer to compare with.

use std::time::{Duration, Instant};

use futures::StreamExt;
use serde_json::{Value, json};

use super::{CheckError, closed_loop::Target, report::Outcome, trace::Job};

/// Most bytes of one event: far above any chunk of one token.
const MAX_EVENT_BYTES: usize = 4 << 20;
/// Longest that a server may be silent in a request.
const SILENCE: Duration = Duration::from_secs(300);
/// Tokens of the checked continuation.
const CHECK_TOKENS: u32 = 16;
/// Characters of an error body that are shown.
const MAX_ERROR_CHARS: usize = 300;

/// Where and what to ask.
#[derive(Clone, Debug)]
pub struct HttpTarget {
    client: reqwest::Client,
    base_url: String,
    model: String,
    api_key: Option<String>,
}

impl HttpTarget {
    /// Connects to `base_url` (without `/v1`); `model` is the first that the server lists unless given.
    ///
    /// # Errors
    /// In words, when the server cannot be reached or serves nothing.
    pub async fn connect(
        base_url: &str,
        model: Option<String>,
        api_key: Option<String>,
    ) -> Result<Self, String> {
        // The error only says that someone installed one before, which serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            // A connection per request: some servers close an idle one just as it is used again.
            .pool_max_idle_per_host(0)
            .read_timeout(SILENCE)
            .build()
            .map_err(|error| in_words(&error))?;
        let base_url = base_url
            .trim_end_matches('/')
            .trim_end_matches("/v1")
            .to_owned();
        let mut target = Self {
            client,
            base_url,
            model: String::new(),
            api_key,
        };
        target.model = match model {
            Some(model) => model,
            None => target.first_model().await?,
        };
        Ok(target)
    }

    async fn first_model(&self) -> Result<String, String> {
        let response = self
            .authorised(self.client.get(format!("{}/v1/models", self.base_url)))
            .send()
            .await
            .map_err(|error| in_words(&error))?;
        let models: Value = succeeded(response)
            .await?
            .json()
            .await
            .map_err(|error| in_words(&error))?;
        models["data"][0]["id"]
            .as_str()
            .map(str::to_owned)
            .ok_or_else(|| format!("{} serves no model", self.base_url))
    }

    fn authorised(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        match &self.api_key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// Has a text continued whose continuation is known, greedily.
    ///
    /// # Errors
    /// [`CheckError`] when the server fails or its answer does not contain `expected`.
    pub async fn check(&self, prompt: &str, expected: &str) -> Result<String, CheckError> {
        let body = json!({"model": self.model, "prompt": prompt, "max_tokens": CHECK_TOKENS, "temperature": 0.0});
        let ask = async {
            let request = self
                .authorised(
                    self.client
                        .post(format!("{}/v1/completions", self.base_url)),
                )
                .json(&body);
            let response =
                succeeded(request.send().await.map_err(|error| in_words(&error))?).await?;
            response
                .json::<Value>()
                .await
                .map_err(|error| in_words(&error))
        };
        let answer = ask.await.map_err(CheckError)?;
        let text = answer["choices"][0]["text"].as_str().unwrap_or_default();
        if text.contains(expected) {
            Ok(text.to_owned())
        } else {
            Err(CheckError(format!(
                "{prompt:?} was continued by {text:?}, without {expected:?}"
            )))
        }
    }
}

impl Target for HttpTarget {
    async fn run(&self, job: &Job) -> Result<Outcome, String> {
        let body = json!({
            "model": self.model, "prompt": job.prompt, "max_tokens": job.output, "temperature": 0.0, "ignore_eos": true,
            "stream": true, "stream_options": {"include_usage": true},
        });
        let start = Instant::now();
        let request = self
            .authorised(
                self.client
                    .post(format!("{}/v1/completions", self.base_url)),
            )
            .json(&body);
        let response = succeeded(request.send().await.map_err(|error| in_words(&error))?).await?;
        let mut stream = response.bytes_stream();
        let mut reader = EventReader::default();
        let mut clock = Clock::new(start);
        while let Some(piece) = stream.next().await {
            reader.push(&piece.map_err(|error| in_words(&error))?)?;
            while let Some(event) = reader.next_event()? {
                clock.event(&event)?;
            }
        }
        clock.outcome(job)
    }
}

/// Splits a stream of bytes into the data of its events.
#[derive(Default)]
struct EventReader {
    buffer: Vec<u8>,
    /// Bytes at the start of `buffer` that are done with.
    read: usize,
}

impl EventReader {
    fn push(&mut self, piece: &[u8]) -> Result<(), String> {
        self.buffer.drain(..self.read);
        self.read = 0;
        if self.buffer.len() + piece.len() > MAX_EVENT_BYTES {
            return Err(format!(
                "the server sent an event of more than {MAX_EVENT_BYTES} bytes"
            ));
        }
        self.buffer.extend_from_slice(piece);
        Ok(())
    }

    /// The next event's JSON; comments, other fields and `[DONE]` are passed over.
    fn next_event(&mut self) -> Result<Option<Value>, String> {
        while let Some(at) = self.buffer[self.read..]
            .iter()
            .position(|&byte| byte == b'\n')
        {
            let line = &self.buffer[self.read..self.read + at];
            self.read += at + 1;
            let Some(data) = line.strip_prefix(b"data:") else {
                continue;
            };
            let data = data.trim_ascii();
            if data == b"[DONE]" {
                continue;
            }
            return serde_json::from_slice(data)
                .map(Some)
                .map_err(|error| format!("an event is no JSON: {error}"));
        }
        Ok(None)
    }
}

/// Notes when tokens arrive.
struct Clock {
    start: Instant,
    first: Option<Instant>,
    last: Instant,
    itl: Vec<f64>,
    output: Option<usize>,
}

impl Clock {
    fn new(start: Instant) -> Self {
        Self {
            start,
            first: None,
            last: start,
            itl: Vec::new(),
            output: None,
        }
    }

    fn event(&mut self, event: &Value) -> Result<(), String> {
        if let Some(error) = event.get("error") {
            return Err(format!("the stream ended in an error: {error}"));
        }
        if let Some(tokens) = event["usage"]["completion_tokens"].as_u64() {
            self.output = usize::try_from(tokens).ok();
        }
        if event["choices"]
            .as_array()
            .is_some_and(|choices| !choices.is_empty())
        {
            let now = Instant::now();
            match self.first {
                None => self.first = Some(now),
                Some(_) => self.itl.push((now - self.last).as_secs_f64()),
            }
            self.last = now;
        }
        Ok(())
    }

    fn outcome(self, job: &Job) -> Result<Outcome, String> {
        let output = self
            .output
            .ok_or("the stream has no usage: it ended early")?;
        let first = self.first.ok_or("the stream has no token")?;
        if output != job.output {
            return Err(format!(
                "{output} tokens came, {} were asked for: the runs would not compare",
                job.output
            ));
        }
        Ok(Outcome {
            ttft: (first - self.start).as_secs_f64(),
            itl: self.itl,
            e2e: self.start.elapsed().as_secs_f64(),
            input: job.prompt.len(),
            output,
        })
    }
}

async fn succeeded(response: reqwest::Response) -> Result<reqwest::Response, String> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let body: String = response
        .text()
        .await
        .unwrap_or_default()
        .chars()
        .take(MAX_ERROR_CHARS)
        .collect();
    Err(format!("HTTP {status}: {body}"))
}

/// The error with its causes: the outermost alone says little.
fn in_words(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test may panic
mod tests {
    use super::*;

    const STREAM: &str = concat!(
        ": hello\n\n",
        "data: {\"choices\":[{\"text\":\"a\"}]}\r\n\r\n",
        "event: x\ndata:{\"choices\":[{\"text\":\"\"}]}\n\n",
        "data: {\"choices\":[],\"usage\":{\"completion_tokens\":2}}\n\n",
        "data: [DONE]\n\n",
    );

    fn read_in_pieces(size: usize) -> Result<Outcome, String> {
        let mut reader = EventReader::default();
        let mut clock = Clock::new(Instant::now());
        for piece in STREAM.as_bytes().chunks(size) {
            reader.push(piece)?;
            while let Some(event) = reader.next_event()? {
                clock.event(&event)?;
            }
        }
        clock.outcome(&Job {
            prompt: vec![1, 2, 3],
            output: 2,
        })
    }

    #[test]
    fn events_may_be_cut_anywhere() {
        for size in 1..STREAM.len() {
            let outcome = read_in_pieces(size).unwrap();
            assert_eq!(
                (outcome.input, outcome.output, outcome.itl.len()),
                (3, 2, 1),
                "pieces of {size}"
            );
        }
    }

    #[test]
    fn a_stream_that_fails_ends_early_or_miscounts_is_an_error() {
        let job = Job {
            prompt: vec![1],
            output: 2,
        };
        let mut clock = Clock::new(Instant::now());
        assert!(
            clock
                .event(&json!({"error": {"message": "boom"}}))
                .unwrap_err()
                .contains("boom")
        );
        clock.event(&json!({"choices": [{}]})).unwrap();
        assert!(clock.outcome(&job).unwrap_err().contains("ended early"));
        let mut clock = Clock::new(Instant::now());
        clock
            .event(&json!({"choices": [{}], "usage": {"completion_tokens": 1}}))
            .unwrap();
        assert!(clock.outcome(&job).unwrap_err().contains("1 tokens came"));
    }

    #[test]
    fn an_endless_event_is_cut_off() {
        let mut reader = EventReader::default();
        let piece = vec![b'x'; MAX_EVENT_BYTES];
        reader.push(&piece).unwrap();
        assert!(reader.push(b"y").is_err());
    }
}
