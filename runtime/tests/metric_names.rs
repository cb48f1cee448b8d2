//! vLLM's metrics, by name, type, labels and bucket edges, against a live `/metrics`: dashboards and autoscalers made for
//! vLLM ask for exactly these.
#![allow(clippy::unwrap_used, missing_docs)] // Tests fail by panicking.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

use serde_json::json;
use support::{Server, Setup};

#[path = "support/http_server.rs"]
mod support;

const LENGTHS: &str = "1,2,5,10,20,50,100,200";
const FIRST_TOKEN: &str =
    ".001,.005,.01,.02,.04,.06,.08,.1,.25,.5,.75,1,2.5,5,7.5,10,20,40,80,160,640,2560";
const TOKEN: &str = ".01,.025,.05,.075,.1,.15,.2,.3,.4,.5,.75,1,2.5,5,7.5,10,20,40,80";
const REQUEST: &str = ".3,.5,.8,1,1.5,2,2.5,5,10,15,20,30,40,50,60,120,240,480,960,1920,7680";

/// Name; what its series carry beside `model_name` and `engine`, as `label=value,value`.
const GAUGES: &[(&str, &str)] = &[
    ("num_requests_running", ""),
    ("num_requests_waiting", ""),
    ("num_requests_waiting_by_reason", "reason=capacity,deferred"),
    ("kv_cache_usage_perc", ""),
    (
        "engine_sleep_state",
        "sleep_state=awake,discard_all,weights_offloaded",
    ),
];

/// Without `_total`.
const COUNTERS: &[(&str, &str)] = &[
    ("prefix_cache_queries", ""),
    ("prefix_cache_hits", ""),
    ("external_prefix_cache_queries", ""),
    ("external_prefix_cache_hits", ""),
    ("mm_cache_queries", ""),
    ("mm_cache_hits", ""),
    ("num_preemptions", ""),
    ("prompt_tokens", ""),
    ("prompt_tokens_cached", ""),
    (
        "prompt_tokens_by_source",
        "source=external_kv_transfer,local_cache_hit,local_compute",
    ),
    (
        "prompt_tokens_cached_by_source",
        "source=device,disk,external_unspecified,host,p2p",
    ),
    ("generation_tokens", ""),
    (
        "request_success",
        "finished_reason=abort,error,length,repetition,stop",
    ),
    ("corrupted_requests", ""),
    ("spec_decode_num_drafts", ""),
    ("spec_decode_num_draft_tokens", ""),
    ("spec_decode_num_accepted_tokens", ""),
    ("spec_decode_num_accepted_tokens_per_pos", "position=0"),
    ("estimated_flops_per_gpu", ""),
    ("estimated_read_bytes_per_gpu", ""),
    ("estimated_write_bytes_per_gpu", ""),
];

const HISTOGRAMS: &[(&str, &str)] = &[
    ("request_prompt_tokens", LENGTHS),
    ("request_generation_tokens", LENGTHS),
    ("request_max_num_generation_tokens", LENGTHS),
    ("request_params_max_tokens", LENGTHS),
    ("request_prefill_kv_computed_tokens", LENGTHS),
    (
        "iteration_tokens_total",
        "1,8,16,32,64,128,256,512,1024,2048,4096,8192,16384",
    ),
    ("request_params_n", "1,2,5,10,20"),
    ("request_num_preemptions", "1,2,3,4,5,10,20"),
    ("time_to_first_token_seconds", FIRST_TOKEN),
    ("inter_token_latency_seconds", TOKEN),
    ("request_time_per_output_token_seconds", TOKEN),
    ("e2e_request_latency_seconds", REQUEST),
    ("request_queue_time_seconds", REQUEST),
    ("request_inference_time_seconds", REQUEST),
    ("request_prefill_time_seconds", REQUEST),
    ("request_decode_time_seconds", REQUEST),
];

/// Name, type, labels, edges.
const OTHERS: &[(&str, &str, &[&str], &str)] = &[
    (
        "http_requests_total",
        "counter",
        &["handler", "method", "status"],
        "",
    ),
    (
        "http_request_duration_seconds",
        "histogram",
        &["handler", "method"],
        ".1,.5,1",
    ),
    (
        "http_request_duration_highr_seconds",
        "histogram",
        &[],
        ".01,.025,.05,.075,.1,.25,.5,.75,1,1.5,2,2.5,3,3.5,4,4.5,5,7.5,10,30,60",
    ),
    ("process_resident_memory_bytes", "gauge", &[], ""),
    ("process_cpu_seconds_total", "counter", &[], ""),
    ("process_open_fds", "gauge", &[], ""),
    ("process_start_time_seconds", "gauge", &[], ""),
];

/// One metric as it is shown.
#[derive(Debug, Default)]
struct Family {
    kind: String,
    /// Of every series, `le` apart.
    labels: BTreeSet<BTreeMap<String, String>>,
    edges: BTreeSet<String>,
}

fn labels(text: &str) -> BTreeMap<String, String> {
    let pairs = text.split("\",").filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let (name, value) = pair.split_once("=\"").unwrap();
            (name.to_owned(), value.trim_end_matches('"').to_owned())
        })
        .collect()
}

fn parse(text: &str) -> BTreeMap<String, Family> {
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let mut current = String::new();
    for line in text.lines() {
        if let Some(declared) = line.strip_prefix("# TYPE ") {
            let (name, kind) = declared.split_once(' ').unwrap();
            current = name.to_owned();
            let before = families.insert(
                current.clone(),
                Family {
                    kind: kind.to_owned(),
                    ..Family::default()
                },
            );
            assert!(before.is_none(), "{name} is shown twice");
        } else if !line.starts_with('#') {
            let (series, value) = line.rsplit_once(' ').unwrap();
            value.parse::<f64>().unwrap();
            assert!(series.starts_with(&current), "{line}");
            let (_, inner) = series.split_once('{').unwrap_or((series, "}"));
            let mut labels = labels(inner.trim_end_matches('}'));
            let family = families.get_mut(&current).unwrap();
            if let Some(edge) = labels.remove("le")
                && edge != "+Inf"
            {
                family.edges.insert(edge);
            }
            family.labels.insert(labels);
        }
    }
    families
}

fn sorted(edges: &str) -> BTreeSet<String> {
    let numbers = edges.split(',').filter(|edge| !edge.is_empty());
    numbers
        .map(|edge| edge.parse::<f64>().unwrap().to_string())
        .collect()
}

/// The label sets of a metric whose own labels are described as in [`GAUGES`].
fn expected_labels(own: &str) -> BTreeSet<BTreeMap<String, String>> {
    let base = || {
        BTreeMap::from([
            ("engine".to_owned(), "0".to_owned()),
            ("model_name".to_owned(), "tiny".to_owned()),
        ])
    };
    let Some((name, values)) = own.split_once('=') else {
        return BTreeSet::from([base()]);
    };
    let with = |value: &str| {
        let mut labels = base();
        labels.insert(name.to_owned(), value.to_owned());
        labels
    };
    values.split(',').map(with).collect()
}

async fn load(server: &Server) {
    for body in [
        json!({"prompt": "a", "max_tokens": 3, "n": 2}),
        json!({"prompt": "a", "max_tokens": 3, "temperature": -1}),
        json!({"prompt": "a b c d e f g h i j k l m n o", "max_tokens": 2, "stream": true}),
    ] {
        server.post("/v1/completions", &body).await;
    }
    server.post("/v1/embeddings", &json!({"input": "a"})).await;
    server.get("/nowhere").await;
    server.get("/health").await;
}

#[tokio::test]
async fn every_name_label_and_edge_is_vllm_s() {
    let server = Setup::default().start().await;
    load(&server).await;
    let mut shown = parse(&server.get("/metrics").await.body);
    let mut problems = String::new();
    let mut check = |name: &str, kind: &str, own: &str, edges: &str| {
        let Some(family) = shown.remove(name) else {
            writeln!(problems, "{name} is missing").unwrap();
            return;
        };
        if family.kind != kind {
            writeln!(problems, "{name} is a {}, not a {kind}", family.kind).unwrap();
        }
        if family.labels != expected_labels(own) {
            writeln!(problems, "{name} has the labels {:?}", family.labels).unwrap();
        }
        if family.edges != sorted(edges) {
            writeln!(problems, "{name} has the edges {:?}", family.edges).unwrap();
        }
    };
    for (name, own) in GAUGES {
        check(&format!("vllm:{name}"), "gauge", own, "");
    }
    for (name, own) in COUNTERS {
        check(&format!("vllm:{name}_total"), "counter", own, "");
    }
    for (name, edges) in HISTOGRAMS {
        check(&format!("vllm:{name}"), "histogram", "", edges);
    }
    assert!(problems.is_empty(), "{problems}");

    let names = |family: &Family| -> BTreeSet<String> {
        family
            .labels
            .iter()
            .flat_map(|l| l.keys().cloned())
            .collect()
    };
    for (name, kind, label_names, edges) in OTHERS {
        let family = shown.remove(*name).unwrap_or_else(|| panic!("{name}"));
        assert_eq!(&family.kind, kind, "{name}");
        let expected = label_names.iter().map(|n| (*n).to_owned()).collect();
        assert_eq!(names(&family), expected, "{name}");
        assert_eq!(family.edges, sorted(edges), "{name}");
    }
    let adapters = shown.remove("vllm:lora_requests_info").unwrap();
    let expected = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"];
    assert_eq!(names(&adapters), expected.map(str::to_owned).into());
    let cache = names(&shown.remove("vllm:cache_config_info").unwrap());
    assert!(cache.contains("block_size") && cache.contains("num_gpu_blocks"));
    assert!(cache.contains("engine") && !cache.contains("model_name"));
    // Whoever adds one adds it to the table.
    let rest: Vec<&String> = shown
        .keys()
        .filter(|name| name.starts_with("vllm:"))
        .collect();
    assert!(rest.is_empty(), "not in the table: {rest:?}");
}

#[tokio::test]
async fn former_names_show_the_same_on_demand() {
    let of = |text: &str, name: &str| -> Vec<String> {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let series = lines.filter_map(|line| line.strip_prefix("vllm:"));
        let rest = series.filter_map(|line| line.strip_prefix(name));
        let whole = rest.filter(|rest| rest.starts_with(['{', '_']));
        whole.map(str::to_owned).collect()
    };
    let pairs = [
        ("gpu_cache_usage_perc", "kv_cache_usage_perc"),
        ("gpu_prefix_cache_queries", "prefix_cache_queries"),
        ("gpu_prefix_cache_hits", "prefix_cache_hits"),
        (
            "time_per_output_token_seconds",
            "inter_token_latency_seconds",
        ),
    ];
    let setup = Setup {
        former_metric_names: true,
        ..Setup::default()
    };
    let server = setup.start().await;
    load(&server).await;
    let text = server.get("/metrics").await.body;
    parse(&text);
    for (former, now) in pairs {
        assert!(!of(&text, now).is_empty(), "{now}");
        assert_eq!(of(&text, former), of(&text, now), "{former}");
    }
    for gone in ["num_requests_swapped", "cpu_cache_usage_perc"] {
        assert_eq!(
            of(&text, gone),
            ["{engine=\"0\",model_name=\"tiny\"} 0"],
            "{gone}"
        );
    }
    let one = server
        .get("/metrics?name[]=vllm:gpu_cache_usage_perc")
        .await
        .body;
    assert_eq!(parse(&one).len(), 1);

    let plain = Setup::default().start().await;
    let text = plain.get("/metrics").await.body;
    assert!(!text.contains("gpu_cache_usage_perc"));
}
