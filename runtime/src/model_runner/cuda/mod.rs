//! The GPU's [`ModelRunner`]: steps are queued, not waited for; depth 2.
//!
//! ```text
//! submit: step (index arrays, work lists) ──one copy──► graph (decode) or launches (with prompts)
//! sample: rows ──one copy──► draw ──► tokens: to `last_tokens`, which the next step reads, and to the host
//! ```
//!
//! Invariants: a submitted [`ModelInput`] is checked against the limits before anything is queued; memory is reserved at
//! start, none during steps but for rare growth of staging; a decode step runs the graph of the next larger bucket, whose
//! padding rows write nothing.

mod backend;
mod config;
mod integers;
mod layout;
mod matrix;
mod place;
mod sampling;
mod shared_prefix;
mod staging;
mod start;
mod step;
mod timeline;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

pub use self::config::{CudaRunnerConfig, CudaRunnerError};
pub use ashlar_kernels::cuda::{CudaError, Float, KvDtype};
use ashlar_kernels::cuda::{
    Device, Graph,
    attention::DecodeAttention,
    gemm,
    peers::{Peers, Way},
};

use self::{
    backend::CudaBackend,
    layout::Layout,
    place::{Place, load_products},
    sampling::GpuSampler,
    staging::Staging,
    start::{
        activations, backend_config, buckets, check_widths, float_of, has_integers, keep_values,
        layer_matrices, limits, load_threads, model_len, tune,
    },
    step::StepBuilder,
    timeline::Timeline,
};
use super::{
    ModelCosts, ModelInput, ModelRunner, RunnerError, RunnerLimits, SampleInput, SeqInput, Slot,
    StepId, StepOutput,
    check::{check, refused},
    max_logit_rows,
    ranks::{Member, RankedRunner},
};
use crate::{
    models::{
        config::ModelConfig,
        decoder::{Activations, Decoder},
        loader::{self},
        shard::Partition,
    },
    weights::Checkpoint,
};

/// Tokens in a block.
pub const BLOCK_SIZE: u32 = ashlar_kernels::cuda::rope::BLOCK_SIZE as u32;

/// Whether a model could run on the first GPU.
///
/// # Errors
/// [`CudaError::NoDevice`] saying what is missing.
pub fn probe() -> Result<(), CudaRunnerError> {
    Ok(Device::probe()?)
}

/// GPUs of this machine.
///
/// # Errors
/// [`CudaError::NoDevice`] saying what is missing.
pub fn count() -> Result<usize, CudaRunnerError> {
    Ok(Device::count()?)
}

/// Runs a model of the Llama family on one GPU, or a tensor-parallel rank's part of it.
pub struct CudaRunner {
    limits: RunnerLimits,
    config: ModelConfig,
    costs: ModelCosts,
    device: Device,
    backend: CudaBackend,
    decoder: Decoder<CudaBackend>,
    activations: Activations<CudaBackend>,
    sampler: GpuSampler,
    builder: StepBuilder,
    staging: Staging,
    /// By rows.
    graphs: BTreeMap<usize, Graph>,
    /// By rows, for steps whose rows share what they read; made when the first such step comes.
    sharing_graphs: BTreeMap<usize, Graph>,
    /// The submitted step that has not been sampled, and its rows of logits.
    submitted: Option<(StepId, usize)>,
    next_step: u64,
    /// Its place among the ranks, which learn from it if this thread panics.
    member: Option<Member>,
    timeline: Option<Timeline>,
    /// What queueing the submitted step took.
    host_time: Duration,
}

impl CudaRunner {
    /// Opens the GPU, loads the model, reserves the KV cache, and captures the graphs.
    ///
    /// # Errors
    /// [`CudaRunnerError`] when there is no GPU, the checkpoint cannot be used, or the sizes do not fit each other.
    pub fn new(config: &CudaRunnerConfig) -> Result<Self, CudaRunnerError> {
        Self::build(config, None)
    }

    /// Cuts the model across ranks, each on the GPU of this number (of `config.ordinal`, none). Ranks may share a GPU,
    /// which tests do.
    ///
    /// # Errors
    /// As [`Self::new`], [`CudaRunnerError::TooFewGpus`] and [`CudaRunnerError::Rank`].
    pub fn on_ranks(
        config: &CudaRunnerConfig,
        ordinals: &[usize],
    ) -> Result<RankedRunner<Self>, CudaRunnerError> {
        let found = count()?;
        if ordinals.iter().any(|ordinal| *ordinal >= found) {
            let asked = ordinals.len();
            return Err(CudaRunnerError::TooFewGpus { asked, found });
        }
        let configs: Vec<CudaRunnerConfig> = ordinals
            .iter()
            .map(|ordinal| CudaRunnerConfig {
                ordinal: *ordinal,
                ..config.clone()
            })
            .collect();
        RankedRunner::start(ordinals.len(), move |member| {
            Self::build(&configs[member.rank()], Some(member))
        })
    }

    fn build(config: &CudaRunnerConfig, member: Option<Member>) -> Result<Self, CudaRunnerError> {
        let started = Instant::now();
        let device = Device::open(config.ordinal)?;
        let checkpoint = Checkpoint::open_for(&config.path, config.load_format)?;
        let whole = ModelConfig::from_checkpoint(&checkpoint)?.with_fp8(config.quantize_fp8);
        let (rank, ranks) = member
            .as_ref()
            .map_or((0, 1), |member| (member.rank(), member.ranks()));
        let partition = Partition::new(&checkpoint, &whole, (rank, ranks))
            .map_err(|message| checkpoint.unsupported(message))?;
        let model = partition.local(&whole);
        check_widths(&checkpoint, &model)?;
        let float = config
            .dtype
            .unwrap_or_else(|| float_of(&checkpoint, &model));
        let max_model_len = model_len(config, &model)?;
        let max_logit_rows = max_logit_rows(config.max_num_seqs) as usize;
        let max_rows = gemm::bucket(config.max_num_batched_tokens as usize);
        let kv_scales = match config.kv_dtype {
            KvDtype::Float => vec![[1.0; 2]; model.num_layers],
            KvDtype::Fp8 => checkpoint.kv_scales(model.num_layers)?,
        };
        let mut backend_config =
            backend_config(&device, config, &model, float, max_model_len, kv_scales);
        backend_config.integers = float == Float::F16 && has_integers(&checkpoint, &model);
        let mut backend = CudaBackend::new(&device, &model, &backend_config)?;
        let decoder = loader::load(
            &checkpoint,
            &whole,
            &partition,
            &backend,
            config.load_format,
            load_threads(ranks),
        )?;
        backend.reserve_scratch(layer_matrices(&decoder), max_rows)?;
        let mut activations = activations(&device, &model, max_rows, max_logit_rows)?;
        if let Some(member) = &member {
            let sizes = (max_rows, gemm::bucket(max_logit_rows));
            let held = partition.vocabulary.padded;
            let mut place = Place::take(member, &device, &decoder, &mut activations, sizes, held)?;
            place.way = config.batch_invariant.then_some(Way::Read);
            backend.place = Some(place);
        }
        let kept_bytes = keep_values(config, &mut backend, &decoder)?;
        device.synchronize()?;
        let loaded = started.elapsed();
        tune(&backend, &decoder, &activations, (max_rows, max_logit_rows))?;
        if ranks > 1 {
            load_products(&backend, &decoder, &activations, (max_rows, max_logit_rows))?;
        }
        let mut limits = limits(config, &model, &backend, max_model_len, ranks)?;
        if let Some(member) = &member {
            // As many blocks as the fullest GPU has room for; behind this, ranks wait for each other no more than in steps.
            let all = member.exchange((limits.num_blocks, limits.max_model_len))?;
            for theirs in all {
                limits.num_blocks = limits.num_blocks.min(theirs.0);
                limits.max_model_len = limits.max_model_len.min(theirs.1);
            }
        }
        backend.set_cache(limits.num_blocks as usize)?;
        let tuned = started.elapsed();
        let mut runner = Self {
            sampler: GpuSampler::new(&device, &limits, model.eos_token_ids.clone())?,
            staging: Staging::new(&device, backend_config.step_bytes)?,
            limits,
            costs: whole.costs(checkpoint.num_bytes()),
            config: model,
            backend,
            decoder,
            activations,
            // A graph made while ranks run would have to be made by all at once.
            builder: StepBuilder::new(ranks == 1, config.batch_invariant),
            graphs: BTreeMap::new(),
            sharing_graphs: BTreeMap::new(),
            submitted: None,
            next_step: 0,
            timeline: Timeline::if_wanted(),
            host_time: Duration::ZERO,
            device,
            member,
        };
        runner.device.synchronize()?;
        if let Some(member) = &runner.member {
            member.exchange(())?;
        }
        if !config.enforce_eager {
            runner.capture_graphs()?;
        }
        runner.device.synchronize()?;
        tracing::info!(
            gpu = runner.device.name()?,
            rank,
            ranks,
            model = %config.path.display(),
            dequantized_bytes = kept_bytes,
            kv_cache_blocks = runner.limits.num_blocks,
            kv_cache_tokens = u64::from(runner.limits.num_blocks - 1) * u64::from(BLOCK_SIZE),
            max_model_len = runner.limits.max_model_len,
            graphs = runner.graphs.len(),
            load_seconds = loaded.as_secs_f64(),
            tune_seconds = (tuned - loaded).as_secs_f64(),
            capture_seconds = (started.elapsed() - tuned).as_secs_f64(),
            "model ready"
        );
        Ok(runner)
    }

    /// The model's sizes and special tokens.
    #[must_use]
    pub fn model_config(&self) -> &ModelConfig {
        &self.config
    }

    fn capture_graphs(&mut self) -> Result<(), CudaError> {
        let buckets = buckets(self.limits.max_num_seqs as usize);
        let small = self.backend.fused_rows();
        let first_large = buckets.iter().copied().find(|rows| *rows > small);
        // Kernels load at their first launch, which a capture must not contain. All run before the first capture: making a
        // graph may wait for kernels that run, and those of tensor-parallel ranks wait for each other.
        for rows in &buckets {
            if *rows <= small || Some(*rows) == first_large {
                let (input, layout) = self.decode_step(*rows);
                self.stage(&input, layout)?;
                self.run_layers(&input, layout)?;
            }
        }
        self.device.synchronize()?;
        for rows in buckets {
            let (input, layout) = self.decode_step(rows);
            let device = self.device.clone();
            let graph = device.capture(|| self.run_layers(&input, layout))?;
            self.graphs.insert(rows, graph);
        }
        Ok(())
    }

    /// A step of so many sequences that nobody waits for, and where its arrays lie.
    fn decode_step(&mut self, rows: usize) -> (ModelInput, Layout) {
        let input = decode_input(rows);
        let shape = self.backend.shape;
        let processors = self.device.multiprocessors();
        let layout = self.builder.plan(&input, Some(rows), &shape, processors);
        (input, layout)
    }

    fn run_layers(&mut self, input: &ModelInput, layout: Layout) -> Result<(), CudaError> {
        self.backend.begin_step(layout);
        self.decoder
            .forward(&mut self.backend, input, &mut self.activations);
        self.backend.take_error()
    }

    fn stage(&mut self, input: &ModelInput, layout: Layout) -> Result<(), CudaError> {
        let builder = &self.builder;
        self.staging
            .upload(layout.bytes, self.backend.step.view(), |bytes| {
                builder.write(input, &layout, bytes);
            })
    }

    fn queue(&mut self, input: &ModelInput) -> Result<(), CudaError> {
        for init in &input.init_slots {
            self.sampler.init_slot(init)?;
        }
        let rows = input.token_ids.len();
        let is_decode = rows == input.seqs.len() && rows == input.logit_rows.len();
        let graph = self
            .graphs
            .range(rows..)
            .next()
            .filter(|_| is_decode)
            .map(|(rows, _)| *rows);
        let shape = self.backend.shape;
        let processors = self.device.multiprocessors();
        let layout = self.builder.plan(input, graph, &shape, processors);
        self.stage(input, layout)?;
        let Some(rows) = graph.filter(|_| layout.counts.rotates || !self.rotates()) else {
            return self.run_layers(input, layout);
        };
        if layout.counts.shares && !self.sharing_graphs.contains_key(&rows) {
            // Kernels load at their first launch, which a capture must not contain.
            self.run_layers(input, layout)?;
            let device = self.device.clone();
            let graph = device.capture(|| self.run_layers(input, layout))?;
            self.sharing_graphs.insert(rows, graph);
            return Ok(());
        }
        let graphs = if layout.counts.shares {
            &self.sharing_graphs
        } else {
            &self.graphs
        };
        graphs.get(&rows).map_or(Ok(()), Graph::launch)
    }

    /// Whether decode attention rotates q and k on the way, where it may.
    fn rotates(&self) -> bool {
        !self.backend.batch_invariant && DecodeAttention::rotates(self.config.head_dim)
    }
}

/// A decode step of `rows` sequences of one token, to capture a graph with: block 0 holds nothing of anyone.
fn decode_input(rows: usize) -> ModelInput {
    let seq = |row: usize| SeqInput {
        slot: Slot(row as u32),
        query_start: row as u32,
        query_len: 1,
        context_len: 1,
        block_table: vec![crate::kv_cache::BlockId(0)],
    };
    ModelInput {
        token_ids: vec![0; rows],
        positions: vec![0; rows],
        slot_mapping: vec![super::PADDING; rows],
        seqs: (0..rows).map(seq).collect(),
        logit_rows: (0..rows as u32).collect(),
        ..ModelInput::default()
    }
}

fn failed(error: &CudaError) -> RunnerError {
    RunnerError {
        message: error.to_string(),
        fatal: error.is_fatal(),
    }
}

impl ModelRunner for CudaRunner {
    fn limits(&self) -> &RunnerLimits {
        &self.limits
    }

    fn costs(&self) -> Option<ModelCosts> {
        Some(self.costs)
    }

    fn submit(&mut self, input: &ModelInput) -> Result<StepId, RunnerError> {
        check(input, &self.limits)?;
        self.device.bind().map_err(|error| failed(&error))?;
        let id = StepId(self.next_step);
        self.next_step += 1;
        if let Some(timeline) = &mut self.timeline {
            let begun = timeline.begin(&self.device, id, input.token_ids.len());
            begun.map_err(|error| failed(&error))?;
        }
        let started = Instant::now();
        self.queue(input).map_err(|error| failed(&error))?;
        self.host_time = started.elapsed();
        self.submitted = Some((id, input.logit_rows.len()));
        Ok(id)
    }

    fn sample(&mut self, step: StepId, input: &SampleInput) -> Result<(), RunnerError> {
        let submitted = self.submitted.take().filter(|(id, _)| *id == step);
        let Some((_, logit_rows)) = submitted else {
            return Err(refused(format!("step {} does not wait for a draw", step.0)));
        };
        if let Some(row) = input
            .rows
            .iter()
            .find(|row| row.logit_index as usize >= logit_rows)
        {
            return Err(refused(format!(
                "logit index {} of {logit_rows}",
                row.logit_index
            )));
        }
        let logits = self.activations.logits.view();
        let last_tokens = self.backend.last_tokens.view();
        let started = Instant::now();
        self.sampler
            .sample(step, input, logits, logit_rows, last_tokens)
            .map_err(|error| failed(&error))?;
        if let Some(timeline) = &mut self.timeline {
            let host = self.host_time + started.elapsed();
            let queued = timeline.queued(&self.device, host);
            queued.map_err(|error| failed(&error))?;
        }
        Ok(())
    }

    fn poll(&mut self, step: StepId, wait: Duration) -> Result<Option<StepOutput>, RunnerError> {
        let output = self.sampler.poll(step, wait);
        let output = output.map_err(|error| failed(&error))?;
        if let Some(timeline) = self.timeline.as_mut().filter(|_| output.is_some()) {
            timeline.finished(step).map_err(|error| failed(&error))?;
        }
        let peers = self.backend.place.as_ref().map(|place| &place.peers);
        match peers.and_then(Peers::lost) {
            Some(rank) => Err(failed(&CudaError::Lost { rank })),
            None => Ok(output),
        }
    }

    fn depth(&self) -> usize {
        2
    }
}
