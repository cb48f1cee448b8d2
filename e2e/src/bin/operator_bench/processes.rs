//! Operators as processes: started, asked for their metrics, measured, and ended in one way or another.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Longest wait for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// A running operator.
pub(crate) struct Operator {
    process: Child,
    port: u16,
}

impl Operator {
    /// Starts one under the name `user`.
    pub(crate) fn start(binary: &Path, state: &Path, user: &str, port: u16) -> Result<Self> {
        Self::start_at(binary, state, user, port, 0)
    }

    /// The same with a clock that is so many seconds ahead.
    pub(crate) fn start_at(
        binary: &Path,
        state: &Path,
        user: &str,
        port: u16,
        skew: i64,
    ) -> Result<Self> {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(state.join(format!("{user}.log")))?;
        let mut command = Command::new(binary);
        if skew != 0 {
            command
                .env("LD_PRELOAD", state.join("skew.so"))
                .env("CLOCK_SKEW", skew.to_string());
        }
        let process = command
            .args(["--log", "warn", "run", "--runtime-image=bench/runtime:1"])
            .arg(format!("--admin-listen=127.0.0.1:{port}"))
            .arg(format!("--identity={user}"))
            .env("KUBECONFIG", state.join(format!("{user}.kubeconfig")))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {}", binary.display()))?;
        Ok(Self { process, port })
    }

    /// True once the process is over.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.process.try_wait().is_ok_and(|status| status.is_some())
    }

    async fn get(&self, path: &str) -> Result<String> {
        let mut socket = tokio::net::TcpStream::connect(("127.0.0.1", self.port)).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: operator\r\nConnection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).await?;
        let mut text = String::new();
        socket.read_to_string(&mut text).await?;
        Ok(text)
    }

    /// Sum of the series of a metric whose labels hold `part`.
    pub(crate) async fn metric(&self, name: &str, part: &str) -> Result<f64> {
        let text = self.get("/metrics").await?;
        let values = text.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let of_metric = rest.starts_with(['{', ' ']) && rest.contains(part);
            of_metric.then(|| rest.rsplit(' ').next()?.parse::<f64>().ok())?
        });
        Ok(values.sum())
    }

    /// Waits until this one leads.
    pub(crate) async fn leads(&self) -> Result<()> {
        until("the operator leads", || async {
            self.metric("ashlar_operator_leader", "")
                .await
                .is_ok_and(|n| n > 0.0)
        })
        .await
    }

    /// Waits until its caches are filled.
    pub(crate) async fn is_warm(&self) -> Result<()> {
        until("the operator is ready", || async {
            self.get("/readyz")
                .await
                .is_ok_and(|text| text.starts_with("HTTP/1.1 200"))
        })
        .await
    }

    /// Most memory it ever had resident, and what it has now, in bytes.
    pub(crate) fn memory(&self) -> Result<(u64, u64)> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
            Some(kib * 1024)
        };
        let (peak, now) = (field("VmHWM:"), field("VmRSS:"));
        Ok((peak.context("VmHWM")?, now.context("VmRSS")?))
    }

    /// CPU time so far.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.process.id()))?;
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .collect();
        let ticks = |index: usize| fields.get(index).and_then(|f| f.parse::<u64>().ok());
        let (user, system) = (ticks(11).context("utime")?, ticks(12).context("stime")?);
        Ok(Duration::from_millis((user + system) * 10))
    }

    /// SIGKILL: no time for anything.
    pub(crate) fn kill(mut self) -> Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }

    /// Sends it a signal: `TERM`, `STOP` or `CONT`.
    pub(crate) fn signal(&self, signal: &str) -> Result<()> {
        let asked = Command::new("kill")
            .args(["-s", signal])
            .arg(self.process.id().to_string())
            .status()?;
        anyhow::ensure!(asked.success(), "kill failed");
        Ok(())
    }

    /// SIGTERM, and waits for the end.
    pub(crate) async fn terminate(self) -> Result<()> {
        self.signal("TERM")?;
        self.ended().await
    }

    /// Waits for its end.
    pub(crate) async fn ended(mut self) -> Result<()> {
        let start = Instant::now();
        while self.process.try_wait()?.is_none() {
            if start.elapsed() > PATIENCE {
                bail!("the operator does not end");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        // Both fail when it has ended already, which is as good.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Looks again and again until it is so.
pub(crate) async fn until<F: Future<Output = bool>>(
    what: &str,
    look: impl Fn() -> F,
) -> Result<()> {
    until_within(PATIENCE, what, look).await
}

/// The same with a patience of its own.
pub(crate) async fn until_within<F: Future<Output = bool>>(
    patience: Duration,
    what: &str,
    look: impl Fn() -> F,
) -> Result<()> {
    let start = Instant::now();
    while !look().await {
        if start.elapsed() > patience {
            bail!("not within {patience:?}: {what}");
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}
