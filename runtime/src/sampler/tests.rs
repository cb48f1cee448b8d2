#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "small numbers"
)]

use std::{collections::HashMap, sync::Arc};

use proptest::prelude::*;

use super::{SampleError, Sampler, philox4x32, uniform};
use crate::{
    engine::request::{GeneratedToken, SamplingParams, SeqId, TokenId},
    model_runner::{SampleRow, Slot, SlotInit},
};

fn init(params: SamplingParams, prompt: &[TokenId], output: &[TokenId]) -> SlotInit {
    SlotInit {
        slot: Slot(0),
        seq: SeqId(1),
        params: Arc::new(params),
        choice_index: 0,
        prompt: prompt.into(),
        output: output.to_vec(),
    }
}

fn row(position: u32) -> SampleRow {
    SampleRow {
        slot: Slot(0),
        seq: SeqId(1),
        epoch: 0,
        logit_index: 0,
        position,
        num_generated: 0,
        mask: None,
    }
}

fn greedy() -> SamplingParams {
    SamplingParams {
        temperature: 0.0,
        ..SamplingParams::default()
    }
}

fn seeded(seed: u64) -> SamplingParams {
    SamplingParams {
        seed: Some(seed),
        ..SamplingParams::default()
    }
}

fn sample_with(
    params: SamplingParams,
    logits: &[f32],
    row: &SampleRow,
) -> Result<GeneratedToken, SampleError> {
    let sampler = Sampler::new(logits.len() as u32, 1, vec![0]);
    sampler.init_slot(&init(params, &[1], &[]));
    sampler.sample(row, &mut logits.to_vec())
}

/// Logits without order or ties, in (-4, 4).
fn ragged(len: usize) -> Vec<f32> {
    (0..len)
        .map(|i| (uniform(7, 0, i as u32) * 8.0 - 4.0) as f32)
        .collect()
}

/// The distribution by its definition: f64, sorted, no shortcut.
fn reference_distribution(logits: &[f32], params: &SamplingParams) -> HashMap<TokenId, f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut tokens: Vec<(f64, TokenId)> = logits
        .iter()
        .enumerate()
        .map(|(id, &l)| {
            let p = (f64::from(l - max) / f64::from(params.temperature)).exp();
            (p, id as TokenId)
        })
        .filter(|&(p, _)| p > 0.0 && p >= f64::from(params.min_p))
        .collect();
    tokens.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    if params.top_k > 0 {
        tokens.truncate(params.top_k as usize);
    }
    let total: f64 = tokens.iter().map(|t| t.0).sum();
    let mut mass = 0.0;
    let mut kept = HashMap::new();
    for (p, id) in tokens {
        kept.insert(id, p);
        mass += p;
        if params.top_p < 1.0 && mass >= total * f64::from(params.top_p) {
            break;
        }
    }
    kept.values_mut().for_each(|p| *p /= mass);
    kept
}

#[test]
fn philox_gives_the_published_vectors() {
    assert_eq!(
        philox4x32([0; 4], [0; 2]),
        [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
    );
    assert_eq!(
        philox4x32([u32::MAX; 4], [u32::MAX; 2]),
        [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
    );
    assert_eq!(
        philox4x32(
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0]
        ),
        [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
    );
}

#[test]
fn seed_choice_and_position_each_change_the_draw() {
    let all = [
        uniform(1, 0, 0),
        uniform(2, 0, 0),
        uniform(1 << 40, 0, 0),
        uniform(1, 1, 0),
        uniform(1, 0, 1),
    ];
    for (i, a) in all.iter().enumerate() {
        assert!((0.0..1.0).contains(a));
        assert!(all[i + 1..].iter().all(|b| a != b));
    }
}

#[test]
fn exp_is_as_exact_as_it_says() {
    for i in 0..=870_000 {
        let x = -(i as f32) * 1e-4;
        let truth = f64::from(x).exp();
        let relative = (f64::from(super::math::exp(x)) - truth).abs() / truth;
        assert!(relative < 3e-7, "exp({x}) is off by {relative}");
    }
    assert_eq!(super::math::exp(0.0), 1.0);
    assert_eq!(super::math::exp(-88.0), 0.0);
    assert_eq!(super::math::exp(f32::NEG_INFINITY), 0.0);
}

#[test]
fn greedy_takes_the_lowest_of_equal_ids() {
    for len in [1, 2, 15, 16, 17, 255, 256, 257, 1000] {
        let mut logits = vec![-1.0; len];
        assert_eq!(sample_with(greedy(), &logits, &row(0)).unwrap().id, 0);
        for first in [0, len / 2, len - 1] {
            logits[first..].fill(3.0);
            let token = sample_with(greedy(), &logits, &row(0)).unwrap();
            assert_eq!(token.id, first as u32, "width {len}");
            logits.fill(-1.0);
        }
    }
}

#[test]
fn any_logit_that_is_not_finite_is_an_error() {
    for params in [greedy(), seeded(1)] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 13, 299] {
                let mut logits = ragged(300);
                logits[at] = bad;
                let error = sample_with(params.clone(), &logits, &row(0)).unwrap_err();
                assert_eq!(error, SampleError::NonFinite, "{bad} at {at}");
            }
        }
    }
}

#[test]
fn an_unbound_slot_is_an_error() {
    let sampler = Sampler::new(4, 1, vec![]);
    let error = sampler.sample(&row(0), &mut [0.0; 4]).unwrap_err();
    assert_eq!(error, SampleError::UnboundSlot);
}

#[test]
fn penalties_count_prompt_and_output() {
    let penalised = |params: SamplingParams, output: &[TokenId]| {
        let sampler = Sampler::new(4, 1, vec![]);
        sampler.init_slot(&init(
            SamplingParams {
                logprobs: Some(4),
                ..params
            },
            &[1, 1],
            output,
        ));
        let mut logits = [1.0, 2.0, -1.0, 0.5];
        sampler.sample(&row(0), &mut logits).unwrap();
        logits
    };
    let repetition = SamplingParams {
        repetition_penalty: 2.0,
        ..greedy()
    };
    assert_eq!(penalised(repetition, &[2]), [1.0, 1.0, -2.0, 0.5]);
    let presence = SamplingParams {
        presence_penalty: 0.25,
        ..greedy()
    };
    assert_eq!(penalised(presence, &[2, 2, 0]), [0.75, 2.0, -1.25, 0.5]);
    let frequency = SamplingParams {
        frequency_penalty: 0.25,
        ..greedy()
    };
    assert_eq!(penalised(frequency, &[2, 2, 0]), [0.75, 2.0, -1.5, 0.5]);
}

#[test]
fn penalties_count_what_the_slot_draws() {
    let sampler = Sampler::new(3, 1, vec![]);
    let params = SamplingParams {
        frequency_penalty: 1.0,
        ..greedy()
    };
    sampler.init_slot(&init(params, &[0], &[]));
    let draw = || sampler.sample(&row(0), &mut [3.0, 2.5, 0.0]).unwrap().id;
    // 3.0 | 2.0 2.5 | 2.0 1.5 | 1.0 1.5
    assert_eq!([draw(), draw(), draw(), draw()], [0, 1, 0, 1]);
}

#[test]
fn bias_moves_a_token_and_the_mask_has_the_last_word() {
    let params = SamplingParams {
        logit_bias: vec![(2, 10.0)],
        ..greedy()
    };
    let logits = [1.0, 2.0, 0.0];
    assert_eq!(sample_with(params.clone(), &logits, &row(0)).unwrap().id, 2);
    let masked = SampleRow {
        mask: Some(Arc::from([0b001])),
        ..row(0)
    };
    assert_eq!(sample_with(params.clone(), &logits, &masked).unwrap().id, 0);
    let nothing = SampleRow {
        mask: Some(Arc::from([0])),
        ..row(0)
    };
    for params in [params, seeded(3)] {
        let error = sample_with(params, &logits, &nothing).unwrap_err();
        assert_eq!(error, SampleError::NoCandidate);
    }
}

#[test]
fn min_tokens_forbids_eos_and_stop_ids() {
    let params = SamplingParams {
        min_tokens: 2,
        stop_token_ids: vec![1],
        ..greedy()
    };
    let logits = [9.0, 8.0, 1.0];
    let at = |num_generated| SampleRow {
        num_generated,
        ..row(0)
    };
    assert_eq!(sample_with(params.clone(), &logits, &at(1)).unwrap().id, 2);
    assert_eq!(sample_with(params.clone(), &logits, &at(2)).unwrap().id, 0);
    let no_eos = SamplingParams {
        ignore_eos: true,
        ..params
    };
    assert_eq!(sample_with(no_eos, &logits, &at(1)).unwrap().id, 0);
}

#[test]
fn logprobs_are_the_log_softmax_most_likely_first() {
    let logits = ragged(3000);
    let lse = logits.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    for count in [0usize, 1, 20] {
        let params = SamplingParams {
            logprobs: Some(count as u32),
            ..seeded(5)
        };
        let token = sample_with(params, &logits, &row(3)).unwrap();
        let logprobs = token.logprobs.unwrap();
        let expected = f64::from(logits[token.id as usize]) - lse;
        assert!((f64::from(logprobs.sampled) - expected).abs() < 1e-5);
        assert_eq!(logprobs.top.len(), count);
        for (&(id, logprob), &truth) in logprobs.top.iter().zip(&order) {
            assert_eq!(id as usize, truth);
            assert!((f64::from(logprob) - (f64::from(logits[truth]) - lse)).abs() < 1e-5);
        }
    }
}

#[test]
fn a_tiny_temperature_is_greedy() {
    let params = SamplingParams {
        temperature: 1e-38,
        ..seeded(1)
    };
    assert_eq!(sample_with(params, &[0.0, 0.1], &row(0)).unwrap().id, 1);
}

/// χ² of 40,000 draws against the definition, for every filter alone and together.
#[test]
fn draws_follow_the_definition() {
    let logits = ragged(600);
    let base = seeded(99);
    let cases = [
        base.clone(),
        SamplingParams {
            temperature: 0.4,
            ..base.clone()
        },
        SamplingParams {
            top_k: 7,
            ..base.clone()
        },
        SamplingParams {
            top_p: 0.3,
            ..base.clone()
        },
        SamplingParams {
            min_p: 0.4,
            ..base.clone()
        },
        SamplingParams {
            temperature: 1.7,
            top_k: 40,
            top_p: 0.8,
            min_p: 0.1,
            ..base
        },
    ];
    for params in cases {
        let truth = reference_distribution(&logits, &params);
        let sampler = Sampler::new(600, 1, vec![]);
        sampler.init_slot(&init(params.clone(), &[1], &[]));
        let draws = 40_000u32;
        let mut counts: HashMap<TokenId, u32> = HashMap::new();
        for position in 0..draws {
            let id = sampler
                .sample(&row(position), &mut logits.clone())
                .unwrap()
                .id;
            *counts.entry(id).or_default() += 1;
        }
        assert!(
            counts.keys().all(|id| truth.contains_key(id)),
            "a token outside the set was drawn: {params:?}"
        );
        // Cells with an expectation below 5 are one cell.
        let (mut chi2, mut cells, mut rest) = (0.0, 0, (0.0, 0.0));
        for (id, p) in &truth {
            let (expected, seen) = (p * f64::from(draws), counts.get(id).copied().unwrap_or(0));
            if expected < 5.0 {
                rest = (rest.0 + expected, rest.1 + f64::from(seen));
            } else {
                chi2 += (f64::from(seen) - expected).powi(2) / expected;
                cells += 1;
            }
        }
        if rest.0 > 0.0 {
            chi2 += (rest.1 - rest.0).powi(2) / rest.0;
            cells += 1;
        }
        // Mean k, variance 2k: 4 standard deviations. The seed is fixed, so this cannot flake.
        let k = f64::from(cells - 1);
        assert!(
            chi2 < k + 4.0 * (2.0 * k).sqrt(),
            "χ² {chi2} for {k}: {params:?}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn every_draw_is_in_the_set_and_repeats(
        logits in prop::collection::vec(-8f32..8.0, 1..900),
        temperature in 0.05f32..3.0,
        top_k in 0u32..60,
        top_p in 0.01f32..=1.0,
        min_p in 0f32..0.5,
        seed in any::<u64>(),
        position in 0u32..10_000,
    ) {
        let params = SamplingParams { temperature, top_k, top_p, min_p, seed: Some(seed), ..seeded(0) };
        let token = sample_with(params.clone(), &logits, &row(position)).unwrap();
        prop_assert_eq!(&token, &sample_with(params.clone(), &logits, &row(position)).unwrap());
        // The edge of a set may fall either way by rounding: widen it a little.
        let wide = SamplingParams {
            top_p: (top_p * 1.0001).min(1.0),
            min_p: min_p * 0.999,
            top_k,
            ..params
        };
        prop_assert!(reference_distribution(&logits, &wide).contains_key(&token.id));
    }

    #[test]
    fn argmax_is_the_first_maximum(logits in prop::collection::vec(-3i8..3, 1..700)) {
        let logits: Vec<f32> = logits.into_iter().map(f32::from).collect();
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let first = logits.iter().position(|&l| l == max).unwrap();
        prop_assert_eq!(sample_with(greedy(), &logits, &row(0)).unwrap().id as usize, first);
    }
}
