//! An embedding depends on its prompt alone, as tokens do: not on company, chunks, preemption or the prefix cache.

use super::*;
use crate::engine::{SubmitError, request::Pooling};

fn embedding(mut stream: SequenceStream) -> Result<Vec<f32>, Finish> {
    let mut found = None;
    while let Some(update) = stream.next_blocking() {
        assert!(update.tokens.is_empty(), "nothing is drawn");
        found = found.or(update.embedding);
        if let Some(finish) = update.finish {
            assert!(stream.next_blocking().is_none());
            return found.ok_or(finish);
        }
    }
    panic!("the stream ended without a finish");
}

fn prompt(seed: u32, length: u32) -> Vec<TokenId> {
    (0..length).map(|i| (i * i + seed) % 100).collect()
}

/// Prompts that share beginnings, of one token and of several chunks.
fn prompts() -> Vec<Vec<TokenId>> {
    let lengths = [1, 16, 17, 40, 40, 75, 90];
    lengths.map(|length| prompt(length / 80, length)).to_vec()
}

fn embed(handle: &EngineHandle, prompt: &[TokenId], pooling: Pooling) -> SequenceStream {
    handle.submit(Request::embed(prompt, pooling)).unwrap()
}

fn alone(pooling: Pooling) -> Vec<Vec<f32>> {
    let handle = start(FakeConfig::default(), EngineConfig::default());
    let found = prompts()
        .iter()
        .map(|prompt| embedding(embed(&handle, prompt, pooling)).unwrap())
        .collect();
    stop(&handle);
    found
}

#[test]
fn company_chunks_preemption_and_cache_change_nothing() {
    for pooling in [Pooling::Last, Pooling::Mean] {
        let expected = alone(pooling);
        for enable_prefix_caching in [false, true] {
            let mut fake = FakeConfig::default();
            // Two long sequences fill the pool; a step takes a part of most prompts.
            fake.limits.num_blocks = 16;
            fake.limits.max_num_batched_tokens = 24;
            let config = EngineConfig {
                enable_prefix_caching,
                ..EngineConfig::default()
            };
            let handle = start(fake, config);
            for _ in 0..3 {
                let others: Vec<_> = (0..4)
                    .map(|seed| handle.submit(request(&prompt(seed, 30), 60)).unwrap())
                    .collect();
                let streams: Vec<_> = prompts()
                    .iter()
                    .map(|prompt| embed(&handle, prompt, pooling))
                    .collect();
                for (stream, expected) in streams.into_iter().zip(&expected) {
                    assert_eq!(embedding(stream).as_ref(), Ok(expected), "{pooling:?}");
                }
                for other in others {
                    assert_eq!(collect(other).0.len(), 60);
                }
            }
            let stats = handle.stats();
            assert!(stats.preemptions > 0, "the pool is too large for this test");
            assert_eq!(stats.prefix_cache_hits > 0, enable_prefix_caching);
            stop(&handle);
        }
    }
}

#[test]
fn only_the_last_token_s_state_takes_a_prompt_from_the_cache() {
    let handle = start(FakeConfig::default(), EngineConfig::default());
    let prompt = prompt(0, 64);
    let mut hits = Vec::new();
    for pooling in [Pooling::Last, Pooling::Last, Pooling::Mean] {
        let before = handle.stats().prefix_cache_hits;
        embedding(embed(&handle, &prompt, pooling)).unwrap();
        hits.push(handle.stats().prefix_cache_hits - before);
    }
    assert_eq!(hits, [0, 48, 0]);
    // A prompt that was embedded is there for a request that goes on from it.
    collect(handle.submit(request(&prompt, 2)).unwrap());
    assert_eq!(handle.stats().prefix_cache_hits, 96);
    stop(&handle);
}

#[test]
fn a_prompt_may_be_as_long_as_the_model_and_counts_without_output() {
    let mut fake = FakeConfig::default();
    fake.limits.max_model_len = 64;
    let handle = start(fake, EngineConfig::default());
    embedding(embed(&handle, &prompt(0, 64), Pooling::Mean)).unwrap();
    let too_long = handle.submit(Request::embed(prompt(0, 65), Pooling::Mean));
    assert!(matches!(too_long, Err(SubmitError::TooLong { .. })));
    let stats = handle.stats();
    assert_eq!((stats.prompt_tokens, stats.generation_tokens), (64, 0));
    stop(&handle);
}

#[test]
fn a_runner_without_hidden_states_says_so() {
    let fake = FakeConfig {
        model: crate::model_runner::fake::FakeModel::Script(vec![1]),
        ..FakeConfig::default()
    };
    let handle = start(fake, EngineConfig::default());
    let refused = handle.submit(Request::embed([1, 2], Pooling::Last));
    assert!(matches!(refused, Err(SubmitError::NoEmbeddings)));
    stop(&handle);
}

#[test]
fn a_failed_step_and_a_reader_that_leaves_end_their_own_only() {
    let mut fake = FakeConfig::default();
    fake.faults.error_token = Some(99);
    fake.limits.max_num_batched_tokens = 16;
    let handle = start(fake, EngineConfig::default());
    let gone = embed(&handle, &prompt(0, 90), Pooling::Mean);
    drop(gone);
    let bad = embed(&handle, &[1, 99, 2], Pooling::Mean);
    assert_eq!(embedding(bad).unwrap_err().reason, FinishReason::Error);
    let good = embed(&handle, &prompt(0, 40), Pooling::Mean);
    assert_eq!(embedding(good).as_ref(), Ok(&alone(Pooling::Mean)[3]));
    stop(&handle);
}
