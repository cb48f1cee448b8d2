//! Draws on the GPU: what each slot asks for is kept here, and turned into the kernel's rows at each step.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use ashlar_kernels::cuda::{
    CudaError, Device, DeviceBuffer, Event, PinnedBuffer, View,
    sampling::{
        MAX_LOGPROBS, NO_TOKEN_FORBIDDEN, NO_TOKEN_NON_FINITE, Sample, SampleRow as GpuRow,
        init_counts,
    },
};

use super::{staging::Staging, step::put32};
use crate::{
    engine::request::{GeneratedToken, SamplingParams, SeqId, TokenId, TokenLogprobs},
    model_runner::{
        RunnerLimits, SampleInput, SampleRow, SampledRow, Slot, SlotInit, StepId, StepOutput,
    },
};

/// What a slot asks for.
struct SlotState {
    params: Arc<SamplingParams>,
    choice_index: u32,
    /// Tokens forbidden until `min_tokens` are generated.
    ends: Vec<TokenId>,
    has_counts: bool,
}

/// A row that was drawn and not yet handed out.
struct Drawn {
    slot: Slot,
    seq: SeqId,
    epoch: u32,
    /// Most likely tokens it wants, if it wants log-probabilities.
    logprobs: Option<usize>,
}

/// A step whose draw is queued.
struct Pending {
    step: StepId,
    rows: Vec<Drawn>,
    event: Event,
    results: PinnedBuffer,
    logits: Vec<f32>,
}

/// Where results lie, in the device's memory and in the host's copy.
#[derive(Clone, Copy)]
struct ResultLayout {
    logprobs: usize,
    ids: usize,
    bytes: usize,
}

impl ResultLayout {
    fn new(rows: usize) -> Self {
        let logprobs = (rows * 4).next_multiple_of(16);
        let ids = logprobs + rows * (MAX_LOGPROBS + 1) * 4;
        Self {
            logprobs,
            ids,
            bytes: ids + rows * MAX_LOGPROBS * 4,
        }
    }
}

/// Slots, staging and results of draws.
pub(super) struct GpuSampler {
    device: Device,
    vocab: usize,
    eos_token_ids: Vec<TokenId>,
    slots: Vec<Option<SlotState>>,
    /// `[slots, vocab]` u16, from the first request with penalties on.
    counts: Option<DeviceBuffer>,
    rows: DeviceBuffer,
    rows_staging: Staging,
    extra: DeviceBuffer,
    extra_staging: Staging,
    words: Vec<u32>,
    results: DeviceBuffer,
    layout: ResultLayout,
    spare_results: Vec<PinnedBuffer>,
    pending: VecDeque<Pending>,
}

impl GpuSampler {
    pub(super) fn new(
        device: &Device,
        limits: &RunnerLimits,
        eos_token_ids: Vec<TokenId>,
    ) -> Result<Self, CudaError> {
        let slots = limits.max_num_seqs as usize;
        let layout = ResultLayout::new(slots);
        let rows = device.alloc(slots * GpuRow::BYTES)?;
        let extra = device.alloc(64 << 10)?;
        let results = || device.alloc_pinned(layout.bytes);
        Ok(Self {
            device: device.clone(),
            vocab: limits.vocab_size as usize,
            eos_token_ids,
            slots: (0..slots).map(|_| None).collect(),
            counts: None,
            rows_staging: Staging::new(device, rows.len())?,
            rows,
            extra_staging: Staging::new(device, extra.len())?,
            extra,
            words: Vec::new(),
            results: device.alloc(layout.bytes)?,
            // For as many draws as are in flight; taking more later would wait for the GPU.
            spare_results: vec![results()?, results()?],
            layout,
            pending: VecDeque::new(),
        })
    }

    /// Binds a slot to a sequence; what it held before is forgotten.
    pub(super) fn init_slot(&mut self, init: &SlotInit) -> Result<(), CudaError> {
        let params = Arc::clone(&init.params);
        let mut ends = params.stop_token_ids.clone();
        if !params.ignore_eos {
            ends.extend_from_slice(&self.eos_token_ids);
        }
        let has_counts = params.repetition_penalty != 1.0
            || params.presence_penalty != 0.0
            || params.frequency_penalty != 0.0;
        if has_counts {
            self.count(init)?;
        }
        self.slots[init.slot.0 as usize] = Some(SlotState {
            params,
            choice_index: init.choice_index,
            ends,
            has_counts,
        });
        Ok(())
    }

    /// Counts a slot's tokens on the GPU.
    fn count(&mut self, init: &SlotInit) -> Result<(), CudaError> {
        if self.counts.is_none() {
            let bytes = self.slots.len() * self.vocab * 2;
            self.counts = Some(self.device.alloc(bytes)?);
        }
        let tokens = || init.prompt.iter().chain(&init.output).copied();
        let num_tokens = init.prompt.len() + init.output.len();
        // Waits for what is queued: binding a slot with penalties is rare, and its tokens are short-lived.
        let buffer = self.device.alloc(num_tokens * 4)?;
        let mut bytes = vec![0; num_tokens * 4];
        put32(&mut bytes, 0, tokens());
        self.device.write(&bytes, buffer.view())?;
        let counts = self.counts.as_ref().map(DeviceBuffer::view);
        let counts = counts.expect("allocated above: this is a bug");
        init_counts(
            &self.device,
            counts,
            init.slot.0 as usize,
            self.vocab,
            buffer.view(),
            (init.prompt.len(), init.output.len()),
        )
    }

    fn row(&mut self, row: &SampleRow) -> Option<GpuRow> {
        let state = self.slots.get(row.slot.0 as usize)?.as_ref()?;
        let params = &state.params;
        let words = &mut self.words;
        let mut gpu = GpuRow {
            slot: row.slot.0,
            logit_row: row.logit_index,
            position: row.position,
            choice: state.choice_index,
            seed: params.seed.unwrap_or(0),
            temperature: params.temperature,
            top_p: params.top_p,
            min_p: params.min_p,
            repetition: params.repetition_penalty,
            presence: params.presence_penalty,
            frequency: params.frequency_penalty,
            top_k: params.top_k,
            num_logprobs: params
                .logprobs
                .map_or(0, |count| count.min(MAX_LOGPROBS as u32) + 1),
            mask: -1,
            has_counts: i32::from(state.has_counts),
            ..GpuRow::default()
        };
        let here = |words: &Vec<u32>| i32::try_from(words.len()).unwrap_or(i32::MAX);
        gpu.bias = here(words);
        for (token, bias) in &params.logit_bias {
            words.extend([*token, bias.to_bits()]);
        }
        gpu.num_bias = params.logit_bias.len() as i32;
        if row.num_generated < params.min_tokens {
            gpu.forbidden = here(words);
            words.extend_from_slice(&state.ends);
            gpu.num_forbidden = state.ends.len() as i32;
        }
        if let Some(mask) = &row.mask {
            gpu.mask = here(words);
            let width = self.vocab.div_ceil(32);
            words.extend(mask.iter().copied().chain(std::iter::repeat(0)).take(width));
        }
        Some(gpu)
    }

    /// Queues the draw of a step. `logits` are copied out first if they are wanted.
    pub(super) fn sample(
        &mut self,
        step: StepId,
        input: &SampleInput,
        logits: View<'_>,
        num_logit_rows: usize,
        last_tokens: View<'_>,
    ) -> Result<(), CudaError> {
        let copied = if input.return_logits && num_logit_rows > 0 {
            let bytes = self
                .device
                .read(logits.slice(0, num_logit_rows * self.vocab * 4))?;
            let values = bytes.as_chunks::<4>().0.iter();
            values.map(|value| f32::from_le_bytes(*value)).collect()
        } else {
            Vec::new()
        };
        self.words.clear();
        let mut bytes = Vec::with_capacity(input.rows.len() * GpuRow::BYTES);
        let mut rows = Vec::with_capacity(input.rows.len());
        for row in &input.rows {
            let gpu = self.row(row).ok_or_else(|| CudaError::Shape {
                op: "sample",
                message: format!(
                    "slot {} is not bound to a sequence: this is a bug",
                    row.slot.0
                ),
            })?;
            bytes.extend_from_slice(&gpu.to_bytes());
            rows.push(Drawn {
                slot: row.slot,
                seq: row.seq,
                epoch: row.epoch,
                logprobs: (gpu.num_logprobs > 0).then(|| gpu.num_logprobs as usize - 1),
            });
        }
        let mut results = match self.spare_results.pop() {
            Some(results) => results,
            None => self.device.alloc_pinned(self.layout.bytes)?,
        };
        if !rows.is_empty() {
            self.launch(&bytes, &rows, logits, last_tokens, &mut results)?;
        }
        self.pending.push_back(Pending {
            step,
            rows,
            event: self.device.record()?,
            results,
            logits: copied,
        });
        Ok(())
    }

    fn launch(
        &mut self,
        bytes: &[u8],
        rows: &[Drawn],
        logits: View<'_>,
        last_tokens: View<'_>,
        results: &mut PinnedBuffer,
    ) -> Result<(), CudaError> {
        self.rows_staging
            .upload(bytes.len(), self.rows.view(), |to| {
                to[..bytes.len()].copy_from_slice(bytes);
            })?;
        let num_words = self.words.len();
        if num_words > 0 {
            if self.extra.len() < num_words * 4 {
                self.extra = self.device.alloc((num_words * 4).next_power_of_two())?;
            }
            let words = &self.words;
            self.extra_staging
                .upload(num_words * 4, self.extra.view(), |to| {
                    put32(to, 0, words.iter().copied());
                })?;
        }
        let view = self.results.view();
        Sample {
            logits,
            rows: self.rows.view(),
            extra: self.extra.view(),
            counts: self.counts.as_ref().map(DeviceBuffer::view),
            last_tokens,
            tokens: view,
            logprobs: view.from(self.layout.logprobs),
            logprob_ids: view.from(self.layout.ids),
            count: rows.len(),
            vocab: self.vocab,
        }
        .launch(&self.device)?;
        let wanted = if rows.iter().any(|row| row.logprobs.is_some()) {
            self.layout.bytes
        } else {
            rows.len() * 4
        };
        self.device.download(view.slice(0, wanted), results)
    }

    /// The result of a step whose draw is queued, waiting for at most `wait`.
    pub(super) fn poll(
        &mut self,
        step: StepId,
        wait: Duration,
    ) -> Result<Option<StepOutput>, CudaError> {
        let Some(front) = self.pending.front().filter(|front| front.step == step) else {
            return Err(CudaError::Shape {
                op: "poll",
                message: format!("step {} was not submitted and sampled", step.0),
            });
        };
        if !front.event.wait(wait)? {
            return Ok(None);
        }
        let Some(pending) = self.pending.pop_front() else {
            return Ok(None);
        };
        let words = |offset: usize, count: usize| {
            let chunks = pending.results.bytes()[offset..].as_chunks::<4>().0;
            chunks[..count].iter().map(|word| u32::from_le_bytes(*word))
        };
        let rows = pending.rows.iter().enumerate().map(|(index, row)| {
            let id = words(index * 4, 1).next().unwrap_or(NO_TOKEN_NON_FINITE);
            let token = if id == NO_TOKEN_NON_FINITE || id == NO_TOKEN_FORBIDDEN {
                let reason = if id == NO_TOKEN_NON_FINITE {
                    "the logits are not finite"
                } else {
                    "no token is allowed"
                };
                tracing::warn!(
                    slot = row.slot.0,
                    seq = row.seq.0,
                    reason,
                    "a row has no token; its request fails"
                );
                None
            } else {
                let logprobs = row.logprobs.map(|count| {
                    let start = self.layout.logprobs + index * (MAX_LOGPROBS + 1) * 4;
                    let mut values = words(start, count + 1).map(f32::from_bits);
                    let ids = words(self.layout.ids + index * MAX_LOGPROBS * 4, count);
                    TokenLogprobs {
                        sampled: values.next().unwrap_or(0.0),
                        top: ids.zip(values).collect(),
                    }
                });
                Some(GeneratedToken { id, logprobs })
            };
            SampledRow {
                slot: row.slot,
                seq: row.seq,
                epoch: row.epoch,
                tokens: token.into_iter().collect(),
            }
        });
        let output = StepOutput {
            rows: rows.collect(),
            logits: pending.logits,
            ..StepOutput::default()
        };
        self.spare_results.push(pending.results);
        Ok(Some(output))
    }
}
