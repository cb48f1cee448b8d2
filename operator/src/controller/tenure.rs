//! Until when this process may write. A leader that stood still (a stopped process, a machine that slept) finds out only when
//! its timers run again that another leads; until then its writes fail here.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use http::Request;
use kube::{Client, client::Body};

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

    /// A client whose writes fail outside the tenure. Reads go on.
    #[must_use]
    pub fn guard(&self, client: Client) -> Client {
        let (tenure, namespace) = (self.clone(), client.default_namespace().to_owned());
        let guarded = tower::service_fn(move |request: Request<Body>| {
            let (client, tenure) = (client.clone(), tenure.clone());
            async move {
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
