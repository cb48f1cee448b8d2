//! Until when this process may write. A leader that stood still (a stopped process, a machine that slept) finds out only when
//! its timers run again that another leads; until then its writes fail here.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use http::Request;
use kube::{Client, client::Body};
use tokio::sync::Semaphore;

/// The time for which the leadership is sure. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Tenure(Arc<Mutex<Option<Instant>>>);

#[derive(Debug, thiserror::Error)]
#[error("the Lease has not been renewed in time: another may lead")]
struct Over;

impl Tenure {
    /// It is sure until `end`.
    pub fn lasts_until(&self, end: Instant) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(end);
    }

    /// True while it is sure.
    #[must_use]
    pub fn lasts(&self) -> bool {
        let end = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        end.is_some_and(|end| Instant::now() < end)
    }

    /// A client whose writes fail outside the tenure. Reads go on. At most `most` calls wait for an answer at one time: each has
    /// a connection of its own, with all its buffers.
    #[must_use]
    pub fn guard(&self, client: Client, most: usize) -> Client {
        let (tenure, namespace) = (self.clone(), client.default_namespace().to_owned());
        let turns = Arc::new(Semaphore::new(most));
        let guarded = tower::service_fn(move |request: Request<Body>| {
            let (client, tenure, turns) = (client.clone(), tenure.clone(), Arc::clone(&turns));
            async move {
                let _turn = turns
                    .acquire()
                    .await
                    .expect("nobody closes it: this is a bug");
                if request.method().is_safe() || tenure.lasts() {
                    client.send(request).await
                } else {
                    Err(kube::Error::Service(Over.into()))
                }
            }
        });
        Client::new(guarded, namespace)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::time::Duration;

    use http::Response;
    use k8s_openapi::api::core::v1::ConfigMap;
    use kube::{Api, api::PostParams};
    use tower_test::mock;

    use super::*;

    #[tokio::test]
    async fn no_more_calls_wait_at_one_time_than_there_are_turns() {
        let (service, mut server) = mock::pair::<Request<Body>, Response<Body>>();
        let tenure = Tenure::default();
        tenure.lasts_until(Instant::now() + Duration::from_secs(60));
        let client = tenure.guard(Client::new(service, "default"), 2);
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..3 {
            let maps: Api<ConfigMap> = Api::default_namespaced(client.clone());
            let map = ConfigMap::default();
            calls.spawn(async move { maps.create(&PostParams::default(), &map).await });
        }
        let (_, first) = server.next_request().await.unwrap();
        let (_, second) = server.next_request().await.unwrap();
        let early = tokio::time::timeout(Duration::from_millis(50), server.next_request()).await;
        assert!(early.is_err(), "a third call while two wait");
        let answer = || Response::new(Body::from(b"{\"metadata\":{}}".to_vec()));
        first.send_response(answer());
        let (_, third) = server.next_request().await.unwrap();
        second.send_response(answer());
        third.send_response(answer());
        while let Some(called) = calls.join_next().await {
            called.unwrap().unwrap();
        }
    }
}
