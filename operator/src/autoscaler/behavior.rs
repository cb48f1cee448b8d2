//! HorizontalPodAutoscaler v2's `behavior`, word for word: stabilisation windows, scaling policies, tolerance. Pure.
//!
//! The rules are those of the Kubernetes documentation ("Configurable scaling behavior"): a window takes the most
//! careful recommendation within it, a policy bounds the change within its period, `selectPolicy` chooses among
//! policies. Absent, scaling up is not bounded and scaling down has the documented default: any number of replicas
//! once 300 s have passed.

use std::collections::VecDeque;

use k8s_openapi::api::autoscaling::v2::{
    HPAScalingPolicy, HPAScalingRules, HorizontalPodAutoscalerBehavior,
};

/// The documented default window for scaling down, in seconds.
pub const DEFAULT_DOWN_WINDOW_SECONDS: f64 = 300.0;
/// The documented default tolerance.
pub const DEFAULT_TOLERANCE: f64 = 0.1;
/// Longest window and period that the HPA API takes, in seconds.
const MAX_SECONDS: f64 = 3600.0;
/// Most remembered recommendations and scale events: one a second for the longest window.
const MAX_REMEMBERED: usize = 4096;

/// Which of several policies binds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Select {
    /// The one that changes most.
    Max,
    /// The one that changes least.
    Min,
    /// No change in this direction.
    Disabled,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Amount {
    Pods(i32),
    Percent(i32),
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Policy {
    amount: Amount,
    period: f64,
}

/// Rules of one direction.
#[derive(Debug, Clone, PartialEq)]
struct Rules {
    window: f64,
    select: Select,
    policies: Vec<Policy>,
    tolerance: f64,
    /// The user has set it.
    tolerance_asked: bool,
}

/// Both directions.
#[derive(Debug, Clone, PartialEq)]
pub struct Behavior {
    up: Rules,
    down: Rules,
}

fn rules(given: Option<&HPAScalingRules>, default: Rules) -> Rules {
    let Some(given) = given else {
        return default;
    };
    let select = match given.select_policy.as_deref() {
        None => default.select,
        Some("Min") => Select::Min,
        Some("Disabled") => Select::Disabled,
        Some(_) => Select::Max,
    };
    let policy = |policy: &HPAScalingPolicy| Policy {
        amount: if policy.type_ == "Percent" {
            Amount::Percent(policy.value)
        } else {
            Amount::Pods(policy.value)
        },
        period: f64::from(policy.period_seconds).clamp(1.0, MAX_SECONDS),
    };
    let tolerance = given.tolerance.as_ref().and_then(|quantity| {
        let text = quantity.0.as_str();
        match text.strip_suffix('m') {
            Some(thousandths) => thousandths.parse::<f64>().ok().map(|t| t / 1e3),
            None => text.parse().ok(),
        }
    });
    Rules {
        window: given
            .stabilization_window_seconds
            .map_or(default.window, |w| f64::from(w).clamp(0.0, MAX_SECONDS)),
        select,
        policies: given
            .policies
            .as_ref()
            .map_or(default.policies, |list| list.iter().map(policy).collect()),
        tolerance: tolerance.unwrap_or(default.tolerance),
        tolerance_asked: tolerance.is_some(),
    }
}

impl Behavior {
    /// Reads the resource's field.
    #[must_use]
    pub fn of(field: Option<&HorizontalPodAutoscalerBehavior>) -> Self {
        let percent = |value| Policy {
            amount: Amount::Percent(value),
            period: 15.0,
        };
        let down = Rules {
            window: DEFAULT_DOWN_WINDOW_SECONDS,
            select: Select::Max,
            policies: vec![percent(100)],
            tolerance: DEFAULT_TOLERANCE,
            tolerance_asked: false,
        };
        let up = Rules {
            window: 0.0,
            select: Select::Max,
            policies: vec![
                percent(100),
                Policy {
                    amount: Amount::Pods(4),
                    period: 15.0,
                },
            ],
            tolerance: DEFAULT_TOLERANCE,
            tolerance_asked: false,
        };
        match field {
            None => Self {
                // Nothing bounds it: an empty list of policies leaves only the window.
                up: Rules {
                    policies: Vec::new(),
                    ..up
                },
                down,
            },
            Some(field) => Self {
                up: rules(field.scale_up.as_ref(), up),
                down: rules(field.scale_down.as_ref(), down),
            },
        }
    }

    /// How far above one, as a share, the load must be before replicas are added.
    #[must_use]
    pub fn up_tolerance(&self) -> f64 {
        self.up.tolerance
    }

    /// The same, if the user has set it.
    #[must_use]
    pub fn asked_up_tolerance(&self) -> Option<f64> {
        self.up.tolerance_asked.then_some(self.up.tolerance)
    }

    /// How far below one the load must be before replicas are taken away.
    #[must_use]
    pub fn down_tolerance(&self) -> f64 {
        self.down.tolerance
    }

    /// Seconds for which the highest recommendation stands.
    #[must_use]
    pub fn down_window(&self) -> f64 {
        self.down.window
    }
}

/// Recommendations and changes that the windows and periods look back on.
#[derive(Debug, Clone, Default)]
pub struct Record {
    /// Time of a recommendation and its value; it stands until the next one.
    recommendations: VecDeque<(f64, i32)>,
    /// Time of a change and how many replicas it added.
    changes: VecDeque<(f64, i32)>,
}

impl Record {
    /// What `behavior` makes of `recommended` at `now`, with `current` replicas wanted so far.
    ///
    /// The result is remembered as a change if it is one.
    pub fn apply(&mut self, behavior: &Behavior, now: f64, current: i32, recommended: i32) -> i32 {
        self.remember(now, recommended);
        let stable = self.stabilised(behavior, now, current, recommended);
        let desired = match stable {
            more if more > current => more.min(self.up_limit(&behavior.up, now, current)),
            less if less < current => less.max(self.down_limit(&behavior.down, now, current)),
            same => same,
        };
        self.changed(now, desired - current);
        desired
    }

    /// Remembers a change that was made for another cause, such as new bounds or an idle service.
    pub fn changed(&mut self, now: f64, added: i32) {
        if added != 0 {
            self.changes.push_back((now, added));
        }
        while self.changes.len() > MAX_REMEMBERED
            || self
                .changes
                .front()
                .is_some_and(|(at, _)| now - at > MAX_SECONDS)
        {
            self.changes.pop_front();
        }
    }

    /// Takes a recommendation in without acting on it.
    pub fn remember(&mut self, now: f64, recommended: i32) {
        if self.recommendations.back().map(|(_, value)| *value) != Some(recommended) {
            self.recommendations.push_back((now, recommended));
        }
        // The first one still stands while the second is inside the longest window.
        while self.recommendations.len() > MAX_REMEMBERED
            || self
                .recommendations
                .get(1)
                .is_some_and(|(at, _)| now - at > MAX_SECONDS)
        {
            self.recommendations.pop_front();
        }
    }

    /// Recommendations that stood at some time within the last `window` seconds.
    fn within(&self, now: f64, window: f64) -> impl Iterator<Item = i32> {
        let ends = self
            .recommendations
            .iter()
            .skip(1)
            .map(|(at, _)| *at)
            .chain([f64::INFINITY]);
        self.recommendations
            .iter()
            .zip(ends)
            .filter(move |(_, end)| *end > now - window)
            .map(|((_, value), _)| *value)
    }

    fn stabilised(&self, behavior: &Behavior, now: f64, current: i32, recommended: i32) -> i32 {
        let lowest = self
            .within(now, behavior.up.window)
            .fold(recommended, i32::min);
        let highest = self
            .within(now, behavior.down.window)
            .fold(recommended, i32::max);
        // Up as far as every recommendation of the one window goes, down no further than any of the other.
        current.max(lowest).min(highest.max(lowest))
    }

    /// Replicas added and taken away within the last `period` seconds.
    fn moved(&self, now: f64, period: f64) -> (i32, i32) {
        let recent = self.changes.iter().filter(|(at, _)| now - at < period);
        recent.fold((0, 0), |(added, removed), (_, change)| {
            (added + (*change).max(0), removed - (*change).min(0))
        })
    }

    fn up_limit(&self, rules: &Rules, now: f64, current: i32) -> i32 {
        if rules.select == Select::Disabled {
            return current;
        }
        let limits = rules.policies.iter().map(|policy| {
            let (added, removed) = self.moved(now, policy.period);
            let start = current - added + removed;
            match policy.amount {
                Amount::Pods(pods) => start.saturating_add(pods),
                Amount::Percent(percent) => {
                    rounded((f64::from(start) * (1.0 + f64::from(percent) / 100.0)).ceil())
                }
            }
        });
        let limit = match rules.select {
            Select::Min => limits.min(),
            _ => limits.max(),
        };
        // One replica where there is none: no share of zero would ever wake a service.
        limit.unwrap_or(i32::MAX).max(current).max(1)
    }

    fn down_limit(&self, rules: &Rules, now: f64, current: i32) -> i32 {
        if rules.select == Select::Disabled {
            return current;
        }
        let limits = rules.policies.iter().map(|policy| {
            let (added, removed) = self.moved(now, policy.period);
            let start = current + removed - added;
            match policy.amount {
                Amount::Pods(pods) => start.saturating_sub(pods),
                Amount::Percent(percent) => {
                    rounded((f64::from(start) * (1.0 - f64::from(percent) / 100.0)).floor())
                }
            }
        });
        let limit = match rules.select {
            Select::Min => limits.max(),
            _ => limits.min(),
        };
        limit.unwrap_or(0).clamp(0, current.max(0))
    }
}

fn rounded(value: f64) -> i32 {
    // Replica counts are far below 2^31; anything else is cut to the type's range.
    value as i32
}

#[cfg(test)]
#[path = "tests/behavior.rs"]
mod tests;
