//! The scheduler without a runner: budget, progress, conservation, for any load.

use std::collections::{HashMap, HashSet, VecDeque};

use proptest::prelude::*;

use crate::{
    engine::{
        EngineConfig, KvReservation, Sequence,
        request::{FinishReason, Request, SamplingParams, SeqId},
        scheduler::{Scheduler, SchedulerOutput, blocks_for_request},
    },
    model_runner::RunnerLimits,
};

const BLOCK_SIZE: u32 = 4;

#[derive(Debug, Clone)]
struct Load {
    num_blocks: u32,
    max_num_seqs: u32,
    max_num_batched_tokens: u32,
    /// Rows of logits in a step beyond one for each sequence.
    more_logit_rows: u32,
    threshold: u32,
    depth: usize,
    prefix_caching: bool,
    /// (prompt, max_tokens, step in which the client leaves)
    requests: Vec<(Vec<u32>, u32, Option<u64>)>,
    /// Steps that fail.
    failures: HashSet<u64>,
}

fn load() -> impl Strategy<Value = Load> {
    let request = (
        prop::collection::vec(0u32..2, 1..40),
        1u32..20,
        prop::option::weighted(0.2, 1u64..60),
    );
    (
        2u32..40,
        1u32..8,
        8u32..40,
        0u32..6,
        prop_oneof![Just(0u32), 1u32..9],
        1usize..3,
        any::<bool>(),
        prop::collection::vec(request, 1..16),
        prop::collection::hash_set(1u64..80, 0..4),
    )
        .prop_map(
            |(
                num_blocks,
                max_num_seqs,
                max_num_batched_tokens,
                more_logit_rows,
                threshold,
                depth,
                prefix_caching,
                requests,
                failures,
            )| Load {
                num_blocks,
                max_num_seqs,
                max_num_batched_tokens,
                more_logit_rows,
                threshold,
                depth,
                prefix_caching,
                requests,
                failures,
            },
        )
}

fn limits(load: &Load) -> RunnerLimits {
    RunnerLimits {
        block_size: BLOCK_SIZE,
        num_blocks: load.num_blocks,
        max_num_seqs: load.max_num_seqs,
        max_num_batched_tokens: load.max_num_batched_tokens,
        max_logit_rows: load.max_num_seqs + load.more_logit_rows,
        max_model_len: 64,
        vocab_size: 16,
        kv_bytes_per_token: 1,
    }
}

fn config(load: &Load) -> EngineConfig {
    EngineConfig {
        max_num_seqs: load.max_num_seqs,
        max_num_batched_tokens: load.max_num_batched_tokens,
        long_prefill_token_threshold: load.threshold,
        enable_prefix_caching: load.prefix_caching,
        ..EngineConfig::default()
    }
}

fn to_request((prompt, max_tokens, _): &(Vec<u32>, u32, Option<u64>)) -> Request {
    Request::new(
        prompt.as_slice(),
        SamplingParams {
            max_tokens: *max_tokens,
            ..SamplingParams::default()
        },
    )
}

/// Drives a scheduler to the end of a load, checking every step.
struct Drive<'a> {
    load: &'a Load,
    scheduler: Scheduler,
    in_flight: VecDeque<SchedulerOutput>,
    /// Generated tokens of the sequences that ended by themselves.
    ended: HashMap<SeqId, u32>,
    failed: HashSet<SeqId>,
    left: HashSet<SeqId>,
}

impl Drive<'_> {
    fn check_plan(&self, plan: &SchedulerOutput) {
        let total: u32 = plan.items.iter().map(|item| item.num_tokens).sum();
        assert_eq!(total, plan.num_tokens);
        assert!(total <= self.load.max_num_batched_tokens, "over budget");
        let logits = plan.items.iter().map(|item| match item.prompt_logits {
            true => item.num_tokens,
            false => item.samples.into(),
        });
        let most = limits(self.load).max_logit_rows;
        assert!(logits.sum::<u32>() <= most, "too many rows of logits");
        assert!(plan.items.len() <= self.load.max_num_seqs as usize);
        let distinct: HashSet<_> = plan.items.iter().map(|item| item.slot).collect();
        assert_eq!(distinct.len(), plan.items.len(), "a slot twice in a step");
        for item in &plan.items {
            assert!(item.num_tokens > 0);
            let seq = self.scheduler.sequence(item.seq).unwrap();
            let end = item.start + item.num_tokens;
            assert!(seq.table.len() as u32 >= end.div_ceil(BLOCK_SIZE));
            assert!(end < seq.num_prompt() + seq.params.max_tokens);
            // Rows of steps in flight and of this one never share a block that either writes, but for a sequence's own.
            for other in self.in_flight.iter().flat_map(|plan| &plan.items) {
                assert!(
                    other.slot != item.slot || other.seq == item.seq,
                    "a slot was reused while a step names it"
                );
            }
        }
        self.scheduler.check_integrity().unwrap();
    }

    /// A sequence that decodes is in every step, unless it was preempted or waits for blocks on their way back.
    fn check_decodes_progress(&mut self) -> SchedulerOutput {
        let ready = self.scheduler.decoding_for_test();
        let plan = self.scheduler.schedule();
        if plan.preempted.is_empty() && self.in_flight.is_empty() {
            for id in ready {
                assert!(
                    plan.items.iter().any(|item| item.seq == id),
                    "a decode was starved"
                );
            }
        }
        plan
    }

    fn finish_front(&mut self) {
        let plan = self.in_flight.pop_front().unwrap();
        if self.load.failures.contains(&plan.step) {
            let gone = self.scheduler.withdraw(&plan, self.in_flight.iter());
            self.failed.extend(gone.iter().map(|seq| seq.id));
        } else {
            for item in plan.items.iter().filter(|item| item.samples) {
                let token = item.num_generated % 2;
                if let Some((_, Some(seq))) = self.scheduler.update(item, &[token]) {
                    let before = self.ended.insert(seq.id, seq.num_generated());
                    assert!(before.is_none(), "ended twice");
                }
            }
        }
        self.scheduler.complete(plan.step);
        self.scheduler.check_integrity().unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_sequence_ends_within_a_bound_and_nothing_leaks(load in load()) {
        let limits = limits(&load);
        let config = config(&load);
        let fits = |request: &Request| {
            blocks_for_request(request, &limits, KvReservation::Paged) < load.num_blocks
        };
        let requests: Vec<_> = load.requests.iter().filter(|r| fits(&to_request(r))).cloned().collect();
        let mut drive = Drive {
            load: &load,
            scheduler: Scheduler::new(&config, &limits),
            in_flight: VecDeque::new(),
            ended: HashMap::new(),
            failed: HashSet::new(),
            left: HashSet::new(),
        };
        for (index, request) in requests.iter().enumerate() {
            let id = SeqId(index as u64);
            let mut request = to_request(request);
            // Some ask for the log-probabilities of their prompt.
            request.prompt_logprobs = request.params.max_tokens.is_multiple_of(3).then_some(1);
            drive.scheduler.add(Sequence::new(id, request, &config, BLOCK_SIZE));
        }
        // The first of the running sequences advances by a token in each step, or by the time in-flight steps are done.
        let bound: u64 = requests
            .iter()
            .map(|(prompt, max_tokens, _)| 2 * (prompt.len() as u64 + 2 * u64::from(*max_tokens)) + 8)
            .sum::<u64>() * (1 + load.failures.len() as u64);
        let mut steps = 0;
        while !drive.scheduler.is_idle() || !drive.in_flight.is_empty() {
            steps += 1;
            prop_assert!(steps <= bound, "no end in sight after {} steps", steps);
            for (index, (.., leaves)) in requests.iter().enumerate() {
                if *leaves == Some(steps) && drive.scheduler.remove(SeqId(index as u64)).is_some() {
                    drive.left.insert(SeqId(index as u64));
                }
            }
            while drive.in_flight.len() < load.depth {
                let plan = drive.check_decodes_progress();
                if plan.items.is_empty() {
                    break;
                }
                drive.check_plan(&plan);
                drive.in_flight.push_back(plan);
            }
            if !drive.in_flight.is_empty() {
                drive.finish_front();
            }
        }
        prop_assert_eq!(drive.scheduler.blocks().num_free(), load.num_blocks - 1);
        for (index, (_, max_tokens, _)) in requests.iter().enumerate() {
            let id = SeqId(index as u64);
            let ended = drive.ended.get(&id);
            let ways = u32::from(ended.is_some())
                + u32::from(drive.failed.contains(&id))
                + u32::from(drive.left.contains(&id));
            prop_assert_eq!(ways, 1, "every sequence ends in exactly one way");
            prop_assert!(ended.is_none_or(|generated| generated == max_tokens));
        }
    }
}

fn plain(num_blocks: u32) -> Load {
    Load {
        num_blocks,
        max_num_seqs: 8,
        max_num_batched_tokens: 16,
        more_logit_rows: 0,
        threshold: 0,
        depth: 1,
        prefix_caching: true,
        requests: Vec::new(),
        failures: HashSet::new(),
    }
}

fn scheduler_with(load: &Load, requests: &[(Vec<u32>, u32)]) -> Scheduler {
    let mut scheduler = Scheduler::new(&config(load), &limits(load));
    for (index, (prompt, max_tokens)) in requests.iter().enumerate() {
        let request = to_request(&(prompt.clone(), *max_tokens, None));
        let id = SeqId(index as u64);
        scheduler.add(Sequence::new(id, request, &config(load), BLOCK_SIZE));
    }
    scheduler
}

/// (sequence, rows) of each item.
fn shape(plan: &SchedulerOutput) -> Vec<(u64, u32)> {
    let items = plan.items.iter();
    items.map(|item| (item.seq.0, item.num_tokens)).collect()
}

fn step(scheduler: &mut Scheduler) -> SchedulerOutput {
    let plan = scheduler.schedule();
    for item in plan.items.iter().filter(|item| item.samples) {
        scheduler.update(item, &[7]);
    }
    scheduler.complete(plan.step);
    plan
}

#[test]
fn a_long_prefill_shares_each_step_with_decodes() {
    let prompts = [(vec![1; 3], 9), (vec![2; 40], 2), (vec![3; 5], 2)];
    let mut scheduler = scheduler_with(&plain(64), &prompts);
    assert_eq!(shape(&step(&mut scheduler)), [(0, 3), (1, 13)]);
    // The decode comes first, the chunk takes the rest, the third waits its turn.
    assert_eq!(shape(&step(&mut scheduler)), [(0, 1), (1, 15)]);
    assert_eq!(shape(&step(&mut scheduler)), [(0, 1), (1, 12), (2, 3)]);
    assert_eq!(shape(&step(&mut scheduler)), [(0, 1), (1, 1), (2, 2)]);
}

#[test]
fn with_many_running_a_step_with_decodes_takes_more_of_a_prompt() {
    let load = Load {
        max_num_seqs: 1000,
        max_num_batched_tokens: 8192,
        ..plain(20_000)
    };
    for (running, tokens) in [
        (2, 4096),
        (256, 4096),
        (257, 4112),
        (400, 6400),
        (600, 8192),
    ] {
        let mut prompts = vec![(vec![1], 9); running - 1];
        prompts.push((vec![2; 20_000], 1));
        let mut scheduler = scheduler_with(&load, &prompts);
        let rows = |plan: &SchedulerOutput| plan.items.iter().map(|item| item.num_tokens).sum();
        let (no_decode, with_decodes): (u32, u32) =
            (rows(&step(&mut scheduler)), rows(&step(&mut scheduler)));
        assert_eq!(
            (no_decode, with_decodes),
            (8192, tokens),
            "{running} running"
        );
    }
}

#[test]
fn the_threshold_cuts_long_prefills() {
    let load = Load {
        threshold: 4,
        ..plain(64)
    };
    let mut scheduler = scheduler_with(&load, &[(vec![1; 10], 1), (vec![2; 3], 1)]);
    assert_eq!(shape(&step(&mut scheduler)), [(0, 4), (1, 3)]);
    assert_eq!(shape(&step(&mut scheduler)), [(0, 4)]);
    assert_eq!(shape(&step(&mut scheduler)), [(0, 2)]);
}

#[test]
fn the_last_one_admitted_is_preempted_and_comes_back_first() {
    // 5 blocks: two prompts of 8 tokens take 4, and one is kept free.
    let prompts = [(vec![1; 8], 9), (vec![2; 8], 5), (vec![3; 4], 1)];
    let mut scheduler = scheduler_with(&plain(6), &prompts);
    assert_eq!(shape(&step(&mut scheduler)), [(0, 8), (1, 8)]);
    // Each wants a block for its ninth token; one gets it.
    let plan = step(&mut scheduler);
    assert_eq!(shape(&plan), [(0, 1)]);
    assert_eq!(plan.preempted, [SeqId(1)]);
    assert!(plan.admitted.is_empty(), "no admission after a preemption");
    assert_eq!(scheduler.first_waiting(), Some(SeqId(1)));
    let seq = scheduler.sequence(SeqId(1)).unwrap();
    assert_eq!(
        (seq.epoch, seq.num_computed, seq.num_preemptions),
        (1, 0, 1)
    );
    assert_eq!(scheduler.counters().preemptions, 1);
    scheduler.check_integrity().unwrap();
}

#[test]
fn equal_prompts_of_one_step_share_blocks() {
    let prompt: Vec<u32> = (0..9).collect();
    let mut scheduler = scheduler_with(&plain(64), &[(prompt.clone(), 1), (prompt, 1)]);
    let plan = scheduler.schedule();
    assert_eq!(shape(&plan), [(0, 9), (1, 1)]);
    let table = |seq| scheduler.sequence(SeqId(seq)).unwrap().table.blocks();
    assert_eq!(table(0)[..2], table(1)[..2]);
    assert_ne!(table(0)[2], table(1)[2]);
    assert_eq!(scheduler.counters().prefix_hits, 8);
    assert_eq!(scheduler.counters().prefix_queries, 18);
}

#[test]
fn a_failed_step_takes_its_blocks_back_from_the_cache_and_from_later_steps() {
    let prompt: Vec<u32> = (0..9).collect();
    let mut scheduler = scheduler_with(&plain(64), &[(prompt.clone(), 3)]);
    let first = scheduler.schedule();
    let later = Sequence::new(
        SeqId(1),
        to_request(&(prompt, 3, None)),
        &config(&plain(64)),
        4,
    );
    scheduler.add(later);
    let second = scheduler.schedule();
    assert_eq!(shape(&second), [(0, 1), (1, 1)]);
    let gone = scheduler.withdraw(&first, std::iter::once(&second));
    assert_eq!(
        gone.iter().map(|seq| seq.id).collect::<Vec<_>>(),
        [SeqId(0)]
    );
    scheduler.complete(first.step);
    // What the second step drew on the lost blocks is stale, and its own blocks stay held until it is done.
    assert!(
        second
            .items
            .iter()
            .all(|item| scheduler.update(item, &[7]).is_none())
    );
    assert!(scheduler.blocks().num_free() < 63);
    scheduler.complete(second.step);
    assert_eq!(scheduler.blocks().num_free(), 63);
    assert_eq!(shape(&step(&mut scheduler)), [(1, 9)]);
    scheduler.check_integrity().unwrap();
}

#[test]
fn contiguous_reservation_takes_the_models_length_at_admission() {
    let load = plain(49);
    let config = EngineConfig {
        reservation: KvReservation::Contiguous,
        ..config(&load)
    };
    let mut scheduler = Scheduler::new(&config, &limits(&load));
    for id in 0..5 {
        let request = to_request(&(vec![1; 2], 2, None));
        scheduler.add(Sequence::new(SeqId(id), request, &config, BLOCK_SIZE));
    }
    // 64 tokens are 16 blocks; 48 blocks hold three sequences, however short.
    assert_eq!(scheduler.schedule().items.len(), 3);
    assert_eq!((scheduler.num_running(), scheduler.num_waiting()), (3, 2));
}

#[test]
fn a_stop_id_ends_a_sequence_once_min_tokens_are_there() {
    let load = plain(64);
    let config = EngineConfig {
        eos_token_ids: vec![7],
        ..config(&load)
    };
    let mut scheduler = Scheduler::new(&config, &limits(&load));
    let mut request = to_request(&(vec![1; 2], 9, None));
    request.params.min_tokens = 2;
    scheduler.add(Sequence::new(SeqId(0), request, &config, BLOCK_SIZE));
    for expected in [None, None, Some((FinishReason::Stop, Some(7)))] {
        let plan = scheduler.schedule();
        let (accepted, _) = scheduler.update(&plan.items[0], &[7]).unwrap();
        assert_eq!(accepted.finish, expected);
        scheduler.complete(plan.step);
    }
    assert!(scheduler.is_idle());
}
