//! Paged attention over shuffled pages with NaN in everything unused, against plain softmax in f64.

use ashlar_kernels::cuda::{
    Float, KvDtype,
    attention::{DecodeAttention, DecodeRope, HeadShape},
    decode_plan::SharedPrefix,
    rope::{BLOCK_SIZE, RopeWriteKv, rope_table},
};

use crate::{
    attention_case::{Case, narrow, shape},
    support::*,
};

/// Every type of pages, with its scales, and every other value.
pub(crate) fn kv_dtypes_and<T: Copy, const N: usize>(
    others: [T; N],
) -> impl Iterator<Item = ((KvDtype, [f32; 2]), T)> {
    let pairs = move |kv| others.into_iter().map(move |other| (kv, other));
    KV_DTYPES.into_iter().flat_map(pairs)
}

const HEADS: [(usize, usize, usize); 8] = [
    (9, 3, 64),
    (4, 4, 64),
    (32, 2, 64),
    (14, 2, 128),
    (8, 2, 128),
    (16, 1, 128),
    (6, 2, 96),
    (8, 1, 256),
];

#[test]
fn decode_whole_and_cut() {
    for float in FLOATS {
        for (heads, kv_heads, dim) in HEADS {
            for ((kv_dtype, kv_scales), window) in kv_dtypes_and([0, 50]) {
                let lengths = [1, 15, 16, 17, 63, 64, 65, 100, 333, 1000];
                let case = Case {
                    shape: HeadShape {
                        kv_dtype,
                        ..shape(float, heads, kv_heads, dim, window)
                    },
                    kv_scales,
                    seqs: lengths.iter().map(|len| (1, *len)).collect(),
                };
                let data = case.data(heads as u64);
                let expected = case.expected(&data);
                for cut in [lengths.len(), 37, 400]
                    .iter()
                    .flat_map(|items| case.cuts(*items))
                {
                    let what = format!(
                        "{float:?} {kv_dtype:?} {heads}/{kv_heads}×{dim} window {window} {cut:?}"
                    );
                    let found = case.decode_by(&data, &[], cut, None);
                    assert_close(&what, float, &found, &expected);
                }
            }
        }
    }
}

/// So many rows that four blocks run on a multiprocessor, or three, or two.
#[test]
fn decode_of_many_rows() {
    for ((kv_dtype, kv_scales), count) in kv_dtypes_and([30, 45, 80]) {
        let case = Case {
            shape: HeadShape {
                kv_dtype,
                ..shape(Float::Bf16, 32, 8, 128, 0)
            },
            kv_scales,
            seqs: (0..count).map(|row| (1, 10 + row * 7 % 200)).collect(),
        };
        let data = case.data(count as u64);
        let found = case.decode_by(&data, &[], narrow(count + 20), None);
        assert_close(
            &format!("{kv_dtype:?} {count} rows"),
            Float::Bf16,
            &found,
            &case.expected(&data),
        );
    }
}

/// Rows 1.. begin with the pages of row 1; their own come behind.
#[test]
fn decode_of_rows_that_share_pages() {
    for (kv, float) in kv_dtypes_and(FLOATS) {
        for (heads, kv_heads, dim) in HEADS {
            let lengths = [40, 700, 701, 545, 544, 1000, 560, 643, 700, 2000, 577];
            let case = Case {
                shape: HeadShape {
                    kv_dtype: kv.0,
                    ..shape(float, heads, kv_heads, dim, 0)
                },
                kv_scales: kv.1,
                seqs: lengths.iter().map(|len| (1, *len)).collect(),
            };
            let mut data = case.data(dim as u64);
            let pages = 33;
            for row in 2..lengths.len() {
                let (from, to) = (
                    data.table_starts[1] as usize,
                    data.table_starts[row] as usize,
                );
                data.blocks.copy_within(from..from + pages, to);
                for head in 0..kv_heads {
                    let values = pages * BLOCK_SIZE * dim;
                    let (from, to) = (head * lengths[1] * dim, head * lengths[row] * dim);
                    for all in [&mut data.keys, &mut data.values] {
                        let common = all[1][from..from + values].to_vec();
                        all[row][to..to + values].copy_from_slice(&common);
                    }
                }
            }
            let expected = case.expected(&data);
            let members: Vec<u32> = (1..lengths.len() as u32).collect();
            let shared = [SharedPrefix { members, pages }];
            for max_items in [lengths.len(), 22, 60, 400] {
                let what = format!("{float:?} {kv:?} {heads}/{kv_heads}×{dim} items {max_items}");
                let found = case.decode_by(&data, &shared, narrow(max_items), None);
                assert_close(&what, float, &found, &expected);
            }
        }
    }
}

/// With q and k as the product made them: what attention rotates and writes itself is what the two kernels do one by one.
#[test]
fn decode_rotates_and_writes_the_cache() {
    for ((kv_dtype, kv_scales), float) in kv_dtypes_and(FLOATS) {
        for (heads, kv_heads, dim) in HEADS {
            if !DecodeAttention::rotates(dim) {
                continue;
            }
            for (window, has_norms) in [(0, false), (50, true), (0, true)] {
                let lengths = [1, 15, 16, 17, 33, 63, 64, 65, 100, 333, 1000];
                let case = Case {
                    shape: HeadShape {
                        kv_dtype,
                        ..shape(float, heads, kv_heads, dim, window)
                    },
                    kv_scales,
                    seqs: lengths.iter().map(|len| (1, *len)).collect(),
                };
                let data = case.data(heads as u64 + 7);
                let mut random = Random(3);
                let norm = |random: &mut Random| {
                    let values = random.values(float, dim);
                    upload(
                        float,
                        &values
                            .iter()
                            .map(|v| round(float, v + 1.0))
                            .collect::<Vec<_>>(),
                    )
                };
                let (query_norm, key_norm) = (norm(&mut random), norm(&mut random));
                let norms = has_norms.then(|| (query_norm.view(), key_norm.view()));
                let frequencies: Vec<u8> = (0..dim / 2)
                    .flat_map(|pair| {
                        10_000f64
                            .powf(-2.0 * pair as f64 / dim as f64)
                            .to_le_bytes()
                    })
                    .collect();
                let table = device().alloc(1000 * dim / 2 * 8).unwrap();
                let frequencies = upload_bytes(&frequencies);
                rope_table(device(), frequencies.view(), table.view(), dim / 2, 1000).unwrap();
                let whole_cache = device().read(data.cache.view()).unwrap();
                let rope = DecodeRope {
                    table: table.view(),
                    norms,
                    eps: 1e-6,
                };
                let what =
                    format!("{float:?} {kv_dtype:?} {heads}/{kv_heads}×{dim} window {window}");
                let mut fused = Vec::new();
                for cut in [lengths.len(), 37, 400]
                    .iter()
                    .flat_map(|items| case.cuts(*items))
                {
                    device().write(&whole_cache, data.cache.view()).unwrap();
                    fused.push(case.decode_by(&data, &[], cut, Some(rope)));
                }
                let fused_cache = device().read(data.cache.view()).unwrap();
                device().write(&whole_cache, data.cache.view()).unwrap();
                let slots: Vec<u8> = lengths
                    .iter()
                    .zip(&data.table_starts)
                    .flat_map(|(len, start)| {
                        let block = data.blocks[*start as usize + (len - 1) / BLOCK_SIZE];
                        (i64::from(block) * BLOCK_SIZE as i64
                            + (len - 1) as i64 % BLOCK_SIZE as i64)
                            .to_le_bytes()
                    })
                    .collect();
                let positions: Vec<u32> = lengths.iter().map(|len| *len as u32 - 1).collect();
                RopeWriteKv {
                    float,
                    kv_dtype,
                    kv_scales,
                    qkv: data.qkv_gpu.view(),
                    norms,
                    table: table.view(),
                    positions: upload_u32(&positions).view(),
                    slot_mapping: upload_bytes(&slots).view(),
                    cache: data.cache.view(),
                    rows: lengths.len(),
                    num_heads: heads,
                    num_kv_heads: kv_heads,
                    head_dim: dim,
                    eps: 1e-6,
                }
                .launch(device())
                .unwrap();
                let apart: Vec<f64> = case
                    .decode_by(&data, &[], narrow(37), None)
                    .iter()
                    .map(|v| f64::from(*v))
                    .collect();
                for found in &fused {
                    assert_close(&what, float, found, &apart);
                }
                let expected_cache = device().read(data.cache.view()).unwrap();
                let [found, expected] = [fused_cache, expected_cache]
                    .map(|bytes| page_values_of(float, kv_dtype, &bytes));
                // Of a value, and of the smallest eight-bit ones.
                let (ulp, least) = match (kv_dtype, float) {
                    (KvDtype::Fp8, _) => (1.0 / 8.0, 1.0 / 512.0),
                    (KvDtype::Float, Float::Bf16) => (1.0 / 128.0, 0.0),
                    (KvDtype::Float, Float::F16) => (1.0 / 1024.0, 0.0),
                };
                for (found, expected) in found.iter().zip(&expected) {
                    let same = found.is_nan() == expected.is_nan();
                    // The sum of a norm goes in another order: a bit in the last place.
                    let most = (expected.abs() * ulp).max(least);
                    let near = expected.is_nan() || (found - expected).abs() <= most;
                    assert!(
                        same && near,
                        "{what}: the cache has {found}, not {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn prefill_with_and_without_a_prefix() {
    for float in FLOATS {
        for (heads, kv_heads, dim) in [(9, 3, 64), (8, 2, 128), (6, 2, 96), (4, 1, 256)] {
            for ((kv_dtype, kv_scales), window) in kv_dtypes_and([0, 40, 150]) {
                let seqs = vec![
                    (2, 2),
                    (16, 16),
                    (33, 33),
                    (128, 128),
                    (129, 129),
                    (300, 300),
                    (5, 70),
                    (130, 333),
                    (64, 1000),
                ];
                let case = Case {
                    shape: HeadShape {
                        kv_dtype,
                        ..shape(float, heads, kv_heads, dim, window)
                    },
                    kv_scales,
                    seqs,
                };
                let data = case.data(dim as u64);
                let what =
                    format!("{float:?} {kv_dtype:?} {heads}/{kv_heads}×{dim} window {window}");
                let expected = case.expected(&data);
                for portable in [false, true] {
                    let what = format!("{what} portable {portable}");
                    assert_close(&what, float, &case.prefill_by(&data, portable), &expected);
                }
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_company() {
    let float = Float::Bf16;
    let alone = Case {
        shape: shape(float, 8, 2, 128, 0),
        kv_scales: [1.0; 2],
        seqs: vec![(70, 200)],
    };
    let data = alone.data(5);
    let first = alone.prefill(&data);
    for _ in 0..3 {
        assert_eq!(alone.prefill(&data), first);
    }
}

/// More work units than blocks, lengths around every boundary, long contexts: blocks walk over several units each.
#[test]
fn prefill_of_more_work_than_blocks() {
    for (heads, kv_heads, dim) in [(9, 3, 64), (16, 4, 128)] {
        for window in [0, 200] {
            let mut seqs: Vec<(usize, usize)> =
                [1, 127, 128, 129, 143, 144, 145, 255, 256, 257, 640]
                    .iter()
                    .flat_map(|rows| [(*rows, *rows), (*rows, rows + 77), (*rows, rows + 1024)])
                    .collect();
            seqs.push((40, 3000));
            let case = Case {
                shape: shape(Float::Bf16, heads, kv_heads, dim, window),
                kv_scales: [1.0; 2],
                seqs,
            };
            let data = case.data(dim as u64 + 1);
            let what = format!("{heads}/{kv_heads}×{dim} window {window}");
            let first = case.prefill(&data);
            assert_close(&what, Float::Bf16, &first, &case.expected(&data));
            for _ in 0..3 {
                assert_eq!(case.prefill(&data), first, "{what} again");
            }
        }
    }
}

/// As many tokens as end in the middle of what a warp reads at once, cut into items of odd numbers of pages.
#[test]
fn eight_bit_pages_are_cut_anywhere() {
    let (kv_dtype, kv_scales) = KV_DTYPES[1];
    for float in FLOATS {
        for (heads, kv_heads, dim) in [(9, 3, 64), (6, 2, 96), (8, 2, 128), (8, 1, 256)] {
            let lengths: Vec<usize> = (1..=12).map(|pages| pages * 16 * 7 - 5).collect();
            let case = Case {
                shape: HeadShape {
                    kv_dtype,
                    ..shape(float, heads, kv_heads, dim, 0)
                },
                kv_scales,
                seqs: lengths.iter().map(|len| (1, *len)).collect(),
            };
            let data = case.data(dim as u64 + 3);
            let expected = case.expected(&data);
            let sizes = [13, 16, 21, 30, 50, 77, 110];
            for cut in sizes.iter().flat_map(|items| case.cuts(*items)) {
                let what = format!("{float:?} {heads}/{kv_heads}×{dim} {cut:?}");
                let found = case.decode_by(&data, &[], cut, None);
                assert_close(&what, float, &found, &expected);
            }
        }
    }
}

#[test]
fn scales_that_pages_cannot_have_are_refused() {
    for (kv_dtype, kv_scales) in [
        (KvDtype::Float, [1.0, 0.5]),
        (KvDtype::Fp8, [0.0, 1.0]),
        (KvDtype::Fp8, [1.0, f32::NAN]),
        (KvDtype::Fp8, [f32::INFINITY, 1.0]),
    ] {
        let mut case = Case {
            shape: HeadShape {
                kv_dtype,
                ..shape(Float::Bf16, 8, 2, 128, 0)
            },
            kv_scales: [1.0; 2],
            seqs: vec![(1, 20)],
        };
        let data = case.data(1);
        case.kv_scales = kv_scales;
        assert!(case.try_prefill(&data, false).is_err(), "{kv_scales:?}");
    }
}

#[test]
fn shapes_without_a_kernel_are_refused() {
    for (heads, kv_heads, dim) in [(8, 8, 80), (34, 2, 64), (9, 2, 64), (32, 2, 256)] {
        assert!(
            shape(Float::Bf16, heads, kv_heads, dim, 0)
                .validate()
                .is_err()
        );
    }
}
