//! What pods and gateways say of their load: read from Prometheus text, and never taken for zero when missing. Pure.
//!
//! Names are vLLM's, so a pod with a vLLM image is read like one of ours; names of older vLLM versions are known too.

use std::collections::HashMap;

/// Age in seconds below which a reading counts as new.
pub const FRESH_SECONDS: f64 = 3.0;
/// Age in seconds past which a reading counts for nothing.
pub const STALE_SECONDS: f64 = 15.0;

const WAITING: &str = "vllm:num_requests_waiting";
const RUNNING: &str = "vllm:num_requests_running";
const KV_USAGE: &str = "vllm:kv_cache_usage_perc";
/// Its name before vLLM 0.10.
const KV_USAGE_OLD: &str = "vllm:gpu_cache_usage_perc";
const GENERATED: &str = "vllm:generation_tokens_total";
const FINISHED: &str = "vllm:request_success_total";
const WAITING_TOKENS: &str = "ashlar:waiting_tokens";
const PREFILL_RATE: &str = "ashlar:prefill_tokens_per_second";
const LENGTHS: &str = "vllm:request_generation_tokens_bucket";

const HELD: &str = "ashlar_gateway_held_requests";
const IN_FLIGHT: &str = "ashlar_gateway_in_flight_requests";
const ENDED: &str = "ashlar_gateway_requests_total";

/// Query that asks a runtime pod for these series only.
pub const POD_QUERY: &str = "/metrics?name[]=vllm:num_requests_waiting&name[]=vllm:num_requests_running&name[]=vllm:kv_cache_usage_perc&name[]=vllm:gpu_cache_usage_perc&name[]=vllm:generation_tokens_total&name[]=vllm:request_success_total&name[]=vllm:request_generation_tokens&name[]=ashlar:waiting_tokens&name[]=ashlar:prefill_tokens_per_second";
/// The same of a gateway.
pub const GATEWAY_QUERY: &str = "/metrics?name[]=ashlar_gateway_held_requests&name[]=ashlar_gateway_in_flight_requests&name[]=ashlar_gateway_requests_total";

/// Load of one runtime pod at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct PodLoad {
    /// Requests without a place.
    pub waiting: f64,
    /// Requests that generate.
    pub running: f64,
    /// Share of the KV cache in use, 0 to 1.
    pub kv_cache: f64,
    /// Tokens generated since the pod started, when the pod tells.
    pub generated: Option<f64>,
    /// Requests ended since the pod started, when the pod tells.
    pub finished: Option<f64>,
    /// Sum of the squares of their tokens, when the pod tells: how much their lengths differ.
    pub finished_squares: Option<f64>,
    /// Tokens of the requests without a place, when the pod tells (ours do).
    pub waiting_tokens: Option<f64>,
    /// Prompt tokens that it computes per second, once it has computed some, when it tells.
    pub prefill_rate: Option<f64>,
}

/// What gateways know of one service.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct GatewayLoad {
    /// Requests that wait for a replica.
    pub held: f64,
    /// Requests accepted and not ended, held ones included.
    pub in_flight: f64,
    /// Requests ended since the gateway started, without those that had no right to be.
    pub ended: f64,
}

/// A reading with its age.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Signal<T> {
    /// Younger than [`FRESH_SECONDS`].
    Fresh(T),
    /// Younger than [`STALE_SECONDS`]: good enough to stay where we are.
    Stale(T),
    /// Nothing is known; this is not zero.
    Absent,
}

impl<T: Copy> Signal<T> {
    /// Judges a reading by its age in seconds.
    #[must_use]
    pub fn of_age(reading: T, age: f64) -> Self {
        if age < FRESH_SECONDS {
            Self::Fresh(reading)
        } else if age < STALE_SECONDS {
            Self::Stale(reading)
        } else {
            Self::Absent
        }
    }

    /// The reading, whatever its age below absence.
    #[must_use]
    pub fn known(&self) -> Option<T> {
        match self {
            Self::Fresh(reading) | Self::Stale(reading) => Some(*reading),
            Self::Absent => None,
        }
    }

    /// The reading if it is new.
    #[must_use]
    pub fn fresh(&self) -> Option<T> {
        match self {
            Self::Fresh(reading) => Some(*reading),
            Self::Stale(_) | Self::Absent => None,
        }
    }
}

/// One line of Prometheus text.
struct Line<'a> {
    name: &'a str,
    labels: &'a str,
    value: f64,
}

/// The series of a text; lines that are not series are passed over.
fn lines(text: &str) -> impl Iterator<Item = Line<'_>> {
    text.lines().filter_map(|line| {
        let line = line.trim();
        if line.starts_with('#') {
            return None;
        }
        let name_end = line.find(['{', ' ', '\t'])?;
        let (name, rest) = line.split_at(name_end);
        let (labels, rest) = match rest.strip_prefix('{') {
            Some(inner) => {
                let end = closing_brace(inner)?;
                (&inner[..end], &inner[end + 1..])
            }
            None => ("", rest),
        };
        let value = rest.split_whitespace().next()?.parse().ok()?;
        Some(Line {
            name,
            labels,
            value,
        })
    })
}

/// Place of the brace that ends the labels: not one inside a quoted value.
fn closing_brace(text: &str) -> Option<usize> {
    let (mut quoted, mut escaped) = (false, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'}' if !quoted => return Some(at),
            _ => {}
        }
    }
    None
}

/// The value of a label whose values need no escapes, such as names of Kubernetes objects.
fn label<'a>(labels: &'a str, wanted: &str) -> Option<&'a str> {
    labels.split(',').find_map(|pair| {
        let (name, value) = pair.split_once('=')?;
        (name.trim() == wanted).then(|| value.trim().trim_matches('"'))
    })
}

/// A finite number that is not negative.
fn sane(value: f64) -> Option<f64> {
    (value.is_finite() && value >= 0.0).then_some(value)
}

/// A histogram's cumulative buckets, in the order of their edges.
#[derive(Default)]
struct Lengths {
    edge: f64,
    below: f64,
    squares: Option<f64>,
}

impl Lengths {
    fn add(&mut self, labels: &str, cumulative: f64) {
        let Some(edge) = label(labels, "le").and_then(|edge| edge.parse::<f64>().ok()) else {
            return;
        };
        if edge <= self.edge {
            *self = Self {
                squares: self.squares,
                ..Self::default()
            }; // another engine's
        }
        // What is past the last edge is taken to be there; else lengths are spread evenly over a bucket.
        let (low, high) = (self.edge, if edge.is_finite() { edge } else { self.edge });
        let square = (low * low + low * high + high * high) / 3.0;
        *self.squares.get_or_insert(0.0) += (cumulative - self.below).max(0.0) * square;
        (self.edge, self.below) = (high, cumulative);
    }
}

/// Reads a runtime pod's metrics; `None` when one of waiting, running and KV-cache use is missing or no number.
///
/// Several engines in one pod are added up; their KV-cache use is averaged.
#[must_use]
pub fn pod_load(text: &str) -> Option<PodLoad> {
    let mut sums: [Option<f64>; 6] = [None; 6];
    let (mut kv_sum, mut kv_count) = (0.0, 0.0);
    let mut lengths = Lengths::default();
    for line in lines(text) {
        let index = match line.name {
            WAITING => 0,
            RUNNING => 1,
            LENGTHS => {
                lengths.add(line.labels, sane(line.value)?);
                continue;
            }
            GENERATED => 2,
            FINISHED => 3,
            WAITING_TOKENS => 4,
            PREFILL_RATE => 5,
            KV_USAGE | KV_USAGE_OLD => {
                kv_sum += sane(line.value)?.min(1.0);
                kv_count += 1.0;
                continue;
            }
            _ => continue,
        };
        *sums[index].get_or_insert(0.0) += sane(line.value)?;
    }
    if kv_count == 0.0 {
        return None;
    }
    let [
        waiting,
        running,
        generated,
        finished,
        waiting_tokens,
        prefill_rate,
    ] = sums;
    Some(PodLoad {
        waiting: waiting?,
        running: running?,
        kv_cache: kv_sum / kv_count,
        generated,
        finished,
        finished_squares: lengths.squares,
        waiting_tokens,
        prefill_rate: prefill_rate.filter(|rate| *rate > 0.0),
    })
}

/// Reads a gateway's metrics: load by namespace and name.
#[must_use]
pub fn gateway_loads(text: &str) -> HashMap<(String, String), GatewayLoad> {
    let mut loads: HashMap<(String, String), GatewayLoad> = HashMap::new();
    for line in lines(text) {
        if !matches!(line.name, HELD | IN_FLIGHT | ENDED) {
            continue;
        }
        let (Some(namespace), Some(name), Some(value)) = (
            label(line.labels, "namespace"),
            label(line.labels, "name"),
            sane(line.value),
        ) else {
            continue;
        };
        // Requests that found no service, and those of strangers, are no load.
        if name.is_empty() || label(line.labels, "code") == Some("401") {
            continue;
        }
        let load = loads
            .entry((namespace.to_owned(), name.to_owned()))
            .or_default();
        match line.name {
            HELD => load.held += value,
            IN_FLIGHT => load.in_flight += value,
            _ => load.ended += value,
        }
    }
    loads
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]
    use super::*;
    use proptest::prelude::*;

    const POD: &str = "# HELP vllm:num_requests_waiting Requests without a place
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine=\"0\",model_name=\"a{b}\\\"c\"} 7
vllm:num_requests_running{engine=\"0\",model_name=\"m\"} 3 1700000000000
vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"m\"} 0.25
vllm:request_success_total{finished_reason=\"stop\",model_name=\"m\"} 10
vllm:request_success_total{finished_reason=\"length\",model_name=\"m\"} 2
vllm:generation_tokens_total{model_name=\"m\"} 1.5e3
vllm:request_generation_tokens_bucket{model_name=\"m\",le=\"10\"} 2
vllm:request_generation_tokens_bucket{model_name=\"m\",le=\"100\"} 12
vllm:request_generation_tokens_bucket{model_name=\"m\",le=\"+Inf\"} 12
vllm:request_generation_tokens_sum{model_name=\"m\"} 600
vllm:request_generation_tokens_count{model_name=\"m\"} 12
ashlar:waiting_tokens{model_name=\"m\"} 2100
ashlar:prefill_tokens_per_second{model_name=\"m\"} 4000.5
";

    #[test]
    fn a_pod_is_read() {
        assert_eq!(
            pod_load(POD),
            Some(PodLoad {
                waiting: 7.0,
                running: 3.0,
                kv_cache: 0.25,
                generated: Some(1500.0),
                finished: Some(12.0),
                // Two of up to 10 tokens, ten of 10 to 100, spread evenly.
                finished_squares: Some(2.0 * 100.0 / 3.0 + 10.0 * 11_100.0 / 3.0),
                waiting_tokens: Some(2100.0),
                prefill_rate: Some(4000.5),
            })
        );
    }

    #[test]
    fn an_older_vllm_with_two_engines_is_read() {
        let text = "vllm:num_requests_waiting{engine=\"0\"} 1.0\nvllm:num_requests_waiting{engine=\"1\"} 2.0\n\
                    vllm:num_requests_running 4\nvllm:gpu_cache_usage_perc{engine=\"0\"} 0.5\nvllm:gpu_cache_usage_perc{engine=\"1\"} 0.7\n";
        let load = pod_load(text).unwrap();
        assert_eq!((load.waiting, load.running), (3.0, 4.0));
        assert!((load.kv_cache - 0.6).abs() < 1e-9);
        assert_eq!((load.generated, load.finished), (None, None));
        assert_eq!((load.finished_squares, load.prefill_rate), (None, None));
        // Before the first prompt a rate of zero says nothing.
        let idle = pod_load(&POD.replace(" 4000.5", " 0")).unwrap();
        assert_eq!(idle.prefill_rate, None);
    }

    #[test]
    fn what_is_missing_or_no_number_is_absent_not_zero() {
        assert_eq!(pod_load(""), None);
        for gone in [WAITING, RUNNING, KV_USAGE] {
            let without: String = POD.lines().filter(|l| !l.starts_with(gone)).fold(
                String::new(),
                |mut text, line| {
                    text.push_str(line);
                    text.push('\n');
                    text
                },
            );
            assert_eq!(pod_load(&without), None, "{gone}");
        }
        assert_eq!(pod_load(&POD.replace(" 0.25", " NaN")), None);
        assert_eq!(pod_load(&POD.replace(" 7\n", " -1\n")), None);
    }

    #[test]
    fn a_gateway_is_read_by_service() {
        let text = "ashlar_gateway_held_requests{name=\"m\",namespace=\"chat\"} 4
ashlar_gateway_in_flight_requests{name=\"m\",namespace=\"chat\"} 9
ashlar_gateway_requests_total{code=\"200\",name=\"m\",namespace=\"chat\"} 30
ashlar_gateway_requests_total{code=\"429\",name=\"m\",namespace=\"chat\"} 2
ashlar_gateway_requests_total{code=\"401\",name=\"m\",namespace=\"chat\"} 50
ashlar_gateway_requests_total{code=\"404\",name=\"\",namespace=\"\"} 8
";
        let loads = gateway_loads(text);
        assert_eq!(loads.len(), 1);
        let load = loads[&("chat".to_owned(), "m".to_owned())];
        assert_eq!((load.held, load.in_flight, load.ended), (4.0, 9.0, 32.0));
    }

    #[test]
    fn age_decides() {
        assert_eq!(Signal::of_age(1, 2.9), Signal::Fresh(1));
        assert_eq!(Signal::of_age(1, 3.0), Signal::Stale(1));
        assert_eq!(Signal::of_age(1, 15.0), Signal::Absent);
        assert_eq!(Signal::of_age(1, 14.9).known(), Some(1));
        assert_eq!(Signal::of_age(1, 14.9).fresh(), None);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "\\PC*(\n\\PC*){0,20}") {
            let _ = (pod_load(&text), gateway_loads(&text));
        }
    }
}
