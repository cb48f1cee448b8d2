//! Many rows with four-bit weights as they are, on Hopper GPUs.

use ashlar_kernels::cuda::{
    DeviceBuffer, Float, eight_bit,
    int4::{Int4View, cells, words},
    int4_gemm::Int4Gemm,
};
use half::f16;

use crate::support::*;

struct Weights {
    group: usize,
    affine: bool,
    words: DeviceBuffer,
    cells: DeviceBuffer,
    /// `[n, k]`, rounded to halves.
    values: Vec<f32>,
}

impl Weights {
    fn random(random: &mut Random, (n, k): (usize, usize), group: usize, affine: bool) -> Self {
        let in_order: Vec<u32> = (0..n * k / 8).map(|_| random.word() as u32).collect();
        let count = n * k / group;
        let mut halves = |size: f32| -> Vec<f16> {
            (0..count)
                .map(|_| f16::from_f32(random.unit() * size))
                .collect()
        };
        let (scales, offsets) = (halves(0.05), halves(0.2));
        let zeros: Vec<u8> = (0..count).map(|_| random.below(16) as u8).collect();
        let value = |at: usize| {
            let (row, column) = (at / k, at % k);
            let q = (in_order[at / 8] >> (4 * (column % 8)) & 15) as f32;
            let cell = column / group * n + row;
            let (scale, offset) = (scales[cell].to_f32(), offsets[cell].to_f32());
            let value = if affine {
                q * scale + offset
            } else {
                (q - f32::from(zeros[cell])) * scale
            };
            f16::from_f32(value).to_f32()
        };
        let stored = if affine {
            eight_bit::cells(&scales, &offsets)
        } else {
            cells(&scales, &zeros)
        };
        Self {
            group,
            affine,
            words: upload_bytes(&words(&in_order)),
            cells: upload_bytes(&stored),
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
}

#[test]
fn many_rows_are_multiplied_with_a_bias() {
    if !device().is_hopper() {
        return;
    }
    let parts = poisoned(Int4Gemm::parts_bytes(device()));
    let arrived = upload_bytes(&vec![0; Int4Gemm::arrived_bytes(device())]);
    for (n, k, group) in [
        (8, 64, 32),
        (136, 128, 64),
        (576, 576, 64),
        (1000, 1536, 128),
        (17_000, 256, 128),
        (264, 4096, 4096),
    ] {
        for affine in [false, true] {
            let mut random = Random((n * k) as u64);
            let weight = Weights::random(&mut random, (n, k), group, affine);
            for m in [1, 64, 65, 128, 200, 257, 600] {
                let (x, bias) = (
                    random.values(Float::F16, m * k),
                    random.values(Float::F16, n),
                );
                let (x_gpu, bias_gpu) = (upload(Float::F16, &x), upload(Float::F16, &bias));
                let results = [None, Some(bias_gpu.view())].map(|bias| {
                    // A row more, which must stay as it was.
                    let y = poisoned((m + 1) * n * 2);
                    Int4Gemm {
                        x: x_gpu.view(),
                        weight: weight.view(),
                        bias,
                        y: y.view(),
                        m,
                        n,
                        k,
                        parts: parts.view(),
                        arrived: arrived.view(),
                    }
                    .launch(device())
                    .unwrap();
                    let mut all = download(Float::F16, &y, (m + 1) * n);
                    let behind = all.split_off(m * n);
                    assert!(behind.iter().all(|value| value.is_nan()));
                    all
                });
                // Some rows: the reference takes its time.
                for row in (0..m).step_by(61).chain([m - 1]) {
                    let x = &x[row * k..][..k];
                    for (actual, bias) in results.iter().zip([None, Some(&bias)]) {
                        let sums = weight.values.chunks(k).enumerate().map(|(at, w)| {
                            let sum: f64 = x
                                .iter()
                                .zip(w)
                                .map(|(a, b)| f64::from(*a) * f64::from(*b))
                                .sum();
                            sum + bias.map_or(0.0, |bias| f64::from(bias[at]))
                        });
                        let expected: Vec<f64> = sums.collect();
                        let what = format!("row {row} of {m}×{n}×{k}, affine {affine}");
                        assert_close(&what, Float::F16, &actual[row * n..][..n], &expected);
                    }
                }
            }
        }
    }
    let counters = download_u32(&arrived, Int4Gemm::arrived_bytes(device()) / 4);
    assert!(counters.iter().all(|count| *count == 0));
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    if !device().is_hopper() {
        return;
    }
    let parts = device().alloc(Int4Gemm::parts_bytes(device())).unwrap();
    let buffer = device().alloc(64 << 10).unwrap();
    let view = buffer.view();
    let launch = |m, n, k, group| {
        let op = Int4Gemm {
            x: view,
            weight: Int4View {
                words: view,
                cells: view,
                group,
                affine: false,
            },
            bias: None,
            y: view,
            m,
            n,
            k,
            parts: parts.view(),
            arrived: view,
        };
        op.launch(device()).err().map(|error| error.to_string())
    };
    assert_eq!(launch(65, 64, 64, 64), None);
    for (m, n, k) in [(65, 60, 64), (65, 64, 96), (0, 64, 64)] {
        assert!(launch(m, n, k, 32).unwrap().contains("are needed"));
    }
    assert!(launch(65, 1024, 64, 64).unwrap().contains("too short"));
    assert!(launch(65, 64, 192, 96).unwrap().contains("too short"));
}
