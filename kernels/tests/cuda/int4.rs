//! Four-bit weights: turned into 16 bits, and multiplied as they are.

use ashlar_kernels::cuda::{
    DeviceBuffer, Float, eight_bit,
    int4::{DequantizeInt4, Int4View, cells, words},
    skinny::{Input, Output, SkinnyGemm, Weight},
};
use half::f16;

use crate::support::*;

const F16: Float = Float::F16;

/// Random weights, on the GPU and as the values that they stand for.
struct Int4 {
    group: usize,
    affine: bool,
    words: DeviceBuffer,
    cells: DeviceBuffer,
    /// `[n, k]`, rounded to halves.
    values: Vec<f32>,
}

impl Int4 {
    fn random(random: &mut Random, n: usize, k: usize, group: usize) -> Self {
        Self::of_kind(random, (n, k), group, false)
    }

    /// With zeros, or with offsets.
    fn of_kind(random: &mut Random, (n, k): (usize, usize), group: usize, affine: bool) -> Self {
        let in_order: Vec<u32> = (0..n * k / 8).map(|_| random.word() as u32).collect();
        let count = n * k / group;
        let scales: Vec<f16> = (0..count)
            .map(|_| f16::from_f32(random.unit() * 0.05))
            .collect();
        let zeros: Vec<u8> = (0..count).map(|_| random.below(16) as u8).collect();
        let offsets: Vec<f16> = (0..count)
            .map(|_| f16::from_f32(random.unit() * 0.2))
            .collect();
        let value = |at: usize| {
            let (row, column) = (at / k, at % k);
            let q = in_order[at / 8] >> (4 * (column % 8)) & 15;
            let cell = column / group * n + row;
            let value = if affine {
                f64::from(q) * f64::from(scales[cell]) + f64::from(offsets[cell])
            } else {
                (f64::from(q) - f64::from(zeros[cell])) * f64::from(scales[cell])
            };
            f16::from_f64(value).to_f32()
        };
        Self {
            group,
            words: upload_bytes(&words(&in_order)),
            affine,
            cells: upload_bytes(&if affine {
                eight_bit::cells(&scales, &offsets)
            } else {
                cells(&scales, &zeros)
            }),
            values: (0..n * k).map(value).collect(),
        }
    }

    fn view(&self) -> Int4View<'_> {
        Int4View {
            words: self.words.view(),
            cells: self.cells.view(),
            group: self.group,
            affine: self.affine,
        }
    }

    /// `x · wᵀ`, `x` `[m, k]`.
    fn product(&self, x: &[f32], k: usize) -> Vec<f64> {
        let rows = x
            .chunks(k)
            .flat_map(|x| self.values.chunks(k).map(move |w| (x, w)));
        rows.map(|(x, w)| {
            x.iter()
                .zip(w)
                .map(|(a, b)| f64::from(*a) * f64::from(*b))
                .sum()
        })
        .collect()
    }
}

/// n, k, group.
const SHAPES: [(usize, usize, usize); 11] = [
    (20_000, 160, 32),
    (16, 32, 32),
    (17, 64, 64),
    (576, 576, 64),
    (1000, 1536, 128),
    (200, 4128, 32),
    (49, 96, 96),
    (40, 4096, 4096),
    (100, 2816, 128),
    (6144, 4096, 128),
    (72, 14336, 128),
];

#[test]
fn four_bits_become_sixteen_exactly() {
    for ((n, k, group), affine) in SHAPES
        .into_iter()
        .flat_map(|shape| [(shape, false), (shape, true)])
    {
        let weight = Int4::of_kind(&mut Random((n * k) as u64), (n, k), group, affine);
        let out = poisoned(n * k * 2);
        DequantizeInt4 {
            weight: weight.view(),
            out: out.view(),
            n,
            k,
        }
        .launch(device())
        .unwrap();
        assert!(
            download(F16, &out, n * k) == weight.values,
            "{n} × {k} in groups of {group}"
        );
    }
}

#[test]
fn few_rows_are_multiplied_with_a_bias() {
    for (n, k, group) in SHAPES {
        for m in [1, 2, 4, 5, 8, 9, 16, 17, 32, 33, 64] {
            let mut random = Random((m * n) as u64);
            let affine = m % 3 == 2;
            let weight = Int4::of_kind(&mut random, (n, k), group, affine);
            let (x, bias) = (random.values(F16, m * k), random.values(F16, n));
            let y = poisoned(m * n * 2);
            SkinnyGemm {
                float: F16,
                input: Input::Plain(upload(F16, &x).view()),
                weight: Weight::Int4(weight.view()),
                bias: Some(upload(F16, &bias).view()),
                output: Output::Store(y.view()),
                m,
                n,
                k,
            }
            .launch(device())
            .unwrap();
            let expected: Vec<f64> = weight
                .product(&x, k)
                .iter()
                .enumerate()
                .map(|(at, sum)| sum + f64::from(bias[at % n]))
                .collect();
            let what = format!("{m}×{n}×{k} in groups of {group}");
            assert_close(&what, F16, &download(F16, &y, m * n), &expected);
        }
    }
}

/// residual += x·wᵀ, then silu(gate)·up of the normed residual, as in a layer.
#[test]
fn a_layers_chain_is_fused() {
    for (hidden, k, features, group) in [
        (64, 32, 24, 32),
        (576, 576, 1536, 64),
        (96, 160, 100, 32),
        (256, 256, 24, 128),
        (1024, 2816, 1000, 128),
        (4096, 1024, 14336, 128),
    ] {
        for m in [1, 2, 3, 8, 16, 32, 64] {
            let mut random = Random((m * hidden) as u64);
            let down = Int4::random(&mut random, hidden, k, group);
            let gate_up = Int4::random(&mut random, 2 * features, hidden, group);
            let x = random.values(F16, m * k);
            let (before, norm) = (random.values(F16, m * hidden), random.values(F16, hidden));
            let residual = upload(F16, &before);
            let num_sums = hidden.div_ceil(16);
            let (sums, out) = (poisoned(num_sums * m * 4), poisoned(m * features * 2));
            let (x_gpu, norm_gpu) = (upload(F16, &x), upload(F16, &norm));
            let run = |input, weight: &Int4, output, n, k| {
                SkinnyGemm {
                    float: F16,
                    input,
                    weight: Weight::Int4(weight.view()),
                    bias: None,
                    output,
                    m,
                    n,
                    k,
                }
                .launch(device())
                .unwrap();
            };
            let add = Output::AddResidual {
                residual: residual.view(),
                sums: sums.view(),
            };
            run(Input::Plain(x_gpu.view()), &down, add, hidden, k);
            let what = format!("{m}×{hidden}×{k}");
            let delta = down.product(&x, k);
            let pairs = before.iter().zip(&delta);
            let expected: Vec<f64> = pairs.map(|(b, d)| f64::from(*b) + d).collect();
            let stream = download(F16, &residual, m * hidden);
            assert_close(&format!("residual {what}"), F16, &stream, &expected);

            let normed = Input::Normed {
                residual: residual.view(),
                weight: norm_gpu.view(),
                sums: sums.view(),
                num_sums,
                eps: 1e-5,
            };
            run(
                normed,
                &gate_up,
                Output::SiluMul(out.view()),
                features,
                hidden,
            );
            let x: Vec<f32> = stream
                .chunks(hidden)
                .flat_map(|row| {
                    let mean = row.iter().map(|v| v * v).sum::<f32>() / hidden as f32;
                    let scale = 1.0 / (mean + 1e-5).sqrt();
                    let pairs = row.iter().zip(&norm);
                    pairs.map(move |(v, w)| f16::from_f32(v * scale * w).to_f32())
                })
                .collect();
            let both = gate_up.product(&x, hidden);
            let expected: Vec<f64> = both
                .chunks(2 * features)
                .flat_map(|row| {
                    let (gate, up) = row.split_at(features);
                    gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u)
                })
                .collect();
            let actual = download(F16, &out, m * features);
            assert_close_to(&format!("silu {what}"), 2e-3, &actual, &expected);
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let buffer = device().alloc(4096).unwrap();
    let view = buffer.view();
    let weight = |group| Int4View {
        words: view,
        cells: view,
        group,
        affine: false,
    };
    let dequantize = |n, k, group| {
        let op = DequantizeInt4 {
            weight: weight(group),
            out: view,
            n,
            k,
        };
        op.launch(device()).unwrap_err().to_string()
    };
    assert!(dequantize(4, 64, 0).contains("groups of 0"));
    assert!(dequantize(4, 96, 48).contains("groups of 48"));
    assert!(dequantize(4, 192, 96).contains("groups of 96"));
    assert!(dequantize(0, 64, 32).contains("0 × 64"));
    assert!(dequantize(64, 64, 32).contains("too short"));
    let multiply = |float, output, n, group| {
        let op = SkinnyGemm {
            float,
            input: Input::Plain(view),
            weight: Weight::Int4(weight(group)),
            bias: None,
            output,
            m: 1,
            n,
            k: 64,
        };
        op.launch(device()).unwrap_err().to_string()
    };
    let store = Output::Store(view);
    let many = SkinnyGemm {
        float: F16,
        input: Input::Plain(view),
        weight: Weight::Int4(weight(32)),
        bias: None,
        output: store,
        m: 65,
        n: 16,
        k: 64,
    };
    let message = many.launch(device()).unwrap_err().to_string();
    assert!(message.contains("at most 64 rows"), "{message}");
    assert!(multiply(Float::Bf16, store, 16, 32).contains("with halves"));
    assert!(multiply(F16, Output::StoreF32(view), 16, 32).contains("give halves"));
    assert!(multiply(F16, store, 16, 48).contains("too short"));
    assert!(multiply(F16, store, 1024, 32).contains("too short"));
}
