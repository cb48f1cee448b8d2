//! What to read after a failure: services, children, events and logs, in files; the conditions and events on stderr too.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::Namespace;
use crate::cluster::{SYSTEM_NAMESPACE, run};

/// Lines of each container's log.
const LOG_LINES: &str = "--tail=400";

/// Writes the state of the test's namespace and of the operator to a folder and names it on stderr. Never fails: the test's
/// own failure is the one to report.
#[allow(
    clippy::print_stderr,
    reason = "the dump belongs beside the failure that libtest prints"
)]
pub async fn write(namespace: &Namespace) {
    match collect(namespace).await {
        Ok((folder, summary)) => eprintln!("{summary}\nmore in {}", folder.display()),
        Err(error) => eprintln!(
            "the state of {} could not be written: {error:#}",
            namespace.name
        ),
    }
}

async fn collect(namespace: &Namespace) -> Result<(PathBuf, String)> {
    let folder = std::env::var_os("ASHLAR_E2E_DUMP").map_or_else(
        || std::env::temp_dir().join("ashlar-e2e-dump"),
        PathBuf::from,
    );
    let folder = folder.join(&namespace.name);
    std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let name = namespace.name.as_str();
    let mut summary = String::new();

    let kinds = "inferenceservices,controllerrevisions,deployments,pods,services,endpointslices,networkpolicies,events";
    save(
        &folder,
        "objects.yaml",
        &["get", kinds, "-n", name, "-o", "yaml"],
    )
    .await?;
    for (title, arguments) in [
        (
            "service",
            vec![
                "get",
                "inferenceservices",
                "-n",
                name,
                "-o",
                "jsonpath={range .items[*]}{.metadata.name}{\": \"}{.status.conditions}{\"\\n\"}{end}",
            ],
        ),
        ("pods", vec!["get", "pods", "-n", name, "-o", "wide"]),
        (
            "events",
            vec!["get", "events", "-n", name, "--sort-by=.lastTimestamp"],
        ),
    ] {
        let text = kubectl(&arguments).await;
        let _ = writeln!(summary, "--- {title}\n{text}");
    }
    for (of, file) in [(name, "pods.log"), (SYSTEM_NAMESPACE, "system.log")] {
        let pods = kubectl(&["get", "pods", "-n", of, "-o", "name"]).await;
        let mut logs = String::new();
        for pod in pods.lines() {
            let log = kubectl(&["logs", "-n", of, pod, "--all-containers", LOG_LINES]).await;
            let _ = writeln!(logs, "--- {pod}\n{log}");
        }
        std::fs::write(folder.join(file), logs)?;
    }
    Ok((folder, summary))
}

async fn save(folder: &Path, file: &str, arguments: &[&str]) -> Result<()> {
    std::fs::write(folder.join(file), kubectl(arguments).await)
        .with_context(|| format!("writing {file}"))
}

/// What kubectl prints, or why it does not.
async fn kubectl(arguments: &[&str]) -> String {
    run("kubectl", arguments)
        .await
        .unwrap_or_else(|error| format!("{error:#}"))
}
