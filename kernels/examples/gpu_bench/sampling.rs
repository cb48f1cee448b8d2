//! Sampling from the logits of a large vocabulary.

use ashlar_kernels::cuda::sampling::{MAX_LOGPROBS, Sample, SampleRow};

use super::Bench;

impl Bench {
    pub(super) fn sampling(&self) {
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
