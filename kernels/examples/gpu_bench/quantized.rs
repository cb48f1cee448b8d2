//! Products with weights of four and eight bits.

use ashlar_kernels::cuda::{
    DeviceBuffer, Float,
    eight_bit::{EightBit, Fp8View, QuantizeRows},
    gemm::{Fp8Gemm, Gemm, bucket},
    int4::{DequantizeInt4, Int4View},
    int4_gemm::Int4Gemm,
    skinny::{Input, Output, SkinnyGemm, Weight},
};

use super::{Bench, FLOAT};

impl Bench {
    /// Four-bit weights in groups of 128, of any bits; their values are checked by the tests.
    pub(super) fn four_bit_products(&self) {
        for (n, k) in [
            (8192usize, 8192usize),
            (28672, 4096),
            (6144, 4096),
            (4096, 4096),
            (4096, 14336),
            (57344, 8192),
            (10240, 8192),
            (8192, 28672),
        ] {
            let group = 128;
            let bytes = n * k / 2 + k / group * n * 4;
            let sets = ((400 << 20) / bytes).clamp(1, 64);
            let weights: Vec<(DeviceBuffer, DeviceBuffer)> = (0..sets)
                .map(|_| (self.random(n * k / 4), self.random(k / group * n * 2)))
                .collect();
            let view = |i: usize| Int4View {
                words: weights[i % sets].0.view(),
                cells: weights[i % sets].1.view(),
                group,
                affine: false,
            };
            for m in [1usize, 2, 4, 8, 16, 32, 64] {
                let (x, y) = (self.random(m * k), self.device.alloc(m * n * 2).unwrap());
                let us = self.time(2 * sets.max(10), |i| {
                    SkinnyGemm {
                        float: Float::F16,
                        input: Input::Plain(x.view()),
                        weight: Weight::Int4(view(i)),
                        bias: None,
                        output: Output::Store(y.view()),
                        m,
                        n,
                        k,
                    }
                    .launch(&self.device)
                    .unwrap();
                });
                self.bandwidth(&format!("int4 {m} × {n} × {k}"), us, bytes as f64);
            }
            let out = self.device.alloc(n * k * 2).unwrap();
            let dequantize = |i: usize| {
                DequantizeInt4 {
                    weight: view(i),
                    out: out.view(),
                    n,
                    k,
                }
                .launch(&self.device)
                .unwrap();
            };
            let us = self.time(2 * sets.max(10), dequantize);
            let moved = (bytes + n * k * 2) as f64;
            self.bandwidth(&format!("int4 to f16 {n} × {k}"), us, moved);
            self.many_rows_of_four_bits((n, k), &view, &dequantize, &out);
        }
    }

    /// Products with many rows, beside the same ones with 16-bit weights.
    fn many_rows_of_four_bits<'a>(
        &self,
        (n, k): (usize, usize),
        view: &dyn Fn(usize) -> Int4View<'a>,
        dequantize: &dyn Fn(usize),
        scratch: &DeviceBuffer,
    ) {
        let sets = ((400 << 20) / (n * k * 2)).clamp(1, 64);
        let floats: Vec<DeviceBuffer> = (0..sets).map(|_| self.random_f16(n * k)).collect();
        let parts = self
            .device
            .alloc(Int4Gemm::parts_bytes(&self.device))
            .unwrap();
        let arrived = self
            .device
            .alloc(Int4Gemm::arrived_bytes(&self.device))
            .unwrap();
        self.device.fill(arrived.view(), 0).unwrap();
        for m in [128usize, 192, 256, 512, 1024, 4096] {
            let (x, y) = (
                self.random_f16(m * k),
                self.device.alloc(m * n * 2).unwrap(),
            );
            let gemm = |weight: &DeviceBuffer| {
                let op = Gemm {
                    float: Float::F16,
                    x: x.view(),
                    weight: weight.view(),
                    bias: None,
                    y: y.view(),
                    f32_out: false,
                    adds: false,
                    m,
                    n,
                    k,
                };
                op.tune(&self.device, 3, &[]).unwrap();
                op.launch(&self.device).unwrap();
            };
            gemm(&floats[0]);
            let runs = if m > 1024 { 4 } else { 20 };
            let plain = self.time(runs, |i| gemm(&floats[i % sets]));
            let both = self.time(runs, |i| {
                dequantize(i);
                gemm(scratch);
            });
            let fused = if Int4Gemm::takes(&self.device, n, k) {
                self.time(runs, |i| {
                    Int4Gemm {
                        x: x.view(),
                        weight: view(i),
                        bias: None,
                        y: y.view(),
                        m,
                        n,
                        k,
                        parts: parts.view(),
                        arrived: arrived.view(),
                    }
                    .launch(&self.device)
                    .unwrap();
                })
            } else {
                f64::INFINITY
            };
            println!(
                "{:40} {plain:7.1} µs in f16; to f16 first {both:7.1} µs, {:5.1} %; as it is {fused:7.1} µs, {:5.1} %",
                format!("int4 {m} × {n} × {k}"),
                plain / both * 100.0,
                plain / fused * 100.0
            );
        }
    }

    /// Eight-bit floats: few rows by the skinny kernel, more by cuBLASLt, their rounding included.
    pub(super) fn eight_bit_products(&self) {
        for (n, k) in [(28672usize, 4096usize), (6144, 4096), (4096, 14336)] {
            let sets = ((400 << 20) / (n * k)).clamp(1, 64);
            let weights: Vec<DeviceBuffer> = (0..sets).map(|_| self.random(n * k / 2)).collect();
            let scales = self.device.alloc(n * 4).unwrap();
            self.device.fill(scales.view(), 0x3c).unwrap();
            let weight = |i: usize| Fp8View {
                data: weights[i % sets].view(),
                scales: scales.view(),
            };
            for m in [1usize, 8, 16, 32, 64, 256, 4096] {
                let rows = bucket(m);
                let (x, y) = (
                    self.random(rows * k),
                    self.device.alloc(rows * n * 2).unwrap(),
                );
                let runs = if m > 1024 { 4 } else { 2 * sets.max(10) };
                if m <= 32 {
                    let us = self.time(runs, |i| {
                        SkinnyGemm {
                            float: FLOAT,
                            input: Input::Plain(x.view()),
                            weight: Weight::EightBit(EightBit::Fp8(weight(i))),
                            bias: None,
                            output: Output::Store(y.view()),
                            m,
                            n,
                            k,
                        }
                        .launch(&self.device)
                        .unwrap();
                    });
                    self.bandwidth(&format!("fp8 skinny {m} × {n} × {k}"), us, (n * k) as f64);
                }
                if m < 16 || !Fp8Gemm::is_available(&self.device) {
                    continue;
                }
                let (q, x_scales) = (
                    self.device.alloc(rows * k).unwrap(),
                    self.device.alloc(rows * 4).unwrap(),
                );
                let gemm = |i: usize| Fp8Gemm {
                    gemm: Gemm {
                        float: FLOAT,
                        x: q.view(),
                        weight: weight(i).data,
                        bias: None,
                        y: y.view(),
                        f32_out: false,
                        adds: false,
                        m,
                        n,
                        k,
                    },
                    x_scales: x_scales.view(),
                    weight_scales: scales.view(),
                };
                let others: Vec<_> = (1..sets).map(|i| weight(i).data).collect();
                gemm(0).tune(&self.device, 3, &others).unwrap();
                let us = self.time(runs, |i| {
                    QuantizeRows {
                        float: FLOAT,
                        x: x.view(),
                        out: q.view(),
                        scales: x_scales.view(),
                        m,
                        k,
                    }
                    .launch(&self.device)
                    .unwrap();
                    gemm(i).launch(&self.device).unwrap();
                });
                let flop = 2.0 * (m * n) as f64 * k as f64;
                self.rate(&format!("fp8 cublaslt {m} × {n} × {k}"), us, flop);
            }
        }
    }
}
