//! Activation-aware quantisation: an input channel that carries large activations is scaled up before rounding, and the
//! layer in front of it scaled down by as much, so that its weights lose less. How strongly is searched, layer by layer.

use ashlar::models::{
    config::ModelConfig,
    decoder::{Decoder, Layer, Mlp},
};
use ashlar_kernels::cpu::{PackedMatrix, QuantizedRows, ThreadPool, linear};
use half::f16;

use crate::record::{Inputs, Recorder};

/// Exponents of the mean activation that are tried: 0, 1/20, …, 19/20.
const STEPS: usize = 20;
/// Rows of the calibration text that a candidate is judged by.
const JUDGED_ROWS: usize = 512;

/// A matrix `[rows, columns]` in four bits.
pub(crate) struct Quantized {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// `[rows, columns]`, 0..=15.
    pub(crate) q: Vec<u8>,
    /// `[rows, columns / group]`
    pub(crate) scales: Vec<f16>,
    /// `[rows, columns / group]`
    pub(crate) zeros: Vec<u8>,
}

/// A layer whose matrices are quantised, with the norms that its scales were taken out of.
pub(crate) struct QuantizedLayer {
    pub(crate) input_norm: Vec<f32>,
    pub(crate) post_attention_norm: Vec<f32>,
    /// q, k, v, attention output, gate, up, down.
    pub(crate) matrices: Vec<Quantized>,
}

/// A whole model.
pub(crate) struct QuantizedModel {
    pub(crate) layers: Vec<QuantizedLayer>,
    /// Sum over all matrices of the squared errors of their products, each over its product's own size.
    pub(crate) loss: f64,
}

/// A matrix `[rows, columns]` in 32 bits.
struct Plain {
    values: Vec<f32>,
    columns: usize,
}

impl Plain {
    fn of(packed: &PackedMatrix) -> Self {
        let columns = packed.columns();
        let mut values = vec![0.0; packed.rows() * columns];
        for (row, values) in values.chunks_exact_mut(columns).enumerate() {
            packed.dequantize_row(row, values);
        }
        Self { values, columns }
    }

    fn rows(&self) -> usize {
        self.values.len() / self.columns
    }

    fn divide_rows(&mut self, from: usize, by: &[f32]) {
        let rows = self.values[from * self.columns..].chunks_exact_mut(self.columns);
        for (row, by) in rows.zip(by) {
            row.iter_mut().for_each(|value| *value /= by);
        }
    }

    fn multiply_columns(&mut self, by: &[f32]) {
        for row in self.values.chunks_exact_mut(self.columns) {
            row.iter_mut().zip(by).for_each(|(value, by)| *value *= by);
        }
    }
}

/// Quantises all layers; without `scaled`, by rounding alone.
pub(crate) fn quantize(
    recorder: &Recorder,
    decoder: &Decoder<Recorder>,
    config: &ModelConfig,
    group: usize,
    scaled: bool,
) -> QuantizedModel {
    let search = Search {
        pool: &recorder.pool,
        config,
        group,
        steps: if scaled { STEPS } else { 1 },
    };
    let mut model = QuantizedModel {
        layers: Vec::new(),
        loss: 0.0,
    };
    for (layer, inputs) in decoder.layers.iter().zip(recorder.inputs.chunks_exact(4)) {
        let (layer, loss) = search.layer(layer, inputs);
        model.layers.push(layer);
        model.loss += loss;
    }
    model
}

struct Search<'a> {
    pool: &'a ThreadPool,
    config: &'a ModelConfig,
    group: usize,
    steps: usize,
}

impl Search<'_> {
    fn layer(&self, layer: &Layer<Recorder>, inputs: &[Inputs]) -> (QuantizedLayer, f64) {
        let Mlp::Dense { gate_up, down } = &layer.mlp;
        let plain = |matrix: &PackedMatrix| Plain::of(matrix);
        let mut qkv = plain(&layer.qkv.parts[0]);
        let mut output = plain(&layer.attention_output.parts[0]);
        let (mut gate_up, mut down) = (plain(&gate_up.parts[0]), plain(&down.parts[0]));
        let (mut input_norm, mut post_attention_norm) =
            (layer.input_norm.clone(), layer.post_attention_norm.clone());
        let config = self.config;
        let kv_size = config.num_kv_heads * config.head_dim;

        // What the attention reads comes from v, whose heads several query heads share.
        let (scales, output_loss) = self.best(&output, &inputs[1], |x| self.shared_by_heads(x));
        let of_v: Vec<f32> = (0..kv_size)
            .map(|at| scales[self.first_query_of(at)])
            .collect();
        qkv.divide_rows(config.attention_size() + kv_size, &of_v);
        output.multiply_columns(&scales);

        // What `down` reads is proportional to the rows of `up`.
        let (scales, down_loss) = self.best(&down, &inputs[3], <[f32]>::to_vec);
        gate_up.divide_rows(config.intermediate_size, &scales);
        down.multiply_columns(&scales);

        let (scales, qkv_loss) = self.best(&qkv, &inputs[0], <[f32]>::to_vec);
        qkv.multiply_columns(&scales);
        divide(&mut input_norm, &scales);
        let (scales, gate_up_loss) = self.best(&gate_up, &inputs[2], <[f32]>::to_vec);
        gate_up.multiply_columns(&scales);
        divide(&mut post_attention_norm, &scales);

        let (q_size, width) = (config.attention_size(), config.intermediate_size);
        let matrices = vec![
            self.round(&qkv, 0..q_size),
            self.round(&qkv, q_size..q_size + kv_size),
            self.round(&qkv, q_size + kv_size..q_size + 2 * kv_size),
            self.round(&output, 0..output.rows()),
            self.round(&gate_up, 0..width),
            self.round(&gate_up, width..2 * width),
            self.round(&down, 0..down.rows()),
        ];
        let layer = QuantizedLayer {
            input_norm,
            post_attention_norm,
            matrices,
        };
        (layer, output_loss + down_loss + qkv_loss + gate_up_loss)
    }

    /// The attention output's column of the first query head that reads value `at` of all KV heads.
    fn first_query_of(&self, at: usize) -> usize {
        let (dim, group) = (
            self.config.head_dim,
            self.config.num_heads / self.config.num_kv_heads,
        );
        at / dim * group * dim + at % dim
    }

    /// The mean over the query heads that share a KV head, for each of them.
    fn shared_by_heads(&self, means: &[f32]) -> Vec<f32> {
        let dim = self.config.head_dim;
        let group = self.config.num_heads / self.config.num_kv_heads;
        let mut shared = means.to_vec();
        for heads in shared.chunks_exact_mut(group * dim) {
            for i in 0..dim {
                let mean = (0..group).map(|head| heads[head * dim + i]).sum::<f32>() / group as f32;
                (0..group).for_each(|head| heads[head * dim + i] = mean);
            }
        }
        shared
    }

    /// The scales of the inputs with the least error, and that error over the product's size.
    fn best(
        &self,
        weight: &Plain,
        inputs: &Inputs,
        tie: impl Fn(&[f32]) -> Vec<f32>,
    ) -> (Vec<f32>, f64) {
        let rows = (inputs.values.len() / inputs.width).min(JUDGED_ROWS);
        let x = &inputs.values[..rows * inputs.width];
        let mut means = vec![0f32; inputs.width];
        for row in inputs.values.chunks_exact(inputs.width) {
            means.iter_mut().zip(row).for_each(|(m, x)| *m += x.abs());
        }
        let means = tie(&means);
        let size = self.energy(weight.rows(), weight.columns, &weight.values, x);
        let candidates = (0..self.steps).map(|step| {
            let scales = scales_of(&means, step as f32 / STEPS as f32);
            let loss = self.energy(
                weight.rows(),
                weight.columns,
                &self.errors(weight, &scales),
                x,
            );
            (scales, loss / size)
        });
        candidates
            .min_by(|a, b| a.1.total_cmp(&b.1))
            .expect("at least one step is tried: this is a bug")
    }

    /// What scaling, rounding and scaling back changes.
    fn errors(&self, weight: &Plain, scales: &[f32]) -> Vec<f32> {
        let mut errors = Vec::with_capacity(weight.values.len());
        for row in weight.values.chunks_exact(weight.columns) {
            let groups = row.chunks_exact(self.group);
            for (values, scales) in groups.zip(scales.chunks_exact(self.group)) {
                let scaled: Vec<f32> = values.iter().zip(scales).map(|(v, s)| v * s).collect();
                let (q, scale, zero) = round_group(&scaled);
                let rounded = q
                    .iter()
                    .map(|q| (f32::from(*q) - f32::from(zero)) * scale.to_f32());
                let back = rounded.zip(scales).map(|(value, scale)| value / scale);
                errors.extend(back.zip(values).map(|(back, value)| back - value));
            }
        }
        errors
    }

    /// Sum of the squares of `x · wᵀ`.
    fn energy(&self, rows: usize, columns: usize, w: &[f32], x: &[f32]) -> f64 {
        let packed = PackedMatrix::from_f32(rows, columns, w)
            .expect("the shape is the matrix's own: this is a bug");
        let mut y = vec![0.0; x.len() / columns * rows];
        linear(
            self.pool,
            &[packed],
            None,
            x,
            &mut QuantizedRows::default(),
            &mut y,
        );
        y.iter().map(|y| f64::from(*y) * f64::from(*y)).sum()
    }

    fn round(&self, weight: &Plain, rows: std::ops::Range<usize>) -> Quantized {
        let columns = weight.columns;
        let mut result = Quantized {
            rows: rows.len(),
            columns,
            q: Vec::new(),
            scales: Vec::new(),
            zeros: Vec::new(),
        };
        let values = &weight.values[rows.start * columns..rows.end * columns];
        for group in values.chunks_exact(self.group) {
            let (q, scale, zero) = round_group(group);
            result.q.extend(q);
            result.scales.push(scale);
            result.zeros.push(zero);
        }
        result
    }
}

fn divide(values: &mut [f32], by: &[f32]) {
    values.iter_mut().zip(by).for_each(|(v, by)| *v /= by);
}

/// `mean^exponent`, about 1 in the geometric middle.
fn scales_of(means: &[f32], exponent: f32) -> Vec<f32> {
    let powers: Vec<f32> = means
        .iter()
        .map(|mean| mean.max(1e-4).powf(exponent))
        .collect();
    let largest = powers.iter().copied().fold(f32::MIN, f32::max);
    let smallest = powers.iter().copied().fold(f32::MAX, f32::min);
    let middle = (largest * smallest).sqrt();
    powers.iter().map(|power| power / middle).collect()
}

/// Four bits for each value, with the scale and the zero that hold the smallest, the largest, and 0 exactly.
fn round_group(values: &[f32]) -> (Vec<u8>, f16, u8) {
    let smallest = values.iter().copied().fold(0f32, f32::min);
    let largest = values.iter().copied().fold(0f32, f32::max);
    let scale = f16::from_f32(((largest - smallest) / 15.0).max(1e-5));
    let step = scale.to_f32();
    let zero = (-smallest / step).round().clamp(0.0, 15.0);
    let q = values
        .iter()
        .map(|value| ((value / step).round() + zero).clamp(0.0, 15.0) as u8);
    (q.collect(), scale, zero as u8)
}
