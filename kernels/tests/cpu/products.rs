//! Products with weights of every format.

use ashlar_kernels::{
    cpu::{BlockFormat, Isa, PackedMatrix, QuantizedRows, ThreadPool, linear},
    reference,
};

use crate::support::{blocks, product, values};

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
