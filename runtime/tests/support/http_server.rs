//! A server on loopback with a fake model, and a client that shows what really goes over the wire.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, missing_docs)] // Each test file uses its own part.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use ashlar::{
    chat_template::ChatTemplate,
    engine::{Engine, EngineConfig, EngineHandle, EngineStats},
    http::{
        self, ApiConfig,
        server::{self, Connections, Site},
    },
    llm::LoadedModel,
    metrics::{LateObserver, Metrics},
    model_runner::fake::{FakeConfig, FakeRunner},
    shutdown::Lifecycle,
    tokenizer::Tokenizer,
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

#[path = "tiny_tokenizer.rs"]
pub mod tiny_tokenizer;

/// Longest wait for a condition.
const PATIENCE: Duration = Duration::from_secs(20);

pub struct Server {
    pub address: SocketAddr,
    pub engine: EngineHandle,
    pub lifecycle: Lifecycle,
    pub connections: Connections,
}

/// What a test changes.
pub struct Setup {
    pub fake: FakeConfig,
    pub engine: EngineConfig,
    pub api: ApiConfig,
    /// Metrics under their former names too.
    pub former_metric_names: bool,
}

impl Default for Setup {
    fn default() -> Self {
        let mut fake = FakeConfig {
            eos_token_ids: vec![tiny_tokenizer::EOS],
            ..FakeConfig::default()
        };
        fake.limits.vocab_size = tiny_tokenizer::VOCAB_SIZE;
        fake.limits.max_model_len = 256;
        Self {
            engine: EngineConfig {
                eos_token_ids: fake.eos_token_ids.clone(),
                ..EngineConfig::default()
            },
            fake,
            api: ApiConfig {
                served_model_names: vec!["tiny".to_owned(), "alias".to_owned()],
                stall_limit: Duration::from_secs(30),
                ..ApiConfig::default()
            },
            former_metric_names: false,
        }
    }
}

impl Setup {
    /// The model says these tokens, over and over.
    pub fn saying(text: &str) -> Self {
        let mut setup = Self::default();
        let script = text.bytes().map(u32::from).collect();
        setup.fake.model = ashlar::model_runner::fake::FakeModel::Script(script);
        setup
    }

    /// The model says this and ends.
    pub fn answering(text: &str) -> Self {
        let mut setup = Self::saying(text);
        if let ashlar::model_runner::fake::FakeModel::Script(script) = &mut setup.fake.model {
            script.push(tiny_tokenizer::EOS);
        }
        setup.fake.limits.max_model_len = 2048;
        setup
    }

    /// Time of a step.
    pub fn step(mut self, latency: Duration) -> Self {
        self.fake.step_latency = latency;
        self
    }

    pub async fn start(self) -> Server {
        let folder = tempfile::tempdir().unwrap();
        tiny_tokenizer::write(folder.path());
        let tokenizer = Arc::new(Tokenizer::from_model_path(folder.path()).unwrap());
        let template = tokenizer.chat_template().unwrap().to_owned();
        let observer = Arc::new(LateObserver::default());
        let runner = Box::new(FakeRunner::new(self.fake));
        let engine = Engine::start_observed(runner, self.engine, observer.clone()).unwrap();
        let mut metrics = Metrics::new("tiny", engine.clone()).unwrap();
        if self.former_metric_names {
            metrics = metrics.with_former_names("tiny").unwrap();
        }
        let metrics = Arc::new(metrics);
        observer.set(metrics.observer());
        let model = LoadedModel {
            path: "tiny".into(),
            chat_template: Some(Arc::new(ChatTemplate::new(template, &tokenizer).unwrap())),
            tokenizer,
            engine: engine.clone(),
        };
        let lifecycle = Lifecycle::default();
        let connections = Connections::default();
        let site = Site::default();
        site.set_ready(http::router(model, self.api, metrics, lifecycle.clone()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(server::serve(
            listener,
            site,
            lifecycle.clone(),
            connections.clone(),
            None,
        ));
        Server {
            address,
            engine,
            lifecycle,
            connections,
        }
    }
}

/// One answer.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: HashMap<String, String>,
    pub body: String,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {:?}", self.body))
    }

    /// The frames of an event stream; the last is checked to be `[DONE]` and left out.
    pub fn frames(&self) -> Vec<Value> {
        let mut frames: Vec<&str> = self
            .body
            .split("\n\n")
            .filter(|frame| !frame.is_empty())
            .map(|frame| frame.strip_prefix("data: ").unwrap())
            .collect();
        assert_eq!(frames.pop(), Some("[DONE]"));
        frames
            .iter()
            .map(|frame| serde_json::from_str(frame).unwrap())
            .collect()
    }

    /// The named events of a stream: names and data agree, and sequence numbers ascend where there are any.
    pub fn events(&self) -> Vec<Value> {
        assert!(
            self.headers["content-type"].starts_with("text/event-stream"),
            "{self:?}"
        );
        let frames = self.body.split("\n\n").filter(|frame| !frame.is_empty());
        let events: Vec<Value> = frames
            .map(|frame| {
                let (name, data) = frame.split_once('\n').unwrap();
                let data: Value =
                    serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
                assert_eq!(data["type"], name.strip_prefix("event: ").unwrap());
                data
            })
            .collect();
        for (at, event) in events.iter().enumerate() {
            if let Some(number) = event["sequence_number"].as_u64() {
                assert_eq!(number, at as u64);
            }
        }
        events
    }

    /// Checks the error envelope and returns its message.
    pub fn error(&self, status: u16, param: Option<&str>) -> String {
        assert_eq!(self.status, status, "{self:?}");
        let json = self.json();
        let error = &json["error"];
        assert_eq!(error["code"], status, "{json}");
        assert_eq!(error["param"].as_str(), param, "{json}");
        assert!(error["type"].as_str().unwrap().ends_with("Error"), "{json}");
        error["message"].as_str().unwrap().to_owned()
    }
}

impl Server {
    pub async fn get(&self, path: &str) -> Reply {
        self.send("GET", path, &[], "").await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Reply {
        self.send("POST", path, &[], &body.to_string()).await
    }

    pub async fn send(&self, method: &str, path: &str, headers: &[&str], body: &str) -> Reply {
        let mut stream = self.open(method, path, headers, body).await;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await.unwrap();
        parse(&bytes)
    }

    /// Sends a request and leaves the answer to be read.
    pub async fn open(&self, method: &str, path: &str, headers: &[&str], body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let extra: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-type: application/json\r\n\
             {extra}content-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        // A server may answer and close before it has read all of a body that is too large.
        let _ = stream.write_all(body.as_bytes()).await;
        stream
    }

    /// Waits until the engine's numbers satisfy `condition`.
    pub async fn until(&self, what: &str, condition: impl Fn(&EngineStats) -> bool) {
        let waiting = async {
            while !condition(&self.engine.stats()) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        let done = tokio::time::timeout(PATIENCE, waiting).await;
        assert!(done.is_ok(), "{what}: {:?}", self.engine.stats());
    }
}

fn parse(bytes: &[u8]) -> Reply {
    let text = String::from_utf8_lossy(bytes);
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap();
    let headers: HashMap<String, String> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
        .collect();
    let chunked = headers
        .get("transfer-encoding")
        .is_some_and(|v| v == "chunked");
    let at = bytes.len()
        - bytes
            .windows(4)
            .position(|w| w == b"\r\n\r\n")
            .map_or(0, |p| bytes.len() - p - 4);
    let body = if chunked {
        dechunk(&bytes[at..])
    } else {
        body.to_owned()
    };
    Reply {
        status: status.parse().unwrap(),
        headers,
        body,
    }
}

fn dechunk(mut bytes: &[u8]) -> String {
    let mut out = Vec::new();
    while let Some(end) = bytes.windows(2).position(|w| w == b"\r\n") {
        let size = std::str::from_utf8(&bytes[..end]).unwrap();
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            break;
        }
        out.extend_from_slice(&bytes[end + 2..end + 2 + size]);
        bytes = &bytes[end + 4 + size..];
    }
    String::from_utf8(out).unwrap()
}
