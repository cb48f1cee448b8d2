//! Every host kernel against the reference, on every instruction set of this machine, over shapes that hurt.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use ashlar_kernels::{
    cpu::{
        AttentionArgs, AttentionSeq, BlockFormat, Int4Args, Isa, KvDtype, KvLayout, LayerCache,
        MatmulInput, PackedMatrix, QuantizedRows, ThreadPool, attention::paged_attention_with,
        elementwise, linear, matmul::matmul_with,
    },
    reference,
};

/// Deterministic values in −1..1.
fn values(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// Random valid blocks of a format: any bytes, with small finite scales.
fn blocks(format: BlockFormat, seed: u64, rows: usize, columns: usize) -> Vec<u8> {
    let bytes = format.row_bytes(columns).unwrap() * rows;
    let mut data: Vec<u8> = values(seed, bytes)
        .iter()
        .map(|v| (v * 127.0) as i8 as u8)
        .collect();
    let scales: &[usize] = match format {
        BlockFormat::Q4_0 | BlockFormat::Q8_0 | BlockFormat::Q5_0 => &[0],
        BlockFormat::Q4_1 | BlockFormat::Q5_1 | BlockFormat::Q4K | BlockFormat::Q5K => &[0, 2],
        BlockFormat::Q6K => &[208],
        _ => &[],
    };
    for (i, block) in data.chunks_exact_mut(format.block_bytes()).enumerate() {
        for (j, at) in scales.iter().enumerate() {
            let scale = half::f16::from_f32(0.01 + 0.001 * (i % 7 + j) as f32);
            block[*at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
    }
    data
}

fn product(isa: Isa, pool: &ThreadPool, w: &PackedMatrix, x: &[f32], rows: usize) -> Vec<f32> {
    let mut quantized = QuantizedRows::default();
    if w.is_quantized() {
        quantized.quantize(pool, x, w.columns());
    }
    let input = MatmulInput {
        x,
        quantized: w.is_quantized().then_some(&quantized),
        rows,
    };
    // One column of slack on each side, to see that nothing else is written.
    let stride = w.rows() + 2;
    let mut y = vec![7.0; rows * stride];
    matmul_with(isa, pool, w, input, &mut y, stride, 1);
    y.chunks_exact(stride)
        .flat_map(|row| {
            assert_eq!((row[0], row[stride - 1]), (7.0, 7.0));
            row[1..stride - 1].to_vec()
        })
        .collect()
}

#[test]
fn products_agree_with_the_reference_and_across_instruction_sets() {
    let pool = ThreadPool::new(3);
    for format in [
        BlockFormat::Q4_0,
        BlockFormat::Q4_1,
        BlockFormat::Q8_0,
        BlockFormat::F32,
        BlockFormat::F16,
        BlockFormat::BF16,
    ] {
        for (n, k) in [
            (1, 32),
            (15, 64),
            (16, 32),
            (17, 576),
            (49, 1536),
            (192, 576),
        ] {
            let data = match format {
                BlockFormat::F32 => values(3, n * k)
                    .iter()
                    .flat_map(|v| v.to_le_bytes())
                    .collect(),
                BlockFormat::F16 => values(3, n * k)
                    .iter()
                    .flat_map(|v| half::f16::from_f32(*v).to_le_bytes())
                    .collect(),
                BlockFormat::BF16 => values(3, n * k)
                    .iter()
                    .flat_map(|v| half::bf16::from_f32(*v).to_le_bytes())
                    .collect(),
                _ => blocks(format, 3, n, k),
            };
            let mut plain = vec![0.0; n * k];
            format.dequantize(&data, &mut plain).unwrap();
            let w = PackedMatrix::from_rows(format, n, k, &data).unwrap();
            for m in [1, 2, 3, 5, 8, 9, 16, 31] {
                let x = values(m as u64 + 100, m * k);
                let want = reference::matmul(&x, &plain, k);
                let results: Vec<Vec<f32>> = Isa::available()
                    .into_iter()
                    .map(|isa| product(isa, &pool, &w, &x, m))
                    .collect();
                for (isa, got) in Isa::available().iter().zip(&results) {
                    let (_, cosine) = reference::difference(got, &want);
                    let enough = if w.is_quantized() {
                        0.9995
                    } else {
                        0.999_999_9
                    };
                    assert!(
                        cosine > enough || n * m < 8,
                        "{format:?} {isa:?} {m}×{n}×{k}: cosine {cosine}"
                    );
                    assert_eq!(
                        got, &results[0],
                        "{format:?} {isa:?} {m}×{n}×{k} differs from scalar"
                    );
                }
            }
        }
    }
}

/// Random four-bit weights: words, scales and zeros.
struct Int4 {
    rows: usize,
    columns: usize,
    group: usize,
    qweight: Vec<u32>,
    scales: Vec<half::f16>,
    zeros: Vec<u8>,
}

impl Int4 {
    fn random(rows: usize, columns: usize, group: usize) -> Self {
        let random = |seed, len| values(seed + (rows * columns + group) as u64, len);
        let cells = rows * columns / group;
        let word = |v: &f32| v.to_bits().wrapping_mul(0x9e37_79b1);
        Self {
            rows,
            columns,
            group,
            qweight: random(1, rows * columns / 8).iter().map(word).collect(),
            scales: random(2, cells)
                .iter()
                .map(|v| half::f16::from_f32(0.01 + 0.009 * v))
                .collect(),
            zeros: random(3, cells)
                .iter()
                .map(|v| (7.5 + 7.5 * v).round() as u8)
                .collect(),
        }
    }

    fn args(&self) -> Int4Args<'_> {
        Int4Args {
            rows: self.rows,
            columns: self.columns,
            group: self.group,
            qweight: &self.qweight,
            scales: &self.scales,
            zeros: &self.zeros,
        }
    }

    fn value(&self, row: usize, column: usize) -> f32 {
        let word = self.qweight[row * self.columns / 8 + column / 8];
        let at = column / self.group * self.rows + row;
        let q = (word >> (4 * (column % 8)) & 15) as f32;
        (q - f32::from(self.zeros[at])) * self.scales[at].to_f32()
    }

    fn values(&self) -> Vec<f32> {
        let rows = (0..self.rows).flat_map(|row| (0..self.columns).map(move |c| (row, c)));
        rows.map(|(row, column)| self.value(row, column)).collect()
    }
}

#[test]
fn four_bit_weights_with_groups_and_zeros_are_multiplied_as_they_are() {
    let pool = ThreadPool::new(3);
    for (n, k, group) in [
        (1, 32, 32),
        (16, 64, 64),
        (17, 576, 64),
        (24, 576, 576),
        (49, 1536, 128),
        (192, 576, 32),
    ] {
        let int4 = Int4::random(n, k, group);
        let plain = int4.values();
        let w = PackedMatrix::from_int4(&int4.args()).unwrap();
        assert!(w.is_quantized());
        for row in 0..n {
            let mut out = vec![0.0; k];
            w.dequantize_row(row, &mut out);
            assert_eq!(out, plain[row * k..][..k], "row {row}");
        }
        for m in [1, 2, 3, 5, 8, 9, 31] {
            let x = values(m as u64 + 100, m * k);
            let want = reference::matmul(&x, &plain, k);
            let results: Vec<Vec<f32>> = Isa::available()
                .into_iter()
                .map(|isa| product(isa, &pool, &w, &x, m))
                .collect();
            for (isa, got) in Isa::available().iter().zip(&results) {
                let (_, cosine) = reference::difference(got, &want);
                assert!(
                    cosine > 0.9995 || n * m < 8,
                    "{isa:?} {m}×{n}×{k}/{group}: cosine {cosine}"
                );
                assert_eq!(got, &results[0], "{isa:?} {m}×{n}×{k}/{group}");
            }
        }
    }
}

#[test]
fn four_bit_weights_of_wrong_shapes_are_refused() {
    let good = Int4::random(16, 64, 32);
    let refused = |change: &dyn Fn(&mut Int4)| {
        let mut bad = Int4::random(16, 64, 32);
        change(&mut bad);
        PackedMatrix::from_int4(&bad.args()).is_err()
    };
    assert!(PackedMatrix::from_int4(&good.args()).is_ok());
    assert!(refused(&|w| w.group = 0));
    assert!(refused(&|w| w.group = 48));
    assert!(refused(&|w| w.group = 128));
    assert!(refused(&|w| w.rows = 0));
    assert!(refused(&|w| w.columns = 96));
    assert!(refused(&|w| w.qweight.truncate(127)));
    assert!(refused(&|w| w.scales.truncate(31)));
    assert!(refused(&|w| w.zeros.push(0)));
    assert!(refused(&|w| w.zeros[3] = 16));
}

#[test]
fn a_row_is_the_same_alone_and_in_any_batch_and_on_any_number_of_threads() {
    for format in [BlockFormat::Q4_1, BlockFormat::Q8_0, BlockFormat::F16] {
        let (n, k, m) = (100, 96, 23);
        let w = PackedMatrix::from_rows(format, n, k, &blocks(format, 9, n, k)).unwrap();
        let x = values(1, m * k);
        let all = product(Isa::detect(), &ThreadPool::new(4), &w, &x, m);
        for row in 0..m {
            let alone = product(
                Isa::detect(),
                &ThreadPool::new(1),
                &w,
                &x[row * k..][..k],
                1,
            );
            assert_eq!(
                alone.iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
                all[row * n..][..n]
                    .iter()
                    .map(|v| v.to_bits())
                    .collect::<Vec<_>>()
            );
        }
    }
}

#[test]
fn packed_rows_dequantise_exactly() {
    for format in [
        BlockFormat::Q4_0,
        BlockFormat::Q4_1,
        BlockFormat::Q8_0,
        BlockFormat::F32,
    ] {
        let (n, k) = (19, 64);
        let data = blocks(format, 5, n, k);
        let mut plain = vec![0.0; n * k];
        format.dequantize(&data, &mut plain).unwrap();
        let w = PackedMatrix::from_rows(format, n, k, &data).unwrap();
        for row in 0..n {
            let mut out = vec![0.0; k];
            w.dequantize_row(row, &mut out);
            let same = out
                .iter()
                .zip(&plain[row * k..])
                .all(|(a, b)| a == b || (a.is_nan() && b.is_nan()));
            assert!(same, "{format:?} row {row}");
        }
    }
}

#[test]
fn wrong_shapes_are_refused() {
    assert!(PackedMatrix::from_rows(BlockFormat::Q4_1, 4, 33, &[0; 80]).is_err());
    assert!(PackedMatrix::from_rows(BlockFormat::Q4_1, 4, 32, &[0; 79]).is_err());
    assert!(PackedMatrix::from_rows(BlockFormat::Q4_1, 0, 32, &[]).is_err());
    assert!(PackedMatrix::from_rows(BlockFormat::Q6K, 1, 256, &[0; 210]).is_err());
    assert!(PackedMatrix::from_f32(2, 2, &[0.0; 3]).is_err());
    assert!(PackedMatrix::quantize_q8(1, 31, &[0.0; 31]).is_err());
    assert!(
        BlockFormat::Q8_0
            .dequantize(&[0; 33], &mut [0.0; 32])
            .is_err()
    );
    let layout = KvLayout {
        num_blocks: 2,
        kv_heads: 1,
        head_dim: 24,
        dtype: KvDtype::F32,
    };
    assert!(LayerCache::new(layout).is_none());
}

#[test]
fn eight_bit_quantisation_keeps_direction() {
    let (n, k) = (32, 128);
    let plain = values(2, n * k);
    let w = PackedMatrix::quantize_q8(n, k, &plain).unwrap();
    let mut row = vec![0.0; k];
    for index in 0..n {
        w.dequantize_row(index, &mut row);
        let want: Vec<f64> = plain[index * k..][..k]
            .iter()
            .map(|v| f64::from(*v))
            .collect();
        assert!(reference::difference(&row, &want).0 < 0.005);
    }
}

#[test]
fn norms_and_gates_agree_with_the_reference() {
    let pool = ThreadPool::new(2);
    for width in [1, 15, 16, 17, 576, 1000] {
        for rows in [1, 3, 40] {
            let (x, weight) = (values(width as u64, rows * width), values(77, width));
            let mut out = vec![0.0; rows * width];
            elementwise::rms_norm(&pool, &x, &weight, 1e-5, &mut out);
            assert!(reference::difference(&out, &reference::rms_norm(&x, &weight, 1e-5)).0 < 1e-5);

            let (delta, mut residual) = (values(5, rows * width), x.clone());
            let sum: Vec<f32> = x.iter().zip(&delta).map(|(a, b)| a + b).collect();
            elementwise::add_rms_norm(&pool, &delta, &weight, 1e-5, &mut residual, &mut out);
            assert_eq!(residual, sum);
            assert!(
                reference::difference(&out, &reference::rms_norm(&sum, &weight, 1e-5)).0 < 1e-5
            );

            let gate_up: Vec<f32> = values(8, rows * 2 * width)
                .iter()
                .map(|v| v * 20.0)
                .collect();
            elementwise::silu_mul(&pool, &gate_up, width, &mut out);
            let want = reference::silu_mul(&gate_up, width);
            assert!(reference::difference(&out, &want).0 < 1e-4, "width {width}");
        }
    }
}

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
fn parts_in_one_loop_equal_parts_one_by_one() {
    let pool = ThreadPool::new(3);
    let (k, m) = (96, 300);
    let parts = [
        PackedMatrix::from_rows(
            BlockFormat::Q4_1,
            40,
            k,
            &blocks(BlockFormat::Q4_1, 1, 40, k),
        ),
        PackedMatrix::from_rows(
            BlockFormat::Q8_0,
            17,
            k,
            &blocks(BlockFormat::Q8_0, 2, 17, k),
        ),
        PackedMatrix::from_f32(5, k, &values(3, 5 * k)),
    ]
    .map(Result::unwrap);
    let (x, bias) = (values(4, m * k), values(5, 62));
    let mut y = vec![f32::NAN; m * 62];
    let mut scratch = QuantizedRows::default();
    linear(&pool, &parts, Some(&bias), &x, &mut scratch, &mut y);
    let mut offset = 0;
    for part in &parts {
        let n = part.rows();
        let alone = product(Isa::detect(), &pool, part, &x, m);
        for row in 0..m {
            for column in 0..n {
                let want = alone[row * n + column] + bias[offset + column];
                assert_eq!(y[row * 62 + offset + column].to_bits(), want.to_bits());
            }
        }
        offset += n;
    }
}

#[test]
fn extreme_quants_do_not_saturate() {
    let pool = ThreadPool::new(1);
    let k = 64;
    for (format, byte) in [
        (BlockFormat::Q8_0, 0x80u8),
        (BlockFormat::Q8_0, 0x7f),
        (BlockFormat::Q4_1, 0xff),
        (BlockFormat::Q4_0, 0x00),
    ] {
        let mut data = vec![byte; format.row_bytes(k).unwrap() * 16];
        for block in data.chunks_exact_mut(format.block_bytes()) {
            block[..2].copy_from_slice(&half::f16::from_f32(1.0).to_le_bytes());
            if format == BlockFormat::Q4_1 {
                block[2..4].copy_from_slice(&half::f16::from_f32(-2.0).to_le_bytes());
            }
        }
        let w = PackedMatrix::from_rows(format, 16, k, &data).unwrap();
        let mut plain = vec![0.0; k];
        w.dequantize_row(0, &mut plain);
        for sign in [1.0f32, -1.0] {
            let want = f64::from(plain[0]) * k as f64 * f64::from(sign);
            for isa in Isa::available() {
                for y in product(isa, &pool, &w, &vec![sign; 8 * k], 8) {
                    let error = (f64::from(y) - want).abs();
                    assert!(
                        error < 1e-3 * want.abs(),
                        "{format:?} {byte:x} {isa:?}: {y}, not {want}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_row_that_is_not_finite_spoils_no_other() {
    let pool = ThreadPool::new(2);
    let (n, k, m) = (20, 64, 9);
    for format in [BlockFormat::Q4_1, BlockFormat::Q8_0] {
        let w = PackedMatrix::from_rows(format, n, k, &blocks(format, 6, n, k)).unwrap();
        let clean = values(8, m * k);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = clean.clone();
            x[4 * k + 33] = bad;
            for isa in Isa::available() {
                let (got, want) = (
                    product(isa, &pool, &w, &x, m),
                    product(isa, &pool, &w, &clean, m),
                );
                for row in 0..m {
                    let (got, want) = (&got[row * n..][..n], &want[row * n..][..n]);
                    if row == 4 {
                        assert!(got.iter().all(|y| y.is_nan()), "{isa:?} {bad}");
                    } else {
                        assert_eq!(got, want);
                    }
                }
            }
        }
    }
}

#[test]
fn tiny_and_huge_activations_stay_finite() {
    let pool = ThreadPool::new(1);
    let w = PackedMatrix::from_rows(
        BlockFormat::Q8_0,
        16,
        32,
        &blocks(BlockFormat::Q8_0, 6, 16, 32),
    )
    .unwrap();
    for magnitude in [0.0, f32::MIN_POSITIVE / 4.0, 1e-37, 1e-30, 1e30] {
        let x: Vec<f32> = values(1, 32).iter().map(|v| v * magnitude).collect();
        for isa in Isa::available() {
            let y = product(isa, &pool, &w, &x, 1);
            assert!(y.iter().all(|y| y.is_finite()), "{isa:?} {magnitude}");
        }
    }
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
