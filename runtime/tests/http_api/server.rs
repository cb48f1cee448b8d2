//! Clients that leave, queues, failures, shutdown, health and metrics.

use std::time::Duration;

use ashlar::shutdown::Phase;
use serde_json::json;
use tokio::io::AsyncReadExt;

use crate::{completion, support::Setup};

#[tokio::test]
async fn request_ids_are_kept_or_made() {
    let server = Setup::default().start().await;
    let reply = server
        .send("GET", "/version", &["x-request-id: mine-1"], "")
        .await;
    assert_eq!(reply.headers["x-request-id"], "mine-1");
    let long = format!("x-request-id: {}", "x".repeat(200));
    let reply = server.send("GET", "/version", &[&long], "").await;
    assert_eq!(reply.headers["x-request-id"].len(), 32);
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_place() {
    let server = Setup::saying("hello")
        .step(Duration::from_millis(5))
        .start()
        .await;
    for body in [
        completion(json!({"stream": true, "max_tokens": 250})),
        completion(json!({"n": 4, "max_tokens": 250})),
    ] {
        let stream = server
            .open("POST", "/v1/completions", &[], &body.to_string())
            .await;
        server.until("it runs", |stats| stats.running > 0).await;
        drop(stream);
        server
            .until("it is aborted", |stats| {
                stats.running == 0 && stats.waiting == 0 && stats.blocks_free == stats.blocks_total
            })
            .await;
    }
    let metrics = server.get("/metrics").await.body;
    assert!(metrics.contains("finished_reason=\"abort\",model_name=\"tiny\"} 5")
        || metrics.contains("vllm:request_success_total{engine=\"0\",finished_reason=\"abort\",model_name=\"tiny\"} 5"), "{metrics}");
}

#[tokio::test]
async fn a_full_queue_is_answered_429() {
    let mut setup = Setup::saying("hello").step(Duration::from_millis(20));
    setup.engine.max_num_seqs = 1;
    setup.engine.max_num_queued_reqs = 1;
    let server = setup.start().await;
    let body = completion(json!({"max_tokens": 250})).to_string();
    let first = server.open("POST", "/v1/completions", &[], &body).await;
    server.until("one runs", |stats| stats.running == 1).await;
    let second = server.open("POST", "/v1/completions", &[], &body).await;
    server.until("one waits", |stats| stats.waiting == 1).await;
    let reply = server.post("/v1/completions", &completion(json!({}))).await;
    reply.error(429, None);
    assert!(reply.headers["retry-after"].parse::<u32>().unwrap() >= 1);
    drop((first, second));
}

#[tokio::test]
async fn a_failed_step_is_an_error_for_its_requests_alone() {
    let mut setup = Setup::saying("hello");
    setup.fake.faults.nan_token = Some(u32::from(b'!'));
    let server = setup.start().await;
    let bad = completion(json!({"prompt": "!"}));
    server.post("/v1/completions", &bad).await.error(500, None);
    let mut bad = bad;
    bad["stream"] = json!(true);
    let frames = server.post("/v1/completions", &bad).await.frames();
    assert_eq!(frames.last().unwrap()["error"]["code"], 500);
    assert_eq!(
        server
            .post("/v1/completions", &completion(json!({})))
            .await
            .status,
        200
    );
    assert_eq!(server.get("/health").await.status, 200);
}

#[tokio::test]
async fn health_fails_when_the_engine_is_stuck_or_gone() {
    let mut setup = Setup::saying("hello").step(Duration::from_secs(6));
    // Without work it gives a sign of life four times a second.
    setup.api.stall_limit = Duration::from_secs(1);
    let server = setup.start().await;
    assert_eq!(server.get("/health").await.status, 200);
    let request = server
        .open(
            "POST",
            "/v1/completions",
            &[],
            &completion(json!({})).to_string(),
        )
        .await;
    server
        .until("it is stuck", |stats| {
            stats.silent_for > Duration::from_secs(2)
        })
        .await;
    server.get("/health").await.error(503, None);
    server.get("/health/live").await.error(503, None);
    drop(request);

    let mut setup = Setup::default();
    setup.fake.faults.panic_token = Some(u32::from(b'!'));
    let server = setup.start().await;
    server
        .post("/v1/completions", &completion(json!({"prompt": "!"})))
        .await
        .error(500, None);
    server.until("it is gone", |stats| !stats.alive).await;
    server.get("/health").await.error(503, None);
    server.get("/health/live").await.error(503, None);
    server
        .post("/v1/completions", &completion(json!({})))
        .await
        .error(503, None);
}

#[tokio::test]
async fn a_leaving_server_serves_then_refuses_and_finishes_what_runs() {
    let server = Setup::saying("hello")
        .step(Duration::from_millis(5))
        .start()
        .await;
    let body = completion(json!({"max_tokens": 60, "stream": true})).to_string();
    let mut running = server.open("POST", "/v1/completions", &[], &body).await;
    server
        .until("it runs", |stats| stats.generation_tokens > 0)
        .await;

    server.lifecycle.enter(Phase::Leaving);
    let reply = server.get("/health").await;
    reply.error(503, None);
    assert_eq!(reply.headers["x-ashlar-draining"], "1");
    assert_eq!(
        server
            .post("/v1/completions", &completion(json!({})))
            .await
            .status,
        200
    );

    server.lifecycle.enter(Phase::Refusing);
    server
        .engine
        .drain(std::time::Instant::now() + Duration::from_secs(20));
    let reply = server.post("/v1/completions", &completion(json!({}))).await;
    reply.error(503, None);
    assert_eq!(reply.headers["x-ashlar-draining"], "1");

    let mut bytes = Vec::new();
    running.read_to_end(&mut bytes).await.unwrap();
    let text = String::from_utf8(bytes).unwrap();
    assert!(
        text.contains("\"finish_reason\":\"length\"") && text.contains("data: [DONE]"),
        "{text}"
    );
    server.engine.join().await.unwrap();
    tokio::time::timeout(Duration::from_secs(20), server.connections.all_ended())
        .await
        .unwrap();
}

#[tokio::test]
async fn metrics_have_vllm_s_names_and_move() {
    let server = Setup::default().start().await;
    let prompt = "x".repeat(64);
    for _ in 0..2 {
        let reply = server
            .post("/v1/completions", &completion(json!({"prompt": prompt})))
            .await;
        assert_eq!(reply.status, 200);
    }
    let text = server.get("/metrics").await.body;
    let label = "{engine=\"0\",model_name=\"tiny\"}";
    for (name, value) in [
        ("vllm:num_requests_running", 0),
        ("vllm:num_requests_waiting", 0),
        ("vllm:prompt_tokens_total", 128),
        ("vllm:generation_tokens_total", 10),
        ("vllm:num_preemptions_total", 0),
        ("vllm:prefix_cache_queries_total", 128),
        ("vllm:prefix_cache_hits_total", 48),
        ("vllm:time_to_first_token_seconds_count", 2),
        ("vllm:inter_token_latency_seconds_count", 8),
        ("vllm:request_prompt_tokens_sum", 128),
        ("vllm:e2e_request_latency_seconds_count", 2),
        ("vllm:request_params_n_count", 2),
    ] {
        let line = format!("{name}{label} {value}\n");
        assert!(text.contains(&line), "{line}{text}");
    }
    for name in [
        "vllm:kv_cache_usage_perc",
        "vllm:cache_config_info",
        "vllm:engine_sleep_state",
        "vllm:num_requests_waiting_by_reason",
        "vllm:request_success_total",
        "vllm:iteration_tokens_total_bucket",
        "vllm:request_queue_time_seconds_bucket",
        "vllm:request_time_per_output_token_seconds_bucket",
        "http_requests_total",
        "http_request_duration_highr_seconds_bucket",
        "process_resident_memory_bytes",
    ] {
        assert!(text.contains(name), "{name}");
    }
    assert!(text.contains(
        "http_requests_total{handler=\"/v1/completions\",method=\"POST\",status=\"2xx\"} 2"
    ));
    assert!(!text.contains("handler=\"/metrics\""));
    let some = server
        .get("/metrics?name[]=vllm:num_requests_waiting&name%5B%5D=vllm%3Akv_cache_usage_perc")
        .await
        .body;
    let families: Vec<&str> = some
        .lines()
        .filter(|line| line.starts_with("# TYPE"))
        .collect();
    assert_eq!(families.len(), 2, "{some}");
}
