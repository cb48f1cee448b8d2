//! A new revision's trial: whether there is one, and how it ends. Pure but for asking the gateways.
//!
//! While it lasts `rollout` gives the new revision its share of the replicas and the gateways give it its share of the requests.
//! It ends by the user's annotation, or by what the gateways counted. The end is written on the revision's Deployment, so that
//! a later reconcile, or another leader, does not try again.

use std::net::IpAddr;

use ashlar_crds::{CanarySpec, Promote, names::CANARY_ANNOTATION};
use kube::ResourceExt as _;

use super::{probe, revisions::RevisionView, rollout::RevisionState, validate::ValidatedService};

/// The gateways' counter, by outcome.
const COUNTER: &str = "ashlar_gateway_canary_requests_total";

/// What the gateways counted for a revision.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Requests that it answered.
    pub(super) answered: u64,
    /// 5xx answers, and connections that broke before the answer's end.
    pub(super) failed: u64,
}

/// How a trial goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is not over.
    Wait,
    /// The new revision takes over.
    Promote,
    /// The old one stays; why, in words.
    RollBack(String),
}

/// The trial that the newest revision has to pass: none without an older one that serves or, asleep, has served, and none
/// for one that has served before, so that a way back is never slow.
pub(super) fn trial<'a>(
    service: &'a ValidatedService,
    view: &RevisionView,
) -> Option<&'a CanarySpec> {
    let canary = service.service.spec.rollout_strategy.canary.as_ref()?;
    is_due(&view.newest, &view.older).then_some(canary)
}

/// A service that sleeps has no replicas of any revision, and the trial goes on when it wakes.
fn is_due(newest: &RevisionState, older: &[RevisionState]) -> bool {
    let over = newest.proven || newest.promoted || newest.rolled_back.is_some();
    !over && older.iter().any(|old| old.replicas > 0 || old.proven)
}

/// Judges the trial; asks the gateways only where their counts decide.
pub(super) async fn judge(
    service: &ValidatedService,
    canary: &CanarySpec,
    view: &RevisionView,
    gateways: &[IpAddr],
    port: u16,
) -> Verdict {
    let hash = &view.newest.hash;
    let said = service.service.annotations().get(CANARY_ANNOTATION);
    let by_user = by_user(said.map(String::as_str), hash);
    if by_user != Verdict::Wait || canary.promote == Promote::Manual || view.newest.ready == 0 {
        return by_user;
    }
    let query = format!("/metrics?name[]={COUNTER}");
    let asked = gateways
        .iter()
        .map(|gateway| probe::get_text((*gateway, port), &query));
    let mut counts = Counts::default();
    for text in futures::future::join_all(asked).await.into_iter().flatten() {
        let told = read(&text, &service.namespace, &service.name, hash);
        counts.answered = counts.answered.saturating_add(told.answered);
        counts.failed = counts.failed.saturating_add(told.failed);
    }
    by_errors(canary, counts)
}

/// `promote@HASH` and `rollback@HASH`; what was said of another revision counts for nothing.
fn by_user(said: Option<&str>, hash: &str) -> Verdict {
    match said.and_then(|said| said.split_once('@')) {
        Some(("promote", of)) if of == hash => Verdict::Promote,
        Some(("rollback", of)) if of == hash => Verdict::RollBack("rolled back by hand".to_owned()),
        _ => Verdict::Wait,
    }
}

/// Enough requests decide either way; enough failures decide at once.
fn by_errors(canary: &CanarySpec, counts: Counts) -> Verdict {
    let number = |n: i32| u64::try_from(n).unwrap_or(0);
    let (most, least) = (
        number(canary.max_error_percent),
        number(canary.min_requests),
    );
    let total = counts.answered.saturating_add(counts.failed);
    let percent_of =
        |requests: u64| counts.failed.saturating_mul(100) > most.saturating_mul(requests);
    if percent_of(total.max(least)) {
        return Verdict::RollBack(format!(
            "{} of {total} requests failed, and {most} % may",
            counts.failed
        ));
    }
    if total >= least {
        Verdict::Promote
    } else {
        Verdict::Wait
    }
}

/// Reads one gateway's exposition.
fn read(exposition: &str, namespace: &str, name: &str, hash: &str) -> Counts {
    let mut counts = Counts::default();
    let wanted = [
        format!("namespace=\"{namespace}\""),
        format!("name=\"{name}\""),
        format!("revision=\"{hash}\""),
    ];
    for line in exposition.lines() {
        let Some((labels, value)) = line
            .strip_prefix(COUNTER)
            .and_then(|rest| rest.strip_prefix('{')?.split_once("} "))
        else {
            continue;
        };
        let labels: Vec<&str> = labels.split(',').collect();
        if !wanted.iter().all(|label| labels.contains(&label.as_str())) {
            continue;
        }
        let Ok(value) = value.trim().parse::<u64>() else {
            continue;
        };
        if labels.contains(&"outcome=\"failed\"") {
            counts.failed = counts.failed.saturating_add(value);
        } else {
            counts.answered = counts.answered.saturating_add(value);
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn canary(max_error_percent: i32, min_requests: i32) -> CanarySpec {
        CanarySpec {
            weight_percent: 10,
            promote: Promote::OnErrorRate,
            max_error_percent,
            min_requests,
        }
    }

    fn counts(answered: u64, failed: u64) -> Counts {
        Counts { answered, failed }
    }

    #[test]
    fn few_requests_decide_nothing_and_many_failures_decide_early() {
        let canary = canary(2, 100);
        assert_eq!(by_errors(&canary, counts(0, 0)), Verdict::Wait);
        assert_eq!(by_errors(&canary, counts(97, 2)), Verdict::Wait);
        assert_eq!(by_errors(&canary, counts(98, 2)), Verdict::Promote);
        assert!(matches!(
            by_errors(&canary, counts(0, 3)),
            Verdict::RollBack(_)
        ));
        assert!(matches!(
            by_errors(&canary, counts(970, 30)),
            Verdict::RollBack(_)
        ));
    }

    #[test]
    fn a_trial_is_due_until_it_is_decided_even_when_no_one_serves() {
        let state = |replicas, proven| RevisionState {
            replicas,
            proven,
            ..RevisionState::default()
        };
        let new = state(0, false);
        assert!(!is_due(&new, &[]), "a first revision has no rival");
        assert!(
            !is_due(&new, &[state(0, false)]),
            "nor has the first that starts"
        );
        assert!(is_due(&new, &[state(1, false)]));
        assert!(is_due(&new, &[state(0, true)]), "asleep");
        assert!(!is_due(&state(1, true), &[state(1, true)]), "a way back");
        for over in [
            RevisionState {
                promoted: true,
                ..new.clone()
            },
            RevisionState {
                rolled_back: Some("by hand".into()),
                ..new.clone()
            },
        ] {
            assert!(!is_due(&over, &[state(0, true)]));
        }
    }

    #[test]
    fn the_users_word_is_about_one_revision() {
        assert_eq!(
            by_user(Some("promote@0123abcd"), "0123abcd"),
            Verdict::Promote
        );
        assert!(matches!(
            by_user(Some("rollback@0123abcd"), "0123abcd"),
            Verdict::RollBack(_)
        ));
        for other in [
            None,
            Some("promote"),
            Some("promote@ffffffff"),
            Some("nonsense@0123abcd"),
        ] {
            assert_eq!(by_user(other, "0123abcd"), Verdict::Wait);
        }
    }

    #[test]
    fn counts_are_those_of_the_service_and_its_revision() {
        let text = "# HELP x\n\
            ashlar_gateway_canary_requests_total{name=\"m\",namespace=\"a\",outcome=\"answered\",revision=\"new\"} 40\n\
            ashlar_gateway_canary_requests_total{name=\"m\",namespace=\"a\",outcome=\"failed\",revision=\"new\"} 2\n\
            ashlar_gateway_canary_requests_total{name=\"m\",namespace=\"b\",outcome=\"failed\",revision=\"new\"} 9\n\
            ashlar_gateway_canary_requests_total{name=\"m\",namespace=\"a\",outcome=\"failed\",revision=\"older\"} 9\n";
        assert_eq!(read(text, "a", "m", "new"), counts(40, 2));
    }

    proptest! {
        /// A promoted revision had enough requests and few enough failures; more failures never turn a rollback around.
        #[test]
        fn promotion_needs_requests_and_a_rollback_is_final(
            answered in 0..10_000u64, failed in 0..10_000u64, most in 0..=100i32, least in 1..1000i32,
        ) {
            let canary = canary(most, least);
            let verdict = by_errors(&canary, counts(answered, failed));
            let total = answered + failed;
            match verdict {
                Verdict::Promote => {
                    prop_assert!(total >= u64::try_from(least).unwrap_or(0));
                    prop_assert!(failed * 100 <= u64::try_from(most).unwrap_or(0) * total);
                }
                Verdict::RollBack(_) => {
                    prop_assert!(failed > 0);
                    prop_assert!(matches!(by_errors(&canary, counts(answered, failed + 1)), Verdict::RollBack(_)));
                }
                Verdict::Wait => prop_assert!(total < u64::try_from(least).unwrap_or(0)),
            }
        }
    }
}
