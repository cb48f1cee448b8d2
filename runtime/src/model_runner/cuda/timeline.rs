//! What the GPU and the host do over many steps: `ASHLAR_LOG=info,ashlar::timeline=debug` prints it every 200 steps.

use std::{collections::VecDeque, time::Duration};

use ashlar_kernels::cuda::{CudaError, Device, Event};

use crate::model_runner::StepId;

/// Steps in a line of the log.
const STEPS: u32 = 200;

/// A step that has been queued.
struct Queued {
    step: StepId,
    start: Event,
    end: Option<Event>,
}

/// Sums over the steps since the last line.
#[derive(Default)]
pub(super) struct Timeline {
    queued: VecDeque<Queued>,
    last_end: Option<Event>,
    steps: u32,
    rows: u64,
    busy_ms: f64,
    idle_ms: f64,
    longest_idle_ms: f64,
    host: Duration,
}

impl Timeline {
    /// One, if anyone would read its lines.
    pub(super) fn if_wanted() -> Option<Self> {
        tracing::enabled!(target: "ashlar::timeline", tracing::Level::DEBUG).then(Self::default)
    }

    /// A step of `rows` rows is about to be queued.
    pub(super) fn begin(
        &mut self,
        device: &Device,
        step: StepId,
        rows: usize,
    ) -> Result<(), CudaError> {
        self.rows += rows as u64;
        self.queued.push_back(Queued {
            step,
            start: device.record()?,
            end: None,
        });
        Ok(())
    }

    /// All of the latest step is queued; the host took so long for it.
    pub(super) fn queued(&mut self, device: &Device, host: Duration) -> Result<(), CudaError> {
        self.host += host;
        if let Some(last) = self.queued.back_mut() {
            last.end = Some(device.record()?);
        }
        Ok(())
    }

    /// A step's results are there. Its end may still be a moment away: the step before it is counted.
    pub(super) fn finished(&mut self, step: StepId) -> Result<(), CudaError> {
        while self.queued.front().is_some_and(|front| front.step < step) {
            let Some(Queued { start, end, .. }) = self.queued.pop_front() else {
                return Ok(());
            };
            let Some(end) = end else { continue };
            self.busy_ms += f64::from(start.elapsed_ms(&end)?);
            if let Some(last) = self.last_end.replace(end) {
                let idle = f64::from(last.elapsed_ms(&start)?).max(0.0);
                self.idle_ms += idle;
                self.longest_idle_ms = self.longest_idle_ms.max(idle);
            }
            self.steps += 1;
        }
        if self.steps >= STEPS {
            tracing::debug!(
                target: "ashlar::timeline",
                steps = self.steps,
                rows = self.rows,
                gpu_busy_ms = self.busy_ms,
                gpu_idle_ms = self.idle_ms,
                longest_idle_ms = self.longest_idle_ms,
                host_queues_ms = self.host.as_secs_f64() * 1e3,
                "the GPU between steps"
            );
            *self = Self {
                queued: std::mem::take(&mut self.queued),
                last_end: self.last_end.take(),
                ..Self::default()
            };
        }
        Ok(())
    }
}
