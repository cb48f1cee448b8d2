//! Rotation, head norms, and where K and V land.

use ashlar_kernels::{
    cuda::{
        Float, KvDtype,
        rope::{BLOCK_SIZE, RopeWriteKv, rope_table},
    },
    e4m3,
};

use crate::support::*;

/// Eight-bit ones with scales that cut the largest values.
const KV: [(KvDtype, [f32; 2]); 2] = [(KvDtype::Float, [1.0; 2]), (KvDtype::Fp8, [0.0025, 0.002])];
const HEADS: [(usize, usize, usize, bool); 4] = [
    (9, 3, 64, false),
    (4, 1, 128, true),
    (2, 2, 96, false),
    (3, 1, 256, true),
];

#[test]
fn rotates_norms_and_writes_pages() {
    for (float, (kv_dtype, kv_scales)) in FLOATS
        .into_iter()
        .flat_map(|float| KV.map(|kv| (float, kv)))
    {
        for (heads, kv_heads, dim, normed) in HEADS {
            let mut random = Random(dim as u64);
            let (rows, positions, blocks) = (19, 500, 6);
            let all = heads + 2 * kv_heads;
            let qkv = random.values(float, rows * all * dim);
            let at: Vec<u32> = (0..rows).map(|_| random.below(positions) as u32).collect();
            let mut slots: Vec<i64> = random.shuffled(blocks * BLOCK_SIZE)[..rows]
                .iter()
                .map(|s| *s as i64)
                .collect();
            slots[3] = -1;
            let norms = (random.values(float, dim), random.values(float, dim));
            let frequencies: Vec<f64> = (0..dim / 2)
                .map(|i| 10_000f64.powf(-2.0 * i as f64 / dim as f64))
                .collect();
            let bytes: Vec<u8> = frequencies.iter().flat_map(|f| f.to_le_bytes()).collect();
            let table = poisoned(positions * dim / 2 * 8);
            rope_table(
                device(),
                upload_bytes(&bytes).view(),
                table.view(),
                dim / 2,
                positions,
            )
            .unwrap();
            let page = 2 * kv_heads * BLOCK_SIZE * dim;
            let cache = poisoned(blocks * page * kv_dtype.bytes());
            let slot_bytes: Vec<u8> = slots.iter().flat_map(|s| s.to_le_bytes()).collect();
            let gpu = upload(float, &qkv);
            let (query_norm, key_norm) = (upload(float, &norms.0), upload(float, &norms.1));
            RopeWriteKv {
                float,
                kv_dtype,
                kv_scales,
                qkv: gpu.view(),
                norms: normed.then(|| (query_norm.view(), key_norm.view())),
                table: table.view(),
                positions: upload_u32(&at).view(),
                slot_mapping: upload_bytes(&slot_bytes).view(),
                cache: cache.view(),
                rows,
                num_heads: heads,
                num_kv_heads: kv_heads,
                head_dim: dim,
                eps: 1e-6,
            }
            .launch(device())
            .unwrap();
            let turn = |row: usize, head: usize, norm: &[f32]| -> Vec<f64> {
                let values = &qkv[(row * all + head) * dim..][..dim];
                let mut x: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
                if normed {
                    let mean = x.iter().map(|v| v * v).sum::<f64>() / dim as f64;
                    x = x
                        .iter()
                        .zip(norm)
                        .map(|(v, w)| v / (mean + 1e-6).sqrt() * f64::from(*w))
                        .collect();
                }
                (0..dim)
                    .map(|i| {
                        let pair = i % (dim / 2);
                        let (sin, cos) = (f64::from(at[row]) * frequencies[pair]).sin_cos();
                        let (low, high) = (x[pair], x[pair + dim / 2]);
                        if i < dim / 2 {
                            low * cos - high * sin
                        } else {
                            high * cos + low * sin
                        }
                    })
                    .collect()
            };
            let after = download(float, &gpu, rows * all * dim);
            let bytes = device().read(cache.view()).unwrap();
            let pages = page_values_of(float, kv_dtype, &bytes);
            let (mut q, mut q_expected) = (Vec::new(), Vec::new());
            let (mut k, mut k_expected) = (Vec::new(), Vec::new());
            for row in 0..rows {
                for head in 0..heads {
                    q.extend_from_slice(&after[(row * all + head) * dim..][..dim]);
                    q_expected.extend(turn(row, head, &norms.0));
                }
                if slots[row] < 0 {
                    continue;
                }
                let (block, offset) = (
                    slots[row] as usize / BLOCK_SIZE,
                    slots[row] as usize % BLOCK_SIZE,
                );
                for kv_head in 0..kv_heads {
                    let keys = block * page + kv_head * BLOCK_SIZE * dim;
                    let values = keys + kv_heads * BLOCK_SIZE * dim;
                    k.extend_from_slice(&pages[keys + offset * dim..][..dim]);
                    k_expected.extend(turn(row, heads + kv_head, &norms.1));
                    let stored: Vec<f32> = (0..dim)
                        .map(|i| pages[values + i * BLOCK_SIZE + offset])
                        .collect();
                    let given = &qkv[(row * all + heads + kv_heads + kv_head) * dim..][..dim];
                    let given = given.iter().map(|v| match kv_dtype {
                        KvDtype::Float => *v,
                        KvDtype::Fp8 => e4m3::widen(e4m3::narrow(v * kv_scales[1].recip())),
                    });
                    assert_eq!(stored, given.collect::<Vec<f32>>());
                }
            }
            assert_close("q", float, &q, &q_expected);
            match kv_dtype {
                KvDtype::Float => assert_close("k", float, &k, &k_expected),
                KvDtype::Fp8 => assert_nearest(float, kv_scales[0], &k, &k_expected),
            }
            let written = slots.iter().filter(|slot| **slot >= 0).count() * 2 * kv_heads * dim;
            assert_eq!(pages.iter().filter(|v| !v.is_nan()).count(), written);
        }
    }
}

/// `stored` are the nearest eight-bit floats to `expected / scale`, but for what computing in `float` adds.
fn assert_nearest(float: Float, scale: f32, stored: &[f32], expected: &[f64]) {
    let most = f64::from(e4m3::MAX);
    let wanted: Vec<f64> = expected.iter().map(|v| v / f64::from(scale)).collect();
    let largest = wanted.iter().fold(0f64, |largest, v| largest.max(v.abs()));
    assert!(largest > most, "none is cut");
    // A norm and a sum are rounded.
    let rounding = match float {
        Float::Bf16 => 2.0 / 256.0,
        Float::F16 => 2.0 / 2048.0,
    };
    for (stored, wanted) in stored.iter().zip(wanted) {
        let wanted = wanted.clamp(-most, most);
        // Half of a step: a sixteenth of the power of two below, or 2⁻¹⁰.
        let allowed = (wanted.abs() / 16.0).max(1.0 / 1024.0) + rounding * largest;
        let off = (f64::from(*stored) - wanted).abs();
        assert!(off <= allowed, "{stored}, not {wanted}");
    }
}
