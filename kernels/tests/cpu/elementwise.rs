//! Norms and gates.

use ashlar_kernels::{
    cpu::{ThreadPool, elementwise},
    reference,
};

use crate::support::values;

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
