//! The examples of the Kubernetes documentation, and properties of every behaviour.
#![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn behavior(field: serde_json::Value) -> Behavior {
    Behavior::of(Some(&serde_json::from_value(field).unwrap()))
}

/// Plays one recommendation a second and returns the replicas of every second.
fn play(
    behavior: &Behavior,
    start: i32,
    recommended: impl Fn(i32) -> i32,
    seconds: i32,
) -> Vec<i32> {
    let mut record = Record::default();
    let mut current = start;
    (0..seconds)
        .map(|second| {
            current = record.apply(behavior, f64::from(second), current, recommended(second));
            current
        })
        .collect()
}

#[test]
fn absent_up_is_unlimited_and_down_waits_300_seconds() {
    let behavior = Behavior::of(None);
    assert_eq!(play(&behavior, 1, |_| 500, 1), [500]);
    let counts = play(
        &behavior,
        10,
        |second| if second == 0 { 10 } else { 2 },
        302,
    );
    assert_eq!(counts[..300], [10; 300]);
    assert_eq!(counts[301], 2);
}

#[test]
fn the_documented_default_of_scaling_up_doubles_or_adds_four() {
    let behavior = behavior(json!({}));
    let counts = play(&behavior, 1, |_| 100, 46);
    // 1 + 4 pods; then 100 % of 5 is more than 4 pods.
    assert_eq!(
        (counts[0], counts[14], counts[15], counts[30]),
        (5, 5, 10, 20)
    );
}

#[test]
fn a_percentage_down_is_of_the_count_at_the_start_of_its_period() {
    // The documentation's example: 10 % a minute, from 80 replicas for ten wanted: 72 after the first minute's steps.
    let behavior = behavior(json!({"scaleDown": {
        "stabilizationWindowSeconds": 0,
        "policies": [{"type": "Percent", "value": 10, "periodSeconds": 60}]
    }}));
    let counts = play(&behavior, 80, |_| 10, 121);
    assert_eq!(
        (counts[0], counts[59], counts[60], counts[120]),
        (72, 72, 64, 57)
    );
}

#[test]
fn of_two_policies_max_takes_the_greater_change_and_min_the_smaller() {
    let policies = json!([
        {"type": "Pods", "value": 4, "periodSeconds": 60},
        {"type": "Percent", "value": 10, "periodSeconds": 60}
    ]);
    let with = |select: &str| {
        behavior(
            json!({"scaleDown": {"stabilizationWindowSeconds": 0, "selectPolicy": select, "policies": policies}}),
        )
    };
    assert_eq!(play(&with("Max"), 80, |_| 10, 1), [72]);
    assert_eq!(play(&with("Max"), 20, |_| 10, 1), [16]);
    assert_eq!(play(&with("Min"), 80, |_| 10, 1), [76]);
    assert_eq!(play(&with("Disabled"), 80, |_| 10, 1), [80]);
}

#[test]
fn a_window_for_scaling_up_takes_the_lowest() {
    let behavior = behavior(json!({"scaleUp": {"stabilizationWindowSeconds": 60}}));
    let counts = play(&behavior, 4, |second| if second < 5 { 4 } else { 8 }, 70);
    assert_eq!(counts[64], 4);
    assert_eq!(counts[65], 8);
}

#[test]
fn tolerance_is_read() {
    let behavior =
        behavior(json!({"scaleUp": {"tolerance": "50m"}, "scaleDown": {"tolerance": "0.2"}}));
    assert!((behavior.up_tolerance() - 0.05).abs() < 1e-9);
    assert!((behavior.down_tolerance() - 0.2).abs() < 1e-9);
}

fn any_rules() -> impl Strategy<Value = serde_json::Value> {
    let policy = (any::<bool>(), 1..200i32, 1..1800i32).prop_map(|(pods, value, period)| {
        json!({"type": if pods { "Pods" } else { "Percent" }, "value": value, "periodSeconds": period})
    });
    let select = prop::sample::select(vec!["Max", "Min", "Disabled"]);
    (0..600i32, select, prop::collection::vec(policy, 1..4)).prop_map(|(window, select, policies)| {
        json!({"stabilizationWindowSeconds": window, "selectPolicy": select, "policies": policies})
    })
}

proptest! {
    /// Whatever the rules: a change never passes the recommendation, `Disabled` never moves, and no direction is taken
    /// that no recommendation of the window asked for.
    #[test]
    fn no_change_without_a_recommendation(
        up in any_rules(),
        down in any_rules(),
        recommended in prop::collection::vec(0..60i32, 1..200),
        start in 0..40i32,
    ) {
        let rules = behavior(json!({"scaleUp": up, "scaleDown": down}));
        let mut record = Record::default();
        let mut current = start;
        for (second, want) in recommended.iter().enumerate() {
            let next = record.apply(&rules, f64::from(u32::try_from(second).unwrap()), current, *want);
            if next > current {
                prop_assert!(next <= (*want).max(1));
                prop_assert!(up["selectPolicy"] != "Disabled");
            }
            if next < current {
                prop_assert!(next >= *want);
                prop_assert!(down["selectPolicy"] != "Disabled");
            }
            current = next;
        }
    }
}
