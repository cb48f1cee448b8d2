//! The operations of [`Backend`] on the GPU.

use std::sync::Arc;

use ashlar_kernels::cuda::{
    CudaError, Float, View,
    attention::DecodeAttention,
    eight_bit,
    elementwise::{AddNorm, EmbedNorm, GatherRows, SiluMul, fill_random},
    int4,
    rope::RopeWriteKv,
    skinny::{Output, SkinnyGemm},
};

use super::{CudaBackend, CudaBuf, GpuMatrix, GpuVector, Target, buffer::State};
use crate::{
    engine::request::TokenId,
    model_runner::cuda::{integers, matrix::Matrix},
    models::backend::{AdapterRows, AttentionSeq, Backend, HeadNorms, Linear, RopeArgs},
    weights::{Int4Matrix, Scheme, Weight},
};

impl Backend for CudaBackend {
    type Buf = CudaBuf;
    type Matrix = GpuMatrix;
    type Vector = GpuVector;

    fn pack(&self, stacked: &[Weight<'_>]) -> Result<Vec<GpuMatrix>, String> {
        let columns = stacked[0].columns();
        let text = |error: CudaError| error.to_string();
        if let Some(parts) = self.four_bit_parts(stacked) {
            let whole = Int4Matrix::stack(&parts);
            let matrix = Matrix::int4(&self.uploader, &whole).map_err(text)?;
            return Ok(vec![Arc::new(matrix)]);
        }
        if self.integers
            && int4::takes(columns, 32)
            && let Some(whole) = integers::of_blocks(stacked)
        {
            let matrix = Matrix::integers(&self.uploader, &whole).map_err(text)?;
            return Ok(vec![Arc::new(matrix)]);
        }
        if let Some(parts) = Self::fp8_parts(stacked) {
            let matrix = Matrix::fp8(&self.uploader, &parts, columns).map_err(text)?;
            return Ok(vec![Arc::new(matrix)]);
        }
        self.pack_vocabulary(stacked)
    }

    /// In 16 bits: rows are looked up in it, and logits need all of its precision.
    fn pack_vocabulary(&self, stacked: &[Weight<'_>]) -> Result<Vec<GpuMatrix>, String> {
        let rows = stacked.iter().map(Weight::rows).sum();
        let columns = stacked[0].columns();
        let text = |error: CudaError| error.to_string();
        let data = self
            .device
            .alloc(rows * columns * Float::BYTES)
            .map_err(text)?;
        let mut offset = 0;
        for part in stacked {
            let bytes = part.rows() * columns * Float::BYTES;
            self.upload_values(part, data.view().slice(offset, bytes))?;
            offset += bytes;
        }
        Ok(vec![Arc::new(Matrix::float(data, rows, columns))])
    }

    fn vector(&self, values: Vec<f32>) -> Result<GpuVector, String> {
        let stored = self.uploader.store(&self.to_bytes(&values));
        stored.map(Arc::new).map_err(|error| error.to_string())
    }

    fn finish_loading(&self) -> Result<(), String> {
        self.uploader.finish().map_err(|error| error.to_string())
    }

    fn random(&self, rows: usize, columns: usize, seed: u64) -> Result<GpuMatrix, String> {
        let store = || {
            self.device.bind()?;
            let data = self.device.alloc(rows * columns * Float::BYTES)?;
            let scale = 1.0 / (columns as f32).sqrt();
            fill_random(&self.device, self.float, data.view(), seed, scale)?;
            Ok(Arc::new(Matrix::float(data, rows, columns)))
        };
        store().map_err(|error: CudaError| error.to_string())
    }

    fn random_quantized(
        &self,
        scheme: &Scheme,
        shape: (usize, usize),
        seed: u64,
    ) -> Result<Vec<GpuMatrix>, String> {
        let matrix = match scheme {
            Scheme::Int4(scheme)
                if self.integers && int4::takes(shape.1, scheme.group_of(shape.1)) =>
            {
                let group = scheme.group_of(shape.1);
                Matrix::random_int4(&self.device, shape, group, seed)
            }
            Scheme::Fp8(_) if shape.0.is_multiple_of(16) && eight_bit::takes(shape.1) => {
                Matrix::random_fp8(&self.device, self.float, shape, seed)
            }
            _ => return self.pack(&[scheme.random(shape, seed)?]),
        };
        let matrix = matrix.map_err(|error| error.to_string())?;
        Ok(vec![Arc::new(matrix)])
    }

    fn embed_norm(
        &mut self,
        _tokens: &[TokenId],
        embedding: &GpuMatrix,
        norm: &GpuVector,
        residual: &mut CudaBuf,
        out: &mut CudaBuf,
    ) {
        let rows = self.layout.counts.rows;
        let pieces = match &self.place {
            Some(place) => &place.embeddings[..],
            None => std::slice::from_ref(embedding),
        };
        let launch = || {
            let tables = pieces.iter().map(|piece| self.values(piece));
            let tables: Vec<View<'_>> = tables.collect::<Result<_, CudaError>>()?;
            EmbedNorm {
                float: self.float,
                tokens: self.at(self.layout.tokens),
                row_slots: self.at(self.layout.row_slots),
                last_tokens: self.last_tokens.view(),
                tables: &tables,
                table_rows: embedding.rows,
                weight: norm.view(),
                residual: residual.view(),
                out: out.view(),
                sums: None,
                rows,
                width: residual.width,
                eps: self.eps,
            }
            .launch(&self.device)
        };
        let result = launch();
        self.note(result);
        residual.set(rows, State::Ready);
        out.set(rows, State::Ready);
    }

    fn linear(
        &mut self,
        x: &CudaBuf,
        weight: &Linear<GpuMatrix, GpuVector>,
        _adapters: AdapterRows,
        out: &mut CudaBuf,
    ) {
        let (matrix, bias) = (&weight.parts[0], weight.bias.as_ref());
        let product = Self::product_of(x, matrix, bias);
        let state = if self.fuses(x.rows, matrix) {
            State::Product(product)
        } else if self.adds(matrix, x.rows) {
            State::Large(product)
        } else {
            let result = self.launch_gemm(&product, Target::Store(out.view()), x.rows);
            self.note(result);
            State::Ready
        };
        out.set(x.rows, state);
    }

    fn rope_write_kv(&mut self, qkv: &mut CudaBuf, args: &RopeArgs<'_, GpuVector>) {
        if self.layout.counts.rotates && DecodeAttention::rotates(self.shape.head_dim) {
            let result = self.settle(qkv);
            self.note(result);
            let both =
                |norms: &HeadNorms<GpuVector>| (Arc::clone(&norms.query), Arc::clone(&norms.key));
            self.rotation = Some(args.norms.map(both));
            return;
        }
        let result = self.settle(qkv).and_then(|()| {
            RopeWriteKv {
                float: self.float,
                kv_dtype: self.shape.kv_dtype,
                kv_scales: self.kv_scales[args.layer],
                qkv: qkv.view(),
                norms: args
                    .norms
                    .map(|norms| (norms.query.view(), norms.key.view())),
                table: self.rope_table.view(),
                positions: self.at(self.layout.positions),
                slot_mapping: self.at(self.layout.slot_mapping),
                cache: self.layer_cache(args.layer)?,
                rows: qkv.rows,
                num_heads: self.shape.num_heads,
                num_kv_heads: self.shape.num_kv_heads,
                head_dim: self.shape.head_dim,
                eps: self.eps,
            }
            .launch(&self.device)
        });
        self.note(result);
    }

    fn attention(
        &mut self,
        layer: usize,
        qkv: &CudaBuf,
        _seqs: &[AttentionSeq<'_>],
        out: &mut CudaBuf,
    ) {
        let result = self.attend(layer, qkv, out);
        self.rotation = None;
        self.note(result);
        out.set(qkv.rows, State::Ready);
    }

    fn silu_mul(&mut self, gate_up: &mut CudaBuf, out: &mut CudaBuf) {
        let (rows, width) = (gate_up.rows, out.width);
        let result = if let State::Product(product) = &gate_up.state {
            self.run_product(product, rows, width, Output::SiluMul(out.view()))
        } else {
            self.settle(gate_up).and_then(|()| {
                SiluMul {
                    float: self.float,
                    gate_up: gate_up.view(),
                    out: out.view(),
                    rows,
                    width,
                }
                .launch(&self.device)
            })
        };
        self.note(result);
        out.set(rows, State::Ready);
    }

    fn reduce_add_norm(
        &mut self,
        delta: &mut CudaBuf,
        norm: &GpuVector,
        residual: &mut CudaBuf,
        out: &mut CudaBuf,
    ) {
        let (rows, width) = (delta.rows, residual.width);
        if let Some(place) = &self.place {
            let result = self
                .settle(delta)
                .and_then(|()| place.reduce(self.float, delta, (norm, self.eps), residual, out));
            self.note(result);
            out.set(rows, State::Ready);
            return;
        }
        let not_added = match &delta.state {
            State::Large(product) => {
                let result = self.launch_gemm(product, Target::Add(residual.view()), rows);
                self.note(result);
                None
            }
            State::Product(product) if self.norms_on_the_way(product, rows, width) => {
                let output = Output::AddResidual {
                    residual: residual.view(),
                    sums: self.sums.view(),
                };
                let result = self.run_product(product, rows, width, output);
                self.note(result);
                let normed = State::Normed {
                    residual: Arc::clone(&residual.data),
                    weight: Arc::clone(norm),
                    num_sums: width.div_ceil(16),
                };
                if SkinnyGemm::takes(rows, width) {
                    out.set(rows, normed);
                    return;
                }
                self.note(Err(CudaError::Shape {
                    op: "norm",
                    message: format!(
                        "rows of {width} values do not fuse; a multiple of 32 is needed"
                    ),
                }));
                return;
            }
            State::Product(product) => {
                let output = Output::Store(delta.view());
                let result = self.run_product(product, rows, width, output);
                self.note(result);
                Some(delta.view())
            }
            State::Ready | State::Normed { .. } => Some(delta.view()),
        };
        let result = AddNorm {
            float: self.float,
            delta: not_added,
            weight: norm.view(),
            residual: residual.view(),
            out: out.view(),
            rows,
            width,
            eps: self.eps,
        }
        .launch(&self.device);
        self.note(result);
        out.set(rows, State::Ready);
    }

    fn keep_rows(&mut self, rows: &[u32], buf: &mut CudaBuf) {
        self.kept = true;
        let Some(spare) = buf.spare.take() else {
            self.note(Err(CudaError::Shape {
                op: "gather_rows",
                message: "this buffer has no second one: this is a bug".to_owned(),
            }));
            return;
        };
        let result = GatherRows {
            input: buf.view(),
            rows: self.at(self.layout.gather),
            out: spare.view(),
            count: rows.len(),
            width: buf.width,
        }
        .launch(&self.device);
        self.note(result);
        buf.spare = Some(std::mem::replace(&mut buf.data, spare));
        buf.set(rows.len(), State::Ready);
    }

    fn logits(&mut self, x: &CudaBuf, head: &Linear<GpuMatrix, GpuVector>, out: &mut CudaBuf) {
        let result = match &self.place {
            None => self.head(x, head, out),
            Some(place) => self
                .head(x, head, &place.logits)
                .and_then(|()| place.gather(x.rows, out.width)),
        };
        self.note(result);
        out.set(x.rows, State::Ready);
    }
}
