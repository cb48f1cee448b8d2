//! Times the host kernels on the default model's shapes and adds them up to tokens per second.
//!
//! `cargo run --release -p ashlar-kernels --example cpu_bench [threads [scalar|avx2|avx512]]`. A product is timed only after it agreed with
//! the reference.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints"
)]

use std::time::Instant;

use ashlar_kernels::{
    cpu::{
        AttentionArgs, AttentionSeq, BlockFormat, Isa, KvDtype, KvLayout, LayerCache, MatmulInput,
        PackedMatrix, QuantizedRows, ThreadPool, attention::paged_attention_with, elementwise,
        matmul::matmul_with,
    },
    reference,
};

const LAYERS: f64 = 30.0;

fn main() {
    let threads = std::env::args().nth(1).map_or_else(
        || std::thread::available_parallelism().unwrap().get(),
        |n| n.parse().expect("a number of threads"),
    );
    let pool = ThreadPool::new(threads);
    let isa = match std::env::args().nth(2).as_deref() {
        Some("scalar") => Isa::Scalar,
        Some("avx2") => Isa::Avx2,
        Some("avx512") => Isa::Avx512,
        _ => Isa::detect(),
    };
    println!("{isa:?}, {threads} threads");
    println!(
        "empty loop {:.2} µs",
        best(2000, || pool.run(threads, &|_, _| ())) * 1e6
    );
    let big: Vec<u64> = vec![1; 32 << 20];
    let read = best(5, || {
        let parts: Vec<&[u64]> = big.chunks(1 << 18).collect();
        pool.run(parts.len(), &|task, _| {
            std::hint::black_box(parts[task].iter().fold(0u64, |a, b| a.wrapping_add(*b)));
        });
    });
    println!(
        "memory read {:.1} GB/s",
        (big.len() * 8) as f64 / read / 1e9
    );
    for rows in [1, 4, 16, 128, 512, 1024] {
        let layer: f64 = [(960, 576), (576, 576), (3072, 576), (576, 1536)]
            .into_iter()
            .map(|(n, k)| product(isa, &pool, BlockFormat::Q4_1, rows, n, k))
            .sum();
        let head = product(isa, &pool, BlockFormat::Q8_0, rows.min(16), 49152, 576);
        let norm = time_norm(&pool, rows);
        let attention = time_attention(isa, &pool, rows);
        let step = LAYERS * (layer + 2.0 * norm + attention) + head;
        println!(
            "rows {rows}: layer {:.0} µs, attention {:.0} µs, norm {:.1} µs, head {:.2} ms → {:.0} tokens/s",
            layer * 1e6,
            attention * 1e6,
            norm * 1e6,
            head * 1e3,
            rows as f64 / step
        );
    }
}

fn best(times: usize, mut run: impl FnMut()) -> f64 {
    run();
    (0..times)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

fn product(
    isa: Isa,
    pool: &ThreadPool,
    format: BlockFormat,
    rows: usize,
    n: usize,
    k: usize,
) -> f64 {
    let mut data: Vec<u8> = (0..format.row_bytes(k).unwrap() * n)
        .map(|i| (i * 131 % 251) as u8)
        .collect();
    for block in data.chunks_exact_mut(format.block_bytes()) {
        block[..2].copy_from_slice(&half::f16::from_f32(0.01).to_le_bytes());
        if format == BlockFormat::Q4_1 {
            block[2..4].copy_from_slice(&half::f16::from_f32(-0.07).to_le_bytes());
        }
    }
    // Several copies, so that weights come from memory as they do in a model.
    let copies: Vec<PackedMatrix> = (0..(64 << 20) / data.len() + 1)
        .map(|_| PackedMatrix::from_rows(format, n, k, &data).unwrap())
        .collect();
    let x: Vec<f32> = (0..rows * k)
        .map(|i| ((i * 7 % 31) as f32 - 15.0) / 15.0)
        .collect();
    let mut quantized = QuantizedRows::default();
    let mut y = vec![0.0; rows * n];
    quantized.quantize_with(isa, pool, &x, k);
    let input = MatmulInput {
        x: &x,
        quantized: Some(&quantized),
        rows,
    };
    matmul_with(isa, pool, &copies[0], input, &mut y, n, 0);
    let mut plain = vec![0.0; n * k];
    format.dequantize(&data, &mut plain).unwrap();
    let (_, cosine) = reference::difference(&y[..n], &reference::matmul(&x[..k], &plain, k));
    assert!(cosine > 0.9995, "wrong product, cosine {cosine}: not timed");
    let mut next = 0;
    let time = best(30, || {
        quantized.quantize_with(isa, pool, &x, k);
        let input = MatmulInput {
            x: &x,
            quantized: Some(&quantized),
            rows,
        };
        matmul_with(isa, pool, &copies[next % copies.len()], input, &mut y, n, 0);
        next += 1;
    });
    println!(
        "  {format:?} {rows}×{n}×{k}: {:.1} µs, {:.0} GFLOP/s, weights at {:.1} GB/s",
        time * 1e6,
        2.0 * (rows * n * k) as f64 / time / 1e9,
        copies[0].bytes() as f64 / time / 1e9
    );
    time
}

fn time_norm(pool: &ThreadPool, rows: usize) -> f64 {
    let (delta, weight) = (vec![0.5; rows * 576], vec![1.0; 576]);
    let (mut residual, mut out) = (vec![0.1; rows * 576], vec![0.0; rows * 576]);
    best(50, || {
        elementwise::add_rms_norm(pool, &delta, &weight, 1e-5, &mut residual, &mut out)
    })
}

/// `rows ≤ 16`: decode at context 512; otherwise one prompt of `rows` tokens.
fn time_attention(isa: Isa, pool: &ThreadPool, rows: usize) -> f64 {
    let (context, query, count) = if rows <= 16 {
        (512, 1, rows)
    } else {
        (rows, rows, 1)
    };
    let blocks = context / 16;
    let layout = KvLayout {
        num_blocks: count * blocks + 1,
        kv_heads: 3,
        head_dim: 64,
        dtype: KvDtype::F16,
    };
    let mut cache = LayerCache::new(layout).unwrap();
    let slots: Vec<i64> = (0..(layout.num_blocks * 16) as i64).collect();
    let kv: Vec<f32> = (0..slots.len() * 384)
        .map(|i| ((i * 13 % 29) as f32 - 14.0) / 14.0)
        .collect();
    cache.write(pool, &slots, &kv, 384, 0, 192);
    let tables: Vec<Vec<u32>> = (0..count)
        .map(|s| (0..blocks).map(|b| (1 + s * blocks + b) as u32).collect())
        .collect();
    let seqs: Vec<AttentionSeq<'_>> = tables
        .iter()
        .enumerate()
        .map(|(s, table)| AttentionSeq {
            query_start: s * query,
            query_len: query,
            context_len: context,
            block_table: table,
        })
        .collect();
    let q = vec![0.3; rows * 576];
    let mut out = vec![0.0; rows * 576];
    let args = AttentionArgs {
        q: &q,
        q_stride: 576,
        heads: 9,
        scale: 0.125,
        window: None,
        seqs: &seqs,
    };
    best(20, || {
        paged_attention_with(isa, pool, &cache, &args, &mut out)
    })
}
