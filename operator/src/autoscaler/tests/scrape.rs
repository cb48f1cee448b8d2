//! Real sockets on the loopback: pods that answer, are silent, lie or talk too much.
#![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]

use std::net::SocketAddr;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use prometheus::{HistogramOpts, Opts};
use tokio::net::TcpListener;

use super::*;

const LONG: Duration = Duration::from_secs(30);
const TEXT: &str =
    "vllm:num_requests_waiting 2\nvllm:num_requests_running 1\nvllm:kv_cache_usage_perc 0.5\n";

async fn pod(
    answer: impl Fn() -> (StatusCode, String) + Clone + Send + Sync + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().route("/metrics", get(move || async move { answer() }));
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

fn scraper() -> Arc<Scraper> {
    let metrics = ScrapeMetrics {
        scrapes: IntCounterVec::new(Opts::new("s", "s"), &["kind", "result"]).unwrap(),
        seconds: Histogram::with_opts(HistogramOpts::new("t", "t")).unwrap(),
    };
    Arc::new(Scraper::new(metrics, Trust::none()))
}

fn target(name: &str, address: SocketAddr) -> Target {
    Target::new(Kind::Pod, name, address, None)
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    tokio::time::timeout(LONG, async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("waited {LONG:?} until {what}"));
}

fn counted(scraper: &Scraper, result: &str) -> u64 {
    scraper
        .metrics
        .scrapes
        .with_label_values(&["pod", result])
        .get()
}

#[tokio::test]
async fn pods_are_asked_again_and_again_and_forgotten_when_gone() {
    let address = pod(|| (StatusCode::OK, TEXT.to_owned())).await;
    let scraper = scraper();
    let good = target("good", address);
    scraper.set_targets(vec![good.clone()]);
    let running = tokio::spawn(Arc::clone(&scraper).run());
    until("two scrapes", || counted(&scraper, "ok") >= 2).await;
    let (load, age) = scraper.pod(good.id).unwrap();
    assert_eq!((load.waiting, load.running, load.kv_cache), (2.0, 1.0, 0.5));
    assert!(age < LONG.as_secs_f64());
    // Its successor at the same address is another pod.
    let next = target("next", address);
    assert_ne!(next.id, good.id);
    scraper.set_targets(vec![next.clone()]);
    assert!(scraper.pod(good.id).is_none());
    until("the next one", || scraper.pod(next.id).is_some()).await;
    assert!(scraper.pod(good.id).is_none());
    running.abort();
}

#[tokio::test]
async fn silence_errors_and_nonsense_are_no_readings() {
    let failing = pod(|| (StatusCode::INTERNAL_SERVER_ERROR, TEXT.to_owned())).await;
    let nonsense = pod(|| (StatusCode::OK, "hello".to_owned())).await;
    let endless = pod(|| (StatusCode::OK, TEXT.repeat(MAX_BODY / TEXT.len() + 2))).await;
    // Accepts, and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let targets =
        [failing, nonsense, endless, silent.local_addr().unwrap()].map(|a| target("p", a));
    let scraper = scraper();
    scraper.set_targets(targets.to_vec());
    let running = tokio::spawn(Arc::clone(&scraper).run());
    until("each has had its turn", || {
        counted(&scraper, "failed") >= 3 && counted(&scraper, "unreadable") >= 1
    })
    .await;
    assert!(
        targets
            .iter()
            .all(|target| scraper.pod(target.id).is_none())
    );
    running.abort();
}
