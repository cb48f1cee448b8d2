//! Attention of decode steps and of prompts.

use ashlar_kernels::cuda::{
    DeviceBuffer, KvDtype,
    attention::{DecodeAttention, HeadShape, PlanView, PrefillAttention, Sequences, prefill_items},
    decode_plan::{Cut, DecodePlan, ITEM_WORDS, PARTS_PER_ITEM},
    rope::BLOCK_SIZE,
};

use super::{Bench, FLOAT};

impl Bench {
    pub(super) fn attention(&self) {
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
            (1usize, 256usize),
            (1, 512),
            (1, 1024),
            (2, 1024),
            (4, 1024),
            (16, 1024),
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
            let processors = self.device.multiprocessors();
            let mut cuts = vec![Cut::shared(&shape, batch, processors)];
            cuts.extend(Some(Cut::alone(&shape, batch, processors)).filter(|cut| cut.wide));
            for cut in cuts {
                let mut plan = DecodePlan::default();
                plan.make(&shape, &vec![length as u32; batch], &[], &cut);
                let mut items: Vec<i32> = plan.items.iter().flatten().copied().collect();
                items.resize(cut.max_items * ITEM_WORDS, 0);
                let row_parts: Vec<i32> = plan.row_parts.iter().flatten().copied().collect();
                let (num_items, items, members, row_parts, slots) = (
                    self.i32s(&[plan.items.len() as i32]),
                    self.i32s(&items),
                    self.i32s(&plan.members),
                    self.i32s(&row_parts),
                    self.i32s(&plan.slots),
                );
                let bytes = cut.max_items * PARTS_PER_ITEM * shape.part_bytes();
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
                        cut,
                    }
                    .launch(&self.device)
                    .unwrap();
                });
                let what = format!(
                    "decode attention {batch} × {length}{} ({} {} items)",
                    pages_of(shape.kv_dtype),
                    plan.items.len(),
                    if cut.wide { "wide" } else { "narrow" },
                );
                self.bandwidth(&what, us, (pool * shape.page_bytes()) as f64);
            }
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
                (KvDtype::Fp8, false),
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
}

/// What a line says of a cache's type.
fn pages_of(kv_dtype: KvDtype) -> &'static str {
    match kv_dtype {
        KvDtype::Float => "",
        KvDtype::Fp8 => ", fp8 pages",
    }
}
