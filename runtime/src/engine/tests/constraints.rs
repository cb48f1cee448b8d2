//! Masks, priorities, deadlines and prompt log-probabilities, through the whole engine.

use std::{sync::Arc, time::Instant};

use super::*;
use crate::{
    engine::constraint::Constraint,
    grammar::{CompiledGrammar, GrammarSpec, Grammars},
};

const EOS: TokenId = 260;

fn fake() -> FakeConfig {
    let mut fake = FakeConfig {
        eos_token_ids: vec![EOS],
        ..FakeConfig::default()
    };
    fake.limits.vocab_size = 261;
    fake
}

fn config() -> EngineConfig {
    EngineConfig {
        eos_token_ids: vec![EOS],
        ..EngineConfig::default()
    }
}

fn grammar(expression: &str) -> CompiledGrammar {
    let grammars = Grammars::new(crate::tokenizer::tests::tiny(), &[EOS], 261);
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let spec = GrammarSpec::Regex(expression.to_owned());
    let compile = grammars.compile(&spec);
    runtime
        .enable_time()
        .build()
        .unwrap()
        .block_on(compile)
        .unwrap()
}

fn sampled(prompt: &[TokenId], max_tokens: u32, seed: u64) -> Request {
    let mut request = request(prompt, max_tokens);
    request.params.temperature = 1.0;
    request.params.seed = Some(seed);
    request
}

fn text(tokens: &[TokenId]) -> String {
    let tokenizer = crate::tokenizer::tests::tiny();
    tokenizer.decode(tokens, true).unwrap()
}

#[test]
fn every_output_follows_its_grammar_and_neighbours_are_as_alone() {
    let grammar = grammar("[a-z]{3,12}=[0-9]{2}");
    for depth in [1, 2] {
        let mut fake = fake();
        fake.depth = depth;
        // Few blocks: some are preempted while their mask is computed.
        fake.limits.num_blocks = 14;
        fake.limits.block_size = 4;
        let alone = start(fake.clone(), config());
        let expected = collect(alone.submit(sampled(&[5; 9], 20, 99)).unwrap());
        stop(&alone);
        let handle = start(fake, config());
        let neighbour = handle.submit(sampled(&[5; 9], 20, 99)).unwrap();
        let streams: Vec<_> = (0..24)
            .map(|seed| {
                let constraint = Constraint::new(261, None, Vec::new(), Some(grammar.session()));
                let request = Request {
                    constraint,
                    ..sampled(&[1, 2, 3, 4, 5, 6, 7], 40, seed)
                };
                handle.submit(request).unwrap()
            })
            .collect();
        for stream in streams {
            let (tokens, end) = collect(stream);
            let text = text(&tokens);
            assert_eq!(end.reason, FinishReason::Stop, "{text:?}");
            let (letters, digits) = text.split_once('=').unwrap();
            assert!((3..=12).contains(&letters.len()), "{text:?}");
            assert!(letters.bytes().all(|byte| byte.is_ascii_lowercase()));
            assert!(digits.len() == 2 && digits.bytes().all(|byte| byte.is_ascii_digit()));
        }
        assert_eq!(collect(neighbour), expected);
        assert!(handle.stats().preemptions > 0);
        stop(&handle);
    }
}

#[test]
fn a_grammar_that_the_tokens_leave_fails_its_request_alone() {
    // The script knows no masks.
    let mut fake = fake();
    fake.model = crate::model_runner::fake::FakeModel::Script(vec![b'a'.into()]);
    let handle = start(fake, config());
    let constraint = Constraint::new(261, None, Vec::new(), Some(grammar("ab").session()));
    let bad = handle.submit(Request {
        constraint,
        ..request(&[1], 5)
    });
    let good = handle.submit(request(&[1], 5)).unwrap();
    let (_, end) = collect(bad.unwrap());
    assert_eq!(end.reason, FinishReason::Error);
    assert!(end.error.unwrap().contains("grammar"));
    assert_eq!(collect(good).1, finish(FinishReason::Length));
    stop(&handle);
}

#[test]
fn allowed_ids_and_bad_words_hold() {
    for depth in [1, 2] {
        let mut fake = fake();
        fake.depth = depth;
        let handle = start(fake, config());
        let allowed: Vec<TokenId> = vec![1, 2, 3];
        for seed in 0..8 {
            let bad_words = vec![vec![1, 1], vec![2, 3, 2], vec![3, 3]];
            let constraint = Constraint::new(261, Some(&allowed), bad_words.clone(), None);
            let request = Request {
                constraint,
                ..sampled(&[9, 8], 60, seed)
            };
            let (tokens, _) = collect(handle.submit(request).unwrap());
            assert_eq!(tokens.len(), 60);
            assert!(tokens.iter().all(|id| allowed.contains(id)));
            for bad in &bad_words {
                assert!(!tokens.windows(bad.len()).any(|window| window == bad));
            }
        }
        stop(&handle);
    }
}

#[test]
fn a_request_past_its_deadline_ends_wherever_it_is() {
    let (handle, gate) = start_gated(fake(), config());
    let running = handle.submit(request(&[1], 50)).unwrap();
    let mut late = request(&[2], 50);
    late.deadline = Some(Instant::now() + Duration::from_millis(30));
    let late = handle.submit(late).unwrap();
    gate.wait_submitted(1);
    std::thread::sleep(Duration::from_millis(40));
    gate.open();
    let (_, end) = collect(late);
    assert_eq!(end, Finish::late());
    assert_eq!(collect(running).1, finish(FinishReason::Length));
    stop(&handle);
}

#[test]
fn a_tenant_with_a_long_queue_does_not_hold_up_another() {
    let config = EngineConfig {
        max_num_seqs: 1,
        ..config()
    };
    let (handle, gate) = start_gated(fake(), config);
    let first = handle.submit(request(&[1], 4)).unwrap();
    gate.wait_submitted(1);
    let of = |tenant, priority| Request {
        tenant,
        priority,
        ..request(&[1; 16], 4)
    };
    let queue: Vec<_> = (0..5).map(|_| handle.submit(of(1, 0)).unwrap()).collect();
    let other = handle.submit(of(2, 0)).unwrap();
    let urgent = handle.submit(of(1, -5)).unwrap();
    let order = Arc::new(Mutex::new(Vec::new()));
    let watchers: Vec<_> = queue
        .into_iter()
        .map(|stream| ("queue", stream))
        .chain([("first", first), ("other", other), ("urgent", urgent)])
        .map(|(name, stream)| {
            let order = Arc::clone(&order);
            std::thread::spawn(move || {
                let mut stream = stream;
                stream.next_blocking();
                order.lock().unwrap().push(name);
                collect(stream)
            })
        })
        .collect();
    // One step at a time, so that the order of first tokens is the order of admission.
    for _ in 0..8 * 4 {
        gate.allow(1);
        std::thread::sleep(Duration::from_millis(3));
    }
    gate.open();
    for watcher in watchers {
        watcher.join().unwrap();
    }
    let order = order.lock().unwrap().clone();
    assert_eq!(order[..3], ["first", "urgent", "other"], "{order:?}");
    stop(&handle);
}

#[test]
fn prompt_logprobs_do_not_depend_on_how_the_prompt_was_cut() {
    let prompt: Vec<TokenId> = (0..150).map(|i| i * 7 % 250).collect();
    let mut seen: Vec<Vec<crate::engine::request::TokenLogprobs>> = Vec::new();
    for (depth, batched) in [(1, 8192), (2, 16), (1, 7)] {
        let mut fake = fake();
        fake.depth = depth;
        let config = EngineConfig {
            max_num_batched_tokens: batched,
            ..config()
        };
        let handle = start(fake, config);
        for _ in 0..2 {
            let mut asked = request(&prompt, 3);
            asked.prompt_logprobs = Some(2);
            let mut stream = handle.submit(asked).unwrap();
            let plain = handle.submit(request(&prompt[..20], 3)).unwrap();
            let update = stream.next_blocking().unwrap();
            assert_eq!(update.cached_prompt_tokens, 0);
            let logprobs = update.prompt_logprobs.unwrap();
            assert_eq!(logprobs.len(), prompt.len() - 1);
            assert!(
                logprobs
                    .iter()
                    .all(|l| l.top.len() == 2 && l.sampled <= l.top[0].1)
            );
            seen.push(logprobs);
            if update.finish.is_none() {
                collect(stream);
            }
            collect(plain);
        }
        stop(&handle);
    }
    assert!(seen.iter().all(|logprobs| *logprobs == seen[0]));
}
