//! Eight-bit weights, floats and integers: turned into 16 bits, and multiplied; and rows of eight-bit floats.

use ashlar_kernels::cuda::{
    DeviceBuffer, Float,
    eight_bit::{DequantizeEightBit, EightBit, Fp8View, Int8View, QuantizeRows, cells},
    gemm::{Fp8Gemm, Gemm, bucket},
    skinny::{Input, Output, SkinnyGemm, Weight},
};
use half::f16;

use crate::support::*;

/// The value of an e4m3 (1 sign, 4 exponent, 3 mantissa bits), by its definition.
fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let size = match exponent {
        0 => mantissa * 2f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if byte & 0x80 == 0 { size } else { -size }
}

enum Kind {
    Fp8 { scales: DeviceBuffer },
    Int8 { cells: DeviceBuffer, group: usize },
}

/// Random weights, on the GPU and as the values that they stand for.
struct Matrix {
    data: DeviceBuffer,
    kind: Kind,
    /// `[n, k]`, not rounded.
    exact: Vec<f64>,
}

impl Matrix {
    fn fp8(random: &mut Random, n: usize, k: usize) -> Self {
        let data: Vec<u8> = (0..n * k)
            .map(|_| match random.below(256) as u8 {
                0x7f | 0xff => 0,
                byte => byte,
            })
            .collect();
        let scales: Vec<f32> = (0..n).map(|_| (random.unit().abs() + 0.1) * 1e-3).collect();
        let exact = data.iter().enumerate();
        Self {
            exact: exact
                .map(|(at, byte)| f64::from(e4m3(*byte)) * f64::from(scales[at / k]))
                .collect(),
            data: upload_bytes(&data),
            kind: Kind::Fp8 {
                scales: upload_f32(&scales),
            },
        }
    }

    fn int8(random: &mut Random, n: usize, k: usize, group: usize) -> Self {
        let data: Vec<u8> = (0..n * k).map(|_| random.below(256) as u8).collect();
        let mut halves = |size: f32| -> Vec<f16> {
            (0..n * k / group)
                .map(|_| f16::from_f32(random.unit() * size))
                .collect()
        };
        let (scales, offsets) = (halves(2e-3), halves(0.1));
        let exact = data.iter().enumerate().map(|(at, byte)| {
            let cell = at % k / group * n + at / k;
            f64::from(byte.cast_signed()) * f64::from(scales[cell].to_f32())
                + f64::from(offsets[cell].to_f32())
        });
        Self {
            exact: exact.collect(),
            data: upload_bytes(&data),
            kind: Kind::Int8 {
                cells: upload_bytes(&cells(&scales, &offsets)),
                group,
            },
        }
    }

    fn view(&self) -> EightBit<'_> {
        let data = self.data.view();
        match &self.kind {
            Kind::Fp8 { scales } => EightBit::Fp8(Fp8View {
                data,
                scales: scales.view(),
            }),
            Kind::Int8 { cells, group } => EightBit::Int8(Int8View {
                data,
                cells: cells.view(),
                group: *group,
            }),
        }
    }

    fn floats(&self) -> &'static [Float] {
        match self.kind {
            Kind::Fp8 { .. } => &FLOATS,
            Kind::Int8 { .. } => &FLOATS[1..],
        }
    }

    /// `x · wᵀ`, x `[m, k]`.
    fn product(&self, x: &[f32], k: usize) -> Vec<f64> {
        let rows = x
            .chunks(k)
            .flat_map(|x| self.exact.chunks(k).map(move |w| (x, w)));
        rows.map(|(x, w)| x.iter().zip(w).map(|(a, b)| f64::from(*a) * b).sum())
            .collect()
    }
}

/// Of each kind, with groups of one, two and four chunks.
fn matrices(n: usize, k: usize) -> Vec<Matrix> {
    let mut random = Random((n * k) as u64);
    let mut all = vec![Matrix::fp8(&mut random, n, k)];
    for group in [16, 32, 64] {
        if k.is_multiple_of(group) {
            all.push(Matrix::int8(&mut random, n, k, group));
        }
    }
    all
}

const SHAPES: [(usize, usize); 6] = [
    (16, 32),
    (17, 64),
    (576, 576),
    (1000, 1536),
    (200, 4128),
    (49, 96),
];

#[test]
fn eight_bits_become_sixteen_rounded_once() {
    for (n, k) in SHAPES {
        for matrix in matrices(n, k) {
            for float in matrix.floats() {
                let out = poisoned(n * k * 2);
                DequantizeEightBit {
                    float: *float,
                    weight: matrix.view(),
                    out: out.view(),
                    n,
                    k,
                }
                .launch(device())
                .unwrap();
                let values = download(*float, &out, n * k);
                let expected: Vec<f32> = matrix
                    .exact
                    .iter()
                    .map(|value| match matrix.kind {
                        Kind::Fp8 { .. } => round(*float, *value as f32),
                        Kind::Int8 { .. } => f16::from_f64(*value).to_f32(),
                    })
                    .collect();
                assert!(values == expected, "{float:?} {n} × {k}");
            }
        }
    }
}

#[test]
fn few_rows_are_multiplied_with_a_bias() {
    for (n, k) in SHAPES {
        for matrix in matrices(n, k) {
            for float in matrix.floats() {
                for m in [1, 2, 8, 9, 16, 17, 32] {
                    let mut random = Random((m * n) as u64);
                    let (x, bias) = (random.values(*float, m * k), random.values(*float, n));
                    let y = poisoned(m * n * 2);
                    SkinnyGemm {
                        float: *float,
                        input: Input::Plain(upload(*float, &x).view()),
                        weight: Weight::EightBit(matrix.view()),
                        bias: Some(upload(*float, &bias).view()),
                        output: Output::Store(y.view()),
                        m,
                        n,
                        k,
                    }
                    .launch(device())
                    .unwrap();
                    let expected: Vec<f64> = matrix
                        .product(&x, k)
                        .iter()
                        .enumerate()
                        .map(|(at, sum)| sum + f64::from(bias[at % n]))
                        .collect();
                    let what = format!("{float:?} {m}×{n}×{k}");
                    assert_close(&what, *float, &download(*float, &y, m * n), &expected);
                }
            }
        }
    }
}

/// residual += x·wᵀ, then silu(gate)·up of the normed residual, as in a layer.
#[test]
fn a_layers_chain_is_fused() {
    let (hidden, k, features) = (96, 160, 100);
    for (down, gate_up) in matrices(hidden, k)
        .iter()
        .zip(&matrices(2 * features, hidden))
    {
        for float in down.floats() {
            for m in [1, 3, 16, 32] {
                let mut random = Random(m as u64);
                let x = random.values(*float, m * k);
                let (before, norm) = (
                    random.values(*float, m * hidden),
                    random.values(*float, hidden),
                );
                let residual = upload(*float, &before);
                let num_sums = hidden.div_ceil(16);
                let (sums, out) = (poisoned(num_sums * m * 4), poisoned(m * features * 2));
                let (x_gpu, norm_gpu) = (upload(*float, &x), upload(*float, &norm));
                let run = |input, weight: &Matrix, output, n, k| {
                    SkinnyGemm {
                        float: *float,
                        input,
                        weight: Weight::EightBit(weight.view()),
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
                run(Input::Plain(x_gpu.view()), down, add, hidden, k);
                let what = format!("{float:?} {m}×{hidden}×{k}");
                let delta = down.product(&x, k);
                let pairs = before.iter().zip(&delta);
                let expected: Vec<f64> = pairs.map(|(b, d)| f64::from(*b) + d).collect();
                let stream = download(*float, &residual, m * hidden);
                assert_close(&format!("residual {what}"), *float, &stream, &expected);

                let normed = Input::Normed {
                    residual: residual.view(),
                    weight: norm_gpu.view(),
                    sums: sums.view(),
                    num_sums,
                    eps: 1e-5,
                };
                let silu = Output::SiluMul(out.view());
                run(normed, gate_up, silu, features, hidden);
                let x: Vec<f32> = stream
                    .chunks(hidden)
                    .flat_map(|row| {
                        let mean = row.iter().map(|v| v * v).sum::<f32>() / hidden as f32;
                        let scale = 1.0 / (mean + 1e-5).sqrt();
                        let pairs = row.iter().zip(&norm);
                        pairs.map(move |(v, w)| round(*float, v * scale * w))
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
                let tolerance = if *float == Float::Bf16 { 1.2e-2 } else { 2e-3 };
                let actual = download(*float, &out, m * features);
                assert_close_to(&format!("silu {what}"), tolerance, &actual, &expected);
            }
        }
    }
}

/// A row's largest value becomes 448, and no value is off by more than half a step.
#[test]
fn rows_become_eight_bit_floats_with_a_scale_each() {
    for float in FLOATS {
        for (m, k) in [(1, 32), (3, 4128), (70, 576)] {
            let mut random = Random((m * k) as u64);
            let mut x = random.values(float, m * k);
            x[..k].fill(0.0);
            let (out, scales) = (poisoned(m * k), poisoned(m * 4));
            QuantizeRows {
                float,
                x: upload(float, &x).view(),
                out: out.view(),
                scales: scales.view(),
                m,
                k,
            }
            .launch(device())
            .unwrap();
            let (bytes, scales) = (
                device().read(out.view().slice(0, m * k)).unwrap(),
                download_f32(&scales, m),
            );
            for (at, (value, byte)) in x.iter().zip(&bytes).enumerate() {
                let scale = scales[at / k];
                let actual = e4m3(*byte) * scale;
                let most = (value.abs() / 16.0).max(scale * 2f32.powi(-10)) * 1.001;
                assert!(
                    (actual - value).abs() <= most,
                    "{float:?} [{at}]: {value} became {actual}"
                );
            }
            for row in 1..m {
                let largest = x[row * k..][..k].iter().fold(0f32, |a, b| a.max(b.abs()));
                assert!((scales[row] * 448.0 / largest - 1.0).abs() < 1e-5);
            }
        }
    }
}

#[test]
fn many_rows_of_eight_bit_floats_are_multiplied_where_the_gpu_can() {
    let available = Fp8Gemm::is_available(device());
    assert!(
        available || device().capability() != 90,
        "Hopper multiplies eight-bit floats"
    );
    if !available {
        return;
    }
    for float in FLOATS {
        for (n, k) in [(16, 32), (576, 576), (1008, 1536), (256, 4128)] {
            for m in [1, 17, 64, 130, 257] {
                for biased in [false, true] {
                    let mut random = Random((m * n + k) as u64);
                    let weight = Matrix::fp8(&mut random, n, k);
                    let rows = bucket(m);
                    let x: Vec<u8> = (0..rows * k).map(|_| random.below(0x70) as u8).collect();
                    let x_scales: Vec<f32> =
                        (0..rows).map(|_| random.unit().abs() * 0.01).collect();
                    let bias = random.values(float, n);
                    let y = poisoned(rows * n * 2);
                    let EightBit::Fp8(view) = weight.view() else {
                        unreachable!()
                    };
                    let bias_gpu = upload(float, &bias);
                    Fp8Gemm {
                        gemm: Gemm {
                            float,
                            x: upload_bytes(&x).view(),
                            weight: view.data,
                            bias: biased.then(|| bias_gpu.view()),
                            y: y.view(),
                            f32_out: false,
                            adds: false,
                            m,
                            n,
                            k,
                        },
                        x_scales: upload_f32(&x_scales).view(),
                        weight_scales: view.scales,
                    }
                    .launch(device())
                    .unwrap();
                    device().synchronize().unwrap();
                    let values: Vec<f32> = x[..m * k]
                        .iter()
                        .enumerate()
                        .map(|(at, byte)| e4m3(*byte) * x_scales[at / k])
                        .collect();
                    // One row in sixteen: the reference takes its time.
                    for row in (0..m).step_by(16) {
                        let expected: Vec<f64> = weight
                            .product(&values[row * k..][..k], k)
                            .iter()
                            .enumerate()
                            .map(|(at, sum)| sum + if biased { f64::from(bias[at]) } else { 0.0 })
                            .collect();
                        let actual = &download(float, &y, m * n)[row * n..][..n];
                        let what = format!("{float:?} row {row} of {m}×{n}×{k}, bias {biased}");
                        assert_close_to(&what, 8e-3, actual, &expected);
                    }
                }
            }
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let buffer = device().alloc(4096).unwrap();
    let view = buffer.view();
    let int8 = |group| {
        EightBit::Int8(Int8View {
            data: view,
            cells: view,
            group,
        })
    };
    let fp8 = EightBit::Fp8(Fp8View {
        data: view,
        scales: view,
    });
    let dequantize = |float, weight, n, k| {
        let op = DequantizeEightBit {
            float,
            weight,
            out: view,
            n,
            k,
        };
        op.launch(device()).is_err()
    };
    assert!(!dequantize(Float::F16, int8(16), 8, 64));
    assert!(dequantize(Float::Bf16, int8(16), 8, 64));
    assert!(dequantize(Float::F16, int8(48), 8, 96));
    assert!(dequantize(Float::F16, fp8, 8, 48));
    assert!(dequantize(Float::F16, fp8, 64, 64));
    let multiply = |float, weight, output, m| {
        let op = SkinnyGemm {
            float,
            input: Input::Plain(view),
            weight: Weight::EightBit(weight),
            bias: None,
            output,
            m,
            n: 8,
            k: 32,
        };
        op.launch(device()).unwrap_err().to_string()
    };
    let store = Output::Store(view);
    assert!(multiply(Float::Bf16, int8(16), store, 1).contains("with halves"));
    assert!(multiply(Float::F16, fp8, Output::StoreF32(view), 1).contains("16 bits"));
    assert!(multiply(Float::F16, fp8, store, 33).contains("at most 32 rows"));
    assert!(multiply(Float::F16, int8(64), store, 1).contains("too short"));
    let rows = QuantizeRows {
        float: Float::F16,
        x: view,
        out: view,
        scales: view,
        m: 100,
        k: 64,
    };
    assert!(rows.launch(device()).is_err());
}
