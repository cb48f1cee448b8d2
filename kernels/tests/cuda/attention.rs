//! Paged attention over shuffled pages with NaN in everything unused, against plain softmax in f64.

use ashlar_kernels::cuda::{
    DeviceBuffer, Float,
    attention::{
        DecodeAttention, DecodeRope, HeadShape, PlanView, PrefillAttention, Sequences,
        prefill_items,
    },
    decode_plan::{DecodePlan, ITEM_WORDS, PARTS_PER_ITEM, SharedPrefix},
    rope::{BLOCK_SIZE, RopeWriteKv, rope_table},
};

use crate::support::*;

struct Case {
    shape: HeadShape,
    /// (rows, tokens up to and including the last row)
    seqs: Vec<(usize, usize)>,
}

struct Data {
    qkv: Vec<f32>,
    qkv_gpu: DeviceBuffer,
    cache: DeviceBuffer,
    /// `[seq][kv_head][token][dim]`
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    first_rows: Vec<i32>,
    table_starts: Vec<i32>,
    blocks: Vec<i32>,
    rows: usize,
}

impl Case {
    fn data(&self, seed: u64) -> Data {
        let mut random = Random(seed);
        let shape = &self.shape;
        let (float, dim, kv_heads) = (shape.float, shape.head_dim, shape.num_kv_heads);
        let stride = (shape.num_heads + 2 * kv_heads) * dim;
        let rows: usize = self.seqs.iter().map(|(rows, _)| rows).sum();
        // Queries large enough for softmax to be far from flat.
        let qkv: Vec<f32> = random
            .values(float, rows * stride)
            .iter()
            .map(|v| round(float, v * 3.0))
            .collect();
        let pages: usize = self
            .seqs
            .iter()
            .map(|(_, len)| len.div_ceil(BLOCK_SIZE))
            .sum();
        let order = random.shuffled(pages + 3);
        let page = 2 * kv_heads * BLOCK_SIZE * dim;
        let mut pool = vec![f32::NAN; (pages + 3) * page];
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let (mut table_starts, mut blocks, mut first_rows) = (Vec::new(), Vec::new(), Vec::new());
        let (mut next, mut row) = (0, 0);
        for (query_len, len) in &self.seqs {
            first_rows.push(row as i32);
            row += query_len;
            table_starts.push(blocks.len() as i32);
            let (k, v) = (
                random.values(float, kv_heads * len * dim),
                random.values(float, kv_heads * len * dim),
            );
            for logical in 0..len.div_ceil(BLOCK_SIZE) {
                let block = order[next];
                next += 1;
                blocks.push(block as i32);
                for token in logical * BLOCK_SIZE..(*len).min((logical + 1) * BLOCK_SIZE) {
                    let offset = token % BLOCK_SIZE;
                    for head in 0..kv_heads {
                        let from = (head * len + token) * dim;
                        let k_at = block * page + head * BLOCK_SIZE * dim;
                        let v_at = k_at + kv_heads * BLOCK_SIZE * dim;
                        for d in 0..dim {
                            pool[k_at + offset * dim + d] = k[from + d];
                            pool[v_at + d * BLOCK_SIZE + offset] = v[from + d];
                        }
                    }
                }
            }
            keys.push(k);
            values.push(v);
        }
        Data {
            qkv_gpu: upload(float, &qkv),
            qkv,
            cache: upload(float, &pool),
            keys,
            values,
            first_rows,
            table_starts,
            blocks,
            rows,
        }
    }

    fn expected(&self, data: &Data) -> Vec<f64> {
        let shape = &self.shape;
        let (dim, group) = (shape.head_dim, shape.num_heads / shape.num_kv_heads);
        let stride = (shape.num_heads + 2 * shape.num_kv_heads) * dim;
        let mut out = vec![0.0; data.rows * shape.num_heads * dim];
        for (seq, (query_len, len)) in self.seqs.iter().enumerate() {
            for i in 0..*query_len {
                let row = data.first_rows[seq] as usize + i;
                let last = len - query_len + i;
                let first = if shape.window == 0 {
                    0
                } else {
                    (last + 1).saturating_sub(shape.window)
                };
                for head in 0..shape.num_heads {
                    let q = &data.qkv[row * stride + head * dim..][..dim];
                    let at = |token: usize| (head / group * len + token) * dim;
                    let score = |token: usize| -> f64 {
                        let k = &data.keys[seq][at(token)..][..dim];
                        q.iter()
                            .zip(k)
                            .map(|(a, b)| f64::from(*a) * f64::from(*b))
                            .sum::<f64>()
                            / (dim as f64).sqrt()
                    };
                    let scores: Vec<f64> = (first..=last).map(score).collect();
                    let max = scores.iter().copied().fold(f64::MIN, f64::max);
                    let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                    let result = &mut out[(row * shape.num_heads + head) * dim..][..dim];
                    for (token, score) in (first..=last).zip(&scores) {
                        let weight = (score - max).exp() / total;
                        let v = &data.values[seq][at(token)..][..dim];
                        for (r, v) in result.iter_mut().zip(v) {
                            *r += weight * f64::from(*v);
                        }
                    }
                }
            }
        }
        out
    }

    fn decode(&self, data: &Data, max_items: usize) -> Vec<f32> {
        self.decode_by(data, &[], max_items, None)
    }

    fn decode_by(
        &self,
        data: &Data,
        shared: &[SharedPrefix],
        max_items: usize,
        rope: Option<DecodeRope<'_>>,
    ) -> Vec<f32> {
        let shape = self.shape;
        let lengths: Vec<u32> = self.seqs.iter().map(|(_, len)| *len as u32).collect();
        let mut plan = DecodePlan::default();
        plan.make(&shape, &lengths, shared, (max_items, max_items));
        assert!(plan.items.len() <= max_items);
        let mut items: Vec<i32> = plan.items.iter().flatten().copied().collect();
        items.resize(max_items * ITEM_WORDS, 1 << 30);
        let count = self.seqs.len();
        let out = poisoned(data.rows * shape.num_heads * shape.head_dim * 2);
        let parts = poisoned(max_items * PARTS_PER_ITEM * shape.part_bytes());
        let arrived = device().alloc(count * shape.num_kv_heads * 4).unwrap();
        let row_parts: Vec<i32> = plan.row_parts.iter().flatten().copied().collect();
        let (num_items, items, members) = (
            upload_i32(&[plan.items.len() as i32]),
            upload_i32(&items),
            upload_i32(&plan.members),
        );
        let (row_parts, slots) = (upload_i32(&row_parts), upload_i32(&plan.slots));
        let (rows, starts, blocks) = (
            upload_i32(&data.first_rows),
            upload_i32(&data.table_starts),
            upload_i32(&data.blocks),
        );
        let lens: Vec<i32> = lengths.iter().map(|len| *len as i32).collect();
        let lens = upload_i32(&lens);
        let attention = DecodeAttention {
            shape,
            qkv: data.qkv_gpu.view(),
            cache: data.cache.view(),
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
                count,
            },
            parts: parts.view(),
            arrived: arrived.view(),
            rope,
            shares: plan.items.iter().any(|item| item[1] > 1),
            max_items,
        };
        attention.launch(device()).unwrap();
        let first = download(
            shape.float,
            &out,
            data.rows * shape.num_heads * shape.head_dim,
        );
        // Counters are back at zero: a second launch gives the same, bit for bit.
        device().fill(out.view(), 0xFF).unwrap();
        attention.launch(device()).unwrap();
        assert_eq!(first, download(shape.float, &out, first.len()));
        first
    }

    fn prefill(&self, data: &Data) -> Vec<f32> {
        self.prefill_by(data, false)
    }

    fn prefill_by(&self, data: &Data, portable: bool) -> Vec<f32> {
        let shape = self.shape;
        let mut items = Vec::new();
        prefill_items(
            self.seqs
                .iter()
                .map(|(rows, len)| (*rows as u32, *len as u32)),
            &mut items,
        );
        let flat: Vec<i32> = items.iter().flatten().copied().collect();
        let out = poisoned(data.rows * shape.num_heads * shape.head_dim * 2);
        let column = |pick: fn(&(usize, usize)) -> usize| -> DeviceBuffer {
            let values: Vec<i32> = self.seqs.iter().map(|seq| pick(seq) as i32).collect();
            upload_i32(&values)
        };
        let (query_lens, context_lens) = (column(|seq| seq.0), column(|seq| seq.1));
        let (rows, starts, blocks) = (
            upload_i32(&data.first_rows),
            upload_i32(&data.table_starts),
            upload_i32(&data.blocks),
        );
        PrefillAttention {
            shape,
            qkv: data.qkv_gpu.view(),
            cache: data.cache.view(),
            out: out.view(),
            items: upload_i32(&flat).view(),
            sequences: Sequences {
                rows: rows.view(),
                context_lens: context_lens.view(),
                table_starts: starts.view(),
                blocks: blocks.view(),
                count: self.seqs.len(),
            },
            query_lens: query_lens.view(),
            num_items: items.len(),
            portable,
        }
        .launch(device())
        .unwrap();
        download(
            shape.float,
            &out,
            data.rows * shape.num_heads * shape.head_dim,
        )
    }
}

fn shape(
    float: Float,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    window: usize,
) -> HeadShape {
    HeadShape {
        float,
        num_heads,
        num_kv_heads,
        head_dim,
        window,
    }
}

const HEADS: [(usize, usize, usize); 8] = [
    (9, 3, 64),
    (4, 4, 64),
    (32, 2, 64),
    (14, 2, 128),
    (8, 2, 128),
    (16, 1, 128),
    (6, 2, 96),
    (8, 1, 256),
];

#[test]
fn decode_whole_and_cut() {
    for float in FLOATS {
        for (heads, kv_heads, dim) in HEADS {
            for window in [0, 50] {
                let lengths = [1, 15, 16, 17, 63, 64, 65, 100, 333, 1000];
                let case = Case {
                    shape: shape(float, heads, kv_heads, dim, window),
                    seqs: lengths.iter().map(|len| (1, *len)).collect(),
                };
                let data = case.data(heads as u64);
                let expected = case.expected(&data);
                for max_items in [lengths.len(), 37, 400] {
                    let what = format!(
                        "{float:?} {heads}/{kv_heads}×{dim} window {window} items {max_items}"
                    );
                    assert_close(&what, float, &case.decode(&data, max_items), &expected);
                }
            }
        }
    }
}

/// So many rows that four blocks run on a multiprocessor, or three, or two.
#[test]
fn decode_of_many_rows() {
    for count in [30, 45, 80] {
        let case = Case {
            shape: shape(Float::Bf16, 32, 8, 128, 0),
            seqs: (0..count).map(|row| (1, 10 + row * 7 % 200)).collect(),
        };
        let data = case.data(count as u64);
        let found = case.decode(&data, count + 20);
        assert_close(
            &format!("{count} rows"),
            Float::Bf16,
            &found,
            &case.expected(&data),
        );
    }
}

/// Rows 1.. begin with the pages of row 1; their own come behind.
#[test]
fn decode_of_rows_that_share_pages() {
    for float in FLOATS {
        for (heads, kv_heads, dim) in HEADS {
            let lengths = [40, 700, 701, 545, 544, 1000, 560, 643, 700, 2000, 577];
            let case = Case {
                shape: shape(float, heads, kv_heads, dim, 0),
                seqs: lengths.iter().map(|len| (1, *len)).collect(),
            };
            let mut data = case.data(dim as u64);
            let pages = 33;
            for row in 2..lengths.len() {
                let (from, to) = (
                    data.table_starts[1] as usize,
                    data.table_starts[row] as usize,
                );
                data.blocks.copy_within(from..from + pages, to);
                for head in 0..kv_heads {
                    let values = pages * BLOCK_SIZE * dim;
                    let (from, to) = (head * lengths[1] * dim, head * lengths[row] * dim);
                    for all in [&mut data.keys, &mut data.values] {
                        let common = all[1][from..from + values].to_vec();
                        all[row][to..to + values].copy_from_slice(&common);
                    }
                }
            }
            let expected = case.expected(&data);
            let members: Vec<u32> = (1..lengths.len() as u32).collect();
            let shared = [SharedPrefix { members, pages }];
            for max_items in [lengths.len(), 22, 60, 400] {
                let what = format!("{float:?} {heads}/{kv_heads}×{dim} items {max_items}");
                let found = case.decode_by(&data, &shared, max_items, None);
                assert_close(&what, float, &found, &expected);
            }
        }
    }
}

/// With q and k as the product made them: what attention rotates and writes itself is what the two kernels do one by one.
#[test]
fn decode_rotates_and_writes_the_cache() {
    for float in FLOATS {
        for (heads, kv_heads, dim) in HEADS {
            if !DecodeAttention::rotates(dim) {
                continue;
            }
            for (window, has_norms) in [(0, false), (50, true), (0, true)] {
                let lengths = [1, 15, 16, 17, 33, 63, 64, 65, 100, 333, 1000];
                let case = Case {
                    shape: shape(float, heads, kv_heads, dim, window),
                    seqs: lengths.iter().map(|len| (1, *len)).collect(),
                };
                let data = case.data(heads as u64 + 7);
                let mut random = Random(3);
                let norm = |random: &mut Random| {
                    let values = random.values(float, dim);
                    upload(
                        float,
                        &values
                            .iter()
                            .map(|v| round(float, v + 1.0))
                            .collect::<Vec<_>>(),
                    )
                };
                let (query_norm, key_norm) = (norm(&mut random), norm(&mut random));
                let norms = has_norms.then(|| (query_norm.view(), key_norm.view()));
                let frequencies: Vec<u8> = (0..dim / 2)
                    .flat_map(|pair| {
                        10_000f64
                            .powf(-2.0 * pair as f64 / dim as f64)
                            .to_le_bytes()
                    })
                    .collect();
                let table = device().alloc(1000 * dim / 2 * 8).unwrap();
                let frequencies = upload_bytes(&frequencies);
                rope_table(device(), frequencies.view(), table.view(), dim / 2, 1000).unwrap();
                let whole_cache = device().read(data.cache.view()).unwrap();
                let rope = DecodeRope {
                    table: table.view(),
                    norms,
                    eps: 1e-6,
                };
                let what = format!("{float:?} {heads}/{kv_heads}×{dim} window {window}");
                let mut fused = Vec::new();
                for max_items in [lengths.len(), 37, 400] {
                    device().write(&whole_cache, data.cache.view()).unwrap();
                    fused.push(case.decode_by(&data, &[], max_items, Some(rope)));
                }
                let fused_cache = device().read(data.cache.view()).unwrap();
                device().write(&whole_cache, data.cache.view()).unwrap();
                let slots: Vec<u8> = lengths
                    .iter()
                    .zip(&data.table_starts)
                    .flat_map(|(len, start)| {
                        let block = data.blocks[*start as usize + (len - 1) / BLOCK_SIZE];
                        (i64::from(block) * BLOCK_SIZE as i64
                            + (len - 1) as i64 % BLOCK_SIZE as i64)
                            .to_le_bytes()
                    })
                    .collect();
                let positions: Vec<u32> = lengths.iter().map(|len| *len as u32 - 1).collect();
                RopeWriteKv {
                    float,
                    qkv: data.qkv_gpu.view(),
                    norms,
                    table: table.view(),
                    positions: upload_u32(&positions).view(),
                    slot_mapping: upload_bytes(&slots).view(),
                    cache: data.cache.view(),
                    rows: lengths.len(),
                    num_heads: heads,
                    num_kv_heads: kv_heads,
                    head_dim: dim,
                    eps: 1e-6,
                }
                .launch(device())
                .unwrap();
                let apart: Vec<f64> = case
                    .decode(&data, 37)
                    .iter()
                    .map(|v| f64::from(*v))
                    .collect();
                for found in &fused {
                    assert_close(&what, float, found, &apart);
                }
                let decoded = |bytes: &[u8]| -> Vec<f32> {
                    let whole = upload_bytes(bytes);
                    download(float, &whole, bytes.len() / 2)
                };
                let (found, expected) = (
                    decoded(&fused_cache),
                    decoded(&device().read(data.cache.view()).unwrap()),
                );
                let ulp = if float == Float::Bf16 {
                    1.0 / 128.0
                } else {
                    1.0 / 1024.0
                };
                for (found, expected) in found.iter().zip(&expected) {
                    let same = found.is_nan() == expected.is_nan();
                    // The sum of a norm goes in another order: a bit in the last place.
                    let near =
                        expected.is_nan() || (found - expected).abs() <= expected.abs() * ulp;
                    assert!(
                        same && near,
                        "{what}: the cache has {found}, not {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn prefill_with_and_without_a_prefix() {
    for float in FLOATS {
        for (heads, kv_heads, dim) in [(9, 3, 64), (8, 2, 128), (6, 2, 96), (4, 1, 256)] {
            for window in [0, 40, 150] {
                let seqs = vec![
                    (2, 2),
                    (16, 16),
                    (33, 33),
                    (128, 128),
                    (129, 129),
                    (300, 300),
                    (5, 70),
                    (130, 333),
                    (64, 1000),
                ];
                let case = Case {
                    shape: shape(float, heads, kv_heads, dim, window),
                    seqs,
                };
                let data = case.data(dim as u64);
                let what = format!("{float:?} {heads}/{kv_heads}×{dim} window {window}");
                let expected = case.expected(&data);
                for portable in [false, true] {
                    let what = format!("{what} portable {portable}");
                    assert_close(&what, float, &case.prefill_by(&data, portable), &expected);
                }
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_company() {
    let float = Float::Bf16;
    let alone = Case {
        shape: shape(float, 8, 2, 128, 0),
        seqs: vec![(70, 200)],
    };
    let data = alone.data(5);
    let first = alone.prefill(&data);
    for _ in 0..3 {
        assert_eq!(alone.prefill(&data), first);
    }
}

/// More work units than blocks, lengths around every boundary, long contexts: blocks walk over several units each.
#[test]
fn prefill_of_more_work_than_blocks() {
    for (heads, kv_heads, dim) in [(9, 3, 64), (16, 4, 128)] {
        for window in [0, 200] {
            let mut seqs: Vec<(usize, usize)> =
                [1, 127, 128, 129, 143, 144, 145, 255, 256, 257, 640]
                    .iter()
                    .flat_map(|rows| [(*rows, *rows), (*rows, rows + 77), (*rows, rows + 1024)])
                    .collect();
            seqs.push((40, 3000));
            let case = Case {
                shape: shape(Float::Bf16, heads, kv_heads, dim, window),
                seqs,
            };
            let data = case.data(dim as u64 + 1);
            let what = format!("{heads}/{kv_heads}×{dim} window {window}");
            let first = case.prefill(&data);
            assert_close(&what, Float::Bf16, &first, &case.expected(&data));
            for _ in 0..3 {
                assert_eq!(case.prefill(&data), first, "{what} again");
            }
        }
    }
}

#[test]
fn shapes_without_a_kernel_are_refused() {
    for (heads, kv_heads, dim) in [(8, 8, 80), (34, 2, 64), (9, 2, 64), (32, 2, 256)] {
        assert!(
            shape(Float::Bf16, heads, kv_heads, dim, 0)
                .validate()
                .is_err()
        );
    }
}
