//! Skinny products with everything fused in, and cuBLASLt's.

use ashlar_kernels::cuda::{
    Float,
    gemm::{Gemm, bucket},
    skinny::{Input, Output, SkinnyGemm, Weight},
};

use crate::support::*;

pub(crate) fn product(
    x: &[f64],
    weight: &[f32],
    (m, n, k): (usize, usize, usize),
    bias: Option<&[f32]>,
) -> Vec<f64> {
    let mut y = Vec::with_capacity(m * n);
    for row in x.chunks(k).take(m) {
        for (column, w) in weight.chunks(k).take(n).enumerate() {
            let sum: f64 = row.iter().zip(w).map(|(a, b)| a * f64::from(*b)).sum();
            y.push(sum + bias.map_or(0.0, |bias| f64::from(bias[column])));
        }
    }
    y
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

// The last ones have more tiles than there are blocks, which draw them then: short rows, long ones.
const SHAPES: [(usize, usize); 9] = [
    (16, 32),
    (17, 64),
    (576, 576),
    (1000, 1536),
    (200, 4128),
    (49, 96),
    (5003, 64),
    (2500, 2080),
    (4410, 4096),
];

#[test]
fn skinny_stores_with_bias() {
    for float in FLOATS {
        for (n, k) in SHAPES {
            for m in [1, 2, 7, 8, 9, 16, 17, 32] {
                let mut random = Random((m * n) as u64);
                let (x, weight) = (random.values(float, m * k), random.values(float, n * k));
                let bias = random.values(float, n);
                let (x_gpu, w_gpu, b_gpu) = (
                    upload(float, &x),
                    upload(float, &weight),
                    upload(float, &bias),
                );
                let (y, y32) = (poisoned(m * n * 2), poisoned(m * n * 4));
                let gemm = |output, bias| SkinnyGemm {
                    float,
                    input: Input::Plain(x_gpu.view()),
                    weight: Weight::Float(w_gpu.view()),
                    bias,
                    output,
                    m,
                    n,
                    k,
                };
                gemm(Output::Store(y.view()), Some(b_gpu.view()))
                    .launch(device())
                    .unwrap();
                gemm(Output::StoreF32(y32.view()), None)
                    .launch(device())
                    .unwrap();
                let what = format!("{float:?} {m}×{n}×{k}");
                assert_close(
                    &what,
                    float,
                    &download(float, &y, m * n),
                    &product(&wide(&x), &weight, (m, n, k), Some(&bias)),
                );
                assert_close_to(
                    &what,
                    1e-5,
                    &download_f32(&y32, m * n),
                    &product(&wide(&x), &weight, (m, n, k), None),
                );
            }
        }
    }
}

/// residual += x·wᵀ, then silu(gate)·up of the normed residual, as in a layer.
#[test]
fn skinny_chain_of_a_layer() {
    for float in FLOATS {
        for (hidden, k, features) in [
            (64, 32, 24),
            (576, 576, 1536),
            (96, 160, 100),
            (4096, 96, 1500),
        ] {
            for m in [1, 2, 3, 7, 8, 16] {
                let mut random = Random((m * hidden) as u64);
                let (x, weight) = (
                    random.values(float, m * k),
                    random.values(float, hidden * k),
                );
                let before = random.values(float, m * hidden);
                let norm = random.values(float, hidden);
                let gate_up = random.values(float, 2 * features * hidden);
                let residual = upload(float, &before);
                let num_sums = hidden.div_ceil(16);
                let sums = poisoned(num_sums * m * 4);
                let (x_gpu, w_gpu) = (upload(float, &x), upload(float, &weight));
                SkinnyGemm {
                    float,
                    input: Input::Plain(x_gpu.view()),
                    weight: Weight::Float(w_gpu.view()),
                    bias: None,
                    output: Output::AddResidual {
                        residual: residual.view(),
                        sums: sums.view(),
                    },
                    m,
                    n: hidden,
                    k,
                }
                .launch(device())
                .unwrap();
                let delta = product(&wide(&x), &weight, (m, hidden, k), None);
                let expected: Vec<f64> = before
                    .iter()
                    .zip(&delta)
                    .map(|(b, d)| f64::from(*b) + d)
                    .collect();
                let stream = download(float, &residual, m * hidden);
                assert_close(
                    &format!("residual {float:?} {m}×{hidden}×{k}"),
                    float,
                    &stream,
                    &expected,
                );

                let (norm_gpu, gu_gpu, out) = (
                    upload(float, &norm),
                    upload(float, &gate_up),
                    poisoned(m * features * 2),
                );
                SkinnyGemm {
                    float,
                    input: Input::Normed {
                        residual: residual.view(),
                        weight: norm_gpu.view(),
                        sums: sums.view(),
                        num_sums,
                        eps: 1e-5,
                    },
                    weight: Weight::Float(gu_gpu.view()),
                    bias: None,
                    output: Output::SiluMul(out.view()),
                    m,
                    n: features,
                    k: hidden,
                }
                .launch(device())
                .unwrap();
                let normed: Vec<f64> = stream
                    .chunks(hidden)
                    .flat_map(|row| {
                        let mean =
                            row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / hidden as f64;
                        let scale = 1.0 / (mean + 1e-5).sqrt();
                        row.iter()
                            .zip(&norm)
                            .map(move |(v, w)| f64::from(*v) * scale * f64::from(*w))
                            .collect::<Vec<_>>()
                    })
                    .collect();
                let both = product(&normed, &gate_up, (m, 2 * features, hidden), None);
                let expected: Vec<f64> = both
                    .chunks(2 * features)
                    .flat_map(|row| {
                        (0..features)
                            .map(move |i| row[i] / (1.0 + (-row[i]).exp()) * row[features + i])
                    })
                    .collect();
                // Two roundings more than a plain product.
                let tolerance = if float == Float::Bf16 { 1.2e-2 } else { 2e-3 };
                assert_close_to(
                    &format!("{float:?} m {m} hidden {hidden}"),
                    tolerance,
                    &download(float, &out, m * features),
                    &expected,
                );
            }
        }
    }
}

/// Launches one behind the other share one counter, and each may start before the one in front has ended.
#[test]
fn skinny_launches_in_a_row_are_right_each_time() {
    let (float, m, n, k) = (Float::Bf16, 2, 9000, 2048);
    let mut random = Random(1);
    let (x, weight) = (random.values(float, m * k), random.values(float, n * k));
    let (x_gpu, w_gpu) = (upload(float, &x), upload(float, &weight));
    let outs: Vec<_> = (0..12).map(|_| poisoned(m * n * 4)).collect();
    for out in &outs {
        SkinnyGemm {
            float,
            input: Input::Plain(x_gpu.view()),
            weight: Weight::Float(w_gpu.view()),
            bias: None,
            output: Output::StoreF32(out.view()),
            m,
            n,
            k,
        }
        .launch(device())
        .unwrap();
    }
    let expected = product(&wide(&x), &weight, (m, n, k), None);
    let first = download_f32(&outs[0], m * n);
    assert_close_to("first", 1e-5, &first, &expected);
    for out in &outs[1..] {
        assert_eq!(download_f32(out, m * n), first);
    }
}

#[test]
fn cublas_products_and_their_padding() {
    for float in FLOATS {
        for (m, n, k) in [
            (1, 64, 64),
            (17, 576, 1536),
            (33, 1000, 576),
            (300, 264, 128),
        ] {
            let mut random = Random(m as u64);
            let rows = bucket(m);
            let (x, weight, bias) = (
                random.values(float, rows * k),
                random.values(float, n * k),
                random.values(float, n),
            );
            let (x_gpu, w_gpu, b_gpu) = (
                upload(float, &x),
                upload(float, &weight),
                upload(float, &bias),
            );
            let (y, y32) = (poisoned(rows * n * 2), poisoned(rows * n * 4));
            let gemm = |y, f32_out, bias| Gemm {
                float,
                x: x_gpu.view(),
                weight: w_gpu.view(),
                bias,
                y,
                f32_out,
                adds: false,
                m,
                n,
                k,
            };
            gemm(y.view(), false, Some(b_gpu.view()))
                .launch(device())
                .unwrap();
            assert_close(
                "gemm",
                float,
                &download(float, &y, m * n),
                &product(&wide(&x), &weight, (m, n, k), Some(&bias)),
            );
            let before = random.values(float, rows * n);
            let sum_gpu = upload(float, &before);
            Gemm {
                adds: true,
                ..gemm(sum_gpu.view(), false, Some(b_gpu.view()))
            }
            .launch(device())
            .unwrap();
            let sums = product(&wide(&x), &weight, (m, n, k), Some(&bias));
            let sums = sums.iter().zip(&before);
            let sums: Vec<f64> = sums.map(|(sum, b)| sum + f64::from(*b)).collect();
            assert_close(
                "gemm added",
                float,
                &download(float, &sum_gpu, m * n),
                &sums,
            );
            gemm(y32.view(), true, None)
                .tune(device(), 2, &[w_gpu.view()])
                .unwrap();
            gemm(y32.view(), true, None).launch(device()).unwrap();
            assert_close_to(
                "gemm f32",
                1e-5,
                &download_f32(&y32, m * n),
                &product(&wide(&x), &weight, (m, n, k), None),
            );
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let buffer = device().alloc(4096).unwrap();
    let view = buffer.view();
    let skinny = |m, n, k| {
        SkinnyGemm {
            float: Float::Bf16,
            input: Input::Plain(view),
            weight: Weight::Float(view),
            bias: None,
            output: Output::Store(view),
            m,
            n,
            k,
        }
        .launch(device())
    };
    for (m, n, k) in [
        (0, 16, 32),
        (33, 16, 32),
        (1, 16, 40),
        (1, 4096, 32),
        (1, 0, 32),
    ] {
        assert!(
            skinny(m, n, k)
                .unwrap_err()
                .to_string()
                .contains("skinny_gemm")
        );
    }
    let gemm = |m, n, k| {
        Gemm {
            float: Float::Bf16,
            x: view,
            weight: view,
            bias: None,
            y: view,
            f32_out: false,
            adds: false,
            m,
            n,
            k,
        }
        .launch(device())
    };
    for (m, n, k) in [(0, 8, 8), (1, 12, 8), (64, 64, 64)] {
        assert!(gemm(m, n, k).unwrap_err().to_string().contains("gemm"));
    }
}
