//! How long to wait after failures in a row.

use std::time::Duration;

/// `first` after no failure before this one, and twice as long after each, up to `longest`.
pub(crate) fn doubled(first: Duration, longest: Duration, failures: u32) -> Duration {
    first.saturating_mul(1 << failures.min(16)).min(longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_doubles_up_to_a_bound() {
        let [first, longest] = [200, 15_000].map(Duration::from_millis);
        let waits = [0, 1, 2, 6, 7, 40, u32::MAX].map(|failures| doubled(first, longest, failures));
        let expected = [200, 400, 800, 12_800, 15_000, 15_000, 15_000].map(Duration::from_millis);
        assert_eq!(waits, expected);
    }
}
