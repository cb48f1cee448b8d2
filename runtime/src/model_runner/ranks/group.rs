//! Where ranks meet: what they exchange, sums over host memory, and how the failure of one ends all.

use std::{
    any::Any,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use crate::model_runner::RunnerError;

/// How long a rank waits for the others within a step. They do the same work, so more means that one hangs. With
/// [`GRACE`](super::GRACE) it is below 10 s, within which a process with a failed rank has to end.
pub const STEP_PATIENCE: Duration = Duration::from_secs(7);
/// How long a rank waits for the others while they load.
pub const LOAD_PATIENCE: Duration = Duration::from_secs(1800);

/// One rank, or several, cannot go on; neither can the others.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}; the process must be started again")]
pub struct RankError {
    /// Which rank, and what happened to it.
    pub message: String,
}

impl From<RankError> for RunnerError {
    fn from(error: RankError) -> Self {
        Self {
            message: error.to_string(),
            fatal: true,
        }
    }
}

/// What a rank brings to a meeting.
type Parcel = Arc<dyn Any + Send + Sync>;

#[derive(Default)]
struct State {
    /// What the ranks that wait have brought.
    arrived: Vec<Option<Parcel>>,
    /// Meetings so far.
    meetings: u64,
    /// What the ranks brought to the last meeting.
    brought: Vec<Parcel>,
    failure: Option<RankError>,
    /// The leader has told of the failure.
    is_reported: bool,
}

/// The ranks of one model in this process.
pub(super) struct Group {
    state: Mutex<State>,
    changed: Condvar,
    step_patience: Duration,
    /// Times that the leader has looked for a result and found it not yet there.
    leader_waits: AtomicU64,
    /// What each rank adds to a sum, in two turns: a rank may write the next while another still reads this one.
    shares: [Vec<RwLock<Vec<f32>>>; 2],
}

impl Group {
    pub(super) fn new(ranks: usize, step_patience: Duration) -> Arc<Self> {
        let shares = || (0..ranks).map(|_| RwLock::default()).collect();
        Arc::new(Self {
            state: Mutex::new(State {
                arrived: vec![None; ranks],
                ..State::default()
            }),
            changed: Condvar::new(),
            step_patience,
            leader_waits: AtomicU64::new(0),
            shares: [shares(), shares()],
        })
    }

    /// Locks without regard to panics elsewhere: those are told by [`Member`]'s drop.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends all waiting, now and later, unless something failed before.
    pub(super) fn fail(&self, message: String) -> RankError {
        let mut state = self.lock();
        let failure = state.failure.get_or_insert(RankError { message }).clone();
        self.changed.notify_all();
        failure
    }

    pub(super) fn failure(&self) -> Option<RankError> {
        self.lock().failure.clone()
    }

    /// The leader goes on waiting for a result, which may take its device long.
    pub(super) fn wait_on(&self) {
        self.leader_waits.fetch_add(1, Relaxed);
    }

    pub(super) fn leader_waits(&self) -> u64 {
        self.leader_waits.load(Relaxed)
    }

    /// Notes that the failure reaches whoever runs the model.
    pub(super) fn report(&self) {
        self.lock().is_reported = true;
        self.changed.notify_all();
    }

    /// Whether the failure is reported within `grace`.
    pub(super) fn is_reported_within(&self, grace: Duration) -> bool {
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), grace, |state| !state.is_reported);
        waited.unwrap_or_else(PoisonError::into_inner).0.is_reported
    }

    /// Waits until every rank is here.
    fn meet(
        &self,
        rank: usize,
        parcel: Parcel,
        patience: Duration,
    ) -> Result<Vec<Parcel>, RankError> {
        let mut state = self.lock();
        if let Some(failure) = &state.failure {
            return Err(failure.clone());
        }
        state.arrived[rank] = Some(parcel);
        if state.arrived.iter().all(Option::is_some) {
            state.brought = state.arrived.iter_mut().filter_map(Option::take).collect();
            state.meetings += 1;
            let brought = state.brought.clone();
            // Unlocked first: a rank that stops in the system call must not take the others' patience with it.
            drop(state);
            self.changed.notify_all();
            return Ok(brought);
        }
        let (meeting, started) = (state.meetings, Instant::now());
        while state.meetings == meeting {
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            let Some(left) = patience.checked_sub(started.elapsed()) else {
                let message = missing(&state, patience);
                drop(state);
                return Err(self.fail(message));
            };
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(state.brought.clone())
    }
}

fn missing(state: &State, patience: Duration) -> String {
    let missing: Vec<String> = state
        .arrived
        .iter()
        .enumerate()
        .filter(|(_, parcel)| parcel.is_none())
        .map(|(rank, _)| rank.to_string())
        .collect();
    format!(
        "tensor-parallel rank {} has not answered for {} s: it hangs",
        missing.join(", "),
        patience.as_secs_f64()
    )
}

/// A rank's place in its group.
pub struct Member {
    pub(super) group: Arc<Group>,
    rank: usize,
    turn: usize,
}

impl Member {
    pub(super) fn new(group: &Arc<Group>, rank: usize) -> Self {
        Self {
            group: Arc::clone(group),
            rank,
            turn: 0,
        }
    }

    /// This rank.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    #[must_use]
    pub fn ranks(&self) -> usize {
        self.group.shares[0].len()
    }

    /// Waits until every rank is here, with no step to make.
    ///
    /// # Errors
    /// [`RankError`] when a rank failed or does not come.
    pub(super) fn rest(&self) -> Result<(), RankError> {
        let patience = self.group.step_patience;
        self.group
            .meet(self.rank, Arc::new(()), patience)
            .map(|_| ())
    }

    /// How long ranks wait for each other within a step.
    pub(super) fn step_patience(&self) -> Duration {
        self.group.step_patience
    }

    /// What every rank brings, in their order, while they load. All bring the same type.
    ///
    /// # Errors
    /// [`RankError`] when a rank failed or does not come.
    pub fn exchange<T: Send + Sync + 'static>(&self, mine: T) -> Result<Vec<Arc<T>>, RankError> {
        let parcels = self.group.meet(self.rank, Arc::new(mine), LOAD_PATIENCE)?;
        let typed = parcels.into_iter().map(|parcel| {
            parcel.downcast().map_err(|_| RankError {
                message: "tensor-parallel ranks exchange different things: this is a bug"
                    .to_owned(),
            })
        });
        typed.collect()
    }

    /// `out = ` the sum of all ranks' `values`, added in the order of the ranks: the same bits on every one.
    ///
    /// # Errors
    /// [`RankError`] when a rank failed or does not come; `out` is left as it is.
    pub fn sum(&mut self, values: &[f32], out: &mut [f32]) -> Result<(), RankError> {
        self.share(values, |rank, share| {
            let pairs = out.iter_mut().zip(share);
            if rank == 0 {
                pairs.for_each(|(out, value)| *out = *value);
            } else {
                pairs.for_each(|(out, value)| *out += value);
            }
        })
    }

    /// Hands `read` every rank's `values`, in the order of the ranks.
    ///
    /// # Errors
    /// [`RankError`] when a rank failed or does not come; nothing is read.
    pub fn share(
        &mut self,
        values: &[f32],
        mut read: impl FnMut(usize, &[f32]),
    ) -> Result<(), RankError> {
        let shares = &self.group.shares[self.turn];
        self.turn ^= 1;
        {
            let mut mine = shares[self.rank]
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            mine.clear();
            mine.extend_from_slice(values);
        }
        self.group
            .meet(self.rank, Arc::new(()), self.group.step_patience)?;
        for (rank, share) in shares.iter().enumerate() {
            read(rank, &share.read().unwrap_or_else(PoisonError::into_inner));
        }
        Ok(())
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let rank = self.rank;
            self.group
                .fail(format!("tensor-parallel rank {rank} panicked"));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, missing_docs)] // Tests fail by panicking.

    use std::thread;

    use super::*;

    fn members(ranks: usize, patience: Duration) -> Vec<Member> {
        let group = Group::new(ranks, patience);
        (0..ranks).map(|rank| Member::new(&group, rank)).collect()
    }

    /// Runs `body` on a thread for each rank.
    fn on_each<T: Send>(
        members: Vec<Member>,
        body: impl Fn(Member) -> T + Sync,
    ) -> Vec<thread::Result<T>> {
        thread::scope(|scope| {
            let body = &body;
            let threads: Vec<_> = members
                .into_iter()
                .map(|member| scope.spawn(move || body(member)))
                .collect();
            threads.into_iter().map(|thread| thread.join()).collect()
        })
    }

    #[test]
    fn sums_follow_each_other_and_are_the_same_on_every_rank() {
        let sums = on_each(members(3, STEP_PATIENCE), |mut member| {
            let mut all = Vec::new();
            for step in 0..500u32 {
                let value = (member.rank() as f32 + 1.1).powi(step as i32 % 7);
                let width = 1 + step as usize % 5;
                let mut out = vec![0.0; width];
                member.sum(&vec![value; width], &mut out).unwrap();
                all.push(out);
            }
            all
        });
        let sums: Vec<_> = sums.into_iter().map(Result::unwrap).collect();
        let expected = |step: i32| (1.1f32.powi(step) + 2.1f32.powi(step)) + 3.1f32.powi(step);
        assert_eq!(sums[0][3], vec![expected(3); 4]);
        assert!(sums.iter().all(|other| *other == sums[0]));
    }

    #[test]
    fn exchanged_values_come_in_the_order_of_the_ranks() {
        let words = on_each(members(4, STEP_PATIENCE), |member| {
            let mut last = Vec::new();
            for round in 0..100 {
                last = member.exchange((member.rank(), round)).unwrap();
            }
            last.iter().map(|word| **word).collect::<Vec<_>>()
        });
        for words in words {
            assert_eq!(words.unwrap(), [(0, 99), (1, 99), (2, 99), (3, 99)]);
        }
    }

    #[test]
    fn a_rank_that_does_not_come_is_named() {
        let patience = Duration::from_millis(50);
        let results = on_each(members(3, patience), |mut member| {
            if member.rank() == 1 {
                return Ok(());
            }
            member.sum(&[1.0], &mut [0.0])
        });
        for result in [&results[0], &results[2]] {
            let error = result.as_ref().unwrap().as_ref().unwrap_err();
            let message = "tensor-parallel rank 1 has not answered for 0.05 s: it hangs";
            assert_eq!(error.message, message);
        }
    }

    #[test]
    fn a_panic_on_one_rank_ends_the_others_wait_at_once() {
        let started = Instant::now();
        let results = on_each(members(2, LOAD_PATIENCE), |mut member| {
            assert_ne!(member.rank(), 1, "boom");
            member.sum(&[1.0], &mut [0.0])
        });
        assert!(results[1].is_err());
        let error = results[0].as_ref().unwrap().as_ref().unwrap_err();
        assert_eq!(error.message, "tensor-parallel rank 1 panicked");
        assert!(started.elapsed() < Duration::from_secs(60));
    }
}
