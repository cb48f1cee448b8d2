//! The batch job: JSON lines in, JSON lines out in the order of the input, so many at once.
//!
//! Invariants:
//! - every non-blank input line has exactly one output line, an answer or an error, unless the run is interrupted;
//! - memory is bounded: [`Window::in_flight`] requests run, and finished answers wait for at most
//!   [`HELD_FACTOR`] times as many places in front of them;
//! - a bad line never stops the run.

mod model;

pub use model::ModelGenerator;

use std::{
    collections::BTreeMap,
    io::{BufRead, Read, Write},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::{sync::mpsc, task::JoinSet};

/// Longest input line.
pub const MAX_LINE_BYTES: usize = 16 << 20;
/// Finished answers held back for the sake of order, as a multiple of the requests in flight.
pub const HELD_FACTOR: usize = 8;
/// Lines read ahead.
const READ_AHEAD: usize = 64;

/// One line of input. Sampling fields that are absent take the command's defaults.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct BatchRequest {
    /// Any JSON; handed back.
    #[serde(default)]
    pub id: Option<Value>,
    /// Text, or a list of token ids.
    pub prompt: Option<Prompt>,
    /// A conversation, rendered by the model's chat template.
    pub messages: Option<Vec<Value>>,
    /// Most tokens to generate.
    #[serde(alias = "max_completion_tokens")]
    pub max_tokens: Option<u32>,
    /// See [`SamplingParams`](crate::engine::request::SamplingParams), as all that follow.
    pub temperature: Option<f32>,
    /// Nucleus.
    pub top_p: Option<f32>,
    /// Most likely tokens.
    pub top_k: Option<i64>,
    /// Share of the most likely token.
    pub min_p: Option<f32>,
    /// Random stream.
    pub seed: Option<u64>,
    /// Penalty on tokens of prompt and output.
    pub repetition_penalty: Option<f32>,
    /// Penalty on tokens of the output.
    pub presence_penalty: Option<f32>,
    /// Penalty per occurrence.
    pub frequency_penalty: Option<f32>,
    /// Strings that end the text and are not part of it.
    pub stop: Option<OneOrMany>,
    /// Ids that end the text.
    #[serde(default)]
    pub stop_token_ids: Vec<u32>,
    /// Go on past end-of-sequence.
    #[serde(default)]
    pub ignore_eos: bool,
    /// Tokens before which nothing ends the text.
    #[serde(default)]
    pub min_tokens: u32,
}

/// A prompt as text or as token ids.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Prompt {
    /// To be tokenised.
    Text(String),
    /// As they are.
    Tokens(Vec<u32>),
}

/// A string, or a list of them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl OneOrMany {
    /// As a list.
    #[must_use]
    pub fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

impl BatchRequest {
    /// Reads a line.
    ///
    /// # Errors
    /// What is wrong with it, and the id if that could be read.
    pub fn parse(line: &str) -> Result<Self, (String, Option<Value>)> {
        let request: Self = serde_json::from_str(line).map_err(|error| {
            let id = serde_json::from_str::<Value>(line)
                .ok()
                .and_then(|value| value.get("id").cloned());
            (format!("not a request: {error}"), id)
        })?;
        match (&request.prompt, &request.messages) {
            (Some(_), None) | (None, Some(_)) => Ok(request),
            (None, None) => Err((
                "it has neither \"prompt\" nor \"messages\"".to_owned(),
                request.id,
            )),
            (Some(_), Some(_)) => Err((
                "it has both \"prompt\" and \"messages\": give one".to_owned(),
                request.id,
            )),
        }
    }
}

/// Token counts, as OpenAI names them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens generated.
    pub completion_tokens: u32,
    /// Both.
    pub total_tokens: u32,
}

/// What a request came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Generated text.
    pub text: String,
    /// `stop` or `length`.
    pub finish_reason: &'static str,
    /// Tokens.
    pub usage: Usage,
}

/// Whatever answers requests.
pub trait Generator: Clone + Send + Sync + 'static {
    /// Answers one; the error is what the user should read.
    fn generate(
        &self,
        request: BatchRequest,
    ) -> impl Future<Output = Result<Answer, String>> + Send;
}

/// One line of output.
#[derive(Debug, Serialize)]
struct OutputLine {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<Value>,
    /// Position among the non-blank input lines, from 0.
    index: usize,
    #[serde(flatten)]
    result: OutputResult,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum OutputResult {
    Answer {
        text: String,
        finish_reason: &'static str,
        usage: Usage,
    },
    Error {
        error: OutputError,
    },
}

#[derive(Debug, Serialize)]
struct OutputError {
    message: String,
    /// Line of the input, from 1.
    line: usize,
}

/// How much is done at once.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// Requests handed to the generator and not yet answered; at least 1.
    pub in_flight: usize,
}

/// What a run came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Lines written with an answer.
    pub answered: usize,
    /// Lines written with an error.
    pub failed: usize,
    /// Ended by the interrupt, before all input was answered.
    pub interrupted: bool,
    /// Tokens of all answers.
    pub completion_tokens: u64,
}

/// The input or the output could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    /// Input.
    #[error("cannot read the prompts")]
    Read(#[source] std::io::Error),
    /// Output.
    #[error("cannot write the answers")]
    Write(#[source] std::io::Error),
    /// A task ended abnormally.
    #[error("a request ended abnormally; this is a bug: {0}")]
    Task(String),
}

/// A line with its number, or why it cannot be used.
type InputLine = std::io::Result<(usize, Result<String, String>)>;

/// Reads lines on a thread of its own: standard input cannot be polled.
fn read_lines(input: impl Read + Send + 'static) -> mpsc::Receiver<InputLine> {
    let (send, receive) = mpsc::channel(READ_AHEAD);
    std::thread::spawn(move || {
        let mut input = std::io::BufReader::new(input);
        for number in 1.. {
            let line = match next_line(&mut input) {
                Ok(Some(line)) => Ok((number, line)),
                Ok(None) => break,
                Err(error) => Err(error),
            };
            let blank = matches!(&line, Ok((_, Ok(text))) if text.trim().is_empty());
            let last = line.is_err();
            if (!blank && send.blocking_send(line).is_err()) || last {
                break;
            }
        }
    });
    receive
}

/// The next line; an over-long one is passed over, and is an error of that line only.
fn next_line(input: &mut impl BufRead) -> std::io::Result<Option<Result<String, String>>> {
    let mut line = Vec::new();
    let limit = MAX_LINE_BYTES as u64 + 1;
    if input.by_ref().take(limit).read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    if line.len() > MAX_LINE_BYTES && line.last() != Some(&b'\n') {
        skip_line(input)?;
        return Ok(Some(Err(format!(
            "the line is longer than {MAX_LINE_BYTES} bytes"
        ))));
    }
    Ok(Some(
        String::from_utf8(line).map_err(|_| "the line is not UTF-8".to_owned()),
    ))
}

fn skip_line(input: &mut impl BufRead) -> std::io::Result<()> {
    loop {
        let buffer = input.fill_buf()?;
        if buffer.is_empty() {
            return Ok(());
        }
        let (used, found) = match buffer.iter().position(|&byte| byte == b'\n') {
            Some(at) => (at + 1, true),
            None => (buffer.len(), false),
        };
        input.consume(used);
        if found {
            return Ok(());
        }
    }
}

/// Output in order, with what cannot be written yet.
struct InOrder<'a, W> {
    output: W,
    held: BTreeMap<usize, OutputLine>,
    next: usize,
    summary: Summary,
    on_line: &'a mut dyn FnMut(&Summary),
}

impl<W: Write> InOrder<'_, W> {
    fn put(&mut self, line: OutputLine) -> Result<(), BatchError> {
        self.held.insert(line.index, line);
        let before = self.next;
        while let Some(line) = self.held.remove(&self.next) {
            self.write(&line)?;
            self.next += 1;
        }
        // A reader of a pipe sees answers as soon as they may be seen.
        if self.next > before {
            self.output.flush().map_err(BatchError::Write)
        } else {
            Ok(())
        }
    }

    fn write(&mut self, line: &OutputLine) -> Result<(), BatchError> {
        match &line.result {
            OutputResult::Answer { usage, .. } => {
                self.summary.answered += 1;
                self.summary.completion_tokens += u64::from(usage.completion_tokens);
            }
            OutputResult::Error { .. } => self.summary.failed += 1,
        }
        serde_json::to_writer(&mut self.output, line)
            .map_err(|error| BatchError::Write(error.into()))?;
        self.output.write_all(b"\n").map_err(BatchError::Write)?;
        (self.on_line)(&self.summary);
        Ok(())
    }

    /// After an interrupt: everything that is done, gaps and all.
    fn finish(&mut self) -> Result<(), BatchError> {
        for (_, line) in std::mem::take(&mut self.held) {
            self.write(&line)?;
        }
        self.output.flush().map_err(BatchError::Write)
    }
}

/// Answers every line of `input` on `output`, until the end or until `interrupt` resolves; then what is done is
/// written and the rest dropped. `on_line` hears of every line written.
///
/// # Errors
/// [`BatchError`] when input or output fail; bad lines are no errors.
pub async fn run<G: Generator>(
    generator: G,
    window: Window,
    input: impl Read + Send + 'static,
    output: impl Write,
    interrupt: impl Future<Output = ()>,
    on_line: &mut dyn FnMut(&Summary),
) -> Result<Summary, BatchError> {
    let in_flight = window.in_flight.max(1);
    let mut lines = read_lines(input);
    let mut order = InOrder {
        output,
        held: BTreeMap::new(),
        next: 0,
        summary: Summary::default(),
        on_line,
    };
    let mut tasks: JoinSet<OutputLine> = JoinSet::new();
    let (mut index, mut open) = (0, true);
    let mut interrupt = std::pin::pin!(interrupt);
    while open || !tasks.is_empty() {
        let room = tasks.len() < in_flight && index - order.next < in_flight * HELD_FACTOR;
        tokio::select! {
            biased;
            () = &mut interrupt => {
                order.summary.interrupted = true;
                break;
            }
            Some(done) = tasks.join_next() => order.put(done.map_err(|error| BatchError::Task(error.to_string()))?)?,
            line = lines.recv(), if open && room => match line {
                None => open = false,
                Some(Err(error)) => return Err(BatchError::Read(error)),
                Some(Ok((number, text))) => {
                    match text.map_err(|message| (message, None)).and_then(|text| BatchRequest::parse(&text)) {
                        Ok(request) => {
                            let generator = generator.clone();
                            tasks.spawn(answer(generator, request, index, number));
                        }
                        Err((message, id)) => order.put(failed(id, index, number, message))?,
                    }
                    index += 1;
                }
            },
        }
    }
    while let Some(Ok(line)) = tasks.try_join_next() {
        order.put(line)?;
    }
    tasks.abort_all();
    order.finish()?;
    Ok(order.summary)
}

async fn answer<G: Generator>(
    generator: G,
    mut request: BatchRequest,
    index: usize,
    number: usize,
) -> OutputLine {
    let id = request.id.take();
    match generator.generate(request).await {
        Ok(Answer {
            text,
            finish_reason,
            usage,
        }) => OutputLine {
            id,
            index,
            result: OutputResult::Answer {
                text,
                finish_reason,
                usage,
            },
        },
        Err(message) => failed(id, index, number, message),
    }
}

fn failed(id: Option<Value>, index: usize, line: usize, message: String) -> OutputLine {
    OutputLine {
        id,
        index,
        result: OutputResult::Error {
            error: OutputError { message, line },
        },
    }
}

#[cfg(test)]
#[path = "batch/tests.rs"]
mod tests;
