//! The bars that the autoscaler is held to, on the modelled fleet.
#![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]

use super::*;

fn ours(trace: &Trace) -> Run {
    play(trace, &trace.arrivals(), &mut Ours::default())
}

fn named(name: &str) -> Trace {
    Trace::load(name).unwrap()
}

#[test]
fn constant_load_with_noise_does_not_reverse() {
    let mut ratios = Vec::new();
    for seed in 1..=10 {
        let trace = Trace {
            seed,
            ..named("noise")
        };
        let run = ours(&trace);
        assert_eq!(run.reversals(), 0, "seed {seed}");
        let oracle = f64::from(oracle(&trace, &trace.arrivals()));
        ratios.push(run.mean_wanted() / oracle);
    }
    let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
    assert!(mean <= 1.15, "{mean} {ratios:?}");
}

#[test]
fn a_flash_crowd_of_ten_times_gets_enough_at_once_and_little_more() {
    let (mut late, mut over) = (Vec::new(), Vec::new());
    for seed in 1..=10 {
        let trace = Trace {
            seed,
            ..named("flash-crowd")
        };
        let crowd = Trace {
            rate: vec![(0.0, trace.rate_at(1000.0))],
            seconds: 1500.0,
            ..trace.clone()
        };
        let enough = oracle(&crowd, &crowd.arrivals());
        let run = ours(&trace);
        let at = run.wanted.iter().position(|wanted| *wanted >= enough);
        // The crowd comes at 900 s; a replica is ready its own start after it is wanted.
        late.push(at.unwrap_or(usize::MAX).saturating_sub(900));
        let most = *run.wanted.iter().max().unwrap();
        over.push(f64::from(most) / f64::from(enough) - 1.0);
    }
    assert!(late.iter().all(|seconds| *seconds <= 5), "{late:?}");
    assert!(over.iter().all(|share| *share <= 0.3), "{over:?}");
    // Mostly far better than the worst: enough after a second or two, a fifth too many.
    let mean = |sum: f64| sum / 10.0;
    assert!(mean(late.iter().sum::<usize>() as f64) <= 2.5, "{late:?}");
    assert!(mean(over.iter().sum()) <= 0.22, "{over:?}");
}

#[test]
fn a_step_is_answered_within_three_seconds() {
    let mut late = 0;
    for seed in 0..40 {
        let trace = Trace {
            seed,
            seconds: 700.0,
            ..named("step")
        };
        let run = ours(&trace);
        let before = run.wanted[598];
        let answered = run.wanted[599..].iter().position(|wanted| *wanted > before);
        // The step is at 600 s; the figure of second 599 is from its end.
        late += usize::from(answered.is_none_or(|seconds| seconds > 3));
    }
    assert!(late <= 2, "{late} of 40 took longer than 3 s");
}

#[test]
fn at_equal_replica_hours_no_rival_at_its_best_serves_more() {
    let mut above = Vec::new();
    for name in NAMES {
        let played = compare(&named(name), SEEDS);
        let our = played.total.attainment();
        let mut best = 0.0_f64;
        for rival in &played.rivals {
            let (their, rival) = (rival.attainment, rival);
            assert!(
                rival.settings >= 20,
                "{} has {}",
                rival.rival,
                rival.settings
            );
            assert!(
                our >= their,
                "{name}: {our} against {} {their} ({})",
                rival.rival,
                rival.setting
            );
            best = best.max(their);
        }
        if our > best {
            above.push(name);
        }
    }
    assert!(above.len() >= 5, "{above:?}");
}

#[test]
fn the_best_at_equal_hours_lies_on_the_hull() {
    let points = [(1.0, 0.5), (3.0, 0.9), (4.0, 0.91), (2.0, 0.6)];
    assert!((at_equal_hours(&points, 2.0) - 0.7).abs() < 1e-9);
    assert!((at_equal_hours(&points, 0.5) - 0.25).abs() < 1e-9);
    assert!((at_equal_hours(&points, 9.0) - 0.91).abs() < 1e-9);
}

#[test]
fn the_same_trace_gives_the_same_run() {
    let trace = named("scrape-loss");
    let (a, b) = (ours(&trace), ours(&trace));
    assert_eq!((a.wanted, a.served_well), (b.wanted, b.served_well));
}

#[test]
fn a_dead_replica_is_replaced_and_its_requests_count_as_lost() {
    let calm = Trace {
        deaths: Vec::new(),
        ..named("replica-death")
    };
    let (with, without) = (ours(&named("replica-death")), ours(&calm));
    assert!(with.served_well < without.served_well);
    assert!(with.attainment() > 0.99);
}

#[test]
fn the_model_keeps_its_books() {
    // A load far below capacity: every request ends, the cache empties, and the rate is what the curve says.
    let trace = Trace {
        rate: vec![(0.0, 2.0), (600.0, 2.0), (601.0, 0.0)],
        seconds: 900.0,
        ..Trace::default()
    };
    struct Last(Vec<f64>, f64);
    impl fleet::Scaler for Last {
        fn wanted(&mut self, view: &fleet::View<'_>) -> i32 {
            let loads = view.ready.iter().filter_map(|(_, reading)| *reading);
            self.0 = loads.map(|reading| reading.load.kv_cache).collect();
            self.1 = view.gateway.in_flight;
            2
        }
    }
    let mut last = Last(Vec::new(), 0.0);
    let run = play(&trace, &trace.arrivals(), &mut last);
    assert!(last.0.iter().all(|kv| *kv < 1e-6), "{:?}", last.0);
    assert!(last.1.abs() < 1e-9);
    assert_eq!(run.served_well, run.requests);
}

#[test]
fn traces_are_read_and_checked() {
    let folder = std::env::temp_dir().join(format!("ashlar-traces-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("t.yaml");
    let load = |text: &str| {
        std::fs::write(&file, text).unwrap();
        Trace::load(file.to_str().unwrap())
    };
    for name in NAMES {
        let trace = named(name);
        trace.check().unwrap();
        assert_eq!(
            load(&serde_yaml_ng::to_string(&trace).unwrap()).unwrap(),
            trace
        );
    }
    assert!(load("name: mine\nrate: [[0, 1.5]]\n").is_ok());
    for (bad, words) in [
        ("rate: []\n", "rate needs"),
        ("rate: [[0, -1]]\n", "none negative"),
        ("rate: [[5, 1], [5, 2]]\n", "must rise"),
        ("rate: [[0, 1e9]]\n", "5 million"),
        ("kinds: []\n", "kinds needs"),
        ("sloSeconds: 0\n", "above 0"),
        ("noise: 1.5\n", "noise"),
        ("speed: 3\n", "unknown field"),
    ] {
        let error = load(bad).unwrap_err().to_string();
        assert!(error.contains(words), "{bad} {error}");
    }
    let missing = Trace::load("nowhere.yaml").unwrap_err().to_string();
    assert!(missing.contains("flash-crowd"), "{missing}");
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_picture_has_a_line_for_each_scaler() {
    let trace = Trace {
        name: "a<b".into(),
        seconds: 400.0,
        ..named("step")
    };
    let picture = report::svg(&compare(&trace, 1));
    assert!(picture.starts_with("<svg ") && picture.trim_end().ends_with("</svg>"));
    // Load: 2; replicas: ready, wanted and three rivals; waiting: four.
    assert_eq!(picture.matches("<polyline ").count(), 11);
    assert!(picture.contains("a&lt;b") && !picture.contains("a<b"));
    assert!(!picture.contains("NaN"));
}
