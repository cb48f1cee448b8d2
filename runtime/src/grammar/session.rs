//! One sequence's way through a grammar.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use llguidance::Matcher;

use super::{pool::Pool, widen};
use crate::engine::{
    constraint::{GrammarState, TokenGrammar, TokenMask},
    request::TokenId,
};

/// See the [module](self).
pub(super) struct Session {
    state: Mutex<GrammarState>,
    /// Locked by the job that computes the mask, one at a time.
    matcher: Mutex<Matcher>,
    vocab_size: u32,
    pool: Arc<Pool>,
    me: Weak<Self>,
}

impl Session {
    /// At the grammar's beginning, where `first` may come.
    pub(super) fn start(matcher: Matcher, first: TokenMask, pool: Arc<Pool>) -> Arc<Self> {
        let vocab_size = u32::try_from(first.len() * 32).unwrap_or(u32::MAX);
        Arc::new_cyclic(|me| Self {
            state: Mutex::new(GrammarState::Ready(first)),
            matcher: Mutex::new(matcher),
            vocab_size,
            pool,
            me: Weak::clone(me),
        })
    }

    fn lock(&self) -> MutexGuard<'_, GrammarState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a token and finds what may follow.
    fn compute(&self, token: TokenId) -> GrammarState {
        let mut matcher = self.matcher.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |error: String| {
            GrammarState::Failed(format!("the grammar could not be followed: {error}"))
        };
        if let Err(error) = matcher.consume_token(token) {
            return failed(super::first_lines(&error.to_string()));
        }
        if matcher.is_stopped() {
            return if matcher.stop_reason().is_ok() {
                GrammarState::Ended
            } else {
                failed(matcher.stop_reason().to_string())
            };
        }
        match matcher.compute_mask() {
            Ok(mask) => GrammarState::Ready(widen(mask.as_slice(), self.vocab_size)),
            // It noticed only now that nothing can follow.
            Err(_) if matcher.stop_reason().is_ok() && matcher.is_stopped() => GrammarState::Ended,
            Err(error) => failed(super::first_lines(&error.to_string())),
        }
    }
}

/// Calls back when dropped: also when the computation panics.
struct Done(Option<Box<dyn FnOnce() + Send>>);

impl Drop for Done {
    fn drop(&mut self) {
        if let Some(done) = self.0.take() {
            done();
        }
    }
}

impl TokenGrammar for Session {
    fn advance(&self, token: TokenId, done: Box<dyn FnOnce() + Send>) {
        *self.lock() = GrammarState::Pending;
        let done = Done(Some(done));
        let Some(me) = self.me.upgrade() else {
            return;
        };
        let job = Box::new(move || {
            let done = done;
            let lost = "the grammar's computation failed: this is a bug in the server";
            let mut outcome = Outcome {
                session: &me,
                state: GrammarState::Failed(lost.to_owned()),
            };
            outcome.state = me.compute(token);
            drop(outcome);
            drop(done);
        });
        if self.pool.mask(job).is_err() {
            *self.lock() = GrammarState::Failed("no thread computes masks".to_owned());
        }
    }

    fn state(&self) -> GrammarState {
        self.lock().clone()
    }
}

/// Publishes its state when dropped: also when the computation panics.
struct Outcome<'a> {
    session: &'a Session,
    state: GrammarState,
}

impl Drop for Outcome<'_> {
    fn drop(&mut self) {
        *self.session.lock() = self.state.clone();
    }
}
