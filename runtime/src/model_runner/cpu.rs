//! The CPU's [`ModelRunner`]: a step is computed when it is submitted, on a pool of threads; depth 1.
//!
//! Invariants: a submitted [`ModelInput`] is checked against the limits before anything runs; nothing is allocated
//! per row once the largest step has been seen; the KV pool is sized once, by [`KvCacheSize`].

mod config;
mod limits;

use std::time::{Duration, Instant};

use self::limits::limits;
pub use self::{
    config::{CpuRunnerConfig, CpuRunnerError, Dtype, KvCacheSize, KvDtype},
    limits::BLOCK_SIZE,
};
use super::{
    ModelCosts, ModelInput, ModelRunner, Pooled, RunnerError, RunnerLimits, SampleInput,
    SampledRow, StepId, StepOutput, TOKEN_FROM_SLOT,
    check::{check, refused},
    cpu_backend::{CpuBackend, CpuBackendConfig, CpuBuf},
    ranks::{Member, RankedRunner},
};
use crate::{
    engine::request::{GeneratedToken, TokenId},
    models::{
        backend::Backend,
        config::ModelConfig,
        decoder::{Activations, Decoder},
        loader,
        shard::Partition,
    },
    sampler::{SampleError, Sampler},
    weights::Checkpoint,
};

/// What the attention kernel needs `head_dim` to be a multiple of.
const HEAD_DIM_MULTIPLE: usize = 16;
/// A step that was computed and not yet polled.
struct Pending {
    id: StepId,
    sampled: Option<StepOutput>,
}

/// Runs a model of the Llama family on the CPU.
pub struct CpuRunner {
    limits: RunnerLimits,
    config: ModelConfig,
    costs: ModelCosts,
    backend: CpuBackend,
    decoder: Decoder<CpuBackend>,
    activations: Activations<CpuBackend>,
    sampler: Sampler,
    /// The step's input, [`TOKEN_FROM_SLOT`] resolved.
    input: ModelInput,
    /// The step's final hidden states to be pooled, `[hidden_rows, hidden_size]`.
    hidden: Vec<f32>,
    /// The token that each slot drew last.
    last_tokens: Vec<Option<TokenId>>,
    next_step: u64,
    pending: Option<Pending>,
}

fn check_heads(checkpoint: &Checkpoint, model: &ModelConfig) -> Result<(), CpuRunnerError> {
    let width = model.head_dim;
    if width.is_multiple_of(HEAD_DIM_MULTIPLE) {
        return Ok(());
    }
    let message = format!("its heads have {width} values, not a multiple of {HEAD_DIM_MULTIPLE}");
    Err(checkpoint.unsupported(message).into())
}

fn kv_dtype(config: &CpuRunnerConfig) -> KvDtype {
    match (config.kv_dtype, config.dtype) {
        (KvDtype::Auto, Dtype::Float32) => KvDtype::Float32,
        (KvDtype::Auto, Dtype::Auto) => KvDtype::Float16,
        (explicit, _) => explicit,
    }
}

/// Empty; they grow with the largest step. `local` is a rank's part of the model.
fn activations(model: &ModelConfig, local: &ModelConfig) -> Activations<CpuBackend> {
    Activations {
        residual: CpuBuf::new(model.hidden_size),
        normed: CpuBuf::new(model.hidden_size),
        qkv: CpuBuf::new(local.qkv_size()),
        attention: CpuBuf::new(local.attention_size()),
        delta: CpuBuf::new(model.hidden_size),
        gate_up: CpuBuf::new(2 * local.intermediate_size),
        mlp: CpuBuf::new(local.intermediate_size),
        logits: CpuBuf::new(model.vocab_size),
        blocks: Vec::new(),
    }
}

impl CpuRunner {
    /// Opens and loads the model and reserves the KV cache.
    ///
    /// # Errors
    /// [`CpuRunnerError`] when the checkpoint cannot be used or the sizes do not fit each other.
    pub fn new(config: &CpuRunnerConfig) -> Result<Self, CpuRunnerError> {
        Self::build(config, None)
    }

    /// Cuts the model across `ranks` runners in this process, which share the threads.
    ///
    /// # Errors
    /// As [`Self::new`], and [`CpuRunnerError::Rank`].
    pub fn on_ranks(
        config: &CpuRunnerConfig,
        ranks: usize,
    ) -> Result<RankedRunner<Self>, CpuRunnerError> {
        let config = config.clone();
        RankedRunner::start(ranks, move |member| Self::of_rank(&config, member))
    }

    /// One rank's runner.
    ///
    /// # Errors
    /// As [`Self::on_ranks`].
    pub fn of_rank(config: &CpuRunnerConfig, member: Member) -> Result<Self, CpuRunnerError> {
        Self::build(config, Some(member))
    }

    fn build(config: &CpuRunnerConfig, member: Option<Member>) -> Result<Self, CpuRunnerError> {
        let started = Instant::now();
        let checkpoint = Checkpoint::open_for(&config.path, config.load_format)?;
        let model = ModelConfig::from_checkpoint(&checkpoint)?.with_fp8(config.quantize_fp8);
        let place = member
            .as_ref()
            .map_or((0, 1), |member| (member.rank(), member.ranks()));
        let (rank, ranks) = place;
        let partition = Partition::new(&checkpoint, &model, place)
            .map_err(|message| checkpoint.unsupported(message))?;
        let local = partition.local(&model);
        check_heads(&checkpoint, &model)?;
        let kv_dtype = kv_dtype(config);
        let limits = limits(config, &local, kv_dtype, ranks)?;
        let threads = match config.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let threads = (threads / ranks).max(1);
        let backend_config = CpuBackendConfig {
            exact: config.dtype == Dtype::Float32,
            kv_dtype,
            kv_scales: if kv_dtype == KvDtype::Fp8 {
                checkpoint.kv_scales(model.num_layers)?
            } else {
                Vec::new()
            },
            num_blocks: limits.num_blocks,
            threads,
        };
        let bytes =
            u64::from(limits.num_blocks) * u64::from(limits.block_size) * limits.kv_bytes_per_token;
        let places = member.map(|member| (member, partition.vocabulary));
        let backend = CpuBackend::new(&local, &backend_config, places)
            .ok_or(CpuRunnerError::CacheTooLarge { bytes })?;
        let decoder = loader::load(
            &checkpoint,
            &model,
            &partition,
            &backend,
            config.load_format,
            threads,
        )?;
        let activations = activations(&model, &local);
        tracing::info!(
            model = %config.path.display(),
            rank,
            ranks,
            threads,
            kv_cache_bytes = bytes,
            kv_cache_tokens = u64::from(limits.num_blocks - 1) * u64::from(limits.block_size),
            max_model_len = limits.max_model_len,
            seconds = started.elapsed().as_secs_f64(),
            "model ready"
        );
        Ok(Self {
            sampler: Sampler::new(
                limits.vocab_size,
                limits.max_num_seqs,
                model.eos_token_ids.clone(),
            ),
            last_tokens: vec![None; limits.max_num_seqs as usize],
            limits,
            costs: model.costs(checkpoint.num_bytes()),
            config: model,
            backend,
            decoder,
            activations,
            input: ModelInput::default(),
            hidden: Vec::new(),
            next_step: 0,
            pending: None,
        })
    }

    /// The model's sizes and special tokens.
    #[must_use]
    pub fn model_config(&self) -> &ModelConfig {
        &self.config
    }

    /// Takes the hidden rows out of the final hidden states and leaves those that want logits.
    fn take_hidden(&mut self) {
        let input = &self.input;
        let place = |row: &u32, others: &[u32]| {
            let before = others.partition_point(|other| other < row);
            u32::try_from(before).expect("a step is bounded by its budget: this is a bug")
        };
        let width = self.config.hidden_size;
        let normed = self.activations.normed.values();
        self.hidden.clear();
        for (own, row) in input.hidden_rows.iter().enumerate() {
            let at = (own + place(row, &input.logit_rows) as usize) * width;
            self.hidden.extend_from_slice(&normed[at..at + width]);
        }
        let logit_rows: Vec<u32> = (0..)
            .zip(&input.logit_rows)
            .map(|(own, row)| own + place(row, &input.hidden_rows))
            .collect();
        let normed = &mut self.activations.normed;
        self.backend.keep_rows(&logit_rows, normed);
    }

    /// Sums of hidden states.
    fn pool(&self, input: &SampleInput) -> Result<Vec<Pooled>, RunnerError> {
        let width = self.config.hidden_size;
        let sums = input.pool.iter().map(|pool| {
            let (start, end) = (pool.rows.start as usize, pool.rows.end as usize);
            if start >= end || end > self.input.hidden_rows.len() {
                return Err(refused(format!("hidden rows {start} to {end}")));
            }
            let mut sum = vec![0f64; width];
            for row in self.hidden[start * width..end * width].chunks_exact(width) {
                for (sum, value) in sum.iter_mut().zip(row) {
                    *sum += f64::from(*value);
                }
            }
            Ok(Pooled {
                seq: pool.seq,
                epoch: pool.epoch,
                sum,
            })
        });
        sums.collect()
    }

    /// Copies the input, with tokens of slots in place of [`TOKEN_FROM_SLOT`].
    fn take_input(&mut self, input: &ModelInput) -> Result<(), RunnerError> {
        self.input.clone_from(input);
        for seq in &input.seqs {
            let rows = seq.query_start as usize..(seq.query_start + seq.query_len) as usize;
            for token in &mut self.input.token_ids[rows] {
                if *token == TOKEN_FROM_SLOT {
                    *token = self.last_tokens[seq.slot.0 as usize].ok_or_else(|| {
                        refused(format!("slot {} has drawn no token yet", seq.slot.0))
                    })?;
                }
            }
        }
        Ok(())
    }
}

impl ModelRunner for CpuRunner {
    fn limits(&self) -> &RunnerLimits {
        &self.limits
    }

    fn submit(&mut self, input: &ModelInput) -> Result<StepId, RunnerError> {
        if self.pending.is_some() {
            return Err(refused(
                "a step is still in flight and this runner's depth is 1".to_owned(),
            ));
        }
        check(input, &self.limits)?;
        for init in &input.init_slots {
            self.sampler.init_slot(init);
            self.last_tokens[init.slot.0 as usize] = None;
        }
        self.take_input(input)?;
        let (backend, activations) = (&mut self.backend, &mut self.activations);
        self.decoder.hidden(backend, &self.input, activations);
        if !self.input.hidden_rows.is_empty() {
            self.take_hidden();
        }
        if !self.input.logit_rows.is_empty() {
            self.decoder
                .logits(&mut self.backend, &mut self.activations);
        }
        self.backend.take_error()?;
        let id = StepId(self.next_step);
        self.next_step += 1;
        self.pending = Some(Pending { id, sampled: None });
        Ok(id)
    }

    fn sample(&mut self, step: StepId, input: &SampleInput) -> Result<(), RunnerError> {
        if !matches!(&self.pending, Some(Pending { id, sampled: None }) if *id == step) {
            return Err(refused(format!("step {} does not wait for a draw", step.0)));
        }
        let rows = self.input.logit_rows.len();
        if let Some(row) = input
            .rows
            .iter()
            .find(|row| row.logit_index as usize >= rows)
        {
            return Err(refused(format!(
                "logit index {} of {rows}",
                row.logit_index
            )));
        }
        let mut output = StepOutput {
            pooled: self.pool(input)?,
            ..StepOutput::default()
        };
        let logits = &mut self.activations.logits;
        if input.return_logits {
            output
                .logits
                .extend_from_slice(&logits.values()[..rows * self.config.vocab_size]);
        }
        let sampler = &self.sampler;
        let drawn: Vec<Option<Result<GeneratedToken, SampleError>>> = self.backend.map_rows(
            logits,
            input.rows.iter().map(|row| row.logit_index as usize),
            |index, logits| sampler.sample(&input.rows[index], logits),
        );
        for (row, drawn) in input.rows.iter().zip(drawn) {
            let drawn = drawn
                .ok_or_else(|| refused(format!("two rows draw from logits {}", row.logit_index)))?;
            if let Err(error) = &drawn {
                tracing::warn!(slot = row.slot.0, seq = row.seq.0, %error, "a row has no token; its request fails");
            }
            let token = drawn.ok();
            if let Some(token) = &token {
                self.last_tokens[row.slot.0 as usize] = Some(token.id);
            }
            output.rows.push(SampledRow {
                slot: row.slot,
                seq: row.seq,
                epoch: row.epoch,
                tokens: token.into_iter().collect(),
            });
        }
        self.pending = Some(Pending {
            id: step,
            sampled: Some(output),
        });
        Ok(())
    }

    fn poll(&mut self, step: StepId, _wait: Duration) -> Result<Option<StepOutput>, RunnerError> {
        match self.pending.take() {
            Some(Pending {
                id,
                sampled: Some(output),
            }) if id == step => Ok(Some(output)),
            pending => {
                self.pending = pending;
                Err(refused(format!(
                    "step {} was not submitted and sampled",
                    step.0
                )))
            }
        }
    }

    fn depth(&self) -> usize {
        1
    }

    fn hidden_size(&self) -> Option<u32> {
        u32::try_from(self.config.hidden_size).ok()
    }

    fn costs(&self) -> Option<ModelCosts> {
        Some(self.costs)
    }
}

#[cfg(test)]
mod tests;
