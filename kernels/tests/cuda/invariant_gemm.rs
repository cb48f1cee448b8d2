//! Products whose rows do not depend on each other: against sums in f64, and bit for bit against runs alone.

use ashlar_kernels::cuda::{DeviceBuffer, Float, View, invariant_gemm::InvariantGemm};

use crate::{products::product, support::*};

/// Rows, outputs, columns: tiles of 64 × 128, steps of 64.
const SHAPES: [(usize, usize, usize); 10] = [
    (1, 2, 8),
    (1, 576, 1536),
    (15, 130, 24),
    (17, 128, 64),
    (63, 98, 576),
    (65, 1000, 200),
    (257, 960, 264),
    (64, 5002, 72),
    (300, 254, 4096),
    // More tiles of rows than stand side by side.
    (1100, 386, 320),
];

struct Operands {
    float: Float,
    x: DeviceBuffer,
    weight: DeviceBuffer,
    bias: Option<DeviceBuffer>,
    n: usize,
    k: usize,
}

impl Operands {
    /// The bytes of `m` rows from `first` on; `y` has a row more, which is left as it was.
    fn rows(&self, first: usize, m: usize, f32_out: bool) -> Vec<u8> {
        let row = self.n * if f32_out { 4 } else { 2 };
        let y = poisoned((m + 1) * row);
        InvariantGemm {
            float: self.float,
            x: self.x.view().from(first * self.k * 2),
            weight: self.weight.view(),
            bias: self.bias.as_ref().map(DeviceBuffer::view),
            y: y.view(),
            f32_out,
            m,
            n: self.n,
            k: self.k,
        }
        .launch(device())
        .unwrap();
        let mut bytes = device().read(y.view()).unwrap();
        let behind = bytes.split_off(m * row);
        assert!(behind.iter().all(|byte| *byte == 0xFF));
        bytes
    }
}

#[test]
fn invariant_products_are_right_with_and_without_bias() {
    for float in FLOATS {
        for (m, n, k) in SHAPES {
            let mut random = Random((m * n) as u64);
            let (x, weight) = (random.values(float, m * k), random.values(float, n * k));
            let bias = random.values(float, n);
            let mut operands = Operands {
                float,
                x: upload(float, &x),
                weight: upload(float, &weight),
                bias: Some(upload(float, &bias)),
                n,
                k,
            };
            let what = format!("{float:?} {m}×{n}×{k}");
            let wide: Vec<f64> = x.iter().map(|value| f64::from(*value)).collect();
            let found = values_of(float, &operands.rows(0, m, false));
            let expected = product(&wide, &weight, (m, n, k), Some(&bias));
            assert_close(&what, float, &found, &expected);
            operands.bias = None;
            let found: Vec<f32> = operands
                .rows(0, m, true)
                .as_chunks::<4>()
                .0
                .iter()
                .map(|word| f32::from_le_bytes(*word))
                .collect();
            let expected = product(&wide, &weight, (m, n, k), None);
            // Tensor cores cut sums off at each of K's steps.
            assert_close_to(&what, 5e-5, &found, &expected);
        }
    }
}

/// Alone, and in pieces that put every row at other places of a tile.
#[test]
fn a_products_row_has_the_same_bits_alone_and_among_others() {
    for float in FLOATS {
        for (m, n, k) in [(300, 386, 1048), (130, 576, 4096)] {
            let mut random = Random(k as u64);
            let mut values = |count: usize| upload(float, &random.values(float, count));
            let operands = Operands {
                float,
                x: values(m * k),
                weight: values(n * k),
                bias: Some(values(n)),
                n,
                k,
            };
            for f32_out in [false, true] {
                let all = operands.rows(0, m, f32_out);
                let row = all.len() / m;
                for piece in [1, 7, 16, 33, 64, 97] {
                    let mut first = 0;
                    while first < m {
                        let rows = piece.min(m - first);
                        assert!(
                            operands.rows(first, rows, f32_out) == all[first * row..][..rows * row],
                            "{float:?} {m}×{n}×{k}: rows {first}.. in pieces of {piece}"
                        );
                        first += rows;
                    }
                }
            }
        }
    }
}

/// What other rows hold, numbers or none, is not seen.
#[test]
fn a_products_row_does_not_see_nan_beside_it() {
    let (float, m, n, k) = (Float::Bf16, 70, 128, 256);
    let mut random = Random(9);
    let (mut x, weight) = (random.values(float, m * k), random.values(float, n * k));
    let operands = |x: &[f32]| Operands {
        float,
        x: upload(float, x),
        weight: upload(float, &weight),
        bias: None,
        n,
        k,
    };
    let clean = operands(&x).rows(0, m, true);
    x[3 * k..4 * k].fill(f32::NAN);
    let found = operands(&x).rows(0, m, true);
    let row = n * 4;
    assert!(found[..3 * row] == clean[..3 * row] && found[4 * row..] == clean[4 * row..]);
    assert!(found[3 * row..4 * row] != clean[3 * row..4 * row]);
}

/// Attention counts on this of the tensor cores: tokens that a row does not see are multiplied with zero, and may be large where
/// its sums are small.
#[test]
fn zeros_times_anything_change_no_bit() {
    for float in FLOATS {
        let (m, n, k) = (16, 128, 256);
        let mut random = Random(4);
        // Every other value is unseen.
        let seen = |i: usize| i.is_multiple_of(2);
        let mut values = |count: usize, unseen: f32| -> Vec<f32> {
            let value = |i| {
                let unit = random.unit();
                round(
                    float,
                    if seen(i) {
                        unit / 1024.0
                    } else {
                        unit * unseen
                    },
                )
            };
            (0..count).map(value).collect()
        };
        let (x, weight) = (values(m * k, 0.0), values(n * k, 50_000.0));
        let run = |weight: &[f32]| {
            let operands = Operands {
                float,
                x: upload(float, &x),
                weight: upload(float, weight),
                bias: None,
                n,
                k,
            };
            operands.rows(0, m, true)
        };
        let large = run(&weight);
        let mut zeros = weight;
        for (i, value) in zeros.iter_mut().enumerate() {
            *value = if seen(i) { *value } else { 0.0 };
        }
        assert!(run(&zeros) == large, "{float:?}");
    }
}

#[test]
fn invariant_products_that_do_not_fit_are_refused() {
    let buffer = device().alloc(4096).unwrap();
    let view: View<'_> = buffer.view();
    for (m, n, k) in [(0, 8, 8), (1, 7, 8), (1, 8, 12), (1, 8, 0), (64, 64, 64)] {
        let gemm = InvariantGemm {
            float: Float::Bf16,
            x: view,
            weight: view,
            bias: None,
            y: view,
            f32_out: false,
            m,
            n,
            k,
        };
        let error = gemm.launch(device()).unwrap_err().to_string();
        assert!(error.contains("invariant_gemm"), "{error}");
    }
}
