//! Waiting for conditions. Every wait has a limit and a name, and its error tells what was last seen.

use std::fmt::Debug;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;

/// How often a condition that cannot be watched is looked at.
const INTERVAL: Duration = Duration::from_millis(100);

/// A pod of the default model: scheduled, started, model loaded, probes passed. Generous for a busy two-core machine.
pub const STARTUP: Duration = Duration::from_secs(120);

/// A change that needs controllers but no model to load.
pub const REACTION: Duration = Duration::from_secs(60);

/// What one look at a condition found.
#[derive(Debug)]
pub enum Seen<T> {
    /// It holds; the value is the wait's result.
    Done(T),
    /// Not yet; the text is what the error says if the limit passes.
    NotYet(String),
}

/// Looks again and again until `probe` says [`Seen::Done`].
///
/// # Errors
/// When `limit` passes, naming `what` and the last answer; a failed probe counts as "not yet".
pub async fn until<T>(
    what: &str,
    limit: Duration,
    mut probe: impl AsyncFnMut() -> Result<Seen<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        let last = match probe().await {
            Ok(Seen::Done(value)) => return Ok(value),
            Ok(Seen::NotYet(last)) => last,
            Err(error) => format!("{error:#}"),
        };
        if Instant::now() >= deadline {
            bail!("waited {} s for {what}; last seen: {last}", limit.as_secs());
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Waits until the object `name` satisfies `condition`, and returns it.
///
/// # Errors
/// When `limit` passes, with the object's last state.
pub async fn object<K>(
    api: &Api<K>,
    name: &str,
    what: &str,
    limit: Duration,
    condition: impl Fn(&K) -> bool,
) -> Result<K>
where
    K: Clone + Debug + DeserializeOwned + Resource + serde::Serialize,
{
    until(&format!("{name}: {what}"), limit, async || {
        Ok(match api.get_opt(name).await? {
            Some(object) if condition(&object) => Seen::Done(object),
            Some(object) => Seen::NotYet(state(&object)),
            None => Seen::NotYet("it does not exist".to_owned()),
        })
    })
    .await
}

/// Waits until the object `name` is gone.
///
/// # Errors
/// When `limit` passes.
pub async fn gone<K>(api: &Api<K>, name: &str, limit: Duration) -> Result<()>
where
    K: Clone + Debug + DeserializeOwned,
{
    until(&format!("the end of {name}"), limit, async || {
        Ok(match api.get_opt(name).await? {
            None => Seen::Done(()),
            Some(_) => Seen::NotYet("it is still there".to_owned()),
        })
    })
    .await
}

/// The object's status, or all of it when it has none, in one line.
fn state<K: serde::Serialize>(object: &K) -> String {
    let value = serde_json::to_value(object).unwrap_or_default();
    value.get("status").unwrap_or(&value).to_string()
}
