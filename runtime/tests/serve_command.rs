//! `ashlar serve` as an orchestrator runs it: a process, the default model, probes, SIGTERM.
#![allow(clippy::unwrap_used, missing_docs)] // Tests.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use ashlar::{config::EngineArgs, engine::request::SamplingParams, llm::Llm};
use serde_json::{Value, json};

mod common;

/// Ends the process when a test fails.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a server and waits for the log line that says it is ready.
fn serve(flags: &[&str]) -> (Process, SocketAddr, BufReader<std::process::ChildStderr>) {
    let child = Command::new(env!("CARGO_BIN_EXE_ashlar"))
        .arg("serve")
        .arg(common::model_path())
        .args([
            "--host=127.0.0.1",
            "--port=0",
            "--served-model-name=smol",
            "--log-format=json",
        ])
        .args(["--max-model-len=2048", "--kv-cache-memory-bytes=128M"])
        .args(flags)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut process = Process(child);
    let mut log = BufReader::new(process.0.stderr.take().unwrap());
    let mut line = String::new();
    loop {
        line.clear();
        assert!(
            log.read_line(&mut line).unwrap() > 0,
            "it ended before it was ready"
        );
        let Ok(event) = serde_json::from_str::<Value>(&line) else {
            continue;
        };
        if event["message"] == "ready" {
            let address = event["address"].as_str().unwrap().parse().unwrap();
            return (process, address, log);
        }
    }
}

fn request(address: SocketAddr, method: &str, path: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(300)))
        .unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream
}

fn answer(mut stream: TcpStream) -> (u16, String) {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let status = text.split(' ').nth(1).unwrap().parse().unwrap();
    let body = text.split_once("\r\n\r\n").unwrap().1.to_owned();
    (status, body)
}

fn terminate(process: &Process) {
    let id = process.0.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-TERM", &id])
            .status()
            .unwrap()
            .success()
    );
}

#[test]
fn answers_sensibly_and_drains_to_the_last_token() {
    // Exact mode: what the model says here does not hang on rounding.
    // And the last token is to come however slow the machine is.
    let flags = [
        "--drain-delay=1",
        "--shutdown-timeout=300",
        "--dtype=float32",
    ];
    let (mut process, address, _log) = serve(&flags);
    assert_eq!(answer(request(address, "GET", "/health", "")).0, 200);
    let question = json!({
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0, "max_tokens": 32,
    });
    let (status, body) = answer(request(
        address,
        "POST",
        "/v1/chat/completions",
        &question.to_string(),
    ));
    assert_eq!(status, 200, "{body}");
    assert!(
        body.contains("\"The capital of France is Paris.\""),
        "{body}"
    );

    let long = json!({
        "prompt": "Once upon a time", "temperature": 0, "max_tokens": 100, "ignore_eos": true, "stream": true,
    });
    let mut stream = request(address, "POST", "/v1/completions", &long.to_string());
    let mut first = [0; 512];
    assert!(stream.read(&mut first).unwrap() > 0);
    terminate(&process);
    // Not ready at once, but still serving.
    let deadline = Instant::now() + Duration::from_secs(20);
    while answer(request(address, "GET", "/health", "")).0 != 503 {
        assert!(Instant::now() < deadline, "it is still ready after SIGTERM");
    }
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"finish_reason\":\"length\""), "{rest}");
    assert!(rest.contains("data: [DONE]"), "{rest}");
    assert!(process.0.wait().unwrap().success());
}

#[test]
fn stops_after_the_shutdown_timeout_whatever_runs() {
    let (mut process, address, _log) = serve(&["--drain-delay=0", "--shutdown-timeout=0"]);
    let long = json!({"prompt": "a", "max_tokens": 2000, "ignore_eos": true, "stream": true});
    let mut stream = request(address, "POST", "/v1/completions", &long.to_string());
    let mut first = [0; 64];
    assert!(stream.read(&mut first).unwrap() > 0);
    terminate(&process);
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"finish_reason\":\"abort\""), "{rest}");
    assert!(process.0.wait().unwrap().success());
}

#[test]
fn a_model_that_is_not_there_is_one_line_and_a_failure() {
    let output = Command::new(env!("CARGO_BIN_EXE_ashlar"))
        .args([
            "serve",
            "/nowhere/model.gguf",
            "--host=127.0.0.1",
            "--port=0",
        ])
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    let last = text.lines().last().unwrap();
    assert!(
        last.starts_with("ashlar: error: ") && last.contains("/nowhere/model.gguf"),
        "{text}"
    );
}

#[test]
fn a_rust_program_completes_prompts_in_their_order() {
    let mut args = EngineArgs::new(common::model_path().to_str().unwrap());
    args.max_model_len = Some(512);
    args.kv_cache_memory_bytes = Some(64 << 20);
    // Fewer places in the queue than prompts.
    args.max_num_seqs = Some(2);
    args.max_num_queued_reqs = 1;
    let llm = Llm::new(args).unwrap();
    let params = SamplingParams {
        temperature: 0.0,
        max_tokens: 6,
        ..SamplingParams::default()
    };
    let prompts = [
        "The capital of France is",
        "The capital of Italy is",
        "1, 2, 3, 4,",
        "a b c",
        "x y z",
    ];
    let together = llm.generate(&prompts, &params).unwrap();
    assert_eq!(together.len(), prompts.len());
    assert!(together[0].text.contains("Paris"), "{together:?}");
    assert!(together[1].text.contains("Rome"), "{together:?}");
    for (prompt, completion) in prompts.iter().zip(&together) {
        let alone = llm.generate(&[prompt], &params).unwrap();
        assert_eq!(alone[0].token_ids, completion.token_ids, "{prompt}");
    }
}

/// Stops one thread of the server, as a device that hangs would, until this is dropped.
struct Stalled(Child);

impl Stalled {
    fn new(argument: &str, thread: &str) -> Self {
        let mut child = Command::new("python3")
            .arg(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../e2e/cluster/stall.py"
            ))
            .args([argument, thread])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut said)
            .unwrap();
        let stalled = Self(child);
        assert_eq!(said.trim(), "stopped");
        stalled
    }
}

impl Drop for Stalled {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        // The thread that it held may be gone with its process.
        let _ = self.0.wait();
    }
}

#[test]
fn an_engine_that_hangs_without_a_request_is_seen_by_probes_and_metrics() {
    let name = "--served-model-name=hanging-idle";
    let (_process, address, _log) = serve(&[name, "--health-stall-timeout=1"]);
    let until = |path: &str, wanted: u16| {
        let limit = Instant::now() + Duration::from_secs(30);
        loop {
            let (status, body) = answer(request(address, "GET", path, ""));
            if status == wanted {
                return body;
            }
            assert!(Instant::now() < limit, "{path}: {status} {body}");
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    let silence = || {
        let (_, text) = answer(request(address, "GET", "/metrics", ""));
        let mut lines = text.lines();
        assert!(
            lines
                .any(|line| line.starts_with("vllm:num_requests_running{") && line.ends_with(" 0"))
        );
        let line = text
            .lines()
            .find(|line| line.starts_with("ashlar:engine_silent_seconds{"));
        line.unwrap()
            .rsplit_once(' ')
            .unwrap()
            .1
            .parse::<f64>()
            .unwrap()
    };
    // Longer than twice the timeout, after which one that hangs would have been given up.
    std::thread::sleep(Duration::from_secs(3));
    for path in ["/health", "/health/live"] {
        assert_eq!(answer(request(address, "GET", path, "")).0, 200, "{path}");
    }
    assert!(silence() < 1.0);

    let stalled = Stalled::new(name, "ashlar-engine");
    assert!(until("/health", 503).contains("no sign of life"));
    until("/health/live", 503);
    assert!(silence() > 2.0);
    drop(stalled);
    until("/health/live", 200);
    until("/health", 200);
}

/// Two ranks answer a request, or have none, when `thread` stops: the process ends within 10 s and says why.
fn a_rank_that_hangs_ends_the_process(thread: &str, answers: bool, said: &str) {
    let name = format!("--served-model-name=hanging-{thread}-{answers}");
    let (mut process, address, mut log) =
        serve(&["--tensor-parallel-size=2", "--device=cpu", &name]);
    let body = json!({
        "model": name.split_once('=').unwrap().1, "prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": true,
        "stream": true,
    });
    let stream = answers.then(|| {
        let body = body.to_string();
        let mut stream = BufReader::new(request(address, "POST", "/v1/completions", &body));
        let mut line = String::new();
        while !line.starts_with("data: ") {
            line.clear();
            assert!(stream.read_line(&mut line).unwrap() > 0, "no first token");
        }
        stream
    });
    let stalled = Stalled::new(&name, thread);
    let since = Instant::now();
    let (said_all, all) = mpsc::channel();
    std::thread::spawn(move || {
        let mut rest = String::new();
        log.read_to_string(&mut rest).unwrap(); // to the end of the process
        said_all.send(rest)
    });
    let rest = all.recv_timeout(Duration::from_secs(30));
    let rest = rest.expect("the process goes on");
    let took = since.elapsed();
    // A stopped thread keeps its process from being gone.
    drop((stalled, stream));
    let status = process.0.wait().unwrap();
    assert!(!status.success(), "{status}");
    assert!(rest.contains(said), "{rest}");
    assert!(took < Duration::from_secs(10), "{took:?}: {rest}");
}

#[test]
fn a_leading_rank_that_hangs_ends_the_process_within_ten_seconds() {
    for answers in [true, false] {
        a_rank_that_hangs_ends_the_process(
            "ashlar-engine",
            answers,
            "rank 0 has not answered for 7 s: it hangs",
        );
    }
}

#[test]
fn a_following_rank_that_hangs_ends_the_process_within_ten_seconds() {
    for answers in [true, false] {
        a_rank_that_hangs_ends_the_process(
            "rank-1",
            answers,
            "rank 1 has not answered for 7 s: it hangs",
        );
    }
}
