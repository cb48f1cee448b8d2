//! Arrivals as users make them: steady, rising, in crowds, in bunches.
#![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::*;

/// Plays `seconds` of arrivals at `rate` per second, each second a look.
fn play(arrivals: &mut Arrivals, from: u32, to: u32, total: &mut f64, rate: impl Fn(f64) -> f64) {
    let mut rng = StdRng::seed_from_u64(u64::from(from));
    for second in from..to {
        let mean = rate(f64::from(second));
        // Poisson by its definition: exponential gaps within the second.
        let mut at = 0.0;
        loop {
            at -= (1.0 - rng.random::<f64>()).ln() / mean;
            if at >= 1.0 {
                break;
            }
            *total += 1.0;
        }
        arrivals.look(f64::from(second), Some(*total), 0.0);
    }
}

#[test]
fn a_steady_rate_has_no_trend_and_the_chance_of_its_count() {
    let (mut arrivals, mut total) = (Arrivals::default(), 0.0);
    play(&mut arrivals, 0, 400, &mut total, |_| 30.0);
    let rate = arrivals.rate().unwrap();
    assert!((rate.now - 30.0).abs() < 3.0, "{rate:?}");
    assert!(rate.trend.abs() < 0.005, "{rate:?}");
    assert!((1.0..3.5).contains(&rate.chance), "{rate:?}");
}

#[test]
fn a_rise_is_seen_and_carried_on() {
    let (mut arrivals, mut total) = (Arrivals::default(), 0.0);
    play(&mut arrivals, 0, 400, &mut total, |s| 10.0 + 0.05 * s);
    let rate = arrivals.rate().unwrap();
    assert!((0.03..0.07).contains(&rate.trend), "{rate:?}");
    let ahead = rate.ahead(60.0);
    assert!((30.0..37.0).contains(&ahead), "{ahead}");
}

#[test]
fn a_crowd_counts_at_once_and_leaves_no_trend() {
    let (mut arrivals, mut total) = (Arrivals::default(), 0.0);
    play(&mut arrivals, 0, 300, &mut total, |_| 10.0);
    play(&mut arrivals, 300, 303, &mut total, |_| 100.0);
    assert!(arrivals.rate().unwrap().now > 60.0);
    play(&mut arrivals, 303, 500, &mut total, |_| 100.0);
    let rate = arrivals.rate().unwrap();
    assert!(
        (rate.now - 100.0).abs() < 5.0 && rate.trend == 0.0,
        "{rate:?}"
    );
    play(&mut arrivals, 500, 515, &mut total, |_| 10.0);
    assert!(arrivals.rate().unwrap().now < 20.0, "{:?}", arrivals.rate());
}

/// Plays arrivals whose rate steps from 10 to 35 per second after two minutes, four looks a second as the operator's; returns
/// how long after the step the rate, less chance, was over 20, and how many jumps were seen before it.
fn step(seed: u64) -> (f64, usize) {
    const LOOK: f64 = 0.25;
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut arrivals, mut total, mut next) = (Arrivals::default(), 0.0, 0.0);
    let (step, mut jumps, mut since) = (120.0 + rng.random::<f64>(), 0, 0.0);
    for look in 0.. {
        let now = f64::from(look) * LOOK;
        while next < now {
            total += 1.0;
            let mean = if next < step { 10.0 } else { 35.0 };
            next -= (1.0 - rng.random::<f64>()).ln() / mean;
        }
        arrivals.look(now, Some(total), 0.0);
        let Some(rate) = arrivals.rate() else {
            continue;
        };
        if now > step && rate.certain(1.0) > 20.0 {
            return (now - step, jumps);
        }
        if now <= step && rate.since != since {
            (since, jumps) = (rate.since, jumps + 1);
        }
    }
    unreachable!("it steps");
}

#[test]
fn a_step_is_seen_soon_and_chance_is_no_step() {
    let (mut late, jumps): (Vec<f64>, Vec<usize>) = (0..200).map(step).unzip();
    late.sort_by(f64::total_cmp);
    assert!(late[100] < 1.2 && late[190] < 2.0, "{late:?}");
    // Of nearly seven hours.
    assert!(jumps.iter().sum::<usize>() <= 2, "{jumps:?}");
}

#[test]
fn what_is_remembered_is_fine_where_jumps_are_looked_for_and_coarse_before() {
    let mut arrivals = Arrivals::default();
    for look in 0..4000 {
        arrivals.look(f64::from(look) * 0.25, Some(f64::from(look)), 0.0);
    }
    assert!(
        arrivals.moments.len() <= MAX_MOMENTS,
        "{}",
        arrivals.moments.len()
    );
    let gaps: Vec<f64> = arrivals
        .moments
        .iter()
        .zip(arrivals.moments.iter().skip(1))
        .map(|(a, b)| b.0 - a.0)
        .collect();
    let (old, recent) = gaps.split_at(gaps.len() - 20);
    assert!(recent.iter().all(|gap| *gap < 0.3), "{recent:?}");
    assert!(
        old.iter().rev().skip(2).all(|gap| (0.9..1.3).contains(gap)),
        "{old:?}"
    );
}

#[test]
fn bunches_are_more_than_chance() {
    let (mut arrivals, mut total) = (Arrivals::default(), 0.0);
    let bunches = |s: f64| {
        if ((s / 10.0) as u32).is_multiple_of(3) {
            48.0
        } else {
            36.0
        }
    };
    play(&mut arrivals, 0, 400, &mut total, bunches);
    let rate = arrivals.rate().unwrap();
    assert!(rate.chance > 1.5 * rate.poisson, "{rate:?}");
    // Of a minute's mean, six pieces of ten seconds.
    let error = rate.chance / 6.0_f64.sqrt();
    assert!(
        (rate.now - rate.certain(1.0) - error).abs() < 0.1,
        "{rate:?}"
    );
    assert_eq!(rate.certain(100.0), 0.0);
}

#[test]
fn clients_that_reach_replicas_directly_count() {
    let mut arrivals = Arrivals::default();
    for second in 0..120 {
        arrivals.look(f64::from(second), Some(f64::from(second)), 5.0);
    }
    assert!((arrivals.rate().unwrap().now - 5.0).abs() < 0.1);
}

#[test]
fn a_gateway_that_begins_anew_is_no_crowd_and_silence_is_no_rate() {
    let mut arrivals = Arrivals::default();
    assert_eq!(arrivals.rate(), None);
    for second in 0..100 {
        let total = if second < 50 { 1000.0 } else { 0.0 };
        arrivals.look(
            f64::from(second),
            Some(total + 2.0 * f64::from(second)),
            0.0,
        );
    }
    let rate = arrivals.rate().unwrap();
    assert!(rate.now < 3.0, "{rate:?}");
}

#[test]
fn silence_is_two_moments_and_a_trickle_keeps_its_rate() {
    let (mut silent, mut trickle) = (Arrivals::default(), Arrivals::default());
    for look in 0..2400 {
        let now = f64::from(look) * 0.25;
        silent.look(now, Some(7.0), 0.0);
        trickle.look(now, Some((now / 20.0).floor()), 0.0);
    }
    assert!(
        silent.moments.len() < 32,
        "{} moments",
        silent.moments.len()
    );
    let rate = silent.rate().unwrap();
    assert_eq!((rate.now, rate.trend), (0.0, 0.0));
    assert!(rate.seen > 59.0, "{rate:?}");
    assert!(
        trickle.moments.len() < 80,
        "{} moments",
        trickle.moments.len()
    );
    let rate = trickle.rate().unwrap();
    assert!(
        (rate.now - 0.05).abs() < 0.018 && rate.seen > 59.0,
        "{rate:?}"
    );
    // After the silence a first request does not look like many.
    silent.look(600.0, Some(8.0), 0.0);
    let rate = silent.rate().unwrap();
    assert!((rate.now - 1.0 / 60.0).abs() < 0.001, "{rate:?}");
}
