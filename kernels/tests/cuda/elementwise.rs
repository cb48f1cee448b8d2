//! Norms, SiLU·up, gathering.

use ashlar_kernels::cuda::elementwise::{AddNorm, EmbedNorm, GatherRows, SiluMul};

use crate::support::*;

pub(super) fn norm(row: &[f32], weight: &[f32], eps: f64) -> Vec<f64> {
    let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / row.len() as f64;
    let scale = 1.0 / (mean + eps).sqrt();
    let pairs = row.iter().zip(weight);
    pairs
        .map(|(v, w)| f64::from(*v) * scale * f64::from(*w))
        .collect()
}

#[test]
fn embedding_and_norm() {
    for float in FLOATS {
        for (rows, width) in [
            (1, 8),
            (3, 576),
            (17, 1536),
            (5, 4096),
            (2, 8200),
            (1, 32768),
        ] {
            let mut random = Random(width as u64);
            let vocab = 50;
            let table = random.values(float, vocab * width);
            let weight = random.values(float, width);
            // The last row takes what slot 4 drew last.
            let mut tokens: Vec<u32> = (0..rows).map(|_| random.below(vocab) as u32).collect();
            let last = tokens[rows - 1];
            tokens[rows - 1] = u32::MAX;
            let slots = vec![4; rows];
            let mut last_tokens = vec![7; 5];
            last_tokens[4] = last;
            let (residual, out) = (poisoned(rows * width * 2), poisoned(rows * width * 2));
            let sums = poisoned(rows * 4);
            // In one table, or in two of 25 rows.
            let whole = upload(float, &table);
            let half = vocab / 2 * width * 2;
            let halves = [whole.view().slice(0, half), whole.view().from(half)];
            let tables = if rows == 3 {
                &halves[..]
            } else {
                &[whole.view()]
            };
            EmbedNorm {
                float,
                tokens: upload_u32(&tokens).view(),
                row_slots: upload_i32(&slots).view(),
                last_tokens: upload_u32(&last_tokens).view(),
                tables,
                table_rows: vocab / tables.len(),
                weight: upload(float, &weight).view(),
                residual: residual.view(),
                out: out.view(),
                sums: Some(sums.view()),
                rows,
                width,
                eps: 1e-5,
            }
            .launch(device())
            .unwrap();
            tokens[rows - 1] = last;
            let picked = |t: &u32| &table[*t as usize * width..(*t as usize + 1) * width];
            let expected: Vec<f64> = tokens
                .iter()
                .flat_map(|t| norm(picked(t), &weight, 1e-5))
                .collect();
            let stream: Vec<f32> = tokens.iter().flat_map(picked).copied().collect();
            assert_eq!(download(float, &residual, rows * width), stream);
            assert_close(
                "norm",
                float,
                &download(float, &out, rows * width),
                &expected,
            );
            let squares: Vec<f64> = stream
                .chunks(width)
                .map(|row| row.iter().map(|v| f64::from(*v).powi(2)).sum())
                .collect();
            assert_close_to("sums", 1e-5, &download_f32(&sums, rows), &squares);
        }
    }
}

#[test]
fn residual_sum_and_norm() {
    for float in FLOATS {
        for (rows, width) in [(1, 8), (3, 576), (33, 4096), (2, 14336)] {
            let mut random = Random(rows as u64);
            let delta = random.values(float, rows * width);
            let before = random.values(float, rows * width);
            let weight = random.values(float, width);
            let (residual, out) = (upload(float, &before), poisoned(rows * width * 2));
            let (delta_gpu, weight_gpu) = (upload(float, &delta), upload(float, &weight));
            let add_norm = AddNorm {
                float,
                delta: Some(delta_gpu.view()),
                weight: weight_gpu.view(),
                residual: residual.view(),
                out: out.view(),
                rows,
                width,
                eps: 1e-6,
            };
            add_norm.launch(device()).unwrap();
            let sums: Vec<f32> = delta
                .iter()
                .zip(&before)
                .map(|(a, b)| round(float, a + b))
                .collect();
            assert_eq!(download(float, &residual, rows * width), sums);
            let expected: Vec<f64> = sums
                .chunks(width)
                .flat_map(|row| norm(row, &weight, 1e-6))
                .collect();
            let normed = download(float, &out, rows * width);
            assert_close("norm", float, &normed, &expected);
            // What has been added is normed as it is.
            device().fill(out.view(), 0xFF).unwrap();
            let norm = AddNorm {
                delta: None,
                ..add_norm
            };
            norm.launch(device()).unwrap();
            assert_eq!(download(float, &out, rows * width), normed);
            assert_eq!(download(float, &residual, rows * width), sums);
        }
    }
}

#[test]
fn silu_and_gathering() {
    for float in FLOATS {
        for (rows, width) in [(1, 8), (7, 1536), (130, 264)] {
            let mut random = Random(99);
            let gate_up = random.values(float, rows * 2 * width);
            let out = poisoned(rows * width * 2);
            let gate_up_gpu = upload(float, &gate_up);
            SiluMul {
                float,
                gate_up: gate_up_gpu.view(),
                out: out.view(),
                rows,
                width,
            }
            .launch(device())
            .unwrap();
            let silu = |g: f32, u: f32| f64::from(g) / (1.0 + (-f64::from(g)).exp()) * f64::from(u);
            let expected: Vec<f64> = gate_up
                .chunks(2 * width)
                .flat_map(|row| (0..width).map(|i| silu(row[i], row[width + i])))
                .collect();
            assert_close(
                "silu",
                float,
                &download(float, &out, rows * width),
                &expected,
            );

            let order = random.shuffled(rows);
            let rows_gpu: Vec<i32> = order.iter().map(|row| *row as i32).collect();
            let gathered = poisoned(rows * 2 * width * 2);
            GatherRows {
                input: gate_up_gpu.view(),
                rows: upload_i32(&rows_gpu).view(),
                out: gathered.view(),
                count: rows,
                width: 2 * width,
            }
            .launch(device())
            .unwrap();
            let expected: Vec<f32> = order
                .iter()
                .flat_map(|row| gate_up[row * 2 * width..(row + 1) * 2 * width].to_vec())
                .collect();
            assert_eq!(download(float, &gathered, rows * 2 * width), expected);
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let buffer = device().alloc(1024).unwrap();
    let view = buffer.view();
    let float = FLOATS[0];
    let norm = |rows, width| {
        AddNorm {
            float,
            delta: Some(view),
            weight: view,
            residual: view,
            out: view,
            rows,
            width,
            eps: 1e-5,
        }
        .launch(device())
    };
    for (rows, width) in [(1, 7), (1, 0), (3, 512), (1, 40_000)] {
        let message = norm(rows, width).unwrap_err().to_string();
        assert!(message.contains("add_norm"), "{message}");
    }
}
