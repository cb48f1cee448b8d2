//! A real Prometheus beside the cluster: it scrapes the pods by the chart's own jobs and evaluates the chart's own rules.
//!
//! Debian's Prometheus knows no Kubernetes, so this writes what it would have found there, under the names that it would
//! have given, to a file that Prometheus watches; the chart's relabelling rules do the rest.
//!
//! Rules are evaluated in time-lapse: each of their durations is a sixtieth of what it is in the chart, so that an alert for
//! ten minutes fires after ten seconds.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use serde_json::{Map, Value, json};
use tokio::task::JoinHandle;

use crate::Cluster;
use crate::client::Http;
use crate::service::SERVICE_LABEL;
use crate::wait::{self, Seen};

/// The chart's folder.
pub const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/ashlar");
/// How often pods are scraped and rules evaluated.
const INTERVAL: &str = "500ms";
/// How many times faster than in the chart time passes for rules.
const LAPSE: u64 = 60;
/// How often the list of pods is written anew.
const DISCOVERY: Duration = Duration::from_millis(500);

/// A running Prometheus; it ends with this.
#[derive(Debug)]
pub struct Prometheus {
    process: Child,
    discovery: JoinHandle<()>,
    without_models: Arc<AtomicBool>,
    folder: PathBuf,
    address: String,
    http: Http,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        self.discovery.abort();
        // A process that has ended already is as good.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// One series of an answer with its newest value.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Its labels.
    pub labels: Map<String, Value>,
    /// Its value.
    pub value: f64,
}

impl Prometheus {
    /// Starts Prometheus, from the folder of `ASHLAR_E2E_PROMETHEUS` or from `PATH`, on everything of Ashlar in the cluster.
    ///
    /// # Errors
    /// When there is no Prometheus, or it does not take the chart's jobs and rules.
    pub async fn start(cluster: &Cluster) -> Result<Self> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .context("the clock is before 1970")?;
        let folder = std::env::temp_dir().join(format!("ashlar-prometheus-{:x}", now.as_micros()));
        std::fs::create_dir_all(&folder)?;
        write_rules(&folder)?;
        let targets = folder.join("targets.json");
        write_configuration(&folder, &targets)?;
        let without_models = Arc::new(AtomicBool::new(false));
        write_targets(cluster, &targets, false).await?;
        let discovery = tokio::spawn({
            let (cluster, targets) = (cluster.clone(), targets.clone());
            let without_models = Arc::clone(&without_models);
            async move {
                loop {
                    tokio::time::sleep(DISCOVERY).await;
                    // An API server that is slow for once leaves the list as it is, as in Prometheus.
                    let without = without_models.load(Ordering::Relaxed);
                    let _ = write_targets(&cluster, &targets, without).await;
                }
            }
        });
        let port = std::net::TcpListener::bind("127.0.0.1:0")?
            .local_addr()?
            .port();
        let address = format!("127.0.0.1:{port}");
        let program = std::env::var_os("ASHLAR_E2E_PROMETHEUS").map_or_else(
            || "prometheus".into(),
            |at| Path::new(&at).join("prometheus"),
        );
        let log = std::fs::File::create(folder.join("log"))?;
        let process = Command::new(&program)
            .arg(format!("--config.file={}", folder.join("prometheus.yaml").display()))
            .arg(format!("--storage.tsdb.path={}", folder.join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .with_context(|| {
                format!("starting {}: run `make e2e`, or name the folder of prometheus in ASHLAR_E2E_PROMETHEUS", program.display())
            })?;
        let prometheus = Self {
            process,
            discovery,
            without_models,
            folder,
            address,
            http: Http::new(),
        };
        wait::until("Prometheus", wait::REACTION, async || {
            let answer = prometheus
                .http
                .get(&format!("http://{}/-/ready", prometheus.address))
                .await?;
            Ok(if answer.status.is_success() {
                Seen::Done(())
            } else {
                Seen::NotYet(answer.body)
            })
        })
        .await
        .with_context(|| {
            std::fs::read_to_string(prometheus.folder.join("log")).unwrap_or_default()
        })?;
        Ok(prometheus)
    }

    /// Stops or goes on scraping model pods, as when a label or a policy is wrong.
    pub fn leave_out_models(&self, out: bool) {
        self.without_models.store(out, Ordering::Relaxed);
    }

    async fn api(&self, path: &str) -> Result<Value> {
        let answer = self
            .http
            .get(&format!("http://{}/api/v1/{path}", self.address))
            .await?;
        let json = answer.json()?;
        ensure!(json["status"] == "success", "{path}: {json}");
        Ok(json["data"].clone())
    }

    /// The series that `expression` yields now.
    ///
    /// # Errors
    /// When Prometheus refuses the expression.
    pub async fn query(&self, expression: &str) -> Result<Vec<Sample>> {
        let data = self
            .api(&format!("query?query={}", encoded(expression)))
            .await?;
        if data["resultType"] == "scalar" {
            let value = number(&data["result"][1]).context("a scalar without a value")?;
            return Ok(vec![Sample {
                labels: Map::new(),
                value,
            }]);
        }
        let series = data["result"].as_array().cloned().unwrap_or_default();
        let sample = |one: &Value| {
            Some(Sample {
                labels: one["metric"].as_object()?.clone(),
                value: number(&one["value"][1])?,
            })
        };
        Ok(series.iter().filter_map(sample).collect())
    }

    /// The answer of `query_range` for the last `seconds`, one point a second, as Prometheus gives it.
    ///
    /// # Errors
    /// When Prometheus refuses the expression.
    pub async fn range(&self, expression: &str, seconds: u64) -> Result<Value> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .context("the clock is before 1970")?
            .as_secs();
        let query = encoded(expression);
        let path = format!(
            "query_range?query={query}&start={}&end={now}&step=1",
            now - seconds
        );
        self.api(&path).await
    }

    /// All rules with their state and the errors of their last evaluation.
    ///
    /// # Errors
    /// When Prometheus does not answer.
    pub async fn rules(&self) -> Result<Vec<Value>> {
        let data = self.api("rules").await?;
        let groups = data["groups"].as_array().cloned().unwrap_or_default();
        let rules = groups.iter().filter_map(|group| group["rules"].as_array());
        Ok(rules.flatten().cloned().collect())
    }

    /// Waits until the alert `name` fires, for `service` when it is given.
    ///
    /// # Errors
    /// When it does not within `limit`.
    pub async fn firing(&self, name: &str, service: Option<&str>, limit: Duration) -> Result<()> {
        let of = service.map_or_else(String::new, |service| format!(",name={service:?}"));
        let expression = format!("ALERTS{{alertname={name:?}{of}}}");
        wait::until(&format!("alert {name} to fire"), limit, async || {
            let found = self.query(&expression).await?;
            let fires = found
                .iter()
                .any(|sample| sample.labels.get("alertstate") == Some(&json!("firing")));
            Ok(if fires {
                Seen::Done(())
            } else {
                Seen::NotYet(format!("{found:?}"))
            })
        })
        .await
    }
}

fn number(value: &Value) -> Option<f64> {
    value.as_str()?.parse().ok()
}

/// As a query's value in a URL.
fn encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len() * 2);
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// Durations of rules, a sixtieth of what they were: `[5m]` becomes `[5s]`, `for: 1h` becomes `for: 60s`.
fn in_time_lapse(rules: &str) -> String {
    let mut out = String::new();
    let mut rest = rules;
    while let Some(at) = rest.find(['[', 'f']) {
        let open = if rest[at..].starts_with('[') {
            1
        } else if rest[at..].starts_with("for: ") {
            5
        } else {
            out.push_str(&rest[..=at]);
            rest = &rest[at + 1..];
            continue;
        };
        let (before, after) = rest.split_at(at + open);
        out.push_str(before);
        let digits = after.find(|c: char| !c.is_ascii_digit()).unwrap_or(0);
        let unit = after[digits..].chars().next().and_then(|unit| match unit {
            's' => Some(1),
            'm' => Some(60),
            'h' => Some(3600),
            'd' => Some(86400),
            _ => None,
        });
        rest = match (after[..digits].parse::<u64>(), unit) {
            (Ok(count), Some(unit)) => {
                out.push_str(&format!("{}s", (count * unit / LAPSE).max(1)));
                &after[digits + 1..]
            }
            _ => after,
        };
    }
    out.push_str(rest);
    out
}

fn write_rules(folder: &Path) -> Result<()> {
    let rules = Path::new(CHART).join("alerts");
    std::fs::create_dir(folder.join("rules"))?;
    for entry in
        std::fs::read_dir(&rules).with_context(|| format!("reading {}", rules.display()))?
    {
        let path = entry?.path();
        let name = path
            .file_name()
            .context("a rule file has a name: this is a bug")?;
        let text = in_time_lapse(&std::fs::read_to_string(&path)?);
        std::fs::write(folder.join("rules").join(name), text)?;
    }
    Ok(())
}

/// The chart's scrape jobs, with our file in place of Kubernetes' API.
fn write_configuration(folder: &Path, targets: &Path) -> Result<()> {
    let jobs = std::fs::read_to_string(Path::new(CHART).join("prometheus/scrape.yaml"))?;
    let mut configuration: Value = serde_yaml_ng::from_str(&jobs)?;
    let jobs = configuration["scrape_configs"].as_array_mut();
    for job in jobs.context("scrape.yaml has no scrape_configs")? {
        let job = job.as_object_mut().context("a job is no map")?;
        job.remove("kubernetes_sd_configs")
            .context("a job does not ask Kubernetes")?;
        job.insert(
            "file_sd_configs".into(),
            json!([{"files": [targets], "refresh_interval": "1s"}]),
        );
        job.insert("scrape_interval".into(), json!(INTERVAL));
        job.insert("scrape_timeout".into(), json!(INTERVAL));
    }
    configuration["global"] = json!({"evaluation_interval": INTERVAL});
    configuration["rule_files"] = json!([folder.join("rules/*.yaml")]);
    // JSON is YAML.
    std::fs::write(folder.join("prometheus.yaml"), configuration.to_string())?;
    Ok(())
}

async fn write_targets(cluster: &Cluster, file: &Path, without_models: bool) -> Result<()> {
    let pods: Api<Pod> = Api::all(cluster.client.clone());
    let mut groups = Vec::new();
    let selectors = ["app.kubernetes.io/name=ashlar", SERVICE_LABEL];
    for selector in &selectors[..if without_models { 1 } else { 2 }] {
        let listed = pods.list(&ListParams::default().labels(selector)).await?;
        groups.extend(listed.iter().flat_map(targets_of));
    }
    let next = file.with_extension("new");
    std::fs::write(&next, Value::Array(groups).to_string())?;
    std::fs::rename(next, file)?;
    Ok(())
}

/// What Prometheus' discovery says of a pod: one target for each port of its containers.
fn targets_of(pod: &Pod) -> Vec<Value> {
    let meta = &pod.metadata;
    let status = pod.status.as_ref();
    let Some(address) = status.and_then(|status| status.pod_ip.as_deref()) else {
        return Vec::new();
    };
    let text = |value: &Option<String>| Value::from(value.clone().unwrap_or_default());
    let mut labels = Map::from_iter([
        (
            "__meta_kubernetes_namespace".to_owned(),
            text(&meta.namespace),
        ),
        ("__meta_kubernetes_pod_name".to_owned(), text(&meta.name)),
        (
            "__meta_kubernetes_pod_phase".to_owned(),
            status.map_or(Value::Null, |status| text(&status.phase)),
        ),
    ]);
    for (key, value) in meta.labels.iter().flatten() {
        let key = key.replace(|c: char| !c.is_ascii_alphanumeric(), "_");
        labels.insert(format!("__meta_kubernetes_pod_label_{key}"), json!(value));
        labels.insert(
            format!("__meta_kubernetes_pod_labelpresent_{key}"),
            json!("true"),
        );
    }
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let ports = containers.flat_map(|container| container.ports.iter().flatten());
    ports
        .map(|port| {
            let mut labels = labels.clone();
            labels.insert(
                "__meta_kubernetes_pod_container_port_name".into(),
                text(&port.name),
            );
            json!({"targets": [format!("{address}:{}", port.container_port)], "labels": labels})
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_durations_pass_faster() {
        let rules = "record: a:burn5m\nexpr: rate(offers[5m]) > sum_over_time(x[3d])\nfor: 10m\nsummary: for 10m [x]";
        assert_eq!(
            in_time_lapse(rules),
            "record: a:burn5m\nexpr: rate(offers[5s]) > sum_over_time(x[4320s])\nfor: 10s\nsummary: for 10m [x]"
        );
    }

    #[test]
    fn queries_are_encoded() {
        assert_eq!(encoded("a{b=\"c\"}"), "a%7Bb%3D%22c%22%7D");
    }
}
