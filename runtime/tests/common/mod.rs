//! What the tests on the default model share: where the model is, and a driver that runs sequences step by step
//! without an engine.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, missing_docs)] // Each test file uses its own part.

pub mod families;
pub mod golden;

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use ashlar::{
    engine::request::{SamplingParams, SeqId, TokenId},
    kv_cache::BlockId,
    model_runner::{
        CpuRunner, CpuRunnerConfig, Dtype, KvCacheSize, ModelInput, ModelRunner, SampleInput,
        SampleRow, SeqInput, Slot, SlotInit,
    },
};

/// The default model's file.
pub fn model_path() -> PathBuf {
    let path = std::env::var_os("ASHLAR_TEST_MODEL").map(PathBuf::from);
    let path = path.expect(
        "this test runs the default model: set ASHLAR_TEST_MODEL to the path that `e2e/cluster/model.sh` prints \
         (`make test` does that by itself)",
    );
    assert!(
        path.is_file(),
        "ASHLAR_TEST_MODEL is {}, which is not a file",
        path.display()
    );
    path
}

/// Blocks of the driver's pool.
const NUM_BLOCKS: u32 = 1024;
/// Largest step.
pub const MAX_BATCHED_TOKENS: u32 = 4096;

/// A runner on the default model.
pub fn runner(dtype: Dtype) -> CpuRunner {
    let config = CpuRunnerConfig {
        path: model_path(),
        dtype,
        kv_cache: KvCacheSize::Blocks(NUM_BLOCKS),
        max_num_seqs: 32,
        max_num_batched_tokens: MAX_BATCHED_TOKENS,
        max_model_len: Some(4096),
        ..CpuRunnerConfig::default()
    };
    CpuRunner::new(&config).expect("the default model loads")
}

/// Part of a step: these tokens of this sequence, logits wanted for the last ones.
pub struct Item<'a> {
    /// The sequence; its slot is the number.
    pub slot: u32,
    /// Tokens to run, right after those that ran before.
    pub tokens: &'a [TokenId],
    /// Of how many of the last ones the logits are returned.
    pub logits: usize,
}

/// Runs sequences on a runner with greedy sampling; blocks are handed out as sequences grow, in no tidy order.
pub struct Driver<R = CpuRunner> {
    pub runner: R,
    /// Whether steps hand back logits; without, each item has none.
    pub return_logits: bool,
    tables: HashMap<u32, Vec<BlockId>>,
    lengths: HashMap<u32, u32>,
    /// Sequences whose slot is bound.
    started: HashSet<u32>,
    /// How many of a sequence's first blocks are another's.
    shared: HashMap<u32, usize>,
    free: Vec<BlockId>,
}

impl<R: ModelRunner> Driver<R> {
    pub fn new(runner: R) -> Self {
        let blocks = runner.limits().num_blocks.min(NUM_BLOCKS);
        let mut free: Vec<BlockId> = (1..blocks).map(BlockId).collect();
        // A fixed shuffle: neighbours in a sequence are not neighbours in the pool.
        free.sort_by_key(|block| block.0.wrapping_mul(2_654_435_761));
        Self {
            runner,
            return_logits: true,
            tables: HashMap::new(),
            lengths: HashMap::new(),
            started: HashSet::new(),
            shared: HashMap::new(),
            free,
        }
    }

    /// Forgets a sequence and frees its blocks.
    pub fn finish(&mut self, slot: u32) {
        let table = self.tables.remove(&slot).unwrap_or_default();
        let shared = self.shared.remove(&slot).unwrap_or(0);
        self.free.extend(table.into_iter().skip(shared));
        self.lengths.remove(&slot);
        self.started.remove(&slot);
    }

    /// Begins a sequence with the first tokens of another, whole blocks of them, as the prefix cache does. The other one must be
    /// finished after it.
    pub fn share(&mut self, from: u32, to: u32, tokens: u32) {
        let block_size = self.runner.limits().block_size;
        assert!(tokens.is_multiple_of(block_size) && tokens <= self.lengths[&from]);
        let blocks = (tokens / block_size) as usize;
        let table = self.tables[&from][..blocks].to_vec();
        self.tables.insert(to, table);
        self.lengths.insert(to, tokens);
        self.shared.insert(to, blocks);
    }

    /// One step. Returns each item's wanted logits, one row after another, and its next greedy token (if it wanted
    /// logits).
    pub fn step(&mut self, items: &[Item<'_>]) -> Vec<(Vec<f32>, Option<TokenId>)> {
        let mut input = ModelInput::default();
        let mut sample = SampleInput {
            return_logits: self.return_logits,
            ..SampleInput::default()
        };
        for item in items {
            self.add(item, &mut input, &mut sample);
        }
        let step = self.runner.submit(&input).unwrap();
        self.runner.sample(step, &sample).unwrap();
        let output = self
            .runner
            .poll(step, Duration::from_secs(60))
            .unwrap()
            .unwrap();
        let vocab = self.runner.limits().vocab_size as usize;
        let (mut logits, mut rows) = (output.logits.as_slice(), output.rows.iter());
        let results = items.iter().map(|item| {
            let wanted = if self.return_logits { item.logits } else { 0 };
            let (mine, rest) = logits.split_at(wanted * vocab);
            logits = rest;
            let token = (item.logits > 0).then(|| rows.next().unwrap().tokens[0].id);
            (mine.to_vec(), token)
        });
        results.collect()
    }

    fn add(&mut self, item: &Item<'_>, input: &mut ModelInput, sample: &mut SampleInput) {
        let block_size = self.runner.limits().block_size;
        let start = self.lengths.get(&item.slot).copied().unwrap_or(0);
        let end = start + item.tokens.len() as u32;
        let table = self.tables.entry(item.slot).or_default();
        while (table.len() as u32) * block_size < end {
            table.push(self.free.pop().expect("the test fits its pool"));
        }
        if self.started.insert(item.slot) {
            input.init_slots.push(SlotInit {
                slot: Slot(item.slot),
                seq: SeqId(u64::from(item.slot)),
                params: Arc::new(SamplingParams {
                    temperature: 0.0,
                    seed: Some(0),
                    ..SamplingParams::default()
                }),
                choice_index: 0,
                prompt: Arc::from(item.tokens),
                output: Vec::new(),
            });
        }
        let query_start = input.token_ids.len() as u32;
        input.token_ids.extend_from_slice(item.tokens);
        for position in start..end {
            let block = table[(position / block_size) as usize].0;
            input.positions.push(position);
            input
                .slot_mapping
                .push(i64::from(block * block_size + position % block_size));
        }
        input.seqs.push(SeqInput {
            slot: Slot(item.slot),
            query_start,
            query_len: item.tokens.len() as u32,
            context_len: end,
            block_table: table.clone(),
        });
        let rows = input.token_ids.len() as u32;
        input.logit_rows.extend(rows - item.logits as u32..rows);
        if item.logits > 0 {
            sample.rows.push(SampleRow {
                slot: Slot(item.slot),
                seq: SeqId(u64::from(item.slot)),
                epoch: 0,
                logit_index: input.logit_rows.len() as u32 - 1,
                position: end,
                num_generated: 0,
                mask: None,
            });
        }
        self.lengths.insert(item.slot, end);
    }
}

/// `1 − cosine` of two vectors, in f64.
pub fn cosine_distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let (mut ab, mut aa, mut bb) = (0f64, 0f64, 0f64);
    for (a, b) in a.iter().zip(b) {
        let (a, b) = (f64::from(*a), f64::from(*b));
        ab += a * b;
        aa += a * a;
        bb += b * b;
    }
    1.0 - ab / (aa.sqrt() * bb.sqrt())
}
