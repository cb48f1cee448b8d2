//! Decisions, each from the situation that a user would describe.
#![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]

use proptest::prelude::*;

use super::*;

fn policy(min: i32, max: i32) -> Policy {
    Policy {
        min,
        max,
        kv_target: 0.8,
        waiting_target: 5.0,
        first_token_target: None,
        idle_seconds: 300.0,
        behavior: Behavior::of(None),
    }
}

fn load(waiting: f64, kv_cache: f64) -> PodLoad {
    PodLoad {
        waiting,
        running: (kv_cache * 20.0).round(),
        kv_cache,
        generated: None,
        finished: None,
        finished_squares: None,
        waiting_tokens: None,
        prefill_rate: None,
    }
}

fn gateways(held: f64) -> Signal<GatewayLoad> {
    Signal::Fresh(GatewayLoad {
        held,
        in_flight: held,
        ended: 0.0,
    })
}

/// A service that is looked at once a second.
struct Play {
    policy: Policy,
    history: History,
    now: f64,
    wanted: i32,
}

impl Play {
    fn new(policy: Policy, wanted: i32) -> Self {
        Self {
            policy,
            history: History::default(),
            now: 0.0,
            wanted,
        }
    }

    fn look(&mut self, loads: &[Signal<PodLoad>], gateways: Signal<GatewayLoad>) -> Decision {
        let ready: Vec<Replica> = (0..)
            .zip(loads)
            .map(|(id, load)| Replica {
                id,
                load: *load,
                read_at: self.now,
            })
            .collect();
        let seen = Observation {
            now: self.now,
            wanted: self.wanted,
            ready: &ready,
            gateways,
        };
        let decision = decide(&self.policy, &seen, &mut self.history);
        assert_eq!(decision.from, self.wanted);
        self.wanted = decision.to;
        self.now += 1.0;
        decision
    }

    /// The same for some seconds; returns the last decision.
    fn hold(
        &mut self,
        seconds: u32,
        loads: &[Signal<PodLoad>],
        gateways: Signal<GatewayLoad>,
    ) -> Decision {
        let mut last = self.look(loads, gateways);
        for _ in 1..seconds {
            last = self.look(loads, gateways);
        }
        last
    }

    /// The first second, counted from 1, in which the count changes; none within the time.
    fn change(
        &mut self,
        seconds: u32,
        loads: &[Signal<PodLoad>],
        gateways: Signal<GatewayLoad>,
    ) -> Option<(u32, Decision)> {
        (1..=seconds).find_map(|second| {
            let decision = self.look(loads, gateways);
            (decision.to != decision.from).then_some((second, decision))
        })
    }
}

#[test]
fn a_queue_jumps_at_once_by_the_rule() {
    let mut play = Play::new(policy(1, 100), 2);
    play.hold(60, &[Signal::Fresh(load(0.0, 0.6)); 2], gateways(0.0));
    let decision = play.look(&[Signal::Fresh(load(30.0, 1.0)); 2], gateways(0.0));
    // 2 × max(1.0 / 0.8, 30 / 5)
    assert_eq!((decision.to, decision.reason), (12, Reason::QueueDepth));
    assert!(
        decision.explain().contains("60 requests wait"),
        "{}",
        decision.explain()
    );
}

#[test]
fn a_step_of_the_load_is_answered_within_three_seconds() {
    for kv in [0.92, 0.95, 1.0] {
        let mut play = Play::new(policy(1, 100), 4);
        play.hold(120, &[Signal::Fresh(load(0.0, 0.75)); 4], gateways(0.0));
        let queue = if kv < 1.0 { 6.0 } else { 9.0 };
        let (second, decision) = play
            .change(10, &[Signal::Fresh(load(queue, kv)); 4], gateways(0.0))
            .unwrap();
        assert!(second <= 3, "{second} s at {kv}");
        assert!(decision.to > 4);
    }
}

#[test]
fn with_a_target_for_the_first_token_tokens_count_and_not_requests() {
    let waiting = |waiting: f64, tokens: f64| {
        Signal::Fresh(PodLoad {
            waiting_tokens: Some(tokens),
            prefill_rate: Some(5000.0),
            ..load(waiting, 0.5)
        })
    };
    let asked = |pod: Signal<PodLoad>, held: f64| {
        let mut play = Play::new(
            Policy {
                first_token_target: Some(2.0),
                ..policy(1, 100)
            },
            1,
        );
        play.look(&[pod], gateways(held)).to
    };
    // Forty short prompts are computed in 0.8 s: nothing to add. Two of 25,000 tokens would take ten.
    assert_eq!(asked(waiting(40.0, 4000.0), 0.0), 1);
    assert_eq!(asked(waiting(2.0, 50_000.0), 0.0), 50);
    // 20 of 1,000 tokens take 4 s of the 1.8 s that their own 0.2 s leave; as many held are as long.
    assert_eq!(asked(waiting(20.0, 20_000.0), 0.0), 3);
    assert_eq!(asked(waiting(20.0, 20_000.0), 20.0), 5);
    // A pod that does not tell is judged by its requests.
    assert_eq!(asked(Signal::Fresh(load(20.0, 0.5)), 0.0), 4);
}

#[test]
fn kv_alone_asks_for_a_quarter_more_at_most() {
    let mut play = Play::new(policy(1, 100), 8);
    let decision = play.hold(30, &[Signal::Fresh(load(0.0, 1.0)); 8], gateways(0.0));
    assert_eq!(play.wanted, 10);
    assert_eq!(decision.reason, Reason::Steady, "starting replicas count");
}

#[test]
fn starting_replicas_count() {
    let mut play = Play::new(policy(1, 100), 1);
    play.look(&[Signal::Fresh(load(20.0, 1.0))], gateways(0.0));
    assert_eq!(play.wanted, 4);
    // Three are starting; the queue stays as it is, and nothing more is asked for.
    let decision = play.hold(20, &[Signal::Fresh(load(20.0, 1.0))], gateways(0.0));
    assert_eq!((decision.to, decision.reason), (4, Reason::Steady));
}

#[test]
fn down_waits_for_the_window_and_takes_what_can_be_held() {
    let mut play = Play::new(policy(1, 100), 10);
    play.hold(60, &[Signal::Fresh(load(0.0, 0.8)); 10], gateways(0.0));
    let calm = [Signal::Fresh(load(0.0, 0.3)); 10];
    let (second, decision) = play.change(600, &calm, gateways(0.0)).unwrap();
    assert!((300..=320).contains(&second), "{second}");
    assert_eq!(decision.reason, Reason::LoadDropped);
    play.hold(70, &calm, gateways(0.0));
    // 10 × 0.3 / 0.8 = 3.75, and 3.0 of KV cache on 4 replicas is 0.75 > 0.72: the test asks for one more.
    assert_eq!(play.wanted, 5);
}

#[test]
fn within_the_tolerance_nothing_moves() {
    for kv in [0.73, 0.8, 0.87] {
        let mut play = Play::new(policy(1, 100), 10);
        assert_eq!(
            play.change(900, &[Signal::Fresh(load(0.0, kv)); 10], gateways(0.0)),
            None
        );
    }
}

#[test]
fn missing_signals_hold_the_count() {
    let mut play = Play::new(policy(0, 100), 4);
    play.hold(60, &[Signal::Fresh(load(0.0, 0.8)); 4], gateways(0.0));
    for lost in [Signal::Absent, Signal::Stale(load(0.0, 0.0))] {
        let mut loads = [lost; 4];
        loads[0] = Signal::Fresh(load(0.0, 0.1));
        let decision = play.hold(900, &loads, gateways(0.0));
        assert_eq!(
            (decision.to, decision.reason),
            (4, Reason::MetricsUnavailable)
        );
        assert!(decision.blind.unwrap().contains("1 of 4 ready pods"));
    }
}

#[test]
fn a_pod_that_says_nothing_is_not_idle() {
    // Three replicas idle, one unknown: the unknown one may be full.
    let mut play = Play::new(policy(1, 100), 4);
    let mut loads = [Signal::Fresh(load(0.0, 0.1)); 4];
    loads[3] = Signal::Absent;
    play.hold(900, &loads, gateways(0.0));
    assert_eq!(play.wanted, 2);
}

#[test]
fn zero_comes_after_quiet_and_ends_with_the_first_held_request() {
    let mut play = Play::new(policy(0, 10), 3);
    let idle = [Signal::Fresh(PodLoad {
        running: 0.0,
        ..load(0.0, 0.0)
    }); 3];
    play.hold(100, &[Signal::Fresh(load(0.0, 0.8)); 3], gateways(0.0));
    let mut went = None;
    for _ in 0..400 {
        let decision = play.look(&idle, gateways(0.0));
        if decision.reason == Reason::Idle {
            went = Some(play.now);
            break;
        }
    }
    let went = went.unwrap() - 100.0;
    assert!((300.0..=303.0).contains(&went), "{went}");
    assert_eq!(play.wanted, 0);
    assert_eq!(play.change(1000, &[], gateways(0.0)), None);
    let decision = play.look(&[], gateways(1.0));
    assert_eq!((decision.to, decision.reason), (1, Reason::HeldRequests));
}

#[test]
fn nothing_seen_is_not_idle() {
    let idle = Signal::Fresh(PodLoad {
        running: 0.0,
        ..load(0.0, 0.0)
    });
    for (loads, gateway) in [
        ([idle, idle], Signal::Absent),
        ([idle, idle], Signal::Stale(GatewayLoad::default())),
        ([idle, Signal::Absent], gateways(0.0)),
        (
            [idle, idle],
            Signal::Fresh(GatewayLoad {
                in_flight: 1.0,
                ..GatewayLoad::default()
            }),
        ),
    ] {
        let mut play = Play::new(policy(0, 10), 2);
        play.hold(1000, &loads, gateway);
        assert!(play.wanted >= 1);
    }
    // Short requests between the looks are seen by their count.
    let mut play = Play::new(policy(0, 10), 1);
    for ended in 0..100 {
        let gateway = Signal::Fresh(GatewayLoad {
            ended: f64::from(ended),
            ..GatewayLoad::default()
        });
        play.hold(290, &[idle], gateway);
    }
    assert_eq!(play.wanted, 1);
    // Nobody seen is no reason to wake up either.
    let mut play = Play::new(policy(0, 10), 0);
    play.hold(1000, &[], Signal::Absent);
    assert_eq!(play.wanted, 0);
}

#[test]
fn bounds_bind_at_once() {
    let calm = [Signal::Fresh(load(0.0, 0.78)); 8];
    let mut play = Play::new(policy(1, 4), 8);
    let decision = play.look(&calm, gateways(0.0));
    assert_eq!((decision.to, decision.reason), (4, Reason::Bounds));
    let mut play = Play::new(policy(6, 9), 2);
    let decision = play.look(&calm[..2], gateways(0.0));
    assert_eq!(decision.to, 6);
}

#[test]
fn a_known_rate_bounds_a_queue_that_only_grows() {
    let mut play = Play::new(policy(1, 100), 2);
    let (mut generated, mut finished, mut ended) = (0.0, 0.0, 0.0);
    let mut most = 0;
    for second in 0..120 {
        // Each replica ends 2 requests a second of 100 tokens; 20 a second come from the tenth second on.
        generated += 200.0;
        finished += 2.0;
        ended += 4.0;
        let crowd = second >= 60;
        let queue = if crowd {
            8.0 * f64::from(second - 59)
        } else {
            1.0
        };
        let pod = PodLoad {
            waiting: queue,
            running: 20.0,
            kv_cache: 0.5,
            generated: Some(generated),
            finished: Some(finished),
            finished_squares: None,
            waiting_tokens: None,
            prefill_rate: None,
        };
        let in_flight = 40.0 + 2.0 * queue;
        let gateway = Signal::Fresh(GatewayLoad {
            held: 0.0,
            in_flight,
            ended,
        });
        most = most.max(play.look(&[Signal::Fresh(pod); 2], gateway).to);
    }
    // 20 a second and room for chance ÷ 2, and a queue to clear; by the queue alone it would have been a hundred.
    assert!((11..=15).contains(&most), "{most}");
}

#[test]
fn every_input_is_named_and_the_sentence_is_whole() {
    let mut play = Play::new(policy(1, 10), 1);
    let decision = play.look(&[Signal::Fresh(load(20.0, 1.0))], gateways(3.0));
    let inputs = decision.inputs();
    assert_eq!(inputs["waitingRequests"], "20");
    assert_eq!(inputs["heldRequests"], "3");
    assert_eq!(inputs["readyReplicas"], "1");
    assert_eq!(
        decision.explain(),
        "from 1 to 5 replicas: 23 requests wait (3 of them at the gateways) at 1 ready replicas"
    );
}

fn any_signal() -> impl Strategy<Value = Signal<PodLoad>> {
    let pod = (0.0..200f64, 0.0..1f64).prop_map(|(waiting, kv)| load(waiting.round(), kv));
    prop_oneof![
        4 => pod.clone().prop_map(Signal::Fresh),
        1 => pod.prop_map(Signal::Stale),
        1 => Just(Signal::Absent),
    ]
}

proptest! {
    /// Whatever is seen: the bounds hold, blindness moves nothing, zero needs quiet, and the same past and present
    /// give the same answer.
    #[test]
    fn always(
        seconds in prop::collection::vec((prop::collection::vec(any_signal(), 0..6), prop_oneof![
            3 => (0.0..50f64).prop_map(|held| gateways(held.round())),
            1 => Just(Signal::Absent),
        ]), 1..120),
        min in 0..3i32,
        more in 0..20i32,
        start in 0..25i32,
    ) {
        let mut play = Play::new(policy(min, min.max(1) + more), start.clamp(min, min.max(1) + more));
        for (loads, gateway) in &seconds {
            let mut twin = play.history.clone();
            let ready: Vec<Replica> = (0..).zip(loads).map(|(id, load)| Replica { id, load: *load, read_at: play.now }).collect();
            let seen = Observation { now: play.now, wanted: play.wanted, ready: &ready, gateways: *gateway };
            let expected = decide(&play.policy, &seen, &mut twin);
            let decision = play.look(loads, *gateway);
            prop_assert_eq!(&expected, &decision);
            prop_assert!((play.policy.min..=play.policy.max).contains(&decision.to));
            let fresh = loads.iter().filter(|l| l.fresh().is_some()).count();
            if decision.from > 0 && 2 * fresh < loads.len() {
                prop_assert_eq!(decision.to, decision.from);
            }
            prop_assert!(decision.to > 0 || decision.from == 0, "zero within two minutes of load");
        }
    }
}

proptest! {
    /// Spells of one demand say the same as all looks one by one.
    #[test]
    fn means_are_those_of_every_look(demands in prop::collection::vec((0..3u8, 1..60u32), 1..20), window in 1..70u32) {
        let (mut history, mut looks) = (History::default(), Vec::new());
        for (demand, times) in demands {
            for _ in 0..times {
                // A power of two apart: every time is exact.
                let now = looks.len() as f64 * 0.25;
                history.remember(now, f64::from(demand), f64::from(demand) / 2.0);
                looks.push((now, f64::from(demand)));
                let window = f64::from(window).min(STABLE_WINDOW_SECONDS);
                let recent: Vec<f64> = looks.iter().filter(|(at, _)| now - at < window).map(|(_, demand)| *demand).collect();
                let mean = recent.iter().sum::<f64>() / recent.len() as f64;
                let (all, cache) = history.means(now, window);
                prop_assert!((all - mean).abs() < 1e-9, "{all} and not {mean} at {now}");
                prop_assert!((cache - mean / 2.0).abs() < 1e-9);
            }
        }
    }
}

#[test]
fn hours_at_rest_are_little_to_remember() {
    let mut history = History::default();
    for look in 0..20_000 {
        history.remember(f64::from(look) * 0.25, 0.0, 0.0);
    }
    assert_eq!(history.demands.len(), 1);
}
