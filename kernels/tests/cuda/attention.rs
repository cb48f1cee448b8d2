//! Paged attention over shuffled pages with NaN in everything unused, against plain softmax in f64.

use ashlar_kernels::cuda::{
    DeviceBuffer, Float,
    attention::{
        DecodeAttention, DecodePlan, HeadShape, PrefillAttention, Sequences, prefill_items,
    },
    rope::BLOCK_SIZE,
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
        let shape = self.shape;
        let lengths: Vec<u32> = self.seqs.iter().map(|(_, len)| *len as u32).collect();
        let mut plan = DecodePlan::default();
        plan.make(&shape, &lengths, max_items);
        assert!(plan.items.len() <= max_items);
        let mut items: Vec<i32> = plan.items.iter().flatten().copied().collect();
        items.resize(max_items * 2, 1 << 30);
        let count = self.seqs.len();
        let out = poisoned(data.rows * shape.num_heads * shape.head_dim * 2);
        let parts = poisoned(max_items * shape.part_bytes());
        let arrived = device().alloc(count * shape.num_kv_heads * 4).unwrap();
        let header = upload_i32(&[plan.items.len() as i32, plan.item_pages as i32]);
        let items = upload_i32(&items);
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
            plan: header.view(),
            items: items.view(),
            sequences: Sequences {
                rows: rows.view(),
                context_lens: lens.view(),
                table_starts: starts.view(),
                blocks: blocks.view(),
                count,
            },
            parts: parts.view(),
            arrived: arrived.view(),
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
