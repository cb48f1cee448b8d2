//! Attention over shuffled pages with NaN in everything unused, how it is run, and plain softmax in f64.

use ashlar_kernels::cuda::{
    CudaError, DeviceBuffer, Float, KvDtype,
    attention::{
        DecodeAttention, DecodeRope, HeadShape, PlanView, PrefillAttention, Sequences,
        prefill_items,
    },
    decode_plan::{Cut, DecodePlan, ITEM_WORDS, PARTS_PER_ITEM, SharedPrefix},
    rope::BLOCK_SIZE,
};

use crate::support::*;

/// Rows that attend.
pub(crate) struct Case {
    pub(crate) shape: HeadShape,
    /// Of K and V in the pages.
    pub(crate) kv_scales: [f32; 2],
    /// (rows, tokens up to and including the last row)
    pub(crate) seqs: Vec<(usize, usize)>,
}

pub(crate) struct Data {
    pub(crate) qkv: Vec<f32>,
    pub(crate) qkv_gpu: DeviceBuffer,
    pub(crate) cache: DeviceBuffer,
    /// `[seq][kv_head][token][dim]`
    pub(crate) keys: Vec<Vec<f32>>,
    pub(crate) values: Vec<Vec<f32>>,
    pub(crate) first_rows: Vec<i32>,
    pub(crate) table_starts: Vec<i32>,
    pub(crate) blocks: Vec<i32>,
    pub(crate) rows: usize,
}

/// So many items of narrow blocks.
pub(crate) fn narrow(max_items: usize) -> Cut {
    Cut {
        wide: false,
        fill: max_items,
        max_items,
    }
}

impl Case {
    pub(crate) fn data(&self, seed: u64) -> Data {
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
            let [k, v] = self.kv_scales.map(|scale| {
                let values = random.values(float, kv_heads * len * dim);
                let values = values.iter().map(|v| stored(shape.kv_dtype, v / scale));
                values.collect::<Vec<f32>>()
            });
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
            let [key_scale, value_scale] = self.kv_scales;
            keys.push(k.iter().map(|k| k * key_scale).collect());
            values.push(v.iter().map(|v| v * value_scale).collect());
        }
        Data {
            qkv_gpu: upload(float, &qkv),
            qkv,
            cache: upload_bytes(&page_bytes_of(float, shape.kv_dtype, &pool)),
            keys,
            values,
            first_rows,
            table_starts,
            blocks,
            rows,
        }
    }

    pub(crate) fn expected(&self, data: &Data) -> Vec<f64> {
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

    /// So many items of narrow blocks, and of wide ones where there are such.
    pub(crate) fn cuts(&self, max_items: usize) -> impl Iterator<Item = Cut> {
        let narrow = narrow(max_items);
        let wide = Cut {
            wide: true,
            ..narrow
        };
        [narrow]
            .into_iter()
            .chain(self.shape.has_wide().then_some(wide))
    }

    pub(crate) fn decode_by(
        &self,
        data: &Data,
        shared: &[SharedPrefix],
        cut: Cut,
        rope: Option<DecodeRope<'_>>,
    ) -> Vec<f32> {
        let (shape, max_items) = (self.shape, cut.max_items);
        let lengths: Vec<u32> = self.seqs.iter().map(|(_, len)| *len as u32).collect();
        let mut plan = DecodePlan::default();
        plan.make(&shape, &lengths, shared, &cut);
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
            kv_scales: self.kv_scales,
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
            cut,
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

    pub(crate) fn prefill(&self, data: &Data) -> Vec<f32> {
        self.prefill_by(data, false)
    }

    pub(crate) fn prefill_by(&self, data: &Data, portable: bool) -> Vec<f32> {
        self.try_prefill(data, portable).unwrap()
    }

    pub(crate) fn try_prefill(&self, data: &Data, portable: bool) -> Result<Vec<f32>, CudaError> {
        let starts = (data.first_rows.as_slice(), data.table_starts.as_slice());
        self.prefill_of(data, &self.seqs, starts, portable)
    }

    /// Attention of these sequences, each (rows, tokens up to and including the last row) with its first row and the first entry
    /// of its table. Those without rows get an item all the same, as in a captured step.
    pub(crate) fn prefill_of(
        &self,
        data: &Data,
        seqs: &[(usize, usize)],
        (first_rows, table_starts): (&[i32], &[i32]),
        portable: bool,
    ) -> Result<Vec<f32>, CudaError> {
        let shape = self.shape;
        let mut items = Vec::new();
        prefill_items(
            seqs.iter().map(|(rows, len)| (*rows as u32, *len as u32)),
            &mut items,
        );
        let absent = seqs.iter().zip(0..).filter(|((rows, _), _)| *rows == 0);
        items.extend(absent.map(|(_, seq)| [seq, 0]));
        let flat: Vec<i32> = items.iter().flatten().copied().collect();
        let count = data.rows * shape.num_heads * shape.head_dim;
        let out = poisoned(count * 2);
        let column = |pick: fn(&(usize, usize)) -> usize| -> DeviceBuffer {
            let values: Vec<i32> = seqs.iter().map(|seq| pick(seq) as i32).collect();
            upload_i32(&values)
        };
        let (query_lens, context_lens) = (column(|seq| seq.0), column(|seq| seq.1));
        let (rows, starts, blocks) = (
            upload_i32(first_rows),
            upload_i32(table_starts),
            upload_i32(&data.blocks),
        );
        let list = upload_i32(&flat);
        PrefillAttention {
            shape,
            qkv: data.qkv_gpu.view(),
            cache: data.cache.view(),
            kv_scales: self.kv_scales,
            out: out.view(),
            items: list.view(),
            sequences: Sequences {
                rows: rows.view(),
                context_lens: context_lens.view(),
                table_starts: starts.view(),
                blocks: blocks.view(),
                count: seqs.len(),
            },
            query_lens: query_lens.view(),
            num_items: items.len(),
            portable,
        }
        .launch(device())?;
        Ok(download(shape.float, &out, count))
    }
}

pub(crate) fn shape(
    float: Float,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    window: usize,
) -> HeadShape {
    HeadShape {
        float,
        kv_dtype: KvDtype::Float,
        num_heads,
        num_kv_heads,
        head_dim,
        window,
    }
}
