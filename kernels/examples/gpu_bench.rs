//! Speed of the GPU kernels on one line each, as a share of this GPU's limits (read bandwidth 4.55 TB/s and 790 TFLOP/s on an
//! H200, or `ASHLAR_GPU_GBPS` and `ASHLAR_GPU_TFLOPS`). Weights and caches rotate, so that nothing is found in the L2.
//! Arguments name sections; without one all are run.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

use ashlar_kernels::cuda::{
    Device, DeviceBuffer, Float, KvDtype,
    attention::{DecodeAttention, HeadShape, PlanView, PrefillAttention, Sequences, prefill_items},
    decode_plan::{DecodePlan, ITEM_WORDS, PARTS_PER_ITEM},
    eight_bit::{EightBit, Fp8View, QuantizeRows},
    elementwise::{AddNorm, SiluMul, fill_random},
    gemm::{Fp8Gemm, Gemm, bucket},
    int4::{DequantizeInt4, Int4View},
    int4_gemm::Int4Gemm,
    invariant_gemm::InvariantGemm,
    rope::{BLOCK_SIZE, RopeWriteKv},
    sampling::{MAX_LOGPROBS, Sample, SampleRow},
    skinny::{Input, Output, SkinnyGemm, Weight},
};

const FLOAT: Float = Float::Bf16;

struct Bench {
    device: Device,
    gbps: f64,
    tflops: f64,
}

fn limit(name: &str, default: f64) -> f64 {
    std::env::var(name)
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(default)
}

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
    fn random(&self, values: usize) -> DeviceBuffer {
        let buffer = self.device.alloc(values * 2).unwrap();
        fill_random(&self.device, FLOAT, buffer.view(), values as u64, 1.0).unwrap();
        buffer
    }

    fn random_f16(&self, values: usize) -> DeviceBuffer {
        let buffer = self.device.alloc(values * 2).unwrap();
        fill_random(&self.device, Float::F16, buffer.view(), values as u64, 1.0).unwrap();
        buffer
    }

    fn i32s(&self, values: &[i32]) -> DeviceBuffer {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let buffer = self.device.alloc(bytes.len()).unwrap();
        self.device.write(&bytes, buffer.view()).unwrap();
        buffer
    }

    /// Median microseconds of one run, from graphs of `runs` runs.
    fn time(&self, runs: usize, mut body: impl FnMut(usize)) -> f64 {
        body(0);
        self.device.synchronize().unwrap();
        let graph = self
            .device
            .capture(|| {
                (0..runs).for_each(&mut body);
                Ok::<(), ashlar_kernels::cuda::CudaError>(())
            })
            .unwrap();
        graph.launch().unwrap();
        let mut times: Vec<f64> = (0..7)
            .map(|_| {
                let start = self.device.record().unwrap();
                graph.launch().unwrap();
                let end = self.device.record().unwrap();
                self.device.synchronize().unwrap();
                f64::from(start.elapsed_ms(&end).unwrap()) * 1e3 / runs as f64
            })
            .collect();
        times.sort_by(f64::total_cmp);
        times[3]
    }

    fn bandwidth(&self, what: &str, us: f64, bytes: f64) {
        let gbps = bytes / us / 1e3;
        println!(
            "{what:52} {us:9.1} µs {gbps:8.0} GB/s {:5.1} %",
            gbps / self.gbps * 100.0
        );
    }

    fn rate(&self, what: &str, us: f64, flop: f64) {
        let tflops = flop / us / 1e6;
        println!(
            "{what:52} {us:9.1} µs {tflops:8.0} TFLOP/s {:5.1} %",
            tflops / self.tflops * 100.0
        );
    }

    /// Four-bit weights in groups of 128, of any bits; their values are checked by the tests.
    fn four_bit_products(&self) {
        for (n, k) in [
            (8192usize, 8192usize),
            (28672, 4096),
            (6144, 4096),
            (4096, 4096),
            (4096, 14336),
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
    fn eight_bit_products(&self) {
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
                gemm(0).tune(&self.device, 3, &[]).unwrap();
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

    fn products(&self) {
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
                gemm(0).tune(&self.device, 3, &[]).unwrap();
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

    /// Rows of one prompt, in pages in order.
    fn rope(&self) {
        let (rows, num_heads, num_kv_heads, head_dim) = (4096, 32, 8, 128);
        let width = (num_heads + 2 * num_kv_heads) * head_dim;
        let kv_width = 2 * num_kv_heads * head_dim;
        let sets = 3;
        let qkv: Vec<DeviceBuffer> = (0..sets).map(|_| self.random(rows * width)).collect();
        let caches: Vec<DeviceBuffer> = (0..sets).map(|_| self.random(rows * kv_width)).collect();
        let table = self.random(rows * head_dim * 2);
        let positions = self.i32s(&(0..rows as i32).collect::<Vec<_>>());
        let slots = self.i32s(
            &(0..rows as i32)
                .flat_map(|row| [row, 0])
                .collect::<Vec<_>>(),
        );
        let us = self.time(2 * sets, |i| {
            RopeWriteKv {
                float: FLOAT,
                qkv: qkv[i % sets].view(),
                norms: None,
                table: table.view(),
                positions: positions.view(),
                slot_mapping: slots.view(),
                cache: caches[i % sets].view(),
                kv_dtype: KvDtype::Float,
                kv_scales: [1.0; 2],
                rows,
                num_heads,
                num_kv_heads,
                head_dim,
                eps: 1e-5,
            }
            .launch(&self.device)
            .unwrap();
        });
        let bytes = (rows * 2 * width * 2) as f64;
        self.bandwidth(&format!("rope and kv write {rows} × {width}"), us, bytes);
    }

    fn elementwise(&self) {
        self.rope();
        let (rows, width) = (8192, 4096);
        let buffers: Vec<DeviceBuffer> = (0..9).map(|_| self.random(rows * width)).collect();
        let weight = self.random(width);
        let us = self.time(6, |i| {
            let b = &buffers[i % 3 * 3..];
            AddNorm {
                float: FLOAT,
                delta: Some(b[0].view()),
                weight: weight.view(),
                residual: b[1].view(),
                out: b[2].view(),
                rows,
                width,
                eps: 1e-5,
            }
            .launch(&self.device)
            .unwrap();
        });
        self.bandwidth("add_norm 8192 × 4096", us, 4.0 * (rows * width * 2) as f64);
        let (gate_up, out) = (self.random(rows * 28672), self.random(rows * 14336));
        let us = self.time(4, |_| {
            SiluMul {
                float: FLOAT,
                gate_up: gate_up.view(),
                out: out.view(),
                rows,
                width: 14336,
            }
            .launch(&self.device)
            .unwrap()
        });
        self.bandwidth("silu_mul 8192 × 14336", us, 3.0 * (rows * 14336 * 2) as f64);
    }

    fn attention(&self) {
        let shape = HeadShape {
            float: FLOAT,
            kv_dtype: KvDtype::Float,
            num_heads: 32,
            num_kv_heads: 8,
            head_dim: 128,
            window: 0,
        };
        for kv_dtype in [KvDtype::Float, KvDtype::Fp8] {
            self.decode_attention(HeadShape { kv_dtype, ..shape });
        }
        self.prefill_attention(shape);
    }

    fn decode_attention(&self, shape: HeadShape) {
        for (batch, length) in [
            (1usize, 1024usize),
            (8, 1024),
            (32, 1024),
            (64, 768),
            (256, 1024),
            (32, 8192),
            (8, 32768),
            (1, 32768),
        ] {
            let pages = length.div_ceil(BLOCK_SIZE);
            let pool = batch * pages;
            let sets = ((600 << 20) / (pool * shape.page_bytes())).clamp(1, 16);
            let caches: Vec<DeviceBuffer> = (0..sets)
                .map(|_| self.random(pool * shape.page_bytes() / 2))
                .collect();
            let ints = |f: &dyn Fn(usize) -> usize, n: usize| {
                self.i32s(&(0..n).map(|i| f(i) as i32).collect::<Vec<_>>())
            };
            let (rows, lens, starts) = (
                ints(&|i| i, batch),
                ints(&|_| length, batch),
                ints(&|i| i * pages, batch),
            );
            let blocks = ints(&|i| (i * 7919) % pool, pool);
            let (qkv, out) = (self.random(batch * 6144), self.random(batch * 4096));
            let arrived = self.device.alloc(batch * 32).unwrap();
            let most = (3 * self.device.multiprocessors() as usize).div_ceil(8);
            let max_items = batch.max(most);
            let mut plan = DecodePlan::default();
            plan.make(&shape, &vec![length as u32; batch], &[], (most, max_items));
            let mut items: Vec<i32> = plan.items.iter().flatten().copied().collect();
            items.resize(max_items * ITEM_WORDS, 0);
            let row_parts: Vec<i32> = plan.row_parts.iter().flatten().copied().collect();
            let (num_items, items, members, row_parts, slots) = (
                self.i32s(&[plan.items.len() as i32]),
                self.i32s(&items),
                self.i32s(&plan.members),
                self.i32s(&row_parts),
                self.i32s(&plan.slots),
            );
            let bytes = max_items * PARTS_PER_ITEM * shape.part_bytes();
            let parts = self.device.alloc(bytes).unwrap();
            let us = self.time(20, |i| {
                DecodeAttention {
                    shape,
                    qkv: qkv.view(),
                    cache: caches[i % sets].view(),
                    kv_scales: [1.0; 2],
                    out: out.view(),
                    plan: PlanView {
                        num_items: num_items.view(),
                        items: items.view(),
                        members: members.view(),
                        row_parts: row_parts.view(),
                        slots: slots.view(),
                    },
                    sequences: Sequences {
                        rows: rows.view(),
                        context_lens: lens.view(),
                        table_starts: starts.view(),
                        blocks: blocks.view(),
                        count: batch,
                    },
                    parts: parts.view(),
                    arrived: arrived.view(),
                    rope: None,
                    shares: false,
                    max_items,
                }
                .launch(&self.device)
                .unwrap();
            });
            let what = format!(
                "decode attention {batch} × {length}{} ({} items)",
                pages_of(shape.kv_dtype),
                plan.items.len()
            );
            self.bandwidth(&what, us, (pool * shape.page_bytes()) as f64);
        }
    }

    fn prefill_attention(&self, shape: HeadShape) {
        for (batch, rows, length) in [
            (1usize, 4096usize, 4096usize),
            (2, 4096, 4096),
            (8, 1024, 1024),
            (16, 512, 512),
            (1, 16384, 16384),
            (8, 128, 2176),
            // Decode by the kernel that is one for all rows.
            (1, 1, 2048),
            (64, 1, 2048),
        ] {
            let pages = batch * length.div_ceil(BLOCK_SIZE);
            let cache = self.random(pages * shape.page_bytes() / 2);
            let mut items = Vec::new();
            prefill_items((0..batch).map(|_| (rows as u32, length as u32)), &mut items);
            let flat: Vec<i32> = items.iter().flatten().copied().collect();
            let ints = |f: &dyn Fn(usize) -> usize, n: usize| {
                self.i32s(&(0..n).map(|i| f(i) as i32).collect::<Vec<_>>())
            };
            let (first, lens, starts) = (
                ints(&|i| i * rows, batch),
                ints(&|_| length, batch),
                ints(&|i| i * length.div_ceil(BLOCK_SIZE), batch),
            );
            let (query_lens, blocks) = (ints(&|_| rows, batch), ints(&|i| i, pages));
            let (qkv, out, list) = (
                self.random(batch * rows * 6144),
                self.random(batch * rows * 4096),
                self.i32s(&flat),
            );
            for (kv_dtype, portable) in [
                (KvDtype::Float, false),
                (KvDtype::Float, true),
                (KvDtype::Fp8, true),
            ] {
                let us = self.time(5, |_| {
                    PrefillAttention {
                        shape: HeadShape { kv_dtype, ..shape },
                        qkv: qkv.view(),
                        cache: cache.view(),
                        kv_scales: [1.0; 2],
                        out: out.view(),
                        items: list.view(),
                        sequences: Sequences {
                            rows: first.view(),
                            context_lens: lens.view(),
                            table_starts: starts.view(),
                            blocks: blocks.view(),
                            count: batch,
                        },
                        query_lens: query_lens.view(),
                        num_items: items.len(),
                        portable,
                    }
                    .launch(&self.device)
                    .unwrap();
                });
                let seen = (length - rows) as f64 * rows as f64 + rows as f64 * rows as f64 / 2.0;
                self.rate(
                    &format!(
                        "prefill attention {batch} × {rows} of {length}{}{}",
                        pages_of(kv_dtype),
                        if portable { " (portable)" } else { "" }
                    ),
                    us,
                    4.0 * seen * 4096.0 * batch as f64,
                );
            }
        }
    }

    fn sampling(&self) {
        let vocab = 128_256;
        for count in [1usize, 128] {
            for (what, row) in [
                (
                    "greedy",
                    SampleRow {
                        temperature: 0.0,
                        top_p: 1.0,
                        mask: -1,
                        ..SampleRow::default()
                    },
                ),
                (
                    "all",
                    SampleRow {
                        temperature: 1.0,
                        top_p: 1.0,
                        mask: -1,
                        ..SampleRow::default()
                    },
                ),
                (
                    "top-p 0.9",
                    SampleRow {
                        temperature: 0.7,
                        top_p: 0.9,
                        mask: -1,
                        ..SampleRow::default()
                    },
                ),
                (
                    "top-k 50, top-p 0.9",
                    SampleRow {
                        temperature: 0.7,
                        top_k: 50,
                        top_p: 0.9,
                        mask: -1,
                        ..SampleRow::default()
                    },
                ),
            ] {
                let bytes: Vec<u8> = (0..count)
                    .flat_map(|i| {
                        SampleRow {
                            logit_row: i as u32,
                            slot: i as u32,
                            ..row
                        }
                        .to_bytes()
                    })
                    .collect();
                let rows = self.device.alloc(bytes.len()).unwrap();
                self.device.write(&bytes, rows.view()).unwrap();
                // Logits as a model has them: a few large ones.
                let mut x = 1u64;
                let values: Vec<u8> = (0..count * vocab)
                    .flat_map(|_| {
                        x = x
                            .wrapping_mul(6364136223846793005)
                            .wrapping_add(1442695040888963407);
                        let u = (x >> 40) as f32 / 16_777_216.0;
                        (-(1.0 - u + 1e-7).ln() * 1.5).to_le_bytes()
                    })
                    .collect();
                let logits = self.device.alloc(values.len()).unwrap();
                self.device.write(&values, logits.view()).unwrap();
                let small = |bytes: usize| self.device.alloc(bytes).unwrap();
                let (last, tokens, logprobs, ids, extra) = (
                    small(4096),
                    small(4096),
                    small(count * (MAX_LOGPROBS + 1) * 4),
                    small(count * MAX_LOGPROBS * 4),
                    small(16),
                );
                let us = self.time(10, |_| {
                    Sample {
                        logits: logits.view(),
                        rows: rows.view(),
                        extra: extra.view(),
                        counts: None,
                        last_tokens: last.view(),
                        tokens: tokens.view(),
                        logprobs: logprobs.view(),
                        logprob_ids: ids.view(),
                        count,
                        vocab,
                    }
                    .launch(&self.device)
                    .unwrap();
                });
                println!(
                    "{:52} {us:9.1} µs",
                    format!("sample {count} × {vocab}, {what}")
                );
            }
        }
    }
}

/// What a line says of a cache's type.
fn pages_of(kv_dtype: KvDtype) -> &'static str {
    match kv_dtype {
        KvDtype::Float => "",
        KvDtype::Fp8 => ", fp8 pages",
    }
}

type Section = fn(&Bench);

fn main() {
    let device = Device::open(0).unwrap();
    device.bind().unwrap();
    println!(
        "{} ({} multiprocessors)",
        device.name().unwrap(),
        device.multiprocessors()
    );
    let bench = Bench {
        device,
        gbps: limit("ASHLAR_GPU_GBPS", 4550.0),
        tflops: limit("ASHLAR_GPU_TFLOPS", 790.0),
    };
    let sections: [(&str, Section); 6] = [
        ("elementwise", Bench::elementwise),
        ("attention", Bench::attention),
        ("sampling", Bench::sampling),
        ("int4", Bench::four_bit_products),
        ("fp8", Bench::eight_bit_products),
        ("products", Bench::products),
    ];
    let asked: Vec<String> = std::env::args().skip(1).collect();
    for (name, run) in sections {
        if asked.is_empty() || asked.iter().any(|section| section == name) {
            run(&bench);
        }
    }
}
