#![allow(clippy::unwrap_used)] // a test may panic

use std::{
    io::Cursor,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::sync::Semaphore;

use super::*;

/// Answers with the prompt in capitals. A prompt that starts with `wait` waits for the gate, `bad` fails.
#[derive(Clone)]
struct Shout {
    gate: Arc<Semaphore>,
    inside: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
    done: Arc<AtomicUsize>,
}

impl Shout {
    fn new() -> Self {
        Self {
            gate: Arc::new(Semaphore::new(0)),
            inside: Arc::default(),
            most: Arc::default(),
            done: Arc::default(),
        }
    }
}

impl Generator for Shout {
    async fn generate(&self, request: BatchRequest) -> Result<Answer, String> {
        let inside = self.inside.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(inside, Ordering::SeqCst);
        let Some(Prompt::Text(text)) = request.prompt else {
            return Err("no text".to_owned());
        };
        if text.starts_with("wait") {
            self.gate.acquire().await.unwrap().forget();
        }
        tokio::task::yield_now().await;
        self.inside.fetch_sub(1, Ordering::SeqCst);
        // The last of a window lets the first go on: answers finish in the opposite order.
        if text.starts_with("open") {
            self.gate.add_permits(1);
        }
        self.done.fetch_add(1, Ordering::SeqCst);
        if text.starts_with("bad") {
            return Err("it is bad".to_owned());
        }
        Ok(Answer {
            text: text.to_uppercase(),
            finish_reason: "stop",
            usage: Usage {
                prompt_tokens: 1,
                completion_tokens: 2,
                total_tokens: 3,
            },
        })
    }
}

fn lines(prompts: &[&str]) -> String {
    prompts
        .iter()
        .map(|prompt| format!("{{\"prompt\": \"{prompt}\"}}\n"))
        .collect()
}

async fn run_on(generator: Shout, in_flight: usize, input: &str) -> (Vec<Value>, Summary) {
    let mut output = Vec::new();
    let input = Cursor::new(input.to_owned().into_bytes());
    let summary = run(
        generator,
        Window { in_flight },
        input,
        &mut output,
        std::future::pending(),
        &mut |_| {},
    )
    .await
    .unwrap();
    let output = String::from_utf8(output).unwrap();
    (
        output
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect(),
        summary,
    )
}

#[tokio::test]
async fn answers_come_in_the_order_of_the_input() {
    let (output, summary) = run_on(Shout::new(), 4, &lines(&["wait a", "b", "c", "open d"])).await;
    let texts: Vec<&str> = output
        .iter()
        .map(|line| line["text"].as_str().unwrap())
        .collect();
    assert_eq!(texts, ["WAIT A", "B", "C", "OPEN D"]);
    assert_eq!(output[3]["index"], 3);
    assert_eq!(
        output[0]["usage"],
        serde_json::json!({"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3})
    );
    assert_eq!(
        summary,
        Summary {
            answered: 4,
            failed: 0,
            interrupted: false,
            completion_tokens: 8
        }
    );
}

#[tokio::test]
async fn no_more_than_the_window_run_at_once() {
    let generator = Shout::new();
    let prompts: Vec<String> = (0..100).map(|n| format!("p{n}")).collect();
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let (output, _) = run_on(generator.clone(), 5, &lines(&prompts)).await;
    assert_eq!(output.len(), 100);
    assert!(
        output
            .iter()
            .enumerate()
            .all(|(at, line)| line["text"] == format!("P{at}"))
    );
    // How many really overlap depends on how fast lines are read; the bound does not.
    let most = generator.most.load(Ordering::SeqCst);
    assert!((1..=5).contains(&most), "{most} ran at once");
}

#[tokio::test]
async fn a_slow_first_answer_holds_back_a_bounded_number() {
    let generator = Shout::new();
    let mut prompts = vec!["wait"];
    prompts.extend(["x"; 200]);
    let input = Cursor::new(lines(&prompts).into_bytes());
    let (mut output, count) = (Vec::new(), Arc::clone(&generator.done));
    // Everything that may run has run when nothing moves any more; then the first is let go.
    let gate = Arc::clone(&generator.gate);
    let release = async move {
        let limit = 2 * HELD_FACTOR;
        while count.load(Ordering::SeqCst) < limit - 1 {
            tokio::task::yield_now().await;
        }
        for _ in 0..1000 {
            tokio::task::yield_now().await;
        }
        assert_eq!(
            count.load(Ordering::SeqCst),
            limit - 1,
            "answers held back are bounded"
        );
        gate.add_permits(1);
    };
    let mut ignore = |_: &Summary| {};
    let running = run(
        generator,
        Window { in_flight: 2 },
        input,
        &mut output,
        std::future::pending(),
        &mut ignore,
    );
    let (summary, ()) = tokio::join!(running, release);
    assert_eq!(summary.unwrap().answered, 201);
}

#[tokio::test]
async fn a_bad_line_is_an_error_in_its_place() {
    let input = concat!(
        "{\"prompt\": \"a\", \"id\": \"first\"}\n",
        "\n   \n",
        "{\"id\": 7, \"prompt\": 5}\n",
        "not json\n",
        "{\"id\": {\"k\": 1}}\n",
        "{\"prompt\": \"x\", \"messages\": []}\n",
        "{\"prompt\": \"bad\", \"id\": null}\n",
        "{\"prompt\": \"z\"}",
    );
    let (output, summary) = run_on(Shout::new(), 3, input).await;
    assert_eq!((summary.answered, summary.failed), (2, 5));
    assert_eq!(output[0]["id"], "first");
    assert_eq!(
        (&output[1]["id"], &output[1]["error"]["line"]),
        (&7.into(), &4.into())
    );
    assert!(
        output[2]["error"]["message"]
            .as_str()
            .unwrap()
            .contains("not a request")
    );
    assert_eq!(output[3]["id"]["k"], 1);
    assert!(
        output[3]["error"]["message"]
            .as_str()
            .unwrap()
            .contains("neither")
    );
    assert!(
        output[4]["error"]["message"]
            .as_str()
            .unwrap()
            .contains("both")
    );
    assert_eq!(output[5]["error"]["message"], "it is bad");
    assert_eq!(
        (&output[6]["text"], &output[6]["index"]),
        (&"Z".into(), &6.into())
    );
}

#[tokio::test]
async fn an_overlong_line_and_one_that_is_no_text_fail_alone() {
    let mut input = vec![b'x'; MAX_LINE_BYTES + 10];
    input.extend_from_slice(b"\n\xff\xfe\n{\"prompt\": \"a\"}\n");
    let mut output = Vec::new();
    let summary = run(
        Shout::new(),
        Window { in_flight: 2 },
        Cursor::new(input),
        &mut output,
        std::future::pending(),
        &mut |_| {},
    )
    .await
    .unwrap();
    assert_eq!((summary.answered, summary.failed), (1, 2));
    let output = String::from_utf8(output).unwrap();
    assert!(
        output.contains("longer than") && output.contains("not UTF-8"),
        "{output}"
    );
}

#[tokio::test]
async fn an_interrupt_writes_what_is_done_and_drops_the_rest() {
    let generator = Shout::new();
    let count = Arc::clone(&generator.done);
    let interrupt = async move {
        while count.load(Ordering::SeqCst) < 2 {
            tokio::task::yield_now().await;
        }
    };
    let input = Cursor::new(lines(&["wait a", "b", "c"]).into_bytes());
    let mut output = Vec::new();
    let summary = run(
        generator,
        Window { in_flight: 4 },
        input,
        &mut output,
        interrupt,
        &mut |_| {},
    )
    .await
    .unwrap();
    assert!(summary.interrupted);
    let output = String::from_utf8(output).unwrap();
    let texts: Vec<Value> = output
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["text"].clone())
        .collect();
    assert_eq!(texts, ["B", "C"], "the first was not done");
}

#[tokio::test]
async fn broken_input_and_output_end_the_run() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::Error::other("no disk"))
        }
    }
    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::Error::other("no pipe"))
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let window = Window { in_flight: 1 };
    let result = run(
        Shout::new(),
        window,
        Broken,
        Vec::new(),
        std::future::pending(),
        &mut |_| {},
    )
    .await;
    assert!(matches!(result, Err(BatchError::Read(_))), "{result:?}");
    let input = Cursor::new(lines(&["a"]).into_bytes());
    let result = run(
        Shout::new(),
        window,
        input,
        Broken,
        std::future::pending(),
        &mut |_| {},
    )
    .await;
    assert!(matches!(result, Err(BatchError::Write(_))), "{result:?}");
}

#[tokio::test]
async fn progress_hears_of_every_line() {
    let heard = Mutex::new(Vec::new());
    let input = Cursor::new(lines(&["a", "bad", "c"]).into_bytes());
    let mut listen = |summary: &Summary| {
        heard
            .lock()
            .unwrap()
            .push((summary.answered, summary.failed))
    };
    run(
        Shout::new(),
        Window { in_flight: 2 },
        input,
        Vec::new(),
        std::future::pending(),
        &mut listen,
    )
    .await
    .unwrap();
    assert_eq!(*heard.lock().unwrap(), [(1, 0), (1, 1), (2, 1)]);
}

#[test]
fn a_request_reads_openai_and_vllm_fields() {
    let request = BatchRequest::parse(
        r#"{"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 9, "stop": "a", "top_k": -1, "seed": 3, "unknown": 1}"#,
    )
    .unwrap();
    assert_eq!(
        (request.max_tokens, request.top_k, request.seed),
        (Some(9), Some(-1), Some(3))
    );
    assert_eq!(request.stop.unwrap().into_vec(), ["a"]);
    let tokens = BatchRequest::parse(r#"{"prompt": [1, 2], "stop": ["a", "b"]}"#).unwrap();
    assert_eq!(tokens.prompt, Some(Prompt::Tokens(vec![1, 2])));
}
