//! Packed weights: their values, and shapes that are refused.

use ashlar_kernels::{
    cpu::{BlockFormat, KvDtype, KvLayout, LayerCache, PackedMatrix},
    reference,
};

use crate::support::{blocks, values};

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
