//! Threads for grammars: one kind compiles, the other computes masks, so that a slow grammar holds up no output.

use std::sync::{
    Arc, Mutex, PoisonError,
    mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel},
};

/// Something to do.
pub(super) type Job = Box<dyn FnOnce() + Send>;

/// Threads that compile.
const COMPILERS: usize = 2;
/// Threads that compute masks.
const MASKERS: usize = 2;
/// Grammars that may wait to be compiled.
const MAX_WAITING: usize = 64;
/// Schemas nest: their compiler recurses.
const STACK_BYTES: usize = 32 << 20;

/// The queue is full, or there is no thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Full;

/// See the [module](self). The threads end when it is dropped.
pub(super) struct Pool {
    compile: SyncSender<Job>,
    /// Bounded by the running sequences: each has one mask at a time.
    masks: Sender<Job>,
}

impl Pool {
    pub(super) fn start() -> Self {
        let (compile, compile_jobs) = sync_channel(MAX_WAITING);
        let (masks, mask_jobs) = channel();
        spawn("ashlar-grammar", COMPILERS, compile_jobs);
        spawn("ashlar-masks", MASKERS, mask_jobs);
        Self { compile, masks }
    }

    /// Enqueues a compilation.
    pub(super) fn compile(&self, job: Job) -> Result<(), Full> {
        match self.compile.try_send(job) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => Err(Full),
        }
    }

    /// Enqueues a mask.
    pub(super) fn mask(&self, job: Job) -> Result<(), Full> {
        self.masks.send(job).map_err(|_| Full)
    }
}

fn spawn(name: &str, threads: usize, jobs: Receiver<Job>) {
    let jobs = Arc::new(Mutex::new(jobs));
    for _ in 0..threads {
        let jobs = Arc::clone(&jobs);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK_BYTES);
        let spawned = thread.spawn(move || {
            loop {
                let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
                let Ok(job) = job else {
                    return;
                };
                // A bug in one grammar is that grammar's alone: whoever waits sees its channel close.
                if std::panic::catch_unwind(std::panic::AssertUnwindSafe(job)).is_err() {
                    tracing::error!("a grammar's thread panicked: this is a bug");
                }
            }
        });
        if let Err(error) = spawned {
            tracing::error!(%error, "a thread for grammars could not be started");
        }
    }
}
