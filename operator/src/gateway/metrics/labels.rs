//! What labels tell besides the service, and the counting of one request at a revision on trial.

use prometheus::IntCounter;

/// Why an attempt was made again on another replica; also the reason label of cut streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The connection could not be opened.
    Connect,
    /// The replica drains.
    Draining,
    /// The connection broke before the first byte.
    Reset,
}

impl Cause {
    pub(super) const ALL: [Self; 3] = [Self::Connect, Self::Draining, Self::Reset];

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Draining => "draining",
            Self::Reset => "reset",
        }
    }
}

/// Who cut a response short after its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CutBy {
    /// The client left.
    Client,
    /// The replica broke off.
    Upstream,
}

impl CutBy {
    pub(super) const ALL: [Self; 2] = [Self::Client, Self::Upstream];

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Upstream => "upstream",
        }
    }
}

/// What became of a request at a revision on trial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was answered to the end, or until the client left.
    Answered,
    /// A 5xx, or the connection broke before the answer's end.
    Failed,
}

impl Outcome {
    pub(super) const ALL: [Self; 2] = [Self::Answered, Self::Failed];

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Failed => "failed",
        }
    }
}

/// One request at a revision on trial, counted once: when its answer has ended. A trial that is over meanwhile keeps no
/// label for it.
pub struct Trial {
    pub(super) answered: IntCounter,
    pub(super) failed: IntCounter,
}

impl Trial {
    /// Counts the request.
    pub fn end(self, outcome: Outcome) {
        match outcome {
            Outcome::Answered => self.answered.inc(),
            Outcome::Failed => self.failed.inc(),
        }
    }
}
