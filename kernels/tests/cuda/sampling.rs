//! Draws: exact sets, frequencies, penalties, masks, log-probabilities.

use ashlar_kernels::cuda::{
    DeviceBuffer,
    sampling::{
        MAX_LOGPROBS, NO_TOKEN_FORBIDDEN, NO_TOKEN_NON_FINITE, Sample, SampleRow, init_counts,
    },
};

use crate::support::*;

struct Draws {
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    ids: Vec<u32>,
    last: Vec<u32>,
}

/// Draws for `rows` from copies of `logits`: every row has its own.
fn draw(logits: &[f32], rows: &[SampleRow], extra: &[u32], counts: Option<&DeviceBuffer>) -> Draws {
    let vocab = logits.len();
    let all: Vec<f32> = (0..rows.len()).flat_map(|_| logits.to_vec()).collect();
    let rows: Vec<SampleRow> = rows
        .iter()
        .enumerate()
        .map(|(i, row)| SampleRow {
            logit_row: i as u32,
            ..*row
        })
        .collect();
    let bytes: Vec<u8> = rows.iter().flat_map(SampleRow::to_bytes).collect();
    let count = rows.len();
    let (tokens, last) = (poisoned(count * 4), poisoned(64 * 4));
    let (logprobs, ids) = (
        poisoned(count * (MAX_LOGPROBS + 1) * 4),
        poisoned(count * MAX_LOGPROBS * 4),
    );
    Sample {
        logits: upload_f32(&all).view(),
        rows: upload_bytes(&bytes).view(),
        extra: upload_u32(if extra.is_empty() { &[0] } else { extra }).view(),
        counts: counts.map(DeviceBuffer::view),
        last_tokens: last.view(),
        tokens: tokens.view(),
        logprobs: logprobs.view(),
        logprob_ids: ids.view(),
        count,
        vocab,
    }
    .launch(device())
    .unwrap();
    Draws {
        tokens: download_u32(&tokens, count),
        logprobs: download_f32(&logprobs, count * (MAX_LOGPROBS + 1)),
        ids: download_u32(&ids, count * MAX_LOGPROBS),
        last: download_u32(&last, 64),
    }
}

fn row() -> SampleRow {
    SampleRow {
        temperature: 1.0,
        top_p: 1.0,
        repetition: 1.0,
        mask: -1,
        seed: 7,
        ..SampleRow::default()
    }
}

fn rows(count: usize, base: SampleRow) -> Vec<SampleRow> {
    (0..count)
        .map(|i| SampleRow {
            position: i as u32,
            slot: (i % 64) as u32,
            ..base
        })
        .collect()
}

fn logits(vocab: usize, spread: f32) -> Vec<f32> {
    let mut random = Random(vocab as u64);
    (0..vocab).map(|_| random.unit() * spread).collect()
}

#[test]
fn greedy_takes_the_lowest_id_of_the_largest() {
    for vocab in [1, 31, 1000, 49_152, 128_256] {
        let mut values = logits(vocab, 5.0);
        let (a, b) = (vocab / 3, vocab - 1);
        values[a] = 9.0;
        values[b] = 9.0;
        let draws = draw(
            &values,
            &rows(
                3,
                SampleRow {
                    temperature: 0.0,
                    ..row()
                },
            ),
            &[],
            None,
        );
        assert_eq!(draws.tokens, vec![a.min(b) as u32; 3]);
        assert_eq!(draws.last[..3], draws.tokens[..]);
    }
}

/// Chi-square against the exact distribution, over draws at different positions.
fn assert_distributed(values: &[f32], base: SampleRow, allowed: impl Fn(&[(usize, f64)]) -> usize) {
    assert_distributed_over((20_000, 0), values, base, allowed);
}

/// So many draws, of which some may be of so many tokens more than are allowed: the border of a flat nucleus is a matter of
/// rounding.
fn assert_distributed_over(
    (count, slack): (usize, usize),
    values: &[f32],
    base: SampleRow,
    allowed: impl Fn(&[(usize, f64)]) -> usize,
) {
    let draws = draw(values, &rows(count, base), &[], None);
    let max = values.iter().copied().fold(f32::MIN, f32::max);
    let weight = |v: f32| (f64::from(v - max) / f64::from(base.temperature)).exp();
    let mut order: Vec<(usize, f64)> = values.iter().map(|v| weight(*v)).enumerate().collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let allowed = allowed(&order);
    let kept = &order[..allowed];
    let total: f64 = kept.iter().map(|(_, w)| w).sum();
    let mut seen = vec![0u32; values.len()];
    for token in &draws.tokens {
        seen[*token as usize] += 1;
    }
    let ids = order.iter().take(allowed + slack).map(|(id, _)| *id);
    let set: std::collections::HashSet<usize> = ids.collect();
    for (id, n) in seen.iter().enumerate() {
        assert!(*n == 0 || set.contains(&id), "{id} is not in the set");
    }
    let (mut chi, mut cells) = (0.0, 0.0);
    for (id, w) in kept {
        let expected = w / total * count as f64;
        if expected >= 5.0 {
            chi += (f64::from(seen[*id]) - expected).powi(2) / expected;
            cells += 1.0;
        }
    }
    // Mean `cells`, deviation √(2·cells): 5 deviations.
    assert!(
        chi < cells + 5.0 * f64::sqrt(2.0 * cells) + 5.0,
        "χ² {chi:.1} over {cells} cells"
    );
}

/// How many of the best tokens make up `top_p` of all weight.
fn nucleus(top_p: f64) -> impl Fn(&[(usize, f64)]) -> usize {
    move |order| {
        let total: f64 = order.iter().map(|(_, w)| w).sum();
        let mut mass = 0.0;
        order
            .iter()
            .take_while(|(_, w)| {
                let below = mass < top_p * total;
                mass += w;
                below
            })
            .count()
    }
}

/// How many of the best tokens, with their weights, may be drawn.
type Allowed<'a> = &'a dyn Fn(&[(usize, f64)]) -> usize;

/// Rows of a real vocabulary: what is kept is a short list, or nearly everything; widths that are no multiple of four.
#[test]
fn draws_from_large_vocabularies() {
    for (vocab, spread) in [(50_000, 40.0), (49_153, 40.0), (50_000, 0.5)] {
        let values = logits(vocab, spread);
        let slack = usize::from(spread < 1.0);
        let draws = |row: SampleRow, slack: usize, allowed: Allowed<'_>| {
            assert_distributed_over((800, slack), &values, row, allowed);
        };
        draws(row(), 0, &<[_]>::len);
        let top_p = SampleRow {
            top_p: 0.9,
            ..row()
        };
        draws(top_p, slack, &nucleus(0.9));
        for top_k in [1, 50, 600, 1024, 5000] {
            draws(SampleRow { top_k, ..row() }, 0, &|_| top_k as usize);
            draws(SampleRow { top_k, ..top_p }, slack, &|order| {
                nucleus(0.9)(&order[..top_k as usize])
            });
        }
        let min_p = SampleRow {
            min_p: 0.5,
            top_p: 0.8,
            ..row()
        };
        draws(min_p, slack, &|order| {
            let candidates = order.iter().filter(|(_, w)| *w >= 0.5).count();
            nucleus(0.8)(&order[..candidates])
        });
    }
}

#[test]
fn draws_follow_the_distribution() {
    let values = logits(300, 3.0);
    assert_distributed(&values, row(), <[_]>::len);
    assert_distributed(
        &values,
        SampleRow {
            temperature: 0.6,
            ..row()
        },
        <[_]>::len,
    );
    assert_distributed(&values, SampleRow { top_k: 17, ..row() }, |_| 17);
    assert_distributed(
        &values,
        SampleRow {
            top_p: 0.7,
            ..row()
        },
        nucleus(0.7),
    );
    assert_distributed(
        &values,
        SampleRow {
            min_p: 0.3,
            ..row()
        },
        |order| order.iter().filter(|(_, w)| *w >= 0.3).count(),
    );
    let both = SampleRow {
        top_k: 40,
        top_p: 0.5,
        ..row()
    };
    assert_distributed(&values, both, |order| nucleus(0.5)(&order[..40]));
}

#[test]
fn ties_at_the_threshold_go_to_the_lowest_ids() {
    let mut values = vec![0.0; 5000];
    values[4000] = 2.0;
    let draws = draw(
        &values,
        &rows(3000, SampleRow { top_k: 4, ..row() }),
        &[],
        None,
    );
    let mut seen: Vec<u32> = draws.tokens;
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen, [0, 1, 2, 4000]);
}

#[test]
fn same_seed_and_position_same_token_whatever_the_company() {
    let values = logits(49_152, 4.0);
    let base = SampleRow {
        top_p: 0.95,
        position: 11,
        ..row()
    };
    let alone = draw(&values, &[base], &[], None).tokens[0];
    let mut company = rows(40, SampleRow { seed: 1, ..row() });
    company[23] = base;
    assert_eq!(draw(&values, &company, &[], None).tokens[23], alone);
}

#[test]
fn masks_bias_and_forbidden_tokens() {
    let values = logits(1000, 2.0);
    // Allow 100, 200 and 300 only; 100 is forbidden besides; 300 gets a bias.
    let mut extra = vec![0u32; 32];
    for token in [100, 200, 300] {
        extra[token / 32] |= 1 << (token % 32);
    }
    extra.extend([100, 300, 50f32.to_bits()]);
    let base = SampleRow {
        mask: 0,
        forbidden: 32,
        num_forbidden: 1,
        ..row()
    };
    let mut seen = draw(&values, &rows(500, base), &extra, None).tokens;
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen, [200, 300]);
    let biased = SampleRow {
        bias: 33,
        num_bias: 1,
        temperature: 0.0,
        ..base
    };
    assert_eq!(draw(&values, &[biased], &extra, None).tokens, [300]);
    let nothing = vec![0u32; 32];
    assert_eq!(
        draw(&values, &[SampleRow { mask: 0, ..row() }], &nothing, None).tokens,
        [NO_TOKEN_FORBIDDEN]
    );
}

#[test]
fn broken_logits_have_no_token() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = logits(777, 1.0);
        values[500] = bad;
        assert_eq!(
            draw(&values, &[row()], &[], None).tokens,
            [NO_TOKEN_NON_FINITE]
        );
    }
}

#[test]
fn penalties_count_prompt_and_output() {
    let vocab = 64;
    let mut values = vec![0.0f32; vocab];
    (values[3], values[5], values[9]) = (4.0, 3.9, 3.0);
    let counts = poisoned(2 * vocab * 2);
    // Slot 1: 3 in the prompt, 5 twice in the output.
    init_counts(
        device(),
        counts.view(),
        1,
        vocab,
        upload_u32(&[3, 5, 5]).view(),
        (1, 2),
    )
    .unwrap();
    let greedy = SampleRow {
        temperature: 0.0,
        slot: 1,
        has_counts: 1,
        ..row()
    };
    let first = |row: SampleRow| draw(&values, &[row], &[], Some(&counts)).tokens[0];
    assert_eq!(first(greedy), 3);
    // The draw above counted 3 once: presence lowers 3 and 5, not 9.
    assert_eq!(
        first(SampleRow {
            presence: 2.0,
            ..greedy
        }),
        9
    );
    // Now 9 came once, 3 once, 5 twice.
    assert_eq!(
        first(SampleRow {
            frequency: 0.05,
            ..greedy
        }),
        3
    );
    init_counts(
        device(),
        counts.view(),
        1,
        vocab,
        upload_u32(&[3]).view(),
        (1, 0),
    )
    .unwrap();
    assert_eq!(
        first(SampleRow {
            repetition: 1.1,
            ..greedy
        }),
        5
    );
}

#[test]
fn logprobs_are_sorted_and_right() {
    for (vocab, spread) in [(50, 3.0), (49_152, 8.0)] {
        let values = logits(vocab, spread);
        let draws = draw(
            &values,
            &rows(
                2,
                SampleRow {
                    num_logprobs: 21,
                    temperature: 0.0,
                    ..row()
                },
            ),
            &[],
            None,
        );
        let total: f64 = values.iter().map(|v| f64::from(*v).exp()).sum();
        let logprob = |id: usize| (f64::from(values[id]) - total.ln()) as f32;
        let mut order: Vec<usize> = (0..vocab).collect();
        order.sort_by(|a, b| values[*b].total_cmp(&values[*a]).then(a.cmp(b)));
        for r in 0..2 {
            let ids = &draws.ids[r * MAX_LOGPROBS..][..20];
            let expected: Vec<u32> = order[..20].iter().map(|id| *id as u32).collect();
            assert_eq!(ids, expected);
            let found = &draws.logprobs[r * (MAX_LOGPROBS + 1)..][..21];
            assert!((found[0] - logprob(order[0])).abs() < 1e-4);
            for (i, id) in order[..20].iter().enumerate() {
                assert!(
                    (found[i + 1] - logprob(*id)).abs() < 1e-4,
                    "{} {}",
                    found[i + 1],
                    logprob(*id)
                );
            }
        }
    }
}
