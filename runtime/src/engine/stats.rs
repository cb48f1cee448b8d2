//! Counters and gauges that anyone may read at any time: atomics, so that no reader ever holds up the engine.

use std::{
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// The engine at one moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EngineStats {
    /// Sequences with a place.
    pub running: u32,
    /// Sequences without one, preempted ones included.
    pub waiting: u32,
    /// Tokens of those: what is to be computed before they answer, cached prefixes included.
    pub waiting_tokens: u64,
    /// Prompt tokens computed per second in steps that computed some, lately; 0 before the first.
    pub prefill_tokens_per_second: f64,
    /// Tokens generated per second in steps that generated some, lately; 0 before the first.
    pub decode_tokens_per_second: f64,
    /// Share of the pool in use by sequences, 0 to 1.
    pub kv_cache_usage: f64,
    /// Blocks of the pool that can be allocated (the null block is not counted).
    pub blocks_total: u32,
    /// Of these, in use by no sequence (they may still hold cached prefixes).
    pub blocks_free: u32,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_cache_queries: u64,
    /// Of these, found.
    pub prefix_cache_hits: u64,
    /// Preemptions.
    pub preemptions: u64,
    /// Prompt tokens of sequences whose prefill is done.
    pub prompt_tokens: u64,
    /// Of these, taken from the prefix cache.
    pub prompt_tokens_cached: u64,
    /// Tokens generated.
    pub generation_tokens: u64,
    /// Steps finished.
    pub steps: u64,
    /// Steps that failed.
    pub failed_steps: u64,
    /// Rows that steps computed: prompt and decode tokens.
    pub computed_tokens: u64,
    /// Tokens of the sequences' contexts that steps read, once a sequence and step.
    pub context_tokens: u64,
    /// Pairs of a row and a token that it attended to.
    pub attended_tokens: u64,
    /// Requests that failed because the model's numbers were not finite.
    pub corrupted_requests: u64,
    /// Sequences submitted and not ended; the engine need not know of them yet.
    pub in_system: u32,
    /// Time since the engine's thread ended a step or, without work, last said that it waits for some. More than a step
    /// takes, or than [`IDLE_BEAT`](super::IDLE_BEAT) without work, means that it hangs.
    pub silent_for: Duration,
    /// False once the engine thread has ended.
    pub alive: bool,
    /// True once draining has begun.
    pub draining: bool,
}

/// The cells behind [`EngineStats`]. Written by the engine thread, except `in_system` and `queued`.
pub(super) struct StatsCells {
    started: Instant,
    pub(super) running: AtomicU32,
    pub(super) waiting: AtomicU32,
    pub(super) waiting_tokens: AtomicU64,
    /// Bits of the rates.
    pub(super) prefill_rate: AtomicU64,
    pub(super) decode_rate: AtomicU64,
    pub(super) blocks_total: AtomicU32,
    pub(super) blocks_free: AtomicU32,
    pub(super) prefix_cache_queries: AtomicU64,
    pub(super) prefix_cache_hits: AtomicU64,
    pub(super) preemptions: AtomicU64,
    pub(super) prompt_tokens: AtomicU64,
    pub(super) prompt_tokens_cached: AtomicU64,
    pub(super) generation_tokens: AtomicU64,
    pub(super) steps: AtomicU64,
    pub(super) failed_steps: AtomicU64,
    pub(super) computed_tokens: AtomicU64,
    pub(super) context_tokens: AtomicU64,
    pub(super) attended_tokens: AtomicU64,
    pub(super) corrupted_requests: AtomicU64,
    pub(super) alive: AtomicBool,
    pub(super) draining: AtomicBool,
    /// Sequences submitted and not ended.
    pub(super) in_system: AtomicU32,
    /// Sequences submitted and never given a place yet.
    pub(super) queued: AtomicU32,
    /// When the engine's thread last showed that it goes on; µs since `started`.
    last_sign_us: AtomicU64,
}

/// Tokens over the time of the steps that made them, fading: the speed at the load of the last half minute of work.
#[derive(Debug, Default)]
pub(super) struct Speed {
    tokens: f64,
    seconds: f64,
}

/// A step counts for so many seconds of steps after it.
const SPEED_SECONDS: f64 = 30.0;

impl Speed {
    /// Takes a step in; returns tokens per second.
    pub(super) fn add(&mut self, tokens: u32, step: Duration) -> f64 {
        let seconds = step.as_secs_f64();
        let keep = (-seconds / SPEED_SECONDS).exp();
        self.tokens = self.tokens * keep + f64::from(tokens);
        self.seconds = self.seconds * keep + seconds;
        self.tokens / self.seconds.max(f64::MIN_POSITIVE)
    }
}

impl StatsCells {
    pub(super) fn new(blocks_total: u32) -> Self {
        Self {
            started: Instant::now(),
            running: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
            waiting_tokens: AtomicU64::new(0),
            prefill_rate: AtomicU64::new(0),
            decode_rate: AtomicU64::new(0),
            blocks_total: AtomicU32::new(blocks_total),
            blocks_free: AtomicU32::new(blocks_total),
            prefix_cache_queries: AtomicU64::new(0),
            prefix_cache_hits: AtomicU64::new(0),
            preemptions: AtomicU64::new(0),
            prompt_tokens: AtomicU64::new(0),
            prompt_tokens_cached: AtomicU64::new(0),
            generation_tokens: AtomicU64::new(0),
            steps: AtomicU64::new(0),
            failed_steps: AtomicU64::new(0),
            computed_tokens: AtomicU64::new(0),
            context_tokens: AtomicU64::new(0),
            attended_tokens: AtomicU64::new(0),
            corrupted_requests: AtomicU64::new(0),
            alive: AtomicBool::new(true),
            draining: AtomicBool::new(false),
            in_system: AtomicU32::new(0),
            queued: AtomicU32::new(0),
            last_sign_us: AtomicU64::new(0),
        }
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// The engine's thread goes on: it ended a step, or waits for work.
    pub(super) fn show_life(&self) {
        self.last_sign_us.store(self.now_us(), Relaxed);
    }

    /// A sequence was submitted.
    pub(super) fn enter(&self) {
        self.in_system.fetch_add(1, Relaxed);
        self.queued.fetch_add(1, Relaxed);
    }

    pub(super) fn snapshot(&self) -> EngineStats {
        let total = self.blocks_total.load(Relaxed);
        let free = self.blocks_free.load(Relaxed).min(total);
        // The sign first: one that is made in between would seem to be of the future.
        let last_sign_us = self.last_sign_us.load(Relaxed);
        let silent_us = self.now_us().saturating_sub(last_sign_us);
        EngineStats {
            running: self.running.load(Relaxed),
            waiting: self.waiting.load(Relaxed),
            waiting_tokens: self.waiting_tokens.load(Relaxed),
            prefill_tokens_per_second: f64::from_bits(self.prefill_rate.load(Relaxed)),
            decode_tokens_per_second: f64::from_bits(self.decode_rate.load(Relaxed)),
            kv_cache_usage: f64::from(total - free) / f64::from(total.max(1)),
            blocks_total: total,
            blocks_free: free,
            prefix_cache_queries: self.prefix_cache_queries.load(Relaxed),
            prefix_cache_hits: self.prefix_cache_hits.load(Relaxed),
            preemptions: self.preemptions.load(Relaxed),
            prompt_tokens: self.prompt_tokens.load(Relaxed),
            prompt_tokens_cached: self.prompt_tokens_cached.load(Relaxed),
            generation_tokens: self.generation_tokens.load(Relaxed),
            steps: self.steps.load(Relaxed),
            failed_steps: self.failed_steps.load(Relaxed),
            computed_tokens: self.computed_tokens.load(Relaxed),
            context_tokens: self.context_tokens.load(Relaxed),
            attended_tokens: self.attended_tokens.load(Relaxed),
            corrupted_requests: self.corrupted_requests.load(Relaxed),
            in_system: self.in_system.load(Relaxed),
            silent_for: Duration::from_micros(silent_us),
            alive: self.alive.load(Relaxed),
            draining: self.draining.load(Relaxed),
        }
    }
}
