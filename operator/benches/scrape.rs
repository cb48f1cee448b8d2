//! What watching a large fleet costs the leader: 2,000 pods of 200 services asked each second, decided on at [`PERIOD`].
//! `make scrape-bench`; ends with an error when it takes more than half a core, when decisions come more than 200 ms off
//! their time, or when scrapes fail. `PODS` and `SECONDS` (2000, 30) change it.
#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ashlar_crds::InferenceService;
use ashlar_crds::names::{RUNTIME_PORT, SERVICE_LABEL};
use ashlar_operator::autoscaler::{Autoscaler, PERIOD, ReadyPod, World};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, from_value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

const PODS_OF_A_SERVICE: usize = 10;
/// One address of the loopback for each pod: all of them reach the one stub.
fn address(pod: usize) -> Ipv4Addr {
    let [_, a, b, c] = (pod as u32 + 1).to_be_bytes();
    Ipv4Addr::new(127, a + 1, b, c)
}

/// A pod's answer: the series that are asked for, a histogram among them.
fn metrics() -> String {
    let mut text = String::from(
        "vllm:num_requests_waiting{engine=\"0\",model_name=\"m\"} 0\nvllm:num_requests_running{engine=\"0\",model_name=\"m\"} 7\nvllm:kv_cache_usage_perc{engine=\"0\",model_name=\"m\"} 0.41\nvllm:generation_tokens_total{engine=\"0\",model_name=\"m\"} 123456\nashlar:waiting_tokens{engine=\"0\",model_name=\"m\"} 0\nashlar:prefill_tokens_per_second{engine=\"0\",model_name=\"m\"} 4100.5\n",
    );
    for reason in ["stop", "length", "abort", "error", "repetition"] {
        text += &format!(
            "vllm:request_success_total{{engine=\"0\",finished_reason=\"{reason}\",model_name=\"m\"}} 40\n"
        );
    }
    for edge in [
        "1", "2", "5", "10", "20", "50", "100", "200", "500", "1000", "2000", "5000", "+Inf",
    ] {
        text += &format!(
            "vllm:request_generation_tokens_bucket{{engine=\"0\",model_name=\"m\",le=\"{edge}\"}} 200\n"
        );
    }
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n\r\n{text}",
        text.len()
    )
}

async fn stub() -> Result<()> {
    let port = u16::try_from(RUNTIME_PORT)?;
    let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))).await?;
    let answer: Arc<[u8]> = metrics().into_bytes().into();
    loop {
        let (stream, _) = listener.accept().await?;
        let answer = Arc::clone(&answer);
        tokio::spawn(async move {
            let _ = serve(stream, &answer).await; // the other side left
        });
    }
}

async fn serve(mut stream: TcpStream, answer: &[u8]) -> std::io::Result<()> {
    let mut buffer = Vec::with_capacity(1024);
    while stream.read_buf(&mut buffer).await? > 0 {
        if buffer.ends_with(b"\r\n\r\n") {
            buffer.clear();
            stream.write_all(answer).await?;
        }
    }
    Ok(())
}

fn service(number: usize) -> Result<Arc<InferenceService>> {
    let spec: Value = json!({
        "model": {"uri": "oci://a/b"},
        "endpoint": {"auth": "None"},
        "scaling": {"maxReplicas": 100, "minReplicas": PODS_OF_A_SERVICE},
    });
    let mut service = InferenceService::new(&format!("s{number}"), from_value(spec)?);
    service.metadata.namespace = Some("bench".to_owned());
    service.metadata.uid = Some(format!("s{number}"));
    Ok(Arc::new(service))
}

fn pod(number: usize) -> Result<Arc<ReadyPod>> {
    let pod: Pod = from_value(json!({
        "metadata": {
            "name": format!("p{number}"), "namespace": "bench", "uid": format!("p{number}"),
            "labels": {SERVICE_LABEL: format!("s{}", number / PODS_OF_A_SERVICE)},
        },
        "status": {
            "podIP": address(number).to_string(),
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }))?;
    ReadyPod::of(&pod).map(Arc::new).context("a ready pod")
}

/// Seconds of processor time that this process has used.
fn processor_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let after = stat.rsplit(')').next().context("no stat")?;
    let ticks: Vec<f64> = after
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|t| t.parse().ok())
        .collect();
    Ok(ticks.iter().sum::<f64>() / 100.0) // Linux counts in hundredths, whatever the kernel's own tick
}

/// Memory that this process has, in bytes.
fn memory() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    Ok(kib.context("no VmRSS")?.parse::<f64>()? * 1024.0)
}

fn number(name: &str, default: usize) -> Result<usize> {
    std::env::var(name).map_or(Ok(default), |text| {
        text.parse().with_context(|| format!("{name}={text}"))
    })
}

async fn measure() -> Result<()> {
    let (pods, seconds) = (number("PODS", 2000)?, number("SECONDS", 30)?);
    let me = std::env::current_exe()?;
    let mut stub = Command::new(me).arg("stub").stdin(Stdio::null()).spawn()?;
    let services: Vec<_> = (0..pods.div_ceil(PODS_OF_A_SERVICE))
        .map(service)
        .collect::<Result<_>>()?;
    let pods_seen: Vec<_> = (0..pods).map(pod).collect::<Result<_>>()?;
    let registry = prometheus::Registry::new();
    let autoscaler = Autoscaler::new(&registry, 8081, ashlar_operator::model_tls::Trust::none())?;
    let looks: Mutex<Vec<Instant>> = Mutex::default();
    let look = || {
        if let Ok(mut looks) = looks.lock() {
            looks.push(Instant::now());
        }
        World {
            services: services.clone(),
            pods: pods_seen.clone(),
            gateway_slices: Vec::new(),
        }
    };
    let (changed, mut changes) = mpsc::channel(1024);
    let drain = async { while changes.recv().await.is_some() {} };
    let measured = async {
        tokio::time::sleep(Duration::from_secs(5)).await; // connections are made
        let (began, before) = (Instant::now(), processor_seconds()?);
        tokio::time::sleep(Duration::from_secs(seconds as u64)).await;
        let used = (processor_seconds()? - before) / began.elapsed().as_secs_f64();
        Ok::<_, anyhow::Error>((began, used))
    };
    let outcome = tokio::select! {
        () = autoscaler.run(look, changed) => anyhow::bail!("the autoscaler ended"),
        () = drain => anyhow::bail!("nobody sends changes any more"),
        measured = measured => measured,
    };
    stub.kill()?;
    stub.wait()?;
    let (began, used) = outcome?;
    let mut scrapes = [0.0; 2];
    for family in registry.gather() {
        if family.name() == "ashlar_autoscaler_scrapes_total" {
            for metric in family.get_metric() {
                let good = metric.get_label().iter().any(|label| label.value() == "ok");
                scrapes[usize::from(good)] += metric.get_counter().get_value();
            }
        }
    }
    let looks = looks.into_inner().unwrap_or_default();
    let gaps = looks.windows(2).filter(|pair| pair[0] >= began);
    let off = gaps.map(|pair| ((pair[1] - pair[0]).as_secs_f64() - PERIOD.as_secs_f64()).abs());
    let jitter = off.fold(0.0_f64, f64::max);
    let [failed, good] = scrapes;
    let rate = good / (seconds as f64 + 5.0);
    println!(
        "{pods} pods: {rate:.0} scrapes a second, {failed} failed in all; {:.1} % of a core (bar: ≤ 50); decisions at most {:.0} ms off (bar: ≤ 200); {:.1} MB of memory",
        used * 100.0,
        jitter * 1e3,
        memory()? / 1e6
    );
    ensure!(used <= 0.5, "more than half a core");
    ensure!(jitter <= 0.2, "decisions are late");
    ensure!(
        failed <= good * 0.001 && rate >= pods as f64 * 0.8,
        "scrapes failed or were left out"
    );
    Ok(())
}

#[tokio::main]
async fn main() -> Result<()> {
    if std::env::args().any(|argument| argument == "stub") {
        stub().await
    } else {
        measure().await
    }
}
