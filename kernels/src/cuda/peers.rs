//! What tensor-parallel ranks do together over each other's memory: sums fused with the residual and its norm, and the
//! columns of the logits. Ranks are in one process, each with a [`Device`] of its own, on as many GPUs or on one.
//!
//! Every rank launches the same operations in the same order. Kernels of several ranks then wait for each other on the
//! GPUs, without the host, and inside graphs. A rank that does not come is noticed by the others' kernels within
//! [`TIME_LIMIT`]; they go on with nonsense, and [`Peers::lost`] tells.

use std::{sync::Arc, time::Duration};

use cudarc::driver::sys;

use super::{
    CudaError, Device, DeviceBuffer, Float, PinnedBuffer, View,
    device::driver_error,
    modules::{Shape, arguments},
    need,
};

/// Most ranks.
pub const MAX_RANKS: usize = 8;
/// How long kernels wait for another rank's, as `peers.cu` has it.
pub const TIME_LIMIT: Duration = Duration::from_secs(5);
/// Most rows that are sent as mail.
const MAIL_ROWS: usize = 64;
/// Most bytes that a rank sends as mail: beyond, reading rows where they lie is faster (between two H200, 8 rows of 4,096
/// values take 3.7 µs against 4.4, 16 take 5.1 against 4.6).
const MAIL_BYTES: usize = 96 << 10;
/// Bytes over a rank's links that two shots must spare to be faster than reading: what their second barrier costs (between four
/// H200, 16 rows of 8,192 values take 8.4 µs in two shots against 7.5, 32 take 9.5 against 11.2).
const SPARED_BYTES: usize = 512 << 10;
/// Most blocks that meet in a barrier.
const MAX_BLOCKS: usize = 528;
/// Widest row of which each thread holds one vector.
const NARROW: usize = 8 * 1024;

/// What one rank shows the others.
pub struct Endpoint {
    device: Device,
    mail: DeviceBuffer,
    flags: DeviceBuffer,
    deltas: [Arc<DeviceBuffer>; 2],
    logits: Arc<DeviceBuffer>,
}

impl Endpoint {
    /// Takes what peers will read and write: rows to be summed, `[rows, width]` twice, in turns, and all logits.
    ///
    /// # Errors
    /// [`CudaError`].
    pub fn new(
        device: &Device,
        ranks: usize,
        width: usize,
        deltas: [Arc<DeviceBuffer>; 2],
        logits: Arc<DeviceBuffer>,
    ) -> Result<Self, CudaError> {
        need((2..=MAX_RANKS).contains(&ranks), "peers", || {
            format!("{ranks} ranks; 2 to {MAX_RANKS} are possible on GPUs")
        })?;
        let endpoint = Self {
            device: device.clone(),
            // In packets of 8 bytes and two flags.
            mail: device.alloc(2 * ranks * MAIL_ROWS * width * Float::BYTES * 2)?,
            flags: device.alloc(MAX_BLOCKS * ranks * 4)?,
            deltas,
            logits,
        };
        // No peer may write before the memory is cleared.
        device.synchronize()?;
        Ok(endpoint)
    }
}

/// The kernels' parameter.
#[repr(C)]
#[derive(Clone, Copy)]
struct Group {
    mail: [u64; MAX_RANKS],
    flags: [u64; MAX_RANKS],
    deltas: [[u64; MAX_RANKS]; 2],
    turns: u64,
    lost: u64,
    report: u64,
    rank: u32,
    ranks: u32,
    mail_rows: u32,
}

/// One rank's connection to all.
pub struct Peers {
    endpoints: Vec<Arc<Endpoint>>,
    rank: usize,
    /// Turns that this rank has come to, of rows and of blocks.
    turns: DeviceBuffer,
    lost: DeviceBuffer,
    report: PinnedBuffer,
    /// Ranks on the GPU that has most of them.
    on_one_gpu: usize,
    /// Multiprocessors of the smallest GPU.
    processors: usize,
}

impl Peers {
    /// Opens the memory of all ranks to this one's GPU. `endpoints` are in the order of the ranks.
    ///
    /// # Errors
    /// [`CudaError::Driver`] when GPUs cannot reach each other's memory.
    pub fn connect(rank: usize, endpoints: Vec<Arc<Endpoint>>) -> Result<Self, CudaError> {
        let device = endpoints[rank].device.clone();
        device.bind()?;
        device.inner.modules.preload()?;
        let context = |endpoint: &Endpoint| endpoint.device.inner.context.cu_ctx();
        for endpoint in &endpoints {
            if context(endpoint) != device.inner.context.cu_ctx() {
                enable(&device, &endpoint.device)?;
            }
        }
        let sharers = |of: &Endpoint| {
            let same = endpoints
                .iter()
                .filter(|other| context(other) == context(of));
            same.count()
        };
        let on_one_gpu = endpoints.iter().map(|endpoint| sharers(endpoint)).max();
        if on_one_gpu > Some(1) {
            // A kernel that is there early, behind one that waits for another rank, would keep that rank's kernels from starting.
            device.start_in_turn();
        }
        let processors = endpoints
            .iter()
            .map(|endpoint| endpoint.device.multiprocessors() as usize)
            .min();
        let turns = device.alloc((MAIL_ROWS + MAX_BLOCKS) * 4)?;
        let lost = device.alloc(4)?;
        device.synchronize()?;
        Ok(Self {
            report: device.alloc_pinned(4)?,
            on_one_gpu: on_one_gpu.unwrap_or(1),
            processors: processors.unwrap_or(1),
            endpoints,
            rank,
            turns,
            lost,
        })
    }

    /// Number of ranks.
    #[must_use]
    pub fn ranks(&self) -> usize {
        self.endpoints.len()
    }

    /// A rank that has not come in time: what was computed since is nonsense.
    #[must_use]
    pub fn lost(&self) -> Option<usize> {
        let word = self.report.word();
        (word as usize).checked_sub(1)
    }

    fn device(&self) -> &Device {
        &self.endpoints[self.rank].device
    }

    /// Where all ranks' memory lies, as kernels take it.
    fn group(&self) -> Group {
        let addresses = |of: &dyn Fn(&Endpoint) -> View<'_>| {
            let mut all = [0; MAX_RANKS];
            for (at, endpoint) in all.iter_mut().zip(&self.endpoints) {
                *at = of(endpoint).address();
            }
            all
        };
        Group {
            mail: addresses(&|endpoint| endpoint.mail.view()),
            flags: addresses(&|endpoint| endpoint.flags.view()),
            deltas: [0, 1].map(|slot| addresses(&|endpoint| endpoint.deltas[slot].view())),
            turns: self.turns.view().address(),
            lost: self.lost.view().address(),
            report: self.report.address(),
            rank: self.rank as u32,
            ranks: self.ranks() as u32,
            mail_rows: MAIL_ROWS as u32,
        }
    }

    /// Blocks of a kernel that waits for other ranks' kernels: the same number on every rank. All have to be on the GPU at
    /// once, so ranks that share one take half of it together.
    fn blocks(&self, wanted: usize, threads: usize) -> usize {
        let most = if self.on_one_gpu > 1 {
            self.processors / (2 * self.on_one_gpu)
        } else {
            self.processors * (2048 / threads).max(1)
        };
        wanted.min(most).clamp(1, MAX_BLOCKS)
    }
}

fn enable(device: &Device, peer: &Device) -> Result<(), CudaError> {
    let mut can = 0;
    // SAFETY: both devices are open, and `can` lives through the call.
    unsafe {
        sys::cuDeviceCanAccessPeer(
            &raw mut can,
            device.inner.context.cu_device(),
            peer.inner.context.cu_device(),
        )
    }
    .result()
    .map_err(driver_error("cuDeviceCanAccessPeer"))?;
    if can == 0 {
        let name = |device: &Device| device.inner.context.ordinal();
        return Err(CudaError::Driver {
            call: "cuDeviceCanAccessPeer",
            message: format!(
                "GPUs {} and {} cannot reach each other's memory, which tensor parallelism needs; use GPUs of one NVLink \
                 or PCIe group, or --tensor-parallel-size 1",
                name(device),
                name(peer)
            ),
        });
    }
    device.bind()?;
    // SAFETY: the peer's context is retained by its device, which the endpoint keeps.
    let enabled = unsafe { sys::cuCtxEnablePeerAccess(peer.inner.context.cu_ctx(), 0) };
    match enabled {
        sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
        other => other
            .result()
            .map_err(driver_error("cuCtxEnablePeerAccess")),
    }
}

/// How rows are summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Each rank sends its rows to all; for few rows.
    Mail,
    /// Each rank reads everyone's rows.
    Read,
    /// Each rank sums a slice of the columns and writes it into everyone's rows.
    TwoShot,
}

impl Way {
    /// The fastest way for so much.
    #[must_use]
    pub fn of(rows: usize, width: usize, ranks: usize) -> Self {
        let bytes = rows * width * Float::BYTES;
        let peers = ranks.saturating_sub(1);
        // Reading takes `peers` times the rows into each rank, two shots 2 ÷ ranks of that.
        let spared = bytes * peers * ranks.saturating_sub(2) / ranks.max(1);
        if rows <= MAIL_ROWS && bytes * peers <= MAIL_BYTES {
            Self::Mail
        } else if spared <= SPARED_BYTES {
            Self::Read
        } else {
            Self::TwoShot
        }
    }
}

/// `residual += Σ deltas` over the ranks in their order, rounded, `out = residual / rms(residual) · weight`; every rank
/// has the same bits. The rank's own delta is in the endpoint's buffer `slot`, which must be the other one at each call
/// in turn, and may be overwritten.
#[derive(Clone, Copy)]
pub struct ReduceAddNorm<'a> {
    /// All ranks.
    pub peers: &'a Peers,
    /// Which of the two buffers.
    pub slot: usize,
    /// Type of everything.
    pub float: Float,
    /// `[width]`
    pub weight: View<'a>,
    /// `[rows, width]`
    pub residual: View<'a>,
    /// `[rows, width]`
    pub out: View<'a>,
    /// Rows.
    pub rows: usize,
    /// Values in a row.
    pub width: usize,
    /// Added to the mean square.
    pub eps: f32,
    /// How.
    pub way: Way,
}

impl ReduceAddNorm<'_> {
    fn validate(&self) -> Result<(), CudaError> {
        let op = "reduce_add_norm";
        super::elementwise::check_width(op, self.width)?;
        let row = self.width * Float::BYTES;
        let endpoint = &self.peers.endpoints[self.peers.rank];
        need(self.slot < 2, op, || format!("slot {}", self.slot))?;
        let mail = endpoint.mail.len() / (2 * self.peers.ranks() * MAIL_ROWS * 2);
        need(
            self.way != Way::Mail || (self.rows <= MAIL_ROWS && row <= mail),
            op,
            || format!("{} rows of {} values as mail", self.rows, self.width),
        )?;
        let smallest = self
            .peers
            .endpoints
            .iter()
            .map(|endpoint| endpoint.deltas[self.slot].len())
            .min()
            .unwrap_or(0);
        for (name, len, needed) in [
            ("deltas", smallest, self.rows * row),
            ("weight", self.weight.len(), row),
            ("residual", self.residual.len(), self.rows * row),
            ("out", self.out.len(), self.rows * row),
        ] {
            need(len >= needed, op, || {
                format!("{name} has {len} bytes of {needed}")
            })?;
        }
        Ok(())
    }

    /// Queues it.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or the driver refuses.
    pub fn launch(&self) -> Result<(), CudaError> {
        self.validate()?;
        if self.rows == 0 {
            return Ok(());
        }
        let (peers, device) = (self.peers, self.peers.device());
        let group = peers.group();
        let delta = group.deltas[self.slot][peers.rank];
        let (weight, residual, out) = (
            self.weight.address(),
            self.residual.address(),
            self.out.address(),
        );
        let (rows, width, slot) = (self.rows as i32, self.width as i32, self.slot as i32);
        let vectors = if self.width <= NARROW { 1 } else { 4 };
        let threads = (self.width / 8).div_ceil(vectors).next_multiple_of(32);
        let shape = Shape {
            grid: (peers.blocks(self.rows, threads), 1),
            threads,
            shared: 0,
        };
        let suffix = format!("{}_{vectors}", self.float.suffix());
        if self.way == Way::Mail {
            let name = format!("reduce_by_mail_{suffix}");
            // SAFETY: parameters as in `peers.cu`; every view and every rank's mail hold the rows (`validate`), and the
            // endpoints live as long as `peers`.
            return unsafe {
                device.launch(
                    &name,
                    shape,
                    arguments![group, delta, weight, residual, out, rows, width, self.eps],
                )
            };
        }
        let way = match self.way {
            Way::TwoShot => "in_two_shots",
            Way::Mail | Way::Read => "by_reading",
        };
        let name = format!("reduce_{way}_{suffix}");
        // SAFETY: as above; every rank's deltas hold the rows.
        unsafe {
            device.launch(
                &name,
                shape,
                arguments![group, slot, weight, residual, out, rows, width, self.eps],
            )
        }
    }
}

/// Puts every rank's `held` columns beside each other, in every rank's logits.
#[derive(Clone, Copy)]
pub struct GatherColumns<'a> {
    /// All ranks.
    pub peers: &'a Peers,
    /// `[rows, held]` f32: columns from rank · held on.
    pub from: View<'a>,
    /// Rows.
    pub rows: usize,
    /// Columns of a rank, a multiple of 4; the last ranks have fewer, or none.
    pub held: usize,
    /// Columns of all, a multiple of 4.
    pub vocab: usize,
}

impl GatherColumns<'_> {
    /// Queues it.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or the driver refuses.
    pub fn launch(&self) -> Result<(), CudaError> {
        let (op, peers) = ("gather_columns", self.peers);
        need(
            self.held.is_multiple_of(4)
                && self.vocab.is_multiple_of(4)
                && self.held * peers.ranks() >= self.vocab,
            op,
            || format!("{} columns of {}; multiples of 4", self.held, self.vocab),
        )?;
        need(self.from.len() >= self.rows * self.held * 4, op, || {
            format!("{} bytes for {} rows", self.from.len(), self.rows)
        })?;
        let mut to = [0u64; MAX_RANKS];
        for (to, endpoint) in to.iter_mut().zip(&peers.endpoints) {
            need(
                endpoint.logits.len() >= self.rows * self.vocab * 4,
                op,
                || format!("{} rows of logits", self.rows),
            )?;
            *to = endpoint.logits.view().address();
        }
        if self.rows == 0 {
            return Ok(());
        }
        let group = peers.group();
        let from = self.from.address();
        let (rows, held, vocab) = (self.rows as i32, self.held as i32, self.vocab as i32);
        let threads = 512;
        let shape = Shape {
            grid: (
                peers.blocks((self.rows * self.held / 4).div_ceil(threads), threads),
                1,
            ),
            threads,
            shared: 0,
        };
        // SAFETY: parameters as in `peers.cu`; every rank's logits and `from` hold the rows, checked above.
        unsafe {
            peers.device().launch(
                "gather_columns",
                shape,
                arguments![group, to, from, rows, held, vocab],
            )
        }
    }
}
