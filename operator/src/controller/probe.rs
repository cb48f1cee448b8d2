//! Questions to pods: how busy they are, how far a download is. Bounded in time and size, never repeated here.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use ashlar_crds::names::RUNTIME_PORT;
use bytes::Bytes;
use http::uri::PathAndQuery;
use k8s_openapi::api::core::v1::Pod;
use serde::Deserialize;

use crate::model_tls::{Trust, server_name_of};
use crate::pod_http::{Client, Peer, Settings};

/// Longest wait for a whole answer.
const TIMEOUT: Duration = Duration::from_millis(800);
/// Largest answer that is read.
const MAX_BYTES: usize = 1 << 20;
/// A download is asked how far it is, and status says so, at most this often.
const DOWNLOAD_EVERY: Duration = Duration::from_millis(4900);
/// The series that say how many requests a pod works on.
const IN_FLIGHT: [&str; 2] = ["vllm:num_requests_running", "vllm:num_requests_waiting"];
/// Asks for these series only; a server that does not know the query answers with all.
const IN_FLIGHT_QUERY: &str =
    "/metrics?name[]=vllm:num_requests_running&name[]=vllm:num_requests_waiting";

/// How far a download is, as `ashlar pull` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Download {
    /// Bytes on disk.
    pub downloaded_bytes: i64,
    /// Bytes of all files; 0 before that is known.
    pub total_bytes: i64,
}

/// Requests that a pod works on; none when it does not say.
pub(super) async fn in_flight(pod: &Pod, trust: &Arc<Trust>) -> Option<f64> {
    let name = server_name_of(pod);
    let tls = name.as_deref().map(|name| (trust, name));
    let text = get(pod, IN_FLIGHT_QUERY, tls).await?;
    sum_of(std::str::from_utf8(&text).ok()?)
}

/// How far the pod's download is; none when it does not say. What downloads speaks no TLS, whatever the runtime will.
async fn download(pod: &Pod) -> Option<Download> {
    serde_json::from_slice(&get(pod, "/status", None).await?).ok()
}

/// Downloads as last seen, by service. Bounded by the services that download at one time.
#[derive(Default)]
pub(super) struct Downloads(Mutex<HashMap<String, (Instant, Option<Download>)>>);

impl Downloads {
    /// How far the service's download is: that of one pod, asked at most every [`DOWNLOAD_EVERY`]. None when no pod
    /// downloads, or the one that does has not said.
    pub(super) async fn look(
        &self,
        namespace: &str,
        name: &str,
        pods: &[Arc<Pod>],
        pull_pods: &[Arc<Pod>],
    ) -> Option<Download> {
        let key = format!("{namespace}/{name}");
        let downloading = pods
            .iter()
            .chain(pull_pods)
            .filter(|pod| super::pods::is_downloading(pod))
            .min_by_key(|pod| pod.metadata.creation_timestamp.clone());
        let Some(pod) = downloading else {
            self.lock().remove(&key);
            return None;
        };
        let last = self.lock().get(&key).copied();
        if let Some((asked, said)) = last
            && asked.elapsed() < DOWNLOAD_EVERY
        {
            return said;
        }
        let said = download(pod).await;
        self.lock().insert(key, (Instant::now(), said));
        said
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, (Instant, Option<Download>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sum over the series of an exposition; none when a series is missing or no number.
fn sum_of(exposition: &str) -> Option<f64> {
    let mut total = 0.0;
    for name in IN_FLIGHT {
        let mut seen = false;
        for line in exposition.lines() {
            let Some(rest) = line.strip_prefix(name) else {
                continue;
            };
            if rest.starts_with(['{', ' ']) {
                total += rest.rsplit(' ').next()?.parse::<f64>().ok()?;
                seen = true;
            }
        }
        if !seen {
            return None;
        }
    }
    Some(total)
}

/// What a server of our own says, as text; none when it does not answer in time.
pub(super) async fn get_text(address: (IpAddr, u16), path: &str) -> Option<String> {
    let answer = ask(address, path.parse().ok()?, None).await?;
    String::from_utf8(answer.into()).ok()
}

/// Who has to be at the other end of a connection with TLS.
type Tls<'a> = Option<(&'a Arc<Trust>, &'a str)>;

async fn get(pod: &Pod, path: &'static str, tls: Tls<'_>) -> Option<Bytes> {
    let address: IpAddr = pod.status.as_ref()?.pod_ip.as_ref()?.parse().ok()?;
    let port = u16::try_from(RUNTIME_PORT).ok()?;
    ask((address, port), PathAndQuery::from_static(path), tls).await
}

async fn ask(address: (IpAddr, u16), path: PathAndQuery, tls: Tls<'_>) -> Option<Bytes> {
    let trust = tls.map_or_else(Trust::none, |(trust, _)| Arc::clone(trust));
    let client = Client::new(Settings::of_one_question(TIMEOUT), trust);
    let peer = Peer {
        address: address.into(),
        tls: tls.map(|(_, name)| name),
    };
    let answer = client.get(peer, path, MAX_BYTES);
    tokio::time::timeout(TIMEOUT, answer).await.ok()?
}

#[cfg(test)]
mod tests {
    use super::sum_of;

    #[test]
    fn a_missing_series_is_unknown_and_not_idle() {
        let running = "vllm:num_requests_running{model_name=\"m\"} 3\n";
        let waiting = "vllm:num_requests_waiting{model_name=\"m\"} 2.0\n";
        assert_eq!(sum_of(&format!("# HELP\n{running}{waiting}")), Some(5.0));
        assert_eq!(sum_of(running), None);
        assert_eq!(sum_of("vllm:num_requests_running_total 3\n"), None);
        assert_eq!(
            sum_of(&format!("{running}vllm:num_requests_waiting x\n")),
            None
        );
    }
}
