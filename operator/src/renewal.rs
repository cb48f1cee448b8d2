//! Files that a Secret is mounted as are looked at again and again, so that a renewed Secret is taken without a restart.

use std::fmt::Display;
use std::time::Duration;

/// How often files are looked at; the kubelet needs about a minute to bring a new Secret.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// Calls `renew` for ever, which says whether something new was taken, and logs `taken` then, or `kept` with the problem.
pub(crate) async fn follow<E: Display>(
    renew: impl Fn() -> Result<bool, E>,
    taken: &str,
    kept: &str,
) {
    let mut said = String::new();
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let problem = match renew() {
            Ok(changed) => {
                if changed {
                    tracing::info!("{taken}");
                }
                String::new()
            }
            Err(error) => error.to_string(),
        };
        // Once: a Secret that stays broken is not told every few seconds.
        if !problem.is_empty() && problem != said {
            tracing::error!(problem, "{kept}");
        }
        said = problem;
    }
}
