//! Random values and weights, and a product that sees what is written beside its result.

use ashlar_kernels::cpu::{
    BlockFormat, Isa, MatmulInput, PackedMatrix, QuantizedRows, ThreadPool, matmul::matmul_with,
};

/// Deterministic values in −1..1.
pub(crate) fn values(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// Random valid blocks of a format: any bytes, with small finite scales.
pub(crate) fn blocks(format: BlockFormat, seed: u64, rows: usize, columns: usize) -> Vec<u8> {
    let bytes = format.row_bytes(columns).unwrap() * rows;
    let mut data: Vec<u8> = values(seed, bytes)
        .iter()
        .map(|v| (v * 127.0) as i8 as u8)
        .collect();
    let scales: &[usize] = match format {
        BlockFormat::Q4_0 | BlockFormat::Q8_0 | BlockFormat::Q5_0 => &[0],
        BlockFormat::Q4_1 | BlockFormat::Q5_1 | BlockFormat::Q4K | BlockFormat::Q5K => &[0, 2],
        BlockFormat::Q6K => &[208],
        _ => &[],
    };
    for (i, block) in data.chunks_exact_mut(format.block_bytes()).enumerate() {
        for (j, at) in scales.iter().enumerate() {
            let scale = half::f16::from_f32(0.01 + 0.001 * (i % 7 + j) as f32);
            block[*at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
    }
    data
}

pub(crate) fn product(
    isa: Isa,
    pool: &ThreadPool,
    w: &PackedMatrix,
    x: &[f32],
    rows: usize,
) -> Vec<f32> {
    let mut quantized = QuantizedRows::default();
    if w.is_quantized() {
        quantized.quantize(pool, x, w.columns());
    }
    let input = MatmulInput {
        x,
        quantized: w.is_quantized().then_some(&quantized),
        rows,
    };
    // One column of slack on each side, to see that nothing else is written.
    let stride = w.rows() + 2;
    let mut y = vec![7.0; rows * stride];
    matmul_with(isa, pool, w, input, &mut y, stride, 1);
    y.chunks_exact(stride)
        .flat_map(|row| {
            assert_eq!((row[0], row[stride - 1]), (7.0, 7.0));
            row[1..stride - 1].to_vec()
        })
        .collect()
}
