//! How far a pull is: one shared state, seen as a bar, as log lines, and by HTTP.

use std::{
    io::IsTerminal,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{Json, Router, extract::State, routing::get};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

/// Time between two log lines of a running download, when there is no terminal.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// What a pull is doing. Serialised in lower case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Asking the hub for commit and listing.
    Resolving,
    /// Another process pulls the same model.
    Waiting,
    /// Bytes are moving.
    Downloading,
    /// All files are there and checked.
    Ready,
    /// It gave up; `error` says why.
    Failed,
}

/// The status document, as the operator reads it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Current phase.
    pub phase: Phase,
    /// Commit, once resolved.
    pub revision: Option<String>,
    /// File most recently started.
    pub file: Option<String>,
    /// Bytes on disk, resumed ones included.
    pub downloaded_bytes: u64,
    /// Bytes of all wanted files; 0 before the listing is known.
    pub total_bytes: u64,
    /// Why it failed.
    pub error: Option<String>,
}

struct Shared {
    // A mutex, not a channel: writers are a few threads, readers one bar and rare HTTP requests.
    named: Mutex<Named>,
    downloaded: AtomicU64,
    total: AtomicU64,
    bar: ProgressBar,
    log: bool,
}

struct Named {
    phase: Phase,
    revision: Option<String>,
    file: Option<String>,
    error: Option<String>,
    logged: Instant,
}

/// Handle on the state of one pull; clones share it.
#[derive(Clone)]
pub struct Progress(Arc<Shared>);

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.status().fmt(f)
    }
}

impl Progress {
    /// A bar on a terminal's stderr, log lines otherwise.
    #[must_use]
    pub fn visible() -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if terminal {
            ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr())
        } else {
            ProgressBar::hidden()
        };
        let style = ProgressStyle::with_template(
            "{msg:30!} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        );
        bar.set_style(style.expect("the template is constant and valid: this is a bug"));
        Self::with(bar, !terminal)
    }

    /// No output at all.
    #[must_use]
    pub fn silent() -> Self {
        Self::with(ProgressBar::hidden(), false)
    }

    fn with(bar: ProgressBar, log: bool) -> Self {
        let named = Named {
            phase: Phase::Resolving,
            revision: None,
            file: None,
            error: None,
            logged: Instant::now(),
        };
        Self(Arc::new(Shared {
            named: Mutex::new(named),
            downloaded: AtomicU64::new(0),
            total: AtomicU64::new(0),
            bar,
            log,
        }))
    }

    fn named<T>(&self, change: impl FnOnce(&mut Named) -> T) -> T {
        // A reader that panicked leaves plain data behind: it stays usable.
        change(&mut self.0.named.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Enters a phase.
    pub fn set_phase(&self, phase: Phase) {
        self.named(|named| named.phase = phase);
        match phase {
            Phase::Ready => self.0.bar.finish_and_clear(),
            Phase::Failed => self.0.bar.abandon(),
            Phase::Waiting => self.0.bar.set_message("waiting for another pull"),
            Phase::Resolving | Phase::Downloading => {}
        }
    }

    /// Ends in failure, with the reason.
    pub fn fail(&self, reason: &str) {
        self.named(|named| named.error = Some(reason.to_owned()));
        self.set_phase(Phase::Failed);
    }

    pub(crate) fn set_revision(&self, commit: &str) {
        self.named(|named| named.revision = Some(commit.to_owned()));
    }

    pub(crate) fn set_total(&self, bytes: u64) {
        self.0.total.store(bytes, Ordering::Relaxed);
        self.0.bar.set_length(bytes);
    }

    /// Starts counting one file.
    pub(crate) fn start_file(&self, path: &str) -> FileProgress {
        self.named(|named| named.file = Some(path.to_owned()));
        self.0.bar.set_message(path.to_owned());
        FileProgress {
            progress: self.clone(),
            counted: 0,
        }
    }

    /// A copy of the state.
    #[must_use]
    pub fn status(&self) -> Status {
        self.named(|named| Status {
            phase: named.phase,
            revision: named.revision.clone(),
            file: named.file.clone(),
            downloaded_bytes: self.0.downloaded.load(Ordering::Relaxed),
            total_bytes: self.0.total.load(Ordering::Relaxed),
            error: named.error.clone(),
        })
    }

    fn log_now_and_then(&self) {
        if !self.0.log || !self.named(|named| named.logged.elapsed() >= LOG_EVERY) {
            return;
        }
        self.named(|named| named.logged = Instant::now());
        let status = self.status();
        tracing::info!(
            file = status.file,
            downloaded_bytes = status.downloaded_bytes,
            total_bytes = status.total_bytes,
            "downloading"
        );
    }
}

/// One file's share of the count. Setting it lower (a restart) takes the difference back.
pub(crate) struct FileProgress {
    progress: Progress,
    counted: u64,
}

impl FileProgress {
    pub(crate) fn set(&mut self, bytes: u64) {
        let shared = &self.progress.0;
        // Wrapping addition of the difference: a smaller value subtracts.
        shared
            .downloaded
            .fetch_add(bytes.wrapping_sub(self.counted), Ordering::Relaxed);
        self.counted = bytes;
        shared
            .bar
            .set_position(shared.downloaded.load(Ordering::Relaxed));
        self.progress.log_now_and_then();
    }
}

/// Serves the status document at `/` and `/status` until the process ends; returns the address.
///
/// # Errors
/// When the port cannot be bound or the thread not started.
pub fn serve_status(progress: Progress, port: u16) -> std::io::Result<SocketAddr> {
    // One dual-stack socket where IPv6 exists, so that single-stack clusters of either kind can read it.
    let listener = std::net::TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
        .or_else(|_| std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let document = |State(progress): State<Progress>| async move { Json(progress.status()) };
    let router = Router::new()
        .route("/", get(document))
        .route("/status", get(document))
        .with_state(progress);
    std::thread::Builder::new()
        .name("pull-status".to_owned())
        .spawn(move || {
            runtime.block_on(async move {
                let served = async {
                    axum::serve(tokio::net::TcpListener::from_std(listener)?, router).await
                };
                if let Err(error) = served.await {
                    tracing::warn!(%error, "the status endpoint stopped");
                }
            });
        })?;
    Ok(address)
}
