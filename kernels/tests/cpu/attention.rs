//! Attention over paged caches, and what is written into them.

use ashlar_kernels::{
    cpu::{
        AttentionArgs, AttentionSeq, Isa, KvDtype, KvLayout, LayerCache, ThreadPool,
        attention::paged_attention_with,
    },
    reference,
};

use crate::support::values;

struct Case {
    layout: KvLayout,
    heads: usize,
    window: Option<usize>,
    lens: Vec<(usize, usize)>,
}

/// Fills a cache through scattered block tables and compares attention, row by row, with the reference.
fn check_attention(case: &Case) {
    let Case {
        layout,
        heads,
        window,
        lens,
    } = case;
    let (dim, kv_width) = (layout.head_dim, layout.kv_heads * layout.head_dim);
    let pool = ThreadPool::new(3);
    let mut cache = LayerCache::new(*layout).unwrap();
    // What was never written must never matter.
    let poison: Vec<f32> = vec![f32::NAN; layout.num_blocks * 16 * 2 * kv_width];
    let all: Vec<i64> = (0..(layout.num_blocks * 16) as i64).collect();
    cache.write(&pool, &all, &poison, 2 * kv_width, 0, kv_width);
    let mut free: Vec<u32> = (1..layout.num_blocks as u32).collect();
    let mut state = 12345u64;
    let mut tables = Vec::new();
    for (context, _) in lens {
        let table: Vec<u32> = (0..context.div_ceil(16))
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                free.swap_remove((state >> 33) as usize % free.len())
            })
            .collect();
        tables.push(table);
    }
    let mut contents = Vec::new();
    for (index, (context, _)) in lens.iter().enumerate() {
        let kv = values(index as u64 + 1, context * 2 * kv_width);
        let slots: Vec<i64> = (0..*context)
            .map(|p| i64::from(tables[index][p / 16]) * 16 + (p % 16) as i64)
            .collect();
        cache.write(&pool, &slots, &kv, 2 * kv_width, 0, kv_width);
        contents.push(kv);
    }
    let mut seqs = Vec::new();
    let mut rows = 0;
    for (index, (context, query)) in lens.iter().enumerate() {
        seqs.push(AttentionSeq {
            query_start: rows,
            query_len: *query,
            context_len: *context,
            block_table: &tables[index],
        });
        rows += query;
    }
    let q = values(99, rows * heads * dim);
    let scale = 1.0 / (dim as f32).sqrt();
    let args = AttentionArgs {
        q: &q,
        q_stride: heads * dim,
        heads: *heads,
        scale,
        window: *window,
        seqs: &seqs,
    };
    let mut first: Option<Vec<f32>> = None;
    for isa in Isa::available() {
        let mut out = vec![f32::NAN; rows * heads * dim];
        paged_attention_with(isa, &pool, &cache, &args, &mut out);
        for (index, seq) in seqs.iter().enumerate() {
            for i in 0..seq.query_len {
                let end = seq.context_len - seq.query_len + i + 1;
                let start = window.map_or(0, |w| end.saturating_sub(w));
                for head in 0..*heads {
                    let kv_head = head / (heads / layout.kv_heads);
                    let take = |offset: usize| -> Vec<f32> {
                        (start..end)
                            .flat_map(|p| {
                                contents[index][p * 2 * kv_width + offset + kv_head * dim..][..dim]
                                    .to_vec()
                            })
                            .map(|v| {
                                if layout.dtype == KvDtype::F16 {
                                    half::f16::from_f32(v).to_f32()
                                } else {
                                    v
                                }
                            })
                            .collect()
                    };
                    let at = ((seq.query_start + i) * heads + head) * dim;
                    let want =
                        reference::attention(&q[at..at + dim], &take(0), &take(kv_width), scale);
                    let (error, _) = reference::difference(&out[at..at + dim], &want);
                    assert!(
                        error < 2e-6,
                        "{isa:?} sequence {index} row {i} head {head}: {error}"
                    );
                }
            }
        }
        // A row alone gives the same bits.
        let seq = seqs[seqs.len() - 1];
        let last = AttentionSeq {
            query_start: seq.query_start + seq.query_len - 1,
            query_len: 1,
            ..seq
        };
        let mut alone = vec![0.0; rows * heads * dim];
        paged_attention_with(
            isa,
            &ThreadPool::new(1),
            &cache,
            &AttentionArgs {
                seqs: &[last],
                ..args
            },
            &mut alone,
        );
        assert_eq!(
            alone[last.query_start * heads * dim..],
            out[last.query_start * heads * dim..]
        );
        assert_eq!(
            first.get_or_insert(out.clone()),
            &out,
            "{isa:?} differs from scalar"
        );
    }
}

#[test]
fn attention_agrees_with_the_reference_through_scattered_blocks() {
    for dtype in [KvDtype::F32, KvDtype::F16] {
        for (heads, kv_heads, head_dim) in [
            (1, 1, 16),
            (9, 3, 64),
            (8, 2, 80),
            (4, 4, 96),
            (8, 1, 128),
            (2, 1, 256),
        ] {
            check_attention(&Case {
                layout: KvLayout {
                    num_blocks: 40,
                    kv_heads,
                    head_dim,
                    dtype,
                },
                heads,
                window: None,
                lens: vec![
                    (1, 1),
                    (16, 1),
                    (17, 17),
                    (33, 5),
                    (100, 1),
                    (64, 48),
                    (15, 2),
                ],
            });
        }
    }
}

#[test]
fn attention_looks_no_further_back_than_its_window() {
    for window in [1, 7, 16, 40] {
        check_attention(&Case {
            layout: KvLayout {
                num_blocks: 20,
                kv_heads: 2,
                head_dim: 32,
                dtype: KvDtype::F32,
            },
            heads: 4,
            window: Some(window),
            lens: vec![(50, 50), (33, 1), (90, 9)],
        });
    }
}

#[test]
#[should_panic(expected = "block table")]
fn a_short_block_table_is_refused() {
    let layout = KvLayout {
        num_blocks: 2,
        kv_heads: 1,
        head_dim: 16,
        dtype: KvDtype::F32,
    };
    let cache = LayerCache::new(layout).unwrap();
    let seqs = [AttentionSeq {
        query_start: 0,
        query_len: 1,
        context_len: 17,
        block_table: &[1],
    }];
    let args = AttentionArgs {
        q: &[0.0; 16],
        q_stride: 16,
        heads: 1,
        scale: 1.0,
        window: None,
        seqs: &seqs,
    };
    paged_attention_with(
        Isa::detect(),
        &ThreadPool::new(1),
        &cache,
        &args,
        &mut [0.0; 16],
    );
}

#[test]
fn a_slot_out_of_range_is_refused_before_anything_is_written() {
    let layout = KvLayout {
        num_blocks: 1,
        kv_heads: 1,
        head_dim: 16,
        dtype: KvDtype::F16,
    };
    let pool = ThreadPool::new(1);
    let mut cache = LayerCache::new(layout).unwrap();
    let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        cache.write(&pool, &[0, 16], &[1.0; 64], 32, 0, 16);
    }));
    assert!(refused.is_err());
    // Padding writes nothing.
    cache.write(&pool, &[-1], &[1.0; 32], 32, 0, 16);
    let seqs = [AttentionSeq {
        query_start: 0,
        query_len: 1,
        context_len: 1,
        block_table: &[0],
    }];
    let args = AttentionArgs {
        q: &[1.0; 16],
        q_stride: 16,
        heads: 1,
        scale: 1.0,
        window: None,
        seqs: &seqs,
    };
    let mut out = [9.0; 16];
    paged_attention_with(Isa::detect(), &pool, &cache, &args, &mut out);
    assert_eq!(out, [0.0; 16]);
}
