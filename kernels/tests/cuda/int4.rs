//! Four-bit weights.

use ashlar_kernels::cuda::int4::DequantizeInt4;
use half::f16;

use crate::support::*;

#[test]
fn four_bits_become_sixteen_exactly() {
    for (n, k, group) in [
        (1, 32, 32),
        (8, 64, 64),
        (24, 576, 64),
        (1000, 1536, 128),
        (40, 4096, 4096),
        (3, 14336, 128),
    ] {
        let mut random = Random((n * k + group) as u64);
        let qweight: Vec<u32> = (0..n * k / 8).map(|_| random.word() as u32).collect();
        let cells = n * k / group;
        let scales: Vec<f16> = (0..cells)
            .map(|_| f16::from_f32(random.unit() * 0.05))
            .collect();
        let zeros: Vec<u8> = (0..cells).map(|_| random.below(16) as u8).collect();
        let scale_bytes: Vec<u8> = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        let out = poisoned(n * k * 2);
        DequantizeInt4 {
            qweight: upload_u32(&qweight).view(),
            scales: upload_bytes(&scale_bytes).view(),
            zeros: upload_bytes(&zeros).view(),
            out: out.view(),
            n,
            k,
            group,
        }
        .launch(device())
        .unwrap();
        let expected: Vec<f32> = (0..n * k)
            .map(|at| {
                let (row, column) = (at / k, at % k);
                let q = qweight[at / 8] >> (4 * (column % 8)) & 15;
                let cell = column / group * n + row;
                let value = (q as f32 - f32::from(zeros[cell])) * scales[cell].to_f32();
                f16::from_f32(value).to_f32()
            })
            .collect();
        assert!(
            download(FLOATS[1], &out, n * k) == expected,
            "{n} × {k} in groups of {group}"
        );
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let buffer = device().alloc(4096).unwrap();
    let view = buffer.view();
    let refused = |n, k, group| {
        let op = DequantizeInt4 {
            qweight: view,
            scales: view,
            zeros: view,
            out: view,
            n,
            k,
            group,
        };
        op.launch(device()).unwrap_err().to_string()
    };
    assert!(refused(4, 64, 0).contains("groups"));
    assert!(refused(4, 64, 48).contains("groups"));
    assert!(refused(4, 64, 12).contains("groups"));
    assert!(refused(0, 64, 32).contains("groups"));
    assert!(refused(64, 64, 32).contains("too short"));
}
