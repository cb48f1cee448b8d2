//! Streams, queue limit, drain, and what observers and stats are told.

use std::{
    task::Context,
    time::{Duration, Instant},
};

use futures::{FutureExt, task::noop_waker};

use super::*;
use crate::engine::{EngineObserver, FinishedRequest, IDLE_BEAT, StepReport, SubmitError};

#[derive(Default)]
struct Recorder {
    finished: Mutex<Vec<FinishedRequest>>,
    /// (tokens, prompt, cached, generated, first tokens, intervals)
    steps: Mutex<Vec<[u32; 6]>>,
}

impl EngineObserver for Recorder {
    fn on_step(&self, report: &StepReport<'_>) {
        self.steps.lock().unwrap().push([
            report.num_tokens,
            report.prompt_tokens,
            report.cached_prompt_tokens,
            report.generation_tokens,
            u32::try_from(report.time_to_first_token.len()).unwrap(),
            u32::try_from(report.inter_token_latency.len()).unwrap(),
        ]);
    }

    fn on_finished(&self, request: &FinishedRequest) {
        self.finished.lock().unwrap().push(request.clone());
    }
}

fn start_recorded(config: EngineConfig) -> (EngineHandle, Gate, Arc<Recorder>) {
    let gate = Gate::default();
    let recorder = Arc::new(Recorder::default());
    let runner = Gated {
        inner: FakeRunner::new(FakeConfig::default()),
        gate: gate.clone(),
    };
    let handle = Engine::start_observed(Box::new(runner), config, recorder.clone()).unwrap();
    (handle, gate, recorder)
}

/// Runs until the engine has no sequence left.
fn until_empty(handle: &EngineHandle) {
    while handle.stats().in_system > 0 {
        std::thread::yield_now();
    }
}

#[test]
fn tokens_come_one_step_at_a_time_and_coalesce_for_a_slow_reader() {
    let (handle, gate, _) = start_recorded(EngineConfig::default());
    let mut stream = handle.submit(request(&[1, 2], 6)).unwrap();
    let mut cx = Context::from_waker(std::task::Waker::noop());
    assert!(stream.poll_next(&mut cx).is_pending());
    gate.allow(1);
    assert_eq!(stream.next_blocking().unwrap().tokens.len(), 1);
    gate.open();
    // The engine does not wait for the reader.
    handle.drain(Instant::now() + Duration::from_secs(3600));
    handle.join_blocking().unwrap();
    let rest = stream.next_blocking().unwrap();
    assert_eq!(rest.tokens.len(), 5);
    assert_eq!(rest.finish, Some(finish(FinishReason::Length)));
    assert!(stream.next_blocking().is_none());
}

#[test]
fn a_task_is_woken() {
    let (handle, gate, _) = start_recorded(EngineConfig::default());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let mut stream = handle.submit(request(&[1, 2], 3)).unwrap();
    runtime.block_on(async {
        // Cancelling a wait loses nothing.
        let waker = noop_waker();
        let mut first = Box::pin(stream.next());
        assert!(
            first
                .poll_unpin(&mut Context::from_waker(&waker))
                .is_pending()
        );
        drop(first);
        gate.open();
        let mut tokens = 0;
        while let Some(update) = stream.next().await {
            tokens += update.tokens.len();
        }
        assert_eq!(tokens, 3);
        handle.shutdown();
        handle.join().await.unwrap();
    });
}

#[test]
fn a_stop_token_is_the_last_token_of_the_stream() {
    let eos = {
        let handle = start(FakeConfig::default(), EngineConfig::default());
        let tokens = collect(handle.submit(request(&[1, 2], 5)).unwrap()).0;
        stop(&handle);
        tokens[2]
    };
    let config = EngineConfig {
        eos_token_ids: vec![eos],
        ..EngineConfig::default()
    };
    let handle = start(FakeConfig::default(), config);
    let (tokens, finish) = collect(handle.submit(request(&[1, 2], 5)).unwrap());
    assert_eq!(finish.reason, FinishReason::Stop);
    assert_eq!(finish.stop_token, Some(eos));
    assert_eq!(tokens.last(), Some(&eos));
    let mut past_eos = request(&[1, 2], 5);
    past_eos.params.ignore_eos = true;
    assert_eq!(collect(handle.submit(past_eos).unwrap()).0.len(), 5);
    stop(&handle);
}

#[test]
fn dropping_a_stream_aborts_wherever_the_sequence_is() {
    let config = EngineConfig {
        max_num_seqs: 1,
        ..EngineConfig::default()
    };
    let (handle, gate, recorder) = start_recorded(config);
    let running = handle.submit(request(&[1; 40], 1000)).unwrap();
    let waiting = handle.submit(request(&[2; 40], 1000)).unwrap();
    gate.wait_submitted(1);
    let ids = [running.id(), waiting.id()];
    drop(waiting);
    drop(running);
    gate.open();
    until_empty(&handle);
    let finished = recorder.finished.lock().unwrap().clone();
    assert_eq!(finished.len(), 2);
    for request in finished {
        assert!(ids.contains(&request.seq));
        assert_eq!(request.reason, FinishReason::Abort);
        assert_eq!(request.scheduled.is_some(), request.seq == ids[0]);
    }
    stop(&handle);
}

#[test]
fn a_stop_string_ends_the_sequence_at_its_token() {
    let (handle, gate, recorder) = start_recorded(EngineConfig::default());
    let mut stream = handle.submit(request(&[1], 1000)).unwrap();
    gate.allow(3);
    let mut seen = 0;
    while seen < 3 {
        seen += stream.next_blocking().unwrap().tokens.len();
    }
    stream.finish_at(2);
    assert!(stream.next_blocking().is_none());
    gate.open();
    until_empty(&handle);
    let finished = recorder.finished.lock().unwrap()[0].clone();
    assert_eq!(finished.reason, FinishReason::Stop);
    assert_eq!(finished.num_generation_tokens, 2);
    // What was counted past the stop string is taken off the next tokens.
    collect(handle.submit(request(&[1], 50)).unwrap());
    assert_eq!(handle.stats().generation_tokens, 2 + 50);
    stop(&handle);
}

#[test]
fn the_queue_is_bounded_and_free_places_are_no_queue() {
    let config = EngineConfig {
        max_num_seqs: 2,
        max_num_queued_reqs: 3,
        ..EngineConfig::default()
    };
    let (handle, gate, _) = start_recorded(config);
    let mut streams = vec![handle.submit(request(&[1], 8)).unwrap()];
    gate.wait_submitted(1);
    // One place is free, three may wait.
    for _ in 0..4 {
        streams.push(handle.submit(request(&[1], 8)).unwrap());
    }
    let error = handle.submit(request(&[1], 8)).unwrap_err();
    assert_eq!(
        error,
        SubmitError::QueueFull {
            queued: 4,
            limit: 3
        }
    );
    gate.open();
    for stream in streams {
        assert_eq!(collect(stream).0.len(), 8);
    }
    collect(handle.submit(request(&[1], 8)).unwrap());
    stop(&handle);
}

#[test]
fn draining_finishes_what_was_accepted() {
    let config = EngineConfig {
        max_num_seqs: 1,
        ..EngineConfig::default()
    };
    let (handle, gate, _) = start_recorded(config);
    let accepted: Vec<_> = (0..3)
        .map(|_| handle.submit(request(&[1], 8)).unwrap())
        .collect();
    gate.wait_submitted(1);
    handle.drain(Instant::now() + Duration::from_secs(3600));
    let refused = handle.submit(request(&[1], 8)).unwrap_err();
    assert_eq!(refused, SubmitError::ShuttingDown);
    assert!(handle.stats().draining);
    gate.open();
    for stream in accepted {
        assert_eq!(collect(stream).1, finish(FinishReason::Length));
    }
    handle.join_blocking().unwrap();
    assert!(!handle.stats().alive);
    assert_eq!(handle.check_open(), Err(SubmitError::ShuttingDown));
}

#[test]
fn what_is_left_at_the_deadline_is_aborted() {
    let (handle, gate, _) = start_recorded(EngineConfig::default());
    let stream = handle.submit(request(&[1], 4000)).unwrap();
    gate.wait_submitted(1);
    handle.drain(Instant::now() + Duration::from_secs(3600));
    // The deadline can only come nearer.
    handle.drain(Instant::now());
    handle.drain(Instant::now() + Duration::from_secs(3600));
    gate.open();
    assert_eq!(collect(stream).1, finish(FinishReason::Abort));
    handle.join_blocking().unwrap();
}

#[test]
fn an_idle_engine_shuts_down_at_once() {
    let handle = start(FakeConfig::default(), EngineConfig::default());
    stop(&handle);
    stop(&handle);
}

#[test]
fn observers_are_told_of_every_token_once() {
    let (handle, gate, recorder) = start_recorded(EngineConfig::default());
    gate.open();
    let before = Instant::now();
    let prompt: Vec<u32> = (0..40).collect();
    for _ in 0..2 {
        let mut stream = handle.submit_arrived(request(&prompt, 3), before).unwrap();
        while stream.next_blocking().is_some() {}
    }
    assert_eq!(
        *recorder.steps.lock().unwrap(),
        [
            [40, 40, 0, 1, 1, 0],
            [1, 0, 0, 1, 0, 1],
            [1, 0, 0, 1, 0, 1],
            [8, 40, 32, 1, 1, 0],
            [1, 0, 0, 1, 0, 1],
            [1, 0, 0, 1, 0, 1],
        ]
    );
    let finished = recorder.finished.lock().unwrap().clone();
    assert_eq!(finished.len(), 2);
    for (request, cached) in finished.iter().zip([0, 32]) {
        assert_eq!(request.num_prompt_tokens, 40);
        assert_eq!(request.num_cached_tokens, cached);
        assert_eq!(request.num_generation_tokens, 3);
        assert_eq!(request.max_tokens, Some(3));
        let times = [
            Some(request.arrival),
            Some(request.queued),
            request.scheduled,
            request.first_token,
            request.last_token,
            Some(request.finished),
        ];
        assert!(times.iter().all(Option::is_some) && times.is_sorted());
    }
    let stats = handle.stats();
    assert_eq!((stats.prompt_tokens, stats.prompt_tokens_cached), (80, 32));
    assert_eq!((stats.generation_tokens, stats.steps), (6, 6));
    stop(&handle);
}

#[test]
fn a_step_that_hangs_is_silence_and_so_is_an_idle_engine_that_hangs() {
    let (handle, gate, _) = start_recorded(EngineConfig::default());
    let silence = IDLE_BEAT * 3;
    let until = |reached: &dyn Fn(Duration) -> bool| {
        let limit = Instant::now() + Duration::from_secs(10);
        while !reached(handle.stats().silent_for) {
            assert!(Instant::now() < limit, "{:?}", handle.stats());
            std::thread::sleep(IDLE_BEAT / 10);
        }
    };
    let stream = handle.submit(request(&[1; 40], 2)).unwrap();
    gate.wait_submitted(1);
    until(&|silent| silent > silence);
    gate.open();
    collect(stream);
    until(&|silent| silent < silence);
    until_empty(&handle);
    // Signs of life go on without work: a clock that only runs would have passed the limit.
    let idle_since = Instant::now();
    until(&|silent| silent < silence && idle_since.elapsed() > silence * 2);
    // Its thread waits for this lock now, as one that hangs.
    let inbox = handle.shared.lock();
    until(&|silent| silent > silence);
    assert_eq!(handle.stats().in_system, 0);
    drop(inbox);
    until(&|silent| silent < silence);
    stop(&handle);
}

#[test]
fn usage_counts_the_blocks_of_running_sequences() {
    let (handle, gate, _) = start_recorded(EngineConfig::default());
    let mut stream = handle.submit(request(&[1; 40], 20)).unwrap();
    gate.allow(1);
    stream.next_blocking().unwrap();
    let stats = handle.stats();
    assert_eq!((stats.running, stats.waiting), (1, 0));
    assert_eq!(stats.blocks_total - stats.blocks_free, 3);
    assert!((stats.kv_cache_usage - 3.0 / 1023.0).abs() < 1e-12);
    gate.open();
    collect(stream);
    assert_eq!(handle.stats().kv_cache_usage, 0.0);
    stop(&handle);
}
