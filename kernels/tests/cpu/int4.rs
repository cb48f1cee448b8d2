//! Four-bit weights with groups and zeros.

use ashlar_kernels::{
    cpu::{Int4Args, Isa, PackedMatrix, ThreadPool},
    reference,
};

use crate::support::{product, values};

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
