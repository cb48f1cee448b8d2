//! A pool for many short parallel loops: the caller takes part, workers spin briefly and then sleep.
//!
//! One loop runs at a time. A worker joins a loop only while it is open, and the caller leaves only when every worker
//! that joined has left: so the loop's closure and what it borrows outlive all use. A worker that sleeps through a
//! loop never joined it and is not waited for.

use std::{
    any::Any,
    cell::UnsafeCell,
    hint,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// How long an idle worker spins before it sleeps: longer than the gaps between the kernels of a step.
const SPIN: Duration = Duration::from_micros(60);

const OPEN: u64 = 1 << 16;
const ACTIVE_MASK: u64 = OPEN - 1;
const EPOCH_ONE: u64 = 1 << 17;
const STOP: u64 = u64::MAX;

type Task<'a> = dyn Fn(usize, usize) + Sync + 'a;

struct Shared {
    /// `epoch << 17 | open << 16 | workers inside`.
    state: AtomicU64,
    next: AtomicUsize,
    tasks: AtomicUsize,
    /// The closure of the open loop. Written by the caller while the loop is closed and empty, read by joined workers.
    job: UnsafeCell<Option<&'static Task<'static>>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    asleep: Vec<AtomicBool>,
}

// SAFETY: `job` is the only field that is not Sync by itself. It is written only by `ThreadPool::run`, which holds the
// pool's lock, and only when `state` shows a closed loop with no worker inside; it is read only by workers that have
// joined, after an acquiring read-modify-write of the `state` that `run` released.
unsafe impl Sync for Shared {}
// SAFETY: as above; the reference is to a `Sync` closure.
unsafe impl Send for Shared {}

impl Shared {
    fn work(&self, job: &Task<'_>, thread: usize) {
        let tasks = self.tasks.load(Ordering::Relaxed);
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                return;
            }
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(task, thread))) {
                // Stops the loop early for everyone; the first panic is handed to the caller.
                self.next.store(tasks, Ordering::Relaxed);
                let mut slot = self
                    .panic
                    .lock()
                    .unwrap_or_else(|poisoned| poisoned.into_inner());
                slot.get_or_insert(panic);
                return;
            }
        }
    }

    fn worker(&self, thread: usize) {
        let mut seen = 0;
        loop {
            let Some(epoch) = self.wait_for_loop(seen, thread) else {
                return;
            };
            seen = epoch;
            let mut state = self.state.load(Ordering::Acquire);
            // Join only the loop that was seen, and only while it is open.
            loop {
                if state == STOP {
                    return;
                }
                if state & OPEN == 0 || state / EPOCH_ONE != epoch {
                    break;
                }
                match self.state.compare_exchange_weak(
                    state,
                    state + 1,
                    Ordering::AcqRel,
                    Ordering::Acquire,
                ) {
                    Ok(_) => {
                        // SAFETY: this worker has joined an open loop, so `job` was written before `state` was
                        // released, and `run` does not return or write again before this worker leaves below.
                        let job = unsafe { *self.job.get() };
                        self.work(job.expect("an open loop has a job: this is a bug"), thread);
                        self.state.fetch_sub(1, Ordering::AcqRel);
                        break;
                    }
                    Err(now) => state = now,
                }
            }
        }
    }

    /// The epoch of an open loop newer than `seen`; none when the pool stops.
    fn wait_for_loop(&self, seen: u64, thread: usize) -> Option<u64> {
        let mut idle_since = Instant::now();
        let mut rounds = 0u32;
        loop {
            let state = self.state.load(Ordering::Acquire);
            if state == STOP {
                return None;
            }
            if state & OPEN != 0 && state / EPOCH_ONE != seen {
                return Some(state / EPOCH_ONE);
            }
            rounds += 1;
            if !rounds.is_multiple_of(64) || idle_since.elapsed() < SPIN {
                hint::spin_loop();
                continue;
            }
            // Announce, look once more, then sleep: `run` publishes first and looks at `asleep` after.
            self.asleep[thread - 1].store(true, Ordering::SeqCst);
            let state = self.state.load(Ordering::SeqCst);
            if state != STOP && !(state & OPEN != 0 && state / EPOCH_ONE != seen) {
                thread::park();
            }
            self.asleep[thread - 1].store(false, Ordering::SeqCst);
            idle_since = Instant::now();
        }
    }
}

/// Threads for parallel loops. Cheap to share by reference; one loop runs at a time.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    running: Mutex<()>,
}

impl ThreadPool {
    /// A pool of `threads` threads, the calling one included.
    ///
    /// # Panics
    /// When the system refuses a thread.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        let threads = threads.clamp(1, 1024);
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            tasks: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            asleep: (1..threads).map(|_| AtomicBool::new(false)).collect(),
        });
        let workers = (1..threads)
            .map(|thread| {
                let shared = Arc::clone(&shared);
                thread::Builder::new()
                    .name(format!("compute-{thread}"))
                    .spawn(move || shared.worker(thread))
                    .expect("the system refused a compute thread")
            })
            .collect();
        Self {
            shared,
            workers,
            running: Mutex::new(()),
        }
    }

    /// Threads that take part in a loop.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `job(task, thread)` once for each `task < tasks`, spread over the threads; returns when all are done.
    /// `thread < threads()` names who runs it. Must not be called from inside a loop of the same pool.
    ///
    /// # Panics
    /// With the first panic of a task, after every thread has left the loop.
    pub fn run(&self, tasks: usize, job: &Task<'_>) {
        if tasks <= 1 || self.workers.is_empty() {
            (0..tasks).for_each(|task| job(task, 0));
            return;
        }
        let _running = self
            .running
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let shared = &*self.shared;
        let epoch = shared.state.load(Ordering::Acquire) / EPOCH_ONE + 1;
        shared.next.store(0, Ordering::Relaxed);
        shared.tasks.store(tasks, Ordering::Relaxed);
        // SAFETY: only the lifetime is changed. Workers use the reference between joining and leaving, and this
        // function does not return before the loop is closed and every worker that joined has left.
        let job_static: &'static Task<'static> =
            unsafe { std::mem::transmute::<&Task<'_>, &'static Task<'static>>(job) };
        // SAFETY: the last loop is closed and empty (its `run` waited for that, under `running`), so nobody reads.
        unsafe { *shared.job.get() = Some(job_static) };
        shared
            .state
            .store((epoch * EPOCH_ONE) | OPEN, Ordering::SeqCst);
        for (worker, asleep) in self.workers.iter().zip(&shared.asleep) {
            if asleep.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        shared.work(job, 0);
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut rounds = 0u32;
        while shared.state.load(Ordering::Acquire) & ACTIVE_MASK != 0 {
            rounds += 1;
            // A worker that lost its core holds the loop up: give it ours.
            if rounds.is_multiple_of(2048) {
                thread::yield_now();
            } else {
                hint::spin_loop()
            }
        }
        let panic = shared
            .panic
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.state.store(STOP, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker never panics outside a task, whose panics are caught.
            let _ = worker.join();
        }
    }
}

/// A pointer to a buffer that tasks write disjoint parts of.
#[derive(Clone, Copy)]
pub(crate) struct SharedMut<T>(*mut T, usize);

// SAFETY: the pointer is only turned into references through `slice`, whose callers promise disjoint ranges.
unsafe impl<T: Send> Sync for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for SharedMut<T> {}

impl<T> SharedMut<T> {
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr(), slice.len())
    }

    /// # Safety
    /// No other live reference overlaps `start..start + len`, and the buffer that `new` took outlives the result.
    #[allow(
        clippy::mut_from_ref,
        reason = "disjoint ranges are the caller's promise"
    )]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(
            start <= self.1 && len <= self.1 - start,
            "range {start}+{len} of {}",
            self.1
        );
        // SAFETY: in bounds by the assertion; disjoint and alive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 8] {
            let pool = ThreadPool::new(threads);
            for tasks in [0, 1, 2, 7, 1000] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                for round in 1..=20 {
                    pool.run(tasks, &|task, thread| {
                        assert!(thread < threads);
                        counts[task].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(
                        counts
                            .iter()
                            .all(|count| count.load(Ordering::Relaxed) == round)
                    );
                }
            }
        }
    }

    #[test]
    fn a_panicking_task_reaches_the_caller_and_the_pool_goes_on() {
        let pool = ThreadPool::new(4);
        for _ in 0..50 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.run(64, &|task, _| assert!(task != 13, "task thirteen"));
            }));
            assert!(caught.is_err());
            let sum = AtomicUsize::new(0);
            pool.run(10, &|task, _| {
                sum.fetch_add(task, Ordering::Relaxed);
            });
            assert_eq!(sum.load(Ordering::Relaxed), 45);
        }
    }

    #[test]
    fn sleeping_workers_wake() {
        let pool = ThreadPool::new(3);
        while !pool
            .shared
            .asleep
            .iter()
            .all(|asleep| asleep.load(Ordering::SeqCst))
        {
            thread::yield_now();
        }
        let seen: Vec<AtomicBool> = (0..3).map(|_| AtomicBool::new(false)).collect();
        // Tasks wait for one another, so the loop only ends if every worker woke.
        pool.run(3, &|_, thread| {
            seen[thread].store(true, Ordering::SeqCst);
            while !seen.iter().all(|seen| seen.load(Ordering::SeqCst)) {
                hint::spin_loop();
            }
        });
    }
}
