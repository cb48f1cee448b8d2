//! Products with 16-bit weights, by every kernel that can make them.

use ashlar_kernels::cuda::{
    DeviceBuffer,
    gemm::{Gemm, bucket},
    invariant_gemm::InvariantGemm,
    skinny::{Input, Output, SkinnyGemm, Weight},
};

use super::{Bench, FLOAT};

/// The same product by the kernel that is one for all numbers of rows.
fn invariant<'a>(gemm: &Gemm<'a>) -> InvariantGemm<'a> {
    InvariantGemm {
        float: gemm.float,
        x: gemm.x,
        weight: gemm.weight,
        bias: gemm.bias,
        y: gemm.y,
        f32_out: gemm.f32_out,
        m: gemm.m,
        n: gemm.n,
        k: gemm.k,
    }
}

impl Bench {
    pub(super) fn products(&self) {
        for (n, k) in [
            (28672usize, 4096usize),
            (6144, 4096),
            (4096, 4096),
            (4096, 14336),
            (128_256, 4096),
            (960, 576),
        ] {
            let sets = ((400 << 20) / (n * k * 2)).clamp(1, 64);
            let weights: Vec<DeviceBuffer> = (0..sets).map(|_| self.random(n * k)).collect();
            for m in [1usize, 2, 8, 16, 32, 64, 256] {
                let (x, y) = (
                    self.random(bucket(m) * k),
                    self.device.alloc(bucket(m) * n * 4).unwrap(),
                );
                let bytes = (n * k * 2) as f64;
                if m <= 32 {
                    let us = self.time(2 * sets.max(10), |i| {
                        SkinnyGemm {
                            float: FLOAT,
                            input: Input::Plain(x.view()),
                            weight: Weight::Float(weights[i % sets].view()),
                            bias: None,
                            output: Output::Store(y.view()),
                            m,
                            n,
                            k,
                        }
                        .launch(&self.device)
                        .unwrap();
                    });
                    self.bandwidth(&format!("skinny {m} × {n} × {k}"), us, bytes);
                }
                let gemm = |i: usize| Gemm {
                    float: FLOAT,
                    x: x.view(),
                    weight: weights[i % sets].view(),
                    bias: None,
                    y: y.view(),
                    f32_out: false,
                    adds: false,
                    m,
                    n,
                    k,
                };
                let others: Vec<_> = weights[1..].iter().map(DeviceBuffer::view).collect();
                gemm(0).tune(&self.device, 3, &others).unwrap();
                let us = self.time(2 * sets.max(10), |i| gemm(i).launch(&self.device).unwrap());
                self.bandwidth(&format!("cublaslt {m} × {n} × {k}"), us, bytes);
                let us = self.time(2 * sets.max(10), |i| {
                    invariant(&gemm(i)).launch(&self.device).unwrap();
                });
                self.bandwidth(&format!("invariant {m} × {n} × {k}"), us, bytes);
            }
        }
        for (m, n, k) in [
            (4096usize, 28672usize, 4096usize),
            (8192, 28672, 4096),
            (8192, 4096, 14336),
            (8192, 6144, 4096),
            (8192, 4096, 4096),
        ] {
            let (x, w, y) = (
                self.random(m * k),
                self.random(n * k),
                self.device.alloc(m * n * 2).unwrap(),
            );
            let gemm = Gemm {
                float: FLOAT,
                x: x.view(),
                weight: w.view(),
                bias: None,
                y: y.view(),
                f32_out: false,
                adds: false,
                m,
                n,
                k,
            };
            gemm.tune(&self.device, 3, &[]).unwrap();
            let us = self.time(5, |_| gemm.launch(&self.device).unwrap());
            let flop = 2.0 * (m * n) as f64 * k as f64;
            self.rate(&format!("cublaslt {m} × {n} × {k}"), us, flop);
            let us = self.time(5, |_| invariant(&gemm).launch(&self.device).unwrap());
            self.rate(&format!("invariant {m} × {n} × {k}"), us, flop);
        }
    }
}
