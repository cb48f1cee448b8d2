//! Attention of decoding rows and of prompts.

use ashlar_kernels::cuda::{
    CudaError,
    attention::{DecodeAttention, DecodeRope, PlanView, PrefillAttention, Sequences},
    decode_plan::Cut,
};

use super::{CudaBackend, CudaBuf};
use crate::model_runner::cuda::layout::{DecodeSection, TileSection};

impl CudaBackend {
    pub(super) fn rows_attention(
        &self,
        layer: usize,
        qkv: &CudaBuf,
        section: &DecodeSection,
        (count, cut, shares): (usize, Cut, bool),
        out: &CudaBuf,
    ) -> Result<(), CudaError> {
        if count == 0 {
            return Ok(());
        }
        let rope = self.rotation.as_ref().map(|norms| DecodeRope {
            table: self.rope_table.view(),
            norms: norms
                .as_ref()
                .map(|(query, key)| (query.view(), key.view())),
            eps: self.eps,
        });
        DecodeAttention {
            shape: self.shape,
            qkv: qkv.view(),
            cache: self.layer_cache(layer)?,
            kv_scales: self.kv_scales[layer],
            out: out.view(),
            plan: PlanView {
                num_items: self.at(section.num_items),
                items: self.at(section.items),
                members: self.at(section.members),
                row_parts: self.at(section.row_parts),
                slots: self.at(section.slots),
            },
            sequences: Sequences {
                rows: self.at(section.rows),
                context_lens: self.at(section.context_lens),
                table_starts: self.at(section.table_starts),
                blocks: self.at(self.layout.blocks),
                count,
            },
            parts: self.parts.view(),
            arrived: self.arrived.view(),
            rope,
            shares,
            cut,
        }
        .launch(&self.device)
    }

    pub(super) fn attend(
        &self,
        layer: usize,
        qkv: &CudaBuf,
        out: &CudaBuf,
    ) -> Result<(), CudaError> {
        let (layout, counts) = (&self.layout, &self.layout.counts);
        if self.kept && counts.tiles_only {
            return self.tiles_attention(layer, qkv, &layout.kept_tiles, [counts.kept; 2], out);
        }
        if self.kept {
            let sizes = (counts.kept, counts.kept_cut, false);
            return self.rows_attention(layer, qkv, &layout.kept, sizes, out);
        }
        let sizes = (counts.decodes, counts.decode_cut, counts.shares);
        self.rows_attention(layer, qkv, &layout.decode, sizes, out)?;
        let sizes = [counts.prefills, counts.prefill_items];
        self.tiles_attention(layer, qkv, &layout.prefill, sizes, out)
    }

    fn tiles_attention(
        &self,
        layer: usize,
        qkv: &CudaBuf,
        section: &TileSection,
        [count, num_items]: [usize; 2],
        out: &CudaBuf,
    ) -> Result<(), CudaError> {
        if count == 0 {
            return Ok(());
        }
        PrefillAttention {
            shape: self.shape,
            qkv: qkv.view(),
            cache: self.layer_cache(layer)?,
            kv_scales: self.kv_scales[layer],
            out: out.view(),
            items: self.at(section.items),
            sequences: Sequences {
                rows: self.at(section.rows),
                context_lens: self.at(section.context_lens),
                table_starts: self.at(section.table_starts),
                blocks: self.at(self.layout.blocks),
                count,
            },
            query_lens: self.at(section.query_lens),
            num_items,
            portable: self.layout.counts.tiles_only,
        }
        .launch(&self.device)
    }
}
