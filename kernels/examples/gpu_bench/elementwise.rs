//! What only moves values: rope with the write of keys and values, norms, gates.

use ashlar_kernels::cuda::{
    DeviceBuffer, KvDtype,
    elementwise::{AddNorm, SiluMul},
    rope::RopeWriteKv,
};

use super::{Bench, FLOAT};

impl Bench {
    pub(super) fn elementwise(&self) {
        self.rope();
        let (rows, width) = (8192, 4096);
        let buffers: Vec<DeviceBuffer> = (0..9).map(|_| self.random(rows * width)).collect();
        let weight = self.random(width);
        let us = self.time(6, |i| {
            let b = &buffers[i % 3 * 3..];
            AddNorm {
                float: FLOAT,
                delta: Some(b[0].view()),
                weight: weight.view(),
                residual: b[1].view(),
                out: b[2].view(),
                rows,
                width,
                eps: 1e-5,
            }
            .launch(&self.device)
            .unwrap();
        });
        self.bandwidth("add_norm 8192 × 4096", us, 4.0 * (rows * width * 2) as f64);
        let (gate_up, out) = (self.random(rows * 28672), self.random(rows * 14336));
        let us = self.time(4, |_| {
            SiluMul {
                float: FLOAT,
                gate_up: gate_up.view(),
                out: out.view(),
                rows,
                width: 14336,
            }
            .launch(&self.device)
            .unwrap()
        });
        self.bandwidth("silu_mul 8192 × 14336", us, 3.0 * (rows * 14336 * 2) as f64);
    }

    /// Rows of one prompt, in pages in order.
    fn rope(&self) {
        let (rows, num_heads, num_kv_heads, head_dim) = (4096, 32, 8, 128);
        let width = (num_heads + 2 * num_kv_heads) * head_dim;
        let kv_width = 2 * num_kv_heads * head_dim;
        let sets = 3;
        let qkv: Vec<DeviceBuffer> = (0..sets).map(|_| self.random(rows * width)).collect();
        let caches: Vec<DeviceBuffer> = (0..sets).map(|_| self.random(rows * kv_width)).collect();
        let table = self.random(rows * head_dim * 2);
        let positions = self.i32s(&(0..rows as i32).collect::<Vec<_>>());
        let slots = self.i32s(
            &(0..rows as i32)
                .flat_map(|row| [row, 0])
                .collect::<Vec<_>>(),
        );
        let us = self.time(2 * sets, |i| {
            RopeWriteKv {
                float: FLOAT,
                qkv: qkv[i % sets].view(),
                norms: None,
                table: table.view(),
                positions: positions.view(),
                slot_mapping: slots.view(),
                cache: caches[i % sets].view(),
                kv_dtype: KvDtype::Float,
                kv_scales: [1.0; 2],
                rows,
                num_heads,
                num_kv_heads,
                head_dim,
                eps: 1e-5,
            }
            .launch(&self.device)
            .unwrap();
        });
        let bytes = (rows * 2 * width * 2) as f64;
        self.bandwidth(&format!("rope and kv write {rows} × {width}"), us, bytes);
    }
}
